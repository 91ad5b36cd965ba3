// LAMB over one chunk.
#include "cuda/apply.cuh"
#include "cuda/measure.cuh"
#include "cuda/step.cuh"

namespace fastlars::cuda {

template <>
struct ChunkOps<LambRule> {
  static constexpr int kMeasureBlocks = 3;
  static constexpr int kCached = 1;

  // Four arrays of four vectors would not fit the registers.
  static constexpr int kBatch = kVectors / 2;

  // Advances the moments of one vector, and calls f(k, w, u) for its elements.
  template <bool Streaming, class Types, class Slice, class F>
  static __device__ __forceinline__ void advance(const LambCoefficients& c, const Types& types,
                                                 const Chunk& chunk, Slice slice, int n,
                                                 const PackedVector& w, const PackedVector& g,
                                                 const PackedVector& m, const PackedVector& v,
                                                 F&& f) {
    float moment1[kVector], moment2[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const float x = value(types.weight(), w, k);
      moment1[k] = value(types.state(), m, k);
      moment2[k] = value(types.state(), v, k);
      lamb_moments(c, x, value(types.grad(), g, k), moment1[k], moment2[k]);
      // From the moments as rounded for storage, because those are what apply reads.
      f(k, x,
        lamb_direction(c, x, stored(types.state(), moment1[k]), stored(types.state(), moment2[k])));
    }
    store<Streaming>(moment1, types.state(), chunk.state[0], slice, n);
    store<Streaming>(moment2, types.state(), chunk.state[1], slice, n);
  }

  // CacheInShared: stores the directions to `cache`, where apply reads them.
  template <bool CacheInShared, class Sum, class Types>
  static __device__ __forceinline__ void measure(const LambCoefficients& c, const Types& types,
                                                 const Chunk& chunk, PartialSums<Sum, 2>& sums,
                                                 float4* cache) {
    sums.bits = 1;  // chunks whose updates are all 0 are too rare to spend a register on
    sweep<kBatch>(chunk.size, [&](auto slice) {
      PackedVector w[slice.batch], g[slice.batch], m[slice.batch], v[slice.batch];
      load<false>(w, types.weight(), chunk.weight, slice);
      load<true>(g, types.grad(), chunk.grad, slice);
      load<false>(m, types.state(), chunk.state[0], slice);
      load<false>(v, types.state(), chunk.state[1], slice);
#pragma unroll
      for (int n = 0; n < slice.batch; ++n) {
        float u[kVector];
        advance<CacheInShared>(c, types, chunk, slice, n, w[n], g[n], m[n], v[n],
                               [&](int k, float x, float y) {
                                 u[k] = y;
                                 if (k < slice.count(n)) sums.add(x, y);
                               });
        if (CacheInShared) cache[slice.shared_index(n)] = make_float4(u[0], u[1], u[2], u[3]);
      }
    });
  }

  template <class Types>
  static __device__ __forceinline__ void measure_again(const LambCoefficients& c,
                                                       const Types& types, const Chunk& chunk,
                                                       PartialSums<double, 2>& sums) {
    sweep<1>(chunk.size, [&](auto slice) {
      PackedVector w[1], m[1], v[1];
      load<false>(w, types.weight(), chunk.weight, slice);
      load<false>(m, types.state(), chunk.state[0], slice);
      load<false>(v, types.state(), chunk.state[1], slice);
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        const float x = value(types.weight(), w[0], k);
        const float u =
            lamb_direction(c, x, value(types.state(), m[0], k), value(types.state(), v[0], k));
        if (k < slice.count(0)) sums.add(x, u);
      }
    });
  }

  template <OperandSource source, bool StochasticRounding, class Types>
  static __device__ __forceinline__ void apply(const LambCoefficients& c, const Types& types,
                                               const Chunk& chunk, const float4* cache,
                                               std::uint64_t seed) {
    constexpr bool many = source == OperandSource::fused || source == OperandSource::evicted;
    sweep<many ? kBatch : kVectors>(chunk.size, [&](auto slice) {
      PackedVector w[slice.batch], g[slice.batch], m[slice.batch], v[slice.batch];
      load<source == OperandSource::global>(w, types.weight(), chunk.weight, slice);
      if (source == OperandSource::fused) load<true>(g, types.grad(), chunk.grad, slice);
      if (source != OperandSource::shared) {
        load<true>(m, types.state(), chunk.state[0], slice);
        load<true>(v, types.state(), chunk.state[1], slice);
      }
#pragma unroll
      for (int n = 0; n < slice.batch; ++n) {
        float weight[kVector];
        const auto update = [&](int k, float x, float u) { weight[k] = lamb_update(c, x, u); };
        if constexpr (source == OperandSource::fused) {
          advance<true>(c, types, chunk, slice, n, w[n], g[n], m[n], v[n], update);
        } else {
          const Vector u =
              source == OperandSource::shared ? Vector(cache[slice.shared_index(n)]) : Vector();
#pragma unroll
          for (int k = 0; k < kVector; ++k) {
            const float x = value(types.weight(), w[n], k);
            update(k, x,
                   source == OperandSource::shared
                       ? u.x[k]
                       : lamb_direction(c, x, value(types.state(), m[n], k),
                                        value(types.state(), v[n], k)));
          }
        }
        store_weight<StochasticRounding>(weight, types, chunk, slice, n, seed);
      }
    });
  }
};

template void measure(const LambRule&, const StepScalars&, const LaunchTarget&, Sums<2>*);
template void apply(const LambRule&, const StepScalars&, const LaunchTarget&, const Sums<2>*,
                    float*);
template void step(const LambRule&, const StepScalars&, const LaunchTarget&, float*);

}  // namespace fastlars::cuda
