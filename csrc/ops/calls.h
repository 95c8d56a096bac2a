// The ops by way of the dispatcher.
#pragma once

#include <utility>

#include "ops/layer.h"

namespace rnn_ext::ops {

/// The dispatch keys that a call sees whose tensors have these.
c10::DispatchKeySet seen_keys(c10::DispatchKeySet of_tensors);
/// Whether nothing but autograd comes before the CPU's kernels.
bool reaches_cpu_kernels(c10::DispatchKeySet seen);

LayerResult layer_call(const LayerInputs& in, bool save, bool recompute);
/// One timestep of one direction without the dimensions of these: input (N, I), states (N, H). Returns the next h and,
/// for a cell that has one, c.
std::pair<at::Tensor, at::Tensor> cell_call(const at::Tensor& input, const OptionalTensor& h, const OptionalTensor& c,
                                            at::TensorList weights, std::string_view cell);
LayerGrads layer_backward_call(const LayerCotangents& grads, const LayerInputs& in, const at::Tensor& output,
                               const at::Tensor& saved, const c10::List<bool>& output_mask,
                               const c10::SymInt& groups = 0);

/// What layer_tangent is given: for the time of the call.
struct TangentInputs {
  const OptionalTensors &tangents, &tensors;
  const OptionalTensor &batch_sizes, &lengths, &resets;
  const OptionalTensors& masks;
  LayerOptions options;
};
std::vector<at::Tensor> layer_tangent_call(const TangentInputs& in, const c10::List<bool>& output_mask);

/// The same written in PyTorch, see rnn_ext/derivatives.py.
LayerResult layer_reference_call(const LayerInputs& in);
LayerGrads layer_backward_reference_call(const LayerCotangents& grads, const LayerInputs& in,
                                         const c10::List<bool>& output_mask);
std::vector<at::Tensor> layer_tangent_reference_call(const TangentInputs& in, const c10::List<bool>& output_mask);
/// And the gradient of that, of its tangents and tensors.
std::vector<at::Tensor> layer_tangent_backward_reference_call(const OptionalTensors& cotangents,
                                                              const TangentInputs& in,
                                                              const c10::List<bool>& output_mask,
                                                              const c10::List<bool>& wanted);

}  // namespace rnn_ext::ops
