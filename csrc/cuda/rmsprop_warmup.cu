// RMSprop warm-up over one chunk.
#include "cuda/apply.cuh"

namespace fastlars::cuda {

template <>
struct ChunkOps<RmspropWarmupRule> {
  template <OperandSource, bool StochasticRounding, class Types>
  static __device__ __forceinline__ void apply(const RmspropWarmupCoefficients& c,
                                               const Types& types, const Chunk& chunk,
                                               const float4*, std::uint64_t seed) {
    if (c.warming) {
      loop<true, StochasticRounding>(c, types, chunk, seed);
    } else {
      loop<false, StochasticRounding>(c, types, chunk, seed);
    }
  }

 private:
  template <bool Warming, bool StochasticRounding, class Types>
  static __device__ __forceinline__ void loop(const RmspropWarmupCoefficients& c,
                                              const Types& types, const Chunk& chunk,
                                              std::uint64_t seed) {
    // Four arrays of four vectors would not fit the registers.
    sweep<Warming ? kVectors / 2 : kVectors>(chunk.size, [&](auto slice) {
      PackedVector w[slice.batch], g[slice.batch], b[slice.batch], m[slice.batch];
      load<true>(b, types.state(), chunk.state[0], slice);
      if (Warming) load<true>(m, types.state(), chunk.state[1], slice);
      load<false>(w, types.weight(), chunk.weight, slice);
      load<true>(g, types.grad(), chunk.grad, slice);
#pragma unroll
      for (int n = 0; n < slice.batch; ++n) {
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
        store<true>(buffer, types.state(), chunk.state[0], slice, n);
        if (Warming) store<true>(square, types.state(), chunk.state[1], slice, n);
        store_weight<StochasticRounding>(weight, types, chunk, slice, n, seed);
      }
    });
  }
};

template void apply(const RmspropWarmupRule&, const StepScalars&, const LaunchTarget&,
                    const Sums<0>*, float*);

}  // namespace fastlars::cuda
