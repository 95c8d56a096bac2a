// The variants of the `step` kernels that store bfloat16.
#include "cuda/variant_launch.h"

namespace rnn_ext::cuda {
RNN_EXT_INSTANTIATE_VARIANT(bfloat16)
}  // namespace rnn_ext::cuda
