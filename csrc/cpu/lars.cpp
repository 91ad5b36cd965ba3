// LARS over one chunk.
#include "rules/lars.h"

#include "cpu/isa.h"
#include "cpu/loop.h"
#include "cpu/parallel.h"
#include "cpu/sums.h"
#include "cpu/weights.h"

namespace fastlars::cpu {
namespace {

template <class W, class G>
struct Measure {
  const W* weight;
  const G* grad;
  int size;
  LarsCoefficients c;
  Sums<2>* sums;

  FASTLARS_HD void operator()() const {
    const auto each = [this](int i, float (&x)[2]) __attribute__((always_inline)) {
      x[0] = to_float(weight[i]);
      x[1] = lars_measured(c, x[0], to_float(grad[i]));
    };
    *sums = sum_squares<2, float>(size, each, weight, grad);
    if (needs_double(*sums)) *sums = sum_squares<2, double>(size, each, weight, grad);
  }
};

template <class Weights, class G, class S>
struct Apply {
  Weights weights;
  const G* grad;
  S* buffer;
  int size;
  LarsCoefficients c;

  // `nesterov` is a constant in each of the two calls: a branch inside the loop would keep
  // compilers from vectorising it.
  FASTLARS_HD void loop(bool nesterov) const {
    LarsCoefficients k = c;
    k.nesterov = nesterov;
    const auto each = [this, k](int i) __attribute__((always_inline)) {
      float b = to_float(buffer[i]);
      const float w = lars_update(k, weights.load(i), to_float(grad[i]), b);
      store(buffer[i], b);
      weights.store(i, w);
    };
    for_each(size, each, weights.weight, grad, buffer);
  }

  FASTLARS_HD void operator()() const {
    if (c.nesterov) {
      loop(true);
    } else {
      loop(false);
    }
  }
};

template <class Weights, class G>
struct ApplyWithoutMomentum {
  Weights weights;
  const G* grad;
  int size;
  LarsCoefficients c;

  FASTLARS_HD void operator()() const {
    const auto each = [this](int i) __attribute__((always_inline)) {
      weights.store(i, lars_update(c, weights.load(i), to_float(grad[i])));
    };
    for_each(size, each, weights.weight, grad);
  }
};

}  // namespace

template <>
struct ChunkOps<LarsRule> {
  static Sums<2> measure(const TensorList& list, const Chunk& chunk, const LarsCoefficients& c) {
    Sums<2> sums;
    visit(list.weight_dtype, [&](auto w) {
      visit(list.grad_dtype, [&](auto g) {
        using W = decltype(w);
        using G = decltype(g);
        run(Measure<W, G>{at<W>(list.weight, chunk), at<G>(list.grad, chunk), chunk.size, c,
                          &sums});
      });
    });
    return sums;
  }

  static void apply(const TensorList& list, const Chunk& chunk, const LarsCoefficients& c, bool) {
    with_weights(list, chunk, [&](auto weights) {
      using Weights = decltype(weights);
      visit(list.grad_dtype, [&](auto g) {
        using G = decltype(g);
        const G* grad = at<G>(list.grad, chunk);
        if (!list.has_state()) {
          run(ApplyWithoutMomentum<Weights, G>{weights, grad, chunk.size, c});
          return;
        }
        with_state_type(list, [&](auto s) {
          using S = decltype(s);
          S* buffer = at<S>(list.state[0], chunk);
          run(Apply<Weights, G, S>{weights, grad, buffer, chunk.size, c});
        });
      });
    });
  }
};

template void measure(const LarsRule&, const StepScalars&, TensorList&, Sums<2>*);
template void apply(const LarsRule&, const StepScalars&, TensorList&, const Sums<2>*, float*);
template void step(const LarsRule&, const StepScalars&, TensorList&, float*);

}  // namespace fastlars::cpu
