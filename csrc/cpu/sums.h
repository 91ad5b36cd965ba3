// Two sums of squares over a chunk.
#pragma once

#include "core/trust.h"
#include "cpu/loop.h"

namespace fastlars::cpu {

// Independent partial sums. Fixed, so that the bits do not depend on the width of the vector unit.
constexpr int kLanes = 32;
static_assert(kStrip % kLanes == 0, "a strip begins where lanes begin");

// each(i, x, y) yields the two values whose squares are summed; `arrays` are those that it reads.
template <class Sum, class Each, class... T>
FASTLARS_HD Sums sum_squares(int size, const Each& each, const T*... arrays) {
  Sum weight[kLanes] = {};
  Sum update[kLanes] = {};
  float x, y;
  const bool ahead = prefetches();
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    if (ahead && i % kStrip == 0) (prefetch(arrays + i), ...);
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
