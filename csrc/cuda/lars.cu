// LARS over one chunk.
#include "cuda/apply.cuh"
#include "cuda/measure.cuh"
#include "cuda/step.cuh"

namespace fastlars::cuda {

template <>
struct ChunkOps<LarsRule> {
  static constexpr int kMeasureBlocks = 4;
  static constexpr int kCached = 1;

  // CacheInShared: stores the gradients to `cache`, where apply reads them.
  template <bool CacheInShared, int Batch = kVectors, class Sum, class Types>
  static __device__ __forceinline__ void measure(const LarsCoefficients& c, const Types& types,
                                                 const Chunk& chunk, PartialSums<Sum, 2>& sums,
                                                 float4* cache) {
    sweep<Batch>(chunk.size, [&](auto slice) {
      PackedVector w[slice.batch], g[slice.batch];
      load<false>(w, types.weight(), chunk.weight, slice);
      load<CacheInShared>(g, types.grad(), chunk.grad, slice);
#pragma unroll
      for (int n = 0; n < slice.batch; ++n) {
        float d[kVector];
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          const float x = value(types.weight(), w[n], k);
          d[k] = value(types.grad(), g[n], k);
          const float y = lars_measured(c, x, d[k]);
          if (k < slice.count(n)) sums.add(x, y);
          sums.note(y);
        }
        if (CacheInShared) cache[slice.shared_index(n)] = make_float4(d[0], d[1], d[2], d[3]);
      }
    });
  }

  template <OperandSource source, bool StochasticRounding, class Types>
  static __device__ __forceinline__ void apply(const LarsCoefficients& c, const Types& types,
                                               const Chunk& chunk, const float4* cache,
                                               std::uint64_t seed) {
    // On the one-launch path, other blocks of the multiprocessor read at the same time: in a
    // simulator, one batch of a cached chunk is no faster than two, which take fewer registers.
    constexpr int batch = source == OperandSource::global ? kVectors : kVectors / 2;
    const bool has_buffer = chunk.state[0] != 0;
    sweep<batch>(chunk.size, [&](auto slice) {
      // Without an initial value, the compiler keeps the old one of b in registers through the
      // whole kernel.
      PackedVector w[slice.batch], g[slice.batch], b[slice.batch] = {};
      if (has_buffer) load<true>(b, types.state(), chunk.state[0], slice);
      load<source == OperandSource::global>(w, types.weight(), chunk.weight, slice);
      if (source != OperandSource::shared) load<true>(g, types.grad(), chunk.grad, slice);
#pragma unroll
      for (int n = 0; n < slice.batch; ++n) {
        Vector d = source == OperandSource::shared ? Vector(cache[slice.shared_index(n)])
                                                   : Vector(types.grad(), g[n]);
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
        if (has_buffer) store<true>(buffer, types.state(), chunk.state[0], slice, n);
        store_weight<StochasticRounding>(weight, types, chunk, slice, n, seed);
      }
    });
  }
};

template void measure(const LarsRule&, const StepScalars&, const LaunchTarget&, Sums<2>*);
template void apply(const LarsRule&, const StepScalars&, const LaunchTarget&, const Sums<2>*,
                    float*);
template void step(const LarsRule&, const StepScalars&, const LaunchTarget&, float*);

}  // namespace fastlars::cuda
