// No rule of its own: measures gradients alone, for a global norm.
#pragma once

#include "rules/common.h"

namespace fastlars {

struct GradientNorm {
  using Coefficients = float;  // the gradient scale
  static constexpr const char* name = "GradientNorm";
  static constexpr int sums = 1;  // of g
  static constexpr int states = 0;
  static constexpr bool steps = false, counts_steps = false, measure_writes = false;
  static constexpr bool normalizes = false;

  template <class Field>
  static void fields(Field&&) {}
};

FASTLARS_HD float coefficients(const GradientNorm&, const StepScalars& scalars, float) {
  return static_cast<float>(scalars.gradient_scale);
}

}  // namespace fastlars
