// The first of two launches: sums of squares of every tensor. LAMB's moments advance here.
#include "cuda/api.h"
#include "cuda/frame.cuh"
#include "cuda/launch.cuh"

namespace fastlars::cuda {
namespace {

// Blocks that a multiprocessor is to hold. Without it the compiler saves registers by loading
// one vector after the other.
template <class Rule>
constexpr int kBlocks = std::is_same_v<Rule, LambRule> ? 3 : 4;

// A block arrives once for all of a tensor's chunks that are neighbours.
template <class Rule, class Types>
__global__ void __launch_bounds__(kThreads, kBlocks<Rule>)
    measure(const __grid_constant__ Call<Rule> call) {
  constexpr bool counts = std::is_same_v<Rule, LambRule>;
  __shared__ Frame<Rule> frame;
  const Types types(call);
  const Tables& tables = call.tables;
  if (thread() == 0) open(frame);
  const Home<Rule>& home = frame.home;
  for (;;) {
    if (thread() == 0) enter<false>(call, counts, frame);
    barrier();
    if (home.end == 0) break;
    for (int i = home.first; i < home.end; ++i) {
      const Chunk chunk = locate(types, home, i);
      const Sums sums =
          measure_chunk<false, Rule>(home.c, types, chunk, frame.chunk[i % 2], nullptr);
      if (thread() == 0) tables.slots[i] = sums;
    }
    if (thread() == 0) {
      frame.last = arrive(tables, home.tensor, home.row, home.end - home.first);
    }
    barrier();
    if (frame.last) {
      const Sums sums = total(tables, home.row, frame.tensor);
      if (thread() == 0) call.sums[home.tensor] = sums;
      barrier();
    }
  }
  if (is_last_block(*tables.control, frame.last)) {
    close(call, counts, [&](int tensor) { call.sums[tensor] = {0.0, 0.0}; });
  }
}

template <class Rule>
void run(const Rule& rule, const Scalars& now, const Work& work, Sums* sums) {
  for_each_launch(rule, now, work, [&](Call<Rule>& call) {
    call.sums = sums;
    if (is_float32(work.list)) {
      launch("measure", measure<Rule, Float32<Rule>>, call, work, 0);
    } else {
      launch("measure", measure<Rule, Any<Rule>>, call, work, 0);
    }
  });
}

}  // namespace

void measure(const GradientNorm& rule, const Scalars& now, const Work& work, Sums* sums) {
  run(rule, now, work, sums);
}
void measure(const LarsRule& rule, const Scalars& now, const Work& work, Sums* sums) {
  run(rule, now, work, sums);
}
void measure(const LambRule& rule, const Scalars& now, const Work& work, Sums* sums) {
  run(rule, now, work, sums);
}

}  // namespace fastlars::cuda
