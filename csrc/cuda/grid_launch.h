// The host side of `grid` for one storage type: one cooperative launch for all timesteps and directions.
#pragma once

#include <cstdio>

#include "cuda/grid_entries.h"
#include "cuda/grid_kernels.h"
#include "cuda/persistent_launch.h"

namespace rnn_ext::cuda {

template <class T, class Layer, class Args>
int launch_grid(const char* name, void (*kernel)(Layer), int gates, bool backward, const Args& args, int64_t units,
                void* workspace, cudaStream_t stream, RnnExtError* error) {
  const GridProblem problem{gates, sizeof(T), backward, args.sequence.batch, args.sequence.hidden, args.directions};
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
  const char* problem_of_device = nullptr;
  const int64_t resident =
      plan.shared_bytes > device.shared_bytes ? 0 : resident_blocks(kernel, threads, shared, problem_of_device);
  if (problem_of_device) return refuse("%s: %s", problem_of_device);
  if (blocks > resident) {  // they would wait for ever
    return refuse(
        "%s: hidden size %lld, batch %lld: %lld blocks of %lld bytes of shared memory would wait for each other; the "
        "device holds %lld at once (%lld multiprocessors, %lld bytes)",
        static_cast<long long>(problem.hidden), static_cast<long long>(problem.batch), static_cast<long long>(blocks),
        static_cast<long long>(plan.shared_bytes), static_cast<long long>(resident),
        static_cast<long long>(device.multiprocessors), static_cast<long long>(device.shared_bytes));
  }
  const Layer layer{persistent_layer<T>(args),         static_cast<int>(plan.units),
                    static_cast<int>(plan.slices),     static_cast<int>(problem.groups()),
                    static_cast<unsigned*>(workspace), static_cast<char*>(workspace) + grid_flag_bytes(problem)};
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

template <class T>
int grid_forward(const RnnExtForward& args, int64_t units, void* workspace, cudaStream_t stream, RnnExtError* error) {
  return for_cell(args.cell, [&](auto cell) {
    using Cell = decltype(cell);
    return launch_grid<T>("grid_forward", &grid_forward_kernel<Cell, T>, Cell::kGates, false, args, units, workspace,
                          stream, error);
  });
}

template <class T>
int grid_backward(const RnnExtBackward& args, int64_t units, void* workspace, cudaStream_t stream, RnnExtError* error) {
  return for_cell(args.cell, [&](auto cell) {
    using Cell = decltype(cell);
    return launch_grid<T>("grid_backward", &grid_backward_kernel<Cell, T>, Cell::kGates, true, args, units, workspace,
                          stream, error);
  });
}

#define RNN_EXT_INSTANTIATE_GRID(T)                                                               \
  template int grid_forward<T>(const RnnExtForward&, int64_t, void*, cudaStream_t, RnnExtError*); \
  template int grid_backward<T>(const RnnExtBackward&, int64_t, void*, cudaStream_t, RnnExtError*);

}  // namespace rnn_ext::cuda
