// The loop over a chunk's elements, which prefetches the cache lines of every array.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "cpu/isa.h"

namespace fastlars::cpu {

// Whether to prefetch: an Intel Xeon is faster with it, an AMD EPYC was slower.
bool prefetches();

// Bytes between a prefetch and the element that is worked on. The processor's own prefetcher stops
// at the end of every page of 4 KB. Distances from 1 KB to 2 KB made no difference beyond the
// noise.
constexpr int kAhead = 2048;
// Elements between two prefetches: two cache lines of bfloat16, four of float32.
constexpr int kStrip = 64;
constexpr int kCacheLine = 64;

// Past the end of an array a prefetch does not fault.
template <class T>
FASTLARS_HD void prefetch(const T* strip) {
  const auto begin = reinterpret_cast<std::uintptr_t>(strip) + kAhead;
  for (std::uintptr_t byte = 0; byte < kStrip * sizeof(T); byte += kCacheLine) {
    __builtin_prefetch(reinterpret_cast<const void*>(begin + byte));
  }
}

// each(i) for every element; `arrays` are those that it reads.
template <class Each, class... T>
void for_each(int size, const Each& each, const T*... arrays) {
  run([=]() __attribute__((always_inline)) {
    const bool ahead = prefetches();
    for (int begin = 0; begin < size; begin += kStrip) {
      if (ahead) (prefetch(arrays + begin), ...);
      const int end = begin + kStrip < size ? begin + kStrip : size;
#if defined(__clang__)
#pragma clang loop vectorize(assume_safety)
#else
#pragma GCC ivdep
#endif
      for (int i = begin; i < end; ++i) each(i);
    }
  });
}

}  // namespace fastlars::cpu
