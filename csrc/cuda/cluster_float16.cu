// The `cluster` kernels that store float16.
#include "cuda/cluster_launch.h"

namespace rnn_ext::cuda {
RNN_EXT_INSTANTIATE_CLUSTER(float16)
}  // namespace rnn_ext::cuda
