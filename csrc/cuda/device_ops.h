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

// ---- clusters, mbarrier and st.async: sm_90 and later; kernels that use them are not compiled for less
// ---------------

RNN_EXT_DEVICE unsigned cluster_rank() {
#if defined(__CUDACC__)
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return emu::cluster_rank();
#endif
}

// A barrier of all threads of the cluster, in two halves: what lies between them overlaps the other blocks' arrival.
RNN_EXT_DEVICE void cluster_arrive(RNN_EXT_CALLER) {
#if defined(__CUDACC__)
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
  emu::cluster_arrive(EMU_SITE);
#endif
}
RNN_EXT_DEVICE void cluster_wait(RNN_EXT_CALLER) {
#if defined(__CUDACC__)
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  emu::cluster_wait(EMU_SITE);
#endif
}

#if defined(__CUDACC__)
RNN_EXT_DEVICE unsigned shared_address(const void* own) { return static_cast<unsigned>(__cvta_generic_to_shared(own)); }
RNN_EXT_DEVICE unsigned shared_address_in(const void* own, unsigned rank) {
  unsigned address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(own)), "r"(rank));
  return address;
}
#endif

// An mbarrier phase ends when `arrivals` threads have arrived and all the bytes they announced are here.
RNN_EXT_DEVICE void mbarrier_init(uint64_t* barrier, unsigned arrivals RNN_EXT_AND_CALLER) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  emu::mbarrier_init(barrier, arrivals, EMU_SITE);
#endif
}
RNN_EXT_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes RNN_EXT_AND_CALLER) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#else
  emu::mbarrier_arrive_expect(barrier, bytes, EMU_SITE);
#endif
}
// Waits for the phase of this parity (0, 1, 0, ..) to end. What st.async brought in that phase is then visible.
RNN_EXT_DEVICE void mbarrier_wait(uint64_t* barrier, unsigned parity RNN_EXT_AND_CALLER) {
#if defined(__CUDACC__)
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again_%=: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again_%=;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#else
  emu::mbarrier_wait(barrier, parity, EMU_SITE);
#endif
}

// Stores 16 bytes to the place of `to` in the block of that rank and counts them on its copy of `barrier`. No fence.
RNN_EXT_DEVICE void store_async_16(void* to, uint4 value, uint64_t* barrier, unsigned rank RNN_EXT_AND_CALLER) {
#if defined(__CUDACC__)
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   shared_address_in(to, rank)),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(shared_address_in(barrier, rank))
               : "memory");
#else
  emu::async_store(to, &value, 16, barrier, rank, EMU_SITE);
#endif
}

}  // namespace rnn_ext::cuda
