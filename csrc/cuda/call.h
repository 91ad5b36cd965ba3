// What one launch is told: the rule, the numbers of the day, the tables, and the gradients.
#pragma once

#include "core/api.h"
#include "cuda/numbers.h"
#include "cuda/plan.h"

namespace fastlars::cuda {

// Parameters of a kernel may take 4 KB on every driver and device (32 KB on newer ones). 480
// tensors are more than ResNet-50 or BERT-large have; longer lists take several launches.
constexpr int kParameterBytes = 4096;
constexpr int kTensors = 480;

template <class Rule>
struct Call {
  Rule rule;
  Numbers numbers;
  Tables tables;
  Sums* sums;     // by tensor of the list: from measure, for apply
  float* ratios;  // by tensor of the list
  std::uint64_t seed;
  int tensor, tensors;  // the first tensor of this launch, and how many there are
  int chunk, chunks;    // likewise
  int runs;             // of neighbouring chunks: what a block of measure or apply takes at once
  int share, longer;    // chunks of a run, and how many of the first runs have one more
  int ring;             // chunks that a block of step can hold in shared memory
  Dtype weight_dtype, copy_dtype, grad_dtype, state_dtype;
  std::uintptr_t grad[kTensors];
};

static_assert(sizeof(Call<LarsRule>) <= kParameterBytes, "more than a launch may take");
static_assert(sizeof(Call<LambRule>) <= kParameterBytes, "more than a launch may take");
static_assert(sizeof(Call<RmspropWarmupRule>) <= kParameterBytes, "more than a launch may take");

}  // namespace fastlars::cuda
