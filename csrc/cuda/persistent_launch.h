// The host side of `persistent` for one storage type: one launch for all timesteps and directions.
#pragma once

#include <cstdio>

#include "cuda/for_cell.h"
#include "cuda/persistent_entries.h"
#include "cuda/persistent_kernels.h"

namespace rnn_ext::cuda {

template <class T, class Args>
auto persistent_layer(const Args& args) {
  const RnnExtSequence& sequence = args.sequence;
  PersistentLayer<decltype(typed<T>(args.direction[0]))> layer{};
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
  for (int i = 0; i < args.directions; ++i)
    layer.direction[i] = {args.direction[i].reverse != 0, typed<T>(args.direction[i])};
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

template <class T>
int persistent_forward(const RnnExtForward& args, cudaStream_t stream, RnnExtError* error) {
  return for_cell(args.cell, [&](auto cell) {
    using Cell = decltype(cell);
    return launch_persistent("persistent_forward", &persistent_forward_kernel<Cell, T>, persistent_layer<T>(args),
                             args.directions, forward_shared_bytes<Cell, T>(args.sequence.hidden), stream, error);
  });
}

template <class T>
int persistent_backward(const RnnExtBackward& args, cudaStream_t stream, RnnExtError* error) {
  return for_cell(args.cell, [&](auto cell) {
    using Cell = decltype(cell);
    return launch_persistent("persistent_backward", &persistent_backward_kernel<Cell, T>, persistent_layer<T>(args),
                             args.directions, backward_shared_bytes<Cell, T>(args.sequence.hidden), stream, error);
  });
}

template <class T>
int64_t persistent_shared_bytes(RnnExtCell cell, int64_t hidden, bool backward) {
  return for_cell(cell, [&](auto of) {
    using Cell = decltype(of);
    return backward ? backward_shared_bytes<Cell, T>(hidden) : forward_shared_bytes<Cell, T>(hidden);
  });
}

#define RNN_EXT_INSTANTIATE_PERSISTENT(T)                                                 \
  template int persistent_forward<T>(const RnnExtForward&, cudaStream_t, RnnExtError*);   \
  template int persistent_backward<T>(const RnnExtBackward&, cudaStream_t, RnnExtError*); \
  template int64_t persistent_shared_bytes<T>(RnnExtCell, int64_t, bool);

}  // namespace rnn_ext::cuda
