// Sums of squares in a fixed order: over a block's threads, and over a tensor's chunks. No float
// atomics: the bits are the same from run to run, for any grid.
#pragma once

#include <cfloat>

#include "cuda/intrinsics.cuh"
#include "cuda/plan.h"

namespace fastlars::cuda {

// Two sums as a thread keeps them.
template <class T>
struct Pair {
  T weight, update;
  std::uint32_t bits;  // of every y that was noted: 0 where each was 0
  __device__ void add(float x, float y) {
    weight += static_cast<T>(x) * x;
    update += static_cast<T>(y) * y;
  }
  __device__ void note(float y) { bits |= bits_of(y) << 1; }  // without the sign
};

// Whether a sum of updates is to be taken again in double. 0 is right: see leave().
__device__ __forceinline__ bool update_out_of_range(const Pair<float>& sum) {
  return sum.update != 0.0f && leaves_float_range(sum.update);
}

// Where warps leave their sums.
struct Scratch {
  double weight[kWarps], update[kWarps];
};

// Leaves the sums of a warp.
template <class T>
__device__ __forceinline__ void leave(Pair<T> mine, Scratch& scratch) {
  mine.weight = warp_sum(mine.weight);
  mine.update = warp_sum(mine.update);
  if constexpr (std::is_same_v<T, float>) {
    // Squares too small for a float32 give 0, too. Gradients of rows that nobody looked up in an
    // embedding are really 0: to take their sums again would read them twice at every step.
    if (mine.update == 0.0f && warp_sum(mine.bits == 0 ? 0 : 1) != 0) mine.update = FLT_MIN;
  }
  if (thread() % kLanes == 0) {
    scratch.weight[thread() / kLanes] = mine.weight;
    scratch.update[thread() / kLanes] = mine.update;
  }
}

// The sum of what all warps have left.
template <class T>
__device__ __forceinline__ Pair<T> sum_of_warps(const Scratch& scratch) {
  Pair<T> sum = {};
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    sum.weight += static_cast<T>(scratch.weight[warp]);
    sum.update += static_cast<T>(scratch.update[warp]);
  }
  return sum;
}

// The same sums for all threads. Some may still read the scratch when others go on: it is free
// behind the next barrier.
template <class T>
__device__ __forceinline__ Pair<T> block_sum(const Pair<T>& mine, Scratch& scratch) {
  leave(mine, scratch);
  barrier();
  return sum_of_warps<T>(scratch);
}

// Of a tensor whose chunks have all been measured.
__device__ __forceinline__ Sums total(const Tables& tables, const Row& row, Scratch& scratch) {
  Pair<double> mine = {};
  for (int i = thread(); i < row.chunks; i += kThreads) {
    mine.weight += tables.slots[row.first + i].weight;
    mine.update += tables.slots[row.first + i].update;
  }
  const Pair<double> sum = block_sum(mine, scratch);
  return {sum.weight, sum.update};
}

// Says that `chunks` of a tensor are measured, once their sums are in their slots. Whether these
// were the last; the slots of all of them can then be read. For one thread of a block.
__device__ __forceinline__ bool arrive(const Tables& tables, int tensor, const Row& row,
                                       int chunks) {
  if (chunks == row.chunks) return true;
  const std::uint32_t before = add_acq_rel(&tables.arrived[tensor], chunks);
  const bool last = before + chunks == static_cast<std::uint32_t>(row.chunks);
  if (last) tables.arrived[tensor] = 0;
  return last;
}

}  // namespace fastlars::cuda
