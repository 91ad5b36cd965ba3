// From a list to launches: fills in their parameters, and turns every error of CUDA into one of
// ours that says what to do.
#pragma once

#include <algorithm>
#include <string>

#include "cuda/api.h"
#include "cuda/call.h"
#include "cuda/intrinsics.cuh"

namespace fastlars::cuda {

// Throws where CUDA reports an error.
void check(cudaError_t code, const char* kernel);

// How many blocks of a kernel the current device holds at once.
int blocks_at_once(const void* kernel, int threads, int shared_bytes, const char* name);

// How many chunks of `bytes` each of `blocks` blocks of a multiprocessor can hold in shared memory:
// from 1 to `most`.
int ring_of_device(int blocks, int bytes, int most);

inline bool is_float32(const TensorList& list) {
  return list.weight_dtype == Dtype::float32 && list.grad_dtype == Dtype::float32 &&
         (list.state[0].empty() || list.state_dtype == Dtype::float32) && list.copy.empty();
}

inline bool rounds_stochastically(const TensorList& list) {
  return list.stochastic_rounding && list.weight_dtype == Dtype::bfloat16 && list.copy.empty();
}

// Calls f(call) for as many tensors at a time as a launch takes.
template <class Rule, class F>
void for_each_launch(const Rule& rule, const Scalars& now, const Work& work, F&& f) {
  const TensorList& list = work.list;
  Call<Rule> call;
  call.rule = rule;
  call.numbers = work.device.with(now);
  call.tables = work.plan.tables();
  call.sums = nullptr;
  call.ratios = nullptr;
  call.seed = list.seed;
  call.runs = call.share = call.longer = call.ring = 0;
  call.weight_dtype = list.weight_dtype;
  call.copy_dtype = list.copy_dtype;
  call.grad_dtype = list.grad_dtype;
  call.state_dtype = list.state_dtype;
  for (int begin = 0; begin < list.count(); begin += kTensors) {
    const int end = std::min(begin + kTensors, list.count());
    call.tensor = begin;
    call.tensors = end - begin;
    call.chunk = work.plan.first(begin);
    call.chunks = work.plan.first(end) - call.chunk;
    std::copy(list.grad.begin() + begin, list.grad.begin() + end, call.grad);
    f(call);
  }
}

// Runs of neighbouring chunks that a block of measure or apply takes, one after the other. More
// would end with more of the list's end in the cache, but every run costs some microseconds.
constexpr int kRounds = 2;

template <class Rule>
void launch(const char* name, void (*kernel)(Call<Rule>), Call<Rule>& call, const Work& work,
            int shared_bytes, int threads = kThreads) {
  // Asked for any grid: on the way it lets the kernel have its shared memory.
  const int at_once =
      blocks_at_once(reinterpret_cast<const void*>(kernel), threads, shared_bytes, name);
  const int most = work.grid > 0 ? work.grid : at_once;
  const int grid = std::max(1, std::min(most, call.chunks));
  call.runs = grid * kRounds;
  call.share = call.chunks / call.runs;
  call.longer = call.chunks % call.runs;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(work.stream);
  check(cudaLaunchKernelEx(&config, kernel, call), name);
}

}  // namespace fastlars::cuda
