// The norm of gradients alone: it measures, and applies nothing.
#include "cuda/measure.cuh"

namespace fastlars::cuda {

template <>
struct ChunkOps<GradientNorm> {
  static constexpr int kMeasureBlocks = 4;

  template <bool, int Batch = kVectors, class Sum, class Types>
  static __device__ __forceinline__ void measure(float scale, const Types& types,
                                                 const Chunk& chunk, PartialSums<Sum, 1>& sums,
                                                 float4*) {
    sweep<Batch>(chunk.size, [&](auto slice) {
      PackedVector g[slice.batch];
      load<false>(g, types.grad(), chunk.grad, slice);
#pragma unroll
      for (int n = 0; n < slice.batch; ++n) {
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          const float y = scale * value(types.grad(), g[n], k);
          if (k < slice.count(n)) sums.add(y);
          sums.note(y);
        }
      }
    });
  }
};

template void measure(const GradientNorm&, const StepScalars&, const LaunchTarget&, Sums<1>*);

}  // namespace fastlars::cuda
