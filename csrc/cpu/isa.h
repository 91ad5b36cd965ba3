// Runs a loop compiled for the best instruction set of this machine. One translation unit holds
// both versions: compiling whole files with -mavx2 instead would leave AVX2 copies of inline
// library functions for the linker to pick on machines without it.
#pragma once

namespace fastlars::cpu {

bool has_avx2();

// `body` and everything that it calls must be forced inline. A copy of it is called: the compiler
// then knows that no store of the loop changes what it has captured.
#if defined(__x86_64__)
template <class Body>
__attribute__((target("avx2"))) void run_avx2(const Body& body) {
  const Body copy = body;
  copy();
}
#endif

template <class Body>
void run_baseline(const Body& body) {
  const Body copy = body;
  copy();
}

template <class Body>
void run(const Body& body) {
#if defined(__x86_64__)
  if (has_avx2()) return run_avx2(body);
#endif
  run_baseline(body);
}

}  // namespace fastlars::cpu
