// The second of two launches: the weights, with the trust ratios that the sums give. The only one
// where the rule does not adapt.
#include "cuda/api.h"
#include "cuda/frame.cuh"
#include "cuda/launch.cuh"

namespace fastlars::cuda {
namespace {

// Blocks that a multiprocessor is to hold: two where the registers of three would not do.
template <class Types, From from>
constexpr int kBlocks = from == From::unmeasured && Types::has_copies ? 2 : 3;

template <class Rule, class Types, From from, bool Rounds>
__global__ void __launch_bounds__(kThreads, (kBlocks<Types, from>))
    apply(const __grid_constant__ Call<Rule> call) {
  // What counts steps has counted this one where it was measured.
  constexpr bool counts = !Rule::counts_steps || from == From::unmeasured;
  __shared__ Frame<Rule> frame;
  const Types types(call);
  const auto trust = [&](int tensor) {
    return call.sums == nullptr ? 1.0 : trust_ratio(call.rule, today(call), call.sums[tensor]);
  };
  if (thread() == 0) open(frame);
  const Home<Rule>& home = frame.home;
  for (;;) {
    if (thread() == 0) {
      enter<true>(call, counts, frame);
      if (home.end != 0) {
        const double q = trust(home.tensor);
        set_trust(call.rule, today(call), q, frame.home.c);
        if (home.first == home.row.first) call.ratios[home.tensor] = static_cast<float>(q);
      }
    }
    barrier();
    if (home.end == 0) break;
    // `Any` leaves no register for `first`, and reads it again; for Float32 reading it again is
    // what makes the compiler spill. Seen on sm_120.
    const int first = home.first;
    for (int i = home.end - 1; i >= (Types::has_copies ? home.first : first); --i) {
      Body<Rule>::template apply<from, Rounds>(home.c, types, locate(types, home, i), nullptr,
                                               call.seed);
    }
    barrier();
  }
  if (is_last_block(*call.tables.control, frame.last)) {
    close(call, counts, [&](int empty) { call.ratios[empty] = static_cast<float>(trust(empty)); });
  }
}

template <From from, class Rule>
void run(const Rule& rule, const Scalars& now, const Work& work, const Sums* sums, float* ratios) {
  for_each_launch(rule, now, work, [&](Call<Rule>& call) {
    call.sums = rule.adapt ? const_cast<Sums*>(sums) : nullptr;  // only read
    call.ratios = ratios;
    if (rounds_stochastically(work.list)) {
      launch("apply", apply<Rule, Any<Rule>, from, true>, call, work, 0);
    } else if (is_float32(work.list)) {
      launch("apply", apply<Rule, Float32<Rule>, from, false>, call, work, 0);
    } else {
      launch("apply", apply<Rule, Any<Rule>, from, false>, call, work, 0);
    }
  });
}

}  // namespace

void apply(const LarsRule& rule, const Scalars& now, const Work& work, const Sums* sums,
           float* ratios) {
  run<From::memory>(rule, now, work, sums, ratios);
}
void apply(const LambRule& rule, const Scalars& now, const Work& work, const Sums* sums,
           float* ratios) {
  if (rule.adapt) {
    run<From::memory>(rule, now, work, sums, ratios);
  } else {
    run<From::unmeasured>(rule, now, work, sums, ratios);
  }
}
void apply(const RmspropWarmupRule& rule, const Scalars& now, const Work& work, const Sums* sums,
           float* ratios) {
  run<From::unmeasured>(rule, now, work, sums, ratios);
}

}  // namespace fastlars::cuda
