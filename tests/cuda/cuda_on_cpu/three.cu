// A rule with three sums of squares and three states, which no rule of fastlars has, by both paths:
// nothing in csrc/cuda may be built for two. With states s_k, k from 1 to 3, and the step t:
//   u = t g,  q = sqrt(|w| |s_3|) / |u|,  s_k = s_k / 2 + k u,  w -= lr q (s_1 + s_2 + s_3)
#include <cstdio>
#include <cstdlib>

#include "rules/all.h"

namespace fastlars {

struct RuleOfThree {
  struct Coefficients {
    float scale, rate;
  };
  static constexpr int sums = 3, states = 3;
  static constexpr bool steps = true, counts_steps = true, measure_writes = false, adapt = true;
  static constexpr bool normalizes = false;
};
using RulesOfTest = RuleList<RuleOfThree>;

FASTLARS_HD double trust_ratio(const RuleOfThree&, const StepScalars&, const Sums<3>& sums) {
  return sums.of[2] > 0.0 ? std::sqrt(std::sqrt(sums.of[0] * sums.of[1]) / sums.of[2]) : 1.0;
}

FASTLARS_HD float ratio_coefficient(const RuleOfThree&, const StepScalars& scalars,
                                    const RuleOfThree::Coefficients&, double ratio) {
  return coefficient(scalars.lr * ratio);
}

FASTLARS_HD void set_ratio_coefficient(const RuleOfThree&, float value,
                                       RuleOfThree::Coefficients& c) {
  c.rate = value;
}

FASTLARS_HD RuleOfThree::Coefficients coefficients(const RuleOfThree&, const StepScalars& scalars,
                                                   float step) {
  return {step, static_cast<float>(scalars.lr)};
}

}  // namespace fastlars

#define Rules RulesOfTest  // tables with room for this rule
#include "cuda/apply.cuh"
#include "cuda/launch.cu"
#include "cuda/measure.cuh"
#include "cuda/step.cuh"

using namespace fastlars;

template <>
struct cuda::ChunkOps<RuleOfThree> {
  static constexpr int kMeasureBlocks = 3;
  static constexpr int kCached = 1;

  template <bool CacheInShared, int Batch = kVectors, class Sum, class Types>
  static void measure(const RuleOfThree::Coefficients& c, const Types& types, const Chunk& chunk,
                      PartialSums<Sum, 3>& sums, float4* cache) {
    sweep<1>(chunk.size, [&](auto slice) {
      PackedVector w[1], g[1], s[1];
      load<false>(w, types.weight(), chunk.weight, slice);
      load<false>(g, types.grad(), chunk.grad, slice);
      load<false>(s, types.state(), chunk.state[2], slice);
      float u[kVector];
      for (int k = 0; k < kVector; ++k) {
        u[k] = c.scale * value(types.grad(), g[0], k);
        if (k < slice.count(0)) {
          sums.add(value(types.weight(), w[0], k), value(types.state(), s[0], k), u[k]);
        }
        sums.note(u[k]);
      }
      if (CacheInShared) cache[slice.shared_index(0)] = make_float4(u[0], u[1], u[2], u[3]);
    });
  }

  template <OperandSource source, bool StochasticRounding, class Types>
  static void apply(const RuleOfThree::Coefficients& c, const Types& types, const Chunk& chunk,
                    const float4* cache, std::uint64_t seed) {
    sweep<1>(chunk.size, [&](auto slice) {
      PackedVector w[1], g[1], s[1];
      load<false>(w, types.weight(), chunk.weight, slice);
      load<true>(g, types.grad(), chunk.grad, slice);
      float weight[kVector], direction[kVector] = {}, state[kVector];
      for (int i = 0; i < 3; ++i) {
        load<true>(s, types.state(), chunk.state[i], slice);
        for (int k = 0; k < kVector; ++k) {
          const float u = source == OperandSource::shared
                              ? Vector(cache[slice.shared_index(0)]).x[k]
                              : c.scale * value(types.grad(), g[0], k);
          state[k] = 0.5f * value(types.state(), s[0], k) + (i + 1) * u;
          direction[k] += state[k];
          weight[k] = value(types.weight(), w[0], k) - c.rate * direction[k];
        }
        store<true>(state, types.state(), chunk.state[i], slice, 0);
      }
      store_weight<StochasticRounding>(weight, types, chunk, slice, 0, seed);
    });
  }
};

#include "problem.h"

// Both paths from the same start, and the sums of the first step.
int main() {
  Problem expected, tested;
  const RuleOfThree rule;
  const StepScalars scalars = {0.1, 1.0};
  std::vector<Sums<3>> sums(expected.table.tensors());
  for (int blocks = 1; blocks <= 12; ++blocks) {
    cuda::measure(rule, scalars, expected.on(1, 0), sums.data());
    for (std::size_t t = 0; blocks == 1 && t < sums.size(); ++t) {
      const std::vector<float>* squared[] = {&expected.of(0, t), &expected.of(4, t),
                                             &expected.of(1, t)};
      for (int i = 0; i < 3; ++i) {
        double sum = 0.0;
        for (double x : *squared[i]) sum += x * x;
        if (!(std::abs(sums[t].of[i] - sum) <= 1e-5 * sum)) return std::puts("wrong sums"), 1;
      }
    }
    cuda::apply(rule, scalars, expected.on(1, 0), sums.data(), expected.report.data());
    cuda::step(rule, scalars, tested.on(blocks, blocks % 4 + 1), tested.report.data());
    if (tested.arrays != expected.arrays || tested.report != expected.report ||
        tested.counters != expected.counters) {
      return std::printf("%d blocks: wrong\n", blocks), 1;
    }
  }
  return expected.counters[0] == 12.0f ? std::puts("right"), 0 : 1;
}
