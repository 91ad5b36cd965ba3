// The numbers of a step as a launch is told them: by value, or where on the device they lie. So a
// learning rate in a tensor, a GradScaler and a global norm need no kernel that would bring their
// numbers together, and the host waits for none of them.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <utility>

#include "core/rules.h"

namespace fastlars::cuda {

// A number itself, or the address of one. Which of them is kept apart from it, because a launch has
// little room for parameters.
union Number {
  double value;
  const float* float32;
  const double* float64;
};
enum class Kind : std::uint8_t { value, float32, float64 };

FASTLARS_HD double read(const Number& number, Kind kind) {
  if (kind == Kind::float32) return *number.float32;
  return kind == Kind::float64 ? *number.float64 : number.value;
}

// Of the learning rate, a GradScaler's scale and its verdict, and the square of the global norm:
// the address of a float, or of a double where `second` says so; 0 for none.
using Address = std::pair<std::uintptr_t, bool>;
using Addresses = std::array<Address, 4>;

struct Numbers {
  Number lr = {}, scale = {}, skip = {};  // nothing is written where skip is not 0
  const double* square_norm = nullptr;    // of all gradients; null for no clip
  double limit = 0.0;                     // of the norm
  Kind lr_kind = Kind::value, scale_kind = Kind::value, skip_kind = Kind::value;
  std::int8_t divided = 0;  // by scale, where it is a GradScaler's: 1 or -1; else 0

  // From three doubles on the device: learning rate, gradient scale, skip. All by value for null.
  Numbers(const double* three = nullptr) {
    if (three == nullptr) return;
    lr.float64 = three;
    scale.float64 = three + 1;
    skip.float64 = three + 2;
    lr_kind = scale_kind = skip_kind = Kind::float64;
  }

  Numbers(const Addresses& addresses, double limit, double sign)
      : square_norm(reinterpret_cast<const double*>(addresses[3].first)), limit(limit) {
    const auto take = [](const Address& address, Number& number, Kind& kind) {
      if (address.first == 0) return;
      number.float64 = reinterpret_cast<const double*>(address.first);
      kind = address.second ? Kind::float64 : Kind::float32;
    };
    take(addresses[0], lr, lr_kind);
    take(addresses[1], scale, scale_kind);
    take(addresses[2], skip, skip_kind);
    if (scale_kind != Kind::value) divided = sign < 0.0 ? -1 : 1;
  }

  // These numbers, with those of the host in the addresses that are left.
  Numbers with(const Scalars& host) const {
    Numbers all = *this;
    if (lr_kind == Kind::value) all.lr.value = host.lr;
    if (scale_kind == Kind::value) all.scale.value = host.gradient_scale;
    return all;
  }

  FASTLARS_HD bool skips() const { return read(skip, skip_kind) != 0.0; }

  FASTLARS_HD Scalars today() const {
    double factor = read(scale, scale_kind);
    if (divided != 0) factor = divided / factor;
    if (square_norm != nullptr) {
      const double norm = std::sqrt(*square_norm);
      // The order of operations of torch, which makes a factor of them for Triton's kernels.
      if (norm > limit) factor *= 1.0 / norm * limit;
    }
    return {read(lr, lr_kind), factor};
  }
};

}  // namespace fastlars::cuda
