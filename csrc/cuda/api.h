// The CUDA back end: measure, apply, and step, which is both in one launch. Nothing here waits for
// the device, allocates, or copies: tables and results are device memory of the caller's.
#pragma once

#include <stdexcept>
#include <string>

#include "core/api.h"
#include "cuda/numbers.h"
#include "cuda/plan.h"

namespace fastlars::cuda {

// A kernel that could not be launched.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Where and on what a call works. The device of `stream` is the current one.
struct Work {
  const Plan& plan;
  const TensorList& list;
  Numbers device;  // what the device knows; the rest is by value
  void* stream;
  int grid;      // blocks; 0 is as many as the device holds at once
  int ring = 0;  // chunks that a block of `step` holds in shared memory; 0 is what fits
};

void measure(const GradientNorm& rule, const Scalars& now, const Work& work, Sums* sums);
void measure(const LarsRule& rule, const Scalars& now, const Work& work, Sums* sums);
void measure(const LambRule& rule, const Scalars& now, const Work& work, Sums* sums);

// As on the CPU: `sums` is not read where the rule does not adapt.
void apply(const LarsRule& rule, const Scalars& now, const Work& work, const Sums* sums,
           float* ratios);
void apply(const LambRule& rule, const Scalars& now, const Work& work, const Sums* sums,
           float* ratios);
void apply(const RmspropWarmupRule& rule, const Scalars& now, const Work& work, const Sums* sums,
           float* ratios);

// One launch, with the bits of measure and apply. For rules that adapt; rounds to nearest.
void step(const LarsRule& rule, const Scalars& now, const Work& work, float* ratios);
void step(const LambRule& rule, const Scalars& now, const Work& work, float* ratios);

// Why kernels cannot run on the current device; empty where they can.
std::string why_not();

}  // namespace fastlars::cuda
