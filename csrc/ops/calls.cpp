#include "ops/calls.h"

#include <ATen/core/dispatch/Dispatcher.h>

namespace rnn_ext::ops {
namespace {

template <class Function>
c10::TypedOperatorHandle<Function> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

using TangentOp = std::vector<at::Tensor>(const OptionalTensors&, const OptionalTensors&, const OptionalTensor&,
                                          const OptionalTensor&, const OptionalTensor&, const OptionalTensors&,
                                          std::string_view, bool, bool, bool, const c10::List<bool>&);

}  // namespace

c10::DispatchKeySet seen_keys(c10::DispatchKeySet of_tensors) {
  const c10::impl::LocalDispatchKeySet local = c10::impl::tls_local_dispatch_key_set();
  return (of_tensors | local.included_) - local.excluded_;
}

bool reaches_cpu_kernels(c10::DispatchKeySet seen) {
  constexpr c10::DispatchKeySet kNoMore{c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                                        c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::BackendSelect};
  return kNoMore.has_all(seen);
}

LayerResult layer_call(const LayerInputs& in, bool save, bool recompute) {
  static const auto op =
      find<LayerResult(const at::Tensor&, const OptionalTensor&, const OptionalTensor&, at::TensorList,
                       const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensors&,
                       std::string_view, bool, bool, bool, bool, bool)>("rnn_ext::layer");
  return op.call(in.input, in.h_0, in.c_0, in.weights, in.batch_sizes, in.lengths, in.resets, in.masks, in.options.cell,
                 in.options.bidirectional, in.options.batch_first, in.options.cell_states, save, recompute);
}

std::pair<at::Tensor, at::Tensor> cell_call(const at::Tensor& input, const OptionalTensor& h, const OptionalTensor& c,
                                            at::TensorList weights, std::string_view cell) {
  const auto lift = [&](const OptionalTensor& state, const char* name) {
    if (!state.has_value()) return state;
    // What else is of a wrong size, the layer says.
    if (input.dim() != 2 || weights.size() < 2 || weights[1].dim() != 2) return OptionalTensor(state->unsqueeze(0));
    const int64_t batch = input.size(0), width = weights[1].size(1);
    TORCH_CHECK(state->dim() == 2 && state->size(0) == batch && state->size(1) == width, "expected ", name,
                " of size [", batch, ", ", width, "], got ", state->sizes());
    return OptionalTensor(state->unsqueeze(0));
  };
  const LayerResult results = layer_call({input.unsqueeze(0),
                                          lift(h, "h_0"),
                                          lift(c, "c_0"),
                                          weights,
                                          std::nullopt,
                                          std::nullopt,
                                          std::nullopt,
                                          OptionalTensors(),
                                          {cell, false, false, false}},
                                         false, false);
  return {std::get<1>(results).squeeze(0), cell_info(cell).has_cell ? std::get<2>(results).squeeze(0) : at::Tensor()};
}

LayerGrads layer_backward_call(const LayerCotangents& grads, const LayerInputs& in, const at::Tensor& output,
                               const at::Tensor& saved, const c10::List<bool>& output_mask, const c10::SymInt& groups) {
  static const auto op = find<LayerGrads(
      const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const at::Tensor&,
      const OptionalTensor&, const OptionalTensor&, at::TensorList, const OptionalTensor&, const OptionalTensor&,
      const OptionalTensor&, const OptionalTensors&, const at::Tensor&, const at::Tensor&, std::string_view, bool, bool,
      bool, const c10::List<bool>&, c10::SymInt)>("rnn_ext::layer_backward");
  return op.call(grads.output, grads.h_n, grads.c_n, grads.cells, in.input, in.h_0, in.c_0, in.weights, in.batch_sizes,
                 in.lengths, in.resets, in.masks, output, saved, in.options.cell, in.options.bidirectional,
                 in.options.batch_first, in.options.cell_states, output_mask, groups);
}

std::vector<at::Tensor> layer_tangent_call(const TangentInputs& in, const c10::List<bool>& output_mask) {
  static const auto op = find<TangentOp>("rnn_ext::layer_tangent");
  return op.call(in.tangents, in.tensors, in.batch_sizes, in.lengths, in.resets, in.masks, in.options.cell,
                 in.options.bidirectional, in.options.batch_first, in.options.cell_states, output_mask);
}

LayerResult layer_reference_call(const LayerInputs& in) {
  static const auto op = find<std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, const OptionalTensor&, const OptionalTensor&, at::TensorList, const OptionalTensor&,
      const OptionalTensor&, const OptionalTensor&, const OptionalTensors&, std::string_view, bool, bool, bool)>(
      "rnn_ext::layer_reference");
  auto [output, h_n, c_n, cells] =
      op.call(in.input, in.h_0, in.c_0, in.weights, in.batch_sizes, in.lengths, in.resets, in.masks, in.options.cell,
              in.options.bidirectional, in.options.batch_first, in.options.cell_states);
  return {output, h_n, c_n, cells, at::Tensor(in.input.new_empty({0}))};
}

LayerGrads layer_backward_reference_call(const LayerCotangents& grads, const LayerInputs& in,
                                         const c10::List<bool>& output_mask) {
  static const auto op =
      find<LayerGrads(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                      const at::Tensor&, const OptionalTensor&, const OptionalTensor&, at::TensorList,
                      const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensors&,
                      std::string_view, bool, bool, bool, const c10::List<bool>&)>("rnn_ext::layer_backward_reference");
  return op.call(grads.output, grads.h_n, grads.c_n, grads.cells, in.input, in.h_0, in.c_0, in.weights, in.batch_sizes,
                 in.lengths, in.resets, in.masks, in.options.cell, in.options.bidirectional, in.options.batch_first,
                 in.options.cell_states, output_mask);
}

std::vector<at::Tensor> layer_tangent_reference_call(const TangentInputs& in, const c10::List<bool>& output_mask) {
  static const auto op = find<TangentOp>("rnn_ext::layer_tangent_reference");
  return op.call(in.tangents, in.tensors, in.batch_sizes, in.lengths, in.resets, in.masks, in.options.cell,
                 in.options.bidirectional, in.options.batch_first, in.options.cell_states, output_mask);
}

std::vector<at::Tensor> layer_tangent_backward_reference_call(const OptionalTensors& cotangents,
                                                              const TangentInputs& in,
                                                              const c10::List<bool>& output_mask,
                                                              const c10::List<bool>& wanted) {
  static const auto op = find<std::vector<at::Tensor>(
      const OptionalTensors&, const OptionalTensors&, const OptionalTensors&, const OptionalTensor&,
      const OptionalTensor&, const OptionalTensor&, const OptionalTensors&, std::string_view, bool, bool, bool,
      const c10::List<bool>&, const c10::List<bool>&)>("rnn_ext::layer_tangent_backward_reference");
  return op.call(cotangents, in.tangents, in.tensors, in.batch_sizes, in.lengths, in.resets, in.masks, in.options.cell,
                 in.options.bidirectional, in.options.batch_first, in.options.cell_states, output_mask, wanted);
}

}  // namespace rnn_ext::ops
