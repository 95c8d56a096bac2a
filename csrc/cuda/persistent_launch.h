// The host side of `persistent` for one storage type: one launch for all timesteps and directions.
#pragma once

#include <algorithm>
#include <cstdio>

#include "cuda/persistent_entries.h"
#include "cuda/persistent_kernels.h"

namespace rnn_ext::cuda {

template <class Pointers, class Args>
PersistentLayer<Pointers> persistent_layer(const Args& args) {
  const RnnExtSequence& sequence = args.sequence;
  PersistentLayer<Pointers> layer{};
  layer.length = sequence.length;
  layer.batch = sequence.batch;
  layer.hidden = sequence.hidden;
  layer.time_stride = sequence.time_stride;
  layer.batch_stride = sequence.batch_stride;
  layer.row_offsets = sequence.batch_sizes ? sequence.row_offsets : nullptr;
  layer.lengths = sequence.lengths;
  layer.resets = sequence.resets;
  layer.resets_time_stride = sequence.resets_time_stride;
  layer.resets_batch_stride = sequence.resets_batch_stride;
  return layer;
}

template <class Layer>
int launch_persistent(const char* name, void (*kernel)(Layer), const Layer& layer, int directions, int64_t shared_bytes,
                      cudaStream_t stream, RnnExtError* error) {
  const int64_t available = shared_bytes_per_block();
  if (layer.hidden > kMaxUnits || shared_bytes > available) {
    std::snprintf(error->message, sizeof error->message,
                  "%s: hidden size %lld needs %lld bytes of shared memory; a block has %lld, and at most %d units",
                  name, static_cast<long long>(layer.hidden), static_cast<long long>(shared_bytes),
                  static_cast<long long>(available), kMaxUnits);
    return 1;
  }
  LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>((layer.batch + kRows - 1) / kRows), static_cast<unsigned>(directions));
  config.block = dim3(static_cast<unsigned>(padded_units(layer.hidden) * kRows));
  config.shared_bytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  const char* problem = launch(name, kernel, config, layer);
  if (problem) std::snprintf(error->message, sizeof error->message, "%s: %s", name, problem);
  return problem != nullptr;
}

template <class Cell, class T>
int persistent_forward_cell(const RnnExtForward& args, cudaStream_t stream, RnnExtError* error) {
  auto layer = persistent_layer<ForwardPointers<T>>(args);
  for (int i = 0; i < args.directions; ++i)
    layer.direction[i] = {args.direction[i].reverse != 0, typed<T>(args.direction[i])};
  const int64_t shared = forward_shared_bytes<Cell, T>(layer.hidden);
  return launch_persistent("persistent_forward", &persistent_forward_kernel<Cell, T>, layer, args.directions, shared,
                           stream, error);
}

template <class Cell, class T>
int persistent_backward_cell(const RnnExtBackward& args, cudaStream_t stream, RnnExtError* error) {
  auto layer = persistent_layer<BackwardPointers<T>>(args);
  for (int i = 0; i < args.directions; ++i)
    layer.direction[i] = {args.direction[i].reverse != 0, typed<T>(args.direction[i])};
  const int64_t shared = backward_shared_bytes<Cell, T>(layer.hidden);
  return launch_persistent("persistent_backward", &persistent_backward_kernel<Cell, T>, layer, args.directions, shared,
                           stream, error);
}

template <class T>
int persistent_forward(const RnnExtForward& args, cudaStream_t stream, RnnExtError* error) {
  switch (args.cell) {
    case RNN_EXT_RNN_TANH:
      return persistent_forward_cell<cells::RnnTanh, T>(args, stream, error);
    case RNN_EXT_RNN_RELU:
      return persistent_forward_cell<cells::RnnRelu, T>(args, stream, error);
    case RNN_EXT_GRU:
      return persistent_forward_cell<cells::Gru, T>(args, stream, error);
    case RNN_EXT_LSTM:
      return persistent_forward_cell<cells::Lstm, T>(args, stream, error);
  }
  return 1;
}

template <class T>
int persistent_backward(const RnnExtBackward& args, cudaStream_t stream, RnnExtError* error) {
  switch (args.cell) {
    case RNN_EXT_RNN_TANH:
      return persistent_backward_cell<cells::RnnTanh, T>(args, stream, error);
    case RNN_EXT_RNN_RELU:
      return persistent_backward_cell<cells::RnnRelu, T>(args, stream, error);
    case RNN_EXT_GRU:
      return persistent_backward_cell<cells::Gru, T>(args, stream, error);
    case RNN_EXT_LSTM:
      return persistent_backward_cell<cells::Lstm, T>(args, stream, error);
  }
  return 1;
}

template <class T>
int64_t persistent_shared_bytes(RnnExtCell cell, int64_t hidden, bool backward) {
  switch (cell) {
    case RNN_EXT_RNN_TANH:
    case RNN_EXT_RNN_RELU:
      return backward ? backward_shared_bytes<cells::RnnTanh, T>(hidden)
                      : forward_shared_bytes<cells::RnnTanh, T>(hidden);
    case RNN_EXT_GRU:
      return backward ? backward_shared_bytes<cells::Gru, T>(hidden) : forward_shared_bytes<cells::Gru, T>(hidden);
    case RNN_EXT_LSTM:
      return backward ? backward_shared_bytes<cells::Lstm, T>(hidden) : forward_shared_bytes<cells::Lstm, T>(hidden);
  }
  return INT64_MAX;
}

#define RNN_EXT_INSTANTIATE_PERSISTENT(T)                                                 \
  template int persistent_forward<T>(const RnnExtForward&, cudaStream_t, RnnExtError*);   \
  template int persistent_backward<T>(const RnnExtBackward&, cudaStream_t, RnnExtError*); \
  template int64_t persistent_shared_bytes<T>(RnnExtCell, int64_t, bool);

}  // namespace rnn_ext::cuda
