// LANS. Zheng, Lin, Zha, Li, "Accelerated Large Batch Optimization of BERT Pretraining in 54
// minutes", 2020:
//   g = g / (|g| + norm_eps)
//   m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
//   d = sqrt(v / (1 - beta2^t)) + eps
//   r = (m / (1 - beta1^t)) / d + wd w,  c = g / d + wd w
//   w -= lr (beta1 q_r r + (1 - beta1) q_c c),  q_r = phi(|w|) / |r|,  q_c = phi(|w|) / |c|
#pragma once

#include "rules/common.h"

namespace fastlars {

// Where the weight decay enters:
//   update:    r and c, as above
//   gradient:  g = g + wd w, before the moments
enum class LansDecay : int { update, gradient };

struct LansCoefficients {
  float gradient_scale;  // which divides by |g|, too
  float gradient_decay;
  float beta1, gradient_weight;
  float beta2, square_weight;
  float correction1, correction2;
  float eps, update_decay;
  float momentum_rate, gradient_rate;  // lr beta1 q_r, and lr (1 - beta1) q_c
};

// The trust ratios q_r and q_c.
struct LansRatios {
  double momentum = 1.0, gradient = 1.0;
};

// The coefficients that contain them.
struct LansRates {
  float momentum, gradient;
};

struct LansRule {
  double beta1, beta2, eps, weight_decay, norm_eps, lower, upper;
  LansDecay decay;
  bool normalize_grad, bias_correction, grad_averaging, adapt;

  using Coefficients = LansCoefficients;
  static constexpr const char* name = "LansRule";
  static constexpr int sums = 3;    // of w, r and c
  static constexpr int states = 2;  // m and v
  static constexpr bool steps = true, counts_steps = true, measure_writes = true;
  static constexpr bool normalizes = true;

  template <class Field>
  static void fields(Field&& field) {
    field("beta1", &LansRule::beta1);
    field("beta2", &LansRule::beta2);
    field("eps", &LansRule::eps);
    field("weight_decay", &LansRule::weight_decay);
    field("normalize_grad", &LansRule::normalize_grad);
    field("norm_eps", &LansRule::norm_eps);
    field("decay", &LansRule::decay);
    field("bias_correction", &LansRule::bias_correction);
    field("grad_averaging", &LansRule::grad_averaging);
    field("lower", &LansRule::lower);
    field("upper", &LansRule::upper);
    field("adapt", &LansRule::adapt);
  }
};

// The gradient scale of a tensor, given the sum of squares of its scaled gradient. A gradient of
// zeros stays as it is.
FASTLARS_HD float normalizing_scale(const LansRule& rule, const StepScalars& scalars, double sum) {
  const double scale = scalars.gradient_scale;
  if (sum == 0.0) return static_cast<float>(scale);
  const float factor = coefficient(std::fabs(scale) / (std::sqrt(sum) + rule.norm_eps));
  return scale < 0.0 ? -factor : factor;
}

FASTLARS_HD LansRatios trust_ratio(const LansRule& rule, const StepScalars&, const Sums<3>& sums) {
  const double phi = bounded(std::sqrt(sums.of[0]), rule.lower, rule.upper);
  return {guarded_ratio(sums.of[0], sums.of[1], phi, std::sqrt(sums.of[1])),
          guarded_ratio(sums.of[0], sums.of[2], phi, std::sqrt(sums.of[2]))};
}

// The one of a tensor's ratios that a step returns.
FASTLARS_HD double reported(const LansRatios& ratios) { return ratios.momentum; }

FASTLARS_HD double lans_gradient_weight(const LansRule& rule) {
  return rule.grad_averaging ? 1.0 - rule.beta1 : 1.0;
}

FASTLARS_HD LansRates ratio_coefficient(const LansRule& rule, const StepScalars& scalars,
                                        const LansCoefficients&, const LansRatios& ratios) {
  return {coefficient(scalars.lr * rule.beta1 * ratios.momentum),
          coefficient(scalars.lr * lans_gradient_weight(rule) * ratios.gradient)};
}

FASTLARS_HD void set_ratio_coefficient(const LansRule&, const LansRates& rates,
                                       LansCoefficients& c) {
  c.momentum_rate = rates.momentum;
  c.gradient_rate = rates.gradient;
}

// Coefficients for ratios of 1, and for a gradient that is not normalized. `step` is t, counted
// from 1.
FASTLARS_HD LansCoefficients coefficients(const LansRule& rule, const StepScalars& scalars,
                                          float step) {
  const bool corrects = rule.bias_correction;
  const double decay = rule.weight_decay;
  LansCoefficients c;
  c.gradient_scale = static_cast<float>(scalars.gradient_scale);
  c.gradient_decay = static_cast<float>(rule.decay == LansDecay::gradient ? decay : 0.0);
  c.beta1 = static_cast<float>(rule.beta1);
  c.gradient_weight = static_cast<float>(lans_gradient_weight(rule));
  c.beta2 = static_cast<float>(rule.beta2);
  c.square_weight = static_cast<float>(1.0 - rule.beta2);
  c.correction1 = static_cast<float>(corrects ? 1.0 / (1.0 - power(rule.beta1, step)) : 1.0);
  c.correction2 = static_cast<float>(corrects ? 1.0 / (1.0 - power(rule.beta2, step)) : 1.0);
  c.eps = static_cast<float>(rule.eps);
  c.update_decay = static_cast<float>(rule.decay == LansDecay::update ? decay : 0.0);
  apply_trust_ratio(rule, scalars, LansRatios(), c);
  return c;
}

// The gradient as the moments take it.
FASTLARS_HD float lans_gradient(const LansCoefficients& c, float w, float g) {
  // Not + 0 w: an infinite weight would make NaN of moments that do not depend on it.
  const float scaled = c.gradient_scale * g;
  return c.gradient_decay != 0.0f ? scaled + c.gradient_decay * w : scaled;
}

FASTLARS_HD void lans_moments(const LansCoefficients& c, float g, float& m, float& v) {
  m = c.beta1 * m + c.gradient_weight * g;
  v = c.beta2 * v + c.square_weight * (g * g);
}

// r and c, whose norms are the denominators of q_r and q_c.
struct LansDirections {
  float momentum, gradient;
};

FASTLARS_HD LansDirections lans_directions(const LansCoefficients& c, float w, float g, float m,
                                           float v) {
  const float d = std::sqrt(c.correction2 * v) + c.eps;
  const float momentum = (c.correction1 * m) / d;
  const float gradient = g / d;
  if (c.update_decay == 0.0f) return {momentum, gradient};
  const float decay = c.update_decay * w;
  return {momentum + decay, gradient + decay};
}

FASTLARS_HD float lans_update(const LansCoefficients& c, float w, const LansDirections& u) {
  return w - (c.momentum_rate * u.momentum + c.gradient_rate * u.gradient);
}

}  // namespace fastlars
