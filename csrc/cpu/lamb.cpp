// LAMB over one chunk.
#include "rules/lamb.h"

#include <type_traits>

#include "cpu/parallel.h"
#include "cpu/sums.h"
#include "cpu/weights.h"

namespace fastlars::cpu {
namespace {

// Advances the moments of element i. Returns the direction of the moments as they are stored,
// because that is what apply reads.
template <bool nesterov, class G, class S>
FASTLARS_HD float advance(const LambCoefficients& c, float w, const G* grad, S* moment1, S* moment2,
                          int i) {
  float m = to_float(moment1[i]);
  float v = to_float(moment2[i]);
  const float g = to_float(grad[i]);
  lamb_moments(c, w, g, m, v);
  store(moment1[i], m);
  store(moment2[i], v);
  return lamb_direction<nesterov>(c, w, g, stored<S>(m), stored<S>(v));
}

// The same direction again, of moments that have advanced.
template <bool nesterov, class G, class S>
FASTLARS_HD float direction(const LambCoefficients& c, float w, const G* grad, const S* moment1,
                            const S* moment2, int i) {
  const float g = nesterov ? to_float(grad[i]) : 0.0f;
  return lamb_direction<nesterov>(c, w, g, to_float(moment1[i]), to_float(moment2[i]));
}

// Calls f with c.nesterov as a type: a branch inside the loop would keep compilers from vectorising
// it.
template <class F>
void with_nesterov(const LambCoefficients& c, F&& f) {
  c.nesterov ? f(std::true_type()) : f(std::false_type());
}

}  // namespace

template <>
struct ChunkOps<LambRule> {
  static Sums<2> measure(const TensorList& list, const Chunk& chunk, const LambCoefficients& c) {
    Sums<2> sums;
    with_weights_to_read(list, chunk, [&](const auto* weight) {
      with_grads(list, chunk, [&](const auto* grad) {
        with_states<0, 1>(list, chunk, [&](auto* moment1, auto* moment2) {
          with_nesterov(c, [&](auto as_type) {
            constexpr bool nesterov = decltype(as_type)::value;
            const auto each = [=](int i, float (&x)[2]) __attribute__((always_inline)) {
              x[0] = to_float(weight[i]);
              x[1] = advance<nesterov>(c, x[0], grad, moment1, moment2, i);
            };
            const auto again = [=](int i, float (&x)[2]) __attribute__((always_inline)) {
              x[0] = to_float(weight[i]);
              x[1] = direction<nesterov>(c, x[0], grad, moment1, moment2, i);
            };
            sums = sum_squares<2>(chunk.size, each, again, weight, grad, moment1, moment2);
          });
        });
      });
    });
    return sums;
  }

  static void apply(const TensorList& list, const Chunk& chunk, const LambCoefficients& c,
                    bool measured) {
    with_weights(list, chunk, [&](auto weights) {
      with_states<0, 1>(list, chunk, [&](auto* moment1, auto* moment2) {
        // Without a ratio too, Nesterov's form has two passes: a loop for both would be more code.
        const bool advanced = measured || c.nesterov;
        if (!measured && c.nesterov) measure(list, chunk, c);
        if (advanced && !c.nesterov) {
          const auto each = [=](int i) __attribute__((always_inline)) {
            const float w = weights.load(i);
            const float u =
                lamb_direction<false>(c, w, 0.0f, to_float(moment1[i]), to_float(moment2[i]));
            weights.store(i, lamb_update(c, w, u));
          };
          return for_each(chunk.size, each, weights.weight, moment1, moment2);
        }
        with_grads(list, chunk, [&](const auto* grad) {
          const auto loop = [&](const auto& u) {
            const auto each = [=](int i) __attribute__((always_inline)) {
              const float w = weights.load(i);
              weights.store(i, lamb_update(c, w, u(i, w)));
            };
            for_each(chunk.size, each, weights.weight, grad, moment1, moment2);
          };
          if (advanced) {
            loop([=](int i, float w) __attribute__((always_inline)) {
              return direction<true>(c, w, grad, moment1, moment2, i);
            });
          } else {
            loop([=](int i, float w) __attribute__((always_inline)) {
              return advance<false>(c, w, grad, moment1, moment2, i);
            });
          }
        });
      });
    });
  }
};

template void measure(const LambRule&, const StepScalars&, TensorList&, Sums<2>*);
template void apply(const LambRule&, const StepScalars&, TensorList&, const Sums<2>*, float*);
template void step(const LambRule&, const StepScalars&, TensorList&, float*);

}  // namespace fastlars::cpu
