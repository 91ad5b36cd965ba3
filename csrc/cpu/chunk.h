// What a rule adds to the CPU back end: its loops over one chunk of one tensor.
#pragma once

#include "core/chunks.h"
#include "core/tensors.h"
#include "rules/common.h"

namespace fastlars::cpu {

// Elements of a chunk. 64 KB of float32: three such arrays fit a core's second-level cache.
constexpr std::int64_t kChunk = 16384;

// Specialised in the file of each rule, with two static functions. `c` are the rule's coefficients:
//   Sums<Rule::sums> measure(const TensorList& list, const Chunk& chunk, const Coefficients& c)
//   void apply(const TensorList& list, const Chunk& chunk, const Coefficients& c, bool measured)
// `measured`: whether the rule adapts, and so has measured this chunk in this step.
template <class Rule>
struct ChunkOps;

template <class T>
T* at(const Addresses& base, const Chunk& chunk) {
  return reinterpret_cast<T*>(base[chunk.tensor]) + chunk.begin;
}

// Calls f with a value of the C++ type of the states, which are float32 or bfloat16.
template <class F>
void with_state_type(const TensorList& list, F&& f) {
  if (list.state_dtype == Dtype::bfloat16) return f(bfloat16{});
  f(float{});
}

}  // namespace fastlars::cpu
