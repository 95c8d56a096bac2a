// The `step` kernels that store bfloat16.
#include "cuda/step_launch.h"

namespace rnn_ext::cuda {
RNN_EXT_INSTANTIATE_STEP(bfloat16)
}  // namespace rnn_ext::cuda
