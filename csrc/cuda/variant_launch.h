// The host side of the variants of `step` for one storage type.
#pragma once

#include "cuda/step_launch.h"
#include "cuda/variant_kernels.h"

namespace rnn_ext::cuda {

template <class Params>
int launch_rows(const char* name, void (*kernel)(Params), const Params& params, int64_t rows, int directions,
                cudaStream_t stream, RnnExtError* error) {
  LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>(rows), 1, static_cast<unsigned>(directions));
  config.block = dim3(static_cast<unsigned>(std::min<int64_t>(kMaxNormThreads, (params.hidden + 31) / 32 * 32)));
  config.stream = stream;
  return launch_rows_of(name, kernel, config, params, rows, error);
}

template <class T>
int norm_forward(const RnnExtForward& args, int64_t first_step, int64_t last_step, cudaStream_t stream,
                 RnnExtError* error) {
  NormStep<ForwardStep<T>, T> params{};
  fill<T>(params, args);
  for (int i = 0; i < args.directions; ++i) params.norm[i] = typed<T>(args.direction[i].norm);
  return for_each_step<T>(params, args, first_step, last_step, [&](int64_t rows) {
    return launch_rows("norm_forward", &norm_forward_kernel<T>, params, rows, args.directions, stream, error);
  });
}

template <class T>
int norm_backward(const RnnExtBackward& args, int64_t first_step, int64_t last_step, cudaStream_t stream,
                  RnnExtError* error) {
  NormStep<BackwardStep<T>, T> params{};
  fill<T>(params, args);
  for (int i = 0; i < args.directions; ++i) params.norm[i] = typed<T>(args.direction[i].norm);
  return for_each_step<T>(params, args, first_step, last_step, [&](int64_t rows) {
    return launch_rows("norm_backward", &norm_backward_kernel<T>, params, rows, args.directions, stream, error);
  });
}

template <class T>
int variant_forward(const RnnExtForward& args, int64_t first_step, int64_t last_step, cudaStream_t stream,
                    RnnExtError* error) {
  if (args.variant == RNN_EXT_LAYER_NORM) return norm_forward<T>(args, first_step, last_step, stream, error);
  return for_cell(args.cell, [&](auto cell) {
    return step_forward_cell<cells::Masked<decltype(cell)>, T>(args, first_step, last_step, stream, error);
  });
}

template <class T>
int variant_backward(const RnnExtBackward& args, int64_t first_step, int64_t last_step, cudaStream_t stream,
                     RnnExtError* error) {
  if (args.variant == RNN_EXT_LAYER_NORM) return norm_backward<T>(args, first_step, last_step, stream, error);
  return for_cell(args.cell, [&](auto cell) {
    return step_backward_cell<cells::Masked<decltype(cell)>, T>(args, first_step, last_step, stream, error);
  });
}

template <class T>
int projected_forward(const RnnExtForward& args, int64_t first_step, int64_t last_step, cudaStream_t stream,
                      RnnExtError* error) {
  ForwardStep<T> params{};
  fill(params, args);
  return for_each_step(params, args, first_step, last_step, [&](int64_t rows) {
    return launch_pointwise("projected_forward", &projected_forward_kernel<T>, params, rows, args.directions, stream,
                            error);
  });
}

template <class T>
int projected_backward(const RnnExtBackward& args, int64_t first_step, int64_t last_step, cudaStream_t stream,
                       RnnExtError* error) {
  BackwardStep<T> params{};
  fill(params, args);
  return for_each_step(params, args, first_step, last_step, [&](int64_t rows) {
    return launch_pointwise("projected_backward", &projected_backward_kernel<T>, params, rows, args.directions, stream,
                            error);
  });
}

#define RNN_EXT_INSTANTIATE_VARIANT(T)                                                                   \
  template int variant_forward<T>(const RnnExtForward&, int64_t, int64_t, cudaStream_t, RnnExtError*);   \
  template int variant_backward<T>(const RnnExtBackward&, int64_t, int64_t, cudaStream_t, RnnExtError*); \
  template int projected_forward<T>(const RnnExtForward&, int64_t, int64_t, cudaStream_t, RnnExtError*); \
  template int projected_backward<T>(const RnnExtBackward&, int64_t, int64_t, cudaStream_t, RnnExtError*);

}  // namespace rnn_ext::cuda
