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
  const int end = share(call, block() + 1);
  float known = NAN;  // the counter that the coefficients are for
  int turn = 0;
  for (int i = share(call, block()); i < end;) {
    const int tensor = tables.items[i].tensor;
    const Row& row = tables.rows[tensor];
    const float current = counter(call.rule, row, counts);
    if (current != known) {
      known = current;
      barrier();
      if (thread() == 0) frame.c = coefficients(call.rule, today(call), current);
      barrier();
    }
    const int first = i;
    const int last = row.first + row.chunks < end ? row.first + row.chunks : end;
    for (; i < last; ++i) {
      const Chunk chunk = locate(call, types, tables.items[i], live);
      const Sums sums =
          measure_chunk<false, Rule>(frame.c, types, chunk, frame.scratch, turn, nullptr);
      if (thread() == 0) tables.slots[i] = sums;
    }
    if (thread() == 0) frame.last = arrive(tables, tensor, row, last - first);
    barrier();
    if (frame.last) {
      const Sums sums = total(tables, row, frame.scratch, turn);
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
