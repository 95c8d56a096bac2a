// The `grid` kernels that store float32.
#include "cuda/grid_launch.h"

namespace rnn_ext::cuda {
RNN_EXT_INSTANTIATE_GRID(float)
}  // namespace rnn_ext::cuda
