// RMSprop warm-up over one chunk.
#include "rules/rmsprop_warmup.h"

#include "cpu/isa.h"
#include "cpu/loop.h"
#include "cpu/parallel.h"
#include "cpu/weights.h"

namespace fastlars::cpu {
namespace {

template <class Weights, class G, class S>
struct Apply {
  Weights weights;
  const G* grad;
  S* buffer;
  S* square;
  int size;
  RmspropWarmupCoefficients c;

  FASTLARS_HD void warming() const {
    const auto each = [this](int i) __attribute__((always_inline)) {
      float b = to_float(buffer[i]);
      float m = to_float(square[i]);
      const float w = rmsprop_warmup_update(c, weights.load(i), to_float(grad[i]), b, m);
      store(buffer[i], b);
      store(square[i], m);
      weights.store(i, w);
    };
    for_each(size, each, weights.weight, grad, buffer, square);
  }

  FASTLARS_HD void warmed_up() const {
    const auto each = [this](int i) __attribute__((always_inline)) {
      float b = to_float(buffer[i]);
      const float w = rmsprop_warmup_update(c, weights.load(i), to_float(grad[i]), b);
      store(buffer[i], b);
      weights.store(i, w);
    };
    for_each(size, each, weights.weight, grad, buffer);
  }

  FASTLARS_HD void operator()() const {
    if (c.warming) {
      warming();
    } else {
      warmed_up();
    }
  }
};

}  // namespace

template <>
struct ChunkOps<RmspropWarmupRule> {
  static void apply(const TensorList& list, const Chunk& chunk, const RmspropWarmupCoefficients& c,
                    bool) {
    with_weights(list, chunk, [&](auto weights) {
      visit(list.grad_dtype, [&](auto g) {
        with_state_type(list, [&](auto s) {
          using G = decltype(g);
          using S = decltype(s);
          run(Apply<decltype(weights), G, S>{weights, at<G>(list.grad, chunk),
                                             at<S>(list.state[0], chunk),
                                             at<S>(list.state[1], chunk), chunk.size, c});
        });
      });
    });
  }
};

template void apply(const RmspropWarmupRule&, const StepScalars&, TensorList&, const Sums<0>*,
                    float*);
template void step(const RmspropWarmupRule&, const StepScalars&, TensorList&, float*);

}  // namespace fastlars::cpu
