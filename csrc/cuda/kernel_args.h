// Arguments of one kernel launch: rule, scalars, device tables, and gradient addresses.
#pragma once

#include "cuda/chunk_table.h"
#include "cuda/scalars.h"

namespace fastlars::cuda {

// Every driver and device takes 4 KB of kernel parameters (newer ones take 32 KB). 464 tensors are
// more than ResNet-50 or BERT-large have; longer lists need several launches.
constexpr int kParameterBytes = 4096;
constexpr int kTensorsPerLaunch = 464;

template <class Rule>
struct KernelArgs {
  Rule rule;
  DeviceScalars scalars;
  Tables tables;
  Sums<Rule::sums>* sums;       // by tensor of the list: measure writes them, apply reads them
  float* report;                // by tensor of the list: a row of write_report
  const double* gradient_sums;  // by tensor of the list; null where gradients are not normalized
  const std::int32_t* random_streams;  // by tensor of the list; null: its index there
  std::uint64_t seed;
  int first_tensor, tensors;  // of this launch
  int first_chunk, chunks;    // of this launch
  // A block of measure or apply takes a run of neighbouring chunks at a time.
  int runs;
  int chunks_per_run, longer_runs;  // the first `longer_runs` have one chunk more
  int shared_slots;                 // chunks that a block of step can cache in shared memory
  Dtype weight_dtype, copy_dtype, grad_dtype, state_dtype;
  std::uintptr_t grad[kTensorsPerLaunch];
};

}  // namespace fastlars::cuda
