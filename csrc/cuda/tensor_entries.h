// How launch.cu reaches the launchers that tensor_<dtype>.cu instantiate.
#pragma once

#include "cuda/launch.h"
#include "cuda/shim.h"

namespace rnn_ext::cuda {

// A 128-unit LSTM would take 16 warps, whose 128 registers each do not hold its weight and all else without a spill.
inline constexpr int64_t max_tensor_hidden(RnnExtCell cell) { return cell == RNN_EXT_LSTM ? 96 : 128; }

// Arguments have been checked; 0 or 1 as in launch.h.
template <class T>
int tensor_forward(const RnnExtForward& args, cudaStream_t stream, RnnExtError* error);

}  // namespace rnn_ext::cuda
