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

}  // namespace fastlars::cpu
