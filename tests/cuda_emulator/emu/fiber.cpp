// Compiled without -fsanitize; EMU_ASAN and EMU_TSAN say which sanitizer the rest of the program runs under.
#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#ifdef EMU_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack_save, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack_save, const void** bottom_old, size_t* size_old);
void __asan_unpoison_memory_region(void const volatile* address, size_t size);
}
#endif
#ifdef EMU_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
}
namespace {
constexpr unsigned kNoSync = 1;  // the switch itself orders nothing
}
#endif

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer, adopts another stack. ucontext would make two system calls.
extern "C" void emu_switch_stack(void** save, void* adopt);
asm(R"(.text
.globl emu_switch_stack
.type emu_switch_stack,@function
emu_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch_stack,.-emu_switch_stack
.section .note.GNU-stack,"",@progbits
.text)");
#else
extern "C" void emu_switch_stack(void** save, void* adopt) {
  ucontext_t here;
  *save = &here;
  swapcontext(&here, static_cast<ucontext_t*>(adopt));
}
#endif

namespace emu {
namespace {

void* scheduler_stack_pointer;
[[maybe_unused]] void* scheduler_fake_stack;
[[maybe_unused]] const void* scheduler_stack_bottom;
[[maybe_unused]] size_t scheduler_stack_bytes;
[[maybe_unused]] void* scheduler_tsan_fiber;

}  // namespace

void fiber_allocate(FiberStack& fiber, size_t stack_bytes) {
  const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory =
      mmap(nullptr, stack_bytes + guard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) {
    std::perror("emu: cannot allocate a fiber stack");
    std::abort();
  }
  fiber.memory = static_cast<char*>(memory) + guard;
  fiber.bytes = stack_bytes;
#ifdef EMU_TSAN
  fiber.tsan_fiber = __tsan_create_fiber(0);
#endif
}

void fiber_prepare(FiberStack& fiber, void (*entry)()) {
  char* top = fiber.memory + fiber.bytes;
#if defined(__x86_64__)
  void** stack = reinterpret_cast<void**>(top) - 1;  // the ABI wants rsp = 8 mod 16 on entry
  *stack = nullptr;
  *--stack = reinterpret_cast<void*>(entry);
  for (int saved_register = 0; saved_register < 6; ++saved_register) *--stack = nullptr;
  fiber.stack_pointer = stack;
#else
  auto* context =
      reinterpret_cast<ucontext_t*>((reinterpret_cast<uintptr_t>(top) - sizeof(ucontext_t)) & ~uintptr_t{63});
  getcontext(context);
  context->uc_stack.ss_sp = fiber.memory;
  context->uc_stack.ss_size = reinterpret_cast<char*>(context) - fiber.memory;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  fiber.stack_pointer = context;
#endif
#ifdef EMU_ASAN
  __asan_unpoison_memory_region(fiber.memory, fiber.bytes);
  fiber.asan_fake_stack = nullptr;
#endif
}

void fiber_enter([[maybe_unused]] FiberStack& fiber) {
#ifdef EMU_ASAN
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.memory, fiber.bytes);
#endif
#ifdef EMU_TSAN
  __tsan_switch_to_fiber(fiber.tsan_fiber, kNoSync);
#endif
  emu_switch_stack(&scheduler_stack_pointer, fiber.stack_pointer);
#ifdef EMU_ASAN
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

void fiber_leave(FiberStack& fiber, [[maybe_unused]] bool for_good) {
#ifdef EMU_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.asan_fake_stack, scheduler_stack_bottom,
                                 scheduler_stack_bytes);
#endif
#ifdef EMU_TSAN
  __tsan_switch_to_fiber(scheduler_tsan_fiber, kNoSync);
#endif
  emu_switch_stack(&fiber.stack_pointer, scheduler_stack_pointer);
#ifdef EMU_ASAN
  __sanitizer_finish_switch_fiber(fiber.asan_fake_stack, &scheduler_stack_bottom, &scheduler_stack_bytes);
#endif
}

void fiber_entered() {
#ifdef EMU_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack_bottom, &scheduler_stack_bytes);
#endif
}

void fiber_bind_scheduler() {
#ifdef EMU_TSAN
  scheduler_tsan_fiber = __tsan_get_current_fiber();
#endif
}

void release([[maybe_unused]] void* tag) {
#ifdef EMU_TSAN
  __tsan_release(tag);
#endif
}

void acquire([[maybe_unused]] void* tag) {
#ifdef EMU_TSAN
  __tsan_acquire(tag);
#endif
}

void on_detached_thread(void (*body)(void*), void* argument) {
#ifdef EMU_TSAN
  void* caller = __tsan_get_current_fiber();
  void* detached = __tsan_create_fiber(0);
  __tsan_ignore_thread_end();
  __tsan_switch_to_fiber(detached, kNoSync);
  body(argument);
  __tsan_switch_to_fiber(caller, kNoSync);
  __tsan_ignore_thread_begin();
  __tsan_destroy_fiber(detached);
#else
  body(argument);
#endif
}

SanitizerPause::SanitizerPause() {
#ifdef EMU_TSAN
  __tsan_ignore_thread_begin();
#endif
}
SanitizerPause::~SanitizerPause() {
#ifdef EMU_TSAN
  __tsan_ignore_thread_end();
#endif
}

}  // namespace emu
