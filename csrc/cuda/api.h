// The CUDA back end: measure, apply, and step, which is both in one launch. None of them waits for
// the device, allocates, or copies: tables and results are device memory of the caller.
//
// Read csrc/cuda in this order:
//   chunk_table.h                  how a list is cut into chunks; its tables on the device
//   scalars.h, kernel_args.h       arguments of a kernel
//   launch.cuh, launch.cu          host side of a launch; errors of CUDA
//   intrinsics.cuh                 GPU primitives
//   vector_io.cuh                  loads and stores of one chunk
//   reduce.cuh                     sums over a block's threads and over a tensor's chunks
//   lars.cu, lamb.cu, lans.cu,     one file a rule: its loops over one chunk, and the instantiation
//   rmsprop_warmup.cu,             of the templates below. A new rule is a new file here and
//   gradient_norm.cu               changes no other
//   block.cuh                      what a block does before, between and after its chunks
//   measure.cuh, apply.cuh         kernels of the two-launch path
//   schedule.cuh, step.cuh         kernel of the one-launch path
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/chunk_table.h"
#include "cuda/scalars.h"

namespace fastlars::cuda {

// A kernel could not be launched.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What a launch works on, and where. The device of `stream` must be the current one.
struct LaunchTarget {
  const ChunkTable& table;
  const TensorList& list;
  DeviceScalars device;  // scalars in device memory; StepScalars has all others
  void* stream;
  int grid;              // blocks; 0 for as many as the device holds at once
  int shared_slots = 0;  // chunks that a block of `step` caches in shared memory; 0: what fits
};

// Writes the sums of squares of every tensor. For rules with sums. Where the rule's measure_writes
// says so, states and counters advance here.
template <class Rule>
void measure(const Rule& rule, const StepScalars& scalars, const LaunchTarget& target,
             Sums<Rule::sums>* sums);

// Writes weights, and a row of `report` for each tensor: write_report in rules/common.h. `sums` is
// not read where the rule does not adapt.
template <class Rule>
void apply(const Rule& rule, const StepScalars& scalars, const LaunchTarget& target,
           const Sums<Rule::sums>* sums, float* report);

// One launch, with the bits of measure and apply. For rules that adapt; rounds to nearest.
template <class Rule>
void step(const Rule& rule, const StepScalars& scalars, const LaunchTarget& target, float* report);

// Why kernels cannot run on the current device; empty where they can.
std::string why_not();

}  // namespace fastlars::cuda
