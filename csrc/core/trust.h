// The trust ratio of one tensor, from two sums of squares. Double arithmetic: it happens once per
// tensor, and squares of norms that a float holds may not fit a float.
#pragma once

#include <cfloat>
#include <cmath>

#include "core/dtype.h"

namespace fastlars {

// Sums of squares of one tensor: of its weights, and of what it is to be updated with.
struct Sums {
  double weight;
  double update;
};

// Squares of floats beyond about 1e+-19 leave float32's range. A chunk whose sum in float32 is near
// either end is summed again in double: right for every input, at no cost for ordinary ones.
FASTLARS_HD bool leaves_float_range(double sum) { return !(sum > 1e-25 && sum < 1e37); }

FASTLARS_HD bool needs_double(const Sums& sums) {
  return leaves_float_range(sums.weight) || leaves_float_range(sums.update);
}

// numerator / denominator, or 1 where either norm is zero: such a tensor (fresh zeros, no gradient)
// would otherwise never move again. NaN norms compare false and give 1 too; the NaN itself reaches
// the weights through the gradient, where it can be seen.
FASTLARS_HD double guarded_ratio(const Sums& sums, double numerator, double denominator) {
  if (!(sums.weight > 0.0 && sums.update > 0.0)) return 1.0;
  const double ratio = numerator / denominator;
  // Gradients around 1e-40 ask for more than a float holds. The largest float times such a gradient
  // is still a sensible step, infinity times it is not.
  return (ratio > FLT_MAX && std::isfinite(numerator)) ? FLT_MAX : ratio;
}

// LARS, separate:  h |w| / (|g| + wd |w| + eps)      You, Gitman, Ginsburg 2017, eq. 6
// LARS, combined:  h |w| / (|g + wd w| + eps)        sums.update is then that of g + wd w
FASTLARS_HD double lars_ratio(const Sums& sums, double trust_coefficient, double weight_decay,
                              double eps, bool combined) {
  const double weight_norm = std::sqrt(sums.weight);
  const double decay_norm = combined ? 0.0 : weight_decay * weight_norm;
  return guarded_ratio(sums, trust_coefficient * weight_norm,
                       std::sqrt(sums.update) + decay_norm + eps);
}

// LAMB:  phi(|w|) / (|u| + eps),  phi(z) = min(max(z, lower), upper)      You et al. 2020
FASTLARS_HD double lamb_ratio(const Sums& sums, double lower, double upper, double eps) {
  const double weight_norm = std::sqrt(sums.weight);
  const double raised = weight_norm < lower ? lower : weight_norm;
  const double phi = raised > upper ? upper : raised;
  return guarded_ratio(sums, phi, std::sqrt(sums.update) + eps);
}

}  // namespace fastlars
