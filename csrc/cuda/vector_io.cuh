// Loads and stores of a chunk: vectors of four elements, all loads in flight before the first
// result is used. A thread has the same elements for any alignment of the tensors, so alignment
// does not change sums. Only an array that is off its boundary is read element by element.
#pragma once

#include "core/random.h"
#include "cuda/intrinsics.cuh"
#include "cuda/kernel_args.h"

namespace fastlars::cuda {

constexpr int kVector = 4;                          // elements
constexpr int kStride = kThreads * kVector;         // elements from a thread's vector to its next
constexpr int kVectors = kChunkElements / kStride;  // of a thread, in a whole chunk
static_assert(kVectors * kStride == kChunkElements, "threads and vectors make up a chunk");

// The dtypes of a launch: compile-time constants, or read from the kernel's arguments, which costs
// no registers.
template <class Rule>
struct Float32Only {
  __device__ explicit Float32Only(const KernelArgs<Rule>&) {}
  static __device__ constexpr Dtype weight() { return Dtype::float32; }
  static __device__ constexpr Dtype grad() { return Dtype::float32; }
  static __device__ constexpr Dtype state() { return Dtype::float32; }
  static __device__ constexpr Dtype copy() { return Dtype::float32; }
  static constexpr bool has_copies = false;
};

template <class Rule>
struct RuntimeDtypes {
  const KernelArgs<Rule>& args;
  __device__ explicit RuntimeDtypes(const KernelArgs<Rule>& args) : args(args) {}
  __device__ Dtype weight() const { return args.weight_dtype; }
  __device__ Dtype grad() const { return args.grad_dtype; }
  __device__ Dtype state() const { return args.state_dtype; }
  __device__ Dtype copy() const { return args.copy_dtype; }
  static constexpr bool has_copies = true;
};

// Four elements as stored; 16-bit types fill only x and y.
struct PackedVector {
  std::uint32_t x, y, z, w;
};

__device__ __forceinline__ float value(Dtype type, const PackedVector& packed, int k) {
  if (type == Dtype::float32) {
    return float_of(k == 0 ? packed.x : k == 1 ? packed.y : k == 2 ? packed.z : packed.w);
  }
  const std::uint32_t word = k < 2 ? packed.x : packed.y;
  const auto half = static_cast<std::uint16_t>(k % 2 == 0 ? word : word >> 16);
  return type == Dtype::bfloat16 ? to_float(bfloat16{half}) : to_float(float16{half});
}

struct Vector {
  float x[kVector];
  Vector() = default;
  __device__ explicit Vector(const float4& v) : x{v.x, v.y, v.z, v.w} {}
  __device__ Vector(Dtype type, const PackedVector& packed)
      : x{value(type, packed, 0), value(type, packed, 1), value(type, packed, 2),
          value(type, packed, 3)} {}
};

__device__ __forceinline__ std::uint16_t half_bits(Dtype type, float value) {
  return type == Dtype::bfloat16 ? from_float<bfloat16>(value).bits
                                 : from_float<float16>(value).bits;
}

// The value that a later load of the stored one returns.
__device__ __forceinline__ float stored(Dtype type, float value) {
  return type == Dtype::bfloat16 ? fastlars::stored<bfloat16>(value) : value;
}

__device__ __forceinline__ bool on_boundary(std::uintptr_t address, int bytes) {
  return address % static_cast<unsigned>(bytes) == 0;
}

// `batch` of a thread's vectors in a chunk of `size` elements, from vector `first` on.
template <bool Whole, int Batch>
struct VectorSlice {
  static constexpr bool whole = Whole;
  static constexpr int batch = Batch;
  int first, size;
  __device__ int index(int n) const { return (first + n) * kStride + thread() * kVector; }
  // Index of a vector in a chunk that is cached in shared memory.
  __device__ int shared_index(int n) const { return (first + n) * kThreads + thread(); }
  __device__ int count(int n) const {
    const int left = size - index(n);
    return Whole || left > kVector ? kVector : left;
  }
};

template <bool Streaming, class Slice, class Bits>
__device__ __forceinline__ void load_narrow(PackedVector (&packed)[Slice::batch], const Bits* base,
                                            Slice slice) {
#pragma unroll
  for (int n = 0; n < Slice::batch; ++n) {
    std::uint32_t bits[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      bits[k] = k < slice.count(n) ? read<Streaming>(base + slice.index(n) + k) : 0u;
    }
    packed[n] = sizeof(Bits) == 4
                    ? PackedVector{bits[0], bits[1], bits[2], bits[3]}
                    : PackedVector{bits[0] | bits[1] << 16, bits[2] | bits[3] << 16, 0u, 0u};
  }
}

// Elements past the end of the chunk are zeros. Both widths in full: as one template, the compiler
// takes more registers and spills on sm_100 and sm_120.
template <bool Streaming, class Slice>
__device__ __forceinline__ void load(PackedVector (&packed)[Slice::batch], Dtype type,
                                     std::uintptr_t base, Slice slice) {
  if (type == Dtype::float32) {
    const auto* words = reinterpret_cast<const std::uint32_t*>(base);
    if (Slice::whole && on_boundary(base, 16)) {
#pragma unroll
      for (int n = 0; n < Slice::batch; ++n) {
        const auto v = read<Streaming>(reinterpret_cast<const uint4*>(words + slice.index(n)));
        packed[n] = {v.x, v.y, v.z, v.w};
      }
    } else {
      load_narrow<Streaming>(packed, words, slice);
    }
  } else {
    const auto* halves = reinterpret_cast<const std::uint16_t*>(base);
    if (Slice::whole && on_boundary(base, 8)) {
#pragma unroll
      for (int n = 0; n < Slice::batch; ++n) {
        const auto v = read<Streaming>(reinterpret_cast<const uint2*>(halves + slice.index(n)));
        packed[n] = {v.x, v.y, 0u, 0u};
      }
    } else {
      load_narrow<Streaming>(packed, halves, slice);
    }
  }
}

// Stores vector `n` of the slice. Bits: an unsigned integer of 16 or 32 bits.
template <bool Streaming, class Slice, class Bits>
__device__ __forceinline__ void store_bits(const Bits (&bits)[kVector], Bits* base, Slice slice,
                                           int n) {
  Bits* to = base + slice.index(n);
  if (Slice::whole && on_boundary(reinterpret_cast<std::uintptr_t>(base), 4 * sizeof(Bits))) {
    if constexpr (sizeof(Bits) == 4) {
      write<Streaming>(reinterpret_cast<uint4*>(to),
                       make_uint4(bits[0], bits[1], bits[2], bits[3]));
    } else {
      const std::uint32_t low = bits[0] | static_cast<std::uint32_t>(bits[1]) << 16;
      const std::uint32_t high = bits[2] | static_cast<std::uint32_t>(bits[3]) << 16;
      write<Streaming>(reinterpret_cast<uint2*>(to), make_uint2(low, high));
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    if (k < slice.count(n)) write<Streaming>(to + k, bits[k]);
  }
}

template <bool Streaming, class Slice>
__device__ __forceinline__ void store(const float (&values)[kVector], Dtype type,
                                      std::uintptr_t base, Slice slice, int n) {
  if (type == Dtype::float32) {
    std::uint32_t bits[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) bits[k] = bits_of(values[k]);
    store_bits<Streaming>(bits, reinterpret_cast<std::uint32_t*>(base), slice, n);
  } else {
    std::uint16_t bits[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) bits[k] = half_bits(type, values[k]);
    store_bits<Streaming>(bits, reinterpret_cast<std::uint16_t*>(base), slice, n);
  }
}

// One chunk of one tensor.
struct Chunk {
  // Addresses of its first element; 0 where there is none.
  std::uintptr_t weight, copy, state[Rules::most_states], grad;
  std::int64_t begin;
  int random_stream, size;
};

__device__ __forceinline__ std::uintptr_t advanced(std::uintptr_t base, Dtype type,
                                                   std::int64_t elements) {
  return base == 0 ? 0 : base + elements * (type == Dtype::float32 ? 4 : 2);
}

// Calls f(slice) for all of a chunk's vectors, Batch of them at a time: as many as registers can
// hold of all arrays at once.
template <int Batch, class F>
__device__ __forceinline__ void sweep(int size, F&& f) {
  if (size == kChunkElements) {
    // Not unrolled: the compiler would move loads of the second batch up, and run out of registers.
#pragma unroll 1
    for (int first = 0; first < kVectors; first += Batch) {
      f(VectorSlice<true, Batch>{first, size});
    }
  } else {
    for (int first = 0; first * kStride < size; ++first) {
      f(VectorSlice<false, 1>{first, size});
    }
  }
}

// Stores weights, with low-precision copies where there are any, or rounded stochastically.
template <bool StochasticRounding, class Types, class Slice>
__device__ __forceinline__ void store_weight(const float (&values)[kVector], const Types& types,
                                             const Chunk& chunk, Slice slice, int n,
                                             std::uint64_t seed) {
  if constexpr (StochasticRounding) {
    const std::uint64_t element = chunk.begin + slice.index(n);
    const RandomBlock random =
        random_block(seed, chunk.random_stream, element / kElementsPerRandomBlock);
    // Eight elements share a block of random bits: these four are the first or the last of them.
    const bool upper = element % kElementsPerRandomBlock != 0;
    const std::uint32_t words[2] = {upper ? random.word[2] : random.word[0],
                                    upper ? random.word[3] : random.word[1]};
    std::uint16_t bits[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const RandomBlock half = {{words[0], words[1], 0u, 0u}};
      bits[k] = round_stochastically(values[k], random_bits(half, k)).bits;
    }
    store_bits<false>(bits, reinterpret_cast<std::uint16_t*>(chunk.weight), slice, n);
  } else {
    store<false>(values, types.weight(), chunk.weight, slice, n);
    if (Types::has_copies && chunk.copy != 0) {
      store<false>(values, types.copy(), chunk.copy, slice, n);
    }
  }
}

}  // namespace fastlars::cuda
