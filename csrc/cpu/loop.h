// The loop over a chunk's elements, which asks for each array's cache lines before it needs them.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace fastlars::cpu {

// Whether this processor gains by it: an Intel Xeon does; an AMD EPYC was slower with it.
bool prefetches();

// Intel's own prefetcher stops at the end of every page of 4 KB, and starts anew in the next one.
// From 1 KB to 2 KB ahead made no difference beyond the noise.
constexpr int kAhead = 2048;
// Elements between two requests: two cache lines of bfloat16, four of float32.
constexpr int kStrip = 64;
constexpr int kCacheLine = 64;

// Past the end of an array this asks for nothing that could fault.
template <class T>
FASTLARS_HD void prefetch(const T* strip) {
  const auto begin = reinterpret_cast<std::uintptr_t>(strip) + kAhead;
  for (std::uintptr_t byte = 0; byte < kStrip * sizeof(T); byte += kCacheLine) {
    __builtin_prefetch(reinterpret_cast<const void*>(begin + byte));
  }
}

// each(i) for every element; `arrays` are those that it reads.
template <class Each, class... T>
FASTLARS_HD void for_each(int size, const Each& each, const T*... arrays) {
  const bool ahead = prefetches();
  for (int begin = 0; begin < size; begin += kStrip) {
    if (ahead) (prefetch(arrays + begin), ...);
    const int end = begin + kStrip < size ? begin + kStrip : size;
#pragma GCC ivdep
    for (int i = begin; i < end; ++i) each(i);
  }
}

}  // namespace fastlars::cpu
