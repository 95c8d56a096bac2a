// The `tensor` kernels that store float16.
#include "cuda/tensor_launch.h"

namespace rnn_ext::cuda {
RNN_EXT_INSTANTIATE_TENSOR(float16)
}  // namespace rnn_ext::cuda
