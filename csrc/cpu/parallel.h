// measure, apply and step over a whole list: OpenMP loops over chunks. The threads are those of the
// process's one OpenMP pool, which torch.set_num_threads governs; a second pool would compete with
// torch's for the cores. Every chunk has a partial sum of its own, and partial sums are added in
// chunk order, so that the number of threads does not show in the result.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/api.h"
#include "cpu/chunk.h"
#include "cpu/gradient_norm.h"

namespace fastlars::cpu {

// Elements that a block has for each thread: a barrier is cheap compared with such a block, and a
// block fits the second- and third-level caches. Measured sizes from 64 K to 2.4 M elements made no
// difference on two threads.
constexpr std::int64_t kBlockPerThread = 131072;

// Waking threads costs microseconds, and milliseconds where their cores are busy.
constexpr std::int64_t kLeastForThreads = 2 * kChunk;

inline bool worth_threads(const TensorList& list) {
  return std::accumulate(list.numel.begin(), list.numel.end(), std::int64_t{0}) > kLeastForThreads;
}

inline int threads() {
#ifdef _OPENMP
  return std::max(1, omp_get_max_threads());
#else
  return 1;
#endif
}

template <int N>
Sums<N> total(const std::vector<Sums<N>>& partial, const Chunks& chunks, int tensor) {
  Sums<N> sums = {};
  for (int i = chunks.first[tensor]; i < chunks.first[tensor + 1]; ++i) {
    for (int n = 0; n < N; ++n) sums.of[n] += partial[i].of[n];
  }
  return sums;
}

// The counter of a tensor, as its coefficients take it: steps count from 1, and where `advances`
// this call takes the step.
template <class Rule>
float counter(const TensorList& list, int tensor, bool advances) {
  if (list.counter.empty()) return 0.0f;
  const float found = *reinterpret_cast<const float*>(list.counter[tensor]);
  return Rule::counts_steps && advances ? found + 1.0f : found;
}

template <class Rule>
void advance_counters(const Rule& rule, const StepScalars& scalars, TensorList& list) {
  for (auto address : list.counter) {
    auto& place = *reinterpret_cast<float*>(address);
    place = next_counter(rule, scalars, place);
  }
}

// Of every tensor, for a trust ratio of 1. Adjacent tensors usually share a counter, and beta^step
// is expensive: their coefficients are reused.
template <class Rule>
std::vector<typename Rule::Coefficients> all_coefficients(const Rule& rule,
                                                          const StepScalars& scalars,
                                                          const TensorList& list, bool advances) {
  std::vector<typename Rule::Coefficients> all;
  all.reserve(list.count());
  float previous = 0.0f;
  for (int tensor = 0; tensor < list.count(); ++tensor) {
    const float current = counter<Rule>(list, tensor, advances);
    all.push_back(tensor > 0 && current == previous ? all.back()
                                                    : coefficients(rule, scalars, current));
    previous = current;
  }
  return all;
}

// Puts the norms of the gradients into the coefficients of all tensors of which chunks from `begin`
// to `end` are. Takes those norms itself where the list has no sums of them; `partial` has room for
// all chunks. Called by all threads of a parallel region.
template <class Rule>
void normalize_gradients(const Rule& rule, const StepScalars& scalars, const TensorList& list,
                         const Chunks& chunks, int begin, int end, std::vector<Sums<1>>& partial,
                         std::vector<typename Rule::Coefficients>& all) {
  if constexpr (Rule::normalizes) {
    if (!rule.normalize_grad || begin == end) return;
    if (list.gradient_sums == nullptr) {
      const float scale = coefficients(GradientNorm(), scalars, 0.0f);
#pragma omp for schedule(static)
      for (int i = begin; i < end; ++i) {
        partial[i] = ChunkOps<GradientNorm>::measure(list, chunks.chunk[i], scale);
      }
    }
#pragma omp for schedule(static)
    for (int tensor = chunks.chunk[begin].tensor; tensor <= chunks.chunk[end - 1].tensor;
         ++tensor) {
      const double sum = list.gradient_sums == nullptr ? total(partial, chunks, tensor).of[0]
                                                       : list.gradient_sums[tensor];
      all[tensor].gradient_scale = normalizing_scale(rule, scalars, sum);
    }
  }
}

template <class Rule>
void measure(const Rule& rule, const StepScalars& scalars, TensorList& list,
             Sums<Rule::sums>* sums) {
  const Chunks chunks = cut(list.numel, kChunk);
  const int count = static_cast<int>(chunks.chunk.size());
  auto all = all_coefficients(rule, scalars, list, true);
  std::vector<Sums<1>> norms(Rule::normalizes ? count : 0);
  std::vector<Sums<Rule::sums>> partial(count);
#pragma omp parallel if (worth_threads(list))
  {
    normalize_gradients(rule, scalars, list, chunks, 0, count, norms, all);
#pragma omp for schedule(static)
    for (int i = 0; i < count; ++i) {
      const Chunk& chunk = chunks.chunk[i];
      partial[i] = ChunkOps<Rule>::measure(list, chunk, all[chunk.tensor]);
    }
  }
  for (int tensor = 0; tensor < list.count(); ++tensor) {
    sums[tensor] = total(partial, chunks, tensor);
  }
  if (Rule::measure_writes) advance_counters(rule, scalars, list);
}

template <class Rule>
void apply(const Rule& rule, const StepScalars& scalars, TensorList& list,
           const Sums<Rule::sums>* sums, float* report) {
  const Chunks chunks = cut(list.numel, kChunk);
  const int count = static_cast<int>(chunks.chunk.size());
  const bool measured = rule.adapt;
  const bool advances = !(measured && Rule::measure_writes);
  auto all = all_coefficients(rule, scalars, list, advances);
  std::vector<Sums<1>> norms(Rule::normalizes ? count : 0);
  for (int tensor = 0; tensor < list.count(); ++tensor) {
    const auto* found = measured ? sums + tensor : nullptr;
    const auto ratio = ratio_of(rule, scalars, found);
    apply_trust_ratio(rule, scalars, ratio, all[tensor]);
    write_report<Rule>(ratio, found, report, tensor);
  }
#pragma omp parallel if (worth_threads(list))
  {
    normalize_gradients(rule, scalars, list, chunks, 0, count, norms, all);
#pragma omp for schedule(static)
    for (int i = 0; i < count; ++i) {
      const Chunk& chunk = chunks.chunk[i];
      ChunkOps<Rule>::apply(list, chunk, all[chunk.tensor], measured);
    }
  }
  if (advances) advance_counters(rule, scalars, list);
}

template <class Rule>
void step(const Rule& rule, const StepScalars& scalars, TensorList& list, float* report) {
  if (!rule.adapt) return apply(rule, scalars, list, nullptr, report);
  if constexpr (Rule::sums > 0) {
    const Chunks chunks = cut(list.numel, kChunk);
    auto all = all_coefficients(rule, scalars, list, true);
    std::vector<Sums<1>> norms(Rule::normalizes ? chunks.chunk.size() : 0);
    std::vector<Sums<Rule::sums>> partial(chunks.chunk.size());
    const std::vector<int> ends = block_ends(chunks, list.numel, kBlockPerThread * threads());
#pragma omp parallel if (worth_threads(list))
    {
      int begin = 0;
      for (const int end : ends) {
        normalize_gradients(rule, scalars, list, chunks, begin, end, norms, all);
#pragma omp for schedule(static)
        for (int i = begin; i < end; ++i) {
          const Chunk& chunk = chunks.chunk[i];
          partial[i] = ChunkOps<Rule>::measure(list, chunk, all[chunk.tensor]);
        }
        // Every thread adds up the sums of the tensors that it applies: cheaper than a second
        // barrier.
        int tensor = -1;
        auto c = all.front();
#pragma omp for schedule(static) nowait
        for (int i = begin; i < end; ++i) {
          const Chunk& chunk = chunks.chunk[i];
          if (chunk.tensor != tensor) {
            tensor = chunk.tensor;
            c = all[tensor];
            apply_trust_ratio(rule, scalars,
                              trust_ratio(rule, scalars, total(partial, chunks, tensor)), c);
          }
          ChunkOps<Rule>::apply(list, chunk, c, true);
        }
        begin = end;
      }
    }
    for (int tensor = 0; tensor < list.count(); ++tensor) {
      const auto sums = total(partial, chunks, tensor);
      write_report<Rule>(trust_ratio(rule, scalars, sums), &sums, report, tensor);
    }
    advance_counters(rule, scalars, list);
  }
}

}  // namespace fastlars::cpu
