// Kernels with one mistake each. The emulator, a sanitizer or a NaN in the result must give every one of them away
// (tests/test_cuda_emulator.py). Run one: bad_kernels NAME; without a name it lists them.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/device_ops.h"

namespace {

using namespace rnn_ext::cuda;

constexpr int kThreads = 64;
constexpr unsigned kAll = 0xffffffffu;

int thread_index() { return static_cast<int>(threadIdx.x); }

__global__ void missing_barrier(float* out) {
  RNN_EXT_SHARED(float, values, kThreads);
  values[thread_index()] = 1;
  out[thread_index()] = values[kThreads - 1 - thread_index()];
}

__global__ void missing_second_barrier(float* out) {  // the next round overwrites what others still read
  RNN_EXT_SHARED(float, values, kThreads);
  float sum = 0;
  for (int round = 0; round < 3; ++round) {
    values[thread_index()] = static_cast<float>(round);
    __syncthreads();
    sum += values[kThreads - 1 - thread_index()];
  }
  out[thread_index()] = sum;
}

__global__ void dynamic_shared_out_of_bounds(float* out) {
  RNN_EXT_DYNAMIC_SHARED(memory);
  auto* values = reinterpret_cast<float*>(memory);
  values[thread_index() + 1] = 1;
  __syncthreads();
  out[thread_index()] = values[thread_index() ? thread_index() : 1];
}

__global__ void static_shared_out_of_bounds(float* out) {
  RNN_EXT_SHARED(float, values, kThreads - 1);
  float* address = values;
  address[thread_index()] = 1;
  __syncthreads();
  out[thread_index()] = address[0];
}

__global__ void global_out_of_bounds(float* out) { out[thread_index() + 1] = 1; }

__global__ void uninitialised_shared(float* out) {
  RNN_EXT_SHARED(float, values, kThreads);
  if (thread_index()) values[thread_index()] = 0;
  __syncthreads();
  out[thread_index()] = values[thread_index()];
}

__global__ void unwritten_output(float* out) {
  if (thread_index()) out[thread_index()] = 1;
}

__global__ void barrier_in_a_branch(float* out) {
  if (thread_index() < kThreads / 2) __syncthreads();
  out[thread_index()] = 1;
}

__global__ void barrier_in_two_places(float* out) {
  if (thread_index() < kThreads / 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[thread_index()] = 1;
}

__global__ void barrier_after_an_exit(float* out) {
  if (thread_index() == 0) return;
  __syncthreads();
  out[thread_index()] = 1;
}

__global__ void shuffle_in_a_branch(float* out) {
  float value = 1;
  if (thread_index() < 16) value = __shfl_xor_sync(kAll, value, 1);
  out[thread_index()] = value;
}

__global__ void shuffle_outside_its_mask(float* out) { out[thread_index()] = __shfl_down_sync(0x0000ffffu, 1.f, 1); }

__global__ void shuffle_as_a_barrier(float* out) {
  RNN_EXT_SHARED(float, values, kThreads);
  values[thread_index()] = 1;
  const float value = __shfl_xor_sync(kAll, 1.f, 1);
  out[thread_index()] = value + values[thread_index() ^ 1];
}

__global__ void copy_without_wait(float* out) {
  RNN_EXT_SHARED(float, values, 4 * kThreads);
  copy_async_16(values + 4 * thread_index(), out + 4 * thread_index(), 16);
  copy_async_commit();
  __syncthreads();
  const float value = values[4 * kThreads - 1 - thread_index()];
  copy_async_wait<0>();
  __syncthreads();
  out[thread_index()] = value;
}

__global__ void copy_wait_without_barrier(float* out) {
  RNN_EXT_SHARED(float, values, 4 * kThreads);
  copy_async_16(values + 4 * thread_index(), out + 4 * thread_index(), 16);
  copy_async_commit();
  copy_async_wait<0>();
  const float value = values[4 * (kThreads - 1 - thread_index())];
  __syncthreads();
  out[4 * thread_index()] = value;
}

__global__ void copy_never_committed(float* out) {
  RNN_EXT_SHARED(float, values, 4 * kThreads);
  copy_async_16(values + 4 * thread_index(), out + 4 * thread_index(), 16);
  out[4 * thread_index()] = 1;
}

__global__ void misaligned_vector(float* out) {
  const auto value = *reinterpret_cast<const float4*>(out + 1);
  out[thread_index()] = value.x;
}

__global__ void blocks_race(float* out) {
  if (thread_index() == 0) out[blockIdx.x] = 1;
  if (thread_index() == 1) out[2 + blockIdx.x] = out[1 - blockIdx.x];
}

__global__ void relaxed_flag(float* out) {  // the flag is atomic but orders nothing
  auto* flag = reinterpret_cast<unsigned*>(out + kThreads);
  if (thread_index()) return;
  if (blockIdx.x == 0) {
    out[0] = 3;
    atomicAdd(flag, 1u);
  } else {
    while (atomicAdd(flag, 0u) == 0) __nanosleep(20);
    out[1] = out[0];
  }
}

__global__ void waits_for_ever(float* out) {
  auto* flag = reinterpret_cast<unsigned*>(out + kThreads);
  while (atomicAdd(flag, 0u) != 77) __nanosleep(20);
}

__global__ void more_than_can_wait(float* out) {  // no grid of so many blocks is all resident
  auto* flags = reinterpret_cast<unsigned*>(out);
  if (thread_index()) return;
  store_release(flags + blockIdx.x, 1u);
  wait_until(flags + (blockIdx.x + 1) % gridDim.x, 1u);
}

struct Mistake {
  const char* name;
  void (*kernel)(float*);
  size_t numbers;  // of the output
  unsigned blocks;
  size_t shared_bytes;
  bool cooperative = false;
};

#define MISTAKE(name, numbers, blocks, shared) {#name, &name, numbers, blocks, shared}
const Mistake kMistakes[] = {
    MISTAKE(missing_barrier, kThreads, 1, 0),
    MISTAKE(missing_second_barrier, kThreads, 1, 0),
    MISTAKE(dynamic_shared_out_of_bounds, kThreads, 1, kThreads * sizeof(float)),
    MISTAKE(static_shared_out_of_bounds, kThreads, 1, 0),
    MISTAKE(global_out_of_bounds, kThreads, 1, 0),
    MISTAKE(uninitialised_shared, kThreads, 1, 0),
    MISTAKE(unwritten_output, kThreads, 1, 0),
    MISTAKE(barrier_in_a_branch, kThreads, 1, 0),
    MISTAKE(barrier_in_two_places, kThreads, 1, 0),
    MISTAKE(barrier_after_an_exit, kThreads, 1, 0),
    MISTAKE(shuffle_in_a_branch, kThreads, 1, 0),
    MISTAKE(shuffle_outside_its_mask, kThreads, 1, 0),
    MISTAKE(shuffle_as_a_barrier, kThreads, 1, 0),
    MISTAKE(copy_without_wait, 4 * kThreads, 1, 0),
    MISTAKE(copy_wait_without_barrier, 4 * kThreads, 1, 0),
    MISTAKE(copy_never_committed, 4 * kThreads, 1, 0),
    MISTAKE(misaligned_vector, 2 * kThreads, 1, 0),
    MISTAKE(blocks_race, kThreads, 2, 0),
    MISTAKE(relaxed_flag, kThreads + 1, 2, 0),
    MISTAKE(waits_for_ever, kThreads + 1, 1, 0),
    {"more_than_can_wait", &more_than_can_wait, 133, 133, 200 * 1024, true},  // one on each of 132 multiprocessors
};

}  // namespace

int main(int count, char** arguments) {
  for (const Mistake& mistake : kMistakes) {
    if (count < 2) {
      std::puts(mistake.name);
      continue;
    }
    if (std::strcmp(arguments[1], mistake.name) != 0) continue;
    const bool starts_as_nan = mistake.kernel == &unwritten_output;
    std::vector<float> out(mistake.numbers, starts_as_nan ? NAN : 0.f);
    LaunchConfig config;
    config.grid = dim3(mistake.blocks);
    config.block = dim3(kThreads);
    config.shared_bytes = mistake.shared_bytes;
    config.cooperative = mistake.cooperative;
    if (launch(mistake.name, mistake.kernel, config, out.data())) return 2;
    for (const float value : out) {
      if (std::isnan(value)) {
        std::fprintf(stderr, "NaN in the result\n");
        return 1;
      }
    }
  }
  return 0;
}
