// First kernel of the two-launch path: sums of squares of every tensor. The states of a rule whose
// measure writes advance here.
#pragma once

#include "cuda/block.cuh"
#include "cuda/launch.cuh"

namespace fastlars::cuda {
namespace kernels {

// A block arrives only once for all neighbouring chunks of a tensor. Without a minimum number of
// blocks, the compiler would save registers by loading one vector after the other.
template <class Rule, class Types>
__global__ void __launch_bounds__(kThreads, ChunkOps<Rule>::kMeasureBlocks)
    measure(const __grid_constant__ KernelArgs<Rule> args) {
  __shared__ BlockState<Rule> state;
  __shared__ Scratch<Rule::sums> of_chunks[2][2];  // in turn: no other barrier separates chunks
  __shared__ Scratch<Rule::sums> of_tensor;
  const Types types(args);
  const Tables& tables = args.tables;
  auto* const chunk_sums = reinterpret_cast<Sums<Rule::sums>*>(tables.sums);
  if (thread() == 0) start(state);
  const CurrentTensor<Rule>& tensor = state.tensor;
  for (;;) {
    if (thread() == 0) next_tensor<false>(args, true, state);
    barrier();
    if (tensor.end == 0) break;
    for (int i = tensor.first; i < tensor.end; ++i) {
      const Chunk chunk = locate_chunk(types, tensor, i);
      const auto sums = measure_chunk<Rule>(tensor.c, types, chunk, of_chunks[i % 2]);
      if (thread() == 0) chunk_sums[i] = sums;
    }
    if (thread() == 0) {
      state.last = arrive(tables, tensor.number, tensor.entry, tensor.end - tensor.first);
    }
    barrier();
    if (state.last) {
      const auto sums = tensor_sums(tables, tensor.entry, of_tensor);
      if (thread() == 0) args.sums[tensor.number] = sums;
      barrier();
    }
  }
  if (is_last_block(*tables.control, state.last)) {
    finish_launch(args, Rule::measure_writes, [&](int empty) { args.sums[empty] = {}; });
  }
}

}  // namespace kernels

template <class Rule>
void measure(const Rule& rule, const StepScalars& scalars, const LaunchTarget& target,
             Sums<Rule::sums>* sums) {
  for_each_launch(rule, scalars, target, [&](KernelArgs<Rule>& args) {
    args.sums = sums;
    const auto kernel = is_float32(target.list) ? kernels::measure<Rule, Float32Only<Rule>>
                                                : kernels::measure<Rule, RuntimeDtypes<Rule>>;
    launch("measure", kernel, args, target);
  });
}

}  // namespace fastlars::cuda
