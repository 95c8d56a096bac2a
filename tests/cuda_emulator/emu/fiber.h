// Fibers: one per CUDA thread, all on one OS thread, switched only where a kernel synchronises.
//
// ASan is told about every change of stack. TSan gets one logical thread per fiber and no ordering from a switch, so
// that only the synchronisation a kernel asks for (see `release` and `acquire`) orders its memory accesses.
#pragma once

#include <cstddef>

namespace emu {

struct FiberStack {
  void* stack_pointer = nullptr;
  char* memory = nullptr;  // lowest usable byte; a guard page lies below
  size_t bytes = 0;
  void* asan_fake_stack = nullptr;
  void* tsan_fiber = nullptr;
};

void fiber_allocate(FiberStack& fiber, size_t stack_bytes);
void fiber_prepare(FiberStack& fiber, void (*entry)());  // the next fiber_enter starts `entry`, which must not return
void fiber_enter(FiberStack& fiber);                     // scheduler -> fiber; returns when the fiber leaves
void fiber_leave(FiberStack& fiber, bool for_good);      // fiber -> scheduler
void fiber_entered();                                    // the first call of `entry`
void fiber_bind_scheduler();                             // call once per run, on the thread that schedules

// Happens-before edges for TSan: everything before release(tag) is ordered before what follows a later acquire(tag).
void release(void* tag);
void acquire(void* tag);

// Runs `body` as a logical thread of its own, which has seen nothing but what it acquires.
void on_detached_thread(void (*body)(void*), void* argument);

// While one exists, TSan looks at no memory access: the runtime's own bookkeeping is not part of the kernel.
struct SanitizerPause {
  SanitizerPause();
  ~SanitizerPause();
  SanitizerPause(const SanitizerPause&) = delete;
  SanitizerPause& operator=(const SanitizerPause&) = delete;
};

}  // namespace emu
