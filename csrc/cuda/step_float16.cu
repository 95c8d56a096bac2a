// The `step` kernels that store float16.
#include "cuda/step_launch.h"

namespace rnn_ext::cuda {
RNN_EXT_INSTANTIATE_STEP(float16)
}  // namespace rnn_ext::cuda
