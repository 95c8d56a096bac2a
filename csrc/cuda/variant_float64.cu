// The variants of the `step` kernels that store float64.
#include "cuda/variant_launch.h"

namespace rnn_ext::cuda {
RNN_EXT_INSTANTIATE_VARIANT(double)
}  // namespace rnn_ext::cuda
