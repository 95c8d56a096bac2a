// The only way kernel sources reach CUDA. nvcc gets the real thing; any other compiler gets the emulator of
// tests/cuda_emulator, which must then be on the include path.
//
// Here: launches, shared memory, storage types. In device_ops.h: everything that would be inline PTX.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <set>
#else
#include <tuple>

#include "cuda_builtins.h"
#endif

// Shared memory is 16-byte aligned and, in the emulator, NaN until written.
#if defined(__CUDACC__)
#define RNN_EXT_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define RNN_EXT_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else
#define RNN_EXT_SHARED(type, name, count) \
  static const char name##_key = 0;       \
  type(&name)[count] = *static_cast<type(*)[count]>(::emu::static_shared(&name##_key, sizeof(type[count])))
#define RNN_EXT_DYNAMIC_SHARED(name) auto* name = static_cast<unsigned char*>(::emu::dynamic_shared())
#endif

namespace rnn_ext::cuda {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

#if defined(__CUDACC__)
inline const char* describe(cudaError_t error) {
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion) {
    return "the library has no code for this GPU (no kernel image): build it again with RNN_EXT_CUDA_ARCHS set to the "
           "GPU's compute capability";
  }
  if (error == cudaErrorInsufficientDriver) {
    return "the GPU's driver is older than the CUDA release that compiled the library: update it, or build again with "
           "an "
           "nvcc of the release that torch.version.cuda names";
  }
  return cudaGetErrorString(error);
}
#endif

struct LaunchConfig {
  dim3 grid, block;
  size_t shared_bytes = 0;  // dynamic
  cudaStream_t stream = nullptr;
  unsigned cluster = 1;      // blocks along x that form a cluster (sm_90 and later)
  bool cooperative = false;  // all blocks resident at once
};

#if defined(__CUDACC__)
// All that the current device has, once: what one thread needs for its launch, another must not take back. (The kernels
// that ask have no static shared memory.)
inline cudaError_t allow_shared_bytes(const void* kernel, size_t bytes) {
  constexpr size_t kSharedWithoutAsking = 48 * 1024;
  if (bytes <= kSharedWithoutAsking) return cudaSuccess;
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  const std::lock_guard<std::mutex> lock(mutex);
  if (error != cudaSuccess || allowed.count({kernel, device})) return error;
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess) allowed.insert({kernel, device});
  return error;
}

// Tells CUDA what a kernel is to have beyond the ordinary, and fills in the launch. `attributes` stays with it.
inline cudaError_t prepare(const void* kernel, const LaunchConfig& config, cudaLaunchAttribute (&attributes)[2],
                           cudaLaunchConfig_t& queued) {
  constexpr unsigned kPortableCluster = 8;
  cudaError_t error = allow_shared_bytes(kernel, config.shared_bytes);
  if (error == cudaSuccess && config.cluster > kPortableCluster)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  unsigned count = 0;
  if (config.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  if (config.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = config.cluster;
    attributes[count].val.clusterDim.y = 1;
    attributes[count++].val.clusterDim.z = 1;
  }
  queued.gridDim = config.grid;
  queued.blockDim = config.block;
  queued.dynamicSmemBytes = config.shared_bytes;
  queued.stream = config.stream;
  queued.attrs = attributes;
  queued.numAttrs = count;
  return error;
}
#endif

// Queues the kernel on the stream. Returns null, or what CUDA says is wrong.
template <class... Params, class... Args>
const char* launch(const char* name, void (*kernel)(Params...), const LaunchConfig& config, Args&&... args) {
#if defined(__CUDACC__)
  (void)name;
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t queued{};
  cudaError_t error = prepare(reinterpret_cast<const void*>(kernel), config, attributes, queued);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&queued, kernel, static_cast<Params>(args)...);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported here: the caller's next check must not see it again
  return describe(error);
#else
  emu::LaunchConfig emulated;
  emulated.grid = config.grid;
  emulated.block = config.block;
  emulated.shared_bytes = config.shared_bytes;
  emulated.cluster = config.cluster;
  emulated.cooperative = config.cooperative;
  const std::tuple<Params...> params{static_cast<Params>(args)...};
  emu::run(emulated, [&] { std::apply(kernel, params); }, name);
  return nullptr;
#endif
}

// Whether this compilation is for a device with thread-block clusters. Where not, the kernels that need them are empty
// (clusters_missing says so before one is launched).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr bool kCompilesClusters = false;
#else
inline constexpr bool kCompilesClusters = true;
#endif

// Null, or why the current device cannot hold one cluster of this launch.
inline const char* clusters_missing(const void* kernel, const LaunchConfig& config) {
#if defined(__CUDACC__)
  // CUDA is asked once for each kernel and device, unless it cannot say.
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, const char*> answers;
  int device = 0, has_clusters = 0, clusters = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return describe(error);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [answer, is_new] = answers.try_emplace({kernel, device}, nullptr);
  if (!is_new) return answer->second;

  cudaFuncAttributes compiled;
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t queued{};
  cudaError_t error = cudaDeviceGetAttribute(&has_clusters, cudaDevAttrClusterLaunch, device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&compiled, kernel);
  if (error == cudaSuccess && has_clusters && compiled.ptxVersion >= 90) {
    error = prepare(kernel, config, attributes, queued);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &queued);
  }
  if (error != cudaSuccess) {
    cudaGetLastError();
    answers.erase(answer);
    return describe(error);
  }
  if (!has_clusters) {
    answer->second = "this GPU has no thread-block clusters (compute capability 9.0 and later do)";
  } else if (compiled.ptxVersion < 90) {
    answer->second =
        "the library has no code with clusters for this GPU: build it again with RNN_EXT_CUDA_ARCHS set to the GPU's "
        "compute capability";
  } else if (clusters < 1) {
    answer->second = "this GPU cannot hold one of them";
  }
  return answer->second;
#else
  static_cast<void>(kernel);
  if (emu::largest_cluster() == 1) return "this GPU has no thread-block clusters (compute capability 9.0 and later do)";
  return config.cluster <= emu::largest_cluster() ? nullptr : "this GPU cannot hold one of them";
#endif
}

// Null, or what is wrong with a device, which becomes the current one.
inline const char* select_device(int device) {
#if defined(__CUDACC__)
  const cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return describe(error);
#else
  return device == 0 ? nullptr : "the emulator is one device";
#endif
}
inline const char* check_device(int device, const void* kernel) {
#if defined(__CUDACC__)
  int major = 0;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess && major < 8) return "the kernels need compute capability 8.0 or later";
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return describe(error);
#else
  static_cast<void>(kernel);
  return select_device(device);
#endif
}

// Whether what is queued on the stream goes to a CUDA graph that is being captured.
inline bool is_capturing(cudaStream_t stream) {
#if defined(__CUDACC__)
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &status) == cudaSuccess) return status != cudaStreamCaptureStatusNone;
  cudaGetLastError();
#endif
  static_cast<void>(stream);
  return false;
}

// Bytes of shared memory one block of the current device can have; 0 if there is no device.
inline int64_t shared_bytes_per_block() {
#if defined(__CUDACC__)
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
  return bytes;
#else
  return emu::shared_bytes_per_block();
#endif
}

// Of the current device; 0 if there is none.
inline int64_t multiprocessors() {
#if defined(__CUDACC__)
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 0;
  return count;
#else
  return emu::multiprocessors();
#endif
}

// How many blocks of a kernel the current device holds at once, that is how many a cooperative launch can have;
// `problem` is set where CUDA cannot say.
template <class... Params>
int64_t resident_blocks(void (*kernel)(Params...), int threads, size_t shared_bytes, const char*& problem) {
#if defined(__CUDACC__)
  int of_each = 0;
  cudaError_t error = allow_shared_bytes(reinterpret_cast<const void*>(kernel), shared_bytes);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_each, kernel, threads, shared_bytes);
  }
  if (error == cudaSuccess) return of_each * multiprocessors();
  cudaGetLastError();
  problem = describe(error);
  return 0;
#else
  static_cast<void>(kernel);
  static_cast<void>(problem);
  return emu::resident_blocks(static_cast<size_t>(threads), shared_bytes);
#endif
}

}  // namespace rnn_ext::cuda
