// LAMB over one chunk.
#pragma once

#include "cuda/lars.cuh"

namespace fastlars::cuda {

template <>
struct Body<LambRule> {
  using Coefficients = LambCoefficients;

  // Four arrays of four vectors would not fit the registers.
  static constexpr int kBatch = kVectors / 2;

  static __device__ bool out_of_range(const Pair<float>& sum) {
    return leaves_float_range(sum.weight) || update_out_of_range(sum);
  }

  // The direction is taken from the moments as they are stored, because that is what apply reads.
  template <class Types>
  static __device__ __forceinline__ float direction(const Coefficients& c, const Types& types,
                                                    float w, float m, float v) {
    return lamb_direction(c, w, stored(types.state(), m), stored(types.state(), v));
  }

  // Advances the moments of one vector, and calls f(k, w, u) for its elements.
  template <bool Last, class Types, class Place, class F>
  static __device__ __forceinline__ void advance(const Coefficients& c, const Types& types,
                                                 const Chunk& chunk, Place place, int n,
                                                 const Raw& w, const Raw& g, const Raw& m,
                                                 const Raw& v, F&& f) {
    float moment1[kVector], moment2[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const float x = value(types.weight(), w, k);
      moment1[k] = value(types.state(), m, k);
      moment2[k] = value(types.state(), v, k);
      lamb_moments(c, x, value(types.grad(), g, k), moment1[k], moment2[k]);
      f(k, x, direction(c, types, x, moment1[k], moment2[k]));
    }
    store<Last>(moment1, types.state(), chunk.state[0], place, n);
    store<Last>(moment2, types.state(), chunk.state[1], place, n);
  }

  // Holds: the directions are put into `held`, from where apply takes them.
  template <bool Holds, class Sum, class Types>
  static __device__ __forceinline__ void measure(const Coefficients& c, const Types& types,
                                                 const Chunk& chunk, Pair<Sum>& sums,
                                                 float4* held) {
    sums.bits = 1;  // updates that are 0 throughout are too rare for a register
    sweep<kBatch>(chunk.size, [&](auto place) {
      Raw w[place.batch], g[place.batch], m[place.batch], v[place.batch];
      load<false>(w, types.weight(), chunk.weight, place);
      load<true>(g, types.grad(), chunk.grad, place);
      load<false>(m, types.state(), chunk.state[0], place);
      load<false>(v, types.state(), chunk.state[1], place);
#pragma unroll
      for (int n = 0; n < place.batch; ++n) {
        float u[kVector];
        advance<Holds>(c, types, chunk, place, n, w[n], g[n], m[n], v[n],
                       [&](int k, float x, float y) {
                         u[k] = y;
                         if (k < place.count(n)) sums.add(x, y);
                       });
        if (Holds) held[place.slot(n)] = make_float4(u[0], u[1], u[2], u[3]);
      }
    });
  }

  // From moments that have advanced already.
  template <class Types>
  static __device__ __forceinline__ void measure_again(const Coefficients& c, const Types& types,
                                                       const Chunk& chunk, Pair<double>& sums) {
    sweep<1>(chunk.size, [&](auto place) {
      Raw w[1], m[1], v[1];
      load<false>(w, types.weight(), chunk.weight, place);
      load<false>(m, types.state(), chunk.state[0], place);
      load<false>(v, types.state(), chunk.state[1], place);
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        const float x = value(types.weight(), w[0], k);
        const float u =
            lamb_direction(c, x, value(types.state(), m[0], k), value(types.state(), v[0], k));
        if (k < place.count(0)) sums.add(x, u);
      }
    });
  }

  template <From from, bool Rounds, class Types>
  static __device__ __forceinline__ void apply(const Coefficients& c, const Types& types,
                                               const Chunk& chunk, const float4* held,
                                               std::uint64_t seed) {
    constexpr bool many = from == From::unmeasured || from == From::forgotten;
    sweep<many ? kBatch : kVectors>(chunk.size, [&](auto place) {
      Raw w[place.batch], g[place.batch], m[place.batch], v[place.batch];
      load<from == From::memory>(w, types.weight(), chunk.weight, place);
      if (from == From::unmeasured) load<true>(g, types.grad(), chunk.grad, place);
      if (from != From::held) {
        load<true>(m, types.state(), chunk.state[0], place);
        load<true>(v, types.state(), chunk.state[1], place);
      }
#pragma unroll
      for (int n = 0; n < place.batch; ++n) {
        float weight[kVector];
        const auto update = [&](int k, float x, float u) { weight[k] = lamb_update(c, x, u); };
        if constexpr (from == From::unmeasured) {
          advance<true>(c, types, chunk, place, n, w[n], g[n], m[n], v[n], update);
        } else {
          const Vector u = from == From::held ? Vector(held[place.slot(n)]) : Vector();
#pragma unroll
          for (int k = 0; k < kVector; ++k) {
            const float x = value(types.weight(), w[n], k);
            update(k, x,
                   from == From::held ? u.x[k]
                                      : lamb_direction(c, x, value(types.state(), m[n], k),
                                                       value(types.state(), v[n], k)));
          }
        }
        store_weight<Rounds>(weight, types, chunk, place, n, seed);
      }
    });
  }
};

}  // namespace fastlars::cuda
