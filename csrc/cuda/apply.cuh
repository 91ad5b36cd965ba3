// Second kernel of the two-launch path: weights, with the trust ratios that the sums give. Where
// the rule does not adapt, this is the only kernel.
#pragma once

#include "cuda/block.cuh"
#include "cuda/launch.cuh"

namespace fastlars::cuda {
namespace kernels {

// Minimum resident blocks per multiprocessor: 3, or 2 where 3 would spill registers.
template <class Types, OperandSource source>
constexpr int kApplyBlocks = source == OperandSource::fused && Types::has_copies ? 2 : 3;

template <class Rule, class Types, OperandSource source, bool StochasticRounding>
__global__ void __launch_bounds__(kThreads, (kApplyBlocks<Types, source>))
    apply(const __grid_constant__ KernelArgs<Rule> args) {
  // Otherwise measure has advanced the counters.
  constexpr bool advances = !Rule::measure_writes || source == OperandSource::fused;
  __shared__ BlockState<Rule> state;
  const Types types(args);
  const auto sums_of = [&](int number) {
    return args.sums == nullptr ? nullptr : args.sums + number;
  };
  if (thread() == 0) start(state);
  const CurrentTensor<Rule>& tensor = state.tensor;
  for (;;) {
    if (thread() == 0) {
      next_tensor<true>(args, advances, state);
      if (tensor.end != 0) {
        if constexpr (StochasticRounding) {
          state.tensor.random_stream =
              args.random_streams == nullptr ? tensor.number : args.random_streams[tensor.number];
        }
        const auto* sums = sums_of(tensor.number);
        const auto ratio = ratio_of(args.rule, args.scalars.step_scalars(), sums);
        apply_trust_ratio(args.rule, args.scalars.step_scalars(), ratio, state.tensor.c);
        if (tensor.first == tensor.entry.first_chunk) {
          write_report<Rule>(ratio, sums, args.report, tensor.number);
        }
      }
    }
    barrier();
    if (tensor.end == 0) break;
    // RuntimeDtypes has no register left for `first` and reads it again. With Float32Only, reading
    // it again makes the compiler spill (seen on sm_120).
    const int first = tensor.first;
    for (int i = tensor.end - 1; i >= (Types::has_copies ? tensor.first : first); --i) {
      ChunkOps<Rule>::template apply<source, StochasticRounding>(
          tensor.c, types, locate_chunk(types, tensor, i), nullptr, args.seed);
    }
    barrier();
  }
  if (is_last_block(*args.tables.control, state.last)) {
    finish_launch(args, advances, [&](int empty) {
      const auto* sums = sums_of(empty);
      write_report<Rule>(ratio_of(args.rule, args.scalars.step_scalars(), sums), sums, args.report,
                         empty);
    });
  }
}

}  // namespace kernels

template <OperandSource source, class Rule>
void launch_apply(const Rule& rule, const StepScalars& scalars, const LaunchTarget& target,
                  const Sums<Rule::sums>* sums, float* report) {
  using Any = RuntimeDtypes<Rule>;
  for_each_launch(rule, scalars, target, [&](KernelArgs<Rule>& args) {
    args.sums = rule.adapt ? const_cast<Sums<Rule::sums>*>(sums) : nullptr;  // only read
    args.report = report;
    const auto kernel = rounds_stochastically(target.list) ? kernels::apply<Rule, Any, source, true>
                        : is_float32(target.list)
                            ? kernels::apply<Rule, Float32Only<Rule>, source, false>
                            : kernels::apply<Rule, Any, source, false>;
    launch("apply", kernel, args, target);
  });
}

template <class Rule>
void apply(const Rule& rule, const StepScalars& scalars, const LaunchTarget& target,
           const Sums<Rule::sums>* sums, float* report) {
  if constexpr (Rule::sums > 0) {
    if (rule.adapt || !Rule::measure_writes) {
      launch_apply<OperandSource::global>(rule, scalars, target, sums, report);
      return;
    }
  }
  if constexpr (Rule::sums == 0 || Rule::measure_writes) {
    launch_apply<OperandSource::fused>(rule, scalars, target, sums, report);
  }
}

}  // namespace fastlars::cuda
