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
inline cudaError_t allow_shared_bytes(const void* kernel, size_t bytes) {
  constexpr size_t kSharedWithoutAsking = 48 * 1024;
  if (bytes <= kSharedWithoutAsking) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}
#endif

// Queues the kernel on the stream. Returns null, or what CUDA says is wrong.
template <class... Params, class... Args>
const char* launch(const char* name, void (*kernel)(Params...), const LaunchConfig& config, Args&&... args) {
#if defined(__CUDACC__)
  (void)name;
  cudaError_t error = allow_shared_bytes(reinterpret_cast<const void*>(kernel), config.shared_bytes);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return describe(error);
  }
  cudaLaunchAttribute attributes[2];
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
  cudaLaunchConfig_t queued{};
  queued.gridDim = config.grid;
  queued.blockDim = config.block;
  queued.dynamicSmemBytes = config.shared_bytes;
  queued.stream = config.stream;
  queued.attrs = attributes;
  queued.numAttrs = count;
  error = cudaLaunchKernelEx(&queued, kernel, static_cast<Params>(args)...);
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

// Null, or what is wrong with a device.
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
  int current = 0;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    error = cudaFuncGetAttributes(&attributes, kernel);
    cudaSetDevice(current);
  }
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return describe(error);
#else
  static_cast<void>(kernel);
  return select_device(device);
#endif
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

// How many blocks of a kernel the current device holds at once, that is how many a cooperative launch can have.
template <class... Params>
int64_t resident_blocks(void (*kernel)(Params...), int threads, size_t shared_bytes) {
#if defined(__CUDACC__)
  int of_each = 0;
  cudaError_t error = allow_shared_bytes(reinterpret_cast<const void*>(kernel), shared_bytes);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_each, kernel, threads, shared_bytes);
  }
  if (error == cudaSuccess) return of_each * multiprocessors();
  cudaGetLastError();
  return 0;
#else
  static_cast<void>(kernel);
  return emu::resident_blocks(static_cast<size_t>(threads), shared_bytes);
#endif
}

}  // namespace rnn_ext::cuda
