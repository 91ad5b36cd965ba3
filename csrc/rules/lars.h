// LARS: layer-wise adaptive rate scaling. You, Gitman, Ginsburg, "Large Batch Training of
// Convolutional Networks", 2017:  q = eta |w| / (|g| + wd |w| + eps)
#pragma once

#include "rules/common.h"

namespace fastlars {

// The denominator of q:
//   separate:  |g| + wd |w| + eps    eq. 6 of the paper
//   combined:  |g + wd w| + eps
enum class Ratio : int { separate, combined };

// What the momentum buffer b holds, with d = g + wd w:
//   step:      b = mu b + lr q d,  w -= b           Algorithm 1 of the paper
//   scaled:    b = mu b + q d,     w -= lr b        ports over torch.optim.SGD
//   gradient:  b = mu b + d,       w -= lr q b
enum class Buffer : int { step, scaled, gradient };

struct LarsCoefficients {
  float gradient_scale, weight_decay;
  float decay;                // of b: mu, corrected for a changed lr
  float one_minus_dampening;  // 1 - tau; 1 in the first step
  float inner;                // factor of d before it enters b
  float outer;                // factor of b before it is subtracted from w
  float momentum;
  bool nesterov, combined;
};

struct LarsRule {
  double momentum, dampening, weight_decay, trust_coefficient, eps;
  Ratio ratio;
  Buffer buffer;
  bool nesterov, momentum_correction, trust_clip, adapt;

  using Coefficients = LarsCoefficients;
  static constexpr const char* name = "LarsRule";
  static constexpr int sums = 2;    // of w, and of g or g + wd w
  static constexpr int states = 1;  // b; none without momentum
  static constexpr bool steps = true, counts_steps = false, measure_writes = false;
  static constexpr bool normalizes = false;

  template <class Field>
  static void fields(Field&& field) {
    field("momentum", &LarsRule::momentum);
    field("dampening", &LarsRule::dampening);
    field("weight_decay", &LarsRule::weight_decay);
    field("nesterov", &LarsRule::nesterov);
    field("trust_coefficient", &LarsRule::trust_coefficient);
    field("eps", &LarsRule::eps);
    field("ratio", &LarsRule::ratio);
    field("buffer", &LarsRule::buffer);
    field("momentum_correction", &LarsRule::momentum_correction);
    field("trust_clip", &LarsRule::trust_clip);
    field("adapt", &LarsRule::adapt);
  }
};

// The state `last_lr` of a tensor that was never stepped.
constexpr float kNeverStepped = -1.0f;

FASTLARS_HD double trust_ratio(const LarsRule& rule, const StepScalars& scalars,
                               const Sums<2>& sums) {
  if (!rule.adapt) return 1.0;
  const double weight_norm = std::sqrt(sums.of[0]);
  const double decay_norm = rule.ratio == Ratio::combined ? 0.0 : rule.weight_decay * weight_norm;
  const double q = guarded_ratio(sums.of[0], sums.of[1], rule.trust_coefficient * weight_norm,
                                 std::sqrt(sums.of[1]) + decay_norm + rule.eps);
  if (!rule.trust_clip) return q;
  // LARC: the layer's rate lr q never exceeds lr.
  const double clipped = scalars.lr > 0.0 ? q / scalars.lr : 1.0;
  return clipped > 1.0 ? 1.0 : clipped;
}

// The one coefficient that contains q.
FASTLARS_HD float ratio_coefficient(const LarsRule& rule, const StepScalars& scalars,
                                    const LarsCoefficients&, double ratio) {
  return coefficient((rule.buffer == Buffer::scaled ? 1.0 : scalars.lr) * ratio);
}

FASTLARS_HD void set_ratio_coefficient(const LarsRule& rule, float value, LarsCoefficients& c) {
  (rule.buffer == Buffer::gradient ? c.outer : c.inner) = value;
}

// Coefficients for q = 1.
FASTLARS_HD LarsCoefficients coefficients(const LarsRule& rule, const StepScalars& scalars,
                                          float last_lr) {
  // Goyal et al., remark 2: a buffer that holds lr times a gradient is rescaled when lr changes.
  const bool stepped_before = last_lr != kNeverStepped;
  const bool corrects = rule.momentum_correction && stepped_before && last_lr != 0.0f;
  const float correction = corrects ? static_cast<float>(scalars.lr) / last_lr : 1.0f;
  LarsCoefficients c;
  c.gradient_scale = static_cast<float>(scalars.gradient_scale);
  c.weight_decay = static_cast<float>(rule.weight_decay);
  c.momentum = static_cast<float>(rule.momentum);
  c.decay = static_cast<float>(rule.momentum) * correction;
  c.one_minus_dampening = stepped_before ? static_cast<float>(1.0 - rule.dampening) : 1.0f;
  c.nesterov = rule.nesterov;
  c.combined = rule.ratio == Ratio::combined;
  c.inner = 1.0f;
  c.outer = rule.buffer == Buffer::scaled ? coefficient(scalars.lr) : 1.0f;
  apply_trust_ratio(rule, scalars, 1.0, c);
  return c;
}

// The second norm is that of this value: g, or g + wd w.
FASTLARS_HD float lars_measured(const LarsCoefficients& c, float w, float g) {
  const float scaled = c.gradient_scale * g;
  return c.combined ? scaled + c.weight_decay * w : scaled;
}

// Returns the new weight, advances the buffer.
FASTLARS_HD float lars_update(const LarsCoefficients& c, float w, float g, float& buffer) {
  const float d = c.gradient_scale * g + c.weight_decay * w;
  const float scaled = c.inner * d;
  buffer = c.decay * buffer + c.one_minus_dampening * scaled;
  const float direction = c.nesterov ? scaled + c.momentum * buffer : buffer;
  return w - c.outer * direction;
}

// Without momentum there is no buffer to read or write.
FASTLARS_HD float lars_update(const LarsCoefficients& c, float w, float g) {
  const float d = c.gradient_scale * g + c.weight_decay * w;
  return w - c.outer * (c.inner * d);
}

}  // namespace fastlars
