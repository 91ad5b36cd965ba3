// LARS over one chunk.
#include "rules/lars.h"

#include <type_traits>

#include "cpu/parallel.h"
#include "cpu/sums.h"
#include "cpu/weights.h"

namespace fastlars::cpu {

template <>
struct ChunkOps<LarsRule> {
  static Sums<2> measure(const TensorList& list, const Chunk& chunk, const LarsCoefficients& c) {
    Sums<2> sums;
    with_weights_to_read(list, chunk, [&](const auto* weight) {
      with_grads(list, chunk, [&](const auto* grad) {
        const auto each = [=](int i, float (&x)[2]) __attribute__((always_inline)) {
          x[0] = to_float(weight[i]);
          x[1] = lars_measured(c, x[0], to_float(grad[i]));
        };
        sums = sum_squares<2>(chunk.size, each, each, weight, grad);
      });
    });
    return sums;
  }

  static void apply(const TensorList& list, const Chunk& chunk, const LarsCoefficients& c, bool) {
    with_weights(list, chunk, [&](auto weights) {
      with_grads(list, chunk, [&](const auto* grad) {
        if (!list.has_state()) {
          const auto each = [=](int i) __attribute__((always_inline)) {
            weights.store(i, lars_update(c, weights.load(i), to_float(grad[i])));
          };
          return for_each(chunk.size, each, weights.weight, grad);
        }
        with_states<0>(list, chunk, [&](auto* buffer) {
          // A branch inside the loop would keep compilers from vectorising it.
          const auto loop = [&](auto nesterov) {
            const auto each = [=](int i) __attribute__((always_inline)) {
              LarsCoefficients k = c;
              k.nesterov = nesterov;
              float b = to_float(buffer[i]);
              const float w = lars_update(k, weights.load(i), to_float(grad[i]), b);
              store(buffer[i], b);
              weights.store(i, w);
            };
            for_each(chunk.size, each, weights.weight, grad, buffer);
          };
          c.nesterov ? loop(std::true_type()) : loop(std::false_type());
        });
      });
    });
  }
};

template void measure(const LarsRule&, const StepScalars&, TensorList&, Sums<2>*);
template void apply(const LarsRule&, const StepScalars&, TensorList&, const Sums<2>*, float*);
template void step(const LarsRule&, const StepScalars&, TensorList&, float*);

}  // namespace fastlars::cpu
