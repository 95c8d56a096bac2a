// What the dispatch table of the CUDA kernels rests on, measured by itself: how long blocks take to agree.
//
//   nvcc -std=c++17 -O3 -arch=sm_90a -Icsrc benchmarks/gpu_micro.cu -o gpu_micro && ./gpu_micro
//
// Prints a JSON object, microseconds each: the smallest of a few runs of many rounds.
#include <cooperative_groups.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "cuda/device_ops.h"

namespace {

using namespace rnn_ext::cuda;

constexpr int kRuns = 5, kRounds = 4000, kThreads = 256;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// ---- kernels: each does `rounds` of one thing
// -------------------------------------------------------------------------

__global__ void nothing() {}

__global__ void grid_sync(int rounds) {
  for (int i = 0; i < rounds; ++i) cooperative_groups::this_grid().sync();
}

__device__ unsigned load_acquire(const unsigned* from) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
__device__ void store_release(unsigned* to, unsigned value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
__device__ void add_release(unsigned* to) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(to) : "memory");
}

// One counter, one thread a block: what a kernel would write by hand.
__global__ void counter_barrier(unsigned* counter, int rounds) {
  for (int i = 1; i <= rounds; ++i) {
    __syncthreads();
    if (threadIdx.x == 0) {
      add_release(counter);
      while (load_acquire(counter) < gridDim.x * i) {
      }
    }
    __syncthreads();
  }
}

// Two blocks answer each other through one flag each; a round is two hand-offs. Flags are a kilobyte apart.
__global__ void hand_off(unsigned* flags, int rounds) {
  if (threadIdx.x != 0) return;
  unsigned *mine = flags + blockIdx.x * 256, *other = flags + (blockIdx.x ^ 1) * 256;
  for (unsigned i = 1; i <= static_cast<unsigned>(rounds); ++i) {
    if (blockIdx.x == 0) store_release(mine, i);
    while (load_acquire(other) < i) {
    }
    if (blockIdx.x == 1) store_release(mine, i);
  }
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define RNN_EXT_CLUSTERS 1
#endif

__global__ void cluster_barrier(int rounds) {
#ifdef RNN_EXT_CLUSTERS
  for (int i = 0; i < rounds; ++i) {
    cluster_arrive();
    cluster_wait();
  }
#endif
}

// Every block sends `bytes` to every block of its cluster by st.async and waits for what all of them sent to it.
__global__ void all_to_all(int rounds, int bytes, int blocks) {
#ifdef RNN_EXT_CLUSTERS
  RNN_EXT_DYNAMIC_SHARED(memory);
  RNN_EXT_SHARED(uint64_t, barriers, 2);
  const unsigned all = static_cast<unsigned>(bytes * blocks);
  if (threadIdx.x == 0) {
    for (int b = 0; b < 2; ++b) {
      mbarrier_init(&barriers[b], 1);
      mbarrier_arrive_expect(&barriers[b], all);
    }
  }
  cluster_arrive();
  cluster_wait();
  const unsigned rank = cluster_rank();
  for (int i = 0; i < rounds; ++i) {
    unsigned char* to = memory + (i & 1) * all + rank * static_cast<unsigned>(bytes);
    for (int at = static_cast<int>(threadIdx.x) * 16; at < bytes; at += static_cast<int>(blockDim.x) * 16) {
      for (int r = 0; r < blocks; ++r) {
        store_async_16(to + at, uint4{1, 2, 3, 4}, &barriers[i & 1], static_cast<unsigned>(r));
      }
    }
    mbarrier_wait(&barriers[i & 1], static_cast<unsigned>(i >> 1 & 1));
    // The others cannot send into this buffer before they have this block's next round, which comes after the
    // re-arming.
    __syncthreads();
    if (threadIdx.x == 0) mbarrier_arrive_expect(&barriers[i & 1], all);
    __syncthreads();
  }
  cluster_arrive();
  cluster_wait();
#endif
}

// ---- timing
// -----------------------------------------------------------------------------------------------------------

struct Timer {
  cudaEvent_t begin, end;
  Timer() {
    check(cudaEventCreate(&begin), "event");
    check(cudaEventCreate(&end), "event");
  }
  template <class Queue>
  double microseconds(int rounds, const Queue& queue) const {
    double best = 1e30;
    for (int run = 0; run <= kRuns; ++run) {  // the first is for warming up
      check(cudaEventRecord(begin), "event");
      queue();
      check(cudaEventRecord(end), "event");
      check(cudaEventSynchronize(end), "kernel");
      float milliseconds = 0;
      check(cudaEventElapsedTime(&milliseconds, begin, end), "event");
      if (run > 0) best = std::min(best, 1e3 * static_cast<double>(milliseconds) / rounds);
    }
    return best;
  }
};

template <class... Params>
bool launch_clusters(void (*kernel)(Params...), int blocks, int clusters, size_t shared_bytes, Params... params) {
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks * clusters));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  if (blocks > 8) check(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "attribute");
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
        "attribute");
  int possible = 0;
  if (cudaOccupancyMaxActiveClusters(&possible, kernel, &config) != cudaSuccess || possible < 1) {
    cudaGetLastError();
    return false;
  }
  check(cudaLaunchKernelEx(&config, kernel, params...), "launch");
  return true;
}

bool first = true;
void print(const char* name, double microseconds) {
  std::printf("%s\n  \"%s\": %.4f", first ? "{" : ",", name, microseconds);
  first = false;
}

}  // namespace

int main() {
  int device = 0, processors = 0, major = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "device");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "device");
  const Timer timer;
  unsigned* words = nullptr;
  check(cudaMalloc(&words, 4096), "memory");
  const auto clear = [&] { check(cudaMemsetAsync(words, 0, 4096), "memset"); };

  print("launch", timer.microseconds(kRounds, [] {
    for (int i = 0; i < kRounds; ++i) nothing<<<1, 32>>>();
  }));
  int rounds = kRounds;
  for (const int blocks : {processors / 4, processors}) {
    char name[64];
    void* params[] = {&rounds};
    std::snprintf(name, sizeof name, "grid.sync, %d blocks", blocks);
    print(name, timer.microseconds(kRounds, [&] {
      check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(&grid_sync), dim3(static_cast<unsigned>(blocks)),
                                        dim3(kThreads), params, 0, nullptr),
            "launch");
    }));
    void* with_words[] = {&words, &rounds};
    std::snprintf(name, sizeof name, "counter barrier, %d blocks", blocks);
    print(name, timer.microseconds(kRounds, [&] {
      clear();
      check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(&counter_barrier),
                                        dim3(static_cast<unsigned>(blocks)), dim3(kThreads), with_words, 0, nullptr),
            "launch");
    }));
  }
  print("flag hand-off, one way", timer.microseconds(2 * kRounds, [&] {
    clear();
    void* params[] = {&words, &rounds};
    check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(&hand_off), dim3(2), dim3(32), params, 0, nullptr),
          "launch");
  }));
  for (int blocks = 2; major >= 9 && blocks <= 16; blocks *= 2) {
    char name[64];
    const int clusters = std::max(1, processors / blocks / 2);  // so that all are resident, whatever the grouping
    if (!launch_clusters(&cluster_barrier, blocks, clusters, 0, 1)) continue;
    std::snprintf(name, sizeof name, "cluster barrier, %d blocks", blocks);
    print(name, timer.microseconds(kRounds, [&] { launch_clusters(&cluster_barrier, blocks, clusters, 0, rounds); }));
    for (int bytes = 1024; bytes <= 16384; bytes *= 4) {
      const size_t shared = 2 * static_cast<size_t>(bytes) * static_cast<size_t>(blocks);
      if (shared > 200 * 1024) continue;
      std::snprintf(name, sizeof name, "st.async all-to-all, %d blocks, %d KB each", blocks, bytes / 1024);
      print(name, timer.microseconds(
                      kRounds, [&] { launch_clusters(&all_to_all, blocks, clusters, shared, rounds, bytes, blocks); }));
    }
  }
  std::printf("\n}\n");
  check(cudaFree(words), "memory");
  return 0;
}
