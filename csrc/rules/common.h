// Shared by all rules. Each rule is one file of this folder: its hyper-parameters, the coefficients
// of one tensor, its trust ratio, and its update of one element. All of it is for host and device;
// a back end adds only the loops. Symbols: docs/numerics.md, "Notation".
//
// A rule's struct says what back ends must know of it:
//   name            of its class in Python
//   sums            sums of squares that a tensor's ratio is made of; 0 where it has none
//   states          the most state tensors that a parameter has
//   steps           it updates weights: GradientNorm alone does not
//   counts_steps    its counter is the number of steps taken; else the last learning rate
//   measure_writes  measuring advances the states, and the counter with them
//   normalizes      it can divide a gradient by its norm, which is then measured before all else
//   fields          its hyper-parameters by name, as rules.py has them; enumerators are numbered in
//                   the order of the words there
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "core/dtype.h"

namespace fastlars {

// What changes from step to step.
struct StepScalars {
  double lr;
  double gradient_scale;  // unscaling, global clip and the sign of `maximize`, in one factor
};

// Sums of squares of one tensor: of its weights, and last of what it is updated with. In double:
// squares of norms that a float holds may not fit a float.
template <int N>
struct Sums {
  double of[N];
};
template <>
struct Sums<0> {};

// Squares of floats beyond about 1e+-19 leave float32's range. A chunk whose sum in float32 is near
// either end is summed again in double: right for every input, at no cost for ordinary ones.
FASTLARS_HD bool leaves_float_range(double sum) { return !(sum > 1e-25 && sum < 1e37); }

FASTLARS_HD double bounded(double value, double lower, double upper) {
  const double raised = value < lower ? lower : value;
  return raised > upper ? upper : raised;
}

// numerator / denominator within [floor, ceiling], or 1 where either sum of squares is zero: such a
// tensor (fresh zeros, no gradient) would otherwise never move again. NaN norms compare false and
// give 1 too; the NaN itself reaches the weights through the gradient, where it can be seen.
FASTLARS_HD double guarded_ratio(double weight, double update, double numerator, double denominator,
                                 double floor = 0.0, double ceiling = INFINITY) {
  if (!(weight > 0.0 && update > 0.0)) return 1.0;
  const double ratio = bounded(numerator / denominator, floor, ceiling);
  // Gradients around 1e-40 ask for a q beyond float32. The largest float times such a gradient is
  // still a sensible step, infinity times it is not.
  return (ratio > FLT_MAX && std::isfinite(numerator)) ? FLT_MAX : ratio;
}

// lr q can overflow float32 even where q does not: it is then the largest float.
FASTLARS_HD float coefficient(double value) {
  return (value > FLT_MAX && std::isfinite(value)) ? FLT_MAX : static_cast<float>(value);
}

// base to the whole part of exponent, by repeated squaring: the same bits on every device, which a
// library's pow does not promise.
FASTLARS_HD double power(double base, double exponent) {
  double result = 1.0;
  for (auto left = static_cast<std::uint32_t>(exponent); left > 0; left /= 2) {
    if (left % 2 == 1) result *= base;
    base *= base;
  }
  return result;
}

// The counter of a tensor after this step.
template <class Rule>
FASTLARS_HD float next_counter(const Rule&, const StepScalars& scalars, float counter) {
  return Rule::counts_steps ? counter + 1.0f : static_cast<float>(scalars.lr);
}

// A rule has one trust ratio, a double, or a struct of several, each of which is 1 by default.
template <class Rule>
using RatioOf = decltype(trust_ratio(std::declval<const Rule&>(), std::declval<StepScalars>(),
                                     std::declval<const Sums<Rule::sums>&>()));

// A tensor's ratio; `sums` is null where the rule does not adapt: the ratio is 1 then.
template <class Rule>
FASTLARS_HD RatioOf<Rule> ratio_of(const Rule& rule, const StepScalars& scalars,
                                   const Sums<Rule::sums>* sums) {
  if (sums != nullptr) return trust_ratio(rule, scalars, *sums);
  if constexpr (std::is_same_v<RatioOf<Rule>, double>) {
    return 1.0;
  } else {
    return RatioOf<Rule>();
  }
}

// The ratio that a step returns of a tensor.
FASTLARS_HD double reported(double ratio) { return ratio; }

// Writes what a step returns of a tensor, a row of `report`: its ratio, then the norms that the
// sums are squares of; NaN where `sums` is null, because nothing was measured.
template <class Rule>
FASTLARS_HD void write_report(const RatioOf<Rule>& ratio, const Sums<Rule::sums>* sums,
                              float* report, int tensor) {
  float* row = report + std::int64_t{tensor} * (1 + Rule::sums);
  row[0] = static_cast<float>(reported(ratio));
  if constexpr (Rule::sums > 0) {
    for (int i = 0; i < Rule::sums; ++i) {
      row[1 + i] = sums != nullptr ? static_cast<float>(std::sqrt(sums->of[i])) : NAN;
    }
  }
}

// Puts a tensor's trust ratio into its coefficients, which are made for a ratio of 1.
template <class Rule, class Ratio, class Coefficients>
FASTLARS_HD void apply_trust_ratio(const Rule& rule, const StepScalars& scalars, const Ratio& ratio,
                                   Coefficients& c) {
  set_ratio_coefficient(rule, ratio_coefficient(rule, scalars, c, ratio), c);
}

// Puts the norm of a tensor's gradient into its coefficients. `sums` has by tensor the sum of
// squares of the scaled gradient; null: gradients stay as they are.
template <class Rule, class Coefficients>
FASTLARS_HD void normalize_gradient(const Rule& rule, const StepScalars& scalars,
                                    const double* sums, int tensor, Coefficients& c) {
  if constexpr (Rule::normalizes) {
    if (sums != nullptr) c.gradient_scale = normalizing_scale(rule, scalars, sums[tensor]);
  }
}

}  // namespace fastlars
