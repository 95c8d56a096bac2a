// How launch.cu reaches the launchers that tensor_<dtype>.cu instantiate.
#pragma once

#include "cuda/launch.h"
#include "cuda/shim.h"

namespace rnn_ext::cuda {

// The largest weight takes half of a multiprocessor's registers.
inline constexpr int64_t max_tensor_hidden(RnnExtCell cell, RnnExtDtype dtype) {
  if (dtype == RNN_EXT_FLOAT64) return 0;
  if (dtype != RNN_EXT_FLOAT32) return 128;
  return cell == RNN_EXT_LSTM ? 64 : cell == RNN_EXT_GRU ? 96 : 128;
}

// Arguments have been checked; 0 or 1 as in launch.h.
template <class T>
int tensor_forward(const RnnExtForward& args, cudaStream_t stream, RnnExtError* error);
template <class T>
int tensor_backward(const RnnExtBackward& args, cudaStream_t stream, RnnExtError* error);

}  // namespace rnn_ext::cuda
