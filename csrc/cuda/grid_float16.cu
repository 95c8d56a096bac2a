// The `grid` kernels that store float16.
#include "cuda/grid_launch.h"

namespace rnn_ext::cuda {
RNN_EXT_INSTANTIATE_GRID(float16)
}  // namespace rnn_ext::cuda
