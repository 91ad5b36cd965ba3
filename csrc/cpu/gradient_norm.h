// The sum of squares of the scaled gradient, over one chunk.
#pragma once

#include "cpu/chunk.h"
#include "cpu/sums.h"
#include "rules/gradient_norm.h"

namespace fastlars::cpu {

template <>
struct ChunkOps<GradientNorm> {
  static Sums<1> measure(const TensorList& list, const Chunk& chunk, float scale) {
    Sums<1> sums;
    with_grads(list, chunk, [&](const auto* grad) {
      const auto each = [=](int i, float (&x)[1])
                            __attribute__((always_inline)) { x[0] = scale * to_float(grad[i]); };
      sums = sum_squares<1>(chunk.size, each, each, grad);
    });
    return sums;
  }
};

}  // namespace fastlars::cpu
