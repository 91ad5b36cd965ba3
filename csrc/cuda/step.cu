// Both phases in one launch: blocks measure chunks, and apply those that they have measured once
// the rates of their tensors are known. Meanwhile they measure on, and keep what measure read
// (LARS: the gradient) or made (LAMB: the update) in a ring in shared memory; what the ring has no
// room for is read again. schedule.cuh says which chunk is next.
#include "cuda/api.h"
#include "cuda/launch.cuh"
#include "cuda/schedule.cuh"

namespace fastlars::cuda {
namespace {

// Blocks that a multiprocessor is to hold: two where the registers of three would not do.
template <class Types>
constexpr int kBlocks = Types::has_copies ? 2 : 3;

constexpr int kMostHeld = 4;  // chunks in a ring
constexpr int kHeldBytes = kChunk * sizeof(float);

template <class Rule, class Types>
__global__ void __launch_bounds__(kThreads + kLanes, (kBlocks<Types>))
    step(const __grid_constant__ Call<Rule> call) {
  __shared__ Shared<Rule> shared;
  open(shared, call);
  meet();
  if (thread() >= kThreads) {
    Scheduler<Rule, Types>(shared, call).run();
    return;
  }
  float4* const ring = dynamic_shared();
  const Types types(call);
  for (int k = 0;; ++k) {
    if (thread() == 0) store_shared(&shared.worked, k - 1);
    meet();
    const Turn<Rule>& turn = shared.turn[k % 2];
    const Do what = turn.what;
    if (what == Do::leave) break;
    if (what == Do::wait) continue;
    const Chunk chunk = turn.chunk;
    float4* const held = ring + turn.slot * (kChunk / kVector);
    if (what == Do::measure) {
      Pair<float> mine = {};
      Body<Rule>::template measure<true>(turn.c, types, chunk, mine, held);
      leave(mine, shared.sums[k % 2]);
    } else if (what == Do::measure_again) {
      Pair<double> mine = {};
      Body<Rule>::measure_again(turn.c, types, chunk, mine);
      leave(mine, shared.sums[k % 2]);
    } else if (turn.held) {
      Body<Rule>::template apply<From::held, false>(turn.c, types, chunk, held, 0);
    } else {
      Body<Rule>::template apply<From::forgotten, false>(turn.c, types, chunk, nullptr, 0);
    }
  }
}

template <class Types, class Rule>
void run(const Rule& rule, const Scalars& now, const Work& work, float* ratios) {
  for_each_launch(rule, now, work, [&](Call<Rule>& call) {
    call.ratios = ratios;
    call.ring = work.ring > 0 ? work.ring : ring_of_device(kBlocks<Types>, kHeldBytes, kMostHeld);
    launch("step", step<Rule, Types>, call, work, call.ring * kHeldBytes, kThreads + kLanes);
  });
}

template <class Rule>
void run_typed(const Rule& rule, const Scalars& now, const Work& work, float* ratios) {
  if (is_float32(work.list)) {
    run<Float32<Rule>>(rule, now, work, ratios);
  } else {
    run<Any<Rule>>(rule, now, work, ratios);
  }
}

}  // namespace

void step(const LarsRule& rule, const Scalars& now, const Work& work, float* ratios) {
  run_typed(rule, now, work, ratios);
}
void step(const LambRule& rule, const Scalars& now, const Work& work, float* ratios) {
  run_typed(rule, now, work, ratios);
}

}  // namespace fastlars::cuda
