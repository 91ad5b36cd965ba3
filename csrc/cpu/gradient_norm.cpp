// The norm of gradients alone, over one chunk.
#include "rules/gradient_norm.h"

#include "cpu/parallel.h"
#include "cpu/sums.h"

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

template void measure(const GradientNorm&, const StepScalars&, TensorList&, Sums<1>*);

}  // namespace fastlars::cpu
