// A rule with three sums of squares and three states, which no rule of fastlars has: the loops over
// lists must not be built for two. With states s_k, k from 1 to 3, and the step t:
//   s_k = s_k / 2 + k g,  q = |w| / (|s_1| + |s_3|),  w -= lr / t q (s_1 + s_2 + s_3)
#pragma once

#include "cpu/parallel.h"
#include "cpu/sums.h"

namespace fastlars {

struct RuleOfThree {
  struct Coefficients {
    double rate;  // lr / t
    float q_rate;
  };
  bool adapt;
  static constexpr int sums = 3, states = 3;
  static constexpr bool steps = true, counts_steps = true, measure_writes = true;
  static constexpr bool normalizes = false;
};

inline RuleOfThree::Coefficients coefficients(const RuleOfThree&, const StepScalars& scalars,
                                              float step) {
  return {scalars.lr / step, static_cast<float>(scalars.lr / step)};
}

inline double trust_ratio(const RuleOfThree&, const StepScalars&, const Sums<3>& sums) {
  return std::sqrt(sums.of[0]) / (std::sqrt(sums.of[1]) + std::sqrt(sums.of[2]));
}

inline float ratio_coefficient(const RuleOfThree&, const StepScalars&,
                               const RuleOfThree::Coefficients& c, double ratio) {
  return coefficient(c.rate * ratio);
}

inline void set_ratio_coefficient(const RuleOfThree&, float value, RuleOfThree::Coefficients& c) {
  c.q_rate = value;
}

namespace cpu {

template <>
struct ChunkOps<RuleOfThree> {
  static float& state(const TensorList& list, const Chunk& chunk, int which, int i) {
    return at<float>(list.state[which], chunk)[i];
  }

  static void advance(const TensorList& list, const Chunk& chunk, int i) {
    const float g = at<float>(list.grad, chunk)[i];
    for (int k = 0; k < 3; ++k) {
      float& s = state(list, chunk, k, i);
      s = 0.5f * s + static_cast<float>(k + 1) * g;
    }
  }

  static Sums<3> measure(const TensorList& list, const Chunk& chunk,
                         const RuleOfThree::Coefficients&) {
    const float* w = at<float>(list.weight, chunk);
    return sum_squares<3, double>(chunk.size, [&](int i, float (&x)[3]) {
      advance(list, chunk, i);
      x[0] = w[i];
      x[1] = state(list, chunk, 0, i);
      x[2] = state(list, chunk, 2, i);
    });
  }

  static void apply(const TensorList& list, const Chunk& chunk, const RuleOfThree::Coefficients& c,
                    bool measured) {
    float* w = at<float>(list.weight, chunk);
    for (int i = 0; i < chunk.size; ++i) {
      if (!measured) advance(list, chunk, i);
      float sum = 0.0f;
      for (int k = 0; k < 3; ++k) sum += state(list, chunk, k, i);
      w[i] -= c.q_rate * sum;
    }
  }
};

}  // namespace cpu
}  // namespace fastlars
