// The host side of `cluster` for one storage type: one launch for all timesteps and directions.
#pragma once

#include <cstdio>
#include <type_traits>

#include "cuda/cluster_backward.h"
#include "cuda/cluster_kernels.h"
#include "cuda/tensor_launch.h"

namespace rnn_ext::cuda {

// A kernel, and the launch that it is compiled for.
template <class Pointers>
struct ClusterKernel {
  void (*kernel)(PersistentLayer<Pointers>);
  int blocks, threads;

  LaunchConfig config(int64_t clusters, int directions) const {
    LaunchConfig result;
    result.grid = dim3(static_cast<unsigned>(clusters * blocks), static_cast<unsigned>(directions));
    result.block = dim3(static_cast<unsigned>(threads));
    result.cluster = static_cast<unsigned>(blocks);
    return result;
  }
};

// Few sizes are compiled, up to max_cluster_hidden: a layer between two of them multiplies by zeros.
template <class Cell, class T>
constexpr auto cluster_depths() {
  if constexpr (Cell::kGates == 1) {
    return std::integer_sequence<int, 16, 32>{};
  } else if constexpr (sizeof(T) == 4) {
    return std::integer_sequence<int, 8, 16, 24>{};
  } else if constexpr (Cell::kGates == 4) {
    return std::integer_sequence<int, 8, 16, 24, 32>{};
  } else {
    return std::integer_sequence<int, 16, 24, 32>{};
  }
}

template <class Pointers, class T>
ClusterKernel<Pointers> cluster_kernel_of(RnnExtCell cell, int64_t hidden) {
  return for_cell(cell, [&](auto of) {
    using Cell = decltype(of);
    return for_depth(cluster_depths<Cell, T>(), hidden, [](auto depth) -> ClusterKernel<Pointers> {
      constexpr int kDepth = decltype(depth)::value;
      constexpr int kBlocks = cluster_blocks(Cell::kGates, sizeof(T), kDepth * kTensorUnits);
      if constexpr (std::is_same_v<Pointers, ForwardPointers<T>>) {
        return {&cluster_forward_kernel<Cell, T, kDepth, kBlocks>, kBlocks,
                ClusterShape<Cell, T, kDepth, kBlocks>::kThreads};
      } else {
        return {&cluster_backward_kernel<Cell, T, kDepth, kBlocks>, kBlocks,
                ClusterBackwardShape<Cell, T, kDepth, kBlocks>::kThreads};
      }
    });
  });
}

template <class T, class Pointers, class Args>
int launch_cluster(const char* name, const Args& args, cudaStream_t stream, RnnExtError* error) {
  const auto layer = persistent_layer<T>(args);
  const auto chosen = cluster_kernel_of<Pointers, T>(args.cell, layer.hidden);
  const int64_t clusters = (layer.batch + kClusterRows - 1) / kClusterRows;
  if (layer.length >= INT32_MAX || clusters * chosen.blocks > INT32_MAX) {
    std::snprintf(error->message, sizeof error->message, "%s: %lld timesteps of batch %lld are too many for one launch",
                  name, static_cast<long long>(layer.length), static_cast<long long>(layer.batch));
    return 1;
  }
  LaunchConfig config = chosen.config(clusters, args.directions);
  config.stream = stream;
  const char* problem = clusters_missing(reinterpret_cast<const void*>(chosen.kernel), config);
  if (!problem) problem = launch(name, chosen.kernel, config, layer);
  if (problem) {
    std::snprintf(error->message, sizeof error->message, "%s with clusters of %d blocks: %s", name, chosen.blocks,
                  problem);
  }
  return problem != nullptr;
}

template <class T>
int cluster_forward(const RnnExtForward& args, cudaStream_t stream, RnnExtError* error) {
  return launch_cluster<T, ForwardPointers<T>>("cluster_forward", args, stream, error);
}

template <class T>
int cluster_backward(const RnnExtBackward& args, cudaStream_t stream, RnnExtError* error) {
  return launch_cluster<T, BackwardPointers<T>>("cluster_backward", args, stream, error);
}

template <class T>
const char* cluster_missing(RnnExtCell cell, int64_t hidden, bool backward) {
  const auto missing = [](const auto& chosen) {
    return clusters_missing(reinterpret_cast<const void*>(chosen.kernel), chosen.config(1, 1));
  };
  return backward ? missing(cluster_kernel_of<BackwardPointers<T>, T>(cell, hidden))
                  : missing(cluster_kernel_of<ForwardPointers<T>, T>(cell, hidden));
}

#define RNN_EXT_INSTANTIATE_CLUSTER(T)                                                 \
  template int cluster_forward<T>(const RnnExtForward&, cudaStream_t, RnnExtError*);   \
  template int cluster_backward<T>(const RnnExtBackward&, cudaStream_t, RnnExtError*); \
  template const char* cluster_missing<T>(RnnExtCell, int64_t, bool);

}  // namespace rnn_ext::cuda
