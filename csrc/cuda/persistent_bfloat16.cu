// The `persistent` kernels that store bfloat16.
#include "cuda/persistent_launch.h"

namespace rnn_ext::cuda {
RNN_EXT_INSTANTIATE_PERSISTENT(bfloat16)
}  // namespace rnn_ext::cuda
