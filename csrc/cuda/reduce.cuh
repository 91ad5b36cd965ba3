// Sums of squares in a fixed order: over a block's threads, and over a tensor's chunks. No float
// atomics: the bits are the same from run to run, for any grid.
#pragma once

#include "cuda/intrinsics.cuh"
#include "cuda/plan.h"

namespace fastlars::cuda {

// Two sums as a thread keeps them.
template <class T>
struct Pair {
  T weight, update;
  __device__ void add(T x, T y) {
    weight += x * x;
    update += y * y;
  }
};

// Where warps leave their sums.
struct Scratch {
  double weight[kWarps], update[kWarps];
};

// The same sums for all threads. Some may still read the scratch when others go on: it is free
// behind the next barrier.
template <class T>
__device__ __forceinline__ Pair<T> block_sum(Pair<T> mine, Scratch& scratch) {
  mine.weight = warp_sum(mine.weight);
  mine.update = warp_sum(mine.update);
  if (thread() % 32 == 0) {
    scratch.weight[thread() / 32] = mine.weight;
    scratch.update[thread() / 32] = mine.update;
  }
  barrier();
  Pair<T> sum = {};
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    sum.weight += static_cast<T>(scratch.weight[warp]);
    sum.update += static_cast<T>(scratch.update[warp]);
  }
  return sum;
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
