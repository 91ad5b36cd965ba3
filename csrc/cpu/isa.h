// Runs a loop body compiled for the best instruction set of this machine. One translation unit
// holds both versions: compiling whole files with -mavx2 instead would leave AVX2 copies of inline
// library functions for the linker to pick on machines without it.
#pragma once

namespace fastlars::cpu {

bool has_avx2();

#if defined(__x86_64__)
template <class Body>
__attribute__((target("avx2,f16c"))) void run_avx2(const Body& body) {
  body();
}
#endif

template <class Body>
void run_baseline(const Body& body) {
  body();
}

// `Body::operator()` and everything that it calls are forced inline.
template <class Body>
void run(const Body& body) {
#if defined(__x86_64__)
  if (has_avx2()) return run_avx2(body);
#endif
  run_baseline(body);
}

}  // namespace fastlars::cpu
