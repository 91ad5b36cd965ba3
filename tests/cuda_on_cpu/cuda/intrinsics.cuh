// The functions of csrc/cuda/intrinsics.cuh, on a CPU. Found before it on the include path.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/dtype.h"

namespace fastlars::cuda {

constexpr int kThreads = 256;  // of every block
constexpr int kWarps = kThreads / 32;
static_assert(kThreads == on_cpu::kThreads, "");

inline int thread() { return on_cpu::thread(); }
inline int block() { return on_cpu::block(); }
inline int blocks() { return on_cpu::blocks(); }

inline void barrier(on_cpu::Line line = on_cpu::Line::here()) { on_cpu::barrier(line); }

template <class T>
T warp_sum(T value, on_cpu::Line line = on_cpu::Line::here()) {
  constexpr int kLanes = on_cpu::kLanes;
  auto* values = static_cast<T*>(on_cpu::lanes());
  const int lane = thread() % kLanes;
  values[lane] = value;
  if (on_cpu::is_last_of_warp(line)) {
    for (int mask = 16; mask > 0; mask /= 2) {
      T sums[kLanes];
      for (int i = 0; i < kLanes; ++i) sums[i] = values[i] + values[i ^ mask];
      for (int i = 0; i < kLanes; ++i) values[i] = sums[i];
    }
    on_cpu::release_warp();
  }
  return values[lane];
}

inline std::uint32_t add_relaxed(std::uint32_t* place, std::uint32_t n) {
  on_cpu::stall();
  const std::uint32_t before = __atomic_fetch_add(place, n, __ATOMIC_RELAXED);
  on_cpu::advanced();
  return before;
}

inline std::uint32_t add_acq_rel(std::uint32_t* place, std::uint32_t n) {
  on_cpu::stall();
  const std::uint32_t before = __atomic_fetch_add(place, n, __ATOMIC_ACQ_REL);
  on_cpu::advanced();
  return before;
}

inline std::uint64_t load_relaxed(const std::uint64_t* place) {
  on_cpu::stall();
  return __atomic_load_n(place, __ATOMIC_RELAXED);
}

inline void store_relaxed(std::uint64_t* place, std::uint64_t value) {
  on_cpu::stall();
  __atomic_store_n(place, value, __ATOMIC_RELAXED);
  on_cpu::advanced();
}

inline void pause(on_cpu::Line line = on_cpu::Line::here()) { on_cpu::poll(line); }

inline float4* dynamic_shared() { return static_cast<float4*>(on_cpu::dynamic_shared()); }

// A GPU faults where a CPU may not.
template <class V>
void check_boundary(const V* place, on_cpu::Line line) {
  if (reinterpret_cast<std::uintptr_t>(place) % sizeof(V) != 0) {
    on_cpu::give_up("an access off its boundary", line);
  }
}

template <bool Last, class V>
V read(const V* place, on_cpu::Line line = on_cpu::Line::here()) {
  check_boundary(place, line);
  return *place;
}

template <bool Last, class V>
void write(V* place, V value, on_cpu::Line line = on_cpu::Line::here()) {
  check_boundary(place, line);
  *place = value;
}

}  // namespace fastlars::cuda
