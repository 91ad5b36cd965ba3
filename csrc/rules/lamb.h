// LAMB. You, Li, Reddi, Hseu, Kumar, Bhojanapalli, Song, Demmel, Keutzer, Hsieh, "Large Batch
// Optimization for Deep Learning: Training BERT in 76 minutes", 2020:
//   m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
//   r = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps),  u = r + wd w
//   q = phi(|w|) / |u|,  w -= lr q u,  phi(z) = min(max(z, lower), upper)
#pragma once

#include "rules/common.h"

namespace fastlars {

// Where the weight decay enters:
//   update:     u = r + wd w, inside the ratio      the paper, apex, timm, optax
//   decoupled:  w = (1 - lr wd) w before all else   pytorch_optimizer
//   gradient:   g = g + wd w, before the moments    apex without adam_w_mode
enum class Decay : int { update, decoupled, gradient };

// Where the bias correction enters: the moments, nowhere, or the learning rate, which is then
// lr / (1 - beta1^t).
enum class Correction : int { moments, none, rate };

struct LambCoefficients {
  float gradient_scale, gradient_decay;
  float beta1, gradient_weight;
  float beta2, square_weight;
  float correction1, correction2;
  float eps, update_decay;
  float shrink;  // 1 - lr wd where the decay is decoupled, else 1
  double lr;
  float rate;  // lr q
};

struct LambRule {
  double beta1, beta2, eps, weight_decay, lower, upper, ratio_eps;
  Decay decay;
  Correction bias_correction;
  bool grad_averaging, trust_clip, adapt;

  using Coefficients = LambCoefficients;
  static constexpr const char* name = "LambRule";
  static constexpr int sums = 2;    // of w, and of the update u
  static constexpr int states = 2;  // m and v
  static constexpr bool steps = true, counts_steps = true, measure_writes = true;
  static constexpr bool normalizes = false;

  template <class Field>
  static void fields(Field&& field) {
    field("beta1", &LambRule::beta1);
    field("beta2", &LambRule::beta2);
    field("eps", &LambRule::eps);
    field("weight_decay", &LambRule::weight_decay);
    field("decay", &LambRule::decay);
    field("bias_correction", &LambRule::bias_correction);
    field("grad_averaging", &LambRule::grad_averaging);
    field("lower", &LambRule::lower);
    field("upper", &LambRule::upper);
    field("ratio_eps", &LambRule::ratio_eps);
    field("trust_clip", &LambRule::trust_clip);
    field("adapt", &LambRule::adapt);
  }
};

FASTLARS_HD double lamb_shrink(const LambRule& rule, const StepScalars& scalars) {
  return rule.decay == Decay::decoupled ? 1.0 - scalars.lr * rule.weight_decay : 1.0;
}

FASTLARS_HD double trust_ratio(const LambRule& rule, const StepScalars& scalars,
                               const Sums<2>& sums) {
  if (!rule.adapt) return 1.0;
  const double shrink = lamb_shrink(rule, scalars);
  const double weight = sums.of[0] * shrink * shrink;
  const double phi = bounded(std::sqrt(weight), rule.lower, rule.upper);
  const double q = guarded_ratio(weight, sums.of[1], phi, std::sqrt(sums.of[1]) + rule.ratio_eps);
  return (rule.trust_clip && q > 1.0) ? 1.0 : q;
}

// The one coefficient that contains q.
FASTLARS_HD float ratio_coefficient(const LambRule&, const StepScalars&, const LambCoefficients& c,
                                    double ratio) {
  return coefficient(c.lr * ratio);
}

FASTLARS_HD void set_ratio_coefficient(const LambRule&, float value, LambCoefficients& c) {
  c.rate = value;
}

// Coefficients for q = 1. `step` is t, counted from 1.
FASTLARS_HD LambCoefficients coefficients(const LambRule& rule, const StepScalars& scalars,
                                          float step) {
  const double correction1 = 1.0 - power(rule.beta1, step);
  const double correction2 = 1.0 - power(rule.beta2, step);
  const bool moments = rule.bias_correction == Correction::moments;
  const double decay = rule.weight_decay;
  LambCoefficients c;
  c.gradient_scale = static_cast<float>(scalars.gradient_scale);
  c.gradient_decay = static_cast<float>(rule.decay == Decay::gradient ? decay : 0.0);
  c.beta1 = static_cast<float>(rule.beta1);
  c.gradient_weight = static_cast<float>(rule.grad_averaging ? 1.0 - rule.beta1 : 1.0);
  c.beta2 = static_cast<float>(rule.beta2);
  c.square_weight = static_cast<float>(1.0 - rule.beta2);
  c.correction1 = static_cast<float>(moments ? 1.0 / correction1 : 1.0);
  c.correction2 = static_cast<float>(moments ? 1.0 / correction2 : 1.0);
  c.eps = static_cast<float>(rule.eps);
  c.update_decay = static_cast<float>(rule.decay == Decay::update ? decay : 0.0);
  c.shrink = static_cast<float>(lamb_shrink(rule, scalars));
  c.lr = rule.bias_correction == Correction::rate ? scalars.lr / correction1 : scalars.lr;
  apply_trust_ratio(rule, scalars, 1.0, c);
  return c;
}

FASTLARS_HD void lamb_moments(const LambCoefficients& c, float w, float g, float& m, float& v) {
  // Not + 0 w: an infinite weight would make NaN of moments that do not depend on it.
  const float scaled = c.gradient_scale * g;
  const float d = c.gradient_decay != 0.0f ? scaled + c.gradient_decay * w : scaled;
  m = c.beta1 * m + c.gradient_weight * d;
  v = c.beta2 * v + c.square_weight * (d * d);
}

// u, whose norm is the denominator of q.
FASTLARS_HD float lamb_direction(const LambCoefficients& c, float w, float m, float v) {
  const float r = (c.correction1 * m) / (std::sqrt(c.correction2 * v) + c.eps);
  return c.update_decay != 0.0f ? r + c.update_decay * w : r;
}

FASTLARS_HD float lamb_update(const LambCoefficients& c, float w, float u) {
  return c.shrink * w - c.rate * u;
}

}  // namespace fastlars
