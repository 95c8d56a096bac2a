// What kernels do beyond plain C++: conversions, elementary functions, and every PTX instruction, each wrapped once
// with a twin for the emulator. The twins are written from the tables of the PTX manual, not from the kernels.
#pragma once

#include "cells/cell.h"
#include "cuda/shim.h"

#if defined(__CUDACC__)
#define RNN_EXT_DEVICE __device__ __forceinline__
#define RNN_EXT_CALLER  // the emulator's reports name the line that called a wrapper
#define RNN_EXT_AND_CALLER
#else
#define RNN_EXT_DEVICE inline __attribute__((always_inline))
#define RNN_EXT_CALLER EMU_CALLER
#define RNN_EXT_AND_CALLER , EMU_CALLER
#endif

namespace rnn_ext::cuda {

// ---- storage and accumulation ---------------------------------------------------------------------------------------

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using AccumulatorOf = typename Accumulator<T>::type;

RNN_EXT_DEVICE float widen(float value) { return value; }
RNN_EXT_DEVICE double widen(double value) { return value; }
RNN_EXT_DEVICE float widen(bfloat16 value) { return __bfloat162float(value); }
RNN_EXT_DEVICE float widen(float16 value) { return __half2float(value); }

template <class T>
RNN_EXT_DEVICE T narrow(AccumulatorOf<T> value) {
  return value;
}
template <>
RNN_EXT_DEVICE bfloat16 narrow<bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
RNN_EXT_DEVICE float16 narrow<float16>(float value) {
  return __float2half_rn(value);
}

// Four neighbours in one load; the address is 16-byte aligned.
RNN_EXT_DEVICE void load4(const float* from, float (&to)[4]) {
  const float4 all = *reinterpret_cast<const float4*>(from);
  to[0] = all.x;
  to[1] = all.y;
  to[2] = all.z;
  to[3] = all.w;
}

// ---- elementary functions (the M of csrc/cells/cell.h) --------------------------------------------------------------

// Full precision of the type. Infinities saturate, NaN passes.
template <class V>
struct ExactMath {
  RNN_EXT_HD static V sigmoid(V x) {
#if !defined(__CUDACC__)
    using std::exp;
#endif
    return V(1) / (V(1) + exp(-x));
  }
  RNN_EXT_HD static V tanh(V x) {
#if defined(__CUDACC__)
    return ::tanh(x);
#else
    return std::tanh(x);
#endif
  }
  RNN_EXT_HD static V relu(V x) { return x < V(0) ? V(0) : x; }
  RNN_EXT_HD static V relu_backward(V dh, V h) { return h > V(0) ? dh : V(0); }
};

// ---- cp.async: global to shared memory without registers, 16 bytes per thread ---------------------------------------

// Bytes from `valid` on become zero; `from` is not read when valid = 0. Both addresses are 16-byte aligned.
RNN_EXT_DEVICE void copy_async_16(void* to, const void* from, int valid RNN_EXT_AND_CALLER) {
#if defined(__CUDACC__)
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
      "l"(from), "r"(valid)
      : "memory");
#else
  emu::async_copy(to, from, 16, valid, EMU_SITE);
#endif
}

RNN_EXT_DEVICE void copy_async_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emu::async_commit();
#endif
}

// Waits until at most kPending of the calling thread's groups are in flight. Other threads need a barrier besides.
template <int kPending>
RNN_EXT_DEVICE void copy_async_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  emu::async_wait(kPending);
#endif
}

}  // namespace rnn_ext::cuda
