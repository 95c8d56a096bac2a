// The `tensor` kernels that store bfloat16.
#include "cuda/tensor_launch.h"

namespace rnn_ext::cuda {
RNN_EXT_INSTANTIATE_TENSOR(bfloat16)
}  // namespace rnn_ext::cuda
