// What every kernel does around its chunks: reads the numbers of the day, takes on a tensor's
// coefficients, reports its sums, and leaves the device as the next launch expects it.
#pragma once

#include "cuda/lamb.cuh"
#include "cuda/rmsprop_warmup.cuh"

namespace fastlars::cuda {

// What the threads of a block share.
template <class Rule>
struct Frame {
  typename Body<Rule>::Coefficients c;
  float known;  // the counter that `c` is for
  int chunks;   // of the tensor at hand that this block measures
  bool last;
  Scratch chunk[2][2];  // two chunks in turn: there is no other barrier between them
  Scratch tensor;
};

// The numbers of the day.
template <class Rule>
__device__ __forceinline__ Scalars today(const Call<Rule>& call) {
  return call.numbers.today();
}

// False where the step is to be skipped: then nothing is written.
template <class Rule>
__device__ __forceinline__ bool is_live(const Call<Rule>& call) {
  return !call.numbers.skips();
}

// The counter of a tensor. Steps count from 1, and `advances` where this launch takes the step.
template <class Rule>
__device__ __forceinline__ float counter(const Rule&, const Row& row, bool advances) {
  if (row.counter == 0) return 0.0f;
  const float found = *reinterpret_cast<const float*>(row.counter);
  return Rule::counts_steps && advances ? found + 1.0f : found;
}
__device__ __forceinline__ float counter(const GradientNorm&, const Row&, bool) { return 0.0f; }

__device__ __forceinline__ float coefficients(const GradientNorm&, const Scalars& now, float) {
  return static_cast<float>(now.gradient_scale);
}

// Sums of squares of one chunk: the same for all threads.
template <bool Holds, class Rule, class Types>
__device__ __forceinline__ Sums measure_chunk(const typename Body<Rule>::Coefficients& c,
                                              const Types& types, const Chunk& chunk,
                                              Scratch (&scratch)[2], float4* held) {
  Pair<float> mine = {};
  Body<Rule>::template measure<Holds>(c, types, chunk, mine, held);
  const Pair<float> sum = block_sum(mine, scratch[0]);
  if (!Body<Rule>::out_of_range(sum)) return {sum.weight, sum.update};
  Pair<double> again = {};
  Body<Rule>::measure_again(c, types, chunk, again);
  const Pair<double> exact = block_sum(again, scratch[1]);
  return {exact.weight, exact.update};
}

// Whether this block is the last one of the launch to get here: all others have done everything.
__device__ __forceinline__ bool is_last_block(Control& control, bool& last) {
  barrier();
  if (thread() == 0) {
    last = add_acq_rel(&control.exited, 1) + 1 == static_cast<std::uint32_t>(blocks());
    if (last) control.exited = 0;
  }
  barrier();
  return last;
}

// For every tensor of the launch: advances its counter where `advances`, and calls `empty(tensor)`
// where it has no chunk that anybody would have reported. For the last block.
template <class Rule, class F>
__device__ __forceinline__ void close(const Call<Rule>& call, bool advances, F&& empty) {
  for (int i = thread(); i < call.tensors; i += kThreads) {
    const Row& row = call.tables.rows[call.tensor + i];
    if constexpr (!std::is_same_v<Rule, GradientNorm>) {
      if (advances && is_live(call) && row.counter != 0) {
        auto& place = *reinterpret_cast<float*>(row.counter);
        place = advanced(call.rule, today(call), place);
      }
    }
    if (row.chunks == 0) empty(call.tensor + i);
  }
}

// A block's neighbouring chunks: [first_chunk, end_chunk).
template <class Rule>
__device__ __forceinline__ int first_chunk(const Call<Rule>& call) {
  return call.chunk + block() * call.share;
}
template <class Rule>
__device__ __forceinline__ int end_chunk(const Call<Rule>& call) {
  const int end = (block() + 1) * call.share;
  return call.chunk + (end < call.chunks ? end : call.chunks);
}

}  // namespace fastlars::cuda
