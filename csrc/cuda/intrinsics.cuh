// What a GPU has and C++ has not: threads of a block, barriers, atomics, shared memory. Kernels
// reach the hardware through this file alone, so that tests can put another in its place and run
// them on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/dtype.h"

namespace fastlars::cuda {

constexpr int kThreads = 256;  // of a block that work on a chunk
constexpr int kLanes = 32;     // of a warp
constexpr int kWarps = kThreads / kLanes;

__device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int block() { return static_cast<int>(blockIdx.x); }
__device__ __forceinline__ int blocks() { return static_cast<int>(gridDim.x); }

// All threads of the block arrive before any goes on, and see what the others wrote.
__device__ __forceinline__ void barrier() { __syncthreads(); }

// The same, for warps that come to it on different lines.
__device__ __forceinline__ void meet() { asm volatile("bar.sync 0;" ::: "memory"); }

// The same for one warp alone.
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// The sum over a warp: the same bits in all its lanes.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int mask = kLanes / 2; mask > 0; mask /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, mask);
  return value;
}

// Atomics on global memory, between all blocks of the device. Each returns what was there before.
__device__ __forceinline__ std::uint32_t add_relaxed(std::uint32_t* place, std::uint32_t n) {
  std::uint32_t before;
  asm volatile("atom.add.relaxed.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(place)), "r"(n)
               : "memory");
  return before;
}

// Who sees the sum also sees all that was written before it was added to.
__device__ __forceinline__ std::uint32_t add_acq_rel(std::uint32_t* place, std::uint32_t n) {
  std::uint32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(place)), "r"(n)
               : "memory");
  return before;
}

__device__ __forceinline__ std::uint32_t load_relaxed(const std::uint32_t* place) {
  std::uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(place))
               : "memory");
  return value;
}

__device__ __forceinline__ std::uint64_t load_relaxed(const std::uint64_t* place) {
  std::uint64_t value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];"
               : "=l"(value)
               : "l"(__cvta_generic_to_global(place))
               : "memory");
  return value;
}

__device__ __forceinline__ void store_relaxed(std::uint64_t* place, std::uint64_t value) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;"
               :
               : "l"(__cvta_generic_to_global(place)), "l"(value)
               : "memory");
}

__device__ __forceinline__ void store_relaxed(std::uint32_t* place, std::uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;"
               :
               : "l"(__cvta_generic_to_global(place)), "r"(value)
               : "memory");
}

// Between two looks at what another block is to write. Such a wait ends by itself. Should it not,
// the launch must not hold the device for ever: after some ten seconds it ends with an error, as
// any write to address 0 does.
class Patience {
 public:
  __device__ void pause() {
    __nanosleep(64);
    if (++looks_ < 1u << 24) return;
    asm volatile("st.global.u32 [%0], %1;" : : "l"(std::uint64_t{0}), "r"(0) : "memory");
  }

 private:
  unsigned looks_ = 0;
};

// Shared memory that another warp reads or writes meanwhile.
__device__ __forceinline__ int load_shared(const int* place) {
  return *static_cast<const volatile int*>(place);
}
__device__ __forceinline__ void store_shared(int* place, int value) {
  *static_cast<volatile int*>(place) = value;
}

// Shared memory whose size the launch decides, on a 16-byte boundary.
__device__ __forceinline__ float4* dynamic_shared() {
  extern __shared__ float4 fastlars_dynamic_shared[];
  return fastlars_dynamic_shared;
}

// Plain accesses of 2, 4, 8 or 16 bytes of global memory. They are written in PTX so that they stay
// wide, and in the order in which they are written: the compiler splits plain C++, and __ldca makes
// loads that other threads of the multiprocessor must see in order, which the hardware may have to
// queue.
__device__ __forceinline__ uint4 load_plain(const uint4* place) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(__cvta_generic_to_global(place)));
  return v;
}
__device__ __forceinline__ uint2 load_plain(const uint2* place) {
  uint2 v;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "l"(__cvta_generic_to_global(place)));
  return v;
}
__device__ __forceinline__ std::uint32_t load_plain(const std::uint32_t* place) {
  std::uint32_t v;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(__cvta_generic_to_global(place)));
  return v;
}
__device__ __forceinline__ std::uint16_t load_plain(const std::uint16_t* place) {
  std::uint16_t v;
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(__cvta_generic_to_global(place)));
  return v;
}

__device__ __forceinline__ void store_plain(uint4* place, const uint4& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(place)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
__device__ __forceinline__ void store_plain(uint2* place, const uint2& v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};"
               :
               : "l"(__cvta_generic_to_global(place)), "r"(v.x), "r"(v.y)
               : "memory");
}
__device__ __forceinline__ void store_plain(std::uint32_t* place, std::uint32_t v) {
  asm volatile("st.global.u32 [%0], %1;"
               :
               : "l"(__cvta_generic_to_global(place)), "r"(v)
               : "memory");
}
__device__ __forceinline__ void store_plain(std::uint16_t* place, std::uint16_t v) {
  asm volatile("st.global.u16 [%0], %1;"
               :
               : "l"(__cvta_generic_to_global(place)), "h"(v)
               : "memory");
}

// `Last`: nobody reads the place again before much else was read, so that the cache is better kept
// for something else.
template <bool Last, class V>
__device__ __forceinline__ V read(const V* place) {
  return Last ? __ldcs(place) : load_plain(place);
}

template <bool Last, class V>
__device__ __forceinline__ void write(V* place, V value) {
  if (Last) {
    __stcs(place, value);
  } else {
    store_plain(place, value);
  }
}

}  // namespace fastlars::cuda
