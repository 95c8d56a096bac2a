// The `persistent` kernels that store float32.
#include "cuda/persistent_launch.h"

namespace rnn_ext::cuda {
RNN_EXT_INSTANTIATE_PERSISTENT(float)
}  // namespace rnn_ext::cuda
