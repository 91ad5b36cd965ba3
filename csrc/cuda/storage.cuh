// How a chunk is read and written: vectors of four elements, all of them in flight before the first
// is looked at. A thread has the same elements however the tensors are aligned, so that alignment
// does not show in sums; an array off its boundary is read element by element, the others are not.
#pragma once

#include "core/random.h"
#include "cuda/call.h"
#include "cuda/intrinsics.cuh"

namespace fastlars::cuda {

constexpr int kVector = 4;                   // elements
constexpr int kStride = kThreads * kVector;  // elements from a thread's vector to its next
constexpr int kVectors = kChunk / kStride;   // of a thread, in a whole chunk
static_assert(kVectors * kStride == kChunk, "threads and vectors make up a chunk");

// The types of a launch: known to the compiler, or read from the call, which costs no registers.
template <class Rule>
struct Float32 {
  __device__ explicit Float32(const Call<Rule>&) {}
  static __device__ constexpr Dtype weight() { return Dtype::float32; }
  static __device__ constexpr Dtype grad() { return Dtype::float32; }
  static __device__ constexpr Dtype state() { return Dtype::float32; }
  static __device__ constexpr Dtype copy() { return Dtype::float32; }
  static constexpr bool has_copies = false;
};

template <class Rule>
struct Any {
  const Call<Rule>& call;
  __device__ explicit Any(const Call<Rule>& call) : call(call) {}
  __device__ Dtype weight() const { return call.weight_dtype; }
  __device__ Dtype grad() const { return call.grad_dtype; }
  __device__ Dtype state() const { return call.state_dtype; }
  __device__ Dtype copy() const { return call.copy_dtype; }
  static constexpr bool has_copies = true;
};

// Four elements as they lie in memory; types of 16 bits fill x and y.
struct Raw {
  std::uint32_t x, y, z, w;
};

__device__ __forceinline__ float value(Dtype type, const Raw& raw, int k) {
  if (type == Dtype::float32) {
    return float_of(k == 0 ? raw.x : k == 1 ? raw.y : k == 2 ? raw.z : raw.w);
  }
  const std::uint32_t word = k < 2 ? raw.x : raw.y;
  const auto half = static_cast<std::uint16_t>(k % 2 == 0 ? word : word >> 16);
  return type == Dtype::bfloat16 ? to_float(bfloat16{half}) : to_float(float16{half});
}

struct Vector {
  float x[kVector];
  Vector() = default;
  __device__ explicit Vector(const float4& v) : x{v.x, v.y, v.z, v.w} {}
  __device__ Vector(Dtype type, const Raw& raw)
      : x{value(type, raw, 0), value(type, raw, 1), value(type, raw, 2), value(type, raw, 3)} {}
};

__device__ __forceinline__ std::uint16_t half_bits(Dtype type, float value) {
  return type == Dtype::bfloat16 ? from_float<bfloat16>(value).bits
                                 : from_float<float16>(value).bits;
}

// What a later load of the stored value gives.
__device__ __forceinline__ float stored(Dtype type, float value) {
  return type == Dtype::bfloat16 ? fastlars::stored<bfloat16>(value) : value;
}

__device__ __forceinline__ bool on_boundary(std::uintptr_t address, int bytes) {
  return address % static_cast<unsigned>(bytes) == 0;
}

// Where `batch` of a thread's vectors lie in a chunk of `size` elements: from vector `first` on.
template <bool Whole, int Batch>
struct Place {
  static constexpr bool whole = Whole;
  static constexpr int batch = Batch;
  int first, size;
  __device__ int index(int n) const { return (first + n) * kStride + thread() * kVector; }
  // Of a vector among those of all threads, in shared memory.
  __device__ int slot(int n) const { return (first + n) * kThreads + thread(); }
  __device__ int count(int n) const {
    const int left = size - index(n);
    return Whole || left > kVector ? kVector : left;
  }
};

template <bool Last, class Place, class Bits>
__device__ __forceinline__ void load_narrow(Raw (&raw)[Place::batch], const Bits* base,
                                            Place place) {
#pragma unroll
  for (int n = 0; n < Place::batch; ++n) {
    std::uint32_t bits[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      bits[k] = k < place.count(n) ? read<Last>(base + place.index(n) + k) : 0u;
    }
    raw[n] = sizeof(Bits) == 4 ? Raw{bits[0], bits[1], bits[2], bits[3]}
                               : Raw{bits[0] | bits[1] << 16, bits[2] | bits[3] << 16, 0u, 0u};
  }
}

// Elements behind the end of the chunk are zeros.
template <bool Last, class Place>
__device__ __forceinline__ void load(Raw (&raw)[Place::batch], Dtype type, std::uintptr_t base,
                                     Place place) {
  if (type == Dtype::float32) {
    const auto* words = reinterpret_cast<const std::uint32_t*>(base);
    if (Place::whole && on_boundary(base, 16)) {
#pragma unroll
      for (int n = 0; n < Place::batch; ++n) {
        const auto v = read<Last>(reinterpret_cast<const uint4*>(words + place.index(n)));
        raw[n] = {v.x, v.y, v.z, v.w};
      }
    } else {
      load_narrow<Last>(raw, words, place);
    }
  } else {
    const auto* halves = reinterpret_cast<const std::uint16_t*>(base);
    if (Place::whole && on_boundary(base, 8)) {
#pragma unroll
      for (int n = 0; n < Place::batch; ++n) {
        const auto v = read<Last>(reinterpret_cast<const uint2*>(halves + place.index(n)));
        raw[n] = {v.x, v.y, 0u, 0u};
      }
    } else {
      load_narrow<Last>(raw, halves, place);
    }
  }
}

// One vector of bits: of 32 or 16 as Bits says.
template <bool Last, class Place, class Bits>
__device__ __forceinline__ void store_bits(const Bits (&bits)[kVector], Bits* base, Place place,
                                           int n) {
  Bits* to = base + place.index(n);
  if (Place::whole && on_boundary(reinterpret_cast<std::uintptr_t>(base), 4 * sizeof(Bits))) {
    if constexpr (sizeof(Bits) == 4) {
      write<Last>(reinterpret_cast<uint4*>(to), make_uint4(bits[0], bits[1], bits[2], bits[3]));
    } else {
      const std::uint32_t low = bits[0] | static_cast<std::uint32_t>(bits[1]) << 16;
      const std::uint32_t high = bits[2] | static_cast<std::uint32_t>(bits[3]) << 16;
      write<Last>(reinterpret_cast<uint2*>(to), make_uint2(low, high));
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    if (k < place.count(n)) write<Last>(to + k, bits[k]);
  }
}

template <bool Last, class Place>
__device__ __forceinline__ void store(const float (&values)[kVector], Dtype type,
                                      std::uintptr_t base, Place place, int n) {
  if (type == Dtype::float32) {
    std::uint32_t bits[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) bits[k] = bits_of(values[k]);
    store_bits<Last>(bits, reinterpret_cast<std::uint32_t*>(base), place, n);
  } else {
    std::uint16_t bits[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) bits[k] = half_bits(type, values[k]);
    store_bits<Last>(bits, reinterpret_cast<std::uint16_t*>(base), place, n);
  }
}

// One chunk of one tensor.
struct Chunk {
  std::uintptr_t weight, copy, state[2], grad;  // of its first element; 0 where there is none
  std::int64_t begin;
  int tensor, size;
};

__device__ __forceinline__ std::uintptr_t advanced(std::uintptr_t base, Dtype type,
                                                   std::int64_t elements) {
  return base == 0 ? 0 : base + elements * (type == Dtype::float32 ? 4 : 2);
}

// Calls f(place) for all of a chunk's vectors, Batch of them at a time: as many as registers can
// hold of all arrays at once.
template <int Batch, class F>
__device__ __forceinline__ void sweep(int size, F&& f) {
  if (size == kChunk) {
    // Not unrolled: loads of the second batch would be moved up, and registers run out.
#pragma unroll 1
    for (int first = 0; first < kVectors; first += Batch) {
      f(Place<true, Batch>{first, size});
    }
  } else {
    for (int first = 0; first * kStride < size; ++first) {
      f(Place<false, 1>{first, size});
    }
  }
}

// Weights as they are, or beside a low-precision copy, or rounded stochastically.
template <bool Rounds, class Types, class Place>
__device__ __forceinline__ void store_weight(const float (&values)[kVector], const Types& types,
                                             const Chunk& chunk, Place place, int n,
                                             std::uint64_t seed) {
  if constexpr (Rounds) {
    const std::uint64_t element = chunk.begin + place.index(n);
    const RandomBlock random = random_block(seed, chunk.tensor, element / kElementsPerRandomBlock);
    // Of the eight elements that share a block, these are the first or the last four.
    const bool upper = element % kElementsPerRandomBlock != 0;
    const std::uint32_t words[2] = {upper ? random.word[2] : random.word[0],
                                    upper ? random.word[3] : random.word[1]};
    std::uint16_t bits[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const RandomBlock half = {{words[0], words[1], 0u, 0u}};
      bits[k] = round_stochastically(values[k], random_bits(half, k)).bits;
    }
    store_bits<false>(bits, reinterpret_cast<std::uint16_t*>(chunk.weight), place, n);
  } else {
    store<false>(values, types.weight(), chunk.weight, place, n);
    if (Types::has_copies && chunk.copy != 0) {
      store<false>(values, types.copy(), chunk.copy, place, n);
    }
  }
}

}  // namespace fastlars::cuda
