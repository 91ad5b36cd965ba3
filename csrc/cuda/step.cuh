// Kernel of the one-launch path: blocks measure chunks, and apply them once the ratio coefficients
// of their tensors are known. In between, they measure further chunks. What measure read (LARS: the
// gradient) or computed (LAMB: the update) stays in slots of shared memory; what was evicted from
// there is read again. schedule.cuh decides which chunk is next.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/schedule.cuh"

namespace fastlars::cuda {
namespace kernels {

// Minimum resident blocks per multiprocessor: 3, or 2 where 3 would spill registers.
template <class Types>
constexpr int kStepBlocks = Types::has_copies ? 2 : 3;

template <class Rule, class Types>
__global__ void __launch_bounds__(kThreads + kLanes, (kStepBlocks<Types>))
    step(const __grid_constant__ KernelArgs<Rule> args) {
  static_assert(sizeof(StepState<Rule>) + 1024 <= kReservedBytes, "slots would take its memory");
  __shared__ StepState<Rule> state;
  start(state, args);
  meet();
  if (thread() >= kThreads) {
    Scheduler<Rule, Types>(state, args).run();
    return;
  }
  float4* const slots = dynamic_shared();
  const Types types(args);
  for (int k = 0;; ++k) {
    if (thread() == 0) store_shared(&state.finished, k - 1);
    meet();
    const Turn<Rule>& turn = state.turn[k % 2];
    const Action action = turn.action;
    if (action == Action::leave) break;
    if (action == Action::wait) continue;
    const Chunk chunk = turn.chunk;
    float4* const cache = slots + turn.slot * (ChunkOps<Rule>::kCached * kChunkElements / kVector);
    if (action == Action::measure) {
      PartialSums<float, Rule::sums> mine = {};
      ChunkOps<Rule>::template measure<true>(turn.c, types, chunk, mine, cache);
      store_warp_sums(mine, state.sums[k % 2]);
    } else if (action == Action::measure_again) {
      PartialSums<double, Rule::sums> mine = {};
      measure_again<Rule>(turn.c, types, chunk, mine);
      store_warp_sums(mine, state.sums[k % 2]);
    } else if (turn.in_shared) {
      ChunkOps<Rule>::template apply<OperandSource::shared, false>(turn.c, types, chunk, cache, 0);
    } else {
      ChunkOps<Rule>::template apply<OperandSource::evicted, false>(turn.c, types, chunk, nullptr,
                                                                    0);
    }
  }
}

}  // namespace kernels

template <class Rule>
void step(const Rule& rule, const StepScalars& scalars, const LaunchTarget& target, float* report) {
  constexpr int kMostSlots = 4;
  constexpr int kSlotBytes = ChunkOps<Rule>::kCached * kChunkElements * sizeof(float);
  using Constant = Float32Only<Rule>;
  using Any = RuntimeDtypes<Rule>;
  const bool constant = is_float32(target.list);
  const auto kernel = constant ? kernels::step<Rule, Constant> : kernels::step<Rule, Any>;
  const int blocks = constant ? kernels::kStepBlocks<Constant> : kernels::kStepBlocks<Any>;
  for_each_launch(rule, scalars, target, [&](KernelArgs<Rule>& args) {
    args.report = report;
    args.shared_slots = target.shared_slots > 0 ? target.shared_slots
                                                : slots_that_fit(blocks, kSlotBytes, kMostSlots);
    launch("step", kernel, args, target, args.shared_slots * kSlotBytes, kThreads + kLanes);
  });
}

}  // namespace fastlars::cuda
