// What a rule adds to the CPU back end: its loops over one chunk of one tensor.
#pragma once

#include "core/chunks.h"
#include "core/tensors.h"
#include "rules/common.h"

namespace fastlars::cpu {

// Elements of a chunk. 64 KB of float32: three such arrays fit a core's second-level cache.
constexpr std::int64_t kChunk = 16384;

// Specialised in the file of each rule, with `measure` where the rule has sums and `apply` where it
// steps. `c` are the rule's coefficients:
//   Sums<Rule::sums> measure(const TensorList& list, const Chunk& chunk, const Coefficients& c)
//   void apply(const TensorList& list, const Chunk& chunk, const Coefficients& c, bool measured)
// `measured`: whether the rule adapts, and so has measured this chunk in this step.
template <class Rule>
struct ChunkOps;

template <class T>
T* at(const Addresses& base, const Chunk& chunk) {
  return reinterpret_cast<T*>(base[chunk.tensor]) + chunk.begin;
}

// Each of these calls f with pointers to the chunk's elements, of the type that the list has.

template <class F>
void with_weights_to_read(const TensorList& list, const Chunk& chunk, F&& f) {
  visit(list.weight_dtype, [&](auto w) { f(at<const decltype(w)>(list.weight, chunk)); });
}

template <class F>
void with_grads(const TensorList& list, const Chunk& chunk, F&& f) {
  visit(list.grad_dtype, [&](auto g) { f(at<const decltype(g)>(list.grad, chunk)); });
}

// The states by number: with_states<0, 1>. They are float32 or bfloat16.
template <int... which, class F>
void with_states(const TensorList& list, const Chunk& chunk, F&& f) {
  if (list.state_dtype == Dtype::bfloat16) return f(at<bfloat16>(list.state[which], chunk)...);
  f(at<float>(list.state[which], chunk)...);
}

}  // namespace fastlars::cpu
