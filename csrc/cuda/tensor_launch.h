// The host side of `tensor` for one storage type: one launch for all timesteps and directions.
#pragma once

#include <cstdio>
#include <type_traits>
#include <utility>

#include "cuda/persistent_launch.h"
#include "cuda/tensor_kernels.h"

namespace rnn_ext::cuda {

// Few sizes are compiled, up to max_tensor_hidden: a layer between two of them multiplies by zeros.
template <class Cell, class T>
constexpr auto depths() {
  if constexpr (sizeof(T) == 4) {
    if constexpr (Cell::kGates == 4) return std::integer_sequence<int, 2, 4>{};
    if constexpr (Cell::kGates == 3) return std::integer_sequence<int, 2, 4, 6>{};
    if constexpr (Cell::kGates == 1) return std::integer_sequence<int, 2, 4, 8>{};
  } else {
    if constexpr (Cell::kGates == 4) return std::integer_sequence<int, 2, 4, 6, 8>{};
    if constexpr (Cell::kGates != 4) return std::integer_sequence<int, 2, 4, 8>{};
  }
}
template <int kDepth, int... kMore, class Run>
auto for_depth(std::integer_sequence<int, kDepth, kMore...>, int64_t hidden, const Run& run) {
  if constexpr (sizeof...(kMore) > 0) {
    if (hidden > kDepth * kTensorUnits) return for_depth(std::integer_sequence<int, kMore...>{}, hidden, run);
  }
  return run(std::integral_constant<int, kDepth>{});
}

template <class Layer>
int launch_tensor(const char* name, void (*kernel)(Layer), int threads, const Layer& layer, int directions,
                  cudaStream_t stream, RnnExtError* error) {
  if (layer.length >= INT32_MAX) {
    std::snprintf(error->message, sizeof error->message, "%s: %lld timesteps are too many for one launch", name,
                  static_cast<long long>(layer.length));
    return 1;
  }
  LaunchConfig config;
  config.grid =
      dim3(static_cast<unsigned>((layer.batch + kTensorRows - 1) / kTensorRows), static_cast<unsigned>(directions));
  config.block = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  const char* problem = launch(name, kernel, config, layer);
  if (problem) std::snprintf(error->message, sizeof error->message, "%s: %s", name, problem);
  return problem != nullptr;
}

template <class T>
int tensor_forward(const RnnExtForward& args, cudaStream_t stream, RnnExtError* error) {
  return for_cell(args.cell, [&](auto cell) {
    using Cell = decltype(cell);
    return for_depth(depths<Cell, T>(), args.sequence.hidden, [&](auto depth) {
      constexpr int kDepth = decltype(depth)::value;
      return launch_tensor("tensor_forward", &tensor_forward_kernel<Cell, T, kDepth>, kForwardThreads<Cell, kDepth>,
                           persistent_layer<T>(args), args.directions, stream, error);
    });
  });
}

template <class T>
int tensor_backward(const RnnExtBackward& args, cudaStream_t stream, RnnExtError* error) {
  return for_cell(args.cell, [&](auto cell) {
    using Cell = decltype(cell);
    return for_depth(depths<Cell, T>(), args.sequence.hidden, [&](auto depth) {
      constexpr int kDepth = decltype(depth)::value;
      return launch_tensor("tensor_backward", &tensor_backward_kernel<Cell, T, kDepth>, kBackwardThreads<kDepth>,
                           persistent_layer<T>(args), args.directions, stream, error);
    });
  });
}

#define RNN_EXT_INSTANTIATE_TENSOR(T)                                               \
  template int tensor_forward<T>(const RnnExtForward&, cudaStream_t, RnnExtError*); \
  template int tensor_backward<T>(const RnnExtBackward&, cudaStream_t, RnnExtError*);

}  // namespace rnn_ext::cuda
