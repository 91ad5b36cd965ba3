// RMSprop warm-up. Akiba, Suzuki, Fukuda, "Extremely Large Minibatch SGD", 2017:
//   d = g + wd w,  v = beta2 v + (1 - beta2) d^2
//   b = mu b + a d + (1 - a) (lr_rmsprop / lr) d / (sqrt(v) + eps),  w -= lr b
// The share a of SGD rises to 1 with a tensor's steps.
#pragma once

#include "rules/common.h"

namespace fastlars {

struct RmspropWarmupCoefficients {
  float gradient_scale, weight_decay, momentum;
  float square_decay, square_weight, eps;
  float sgd, rmsprop;  // a, and (1 - a) lr_rmsprop / lr
  float lr;
  bool warming;  // false: a is 1 from now on, and v is neither read nor written
};

struct RmspropWarmupRule {
  double momentum, weight_decay, square_decay, eps, lr_rmsprop;
  double center_steps;  // c: there a is 1/2, and from there on it rises linearly
  double rise;          // steps that it would take from 0 to 1 at that pace
  double below;         // a at the center, rounded down to a whole step
  double shrink;        // by which a is smaller one step earlier than there

  using Coefficients = RmspropWarmupCoefficients;
  static constexpr const char* name = "RmspropWarmupRule";
  static constexpr int sums = 0;
  static constexpr int states = 2;  // b and v
  static constexpr bool steps = true, counts_steps = true, measure_writes = false, adapt = false;
  static constexpr bool normalizes = false;

  template <class Field>
  static void fields(Field&& field) {
    field("center_steps", &RmspropWarmupRule::center_steps);
    field("rise", &RmspropWarmupRule::rise);
    field("below", &RmspropWarmupRule::below);
    field("shrink", &RmspropWarmupRule::shrink);
    field("momentum", &RmspropWarmupRule::momentum);
    field("weight_decay", &RmspropWarmupRule::weight_decay);
    field("lr_rmsprop", &RmspropWarmupRule::lr_rmsprop);
    field("square_decay", &RmspropWarmupRule::square_decay);
    field("eps", &RmspropWarmupRule::eps);
  }
};

// There is no trust ratio: q = 1.
FASTLARS_HD double trust_ratio(const RmspropWarmupRule&, const StepScalars&, const Sums<0>&) {
  return 1.0;
}
FASTLARS_HD void apply_trust_ratio(const RmspropWarmupRule&, const StepScalars&, double,
                                   RmspropWarmupCoefficients&) {}

// a after `steps` steps. Its exponential is a power of numbers that the host has made, because the
// last bits of exp are not the same on every device.
FASTLARS_HD double sgd_share(const RmspropWarmupRule& rule, double steps) {
  if (steps < rule.center_steps) return rule.below * power(rule.shrink, rule.center_steps - steps);
  const double share = 0.5 + (steps - rule.center_steps) / rule.rise;
  return share < 1.0 ? share : 1.0;
}

// `step` is t, counted from 1.
FASTLARS_HD RmspropWarmupCoefficients coefficients(const RmspropWarmupRule& rule,
                                                   const StepScalars& scalars, float step) {
  const double share = sgd_share(rule, static_cast<double>(step) - 1.0);
  const double lr = scalars.lr;
  RmspropWarmupCoefficients c;
  c.gradient_scale = static_cast<float>(scalars.gradient_scale);
  c.weight_decay = static_cast<float>(rule.weight_decay);
  c.momentum = static_cast<float>(rule.momentum);
  c.square_decay = static_cast<float>(rule.square_decay);
  c.square_weight = static_cast<float>(1.0 - rule.square_decay);
  c.eps = static_cast<float>(rule.eps);
  c.sgd = static_cast<float>(share);
  c.rmsprop = lr > 0.0 ? coefficient((1.0 - share) * rule.lr_rmsprop / lr) : 0.0f;
  c.lr = coefficient(lr);
  c.warming = share < 1.0;
  return c;
}

// Returns the new weight, advances b and v.
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
