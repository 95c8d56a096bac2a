// Autograd and autocast of the layer op.
//
// The nodes are written by hand in the manner of torch's own generated ones rather than as a torch::autograd::Function:
// they cost less per call, and torch.func's transforms refuse the latter but work through these.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/FunctionsManual.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>

#include <algorithm>
#include <iterator>
#include <string>

#include "ops/layer.h"

namespace rnn_ext::ops {
namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torch::dynamo::autograd::CompiledNodeArgs;
using torch::dynamo::autograd::SwapSavedVariables;
using NodePtr = decltype(std::declval<Node&>().getptr());  // a shared_ptr or, in newer torch, an intrusive_ptr

template <class T>
auto make_node() {
  if constexpr (std::is_same_v<NodePtr, std::shared_ptr<Node>>) {
    // torch's deleter frees a long chain of nodes one after the other: by default each would free the next within its
    // own destructor, until the stack overflows.
    return std::shared_ptr<T>(new T(), [](T* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<T>();
  }
}

OptionalTensor optional(const at::Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }
OptionalTensor unpack(const SavedVariable& saved) { return optional(saved.unpack()); }

/// Every tensor and option of a forward call, as long as a node keeps them.
struct SavedCall {
  // Also what is never differentiable: a saved variable notices when it was changed in place.
  SavedVariable input, h_0, c_0, batch_sizes, lengths, resets;
  std::vector<SavedVariable> weights, masks;
  std::string cell;
  bool bidirectional = false, batch_first = false, cell_states = false;

  void save(const LayerInputs& in) {
    input = SavedVariable(in.input, false);
    h_0 = SavedVariable(in.h_0, false);
    c_0 = SavedVariable(in.c_0, false);
    weights.reserve(in.weights.size());
    for (const at::Tensor& weight : in.weights) weights.emplace_back(weight, false);
    batch_sizes = SavedVariable(in.batch_sizes, false);
    lengths = SavedVariable(in.lengths, false);
    resets = SavedVariable(in.resets, false);
    for (const OptionalTensor& mask : in.masks) masks.emplace_back(mask, false);
    cell = in.options.cell;
    bidirectional = in.options.bidirectional;
    batch_first = in.options.batch_first;
    cell_states = in.options.cell_states;
  }
  void release() {
    each([](SavedVariable& saved) { saved.reset_data(); });
  }
  template <class Fn>
  void each(const Fn& fn) {
    for (SavedVariable* saved : {&input, &h_0, &c_0, &batch_sizes, &lengths, &resets}) fn(*saved);
    for (SavedVariable& weight : weights) fn(weight);
    for (SavedVariable& mask : masks) fn(mask);
  }
  /// What compiled autograd is to know of a call.
  void collect(CompiledNodeArgs& args) const {
    const_cast<SavedCall*>(this)->each([&](const SavedVariable& saved) { args.collect(saved, false); });
    args.collect(weights.size());
    args.collect(masks.size());
    args.collect(cell);
    for (const bool option : {bidirectional, batch_first, cell_states}) args.collect(option);
  }
  std::vector<at::Tensor> unpack_weights() const {
    std::vector<at::Tensor> result;
    result.reserve(weights.size());
    for (const SavedVariable& weight : weights) result.push_back(weight.unpack());
    return result;
  }
  OptionalTensors unpack_masks() const {
    OptionalTensors result;
    for (const SavedVariable& mask : masks) result.push_back(unpack(mask));
    return result;
  }
  LayerOptions options() const { return {cell, bidirectional, batch_first, cell_states}; }
};

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
                            const c10::List<bool>&)>();
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

const auto& layer_double_backward_reference_op() {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("rnn_ext::layer_double_backward_reference", "")
          .typed<std::vector<at::Tensor>(const OptionalTensors&, const OptionalTensors&, const OptionalTensor&,
                                         const OptionalTensor&, const OptionalTensor&, const OptionalTensors&,
                                         std::string_view, bool, bool, bool, const c10::List<bool>&)>();
  return op;
}

}  // namespace

LayerResult layer_call(const LayerInputs& in, bool save, bool recompute) {
  return layer_op().call(in.input, in.h_0, in.c_0, in.weights, in.batch_sizes, in.lengths, in.resets, in.masks,
                         in.options.cell, in.options.bidirectional, in.options.batch_first, in.options.cell_states,
                         save, recompute);
}

LayerGrads layer_backward_call(const LayerCotangents& grads, const LayerInputs& in, const at::Tensor& output,
                               const at::Tensor& saved, const c10::List<bool>& output_mask) {
  return layer_backward_op().call(grads.output, grads.h_n, grads.c_n, grads.cells, in.input, in.h_0, in.c_0, in.weights,
                                  in.batch_sizes, in.lengths, in.resets, in.masks, output, saved, in.options.cell,
                                  in.options.bidirectional, in.options.batch_first, in.options.cell_states,
                                  output_mask);
}

namespace {

bool has_tangent(const OptionalTensor& tensor) { return torch::autograd::isFwGradDefined(tensor); }
bool has_tangent(const LayerInputs& in) {
  return has_tangent(in.input) || has_tangent(in.h_0) || has_tangent(in.c_0) ||
         std::any_of(in.weights.begin(), in.weights.end(),
                     [](const at::Tensor& weight) { return has_tangent(weight); });
}

/// To what a node gives gradients: the input, the states and the weights, in this order.
void add_edge(torch::autograd::edge_list& edges, const OptionalTensor& tensor) {
  const bool there = tensor.has_value() && tensor->defined();
  edges.push_back(there ? torch::autograd::impl::gradient_edge(*tensor) : torch::autograd::Edge());
}
void add_edges(torch::autograd::edge_list& edges, const LayerInputs& in) {
  edges.reserve(edges.size() + 3 + in.weights.size());
  for (const OptionalTensor& tensor : {OptionalTensor(in.input), in.h_0, in.c_0}) add_edge(edges, tensor);
  for (const at::Tensor& weight : in.weights) add_edge(edges, weight);
}

/// Recomputing in backward is as forward was, which autocast has had its say in.
using NoAutocast = c10::impl::ExcludeDispatchKeyGuard;

/// Backward of layer_backward. Derivatives go through grad_* and the layer's inputs; `output` and `saved` are functions
/// of the latter, so their share is already counted there.
struct LayerBackwardBackward : public Node {
  enum { kGrads = 4 };
  SavedCall call;
  SavedVariable grads[kGrads];

  std::string name() const override { return "RnnExtLayerBackwardBackward"; }
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    call.release();
    for (SavedVariable& grad : grads) grad.reset_data();
  }
  variable_list apply(variable_list&& grad_grads) override;
};

struct LayerBackward : public Node {
  SavedCall call;
  SavedVariable output, saved;  // neither where `recompute`
  at::Tensor nothing_saved;     // in the place of the latter if it is empty, which hooks may not expect
  c10::VariableVersion output_version{c10::VariableVersion::DISABLED};
  uint32_t saved_version = 0;
  bool recompute = false;

  /// An output that has been changed in place since, by a relu say, is computed again: torch.nn's layers, which keep
  /// other tensors, allow that.
  bool recomputes() const { return recompute || output_version.current_version() != saved_version; }

  std::string name() const override { return "RnnExtLayerBackward"; }
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    call.release();
    output.reset_data();
    saved.reset_data();
  }
  void compiled_args(CompiledNodeArgs& args) const override {
    call.collect(args);
    args.collect(recomputes());
    if (recomputes()) return;
    args.collect(output, true);
    args.collect(saved, false);
  }
  variable_list apply_with_saved(const variable_list& grads, SwapSavedVariables& others) override {
    const auto each = [&](const auto& fn) {
      call.each(fn);
      if (recomputes()) return;
      fn(output);
      fn(saved);
    };
    each([&](SavedVariable& variable) { others.before(variable); });
    variable_list result = apply(variable_list(grads));
    each([&](SavedVariable& variable) { others.after(variable); });
    return result;
  }
  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    variable_list result(3 + call.weights.size());
    bool any = false;
    for (const at::Tensor& grad : grads) any |= grad.defined();
    if (!any) return result;
    c10::List<bool> mask;
    for (size_t i = 0; i < result.size(); ++i) mask.push_back(task_should_compute_output(i));
    const std::vector<at::Tensor> weights = call.unpack_weights();
    const at::Tensor input = call.input.unpack();
    const OptionalTensor h_0 = unpack(call.h_0), c_0 = unpack(call.c_0);
    const OptionalTensor batch_sizes = unpack(call.batch_sizes), lengths = unpack(call.lengths),
                         resets = unpack(call.resets);
    const OptionalTensors masks = call.unpack_masks();
    const LayerInputs in{input, h_0, c_0, weights, batch_sizes, lengths, resets, masks, call.options()};
    at::Tensor forward_output, forward_saved;
    if (recomputes()) {
      const at::NoGradGuard no_grad;  // derivatives of a derivative go through the inputs alone
      const NoAutocast no_autocast(c10::autocast_dispatch_keyset);
      LayerResult again = layer_call(in, true, true);
      forward_output = std::get<0>(again);
      forward_saved = std::get<4>(again);
    } else {
      forward_output = output.unpack(getptr());
      forward_saved = nothing_saved.defined() ? nothing_saved : saved.unpack();
    }
    auto [dx, dh_0, dc_0, dw] =
        layer_backward_call({optional(grads[0]), optional(grads[1]), optional(grads[2]), optional(grads[3])}, in,
                            forward_output, forward_saved, mask);
    if (mask.get(0)) result[0] = std::move(dx);
    if (mask.get(1)) result[1] = std::move(dh_0);
    if (mask.get(2)) result[2] = std::move(dc_0);
    for (size_t i = 0; i < weights.size(); ++i) {
      if (mask.get(3 + i)) result[3 + i] = std::move(dw[i]);
    }
    return result;
  }
};

variable_list LayerBackwardBackward::apply(variable_list&& grad_grads) {
  std::lock_guard<std::mutex> lock(mutex_);
  variable_list result(kGrads + 3 + call.weights.size());
  OptionalTensors cotangents, tensors;
  bool any = false;
  for (const at::Tensor& grad : grad_grads) {
    any |= grad.defined();
    cotangents.push_back(optional(grad));
  }
  if (!any) return result;
  const NoAutocast no_autocast(c10::autocast_dispatch_keyset);
  for (const SavedVariable& grad : grads) tensors.push_back(unpack(grad));
  for (const SavedVariable* saved : {&call.input, &call.h_0, &call.c_0}) tensors.push_back(unpack(*saved));
  for (at::Tensor& weight : call.unpack_weights()) tensors.push_back(std::move(weight));
  c10::List<bool> mask;
  for (size_t i = 0; i < result.size(); ++i) mask.push_back(task_should_compute_output(i));
  std::vector<at::Tensor> found = layer_double_backward_reference_op().call(
      cotangents, tensors, unpack(call.batch_sizes), unpack(call.lengths), unpack(call.resets), call.unpack_masks(),
      call.cell, call.bidirectional, call.batch_first, call.cell_states, mask);
  size_t next = 0;
  for (size_t i = 0; i < result.size(); ++i) {
    if (tensors.get(i).has_value() && mask.get(i)) result[i] = std::move(found[next++]);
  }
  return result;
}

}  // namespace

LayerResult record_layer(const LayerInputs& in, bool save, bool recompute, c10::function_ref<LayerResult()> compute) {
  auto node = make_node<LayerBackward>();
  torch::autograd::edge_list edges;
  add_edges(edges, in);
  node->set_next_edges(std::move(edges));
  node->call.save(in);
  LayerResult result = compute();
  auto& [output, h_n, c_n, cells, saved] = result;
  torch::autograd::set_history(output, node);
  torch::autograd::set_history(h_n, node);
  torch::autograd::set_history(cell_info(in.options.cell).has_cell ? c_n : at::Tensor(), node);
  torch::autograd::set_history(in.options.cell_states ? cells : at::Tensor(), node);
  node->recompute = recompute;
  if (!recompute) {
    node->output = SavedVariable(output, true);
    node->output_version = torch::autograd::impl::version_counter(output);
    node->saved_version = node->output_version.current_version();
    const bool nothing = !saved.unsafeGetTensorImpl()->has_symbolic_sizes_strides() && saved.numel() == 0;
    if (nothing) {
      node->nothing_saved = saved;
    } else {
      node->saved = SavedVariable(saved, false);
    }
  }
  if (!save) saved = saved.new_empty({0});
  return result;
}

namespace {

LayerResult layer_autograd(const at::Tensor& input, const OptionalTensor& h_0, const OptionalTensor& c_0,
                           at::TensorList weights, const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                           const OptionalTensor& resets, const OptionalTensors& masks, std::string_view cell,
                           bool bidirectional, bool batch_first, bool cell_states, bool save, bool recompute) {
  const LayerInputs in{
      input, h_0, c_0, weights, batch_sizes, lengths, resets, masks, {cell, bidirectional, batch_first, cell_states}};
  if (has_tangent(in)) {
    auto [output, h_n, c_n, cells] = layer_reference_op().call(input, h_0, c_0, weights, batch_sizes, lengths, resets,
                                                               masks, cell, bidirectional, batch_first, cell_states);
    return {output, h_n, c_n, cells, at::Tensor(input.new_empty({0}))};
  }
  if (!torch::autograd::compute_requires_grad(input, h_0, c_0, weights)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return layer_call(in, save, recompute);
  }
  return record_layer(in, save, recompute, [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return layer_call(in, save || !recompute, recompute);
  });
}

LayerGrads layer_backward_autograd(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                   const OptionalTensor& grad_c_n, const OptionalTensor& grad_cells,
                                   const at::Tensor& input, const OptionalTensor& h_0, const OptionalTensor& c_0,
                                   at::TensorList weights, const OptionalTensor& batch_sizes,
                                   const OptionalTensor& lengths, const OptionalTensor& resets,
                                   const OptionalTensors& masks, const at::Tensor& output, const at::Tensor& saved,
                                   std::string_view cell, bool bidirectional, bool batch_first, bool cell_states,
                                   const c10::List<bool>& output_mask) {
  const LayerInputs in{
      input, h_0, c_0, weights, batch_sizes, lengths, resets, masks, {cell, bidirectional, batch_first, cell_states}};
  const OptionalTensor* const grads[] = {&grad_output, &grad_h_n, &grad_c_n, &grad_cells};
  if (has_tangent(in) ||
      std::any_of(std::begin(grads), std::end(grads), [](auto* grad) { return has_tangent(*grad); })) {
    const NoAutocast no_autocast(c10::autocast_dispatch_keyset);
    return layer_backward_reference_op().call(grad_output, grad_h_n, grad_c_n, grad_cells, input, h_0, c_0, weights,
                                              batch_sizes, lengths, resets, masks, cell, bidirectional, batch_first,
                                              cell_states, output_mask);
  }
  const auto compute = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return layer_backward_call({grad_output, grad_h_n, grad_c_n, grad_cells}, in, output, saved, output_mask);
  };
  if (!torch::autograd::compute_requires_grad(grad_output, grad_h_n, grad_c_n, grad_cells, input, h_0, c_0, weights))
    return compute();
  auto node = make_node<LayerBackwardBackward>();
  torch::autograd::edge_list edges;
  for (int i = 0; i < LayerBackwardBackward::kGrads; ++i) {
    add_edge(edges, *grads[i]);
    node->grads[i] = SavedVariable(*grads[i], false);
  }
  add_edges(edges, in);
  node->set_next_edges(std::move(edges));
  node->call.save(in);
  LayerGrads result = compute();
  auto& [dx, dh_0, dc_0, dw] = result;
  const auto attach = [&](size_t i, const at::Tensor& grad) {
    torch::autograd::set_history(output_mask.get(i) ? grad : at::Tensor(), node);
  };
  attach(0, dx);
  attach(1, dh_0);
  attach(2, dc_0);
  for (size_t i = 0; i < dw.size(); ++i) attach(3 + i, dw[i]);
  return result;
}

template <c10::DeviceType kDevice, c10::DispatchKey kKey>
LayerResult layer_autocast(const at::Tensor& input, const OptionalTensor& h_0, const OptionalTensor& c_0,
                           at::TensorList weights, const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                           const OptionalTensor& resets, const OptionalTensors& masks, std::string_view cell,
                           bool bidirectional, bool batch_first, bool cell_states, bool save, bool recompute) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(kKey);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(kDevice);
  const auto cast = [&](const at::Tensor& tensor) { return at::autocast::cached_cast(dtype, tensor, kDevice); };
  const auto cast_optional = [&](const OptionalTensor& tensor) {
    return tensor.has_value() ? OptionalTensor(cast(*tensor)) : std::nullopt;
  };
  std::vector<at::Tensor> cast_weights;
  for (const at::Tensor& weight : weights) cast_weights.push_back(cast(weight));
  return layer_call({cast(input),
                     cast_optional(h_0),
                     cast_optional(c_0),
                     cast_weights,
                     batch_sizes,
                     lengths,
                     resets,
                     masks,
                     {cell, bidirectional, batch_first, cell_states}},
                    save, recompute);
}

TORCH_LIBRARY_IMPL(rnn_ext, Autograd, m) {
  m.impl("layer", &layer_autograd);
  m.impl("layer_backward", &layer_backward_autograd);
}

TORCH_LIBRARY_IMPL(rnn_ext, AutocastCPU, m) {
  m.impl("layer", &layer_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(rnn_ext, AutocastCUDA, m) {
  m.impl("layer", &layer_autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace
}  // namespace rnn_ext::ops
