// What kernels do beyond plain C++: conversions, elementary functions, and every PTX instruction, each wrapped once
// with a twin for the emulator. The twins are written from the tables of the PTX manual, not from the kernels.
#pragma once

#include <type_traits>

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
  RNN_EXT_HD static V relu_backward(V dh, V h) { return h <= V(0) ? V(0) : dh; }
};

// ---- flags between blocks, in global memory -------------------------------------------------------------------------

// What the calling thread has written or, before a barrier of its block, others of the block have, is there for whoever
// sees the value.
RNN_EXT_DEVICE void store_release(unsigned* flag, unsigned value) {
#if defined(__CUDACC__)
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
#else
  __atomic_store_n(flag, value, __ATOMIC_RELEASE);
#endif
}
RNN_EXT_DEVICE unsigned load_acquire(const unsigned* flag) {
#if defined(__CUDACC__)
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
#else
  return __atomic_load_n(flag, __ATOMIC_ACQUIRE);
#endif
}
// Waits until a flag that only grows has come to `value`; both may pass 2^32. The block that sets it has to be
// resident.
RNN_EXT_DEVICE void wait_until(const unsigned* flag, unsigned value RNN_EXT_AND_CALLER) {
  while (static_cast<int>(load_acquire(flag) - value) < 0) {
#if !defined(__CUDACC__)
    emu::spin(EMU_SITE);
#endif
  }
}

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

// Calls the memory around an address into the L2 cache. Nothing waits for it, and nothing else changes.
RNN_EXT_DEVICE void prefetch_l2(const void* from) {
#if defined(__CUDACC__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
#else
  static_cast<void>(from);
#endif
}

// ---- a barrier of some warps of a block: `id` from 1 to 15 (0 is __syncthreads), `threads` a multiple of 32
// -----------

RNN_EXT_DEVICE void named_barrier(int id, int threads RNN_EXT_AND_CALLER) {
#if defined(__CUDACC__)
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  emu::block_barrier(id, threads, EMU_SITE);
#endif
}

// ---- tensor cores: mma.sync and the ldmatrix that feeds it. All 32 lanes take part.
// ----------------------------------

// Two neighbours of a row, the first in the lower half.
RNN_EXT_DEVICE uint32_t pack2(bfloat16 low, bfloat16 high) {
#if defined(__CUDACC__)
  return static_cast<uint32_t>(__bfloat16_as_ushort(low)) | static_cast<uint32_t>(__bfloat16_as_ushort(high)) << 16;
#else
  return uint32_t{low.bits} | uint32_t{high.bits} << 16;
#endif
}
RNN_EXT_DEVICE uint32_t pack2(float16 low, float16 high) {
#if defined(__CUDACC__)
  return static_cast<uint32_t>(__half_as_ushort(low)) | static_cast<uint32_t>(__half_as_ushort(high)) << 16;
#else
  return uint32_t{low.bits} | uint32_t{high.bits} << 16;
#endif
}

// The nearest TF32, ties away from zero: a float32 whose last 13 bits are zero.
RNN_EXT_DEVICE float round_to_tf32(float value) {
#if defined(__CUDACC__)
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7f800000u) != 0x7f800000u) bits += 0x1000u;  // infinities and NaN stay what they are
  bits &= ~0x1fffu;
  if (value != value) bits |= 0x7fc00000u;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
#endif
}
RNN_EXT_DEVICE uint32_t bits_of(float value) {
#if defined(__CUDACC__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

// Four 8x8 matrices of 16-bit values, or 8x4 of 32 bits. Lane l gives the address of row l % 8 of matrix l / 8, 16-byte
// aligned in shared memory, and gets of every matrix the (l % 4)-th 32 bits of row l / 4.
template <class T>
RNN_EXT_DEVICE void load_matrices(uint32_t (&to)[4], const T* row RNN_EXT_AND_CALLER) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4);
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
#else
  emu::load_matrices(to, row, EMU_SITE);
#endif
}

// d [16, 8] += a [16, 16] b [16, 8]. Fragments, with g = lane / 4 and t = lane % 4:
//   a[r]  row g + 8 (r % 2), columns 2 t + 8 (r / 2) and the next
//   b0, b1  rows 2 t and the next, and 8 further down; column g
//   d[i]  row g + 8 (i / 2), column 2 t + i % 2
// float, in TF32, of which the last 13 bits are not looked at: a [16, 8], b [8, 8]
//   a[r]  row g + 8 (r % 2), column t + 4 (r / 2)
//   b0, b1  row t, and 4 further down; column g
template <class T>
RNN_EXT_DEVICE void multiply_16x8(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 RNN_EXT_AND_CALLER) {
#if defined(__CUDACC__)
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else if constexpr (std::is_same_v<T, float>) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#else
  constexpr int kValues = 4 / static_cast<int>(sizeof(T));  // in a word
  const auto value = [](uint32_t word, int which) {
    if constexpr (kValues == 1) {
      float result;
      word &= ~0x1fffu;
      std::memcpy(&result, &word, sizeof result);
      return result;
    } else {
      return widen(T{static_cast<uint16_t>(which ? word >> 16 : word & 0xffffu)});
    }
  };
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const emu::WarpWords all = emu::warp_exchange(0xffffffffu, words, 6, emu::kMma, EMU_SITE);
  const int group = emu::lane() / 4, member = emu::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    double sum = d[i];
    for (int k = 0; k < 8 * kValues; ++k) {
      const int word = k / kValues % 4, half = k / kValues / 4;
      const uint32_t left = all[group * 4 + word][i / 2 + 2 * half];
      const uint32_t right = all[(2 * member + i % 2) * 4 + word][4 + half];
      sum += static_cast<double>(value(left, k % kValues)) * static_cast<double>(value(right, k % kValues));
    }
    d[i] = static_cast<float>(sum);
  }
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

RNN_EXT_DEVICE uint4 bits_of(const float (&values)[4]) {
  uint4 bits;
  memcpy(&bits, values, sizeof bits);
  return bits;
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
