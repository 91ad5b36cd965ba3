// LANS over one chunk.
#include "cuda/apply.cuh"
#include "cuda/measure.cuh"
#include "cuda/step.cuh"

namespace fastlars::cuda {

template <>
struct ChunkOps<LansRule> {
  static constexpr int kMeasureBlocks = 3;
  static constexpr int kCached = 2;  // r and c

  // Four arrays of four vectors would not fit the registers. Four arrays of two vectors would not
  // fit where measure caches both directions, or reads types from its arguments.
  static constexpr int kBatch = kVectors / 2;
  template <bool CacheInShared, class Types>
  static constexpr int kMeasureBatch = CacheInShared || Types::has_copies ? 1 : kBatch;

  // The index of c in the cache, where r has `index`.
  static __device__ __forceinline__ int index_of_c(int index) {
    return index + kChunkElements / kVector;
  }

  // Calls f(k, w, directions) for the elements of one vector. With `Advances`, the moments advance
  // first, and are stored.
  template <bool Advances, bool Streaming, class Types, class Slice, class F>
  static __device__ __forceinline__ void for_directions(const LansCoefficients& c,
                                                        const Types& types, const Chunk& chunk,
                                                        Slice slice, int n, const PackedVector& w,
                                                        const PackedVector& g,
                                                        const PackedVector& m,
                                                        const PackedVector& v, F&& f) {
    float moment1[kVector], moment2[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const float x = value(types.weight(), w, k);
      const float y = lans_gradient(c, x, value(types.grad(), g, k));
      moment1[k] = value(types.state(), m, k);
      moment2[k] = value(types.state(), v, k);
      if constexpr (Advances) {
        lans_moments(c, y, moment1[k], moment2[k]);
        // From the moments as rounded for storage, because those are what apply reads.
        f(k, x,
          lans_directions(c, x, y, stored(types.state(), moment1[k]),
                          stored(types.state(), moment2[k])));
      } else {
        f(k, x, lans_directions(c, x, y, moment1[k], moment2[k]));
      }
    }
    if constexpr (Advances) {
      store<Streaming>(moment1, types.state(), chunk.state[0], slice, n);
      store<Streaming>(moment2, types.state(), chunk.state[1], slice, n);
    }
  }

  // CacheInShared: stores the directions to `cache`, where apply reads them.
  template <bool CacheInShared, class Sum, class Types>
  static __device__ __forceinline__ void measure(const LansCoefficients& c, const Types& types,
                                                 const Chunk& chunk, PartialSums<Sum, 3>& sums,
                                                 float4* cache) {
    sums.bits = 1;  // chunks whose updates are all 0 are too rare to spend a register on
    sweep<kMeasureBatch<CacheInShared, Types>>(chunk.size, [&](auto slice) {
      PackedVector w[slice.batch], g[slice.batch], m[slice.batch], v[slice.batch];
      load<false>(w, types.weight(), chunk.weight, slice);
      load<CacheInShared>(g, types.grad(), chunk.grad, slice);
      load<false>(m, types.state(), chunk.state[0], slice);
      load<false>(v, types.state(), chunk.state[1], slice);
#pragma unroll
      for (int n = 0; n < slice.batch; ++n) {
        float x[kVector], y[kVector];  // r and c
        for_directions<true, CacheInShared>(c, types, chunk, slice, n, w[n], g[n], m[n], v[n],
                                            [&](int k, float weight, const LansDirections& u) {
                                              x[k] = u.momentum;
                                              y[k] = u.gradient;
                                              if (k < slice.count(n))
                                                sums.add(weight, u.momentum, u.gradient);
                                            });
        if (CacheInShared) {
          const int index = slice.shared_index(n);
          cache[index] = make_float4(x[0], x[1], x[2], x[3]);
          cache[index_of_c(index)] = make_float4(y[0], y[1], y[2], y[3]);
        }
      }
    });
  }

  template <class Types>
  static __device__ __forceinline__ void measure_again(const LansCoefficients& c,
                                                       const Types& types, const Chunk& chunk,
                                                       PartialSums<double, 3>& sums) {
    sweep<1>(chunk.size, [&](auto slice) {
      PackedVector w[1], g[1], m[1], v[1];
      load<false>(w, types.weight(), chunk.weight, slice);
      load<false>(g, types.grad(), chunk.grad, slice);
      load<false>(m, types.state(), chunk.state[0], slice);
      load<false>(v, types.state(), chunk.state[1], slice);
      for_directions<false, false>(c, types, chunk, slice, 0, w[0], g[0], m[0], v[0],
                                   [&](int k, float x, const LansDirections& u) {
                                     if (k < slice.count(0)) sums.add(x, u.momentum, u.gradient);
                                   });
    });
  }

  template <OperandSource source, bool StochasticRounding, class Types>
  static __device__ __forceinline__ void apply(const LansCoefficients& c, const Types& types,
                                               const Chunk& chunk, const float4* cache,
                                               std::uint64_t seed) {
    constexpr bool cached = source == OperandSource::shared;
    sweep<cached ? kVectors : kBatch>(chunk.size, [&](auto slice) {
      PackedVector w[slice.batch], g[slice.batch], m[slice.batch], v[slice.batch];
      load<source == OperandSource::global>(w, types.weight(), chunk.weight, slice);
      if (!cached) {
        load<true>(g, types.grad(), chunk.grad, slice);
        load<true>(m, types.state(), chunk.state[0], slice);
        load<true>(v, types.state(), chunk.state[1], slice);
      }
#pragma unroll
      for (int n = 0; n < slice.batch; ++n) {
        float weight[kVector];
        if constexpr (cached) {
          const int index = slice.shared_index(n);
          const Vector momentum(cache[index]), gradient(cache[index_of_c(index)]);
#pragma unroll
          for (int k = 0; k < kVector; ++k) {
            weight[k] =
                lans_update(c, value(types.weight(), w[n], k), {momentum.x[k], gradient.x[k]});
          }
        } else {
          for_directions<source == OperandSource::fused, true>(
              c, types, chunk, slice, n, w[n], g[n], m[n], v[n],
              [&](int k, float x, const LansDirections& u) { weight[k] = lans_update(c, x, u); });
        }
        store_weight<StochasticRounding>(weight, types, chunk, slice, n, seed);
      }
    });
  }
};

template void measure(const LansRule&, const StepScalars&, const LaunchTarget&, Sums<3>*);
template void apply(const LansRule&, const StepScalars&, const LaunchTarget&, const Sums<3>*,
                    float*);
template void step(const LansRule&, const StepScalars&, const LaunchTarget&, float*);

}  // namespace fastlars::cuda
