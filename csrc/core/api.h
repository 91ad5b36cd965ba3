// What a back end offers: measure, apply, and step, which is both.
#pragma once

#include "core/rules.h"
#include "core/tensors.h"

namespace fastlars {

// Measures gradients alone: Sums::update of g, Sums::weight 0. For a global norm.
struct GradientNorm {
  static constexpr bool counts_steps = false;
};

namespace cpu {

// Writes the sums of squares of every tensor. LAMB's moments and step counters advance here.
void measure(const GradientNorm& rule, const Scalars& now, TensorList& list, Sums* sums);
void measure(const LarsRule& rule, const Scalars& now, TensorList& list, Sums* sums);
void measure(const LambRule& rule, const Scalars& now, TensorList& list, Sums* sums);

// Writes the weights with the ratios that `sums` give, and those ratios. `sums` is not read where
// the rule does not adapt; LAMB's moments and step counters then advance here instead. RMSprop
// warm-up never adapts.
void apply(const LarsRule& rule, const Scalars& now, TensorList& list, const Sums* sums,
           float* ratios);
void apply(const LambRule& rule, const Scalars& now, TensorList& list, const Sums* sums,
           float* ratios);
void apply(const RmspropWarmupRule& rule, const Scalars& now, TensorList& list, const Sums* sums,
           float* ratios);

// measure, then apply, a block of layers at a time.
void step(const LarsRule& rule, const Scalars& now, TensorList& list, float* ratios);
void step(const LambRule& rule, const Scalars& now, TensorList& list, float* ratios);
void step(const RmspropWarmupRule& rule, const Scalars& now, TensorList& list, float* ratios);

// The instruction set that the loops run with: "avx2" or "baseline".
const char* instruction_set();

}  // namespace cpu
}  // namespace fastlars
