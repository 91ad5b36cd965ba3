// LAMB. You, Li, Reddi, Hseu, Kumar, Bhojanapalli, Song, Demmel, Keutzer, Hsieh, "Large Batch
// Optimization for Deep Learning: Training BERT in 76 minutes", 2020:
//   m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
//   r = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps),  u = r + wd w
//   q = phi(|w|) / |u|,  w -= lr q u,  phi(z) = min(max(z, lower), upper)
// Its appendix has two Nesterov forms, which look one step ahead. N-LAMB, and NN-LAMB:
//   r = m^ / (sqrt(v^) + eps),  m^ = beta1 m / (1 - beta1^(t+1)) + (1 - beta1) g / (1 - beta1^t)
//   v^ = beta2 v / (1 - beta2^t)
//   v^ = beta2 v / (1 - beta2^(t+1)) + (1 - beta2) g^2 / (1 - beta2^t)
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

// Which moments look ahead: none, the first (N-LAMB), or both (NN-LAMB).
enum class Nesterov : int { none, first, both };

struct LambCoefficients {
  float gradient_scale, gradient_decay;
  float beta1, gradient_weight;
  float beta2, square_weight;
  float correction1, correction2;  // of m and v in the direction
  float ahead1, ahead2;            // of the gradient and its square there, where they look ahead
  float eps, update_decay;
  float shrink;  // 1 - lr wd where the decay is decoupled, else 1
  double lr;
  float rate;  // lr q
  bool nesterov;
};

struct LambRule {
  double beta1, beta2, eps, weight_decay, lower, upper, ratio_eps, ratio_floor, ratio_ceiling;
  Decay decay;
  Correction bias_correction;
  Nesterov nesterov;
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
    field("nesterov", &LambRule::nesterov);
    field("lower", &LambRule::lower);
    field("upper", &LambRule::upper);
    field("ratio_eps", &LambRule::ratio_eps);
    field("ratio_floor", &LambRule::ratio_floor);
    field("ratio_ceiling", &LambRule::ratio_ceiling);
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
  const double q = guarded_ratio(weight, sums.of[1], phi, std::sqrt(sums.of[1]) + rule.ratio_eps,
                                 rule.ratio_floor, rule.ratio_ceiling);
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

// The direction's factors of a moment, and of the gradient (or its square) that enters the moment
// with `weight`. `power` is beta^t, or 0 without bias correction.
struct LambFactors {
  float of_moment, of_gradient;
};
FASTLARS_HD LambFactors lamb_factors(double beta, double power, double weight, bool looks_ahead) {
  if (!looks_ahead) return {static_cast<float>(1.0 / (1.0 - power)), 0.0f};
  return {static_cast<float>(beta / (1.0 - beta * power)),
          static_cast<float>(weight / (1.0 - power))};
}

// Coefficients for q = 1. `step` is t, counted from 1.
FASTLARS_HD LambCoefficients coefficients(const LambRule& rule, const StepScalars& scalars,
                                          float step) {
  const bool moments = rule.bias_correction == Correction::moments;
  const double decay = rule.weight_decay;
  LambCoefficients c;
  c.gradient_scale = static_cast<float>(scalars.gradient_scale);
  c.gradient_decay = static_cast<float>(rule.decay == Decay::gradient ? decay : 0.0);
  const double power2 = moments ? power(rule.beta2, step) : 0.0;
  const LambFactors second =
      lamb_factors(rule.beta2, power2, 1.0 - rule.beta2, rule.nesterov == Nesterov::both);
  c.beta2 = static_cast<float>(rule.beta2);
  c.square_weight = static_cast<float>(1.0 - rule.beta2);
  c.correction2 = rule.nesterov == Nesterov::first ? static_cast<float>(rule.beta2 / (1.0 - power2))
                                                   : second.of_moment;
  c.ahead2 = second.of_gradient;
  const double power1 = power(rule.beta1, step);
  const double gradient_weight = rule.grad_averaging ? 1.0 - rule.beta1 : 1.0;
  const LambFactors first = lamb_factors(rule.beta1, moments ? power1 : 0.0, gradient_weight,
                                         rule.nesterov != Nesterov::none);
  c.beta1 = static_cast<float>(rule.beta1);
  c.gradient_weight = static_cast<float>(gradient_weight);
  c.correction1 = first.of_moment;
  c.ahead1 = first.of_gradient;
  c.eps = static_cast<float>(rule.eps);
  c.update_decay = static_cast<float>(rule.decay == Decay::update ? decay : 0.0);
  c.shrink = static_cast<float>(lamb_shrink(rule, scalars));
  c.nesterov = rule.nesterov != Nesterov::none;
  c.lr = rule.bias_correction == Correction::rate ? scalars.lr / (1.0 - power1) : scalars.lr;
  apply_trust_ratio(rule, scalars, 1.0, c);
  return c;
}

// The gradient that enters the moments.
FASTLARS_HD float lamb_gradient(const LambCoefficients& c, float w, float g) {
  // Not + 0 w: an infinite weight would make NaN of moments that do not depend on it.
  const float scaled = c.gradient_scale * g;
  return c.gradient_decay != 0.0f ? scaled + c.gradient_decay * w : scaled;
}

FASTLARS_HD void lamb_moments(const LambCoefficients& c, float w, float g, float& m, float& v) {
  const float d = lamb_gradient(c, w, g);
  m = c.beta1 * m + c.gradient_weight * d;
  v = c.beta2 * v + c.square_weight * (d * d);
}

// u, whose norm is the denominator of q. `nesterov` is c.nesterov, known where it is compiled:
// otherwise g is not used, and LAMB's apply need not read it.
template <bool nesterov>
FASTLARS_HD float lamb_direction(const LambCoefficients& c, float w, float g, float m, float v) {
  float first = c.correction1 * m, second = c.correction2 * v;
  if (nesterov) {
    const float d = lamb_gradient(c, w, g);
    first = first + c.ahead1 * d;
    // Not + 0 d^2, which is NaN where d^2 is infinite.
    second = c.ahead2 != 0.0f ? second + c.ahead2 * (d * d) : second;
  }
  const float r = first / (std::sqrt(second) + c.eps);
  return c.update_decay != 0.0f ? r + c.update_decay * w : r;
}

FASTLARS_HD float lamb_update(const LambCoefficients& c, float w, float u) {
  return c.shrink * w - c.rate * u;
}

}  // namespace fastlars
