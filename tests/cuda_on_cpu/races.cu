// Steps a small list by both paths, for ThreadSanitizer to watch.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/api.h"

using namespace fastlars;

namespace {

struct Problem {
  std::vector<std::int64_t> numel = {9000, 1, 5 * 4096, 0, 4096, 12289, 7};
  std::vector<std::vector<float>> arrays;
  std::vector<float> counters = std::vector<float>(numel.size());
  TensorList list;
  cuda::Plan plan{numel};
  std::vector<cuda::Item> items = std::vector<cuda::Item>(plan.chunks());
  std::vector<cuda::Row> rows = std::vector<cuda::Row>(plan.tensors());
  std::vector<Sums> workspace = std::vector<Sums>(plan.workspace_bytes() / sizeof(Sums) + 1);
  std::vector<Sums> sums = std::vector<Sums>(plan.tensors());
  std::vector<float> ratios = std::vector<float>(plan.tensors());

  Problem() {
    for (auto* base : {&list.weight, &list.grad, &list.state[0], &list.state[1]}) {
      for (const auto size : numel) {
        auto& array = arrays.emplace_back(size);
        for (float& value : array) value = static_cast<float>(std::rand()) / RAND_MAX;
        base->push_back(reinterpret_cast<std::uintptr_t>(array.data()));
      }
    }
    // One tensor whose sums are taken again in double.
    for (float& value : arrays[0]) value *= 1e-25f;
    for (float& counter : counters) {
      list.counter.push_back(reinterpret_cast<std::uintptr_t>(&counter));
    }
    list.numel = numel;
    plan.write_items(items.data());
    plan.write_rows(list, rows.data());
    const auto address = [](auto& array) { return reinterpret_cast<std::uintptr_t>(array.data()); };
    plan.place(address(items), address(rows), address(workspace));
  }

  template <class Rule>
  void step(const Rule& rule, int blocks, int ring) {
    const Scalars now = {0.1, 1.0};
    const double there[] = {now.lr, now.gradient_scale, 0.0};
    const cuda::Work work = {plan, list, blocks % 2 == 0 ? there : nullptr, nullptr, blocks, ring};
    cuda::measure(rule, now, work, sums.data());
    cuda::apply(rule, now, work, sums.data(), ratios.data());
    cuda::step(rule, now, work, ratios.data());
  }
};

}  // namespace

// With an argument, loses a ticket: the chunk that nobody has is waited for.
int main(int count, char**) {
  LarsRule lars = {};
  lars.momentum = 0.9;
  lars.weight_decay = lars.trust_coefficient = 0.1;
  lars.adapt = true;
  LambRule lamb = {};
  lamb.beta1 = 0.9;
  lamb.beta2 = 0.99;
  lamb.eps = lamb.weight_decay = 0.1;
  lamb.upper = 10.0;
  lamb.adapt = true;
  Problem problem;
  if (count > 1) reinterpret_cast<cuda::Control*>(problem.workspace.data())->ticket = 1;
  for (int blocks = 1; blocks <= 4; ++blocks) {
    problem.step(lars, blocks, blocks % 2 + 1);
    problem.step(lamb, blocks, blocks % 2 + 1);
  }
  std::printf("stepped\n");
  return 0;
}
