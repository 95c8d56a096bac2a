#include "ops/calls.h"

#include <ATen/core/dispatch/Dispatcher.h>

namespace rnn_ext::ops {
namespace {

const auto& layer_op() {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("rnn_ext::layer", "")
          .typed<LayerResult(const at::Tensor&, const OptionalTensor&, const OptionalTensor&, at::TensorList,
                             const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                             const OptionalTensors&, std::string_view, bool, bool, bool, bool, bool)>();
  return op;
}

const auto& layer_backward_op() {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("rnn_ext::layer_backward", "")
          .typed<LayerGrads(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                            const at::Tensor&, const OptionalTensor&, const OptionalTensor&, at::TensorList,
                            const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensors&,
                            const at::Tensor&, const at::Tensor&, std::string_view, bool, bool, bool,
                            const c10::List<bool>&, c10::SymInt)>();
  return op;
}

const auto& layer_reference_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rnn_ext::layer_reference", "")
                             .typed<std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
                                 const at::Tensor&, const OptionalTensor&, const OptionalTensor&, at::TensorList,
                                 const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                 const OptionalTensors&, std::string_view, bool, bool, bool)>();
  return op;
}

const auto& layer_backward_reference_op() {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("rnn_ext::layer_backward_reference", "")
          .typed<LayerGrads(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                            const at::Tensor&, const OptionalTensor&, const OptionalTensor&, at::TensorList,
                            const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensors&,
                            std::string_view, bool, bool, bool, const c10::List<bool>&)>();
  return op;
}

auto find_tangent_op(const char* name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(name, "")
      .typed<std::vector<at::Tensor>(const OptionalTensors&, const OptionalTensors&, const OptionalTensor&,
                                     const OptionalTensor&, const OptionalTensor&, const OptionalTensors&,
                                     std::string_view, bool, bool, bool, const c10::List<bool>&)>();
}
const auto& layer_tangent_op() {
  static const auto op = find_tangent_op("rnn_ext::layer_tangent");
  return op;
}
const auto& layer_tangent_reference_op() {
  static const auto op = find_tangent_op("rnn_ext::layer_tangent_reference");
  return op;
}

const auto& layer_tangent_backward_reference_op() {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("rnn_ext::layer_tangent_backward_reference", "")
          .typed<std::vector<at::Tensor>(const OptionalTensors&, const OptionalTensors&, const OptionalTensors&,
                                         const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                         const OptionalTensors&, std::string_view, bool, bool, bool,
                                         const c10::List<bool>&, const c10::List<bool>&)>();
  return op;
}

}  // namespace

LayerResult layer_call(const LayerInputs& in, bool save, bool recompute) {
  return layer_op().call(in.input, in.h_0, in.c_0, in.weights, in.batch_sizes, in.lengths, in.resets, in.masks,
                         in.options.cell, in.options.bidirectional, in.options.batch_first, in.options.cell_states,
                         save, recompute);
}

LayerGrads layer_backward_call(const LayerCotangents& grads, const LayerInputs& in, const at::Tensor& output,
                               const at::Tensor& saved, const c10::List<bool>& output_mask, const c10::SymInt& groups) {
  return layer_backward_op().call(grads.output, grads.h_n, grads.c_n, grads.cells, in.input, in.h_0, in.c_0, in.weights,
                                  in.batch_sizes, in.lengths, in.resets, in.masks, output, saved, in.options.cell,
                                  in.options.bidirectional, in.options.batch_first, in.options.cell_states, output_mask,
                                  groups);
}

std::vector<at::Tensor> layer_tangent_call(const TangentInputs& in, const c10::List<bool>& output_mask) {
  return layer_tangent_op().call(in.tangents, in.tensors, in.batch_sizes, in.lengths, in.resets, in.masks,
                                 in.options.cell, in.options.bidirectional, in.options.batch_first,
                                 in.options.cell_states, output_mask);
}

LayerResult layer_reference_call(const LayerInputs& in) {
  auto [output, h_n, c_n, cells] = layer_reference_op().call(
      in.input, in.h_0, in.c_0, in.weights, in.batch_sizes, in.lengths, in.resets, in.masks, in.options.cell,
      in.options.bidirectional, in.options.batch_first, in.options.cell_states);
  return {output, h_n, c_n, cells, at::Tensor(in.input.new_empty({0}))};
}

LayerGrads layer_backward_reference_call(const LayerCotangents& grads, const LayerInputs& in,
                                         const c10::List<bool>& output_mask) {
  return layer_backward_reference_op().call(grads.output, grads.h_n, grads.c_n, grads.cells, in.input, in.h_0, in.c_0,
                                            in.weights, in.batch_sizes, in.lengths, in.resets, in.masks,
                                            in.options.cell, in.options.bidirectional, in.options.batch_first,
                                            in.options.cell_states, output_mask);
}

std::vector<at::Tensor> layer_tangent_reference_call(const TangentInputs& in, const c10::List<bool>& output_mask) {
  return layer_tangent_reference_op().call(in.tangents, in.tensors, in.batch_sizes, in.lengths, in.resets, in.masks,
                                           in.options.cell, in.options.bidirectional, in.options.batch_first,
                                           in.options.cell_states, output_mask);
}

std::vector<at::Tensor> layer_tangent_backward_reference_call(const OptionalTensors& cotangents,
                                                              const TangentInputs& in,
                                                              const c10::List<bool>& output_mask,
                                                              const c10::List<bool>& wanted) {
  return layer_tangent_backward_reference_op().call(
      cotangents, in.tangents, in.tensors, in.batch_sizes, in.lengths, in.resets, in.masks, in.options.cell,
      in.options.bidirectional, in.options.batch_first, in.options.cell_states, output_mask, wanted);
}

}  // namespace rnn_ext::ops
