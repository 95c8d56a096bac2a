// The `persistent` kernels that store float16.
#include "cuda/persistent_launch.h"

namespace rnn_ext::cuda {
RNN_EXT_INSTANTIATE_PERSISTENT(float16)
}  // namespace rnn_ext::cuda
