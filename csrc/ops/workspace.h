// Tensors in memory that goes from one call to the next.
#pragma once

#include <ATen/core/Tensor.h>

namespace rnn_ext::ops {

/// at::empty on the CPU, without a trip through the dispatcher, of which a call makes five; what is large has its
/// memory from csrc/cpu/memory.h and gives it back there when the tensor dies.
at::Tensor empty(at::IntArrayRef size, const at::TensorOptions& options);

}  // namespace rnn_ext::ops
