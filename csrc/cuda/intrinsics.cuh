// GPU primitives that standard C++ lacks: threads of a block, barriers, atomics, shared memory.
// Kernels use the hardware only through this file, so that tests can replace it and run them on a
// CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/dtype.h"

namespace fastlars::cuda {

constexpr int kThreads = 256;  // of a block: those that work on a chunk
constexpr int kLanes = 32;     // of a warp
constexpr int kWarps = kThreads / kLanes;

__device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int block() { return static_cast<int>(blockIdx.x); }
__device__ __forceinline__ int blocks() { return static_cast<int>(gridDim.x); }

// Waits for all threads of the block. Each then sees what the others wrote.
__device__ __forceinline__ void barrier() { __syncthreads(); }

// The same, where warps wait at different lines of the code.
__device__ __forceinline__ void meet() { asm volatile("bar.sync 0;" ::: "memory"); }

// The same, within one warp.
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// The sum over a warp. All its lanes get the same bits.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int mask = kLanes / 2; mask > 0; mask /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, mask);
  return value;
}

// The address of global memory as PTX takes it.
__device__ __forceinline__ std::size_t global(const void* place) {
  return __cvta_generic_to_global(place);
}

// Atomics on global memory, between all blocks of the device. Each returns the old value.
__device__ __forceinline__ std::uint32_t add_relaxed(std::uint32_t* place, std::uint32_t n) {
  std::uint32_t before;
  asm volatile("atom.add.relaxed.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(global(place)), "r"(n)
               : "memory");
  return before;
}

// A thread that reads the new value also sees all that was written before this addition.
__device__ __forceinline__ std::uint32_t add_acq_rel(std::uint32_t* place, std::uint32_t n) {
  std::uint32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(global(place)), "r"(n)
               : "memory");
  return before;
}

__device__ __forceinline__ std::uint32_t load_relaxed(const std::uint32_t* place) {
  std::uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(global(place)) : "memory");
  return value;
}

__device__ __forceinline__ std::uint64_t load_relaxed(const std::uint64_t* place) {
  std::uint64_t value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(global(place)) : "memory");
  return value;
}

__device__ __forceinline__ void store_relaxed(std::uint64_t* place, std::uint64_t value) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" : : "l"(global(place)), "l"(value) : "memory");
}

__device__ __forceinline__ void store_relaxed(std::uint32_t* place, std::uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" : : "l"(global(place)), "r"(value) : "memory");
}

// Pauses between two reads of a word that another block will write. Every such wait ends. If a bug
// kept it from ending, the launch would hold the device forever: so after about ten seconds, a
// write to address 0 ends the launch with an error.
class Backoff {
 public:
  __device__ void pause() {
    __nanosleep(64);
    if (++reads_ < 1u << 24) return;
    asm volatile("st.global.u32 [%0], %1;" : : "l"(std::uint64_t{0}), "r"(0) : "memory");
  }

 private:
  unsigned reads_ = 0;
};

// Shared memory that another warp reads or writes at the same time.
__device__ __forceinline__ int load_shared(const int* place) {
  return *static_cast<const volatile int*>(place);
}
__device__ __forceinline__ void store_shared(int* place, int value) {
  *static_cast<volatile int*>(place) = value;
}

// Shared memory whose size is set at launch, on a 16-byte boundary.
__device__ __forceinline__ float4* dynamic_shared() {
  extern __shared__ float4 fastlars_dynamic_shared[];
  return fastlars_dynamic_shared;
}

// Plain accesses of 2, 4, 8 or 16 bytes of global memory. In PTX, they stay wide and in the order
// of the source: the compiler may split or reorder accesses in plain C++, and __ldca makes loads
// whose order other threads of the multiprocessor must see, so that the hardware may have to queue
// them.
__device__ __forceinline__ uint4 load_plain(const uint4* place) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(global(place)));
  return v;
}
__device__ __forceinline__ uint2 load_plain(const uint2* place) {
  uint2 v;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(global(place)));
  return v;
}
__device__ __forceinline__ std::uint32_t load_plain(const std::uint32_t* place) {
  std::uint32_t v;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(global(place)));
  return v;
}
__device__ __forceinline__ std::uint16_t load_plain(const std::uint16_t* place) {
  std::uint16_t v;
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(global(place)));
  return v;
}

__device__ __forceinline__ void store_plain(uint4* place, const uint4& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(global(place)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
__device__ __forceinline__ void store_plain(uint2* place, const uint2& v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};"
               :
               : "l"(global(place)), "r"(v.x), "r"(v.y)
               : "memory");
}
__device__ __forceinline__ void store_plain(std::uint32_t* place, std::uint32_t v) {
  asm volatile("st.global.u32 [%0], %1;" : : "l"(global(place)), "r"(v) : "memory");
}
__device__ __forceinline__ void store_plain(std::uint16_t* place, std::uint16_t v) {
  asm volatile("st.global.u16 [%0], %1;" : : "l"(global(place)), "h"(v) : "memory");
}

// `Streaming`: will not be reused soon, so evict it from the cache first (ld.cs, st.cs).
template <bool Streaming, class V>
__device__ __forceinline__ V read(const V* place) {
  return Streaming ? __ldcs(place) : load_plain(place);
}

template <bool Streaming, class V>
__device__ __forceinline__ void write(V* place, V value) {
  if (Streaming) {
    __stcs(place, value);
  } else {
    store_plain(place, value);
  }
}

}  // namespace fastlars::cuda
