// Every rule. A new one is added here, and bindings, tables and buffers follow.
#pragma once

#include <algorithm>

#include "rules/gradient_norm.h"
#include "rules/lamb.h"
#include "rules/lans.h"
#include "rules/lars.h"
#include "rules/rmsprop_warmup.h"

namespace fastlars {

template <class... Rule>
struct RuleList {
  static constexpr int most_sums = std::max({Rule::sums...});
  static constexpr int most_states = std::max({Rule::states...});

  // Calls f with a value of each rule's type.
  template <class F>
  static void for_each(F&& f) {
    (f(Rule{}), ...);
  }
};

using Rules = RuleList<GradientNorm, LarsRule, LambRule, LansRule, RmspropWarmupRule>;

}  // namespace fastlars
