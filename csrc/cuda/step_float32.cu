// The `step` kernels that store float32.
#include "cuda/step_launch.h"

namespace rnn_ext::cuda {
RNN_EXT_INSTANTIATE_STEP(float)
}  // namespace rnn_ext::cuda
