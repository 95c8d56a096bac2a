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

/// As long as one lives, its thread takes subnormal numbers for zero. What decays over time, a gradient above all, ends
/// among them, and many processors take some 100 cycles for every operation on one: on a Xeon, a training step of the
/// seed's classifier took 10 times as long. The kernels are called by pointer, so that none of their arithmetic can be
/// moved out of the object's life.
class FlushSubnormals {
 public:
  FlushSubnormals() : before_(FloatControl::get()) {
    if (depth_++ == 0) outside_ = before_;
    FloatControl::set(before_ | FloatControl::kFlush);
  }
  ~FlushSubnormals() {
    --depth_;
    FloatControl::set(before_);
  }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

  /// As long as one lives, inside the other, the thread is as the caller left it: around what may start threads, which
  /// inherit the setting and outlive the call.
  class Not {
   public:
    Not() : before_(FloatControl::get()) {
      if (depth_ > 0) FloatControl::set(outside_);
    }
    ~Not() { FloatControl::set(before_); }
    Not(const Not&) = delete;
    Not& operator=(const Not&) = delete;

   private:
    const uint64_t before_;
  };

 private:
  const uint64_t before_;
  inline static thread_local int depth_ = 0;
  inline static thread_local uint64_t outside_ = 0;  // the setting around the outermost one
};

}  // namespace rnn_ext::cpu
