// The host side of `step` for one storage type: turns a layer's arguments into one launch per timestep.
#pragma once

#include <algorithm>
#include <cstdio>

#include "cuda/for_cell.h"
#include "cuda/step_entries.h"
#include "cuda/step_kernels.h"

namespace rnn_ext::cuda {

inline RowRules row_rules(const RnnExtSequence& sequence) {
  return {sequence.batch_stride, sequence.batch_sizes ? nullptr : sequence.lengths, sequence.resets,
          sequence.resets_time_stride, sequence.resets_batch_stride};
}

// Walks the timesteps in the order a direction computes them, forwards or backwards, and keeps packed offsets on the
// way.
class Timeline {
 public:
  Timeline(const RnnExtSequence& sequence, bool reverse) : sequence_(sequence), reverse_(reverse) {}

  // Step s of the computation; s = -1 and s = L are the ends, which have no rows. Packed: moves to a neighbour are
  // cheap.
  Moment at(int64_t step) {
    const int64_t time = reverse_ ? sequence_.length - 1 - step : step;
    if (step < 0 || step >= sequence_.length) return {time, 0, 0};
    if (!sequence_.batch_sizes) return {time, sequence_.batch, time * sequence_.time_stride};
    for (; time_ < time; ++time_) offset_ += sequence_.batch_sizes[time_];
    for (; time_ > time; --time_) offset_ -= sequence_.batch_sizes[time_ - 1];
    return {time, sequence_.batch_sizes[time], offset_};
  }

 private:
  const RnnExtSequence& sequence_;
  bool reverse_;
  int64_t time_ = 0, offset_ = 0;
};

// Returns 1 after a failure, of which `error` then says what was asked for.
template <class Params>
int launch_rows_of(const char* name, void (*kernel)(Params), const LaunchConfig& config, const Params& params,
                   int64_t rows, RnnExtError* error) {
  const char* problem = launch(name, kernel, config, params);
  if (problem)
    std::snprintf(error->message, sizeof error->message, "%s: %s (%lld rows, hidden size %lld)", name, problem,
                  static_cast<long long>(rows), static_cast<long long>(params.hidden));
  return problem != nullptr;
}

template <class Params>
int launch_tiles(const char* name, void (*kernel)(Params), const Params& params, int tile_rows, int64_t rows,
                 int directions, cudaStream_t stream, RnnExtError* error) {
  const int64_t row_tiles = (rows + tile_rows - 1) / tile_rows,
                unit_tiles = (params.hidden + kTileUnits - 1) / kTileUnits;
  LaunchConfig config;
  config.grid =
      dim3(static_cast<unsigned>(row_tiles), static_cast<unsigned>(unit_tiles), static_cast<unsigned>(directions));
  config.block = dim3(kTileThreads);
  config.stream = stream;
  return launch_rows_of(name, kernel, config, params, rows, error);
}

template <class Params>
int launch_pointwise(const char* name, void (*kernel)(Params), const Params& params, int64_t rows, int directions,
                     cudaStream_t stream, RnnExtError* error) {
  LaunchConfig config;
  const int64_t threads = std::min<int64_t>(kTileThreads, (params.hidden + 31) / 32 * 32);
  config.grid = dim3(static_cast<unsigned>(rows), static_cast<unsigned>((params.hidden + threads - 1) / threads),
                     static_cast<unsigned>(directions));
  config.block = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  return launch_rows_of(name, kernel, config, params, rows, error);
}

// With few rows a tile of 8 wastes less of its products; with many a larger one reads the weight less often. Double has
// half the registers for it.
inline constexpr int64_t kFewRows = 8;
template <class T>
inline constexpr int kManyRows = sizeof(AccumulatorOf<T>) == 8 ? 2 : 4;

// What of a layer's arguments is the same at every timestep.
template <class T>
void fill(ForwardStep<T>& params, const RnnExtForward& args) {
  params.rules = row_rules(args.sequence);
  params.hidden = args.sequence.hidden;
  for (int i = 0; i < args.directions; ++i) {
    static_cast<ForwardPointers<T>&>(params.direction[i]) = typed<T>(args.direction[i]);
    params.direction[i].masks = typed<AccumulatorOf<T>>(args.direction[i].masks);
    params.direction[i].h_masked = static_cast<T*>(args.direction[i].h_masked);
  }
}
template <class T>
void fill(BackwardStep<T>& params, const RnnExtBackward& args) {
  params.rules = row_rules(args.sequence);
  params.hidden = args.sequence.hidden;
  for (int i = 0; i < args.directions; ++i) {
    static_cast<BackwardPointers<T>&>(params.direction[i]) = typed<T>(args.direction[i]);
    params.direction[i].masks = typed<AccumulatorOf<T>>(args.direction[i].masks);
  }
}

// Calls run(rows of the widest direction) for each timestep, with `params` moved there, until one fails.
template <class T, class Run>
int for_each_step(ForwardStep<T>& params, const RnnExtForward& args, int64_t first_step, int64_t last_step,
                  const Run& run) {
  Timeline timelines[2] = {{args.sequence, args.direction[0].reverse != 0},
                           {args.sequence, args.direction[1].reverse != 0}};
  for (int64_t step = first_step; step < last_step; ++step) {
    int64_t rows = 0;
    for (int i = 0; i < args.directions; ++i) {
      ForwardStepDirection<T>& d = params.direction[i];
      d.before = timelines[i].at(step - 1);
      d.now = timelines[i].at(step);
      d.after = timelines[i].at(step + 1);
      rows = std::max(rows, d.now.rows);
    }
    if (run(rows)) return 1;
  }
  return 0;
}
template <class T, class Run>
int for_each_step(BackwardStep<T>& params, const RnnExtBackward& args, int64_t first_step, int64_t last_step,
                  const Run& run) {
  Timeline timelines[2] = {{args.sequence, args.direction[0].reverse != 0},
                           {args.sequence, args.direction[1].reverse != 0}};
  for (int64_t step = first_step; step < last_step; ++step) {
    const int64_t forward_step = args.sequence.length - 1 - step;  // -1 in the launch that finishes dh_0
    int64_t rows = 0;
    for (int i = 0; i < args.directions; ++i) {
      BackwardStepDirection<T>& d = params.direction[i];
      d.after = timelines[i].at(forward_step + 1);
      d.now = timelines[i].at(forward_step);
      d.before = timelines[i].at(forward_step - 1);
      rows = std::max({rows, d.now.rows, d.after.rows});
    }
    if (run(rows)) return 1;
  }
  return 0;
}

template <class Cell, class T>
int step_forward_cell(const RnnExtForward& args, int64_t first_step, int64_t last_step, cudaStream_t stream,
                      RnnExtError* error) {
  ForwardStep<T> params{};
  fill(params, args);
  return for_each_step(params, args, first_step, last_step, [&](int64_t rows) {
    if (args.direction[0].hgates) {
      return launch_pointwise("pointwise_forward", &pointwise_forward_kernel<Cell, T>, params, rows, args.directions,
                              stream, error);
    }
    if (rows <= kFewRows) {
      return launch_tiles("step_forward", &step_forward_kernel<Cell, T, 1>, params, kTileGroups, rows, args.directions,
                          stream, error);
    }
    return launch_tiles("step_forward", &step_forward_kernel<Cell, T, kManyRows<T>>, params, kManyRows<T> * kTileGroups,
                        rows, args.directions, stream, error);
  });
}

template <class Cell, class T>
int step_backward_cell(const RnnExtBackward& args, int64_t first_step, int64_t last_step, cudaStream_t stream,
                       RnnExtError* error) {
  BackwardStep<T> params{};
  fill(params, args);
  return for_each_step(params, args, first_step, last_step, [&](int64_t rows) {
    if (args.direction[0].dh_recurrent) {
      return launch_pointwise("pointwise_backward", &pointwise_backward_kernel<Cell, T>, params, rows, args.directions,
                              stream, error);
    }
    if (rows <= kFewRows) {
      return launch_tiles("step_backward", &step_backward_kernel<Cell, T, 1>, params, kTileGroups, rows,
                          args.directions, stream, error);
    }
    return launch_tiles("step_backward", &step_backward_kernel<Cell, T, kManyRows<T>>, params,
                        kManyRows<T> * kTileGroups, rows, args.directions, stream, error);
  });
}

template <class T>
int step_forward(const RnnExtForward& args, int64_t first_step, int64_t last_step, cudaStream_t stream,
                 RnnExtError* error) {
  if (args.variant != RNN_EXT_PLAIN) return variant_forward<T>(args, first_step, last_step, stream, error);
  return for_cell(args.cell, [&](auto cell) {
    return step_forward_cell<decltype(cell), T>(args, first_step, last_step, stream, error);
  });
}

template <class T>
int step_backward(const RnnExtBackward& args, int64_t first_step, int64_t last_step, cudaStream_t stream,
                  RnnExtError* error) {
  if (args.variant != RNN_EXT_PLAIN) return variant_backward<T>(args, first_step, last_step, stream, error);
  return for_cell(args.cell, [&](auto cell) {
    return step_backward_cell<decltype(cell), T>(args, first_step, last_step, stream, error);
  });
}

#define RNN_EXT_INSTANTIATE_STEP(T)                                                                 \
  template int step_forward<T>(const RnnExtForward&, int64_t, int64_t, cudaStream_t, RnnExtError*); \
  template int step_backward<T>(const RnnExtBackward&, int64_t, int64_t, cudaStream_t, RnnExtError*);

}  // namespace rnn_ext::cuda
