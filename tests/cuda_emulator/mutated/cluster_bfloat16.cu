// What mutate.py compiles a mutant of the cluster kernels into, in place of csrc/cuda/cluster_bfloat16.cu: two cells,
// of an even and an odd number of gates, and one size, smaller than any that is meant for a GPU. A mutant is compiled
// for each sanitizer and runs every case there, where the smallest clusters that are meant have thousands of threads.
#include "cuda/cluster_launch.h"

namespace rnn_ext::cuda {

inline constexpr int kFewColumns = 4, kFewBlocks = 4;  // K = 64 units, 16 of each block

template <class Cell>
ClusterKernel<ForwardPointers<bfloat16>> few_forward() {
  return {&cluster_forward_kernel<Cell, bfloat16, kFewColumns, kFewBlocks>, kFewBlocks,
          ClusterShape<Cell, bfloat16, kFewColumns, kFewBlocks>::kThreads};
}
template <class Cell>
ClusterKernel<BackwardPointers<bfloat16>> few_backward() {
  return {&cluster_backward_kernel<Cell, bfloat16, kFewColumns, kFewBlocks>, kFewBlocks,
          ClusterBackwardShape<Cell, bfloat16, kFewColumns, kFewBlocks>::kThreads};
}

template <>
ClusterKernel<ForwardPointers<bfloat16>> cluster_kernel_of<ForwardPointers<bfloat16>, bfloat16>(RnnExtCell cell,
                                                                                                int64_t) {
  return cell == RNN_EXT_GRU ? few_forward<cells::Gru>() : few_forward<cells::Lstm>();
}
template <>
ClusterKernel<BackwardPointers<bfloat16>> cluster_kernel_of<BackwardPointers<bfloat16>, bfloat16>(RnnExtCell cell,
                                                                                                  int64_t) {
  return cell == RNN_EXT_GRU ? few_backward<cells::Gru>() : few_backward<cells::Lstm>();
}

RNN_EXT_INSTANTIATE_CLUSTER(bfloat16)

}  // namespace rnn_ext::cuda
