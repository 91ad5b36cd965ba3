// The functions of csrc/cuda/intrinsics.cuh on a CPU. The include path finds this file first.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdlib>

#include "core/dtype.h"

namespace fastlars::cuda {

constexpr int kThreads = 256;  // of a block: those that work on a chunk
constexpr int kLanes = 32;     // of a warp
constexpr int kWarps = kThreads / kLanes;
static_assert(kLanes == on_cpu::kLanes, "");

inline int thread() { return on_cpu::thread(); }
inline int block() { return on_cpu::block(); }
inline int blocks() { return on_cpu::blocks(); }

inline void barrier(on_cpu::Line line = on_cpu::Line::here()) { on_cpu::barrier(line); }

inline void meet() { on_cpu::barrier({"meet", 0}); }

inline void sync_warp(on_cpu::Line line = on_cpu::Line::here()) {
  if (on_cpu::is_last_of_warp(line)) on_cpu::release_warp();
}

template <class T>
T warp_sum(T value, on_cpu::Line line = on_cpu::Line::here()) {
  auto* values = static_cast<T*>(on_cpu::lanes());
  const int lane = thread() % kLanes;
  values[lane] = value;
  if (on_cpu::is_last_of_warp(line)) {
    for (int mask = kLanes / 2; mask > 0; mask /= 2) {
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

template <class T>
T load_relaxed(const T* place) {
  on_cpu::stall();
  return __atomic_load_n(place, __ATOMIC_RELAXED);
}

template <class T>
void store_relaxed(T* place, T value) {
  on_cpu::stall();
  __atomic_store_n(place, value, __ATOMIC_RELAXED);
  on_cpu::advanced();
}

class Backoff {
 public:
  void pause(on_cpu::Line line = on_cpu::Line::here()) {
    on_cpu::poll(line);
    static const char* const text = std::getenv("FASTLARS_EMULATED_READS");
    static const unsigned most = text != nullptr ? std::atoi(text) : 1u << 24;
    if (++reads_ == most) on_cpu::give_up("a wait between blocks did not end", line);
  }

 private:
  unsigned reads_ = 0;
};

inline int load_shared(const int* place) { return __atomic_load_n(place, __ATOMIC_RELAXED); }
inline void store_shared(int* place, int value) {
  __atomic_store_n(place, value, __ATOMIC_RELAXED);
}

inline float4* dynamic_shared() { return static_cast<float4*>(on_cpu::dynamic_shared()); }

// A GPU faults where a CPU may not.
template <class V>
void check_boundary(const V* place, on_cpu::Line line) {
  if (reinterpret_cast<std::uintptr_t>(place) % sizeof(V) != 0) {
    on_cpu::give_up("an access off its boundary", line);
  }
}

template <bool Streaming, class V>
V read(const V* place, on_cpu::Line line = on_cpu::Line::here()) {
  check_boundary(place, line);
  return *place;
}

template <bool Streaming, class V>
void write(V* place, V value, on_cpu::Line line = on_cpu::Line::here()) {
  check_boundary(place, line);
  *place = value;
}

}  // namespace fastlars::cuda
