// The `grid` kernels that store bfloat16.
#include "cuda/grid_launch.h"

namespace rnn_ext::cuda {
RNN_EXT_INSTANTIATE_GRID(bfloat16)
}  // namespace rnn_ext::cuda
