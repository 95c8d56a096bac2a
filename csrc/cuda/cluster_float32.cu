// The `cluster` kernels that store float32.
#include "cuda/cluster_launch.h"

namespace rnn_ext::cuda {
RNN_EXT_INSTANTIATE_CLUSTER(float)
}  // namespace rnn_ext::cuda
