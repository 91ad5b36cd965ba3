// Flows of control with stacks of their own, on one thread of the operating system.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(ON_CPU_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

namespace on_cpu {

#if defined(__x86_64__)

// Saves the registers that a call keeps, and the stack, in *from; goes on where `to` was saved. A
// tenth of the time of swapcontext, which asks the operating system for the signal mask.
extern "C" void on_cpu_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.local on_cpu_switch
.type on_cpu_switch, @function
on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size on_cpu_switch, .-on_cpu_switch
)");

struct Context {
  void* stack = nullptr;
};

inline void prepare(Context& context, char* stack, std::size_t size, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(stack + size);
  *--top = nullptr;  // entry finds the stack as after a call; nobody returns there
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack = top;
}

inline void change(Context& from, Context& to) { on_cpu_switch(&from.stack, to.stack); }

#else

struct Context {
  ucontext_t saved;
};

inline void prepare(Context& context, char* stack, std::size_t size, void (*entry)()) {
  getcontext(&context.saved);
  context.saved.uc_stack.ss_sp = stack;
  context.saved.uc_stack.ss_size = size;
  context.saved.uc_link = nullptr;
  makecontext(&context.saved, entry, 0);
}

inline void change(Context& from, Context& to) { swapcontext(&from.saved, &to.saved); }

#endif

// ThreadSanitizer takes fibers for threads, between which barriers are all the order there is.
#if defined(ON_CPU_TSAN)
struct Fiber : Context {
  void* known = nullptr;
};
inline void create(Fiber& fiber) { fiber.known = __tsan_create_fiber(0); }
inline void destroy(Fiber& fiber) { __tsan_destroy_fiber(fiber.known); }
inline void adopt(Fiber& fiber) { fiber.known = __tsan_get_current_fiber(); }
inline void jump(Fiber& from, Fiber& to) {
  __tsan_switch_to_fiber(to.known, __tsan_switch_to_fiber_no_sync);
  change(from, to);
}
inline void release(void* place) { __tsan_release(place); }
inline void acquire(void* place) { __tsan_acquire(place); }
#else
using Fiber = Context;
inline void create(Fiber&) {}
inline void destroy(Fiber&) {}
inline void adopt(Fiber&) {}
inline void jump(Fiber& from, Fiber& to) { change(from, to); }
inline void release(void*) {}
inline void acquire(void*) {}
#endif

}  // namespace on_cpu
