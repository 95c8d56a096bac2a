// The `step` kernels that store float64.
#include "cuda/step_launch.h"

namespace rnn_ext::cuda {
RNN_EXT_INSTANTIATE_STEP(double)
}  // namespace rnn_ext::cuda
