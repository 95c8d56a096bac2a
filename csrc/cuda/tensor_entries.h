// How launch.cu reaches the launchers that tensor_<dtype>.cu instantiate.
#pragma once

#include "cuda/launch.h"
#include "cuda/shim.h"

namespace rnn_ext::cuda {

// A 128-unit LSTM's weight is half of a multiprocessor's registers.
inline constexpr int64_t kMaxTensorHidden = 128;

// Arguments have been checked; 0 or 1 as in launch.h.
template <class T>
int tensor_forward(const RnnExtForward& args, cudaStream_t stream, RnnExtError* error);
template <class T>
int tensor_backward(const RnnExtBackward& args, cudaStream_t stream, RnnExtError* error);

}  // namespace rnn_ext::cuda
