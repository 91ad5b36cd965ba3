// RMSprop warm-up over one chunk.
#include "rules/rmsprop_warmup.h"

#include "cpu/loop.h"
#include "cpu/parallel.h"
#include "cpu/weights.h"

namespace fastlars::cpu {

template <>
struct ChunkOps<RmspropWarmupRule> {
  static void apply(const TensorList& list, const Chunk& chunk, const RmspropWarmupCoefficients& c,
                    bool) {
    with_weights(list, chunk, [&](auto weights) {
      with_grads(list, chunk, [&](const auto* grad) {
        with_states<0, 1>(list, chunk, [&](auto* buffer, auto* square) {
          if (!c.warming) {
            const auto each = [=](int i) __attribute__((always_inline)) {
              float b = to_float(buffer[i]);
              const float w = rmsprop_warmup_update(c, weights.load(i), to_float(grad[i]), b);
              store(buffer[i], b);
              weights.store(i, w);
            };
            return for_each(chunk.size, each, weights.weight, grad, buffer);
          }
          const auto each = [=](int i) __attribute__((always_inline)) {
            float b = to_float(buffer[i]);
            float m = to_float(square[i]);
            const float w = rmsprop_warmup_update(c, weights.load(i), to_float(grad[i]), b, m);
            store(buffer[i], b);
            store(square[i], m);
            weights.store(i, w);
          };
          for_each(chunk.size, each, weights.weight, grad, buffer, square);
        });
      });
    });
  }
};

template void apply(const RmspropWarmupRule&, const StepScalars&, TensorList&, const Sums<0>*,
                    float*);
template void step(const RmspropWarmupRule&, const StepScalars&, TensorList&, float*);

}  // namespace fastlars::cpu
