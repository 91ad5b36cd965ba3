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

// The chunks of a block are neighbours, so that it takes on a tensor's coefficients once, and
// arrives once for all of its chunks.
template <class Rule, class Types>
__global__ void __launch_bounds__(kThreads, kBlocks<Rule>)
    measure(const __grid_constant__ Call<Rule> call) {
  constexpr bool counts = std::is_same_v<Rule, LambRule>;
  __shared__ Frame<Rule> frame;
  const Types types(call);
  const bool live = is_live(call);
  const Tables& tables = call.tables;
  if (thread() == 0) frame.known = NAN;
  for (int i = first_chunk(call); i < end_chunk(call);) {
    const int tensor = tables.items[i].tensor;
    const Row& row = tables.rows[tensor];
    const int end = min(row.first + row.chunks, end_chunk(call));
    barrier();
    if (thread() == 0) {
      const float current = counter(call.rule, row, counts);
      if (current != frame.known) frame.c = coefficients(call.rule, today(call), current);
      frame.known = current;
      frame.chunks = end - i;
    }
    barrier();
    for (; i < end; ++i) {
      const Chunk chunk = locate(call, types, tables.items[i], live);
      const Sums sums =
          measure_chunk<false, Rule>(frame.c, types, chunk, frame.chunk[i % 2], nullptr);
      if (thread() == 0) tables.slots[i] = sums;
    }
    if (thread() == 0) frame.last = arrive(tables, tensor, row, frame.chunks);
    barrier();
    if (frame.last) {
      const Sums sums = total(tables, row, frame.tensor);
      if (thread() == 0) call.measured[tensor] = sums;
    }
  }
  if (is_last_block(*tables.control, frame.last)) {
    close(call, counts, [&](int tensor) { call.measured[tensor] = {0.0, 0.0}; });
  }
}

template <class Rule>
void run(const Rule& rule, const Scalars& now, const Work& work, Sums* sums) {
  for_each_launch(rule, now, work, [&](Call<Rule>& call) {
    call.measured = sums;
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
