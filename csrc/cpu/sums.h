// Sums of squares over a chunk.
#pragma once

#include "cpu/loop.h"
#include "rules/common.h"

namespace fastlars::cpu {

// Independent partial sums. Their number is fixed, so that the bits do not depend on the width of
// the vector unit.
constexpr int kLanes = 32;
static_assert(kStrip % kLanes == 0, "a strip begins where lanes begin");

// each(i, x) yields the N values of an element whose squares are summed; `arrays` are those that it
// reads.
template <int N, class Sum, class Each, class... T>
FASTLARS_HD Sums<N> sum_squares(int size, const Each& each, const T*... arrays) {
  Sum partial[N][kLanes] = {};
  const auto add = [&](int i, int lane) __attribute__((always_inline)) {
    float x[N];
    each(i, x);
    for (int n = 0; n < N; ++n) {
      partial[n][lane] += static_cast<Sum>(x[n]) * static_cast<Sum>(x[n]);
    }
  };
  const bool ahead = prefetches();
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    if (ahead && i % kStrip == 0) (prefetch(arrays + i), ...);
    for (int lane = 0; lane < kLanes; ++lane) add(i + lane, lane);
  }
  for (int lane = 0; i + lane < size; ++lane) add(i + lane, lane);
  Sums<N> sums = {};
  for (int n = 0; n < N; ++n) {
    for (int lane = 0; lane < kLanes; ++lane) sums.of[n] += partial[n][lane];
  }
  return sums;
}

// The sums of a chunk: in float32, or where they leave its range in double, for which `again`
// yields the same values a second time.
template <int N, class Each, class Again, class... T>
Sums<N> sum_squares(int size, const Each& each, const Again& again, const T*... arrays) {
  Sums<N> sums;
  Sums<N>* const found = &sums;
  run([=]() __attribute__((always_inline)) {
    *found = sum_squares<N, float>(size, each, arrays...);
    bool in_range = true;
    for (const double sum : found->of) in_range = in_range && !leaves_float_range(sum);
    if (!in_range) *found = sum_squares<N, double>(size, again, arrays...);
  });
  return sums;
}

}  // namespace fastlars::cpu
