// csrc/core and csrc/rules for tests, called through ctypes: arrays in, arrays out.
#include <cstdint>
#include <vector>

#include "core/chunks.h"
#include "core/dtype.h"
#include "core/random.h"
#include "cpu/chunk.h"
#include "rule_of_three.h"
#include "rules/lamb.h"
#include "rules/lars.h"
#include "rules/rmsprop_warmup.h"

using namespace fastlars;

namespace {

template <class Half>
void widen(const std::uint16_t* in, float* out, int count) {
  for (int i = 0; i < count; ++i) out[i] = to_float(Half{in[i]});
}

template <class Half>
void narrow(const float* in, std::uint16_t* out, int count) {
  for (int i = 0; i < count; ++i) out[i] = from_float<Half>(in[i]).bits;
}

}  // namespace

extern "C" {

void bfloat16_to_float(const std::uint16_t* in, float* out, int n) { widen<bfloat16>(in, out, n); }
void float16_to_float(const std::uint16_t* in, float* out, int n) { widen<float16>(in, out, n); }
void float_to_bfloat16(const float* in, std::uint16_t* out, int n) { narrow<bfloat16>(in, out, n); }
void float_to_float16(const float* in, std::uint16_t* out, int n) { narrow<float16>(in, out, n); }

void stochastic(const float* in, const std::uint32_t* random, std::uint16_t* out, int count) {
  for (int i = 0; i < count; ++i) out[i] = round_stochastically(in[i], random[i]).bits;
}

void philox(std::uint64_t seed, std::uint32_t tensor, std::uint64_t block, std::uint32_t* out) {
  const RandomBlock random = random_block(seed, tensor, block);
  for (int i = 0; i < 4; ++i) out[i] = random.word[i];
}

std::uint32_t bits_of_element(const std::uint32_t* words, int element) {
  return random_bits({{words[0], words[1], words[2], words[3]}}, element);
}

double lars(double weight, double update, double trust, double decay, double eps, int combined) {
  LarsRule rule = {};
  rule.trust_coefficient = trust;
  rule.weight_decay = decay;
  rule.eps = eps;
  rule.ratio = combined != 0 ? Ratio::combined : Ratio::separate;
  rule.ratio_ceiling = INFINITY;
  rule.adapt = true;
  return trust_ratio(rule, {}, {{weight, update}});
}

double lamb(double weight, double update, double lower, double upper, double eps) {
  LambRule rule = {};
  rule.lower = lower;
  rule.upper = upper;
  rule.ratio_eps = eps;
  rule.ratio_ceiling = INFINITY;
  rule.adapt = true;
  return trust_ratio(rule, {}, {{weight, update}});
}

double share(double center, double rise, double below, double shrink, double steps) {
  RmspropWarmupRule rule = {};
  rule.center_steps = center;
  rule.rise = rise;
  rule.below = below;
  rule.shrink = shrink;
  return sgd_share(rule, steps);
}

// Chunks as rows (tensor, begin, size), then -1; returns how many there are.
int chunks(const std::int64_t* numel, int tensors, std::int64_t* rows, int* first) {
  const Chunks cuts = cut(std::vector<std::int64_t>(numel, numel + tensors), cpu::kChunk);
  for (const Chunk& chunk : cuts.chunk) {
    *rows++ = chunk.tensor;
    *rows++ = chunk.begin;
    *rows++ = chunk.size;
  }
  for (const int index : cuts.first) *first++ = index;
  return static_cast<int>(cuts.chunk.size());
}

int blocks(const std::int64_t* numel, int tensors, std::int64_t target, int* ends) {
  const std::vector<std::int64_t> sizes(numel, numel + tensors);
  const std::vector<int> all = block_ends(cut(sizes, cpu::kChunk), sizes, target);
  for (const int end : all) *ends++ = end;
  return static_cast<int>(all.size());
}

// One step of two tensors of `size` elements each: arrays of both, one after the other. Sums are
// written where the rule adapts and `at_once` is 0, by measure.
void three(int adapt, int at_once, double lr, int size, float* weight, float* grad, float* states,
           float* counters, double* sums, float* report) {
  const auto both = [](float* base, int stride) {
    return Addresses{reinterpret_cast<std::uintptr_t>(base),
                     reinterpret_cast<std::uintptr_t>(base + stride)};
  };
  TensorList list;
  list.numel = {size, size};
  list.weight = both(weight, size);
  list.grad = both(grad, size);
  list.counter = both(counters, 1);
  for (int k = 0; k < 3; ++k) list.state.push_back(both(states + 2 * k * size, size));
  const RuleOfThree rule = {adapt != 0};
  if (at_once != 0) return cpu::step(rule, {lr, 1.0}, list, report);
  auto* found = reinterpret_cast<Sums<3>*>(sums);
  if (rule.adapt) cpu::measure(rule, {lr, 1.0}, list, found);
  cpu::apply(rule, {lr, 1.0}, list, found, report);
}
}
