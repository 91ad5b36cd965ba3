// Two sums of squares over a chunk.
#pragma once

#include "core/trust.h"

namespace fastlars::cpu {

// Independent partial sums. Fixed, so that the bits do not depend on the width of the vector unit.
constexpr int kLanes = 32;

// each(i, x, y) yields the two values whose squares are summed.
template <class Sum, class Each>
FASTLARS_HD Sums sum_squares(int size, const Each& each) {
  Sum weight[kLanes] = {};
  Sum update[kLanes] = {};
  float x, y;
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      each(i + lane, x, y);
      weight[lane] += static_cast<Sum>(x) * static_cast<Sum>(x);
      update[lane] += static_cast<Sum>(y) * static_cast<Sum>(y);
    }
  }
  for (int lane = 0; i + lane < size; ++lane) {
    each(i + lane, x, y);
    weight[lane] += static_cast<Sum>(x) * static_cast<Sum>(x);
    update[lane] += static_cast<Sum>(y) * static_cast<Sum>(y);
  }
  Sums sums = {0.0, 0.0};
  for (int lane = 0; lane < kLanes; ++lane) {
    sums.weight += weight[lane];
    sums.update += update[lane];
  }
  return sums;
}

// Squares of floats beyond about 1e+-19 leave float32's range. A chunk whose sum is near either end
// is summed again in double: right for every input, at no cost for ordinary ones.
FASTLARS_HD bool leaves_float_range(double sum) { return !(sum > 1e-25 && sum < 1e37); }

FASTLARS_HD bool needs_double(const Sums& sums) {
  return leaves_float_range(sums.weight) || leaves_float_range(sums.update);
}

}  // namespace fastlars::cpu
