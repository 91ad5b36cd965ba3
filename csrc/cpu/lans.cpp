// LANS over one chunk.
#include "rules/lans.h"

#include "cpu/parallel.h"
#include "cpu/sums.h"
#include "cpu/weights.h"

namespace fastlars::cpu {
namespace {

// The directions of the moments as they are stored, because that is what apply reads.
template <class G, class S>
FASTLARS_HD LansDirections directions(const LansCoefficients& c, float w, const G* grad,
                                      const S* moment1, const S* moment2, int i) {
  const float g = lans_gradient(c, w, to_float(grad[i]));
  return lans_directions(c, w, g, to_float(moment1[i]), to_float(moment2[i]));
}

// Advances the moments of element i.
template <class G, class S>
FASTLARS_HD LansDirections advance(const LansCoefficients& c, float w, const G* grad, S* moment1,
                                   S* moment2, int i) {
  const float g = lans_gradient(c, w, to_float(grad[i]));
  float m = to_float(moment1[i]);
  float v = to_float(moment2[i]);
  lans_moments(c, g, m, v);
  store(moment1[i], m);
  store(moment2[i], v);
  return lans_directions(c, w, g, stored<S>(m), stored<S>(v));
}

}  // namespace

template <>
struct ChunkOps<LansRule> {
  static Sums<3> measure(const TensorList& list, const Chunk& chunk, const LansCoefficients& c) {
    Sums<3> sums;
    with_weights_to_read(list, chunk, [&](const auto* weight) {
      with_grads(list, chunk, [&](const auto* grad) {
        with_states<0, 1>(list, chunk, [&](auto* moment1, auto* moment2) {
          const auto each = [=](int i, float (&x)[3]) __attribute__((always_inline)) {
            x[0] = to_float(weight[i]);
            const LansDirections u = advance(c, x[0], grad, moment1, moment2, i);
            x[1] = u.momentum;
            x[2] = u.gradient;
          };
          const auto again = [=](int i, float (&x)[3]) __attribute__((always_inline)) {
            x[0] = to_float(weight[i]);
            const LansDirections u = directions(c, x[0], grad, moment1, moment2, i);
            x[1] = u.momentum;
            x[2] = u.gradient;
          };
          sums = sum_squares<3>(chunk.size, each, again, weight, grad, moment1, moment2);
        });
      });
    });
    return sums;
  }

  static void apply(const TensorList& list, const Chunk& chunk, const LansCoefficients& c,
                    bool measured) {
    with_weights(list, chunk, [&](auto weights) {
      with_grads(list, chunk, [&](const auto* grad) {
        with_states<0, 1>(list, chunk, [&](auto* moment1, auto* moment2) {
          // A branch inside the loop would keep compilers from vectorising it.
          const auto loop = [&](auto was_measured) {
            const auto each = [=](int i) __attribute__((always_inline)) {
              const float w = weights.load(i);
              const LansDirections u = was_measured ? directions(c, w, grad, moment1, moment2, i)
                                                    : advance(c, w, grad, moment1, moment2, i);
              weights.store(i, lans_update(c, w, u));
            };
            for_each(chunk.size, each, weights.weight, grad, moment1, moment2);
          };
          measured ? loop(std::true_type()) : loop(std::false_type());
        });
      });
    });
  }
};

template void measure(const LansRule&, const StepScalars&, TensorList&, Sums<3>*);
template void apply(const LansRule&, const StepScalars&, TensorList&, const Sums<3>*, float*);
template void step(const LansRule&, const StepScalars&, TensorList&, float*);

}  // namespace fastlars::cpu
