// A stack of layers in one call: the layer op for one after the other, or several layers at the same time where that is
// faster. Only a shorter way to the same results and graph: what looks at single ops (tracing, transforms, modes) sees
// layers.
#pragma once

#include "ops/layer.h"

namespace rnn_ext::ops {

using StackStates = std::vector<OptionalTensor>;            // of each layer
using StackWeights = std::vector<std::vector<at::Tensor>>;  // of each layer

/// Output, h_n, c_n and cells as of the layer op, states (layers * D, N, features); `weights` of all layers.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> stack(
    const at::Tensor& input, const OptionalTensor& h_0, const OptionalTensor& c_0,
    const std::vector<at::Tensor>& weights, const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
    const OptionalTensor& resets, std::string_view cell, int64_t layers, bool bidirectional, bool batch_first,
    bool cell_states);

/// Whether all layers should run at the same time on the CPU, each some timesteps behind the one below it. `trains`:
/// backward may follow. Nothing has been checked yet.
bool pipelines(const at::Tensor& input, int64_t batch, const StackWeights& weights, const LayerOptions& options,
               bool trains);

/// Runs them so, below autograd, and keeps for backward what the layers in `save` need. The bits of one layer after the
/// other.
std::vector<LayerResult> pipelined_forward(const at::Tensor& input, const StackStates& h_0, const StackStates& c_0,
                                           const StackWeights& weights, const OptionalTensor& batch_sizes,
                                           const OptionalTensor& lengths, const OptionalTensor& resets,
                                           const LayerOptions& options, const std::vector<bool>& save);

}  // namespace rnn_ext::ops
