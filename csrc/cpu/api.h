// The CPU back end: measure, apply, and step, which is both. Defined in parallel.h, and
// instantiated by the file of each rule.
#pragma once

#include "core/tensors.h"
#include "rules/common.h"

namespace fastlars::cpu {

// Writes the sums of squares of every tensor. Where the rule's measure_writes says so, states and
// counters advance here.
template <class Rule>
void measure(const Rule& rule, const StepScalars& scalars, TensorList& list,
             Sums<Rule::sums>* sums);

// Writes the weights with the trust ratios that `sums` give, and a row of `report` for each tensor:
// write_report in rules/common.h. `sums` is not read where the rule does not adapt: all states and
// counters then advance here.
template <class Rule>
void apply(const Rule& rule, const StepScalars& scalars, TensorList& list,
           const Sums<Rule::sums>* sums, float* report);

// measure, then apply, a block of layers at a time.
template <class Rule>
void step(const Rule& rule, const StepScalars& scalars, TensorList& list, float* report);

// The instruction set that the loops run with: "avx2" or "baseline"; "neon" on ARM.
const char* instruction_set();

}  // namespace fastlars::cpu
