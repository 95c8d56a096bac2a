// The `cluster` kernels that store bfloat16.
#include "cuda/cluster_launch.h"

namespace rnn_ext::cuda {
RNN_EXT_INSTANTIATE_CLUSTER(bfloat16)
}  // namespace rnn_ext::cuda
