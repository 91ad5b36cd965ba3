// TensorList: what one call measures, applies or steps. Plain addresses, sizes and types; whoever
// fills it has checked that all tensors of one index pair up element by element in memory.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dtype.h"

namespace fastlars {

struct TensorList {
  std::vector<std::int64_t> numel;
  std::vector<std::uintptr_t> weight;  // float32 masters where the list has copies
  std::vector<std::uintptr_t> copy;    // low-precision weights written beside masters; may be empty
  std::vector<std::uintptr_t> grad;    // empty where a rule's phase does not read gradients
  std::vector<std::uintptr_t> state[2];  // momentum buffer; or first and second moment
  std::vector<std::uintptr_t> counter;  // one float each: LAMB's step, LARS's last_lr; may be empty
  Dtype weight_dtype = Dtype::float32;
  Dtype copy_dtype = Dtype::float32;
  Dtype grad_dtype = Dtype::float32;
  Dtype state_dtype = Dtype::float32;
  std::uint64_t seed = 0;  // of stochastic rounding
  bool stochastic_rounding = false;

  int count() const { return static_cast<int>(numel.size()); }
};

// For kernels that read their addresses from the device: a row per tensor of weight, gradient, two
// states, copy and counter, 0 where there is none. Returns whether that differs from what the table
// held.
inline bool write_table(const TensorList& list, std::int64_t* place) {
  const std::vector<std::uintptr_t>* columns[] = {&list.weight,   &list.grad, &list.state[0],
                                                  &list.state[1], &list.copy, &list.counter};
  bool changed = false;
  for (int tensor = 0; tensor < list.count(); ++tensor) {
    for (const auto* column : columns) {
      const auto value = static_cast<std::int64_t>(column->empty() ? 0 : (*column)[tensor]);
      changed = changed || *place != value;
      *place++ = value;
    }
  }
  return changed;
}

}  // namespace fastlars
