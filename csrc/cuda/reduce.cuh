// Sums of squares in a fixed order: over a block's threads, and over a tensor's chunks. No float
// atomics: the bits are the same from run to run, for any grid.
#pragma once

#include <cfloat>
#include <type_traits>

#include "cuda/chunk_table.h"
#include "cuda/intrinsics.cuh"

namespace fastlars::cuda {

// The sums of a rule as one thread accumulates them. The last one is that of the update.
template <class T, int N>
struct PartialSums {
  T of[N];
  std::uint32_t bits;  // all updates that were noted, or-ed together: 0 where each of them was 0

  // Adds the square of each value to its sum.
  template <class... Values>
  __device__ void add(Values... values) {
    static_assert(sizeof...(Values) == N, "a value for each sum");
    int i = 0;
    ((of[i] += static_cast<T>(values) * values, ++i), ...);
  }
  __device__ void note(float update) { bits |= bits_of(update) << 1; }  // without the sign

  __device__ Sums<N> in_double() const {
    Sums<N> sums;
#pragma unroll
    for (int i = 0; i < N; ++i) sums.of[i] = of[i];
    return sums;
  }
};

// Whether the sums must be taken again in double. A sum of updates of exactly 0 is right: see
// store_warp_sums().
template <int N>
__device__ __forceinline__ bool out_of_range(const PartialSums<float, N>& sums) {
  bool found = false;
#pragma unroll
  for (int i = 0; i < N - 1; ++i) found = found || leaves_float_range(sums.of[i]);
  return found || (sums.of[N - 1] != 0.0f && leaves_float_range(sums.of[N - 1]));
}

// Shared memory for the sums of each warp.
template <int N>
struct Scratch {
  double of[N][kWarps];
};

template <class T, int N>
__device__ __forceinline__ void store_warp_sums(PartialSums<T, N> mine, Scratch<N>& scratch) {
#pragma unroll
  for (int i = 0; i < N; ++i) mine.of[i] = warp_sum(mine.of[i]);
  if constexpr (std::is_same_v<T, float>) {
    // Squares too small for float32 also sum to 0: mark such a sum as out of range. Where all
    // updates are exactly 0, as in unused rows of an embedding, 0 is right, and taking the sum
    // again would read the rows twice at every step.
    T& update = mine.of[N - 1];
    if (update == 0.0f && warp_sum(mine.bits == 0 ? 0 : 1) != 0) update = FLT_MIN;
  }
  if (thread() % kLanes == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) scratch.of[i][thread() / kLanes] = mine.of[i];
  }
}

// The sum over all warps of a block.
template <class T, int N>
__device__ __forceinline__ PartialSums<T, N> sum_of_warps(const Scratch<N>& scratch) {
  PartialSums<T, N> sum = {};
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
#pragma unroll
    for (int i = 0; i < N; ++i) sum.of[i] += static_cast<T>(scratch.of[i][warp]);
  }
  return sum;
}

// Gives all threads the same sums. Some threads may still read the scratch memory when others
// return: it can be written again after the next barrier.
template <class T, int N>
__device__ __forceinline__ PartialSums<T, N> block_sum(const PartialSums<T, N>& mine,
                                                       Scratch<N>& scratch) {
  store_warp_sums(mine, scratch);
  barrier();
  return sum_of_warps<T>(scratch);
}

// Sums of a tensor whose chunks have all been measured.
template <int N>
__device__ __forceinline__ Sums<N> tensor_sums(const Tables& tables, const TensorEntry& tensor,
                                               Scratch<N>& scratch) {
  const auto* chunk_sums = reinterpret_cast<const Sums<N>*>(tables.sums);
  PartialSums<double, N> mine = {};
  for (int chunk = thread(); chunk < tensor.chunks; chunk += kThreads) {
#pragma unroll
    for (int i = 0; i < N; ++i) mine.of[i] += chunk_sums[tensor.first_chunk + chunk].of[i];
  }
  return block_sum(mine, scratch).in_double();
}

// Counts `chunks` of a tensor as measured; call it after their sums are in the table, from one
// thread of the block. Returns whether they were the tensor's last: then all its sums can be read.
__device__ __forceinline__ bool arrive(const Tables& tables, int number, const TensorEntry& tensor,
                                       int chunks) {
  if (chunks == tensor.chunks) return true;
  const std::uint32_t before = add_acq_rel(&tables.arrived[number], chunks);
  const bool last = before + chunks == static_cast<std::uint32_t>(tensor.chunks);
  if (last) tables.arrived[number] = 0;
  return last;
}

}  // namespace fastlars::cuda
