// LARS, LAMB and RMSprop warm-up: the update arithmetic, once, for host and device. A back end
// derives a tensor's coefficients, then calls these functions element by element; it adds loops and
// nothing else.
#pragma once

#include <cfloat>
#include <cmath>

#include "core/dtype.h"
#include "core/trust.h"

namespace fastlars {

// What changes from step to step.
struct Scalars {
  double lr;
  double gradient_scale;  // unscaling, global clip and the sign of `maximize`, in one factor
};

// What a tensor's counter is once a step was taken.
template <class Rule>
FASTLARS_HD float advanced(const Rule&, const Scalars& now, float counter) {
  return Rule::counts_steps ? counter + 1.0f : static_cast<float>(now.lr);
}

// What the momentum buffer b holds (d is the decayed gradient, q the trust ratio):
//   step:      b = mu b + lr q d,  w -= b           Algorithm 1 of the paper
//   scaled:    b = mu b + q d,     w -= lr b        ports over torch.optim.SGD
//   gradient:  b = mu b + d,       w -= lr q b
enum class Buffer : int { step = 0, scaled = 1, gradient = 2 };

struct LarsRule {
  static constexpr bool counts_steps = false;  // its counter is the last learning rate
  double momentum, dampening, weight_decay, trust_coefficient, eps;
  Buffer buffer;
  bool combined, nesterov, momentum_correction, trust_clip, adapt;
};

struct LarsCoefficients {
  float gradient_scale, weight_decay;
  float decay;     // of the buffer: momentum, corrected for a changed learning rate
  float undamped;  // 1 - dampening
  float inner;     // what d is multiplied with before it enters the buffer
  float outer;     // what the buffer is multiplied with before it leaves the weight
  float momentum;
  bool nesterov, combined;
};

// The state `last_lr` of a tensor that was never stepped.
constexpr float kNeverStepped = -1.0f;

FASTLARS_HD double trust_ratio(const LarsRule& rule, const Scalars& now, const Sums& sums) {
  if (!rule.adapt) return 1.0;
  const double q =
      lars_ratio(sums, rule.trust_coefficient, rule.weight_decay, rule.eps, rule.combined);
  if (!rule.trust_clip) return q;
  // LARC: the local rate lr q never exceeds lr.
  const double clipped = now.lr > 0.0 ? q / now.lr : 1.0;
  return clipped > 1.0 ? 1.0 : clipped;
}

// A ratio that a float just holds does not when the learning rate is in it.
FASTLARS_HD float coefficient(double value) {
  return (value > FLT_MAX && std::isfinite(value)) ? FLT_MAX : static_cast<float>(value);
}

// The one coefficient that the trust ratio is in.
FASTLARS_HD float trusted(const LarsRule& rule, const Scalars& now, const LarsCoefficients&,
                          double trust) {
  return coefficient((rule.buffer == Buffer::scaled ? 1.0 : now.lr) * trust);
}

FASTLARS_HD void set_trusted(const LarsRule& rule, float value, LarsCoefficients& c) {
  (rule.buffer == Buffer::gradient ? c.outer : c.inner) = value;
}

// Coefficients for a trust ratio of 1.
FASTLARS_HD LarsCoefficients coefficients(const LarsRule& rule, const Scalars& now, float last_lr) {
  // Goyal et al., remark 2: a buffer that holds lr times a gradient is rescaled when lr changes.
  const bool stepped_before = last_lr != kNeverStepped;
  const bool corrects = rule.momentum_correction && stepped_before && last_lr != 0.0f;
  const float correction = corrects ? static_cast<float>(now.lr) / last_lr : 1.0f;
  LarsCoefficients c;
  c.gradient_scale = static_cast<float>(now.gradient_scale);
  c.weight_decay = static_cast<float>(rule.weight_decay);
  c.momentum = static_cast<float>(rule.momentum);
  c.decay = static_cast<float>(rule.momentum) * correction;
  c.undamped = stepped_before ? static_cast<float>(1.0 - rule.dampening) : 1.0f;
  c.nesterov = rule.nesterov;
  c.combined = rule.combined;
  c.inner = 1.0f;
  c.outer = rule.buffer == Buffer::scaled ? coefficient(now.lr) : 1.0f;
  set_trusted(rule, trusted(rule, now, c, 1.0), c);
  return c;
}

// What |.| is taken of beside the weight: g, or g + wd w.
FASTLARS_HD float lars_measured(const LarsCoefficients& c, float w, float g) {
  const float scaled = c.gradient_scale * g;
  return c.combined ? scaled + c.weight_decay * w : scaled;
}

// Returns the new weight, advances the buffer.
FASTLARS_HD float lars_update(const LarsCoefficients& c, float w, float g, float& buffer) {
  const float d = c.gradient_scale * g + c.weight_decay * w;
  const float scaled = c.inner * d;
  buffer = c.decay * buffer + c.undamped * scaled;
  const float direction = c.nesterov ? scaled + c.momentum * buffer : buffer;
  return w - c.outer * direction;
}

// Without momentum there is no buffer to read or write.
FASTLARS_HD float lars_update(const LarsCoefficients& c, float w, float g) {
  const float d = c.gradient_scale * g + c.weight_decay * w;
  return w - c.outer * (c.inner * d);
}

// Where LAMB's weight decay enters:
//   update:     u = r + wd w, inside the ratio      the paper, apex, timm, optax
//   decoupled:  w = (1 - lr wd) w before all else   pytorch_optimizer
//   gradient:   g = g + wd w, before the moments    apex without adam_w_mode
enum class Decay : int { update = 0, decoupled = 1, gradient = 2 };

// Where its bias correction enters: the moments, nowhere, or the learning rate (lr / (1 -
// beta1^t)).
enum class Correction : int { moments = 0, none = 1, rate = 2 };

struct LambRule {
  static constexpr bool counts_steps = true;
  double beta1, beta2, eps, weight_decay, lower, upper, ratio_eps;
  Decay decay;
  Correction correction;
  bool gradient_averaging, trust_clip, adapt;
};

struct LambCoefficients {
  float gradient_scale, gradient_decay;
  float beta1, gradient_weight;
  float beta2, square_weight;
  float correction1, correction2;
  float eps, update_decay;
  float shrink;  // 1 - lr wd when the decay is decoupled, else 1
  double lr;
  float rate;  // lr q
};

FASTLARS_HD double lamb_shrink(const LambRule& rule, const Scalars& now) {
  return rule.decay == Decay::decoupled ? 1.0 - now.lr * rule.weight_decay : 1.0;
}

FASTLARS_HD double trust_ratio(const LambRule& rule, const Scalars& now, const Sums& sums) {
  if (!rule.adapt) return 1.0;
  const double shrink = lamb_shrink(rule, now);
  const Sums shrunk = {sums.weight * shrink * shrink, sums.update};
  const double q = lamb_ratio(shrunk, rule.lower, rule.upper, rule.ratio_eps);
  return (rule.trust_clip && q > 1.0) ? 1.0 : q;
}

FASTLARS_HD float trusted(const LambRule&, const Scalars&, const LambCoefficients& c,
                          double trust) {
  return coefficient(c.lr * trust);
}

FASTLARS_HD void set_trusted(const LambRule&, float value, LambCoefficients& c) { c.rate = value; }

// base to the whole part of exponent, by squaring: the same bits on every device, which a library's
// pow does not promise.
FASTLARS_HD double power(double base, double exponent) {
  double result = 1.0;
  for (auto left = static_cast<std::uint32_t>(exponent); left > 0; left /= 2) {
    if (left % 2 == 1) result *= base;
    base *= base;
  }
  return result;
}

// Coefficients for a trust ratio of 1. `step` counts from 1.
FASTLARS_HD LambCoefficients coefficients(const LambRule& rule, const Scalars& now, float step) {
  const double correction1 = 1.0 - power(rule.beta1, step);
  const double correction2 = 1.0 - power(rule.beta2, step);
  const bool moments = rule.correction == Correction::moments;
  const double decay = rule.weight_decay;
  LambCoefficients c;
  c.gradient_scale = static_cast<float>(now.gradient_scale);
  c.gradient_decay = static_cast<float>(rule.decay == Decay::gradient ? decay : 0.0);
  c.beta1 = static_cast<float>(rule.beta1);
  c.gradient_weight = static_cast<float>(rule.gradient_averaging ? 1.0 - rule.beta1 : 1.0);
  c.beta2 = static_cast<float>(rule.beta2);
  c.square_weight = static_cast<float>(1.0 - rule.beta2);
  c.correction1 = static_cast<float>(moments ? 1.0 / correction1 : 1.0);
  c.correction2 = static_cast<float>(moments ? 1.0 / correction2 : 1.0);
  c.eps = static_cast<float>(rule.eps);
  c.update_decay = static_cast<float>(rule.decay == Decay::update ? decay : 0.0);
  c.shrink = static_cast<float>(lamb_shrink(rule, now));
  c.lr = rule.correction == Correction::rate ? now.lr / correction1 : now.lr;
  set_trusted(rule, trusted(rule, now, c, 1.0), c);
  return c;
}

template <class Rule, class Coefficients>
FASTLARS_HD void set_trust(const Rule& rule, const Scalars& now, double trust, Coefficients& c) {
  set_trusted(rule, trusted(rule, now, c, trust), c);
}

FASTLARS_HD void lamb_moments(const LambCoefficients& c, float w, float g, float& m, float& v) {
  // Not + 0 w: an infinite weight would make NaN of moments that it has no part in.
  const float scaled = c.gradient_scale * g;
  const float d = c.gradient_decay != 0.0f ? scaled + c.gradient_decay * w : scaled;
  m = c.beta1 * m + c.gradient_weight * d;
  v = c.beta2 * v + c.square_weight * (d * d);
}

// u, whose norm the ratio divides by.
FASTLARS_HD float lamb_direction(const LambCoefficients& c, float w, float m, float v) {
  const float r = (c.correction1 * m) / (std::sqrt(c.correction2 * v) + c.eps);
  return c.update_decay != 0.0f ? r + c.update_decay * w : r;
}

FASTLARS_HD float lamb_update(const LambCoefficients& c, float w, float u) {
  return c.shrink * w - c.rate * u;
}

// RMSprop warm-up (Akiba, Suzuki, Fukuda 2017), with d the decayed gradient:
//   m = mu2 m + (1 - mu2) d^2,  b = mu1 b + a d + r d / (sqrt(m) + eps),  w -= lr b
// The share a of SGD rises to 1 with a tensor's steps, and r = (1 - a) lr_rmsprop / lr.
struct RmspropWarmupRule {
  static constexpr bool counts_steps = true;
  static constexpr bool adapt = false;
  double momentum, weight_decay, square_decay, eps, lr_rmsprop;
  double center;  // in steps: there a is 1/2, and from there on it rises linearly
  double rise;    // steps that it would take from 0 to 1 at that pace
  double below;   // a at the center, rounded down to a whole step
  double shrink;  // by which a is smaller one step earlier than there
};

struct RmspropWarmupCoefficients {
  float gradient_scale, weight_decay, momentum;
  float square_decay, square_weight, eps;
  float sgd, rmsprop;  // a and r
  float lr;
  bool warming;  // false: a is 1 for good, and squares are neither read nor written
};

// No norm is measured for it.
FASTLARS_HD double trust_ratio(const RmspropWarmupRule&, const Scalars&, const Sums&) {
  return 1.0;
}
FASTLARS_HD void set_trust(const RmspropWarmupRule&, const Scalars&, double,
                           RmspropWarmupCoefficients&) {}

// a after `steps` steps. Its exponential is a power of numbers that the host has made, because the
// last bits of exp are not the same on every device.
FASTLARS_HD double sgd_share(const RmspropWarmupRule& rule, double steps) {
  if (steps < rule.center) return rule.below * power(rule.shrink, rule.center - steps);
  const double share = 0.5 + (steps - rule.center) / rule.rise;
  return share < 1.0 ? share : 1.0;
}

// `step` counts from 1.
FASTLARS_HD RmspropWarmupCoefficients coefficients(const RmspropWarmupRule& rule,
                                                   const Scalars& now, float step) {
  const double share = sgd_share(rule, static_cast<double>(step) - 1.0);
  RmspropWarmupCoefficients c;
  c.gradient_scale = static_cast<float>(now.gradient_scale);
  c.weight_decay = static_cast<float>(rule.weight_decay);
  c.momentum = static_cast<float>(rule.momentum);
  c.square_decay = static_cast<float>(rule.square_decay);
  c.square_weight = static_cast<float>(1.0 - rule.square_decay);
  c.eps = static_cast<float>(rule.eps);
  c.sgd = static_cast<float>(share);
  c.rmsprop = now.lr > 0.0 ? coefficient((1.0 - share) * rule.lr_rmsprop / now.lr) : 0.0f;
  c.lr = coefficient(now.lr);
  c.warming = share < 1.0;
  return c;
}

// Returns the new weight, advances the buffer and the mean of squares.
FASTLARS_HD float rmsprop_warmup_update(const RmspropWarmupCoefficients& c, float w, float g,
                                        float& buffer, float& square) {
  const float d = c.gradient_scale * g + c.weight_decay * w;
  square = c.square_decay * square + c.square_weight * (d * d);
  const float direction = c.sgd * d + c.rmsprop * (d / (std::sqrt(square) + c.eps));
  buffer = c.momentum * buffer + direction;
  return w - c.lr * buffer;
}

// Once warmed up: SGD with momentum.
FASTLARS_HD float rmsprop_warmup_update(const RmspropWarmupCoefficients& c, float w, float g,
                                        float& buffer) {
  buffer = c.momentum * buffer + (c.gradient_scale * g + c.weight_decay * w);
  return w - c.lr * buffer;
}

}  // namespace fastlars
