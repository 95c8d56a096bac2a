// The `tensor` kernels that store float32 and multiply in TF32.
#include "cuda/tensor_launch.h"

namespace rnn_ext::cuda {
RNN_EXT_INSTANTIATE_TENSOR(float)
}  // namespace rnn_ext::cuda
