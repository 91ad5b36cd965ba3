// A small list and its tables, for programs that launch kernels.
#pragma once

#include <cstdlib>
#include <vector>

#include "cuda/api.h"

struct Problem {
  std::vector<std::int64_t> numel = {9000, 1, 5 * 4096, 0, 4096, 12289, 7};
  std::vector<std::vector<float>> arrays;  // by tensor: weights, then gradients, then each state
  std::vector<float> counters = std::vector<float>(numel.size());
  fastlars::TensorList list;
  fastlars::cuda::ChunkTable table{numel};
  std::vector<fastlars::cuda::ChunkEntry> chunks{std::size_t(table.chunks())};
  std::vector<fastlars::cuda::TensorEntry> tensors{std::size_t(table.tensors())};
  std::vector<double> workspace = std::vector<double>(table.workspace_bytes() / 8 + 1);
  std::vector<float> report =
      std::vector<float>(table.tensors() * (1 + fastlars::Rules::most_sums));

  Problem() {
    std::srand(1);
    list.numel = numel;
    list.state.resize(fastlars::Rules::most_states);
    std::vector<fastlars::Addresses*> columns = {&list.weight, &list.grad};
    for (auto& state : list.state) columns.push_back(&state);
    for (auto* column : columns) {
      for (const auto size : numel) {
        auto& array = arrays.emplace_back(size);
        for (float& value : array) value = static_cast<float>(std::rand()) / RAND_MAX;
        column->push_back(address(array));
      }
    }
    // One tensor whose sums are taken again in double.
    for (float& value : arrays[0]) value *= 1e-25f;
    for (float& counter : counters) {
      list.counter.push_back(reinterpret_cast<std::uintptr_t>(&counter));
    }
    table.write_chunk_entries(chunks.data());
    table.write_tensor_entries(list, tensors.data());
    table.place(address(chunks), address(tensors), address(workspace));
  }
  Problem(const Problem&) = delete;

  const std::vector<float>& of(int column, std::size_t tensor) const {
    return arrays[column * numel.size() + tensor];
  }

  // `device`: learning rate, gradient scale and skip, read by the kernels.
  fastlars::cuda::LaunchTarget on(int blocks, int slots, const double* device = nullptr) const {
    return {table, list, device, nullptr, blocks, slots};
  }

 private:
  template <class T>
  static std::uintptr_t address(const std::vector<T>& array) {
    return reinterpret_cast<std::uintptr_t>(array.data());
  }
};
