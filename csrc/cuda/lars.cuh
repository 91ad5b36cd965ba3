// LARS over one chunk, and the norm of gradients alone.
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/storage.cuh"

namespace fastlars::cuda {

// Where apply finds what measure saw or made of a chunk: in memory; held back in shared memory; in
// memory again, because others were held since; nowhere, because the rule does not adapt and the
// chunk was not measured.
enum class From { memory, held, forgotten, unmeasured };

// A rule's loops over one chunk.
template <class Rule>
struct Body;

template <>
struct Body<GradientNorm> {
  using Coefficients = float;  // the gradient scale

  static __device__ bool out_of_range(const Pair<float>& sum) { return update_out_of_range(sum); }

  template <bool, int Batch = kVectors, class Sum, class Types>
  static __device__ __forceinline__ void measure(const Coefficients& scale, const Types& types,
                                                 const Chunk& chunk, Pair<Sum>& sums, float4*) {
    sweep<Batch>(chunk.size, [&](auto place) {
      Raw g[place.batch];
      load<false>(g, types.grad(), chunk.grad, place);
#pragma unroll
      for (int n = 0; n < place.batch; ++n) {
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          const float y = scale * value(types.grad(), g[n], k);
          if (k < place.count(n)) sums.add(0.0f, y);
          sums.note(y);
        }
      }
    });
  }

  template <class Types>
  static __device__ __forceinline__ void measure_again(const Coefficients& scale,
                                                       const Types& types, const Chunk& chunk,
                                                       Pair<double>& sums) {
    measure<false, 1>(scale, types, chunk, sums, nullptr);
  }
};

template <>
struct Body<LarsRule> {
  using Coefficients = LarsCoefficients;

  static __device__ bool out_of_range(const Pair<float>& sum) {
    return leaves_float_range(sum.weight) || update_out_of_range(sum);
  }

  // Holds: the gradients are put into `held`, from where apply takes them.
  template <bool Holds, int Batch = kVectors, class Sum, class Types>
  static __device__ __forceinline__ void measure(const Coefficients& c, const Types& types,
                                                 const Chunk& chunk, Pair<Sum>& sums,
                                                 float4* held) {
    sweep<Batch>(chunk.size, [&](auto place) {
      Raw w[place.batch], g[place.batch];
      load<false>(w, types.weight(), chunk.weight, place);
      load<Holds>(g, types.grad(), chunk.grad, place);
#pragma unroll
      for (int n = 0; n < place.batch; ++n) {
        float d[kVector];
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          const float x = value(types.weight(), w[n], k);
          d[k] = value(types.grad(), g[n], k);
          const float y = lars_measured(c, x, d[k]);
          if (k < place.count(n)) sums.add(x, y);
          sums.note(y);
        }
        if (Holds) held[place.slot(n)] = make_float4(d[0], d[1], d[2], d[3]);
      }
    });
  }

  template <class Types>
  static __device__ __forceinline__ void measure_again(const Coefficients& c, const Types& types,
                                                       const Chunk& chunk, Pair<double>& sums) {
    measure<false, 1>(c, types, chunk, sums, nullptr);
  }

  template <From from, bool Rounds, class Types>
  static __device__ __forceinline__ void apply(const Coefficients& c, const Types& types,
                                               const Chunk& chunk, const float4* held,
                                               std::uint64_t seed) {
    // In one launch, other blocks of the multiprocessor read meanwhile: in a simulator, one batch
    // of what is held is no faster than two, which take fewer registers.
    constexpr int batch = from == From::memory ? kVectors : kVectors / 2;
    const bool has_buffer = chunk.state[0] != 0;
    sweep<batch>(chunk.size, [&](auto place) {
      // Without a value, the compiler keeps registers for the one before, through all of the
      // kernel.
      Raw w[place.batch], g[place.batch], b[place.batch] = {};
      if (has_buffer) load<true>(b, types.state(), chunk.state[0], place);
      load<from == From::memory>(w, types.weight(), chunk.weight, place);
      if (from != From::held) load<true>(g, types.grad(), chunk.grad, place);
#pragma unroll
      for (int n = 0; n < place.batch; ++n) {
        Vector d = from == From::held ? Vector(held[place.slot(n)]) : Vector(types.grad(), g[n]);
        float weight[kVector], buffer[kVector];
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          const float x = value(types.weight(), w[n], k);
          if (has_buffer) {
            buffer[k] = value(types.state(), b[n], k);
            weight[k] = lars_update(c, x, d.x[k], buffer[k]);
          } else {
            weight[k] = lars_update(c, x, d.x[k]);
          }
        }
        if (has_buffer) store<true>(buffer, types.state(), chunk.state[0], place, n);
        store_weight<Rounds>(weight, types, chunk, place, n, seed);
      }
    });
  }
};

}  // namespace fastlars::cuda
