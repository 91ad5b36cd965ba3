// Chooses the instruction set that the loops run with. FASTLARS_CPU=baseline forces the fallback,
// for tests and to rule AVX2 out as the cause of a problem: the results have the same bits.
#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

#include "cpu/api.h"
#include "cpu/loop.h"

namespace fastlars::cpu {

bool has_avx2() {
  static const bool chosen = [] {
    const char* forced = std::getenv("FASTLARS_CPU");
    if (forced != nullptr && std::strcmp(forced, "baseline") == 0) return false;
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") != 0;
#else
    return false;
#endif
  }();
  return chosen;
}

bool prefetches() {
#if defined(__x86_64__)
  static const bool chosen = __builtin_cpu_is("intel");
  return chosen;
#else
  return false;
#endif
}

const char* instruction_set() {
#if defined(__aarch64__)
  return "neon";  // a part of every 64-bit ARM processor: the baseline has it
#else
  return has_avx2() ? "avx2" : "baseline";
#endif
}

}  // namespace fastlars::cpu
