// How launch.cu reaches the launchers that grid_<dtype>.cu instantiate.
#pragma once

#include "cuda/launch.h"
#include "cuda/shim.h"

namespace rnn_ext::cuda {

// Arguments have been checked; 0 or 1 as in launch.h.
template <class T>
int grid_forward(const RnnExtForward& args, int64_t units, void* workspace, cudaStream_t stream, RnnExtError* error);
template <class T>
int grid_backward(const RnnExtBackward& args, int64_t units, void* workspace, cudaStream_t stream, RnnExtError* error);

}  // namespace rnn_ext::cuda
