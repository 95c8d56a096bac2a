// Numbers too small to have all their digits.
#pragma once

#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rnn_ext::cpu {

/// Bits of this thread's floating-point control register.
struct FloatControl {
#if defined(__x86_64__)
  static constexpr uint64_t kFlush = 0x8040;  // subnormal results, and operands, are zero
  static uint64_t get() { return _mm_getcsr(); }
  static void set(uint64_t control) { _mm_setcsr(uint32_t(control)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kFlush = uint64_t(1) << 24;
  static uint64_t get() {
    uint64_t control;
    asm volatile("mrs %0, fpcr" : "=r"(control));
    return control;
  }
  static void set(uint64_t control) { asm volatile("msr fpcr, %0" : : "r"(control)); }
#else
  static constexpr uint64_t kFlush = 0;
  static uint64_t get() { return 0; }
  static void set(uint64_t) {}
#endif
};

/// As long as one lives, its thread takes subnormal numbers for zero, or does not.
template <bool kFlush>
class Subnormals {
 public:
  Subnormals() : before_(FloatControl::get()) {
    FloatControl::set(kFlush ? before_ | FloatControl::kFlush : before_ & ~FloatControl::kFlush);
  }
  ~Subnormals() { FloatControl::set(before_); }
  Subnormals(const Subnormals&) = delete;
  Subnormals& operator=(const Subnormals&) = delete;

 private:
  const uint64_t before_;
};

/// Around all kernels. What decays over time, a gradient above all, ends among the subnormal numbers, and many
/// processors take some 100 cycles for every operation on one: on a Xeon, a training step of the seed's classifier took
/// 10 times as long.
using FlushSubnormals = Subnormals<true>;

/// Around what may start threads, which inherit the setting and outlive the call.
using KeepSubnormals = Subnormals<false>;

}  // namespace rnn_ext::cpu
