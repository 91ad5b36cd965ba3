// LAMB over one chunk.
#include "rules/lamb.h"

#include "cpu/isa.h"
#include "cpu/loop.h"
#include "cpu/parallel.h"
#include "cpu/sums.h"
#include "cpu/weights.h"

namespace fastlars::cpu {
namespace {

template <class W, class G, class S>
struct Measure {
  const W* weight;
  const G* grad;
  S* moment1;
  S* moment2;
  int size;
  LambCoefficients c;
  Sums<2>* sums;

  // The direction is taken from the moments as they are stored, because that is what apply reads.
  FASTLARS_HD void operator()() const {
    const auto advance = [this](int i, float (&x)[2]) __attribute__((always_inline)) {
      x[0] = to_float(weight[i]);
      float m = to_float(moment1[i]);
      float v = to_float(moment2[i]);
      lamb_moments(c, x[0], to_float(grad[i]), m, v);
      store(moment1[i], m);
      store(moment2[i], v);
      x[1] = lamb_direction(c, x[0], stored<S>(m), stored<S>(v));
    };
    *sums = sum_squares<2, float>(size, advance, weight, grad, moment1, moment2);
    if (!needs_double(*sums)) return;
    const auto read = [this](int i, float (&x)[2]) __attribute__((always_inline)) {
      x[0] = to_float(weight[i]);
      x[1] = lamb_direction(c, x[0], to_float(moment1[i]), to_float(moment2[i]));
    };
    *sums = sum_squares<2, double>(size, read, weight, moment1, moment2);
  }
};

template <class Weights, class S>
struct Apply {
  Weights weights;
  const S* moment1;
  const S* moment2;
  int size;
  LambCoefficients c;

  FASTLARS_HD void operator()() const {
    const auto each = [this](int i) __attribute__((always_inline)) {
      const float w = weights.load(i);
      const float u = lamb_direction(c, w, to_float(moment1[i]), to_float(moment2[i]));
      weights.store(i, lamb_update(c, w, u));
    };
    for_each(size, each, weights.weight, moment1, moment2);
  }
};

template <class Weights, class G, class S>
struct AdvanceAndApply {
  Weights weights;
  const G* grad;
  S* moment1;
  S* moment2;
  int size;
  LambCoefficients c;

  FASTLARS_HD void operator()() const {
    const auto each = [this](int i) __attribute__((always_inline)) {
      const float w = weights.load(i);
      float m = to_float(moment1[i]);
      float v = to_float(moment2[i]);
      lamb_moments(c, w, to_float(grad[i]), m, v);
      store(moment1[i], m);
      store(moment2[i], v);
      const float u = lamb_direction(c, w, stored<S>(m), stored<S>(v));
      weights.store(i, lamb_update(c, w, u));
    };
    for_each(size, each, weights.weight, grad, moment1, moment2);
  }
};

}  // namespace

template <>
struct ChunkOps<LambRule> {
  static Sums<2> measure(const TensorList& list, const Chunk& chunk, const LambCoefficients& c) {
    Sums<2> sums;
    visit(list.weight_dtype, [&](auto w) {
      visit(list.grad_dtype, [&](auto g) {
        with_state_type(list, [&](auto s) {
          using W = decltype(w);
          using G = decltype(g);
          using S = decltype(s);
          run(Measure<W, G, S>{at<W>(list.weight, chunk), at<G>(list.grad, chunk),
                               at<S>(list.state[0], chunk), at<S>(list.state[1], chunk), chunk.size,
                               c, &sums});
        });
      });
    });
    return sums;
  }

  static void apply(const TensorList& list, const Chunk& chunk, const LambCoefficients& c,
                    bool measured) {
    with_weights(list, chunk, [&](auto weights) {
      with_state_type(list, [&](auto s) {
        using Weights = decltype(weights);
        using S = decltype(s);
        S* moment1 = at<S>(list.state[0], chunk);
        S* moment2 = at<S>(list.state[1], chunk);
        if (measured) {
          run(Apply<Weights, S>{weights, moment1, moment2, chunk.size, c});
          return;
        }
        visit(list.grad_dtype, [&](auto g) {
          using G = decltype(g);
          run(AdvanceAndApply<Weights, G, S>{weights, at<G>(list.grad, chunk), moment1, moment2,
                                             chunk.size, c});
        });
      });
    });
  }
};

template void measure(const LambRule&, const StepScalars&, TensorList&, Sums<2>*);
template void apply(const LambRule&, const StepScalars&, TensorList&, const Sums<2>*, float*);
template void step(const LambRule&, const StepScalars&, TensorList&, float*);

}  // namespace fastlars::cpu
