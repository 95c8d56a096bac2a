// The host side of `grid` for one storage type: one cooperative launch for all timesteps and directions.
#pragma once

#include <cstdio>

#include "cuda/grid_entries.h"
#include "cuda/grid_kernels.h"
#include "cuda/persistent_launch.h"

namespace rnn_ext::cuda {

template <class Layer>
int launch_grid(const char* name, void (*kernel)(Layer), const GridProblem& problem, int64_t units, Layer& layer,
                void* workspace, cudaStream_t stream, RnnExtError* error) {
  const auto refuse = [&](const char* format, auto... values) {
    std::snprintf(error->message, sizeof error->message, format, name, values...);
    return 1;
  };
  const GridDevice device{multiprocessors(), shared_bytes_per_block()};
  // Where no plan fits, the one that comes nearest says how much is missing.
  GridPlan plan = grid_plan(problem, device, units);
  if (!plan.units) plan = grid_plan_of(problem, units > 0 ? units : kMaxGridUnits, 1);
  if (plan.units > kMaxGridUnits || plan.slices > kMaxGridSlices) {
    return refuse("%s: hidden size %lld in slices of %lld units: a block takes up to %d units, a group up to %d slices",
                  static_cast<long long>(problem.hidden), static_cast<long long>(plan.units), kMaxGridUnits,
                  kMaxGridSlices);
  }
  const auto shared = static_cast<size_t>(plan.shared_bytes);
  const int64_t blocks = plan.blocks(problem.directions);
  const int threads = grid_threads(problem.columns(), plan.units);
  const int64_t resident = plan.shared_bytes > device.shared_bytes ? 0 : resident_blocks(kernel, threads, shared);
  if (blocks > resident) {  // they would wait for ever
    return refuse(
        "%s: hidden size %lld, batch %lld: %lld blocks of %lld bytes of shared memory would wait for each other; the "
        "device holds %lld at once (%lld multiprocessors, %lld bytes)",
        static_cast<long long>(problem.hidden), static_cast<long long>(problem.batch), static_cast<long long>(blocks),
        static_cast<long long>(plan.shared_bytes), static_cast<long long>(resident),
        static_cast<long long>(device.multiprocessors), static_cast<long long>(device.shared_bytes));
  }
  layer.units = static_cast<int>(plan.units);
  layer.slices = static_cast<int>(plan.slices);
  layer.groups = static_cast<int>(problem.groups());
  layer.flags = static_cast<unsigned*>(workspace);
  layer.exchange = static_cast<char*>(workspace) + grid_flag_bytes(problem);
  LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>(plan.slices), static_cast<unsigned>(plan.group_blocks),
                     static_cast<unsigned>(problem.directions));
  config.block = dim3(static_cast<unsigned>(threads));
  config.shared_bytes = shared;
  config.stream = stream;
  config.cooperative = true;
  const char* failed = launch(name, kernel, config, layer);
  return failed ? refuse("%s: %s", failed) : 0;
}

template <class Pointers, class Args>
GridLayer<Pointers> grid_layer(const Args& args) {
  return {persistent_layer<Pointers>(args), 0, 0, 0, nullptr, nullptr};
}

template <class Cell, class T>
int grid_forward_cell(const RnnExtForward& args, int64_t units, void* workspace, cudaStream_t stream,
                      RnnExtError* error) {
  auto layer = grid_layer<ForwardPointers<T>>(args);
  for (int i = 0; i < args.directions; ++i)
    layer.direction[i] = {args.direction[i].reverse != 0, typed<T>(args.direction[i])};
  const GridProblem problem{Cell::kGates, sizeof(T), false, layer.batch, layer.hidden, args.directions};
  return launch_grid("grid_forward", &grid_forward_kernel<Cell, T>, problem, units, layer, workspace, stream, error);
}

template <class Cell, class T>
int grid_backward_cell(const RnnExtBackward& args, int64_t units, void* workspace, cudaStream_t stream,
                       RnnExtError* error) {
  auto layer = grid_layer<BackwardPointers<T>>(args);
  for (int i = 0; i < args.directions; ++i)
    layer.direction[i] = {args.direction[i].reverse != 0, typed<T>(args.direction[i])};
  const GridProblem problem{Cell::kGates, sizeof(T), true, layer.batch, layer.hidden, args.directions};
  return launch_grid("grid_backward", &grid_backward_kernel<Cell, T>, problem, units, layer, workspace, stream, error);
}

template <class T>
int grid_forward(const RnnExtForward& args, int64_t units, void* workspace, cudaStream_t stream, RnnExtError* error) {
  switch (args.cell) {
    case RNN_EXT_RNN_TANH:
      return grid_forward_cell<cells::RnnTanh, T>(args, units, workspace, stream, error);
    case RNN_EXT_RNN_RELU:
      return grid_forward_cell<cells::RnnRelu, T>(args, units, workspace, stream, error);
    case RNN_EXT_GRU:
      return grid_forward_cell<cells::Gru, T>(args, units, workspace, stream, error);
    case RNN_EXT_LSTM:
      return grid_forward_cell<cells::Lstm, T>(args, units, workspace, stream, error);
  }
  return 1;
}

template <class T>
int grid_backward(const RnnExtBackward& args, int64_t units, void* workspace, cudaStream_t stream, RnnExtError* error) {
  switch (args.cell) {
    case RNN_EXT_RNN_TANH:
      return grid_backward_cell<cells::RnnTanh, T>(args, units, workspace, stream, error);
    case RNN_EXT_RNN_RELU:
      return grid_backward_cell<cells::RnnRelu, T>(args, units, workspace, stream, error);
    case RNN_EXT_GRU:
      return grid_backward_cell<cells::Gru, T>(args, units, workspace, stream, error);
    case RNN_EXT_LSTM:
      return grid_backward_cell<cells::Lstm, T>(args, units, workspace, stream, error);
  }
  return 1;
}

#define RNN_EXT_INSTANTIATE_GRID(T)                                                               \
  template int grid_forward<T>(const RnnExtForward&, int64_t, void*, cudaStream_t, RnnExtError*); \
  template int grid_backward<T>(const RnnExtBackward&, int64_t, void*, cudaStream_t, RnnExtError*);

}  // namespace rnn_ext::cuda
