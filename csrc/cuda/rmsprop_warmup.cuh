// RMSprop warm-up over one chunk.
#pragma once

#include "cuda/lars.cuh"

namespace fastlars::cuda {

template <>
struct Body<RmspropWarmupRule> {
  using Coefficients = RmspropWarmupCoefficients;

  template <From, bool Rounds, class Types>
  static __device__ __forceinline__ void apply(const Coefficients& c, const Types& types,
                                               const Chunk& chunk, const float4*,
                                               std::uint64_t seed) {
    if (c.warming) {
      loop<true, Rounds>(c, types, chunk, seed);
    } else {
      loop<false, Rounds>(c, types, chunk, seed);
    }
  }

 private:
  template <bool Warming, bool Rounds, class Types>
  static __device__ __forceinline__ void loop(const Coefficients& c, const Types& types,
                                              const Chunk& chunk, std::uint64_t seed) {
    // Four arrays of four vectors would not fit the registers.
    sweep<Warming ? kVectors / 2 : kVectors>(chunk.size, [&](auto place) {
      Raw w[place.batch], g[place.batch], b[place.batch], m[place.batch];
      load<true>(b, types.state(), chunk.state[0], place);
      if (Warming) load<true>(m, types.state(), chunk.state[1], place);
      load<false>(w, types.weight(), chunk.weight, place);
      load<true>(g, types.grad(), chunk.grad, place);
#pragma unroll
      for (int n = 0; n < place.batch; ++n) {
        float weight[kVector], buffer[kVector], square[kVector];
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          const float x = value(types.weight(), w[n], k);
          const float d = value(types.grad(), g[n], k);
          buffer[k] = value(types.state(), b[n], k);
          if (Warming) {
            square[k] = value(types.state(), m[n], k);
            weight[k] = rmsprop_warmup_update(c, x, d, buffer[k], square[k]);
          } else {
            weight[k] = rmsprop_warmup_update(c, x, d, buffer[k]);
          }
        }
        store<true>(buffer, types.state(), chunk.state[0], place, n);
        if (Warming) store<true>(square, types.state(), chunk.state[1], place, n);
        store_weight<Rounds>(weight, types, chunk, place, n, seed);
      }
    });
  }
};

}  // namespace fastlars::cuda
