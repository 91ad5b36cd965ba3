// TensorList: what one call measures, applies or steps. Plain addresses, sizes and types; whoever
// fills it has checked that all tensors of one index pair up element by element in memory.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dtype.h"

namespace fastlars {

// An address for each tensor; empty where there is none.
using Addresses = std::vector<std::uintptr_t>;

struct TensorList {
  std::vector<std::int64_t> numel;
  Addresses weight;              // float32 masters where the list has copies
  Addresses copy;                // low-precision weights, written along with their masters
  Addresses grad;                // empty where a rule's phase does not read gradients
  Addresses counter;             // one float each: the steps taken, or the last learning rate
  std::vector<Addresses> state;  // as many as the rule has in use
  Dtype weight_dtype = Dtype::float32;
  Dtype copy_dtype = Dtype::float32;
  Dtype grad_dtype = Dtype::float32;
  Dtype state_dtype = Dtype::float32;
  // Of this step:
  std::uint64_t seed = 0;  // of stochastic rounding
  bool stochastic_rounding = false;
  // By tensor, the sum of squares of the scaled gradient, for a rule that divides by its norm. Null
  // where the back end takes these sums itself, or the rule does not divide.
  const double* gradient_sums = nullptr;
  // By tensor, its number in the draw of random bits. Null: its index in the list.
  const std::int32_t* random_streams = nullptr;

  int count() const { return static_cast<int>(numel.size()); }
  bool has_state() const { return !state.empty(); }
  // 0 where the list has fewer states.
  std::uintptr_t state_of(std::size_t which, int tensor) const {
    return which < state.size() ? state[which][tensor] : 0;
  }
};

// For kernels that read their addresses from the device: a row per tensor of weight, gradient,
// copy, counter and `states` states, 0 where there is none. Returns whether that differs from what
// the table held.
inline bool write_table(const TensorList& list, int states, std::int64_t* place) {
  bool changed = false;
  const auto write = [&](std::uintptr_t address) {
    const auto value = static_cast<std::int64_t>(address);
    changed = changed || *place != value;
    *place++ = value;
  };
  for (int tensor = 0; tensor < list.count(); ++tensor) {
    for (const auto* column : {&list.weight, &list.grad, &list.copy, &list.counter}) {
      write(column->empty() ? 0 : (*column)[tensor]);
    }
    for (int which = 0; which < states; ++which) write(list.state_of(which, tensor));
  }
  return changed;
}

}  // namespace fastlars
