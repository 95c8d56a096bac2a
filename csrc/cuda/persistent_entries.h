// How launch.cu reaches the launchers that persistent_<dtype>.cu instantiate.
#pragma once

#include "cuda/launch.h"
#include "cuda/shim.h"

namespace rnn_ext::cuda {

inline constexpr int64_t kMaxPersistentHidden = 128;

// Arguments have been checked; 0 or 1 as in launch.h.
template <class T>
int persistent_forward(const RnnExtForward& args, cudaStream_t stream, RnnExtError* error);
template <class T>
int persistent_backward(const RnnExtBackward& args, cudaStream_t stream, RnnExtError* error);

// Shared memory that a block needs.
template <class T>
int64_t persistent_shared_bytes(RnnExtCell cell, int64_t hidden, bool backward);

}  // namespace rnn_ext::cuda
