// What the kernels of csrc/cuda do not use yet, used correctly: the emulator must run it without a report and give the
// right numbers in every build and schedule. nvcc compiles it too (sm_90 and later), so that the PTX of device_ops.h is
// checked.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "cuda/device_ops.h"

namespace {

using namespace rnn_ext::cuda;

constexpr int kThreads = 32, kBlocks = 4, kFloats = 4 * kThreads;

// Sums `rounds` chunks of 4 floats per thread through a double buffer filled by cp.async.
__global__ void __launch_bounds__(kThreads) copy_pipeline(const float* in, float* out, int rounds) {
  RNN_EXT_SHARED(float, buffers, 2 * kFloats);
  const int thread = static_cast<int>(threadIdx.x);
  const auto fetch = [&](int round) {
    if (round < rounds)
      copy_async_16(buffers + round % 2 * kFloats + 4 * thread, in + round * kFloats + 4 * thread, 16);
    copy_async_commit();  // empty past the end: the count of groups stays the same
  };
  float sum = 0;
  fetch(0);
  for (int round = 0; round < rounds; ++round) {
    fetch(round + 1);
    copy_async_wait<1>();
    __syncthreads();
    sum += buffers[round % 2 * kFloats + (4 * thread + 5) % kFloats];  // a neighbour's
    __syncthreads();
  }
  out[thread] = sum;
}

// Every block of a cluster sends its value to all blocks (itself too) each round and adds up what it was sent: the
// exchange that a cluster kernel does with h. No barrier in the loop but the mbarriers.
__global__ void __launch_bounds__(kThreads) cluster_exchange(float* out, int rounds) {
  RNN_EXT_SHARED(float, received, 2 * kBlocks * 4);
  RNN_EXT_SHARED(uint64_t, full, 2);
  const int thread = static_cast<int>(threadIdx.x);
  const unsigned rank = cluster_rank();
  constexpr unsigned kBytes = kBlocks * 16;
  if (thread == 0) {
    for (int buffer = 0; buffer < 2; ++buffer) {
      mbarrier_init(&full[buffer], 1);
      mbarrier_arrive_expect(&full[buffer], kBytes);
    }
  }
  cluster_arrive();
  cluster_wait();
  float sum = static_cast<float>(rank);
  for (int round = 0; round < rounds; ++round) {
    const int buffer = round % 2;
    if (thread < kBlocks) {
      uint4 value{};
      value.x = static_cast<unsigned>(sum);
      store_async_16(received + (buffer * kBlocks + static_cast<int>(rank)) * 4, value, &full[buffer],
                     static_cast<unsigned>(thread));
    }
    mbarrier_wait(&full[buffer], static_cast<unsigned>(round / 2 % 2));
    sum = 0;
    for (int block = 0; block < kBlocks; ++block) {
      sum += static_cast<float>(reinterpret_cast<const unsigned*>(received)[(buffer * kBlocks + block) * 4] % 97);
    }
    __syncthreads();  // read by all: the buffer may be filled again
    if (thread == 0 && round + 2 < rounds) mbarrier_arrive_expect(&full[buffer], kBytes);
    __syncthreads();  // armed before anything of the next round is sent from here
  }
  cluster_arrive();
  cluster_wait();
  if (thread == 0) out[blockIdx.x] = sum;
}

}  // namespace

#if !defined(__CUDACC__)
int main() {
  constexpr int kRounds = 5;
  std::vector<float> in(kRounds * kFloats), out(kThreads, NAN), totals(kBlocks, NAN);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i % 13);
  LaunchConfig one;
  one.grid = dim3(1);
  one.block = dim3(kThreads);
  if (launch("copy_pipeline", &copy_pipeline, one, in.data(), out.data(), kRounds)) return 2;
  for (int thread = 0; thread < kThreads; ++thread) {
    float sum = 0;
    for (int round = 0; round < kRounds; ++round)
      sum += in[static_cast<size_t>(round * kFloats + (4 * thread + 5) % kFloats)];
    if (out[static_cast<size_t>(thread)] != sum) return 3;
  }
  LaunchConfig cluster = one;
  cluster.grid = dim3(kBlocks);
  cluster.cluster = kBlocks;
  if (launch("cluster_exchange", &cluster_exchange, cluster, totals.data(), kRounds)) return 4;
  unsigned value = 0 + 1 + 2 + 3;  // after the first round all blocks hold the same
  for (int round = 1; round < kRounds; ++round) value = kBlocks * (value % 97);
  for (const float total : totals) {
    if (total != static_cast<float>(value)) return 5;
  }
  return 0;
}
#else
const void* kernels[] = {reinterpret_cast<const void*>(&copy_pipeline),
                         reinterpret_cast<const void*>(&cluster_exchange)};
#endif
