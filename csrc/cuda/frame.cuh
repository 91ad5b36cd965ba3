// What every kernel does around its chunks: reads the numbers of the day, takes on a tensor's
// coefficients, reports its sums, and leaves the device as the next launch expects it.
#pragma once

#include "cuda/lamb.cuh"
#include "cuda/rmsprop_warmup.cuh"

namespace fastlars::cuda {

// The tensor at hand, and which of its chunks a block takes. Looked up once for all of them: a look
// at tables in global memory takes microseconds while the memory is busy.
template <class Rule>
struct Home {
  typename Body<Rule>::Coefficients c;
  float counter;  // that they are for
  Row row;
  std::uintptr_t grad;
  int tensor;
  int first, end;   // chunks; none where the block is done
  int whole, last;  // sizes of chunks: 0 where the step is to be skipped
};

// What the threads of a block share.
template <class Rule>
struct Frame {
  Home<Rule> home;
  int run, begin, end;  // the run at hand, and what is left of it
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
// `Moves`: another block may advance it meanwhile. Where none does, a plain load saves registers.
template <bool Moves = false, class Rule>
__device__ __forceinline__ float counter(const Rule&, const Row& row, bool advances) {
  if (row.counter == 0) return 0.0f;
  const float found =
      Moves ? float_of(load_relaxed(reinterpret_cast<const std::uint32_t*>(row.counter)))
            : *reinterpret_cast<const float*>(row.counter);
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

// The first chunk of a run. The first runs of the list have one chunk more than others.
template <class Rule>
__device__ __forceinline__ int first_chunk(const Call<Rule>& call, int run) {
  return call.chunk + run * call.share + min(run, call.longer);
}

template <class Rule>
__device__ __forceinline__ void open(Frame<Rule>& frame) {
  frame.home.counter = NAN;
  frame.run = block() - blocks();
  frame.begin = frame.end = 0;
}

// Goes on to the next tensor. For one thread: what it keeps track of lies in shared memory, because
// registers are scarce. All blocks go through the list side by side, some of it at a time, and so
// leave its end in the cache. `Backwards`: from the end of the list, to meet there what the cache
// holds of it.
template <bool Backwards, class Rule>
__device__ __forceinline__ void enter(const Call<Rule>& call, bool counts, Frame<Rule>& frame) {
  Home<Rule>& home = frame.home;
  const Tables& tables = call.tables;
  while (frame.begin == frame.end) {
    frame.run += blocks();
    if (frame.run >= call.runs) {
      home.first = home.end = 0;
      return;
    }
    const int run = Backwards ? call.runs - 1 - frame.run : frame.run;
    frame.begin = first_chunk(call, run);
    frame.end = first_chunk(call, run + 1);
  }
  const Item item = tables.items[Backwards ? frame.end - 1 : frame.begin];
  home.row = tables.rows[item.tensor];
  home.grad = call.grad[item.tensor - call.tensor];
  home.tensor = item.tensor;
  home.first = frame.begin;
  home.end = frame.end;
  if (Backwards) {
    home.first = frame.end = max(home.row.first, frame.begin);
  } else {
    home.end = frame.begin = min(home.row.first + home.row.chunks, frame.end);
  }
  const bool live = is_live(call);
  home.whole = live ? kChunk : 0;
  home.last = live ? tables.items[home.end - 1].size : 0;
  const float current = counter(call.rule, home.row, counts);
  if (current != home.counter) home.c = coefficients(call.rule, today(call), current);
  home.counter = current;
}

// A chunk of the tensor at hand, without a look at tables in global memory.
template <class Types, class Rule>
__device__ __forceinline__ Chunk locate(const Types& types, const Home<Rule>& home, int number) {
  const Row& row = home.row;
  const int at = number - row.first;
  const std::int64_t begin = std::int64_t{at} * kChunk;
  return {
      advanced(row.weight, types.weight(), begin),
      Types::has_copies ? advanced(row.copy, types.copy(), begin) : 0,
      {advanced(row.state[0], types.state(), begin), advanced(row.state[1], types.state(), begin)},
      advanced(home.grad, types.grad(), begin),
      begin,
      home.tensor,
      at == row.chunks - 1 ? home.last : home.whole};
}

}  // namespace fastlars::cuda
