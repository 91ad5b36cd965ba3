// LARS over one chunk, and the norm of gradients alone.
#include "cpu/chunk.h"
#include "cpu/isa.h"
#include "cpu/loop.h"
#include "cpu/storage.h"
#include "cpu/sums.h"

namespace fastlars::cpu {
namespace {

template <class G>
struct MeasureGradient {
  const G* grad;
  int size;
  float scale;
  Sums* sums;

  FASTLARS_HD void operator()() const {
    const auto each = [this](int i, float& x, float& y) __attribute__((always_inline)) {
      x = 0.0f;
      y = scale * to_float(grad[i]);
    };
    *sums = sum_squares<float>(size, each, grad);
    if (leaves_float_range(sums->update)) *sums = sum_squares<double>(size, each, grad);
  }
};

template <class W, class G>
struct Measure {
  const W* weight;
  const G* grad;
  int size;
  LarsCoefficients c;
  Sums* sums;

  FASTLARS_HD void operator()() const {
    const auto each = [this](int i, float& x, float& y) __attribute__((always_inline)) {
      x = to_float(weight[i]);
      y = lars_measured(c, x, to_float(grad[i]));
    };
    *sums = sum_squares<float>(size, each, weight, grad);
    if (needs_double(*sums)) *sums = sum_squares<double>(size, each, weight, grad);
  }
};

template <class Weights, class G, class S>
struct Apply {
  Weights weights;
  const G* grad;
  S* buffer;
  int size;
  LarsCoefficients c;

  // A constant in each copy of the loop: a branch inside would keep compilers from vectorising it.
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

Sums measure_chunk(const TensorList& list, const Chunk& chunk, float gradient_scale) {
  Sums sums;
  visit(list.grad_dtype, [&](auto g) {
    using G = decltype(g);
    run(MeasureGradient<G>{at<G>(list.grad, chunk), chunk.size, gradient_scale, &sums});
  });
  return sums;
}

Sums measure_chunk(const TensorList& list, const Chunk& chunk, const LarsCoefficients& c) {
  Sums sums;
  visit(list.weight_dtype, [&](auto w) {
    visit(list.grad_dtype, [&](auto g) {
      using W = decltype(w);
      using G = decltype(g);
      run(Measure<W, G>{at<W>(list.weight, chunk), at<G>(list.grad, chunk), chunk.size, c, &sums});
    });
  });
  return sums;
}

void apply_chunk(const TensorList& list, const Chunk& chunk, const LarsCoefficients& c, bool) {
  with_weights(list, chunk, [&](auto weights) {
    using Weights = decltype(weights);
    visit(list.grad_dtype, [&](auto g) {
      using G = decltype(g);
      const G* grad = at<G>(list.grad, chunk);
      if (list.state[0].empty()) {
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

}  // namespace fastlars::cpu
