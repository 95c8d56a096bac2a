// How launch.cu reaches the launchers that step_<dtype>.cu and variant_<dtype>.cu instantiate.
#pragma once

#include "cuda/launch.h"
#include "cuda/shim.h"

namespace rnn_ext::cuda {

// Arguments have been checked; 0 or 1 as in launch.h.
template <class T>
int step_forward(const RnnExtForward& args, int64_t first_step, int64_t last_step, cudaStream_t stream,
                 RnnExtError* error);
template <class T>
int step_backward(const RnnExtBackward& args, int64_t first_step, int64_t last_step, cudaStream_t stream,
                  RnnExtError* error);

// The same of a variant, to which the above pass on.
template <class T>
int variant_forward(const RnnExtForward& args, int64_t first_step, int64_t last_step, cudaStream_t stream,
                    RnnExtError* error);
template <class T>
int variant_backward(const RnnExtBackward& args, int64_t first_step, int64_t last_step, cudaStream_t stream,
                     RnnExtError* error);
template <class T>
int projected_forward(const RnnExtForward& args, int64_t first_step, int64_t last_step, cudaStream_t stream,
                      RnnExtError* error);
template <class T>
int projected_backward(const RnnExtBackward& args, int64_t first_step, int64_t last_step, cudaStream_t stream,
                       RnnExtError* error);

}  // namespace rnn_ext::cuda
