// CUDA C++ as kernels write it (threadIdx, __syncthreads, shuffles, intrinsics), on top of emulator.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __shared__ static_assert(false, "declare shared memory with the macros of shim.h");

#define threadIdx (::emu::current->thread)
#define blockIdx (::emu::current->block)
#define blockDim (::emu::current->block_dim)
#define gridDim (::emu::current->grid_dim)

inline void __syncthreads(EMU_CALLER) { emu::block_barrier(0, 0, EMU_SITE); }
inline int __syncthreads_or(int predicate, EMU_CALLER) { return emu::block_vote(predicate, 0, EMU_SITE); }
inline int __syncthreads_and(int predicate, EMU_CALLER) { return emu::block_vote(predicate, 1, EMU_SITE); }
inline int __syncthreads_count(int predicate, EMU_CALLER) { return emu::block_vote(predicate, 2, EMU_SITE); }
inline void __syncwarp(uint32_t mask, EMU_CALLER) {
  const uint32_t nothing = 0;
  emu::warp_exchange(mask, &nothing, 1, emu::kSync, EMU_SITE);
}

namespace emu {

// Every lane of the mask gives a value and takes that of lane `from` (its own where from < 0).
template <class T>
T shuffle(uint32_t mask, T value, int from, WarpOp op, Site site) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "shuffles move scalars of up to 8 bytes");
  uint32_t words[2] = {0, 0};
  std::memcpy(words, &value, sizeof(T));
  const WarpWords all = warp_exchange(mask, words, 2, op, site);
  if (from < 0) return value;
  if (!(mask >> from & 1u)) fail("shuffle reads a lane outside its mask", site);
  std::memcpy(&value, all[from], sizeof(T));
  return value;
}
inline int lane() { return static_cast<int>(current->lane); }
inline int segment(int width) { return lane() & ~(width - 1); }

// ldmatrix.x4: every lane gives a row of 16 bytes, and takes of each matrix its two values.
inline void load_matrices(uint32_t (&to)[4], const void* row, Site site) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("misaligned ldmatrix", site);
  uint32_t words[4];
  std::memcpy(words, row, sizeof words);
  const WarpWords all = warp_exchange(0xffffffffu, words, 4, kLoadMatrix, site);
  for (int matrix = 0; matrix < 4; ++matrix) to[matrix] = all[matrix * 8 + lane() / 4][lane() % 4];
}

}  // namespace emu

template <class T>
T __shfl_sync(uint32_t mask, T value, int from, int width = 32, EMU_CALLER) {
  return emu::shuffle(mask, value, emu::segment(width) | (from & (width - 1)), emu::kShuffle, EMU_SITE);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, EMU_CALLER) {
  const int from = emu::lane() ^ bits;
  return emu::shuffle(mask, value, from < emu::segment(width) + width ? from : -1, emu::kShuffleXor, EMU_SITE);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, EMU_CALLER) {
  const int from = emu::lane() + static_cast<int>(delta);
  return emu::shuffle(mask, value, from < emu::segment(width) + width ? from : -1, emu::kShuffleDown, EMU_SITE);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, EMU_CALLER) {
  const int from = emu::lane() - static_cast<int>(delta);
  return emu::shuffle(mask, value, from >= emu::segment(width) ? from : -1, emu::kShuffleUp, EMU_SITE);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, EMU_CALLER) {
  const uint32_t vote = predicate != 0;
  const emu::WarpWords all = emu::warp_exchange(mask, &vote, 1, emu::kVote, EMU_SITE);
  uint32_t result = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1u && all[lane][0]) result |= 1u << lane;
  }
  return result;
}

template <class T>
T atomicAdd(T* address, T value) {
  static_assert(std::is_integral<T>::value, "results never use floating-point atomics");
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline void __nanosleep(unsigned, EMU_CALLER) { emu::spin(EMU_SITE); }

template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
void __stcg(T* address, T value) {
  *address = value;
}
