// Scalars of a step as a kernel gets them: by value, or as device addresses. With addresses, a
// learning rate in a tensor, a GradScaler and a global norm need no extra kernel that combines
// them, and the host waits for none of them.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <utility>

#include "rules/common.h"

namespace fastlars::cuda {

// A scalar or its address. Its kind is stored elsewhere, because kernel parameters are scarce.
union ScalarSource {
  double value;
  const float* float32;
  const double* float64;
};
enum class SourceKind : std::uint8_t { value, float32, float64 };

FASTLARS_HD double read(const ScalarSource& source, SourceKind kind) {
  if (kind == SourceKind::float32) return *source.float32;
  return kind == SourceKind::float64 ? *source.float64 : source.value;
}

// Address of a float, or of a double where `second` says so; 0 for none.
using ScalarAddress = std::pair<std::uintptr_t, bool>;
// Of the learning rate, a GradScaler's scale, its found_inf, and the square of the global norm.
using ScalarAddresses = std::array<ScalarAddress, 4>;

struct DeviceScalars {
  ScalarSource lr = {}, scale = {}, skip = {};  // the step writes nothing where skip is not 0
  const double* square_norm = nullptr;          // of all gradients; null without clipping
  double limit = 0.0;                           // of the norm
  SourceKind lr_kind = SourceKind::value, scale_kind = SourceKind::value,
             skip_kind = SourceKind::value;
  std::int8_t divided = 0;  // 1 or -1 is divided by a GradScaler's scale; 0: `scale` is a factor

  // From three doubles on the device: learning rate, gradient scale, skip. All by value for null.
  DeviceScalars(const double* three = nullptr) {
    if (three == nullptr) return;
    lr.float64 = three;
    scale.float64 = three + 1;
    skip.float64 = three + 2;
    lr_kind = scale_kind = skip_kind = SourceKind::float64;
  }

  DeviceScalars(const ScalarAddresses& addresses, double norm_limit, double sign)
      : square_norm(reinterpret_cast<const double*>(addresses[3].first)), limit(norm_limit) {
    const auto set = [](const ScalarAddress& address, ScalarSource& source, SourceKind& kind) {
      if (address.first == 0) return;
      source.float64 = reinterpret_cast<const double*>(address.first);
      kind = address.second ? SourceKind::float64 : SourceKind::float32;
    };
    set(addresses[0], lr, lr_kind);
    set(addresses[1], scale, scale_kind);
    set(addresses[2], skip, skip_kind);
    if (scale_kind != SourceKind::value) divided = sign < 0.0 ? -1 : 1;
  }

  // These scalars, with the host's values where there is no address.
  DeviceScalars with(const StepScalars& host) const {
    DeviceScalars all = *this;
    if (lr_kind == SourceKind::value) all.lr.value = host.lr;
    if (scale_kind == SourceKind::value) all.scale.value = host.gradient_scale;
    return all;
  }

  // False where the step is skipped: then nothing is written.
  FASTLARS_HD bool step_taken() const { return read(skip, skip_kind) == 0.0; }

  FASTLARS_HD StepScalars step_scalars() const {
    double factor = read(scale, scale_kind);
    if (divided != 0) factor = divided / factor;
    if (square_norm != nullptr) {
      const double norm = std::sqrt(*square_norm);
      // The same order of operations as in torch, which computes this factor for Triton's kernels.
      if (norm > limit) factor *= 1.0 / norm * limit;
    }
    return {read(lr, lr_kind), factor};
  }
};

}  // namespace fastlars::cuda
