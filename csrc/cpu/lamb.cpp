// LAMB over one chunk.
#include "rules/lamb.h"

#include "cpu/parallel.h"
#include "cpu/sums.h"
#include "cpu/weights.h"

namespace fastlars::cpu {
namespace {

// Advances the moments of element i. Returns the direction of the moments as they are stored,
// because that is what apply reads.
template <class G, class S>
FASTLARS_HD float advance(const LambCoefficients& c, float w, const G* grad, S* moment1, S* moment2,
                          int i) {
  float m = to_float(moment1[i]);
  float v = to_float(moment2[i]);
  lamb_moments(c, w, to_float(grad[i]), m, v);
  store(moment1[i], m);
  store(moment2[i], v);
  return lamb_direction(c, w, stored<S>(m), stored<S>(v));
}

}  // namespace

template <>
struct ChunkOps<LambRule> {
  static Sums<2> measure(const TensorList& list, const Chunk& chunk, const LambCoefficients& c) {
    Sums<2> sums;
    with_weights_to_read(list, chunk, [&](const auto* weight) {
      with_grads(list, chunk, [&](const auto* grad) {
        with_states<0, 1>(list, chunk, [&](auto* moment1, auto* moment2) {
          const auto each = [=](int i, float (&x)[2]) __attribute__((always_inline)) {
            x[0] = to_float(weight[i]);
            x[1] = advance(c, x[0], grad, moment1, moment2, i);
          };
          const auto again = [=](int i, float (&x)[2]) __attribute__((always_inline)) {
            x[0] = to_float(weight[i]);
            x[1] = lamb_direction(c, x[0], to_float(moment1[i]), to_float(moment2[i]));
          };
          sums = sum_squares<2>(chunk.size, each, again, weight, grad, moment1, moment2);
        });
      });
    });
    return sums;
  }

  static void apply(const TensorList& list, const Chunk& chunk, const LambCoefficients& c,
                    bool measured) {
    with_weights(list, chunk, [&](auto weights) {
      with_states<0, 1>(list, chunk, [&](auto* moment1, auto* moment2) {
        if (measured) {
          const auto each = [=](int i) __attribute__((always_inline)) {
            const float w = weights.load(i);
            const float u = lamb_direction(c, w, to_float(moment1[i]), to_float(moment2[i]));
            weights.store(i, lamb_update(c, w, u));
          };
          return for_each(chunk.size, each, weights.weight, moment1, moment2);
        }
        with_grads(list, chunk, [&](const auto* grad) {
          const auto each = [=](int i) __attribute__((always_inline)) {
            const float w = weights.load(i);
            weights.store(i, lamb_update(c, w, advance(c, w, grad, moment1, moment2, i)));
          };
          for_each(chunk.size, each, weights.weight, grad, moment1, moment2);
        });
      });
    });
  }
};

template void measure(const LambRule&, const StepScalars&, TensorList&, Sums<2>*);
template void apply(const LambRule&, const StepScalars&, TensorList&, const Sums<2>*, float*);
template void step(const LambRule&, const StepScalars&, TensorList&, float*);

}  // namespace fastlars::cpu
