// LAMB over one chunk.
#include "cuda/apply.cuh"
#include "cuda/measure.cuh"
#include "cuda/step.cuh"

namespace fastlars::cuda {

// Each has kernels of its own. As a branch in one kernel, Nesterov's form, which needs the gradient
// where LAMB needs only the moments, makes the compiler spill registers.
struct PlainLamb : LambRule {};
struct NesterovLamb : LambRule {};

// The coefficients of the rule. With `nesterov` fixed, the compiler drops those of Nesterov's form.
__device__ __forceinline__ LambCoefficients coefficients(const PlainLamb& rule,
                                                         const StepScalars& scalars, float step) {
  LambRule plain = rule;
  plain.nesterov = Nesterov::none;
  return fastlars::coefficients(plain, scalars, step);
}

template <bool nesterov>
struct LambOps {
  static constexpr int kMeasureBlocks = nesterov ? 2 : 3;  // three would spill Nesterov's
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
      const float x = value(types.weight(), w, k), d = value(types.grad(), g, k);
      moment1[k] = value(types.state(), m, k);
      moment2[k] = value(types.state(), v, k);
      lamb_moments(c, x, d, moment1[k], moment2[k]);
      // From the moments as rounded for storage, because those are what apply reads.
      f(k, x,
        lamb_direction<nesterov>(c, x, d, stored(types.state(), moment1[k]),
                                 stored(types.state(), moment2[k])));
    }
    store<Streaming>(moment1, types.state(), chunk.state[0], slice, n);
    store<Streaming>(moment2, types.state(), chunk.state[1], slice, n);
  }

  // The direction of element k of a vector whose moments have advanced.
  template <class Types>
  static __device__ __forceinline__ float direction(const LambCoefficients& c, const Types& types,
                                                    float w, const PackedVector& g,
                                                    const PackedVector& m, const PackedVector& v,
                                                    int k) {
    return lamb_direction<nesterov>(c, w, nesterov ? value(types.grad(), g, k) : 0.0f,
                                    value(types.state(), m, k), value(types.state(), v, k));
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
      load<!nesterov || CacheInShared>(g, types.grad(), chunk.grad, slice);
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
      PackedVector w[1], g[1] = {}, m[1], v[1];
      load<false>(w, types.weight(), chunk.weight, slice);
      if (nesterov) load<false>(g, types.grad(), chunk.grad, slice);
      load<false>(m, types.state(), chunk.state[0], slice);
      load<false>(v, types.state(), chunk.state[1], slice);
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        const float x = value(types.weight(), w[0], k);
        const float u = direction(c, types, x, g[0], m[0], v[0], k);
        if (k < slice.count(0)) sums.add(x, u);
      }
    });
  }

  template <OperandSource source, bool StochasticRounding, class Types>
  static __device__ __forceinline__ void apply(const LambCoefficients& c, const Types& types,
                                               const Chunk& chunk, const float4* cache,
                                               std::uint64_t seed) {
    constexpr bool cached = source == OperandSource::shared, fused = source == OperandSource::fused;
    constexpr bool needs_gradient = fused || (nesterov && !cached);
    constexpr bool many = needs_gradient || source == OperandSource::evicted;
    sweep<many ? kBatch : kVectors>(chunk.size, [&](auto slice) {
      PackedVector w[slice.batch], g[slice.batch], m[slice.batch], v[slice.batch];
      load<source == OperandSource::global>(w, types.weight(), chunk.weight, slice);
      if (needs_gradient) load<true>(g, types.grad(), chunk.grad, slice);
      if (!cached) {
        load<true>(m, types.state(), chunk.state[0], slice);
        load<true>(v, types.state(), chunk.state[1], slice);
      }
#pragma unroll
      for (int n = 0; n < slice.batch; ++n) {
        float weight[kVector];
        const auto update = [&](int k, float x, float u) { weight[k] = lamb_update(c, x, u); };
        if constexpr (fused) {
          advance<true>(c, types, chunk, slice, n, w[n], g[n], m[n], v[n], update);
        } else {
          const Vector u = cached ? Vector(cache[slice.shared_index(n)]) : Vector();
#pragma unroll
          for (int k = 0; k < kVector; ++k) {
            const float x = value(types.weight(), w[n], k);
            update(k, x, cached ? u.x[k] : direction(c, types, x, g[n], m[n], v[n], k));
          }
        }
        store_weight<StochasticRounding>(weight, types, chunk, slice, n, seed);
      }
    });
  }
};

template <>
struct ChunkOps<PlainLamb> : LambOps<false> {};
template <>
struct ChunkOps<NesterovLamb> : LambOps<true> {};

// Three blocks would spill.
template <>
constexpr int kernels::kStepBlocks<Float32Only<NesterovLamb>> = 2;

// Calls f with the rule as the type that has the kernels for it.
template <class F>
void with_kernels(const LambRule& rule, F&& f) {
  rule.nesterov == Nesterov::none ? f(PlainLamb{rule}) : f(NesterovLamb{rule});
}

template <>
void measure(const LambRule& rule, const StepScalars& scalars, const LaunchTarget& target,
             Sums<2>* sums) {
  with_kernels(rule, [&](const auto& its) { measure(its, scalars, target, sums); });
}

template <>
void apply(const LambRule& rule, const StepScalars& scalars, const LaunchTarget& target,
           const Sums<2>* sums, float* report) {
  with_kernels(rule, [&](const auto& its) { apply(its, scalars, target, sums, report); });
}

template <>
void step(const LambRule& rule, const StepScalars& scalars, const LaunchTarget& target,
          float* report) {
  with_kernels(rule, [&](const auto& its) { step(its, scalars, target, report); });
}

}  // namespace fastlars::cuda
