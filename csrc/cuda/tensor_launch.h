// The host side of `tensor` for one storage type: one launch for all timesteps and directions.
#pragma once

#include <cstdio>

#include "cuda/persistent_launch.h"
#include "cuda/tensor_kernels.h"

namespace rnn_ext::cuda {

template <class Cell, class T, int kDepth>
int tensor_forward_depth(const RnnExtForward& args, cudaStream_t stream, RnnExtError* error) {
  if (args.sequence.length > INT32_MAX) {
    std::snprintf(error->message, sizeof error->message, "tensor_forward: %lld timesteps are too many for one launch",
                  static_cast<long long>(args.sequence.length));
    return 1;
  }
  auto layer = persistent_layer<ForwardPointers<T>>(args);
  for (int i = 0; i < args.directions; ++i)
    layer.direction[i] = {args.direction[i].reverse != 0, typed<T>(args.direction[i])};
  LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>((layer.batch + kTensorRows - 1) / kTensorRows),
                     static_cast<unsigned>(args.directions));
  config.block = dim3(kTensorThreads<Cell, kDepth>);
  config.stream = stream;
  const char* problem = launch("tensor_forward", &tensor_forward_kernel<Cell, T, kDepth>, config, layer);
  if (problem) std::snprintf(error->message, sizeof error->message, "tensor_forward: %s", problem);
  return problem != nullptr;
}

// Few sizes are compiled: a layer between two of them multiplies by zeros.
template <class Cell, class T>
int tensor_forward_cell(const RnnExtForward& args, cudaStream_t stream, RnnExtError* error) {
  if (args.sequence.hidden <= 2 * kMmaDepth) return tensor_forward_depth<Cell, T, 2>(args, stream, error);
  if (args.sequence.hidden <= 4 * kMmaDepth) return tensor_forward_depth<Cell, T, 4>(args, stream, error);
  return tensor_forward_depth<Cell, T, Cell::kGates % 2 == 0 ? 6 : 8>(args, stream, error);
}

template <class T>
int tensor_forward(const RnnExtForward& args, cudaStream_t stream, RnnExtError* error) {
  switch (args.cell) {
    case RNN_EXT_RNN_TANH:
      return tensor_forward_cell<cells::RnnTanh, T>(args, stream, error);
    case RNN_EXT_RNN_RELU:
      return tensor_forward_cell<cells::RnnRelu, T>(args, stream, error);
    case RNN_EXT_GRU:
      return tensor_forward_cell<cells::Gru, T>(args, stream, error);
    case RNN_EXT_LSTM:
      return tensor_forward_cell<cells::Lstm, T>(args, stream, error);
  }
  return 1;
}

#define RNN_EXT_INSTANTIATE_TENSOR(T) template int tensor_forward<T>(const RnnExtForward&, cudaStream_t, RnnExtError*);

}  // namespace rnn_ext::cuda
