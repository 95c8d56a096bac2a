// The op for inference with weights of 8 bits, by way of the dispatcher.
#pragma once

#include "ops/layer.h"

namespace rnn_ext::ops {

/// Output, h_n, c_n and cells as of the layer op.
using QuantizedResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

QuantizedResult quantized_layer_call(const at::Tensor& input, const OptionalTensor& h_0, const OptionalTensor& c_0,
                                     at::TensorList weights, const OptionalTensor& batch_sizes,
                                     const OptionalTensor& lengths, const OptionalTensor& resets, std::string_view cell,
                                     bool bidirectional, bool batch_first, bool cell_states);

}  // namespace rnn_ext::ops
