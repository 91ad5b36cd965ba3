// Host side of a launch: kernel arguments from a list, and CUDA's errors as exceptions that say
// what to do.
#pragma once

#include <algorithm>
#include <string>

#include "cuda/api.h"
#include "cuda/intrinsics.cuh"
#include "cuda/kernel_args.h"

namespace fastlars::cuda {

// Throws Error where CUDA reports one.
void check(cudaError_t code, const char* kernel);

// How many blocks of a kernel the current device holds at once. Raises the kernel's limit of
// dynamic shared memory, too.
int blocks_at_once(const void* kernel, int threads, int shared_bytes, const char* name);

// How many slots of `bytes` fit in the shared memory of each of `blocks` blocks on a
// multiprocessor: from 1 to `most`.
int slots_that_fit(int blocks, int bytes, int most);

// Shared memory that slots leave to a block: what the kernel has, and 1 KB for the driver.
constexpr int kReservedBytes = 8192;

inline bool is_float32(const TensorList& list) {
  return list.weight_dtype == Dtype::float32 && list.grad_dtype == Dtype::float32 &&
         (!list.has_state() || list.state_dtype == Dtype::float32) && list.copy.empty();
}

inline bool rounds_stochastically(const TensorList& list) {
  return list.stochastic_rounding && list.weight_dtype == Dtype::bfloat16 && list.copy.empty();
}

// Calls f(args) for as many tensors at a time as one launch takes.
template <class Rule, class F>
void for_each_launch(const Rule& rule, const StepScalars& scalars, const LaunchTarget& target,
                     F&& f) {
  const TensorList& list = target.list;
  KernelArgs<Rule> args;
  args.rule = rule;
  args.scalars = target.device.with(scalars);
  args.tables = target.table.tables();
  args.sums = nullptr;
  args.report = nullptr;
  args.gradient_sums = list.gradient_sums;
  args.random_streams = list.random_streams;
  args.seed = list.seed;
  args.runs = args.chunks_per_run = args.longer_runs = args.shared_slots = 0;
  args.weight_dtype = list.weight_dtype;
  args.copy_dtype = list.copy_dtype;
  args.grad_dtype = list.grad_dtype;
  args.state_dtype = list.state_dtype;
  for (int begin = 0; begin < list.count(); begin += kTensorsPerLaunch) {
    const int end = std::min(begin + kTensorsPerLaunch, list.count());
    args.first_tensor = begin;
    args.tensors = end - begin;
    args.first_chunk = target.table.first_chunk(begin);
    args.chunks = target.table.first_chunk(end) - args.first_chunk;
    std::copy(list.grad.begin() + begin, list.grad.begin() + end, args.grad);
    f(args);
  }
}

// Runs of neighbouring chunks that a block of measure or apply takes, one after the other. With
// more runs, more of the list's end would stay in the cache, but every run costs some microseconds.
constexpr int kRunsPerBlock = 2;

template <class Rule>
void launch(const char* name, void (*kernel)(KernelArgs<Rule>), KernelArgs<Rule>& args,
            const LaunchTarget& target, int shared_bytes = 0, int threads = kThreads) {
  static_assert(sizeof(KernelArgs<Rule>) <= kParameterBytes, "more than a launch may take");
  // Called even for a fixed grid, because it also raises the limit of dynamic shared memory.
  const int at_once =
      blocks_at_once(reinterpret_cast<const void*>(kernel), threads, shared_bytes, name);
  const int most = target.grid > 0 ? target.grid : at_once;
  const int grid = std::max(1, std::min(most, args.chunks));
  args.runs = grid * kRunsPerBlock;
  args.chunks_per_run = args.chunks / args.runs;
  args.longer_runs = args.chunks % args.runs;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(target.stream);
  check(cudaLaunchKernelEx(&config, kernel, args), name);
}

}  // namespace fastlars::cuda
