// measure, apply and step over a whole list: OpenMP loops over chunks. The threads are those of the
// process's one OpenMP pool, which torch.set_num_threads governs; a pool of our own would fight
// torch's for the cores. Partial sums lie in a slot per chunk and are added in chunk order, so that
// the number of threads does not show in the result.
#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/chunk.h"

namespace fastlars::cpu {
namespace {

// Large enough that a barrier is cheap beside a block, small enough for the second- and third-level
// caches: measured sizes from 64 K to 2.4 M elements made no difference on two threads.
constexpr std::int64_t kBlockPerThread = 131072;

// Waking threads costs microseconds, and milliseconds where their cores are busy.
constexpr std::int64_t kLeastForThreads = 2 * kChunk;

bool worth_threads(const TensorList& list) {
  return std::accumulate(list.numel.begin(), list.numel.end(), std::int64_t{0}) > kLeastForThreads;
}

int threads() {
#ifdef _OPENMP
  return std::max(1, omp_get_max_threads());
#else
  return 1;
#endif
}

Sums total(const std::vector<Sums>& partial, const Chunks& chunks, int tensor) {
  Sums sums = {0.0, 0.0};
  for (int i = chunks.first[tensor]; i < chunks.first[tensor + 1]; ++i) {
    sums.weight += partial[i].weight;
    sums.update += partial[i].update;
  }
  return sums;
}

float coefficients(const GradientNorm&, const Scalars& now, float) {
  return static_cast<float>(now.gradient_scale);
}

// The counter of a tensor. Steps count from 1, and `advances` where this call takes the step.
template <class Rule>
float counter(const TensorList& list, int tensor, bool advances) {
  if (list.counter.empty()) return 0.0f;
  const float found = *reinterpret_cast<const float*>(list.counter[tensor]);
  return Rule::counts_steps && advances ? found + 1.0f : found;
}

template <class Rule>
void advance_counters(const Rule& rule, const Scalars& now, TensorList& list) {
  for (auto address : list.counter) {
    auto& place = *reinterpret_cast<float*>(address);
    place = advanced(rule, now, place);
  }
}

// Per tensor, for a trust ratio of 1. Neighbours mostly share a counter, and LAMB's powers are
// dear.
template <class Rule>
auto all_coefficients(const Rule& rule, const Scalars& now, const TensorList& list, bool advances) {
  std::vector<decltype(coefficients(rule, now, 0.0f))> all;
  all.reserve(list.count());
  float previous = 0.0f;
  for (int tensor = 0; tensor < list.count(); ++tensor) {
    const float current = counter<Rule>(list, tensor, advances);
    all.push_back(tensor > 0 && current == previous ? all.back()
                                                    : coefficients(rule, now, current));
    previous = current;
  }
  return all;
}

template <class Rule>
void measure_list(const Rule& rule, const Scalars& now, TensorList& list, Sums* sums) {
  const Chunks chunks = cut(list.numel);
  const auto all = all_coefficients(rule, now, list, true);
  std::vector<Sums> partial(chunks.chunk.size());
#pragma omp parallel for schedule(static) if (worth_threads(list))
  for (std::int64_t i = 0; i < static_cast<std::int64_t>(partial.size()); ++i) {
    const Chunk& chunk = chunks.chunk[i];
    partial[i] = measure_chunk(list, chunk, all[chunk.tensor]);
  }
  for (int tensor = 0; tensor < list.count(); ++tensor) {
    sums[tensor] = total(partial, chunks, tensor);
  }
  if (Rule::counts_steps) advance_counters(rule, now, list);
}

template <class Rule>
void apply_list(const Rule& rule, const Scalars& now, TensorList& list, const Sums* sums,
                float* ratios) {
  const Chunks chunks = cut(list.numel);
  const bool measured = rule.adapt;
  auto all = all_coefficients(rule, now, list, !measured);
  for (int tensor = 0; tensor < list.count(); ++tensor) {
    const double trust = measured ? trust_ratio(rule, now, sums[tensor]) : 1.0;
    set_trust(rule, now, trust, all[tensor]);
    ratios[tensor] = static_cast<float>(trust);
  }
#pragma omp parallel for schedule(static) if (worth_threads(list))
  for (std::int64_t i = 0; i < static_cast<std::int64_t>(chunks.chunk.size()); ++i) {
    const Chunk& chunk = chunks.chunk[i];
    apply_chunk(list, chunk, all[chunk.tensor], measured);
  }
  // What counts steps has counted this one where it was measured.
  if (!measured || !Rule::counts_steps) advance_counters(rule, now, list);
}

template <class Rule>
void step_list(const Rule& rule, const Scalars& now, TensorList& list, float* ratios) {
  if (!rule.adapt) return apply_list(rule, now, list, nullptr, ratios);
  const Chunks chunks = cut(list.numel);
  const auto all = all_coefficients(rule, now, list, true);
  std::vector<Sums> partial(chunks.chunk.size());
  const std::vector<int> ends = block_ends(chunks, list.numel, kBlockPerThread * threads());
#pragma omp parallel if (worth_threads(list))
  {
    int begin = 0;
    for (const int end : ends) {
#pragma omp for schedule(static)
      for (int i = begin; i < end; ++i) {
        const Chunk& chunk = chunks.chunk[i];
        partial[i] = measure_chunk(list, chunk, all[chunk.tensor]);
      }
      // Every thread adds up the tensors that it applies: cheaper than a second barrier.
      int tensor = -1;
      auto c = all.front();
#pragma omp for schedule(static) nowait
      for (int i = begin; i < end; ++i) {
        const Chunk& chunk = chunks.chunk[i];
        if (chunk.tensor != tensor) {
          tensor = chunk.tensor;
          c = all[tensor];
          set_trust(rule, now, trust_ratio(rule, now, total(partial, chunks, tensor)), c);
        }
        apply_chunk(list, chunk, c, true);
      }
      begin = end;
    }
  }
  for (int tensor = 0; tensor < list.count(); ++tensor) {
    ratios[tensor] = static_cast<float>(trust_ratio(rule, now, total(partial, chunks, tensor)));
  }
  advance_counters(rule, now, list);
}

}  // namespace

void measure(const GradientNorm& rule, const Scalars& now, TensorList& list, Sums* sums) {
  measure_list(rule, now, list, sums);
}
void measure(const LarsRule& rule, const Scalars& now, TensorList& list, Sums* sums) {
  measure_list(rule, now, list, sums);
}
void measure(const LambRule& rule, const Scalars& now, TensorList& list, Sums* sums) {
  measure_list(rule, now, list, sums);
}
void apply(const LarsRule& rule, const Scalars& now, TensorList& list, const Sums* sums,
           float* ratios) {
  apply_list(rule, now, list, sums, ratios);
}
void apply(const LambRule& rule, const Scalars& now, TensorList& list, const Sums* sums,
           float* ratios) {
  apply_list(rule, now, list, sums, ratios);
}
void apply(const RmspropWarmupRule& rule, const Scalars& now, TensorList& list, const Sums* sums,
           float* ratios) {
  apply_list(rule, now, list, sums, ratios);
}
void step(const LarsRule& rule, const Scalars& now, TensorList& list, float* ratios) {
  step_list(rule, now, list, ratios);
}
void step(const LambRule& rule, const Scalars& now, TensorList& list, float* ratios) {
  step_list(rule, now, list, ratios);
}
void step(const RmspropWarmupRule& rule, const Scalars& now, TensorList& list, float* ratios) {
  apply_list(rule, now, list, nullptr, ratios);
}

}  // namespace fastlars::cpu
