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
  cuda::ChunkTable table{numel};
  std::vector<cuda::ChunkEntry> chunks = std::vector<cuda::ChunkEntry>(table.chunks());
  std::vector<cuda::TensorEntry> tensors = std::vector<cuda::TensorEntry>(table.tensors());
  std::vector<double> workspace = std::vector<double>(table.workspace_bytes() / 8 + 1);
  std::vector<float> ratios = std::vector<float>(table.tensors());

  Problem() {
    list.state.resize(Rules::most_states);
    std::vector<Addresses*> columns = {&list.weight, &list.grad};
    for (auto& state : list.state) columns.push_back(&state);
    for (auto* column : columns) {
      for (const auto size : numel) {
        auto& array = arrays.emplace_back(size);
        for (float& value : array) value = static_cast<float>(std::rand()) / RAND_MAX;
        column->push_back(reinterpret_cast<std::uintptr_t>(array.data()));
      }
    }
    // One tensor whose sums are taken again in double.
    for (float& value : arrays[0]) value *= 1e-25f;
    for (float& counter : counters) {
      list.counter.push_back(reinterpret_cast<std::uintptr_t>(&counter));
    }
    list.numel = numel;
    table.write_chunk_entries(chunks.data());
    table.write_tensor_entries(list, tensors.data());
    const auto address = [](auto& array) { return reinterpret_cast<std::uintptr_t>(array.data()); };
    table.place(address(chunks), address(tensors), address(workspace));
  }

  template <class Rule>
  void step(const Rule& rule, int blocks, int shared_slots) {
    const StepScalars host = {0.1, 1.0};
    const double device[] = {host.lr, host.gradient_scale, 0.0};
    const cuda::LaunchTarget target = {table,   list,   blocks % 2 == 0 ? device : nullptr,
                                       nullptr, blocks, shared_slots};
    std::vector<Sums<Rule::sums>> sums(table.tensors());
    cuda::measure(rule, host, target, sums.data());
    cuda::apply(rule, host, target, sums.data(), ratios.data());
    cuda::step(rule, host, target, ratios.data());
  }
};

}  // namespace

// With an argument, loses a ticket: blocks then wait for a chunk that no block has claimed.
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
