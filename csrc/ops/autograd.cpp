// Autograd and autocast of the layer op.
//
// The nodes are written by hand in the manner of torch's own generated ones rather than as a torch::autograd::Function:
// they cost less per call, and torch.func's transforms refuse the latter but work through these.
#include <ATen/autocast_mode.h>
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

#include "ops/calls.h"
#include "ops/layer.h"
#include "ops/node.h"

namespace rnn_ext::ops {
namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torch::dynamo::autograd::CompiledNodeArgs;
using torch::dynamo::autograd::SwapSavedVariables;

OptionalTensor optional(const at::Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }
OptionalTensor unpack(const SavedVariable& saved) { return optional(saved.unpack()); }
OptionalTensors unpack_all(const std::vector<SavedVariable>& saved) {
  OptionalTensors result;
  for (const SavedVariable& one : saved) result.push_back(unpack(one));
  return result;
}

/// What compiled autograd calls: apply() with others in the place of the saved variables that each(fn) calls fn for.
template <class Each, class Apply>
variable_list apply_with_others(SwapSavedVariables& others, const Each& each, const Apply& apply) {
  each([&](SavedVariable& variable) { others.before(variable); });
  variable_list result = apply();
  each([&](SavedVariable& variable) { others.after(variable); });
  return result;
}

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
  LayerOptions options() const { return {cell, bidirectional, batch_first, cell_states}; }
};

/// Whether layer_tangent has a kernel for such a layer: a plain one without projection, on the CPU.
bool has_tangent_kernel(const at::Tensor& input, size_t weights, bool bidirectional, const OptionalTensors& masks) {
  const size_t count = weights / (bidirectional ? 2 : 1);
  return input.is_cpu() && !any_mask(masks) && (count == 2 || count == 4);
}
bool has_tangent_kernel(const LayerInputs& in) {
  return has_tangent_kernel(in.input, in.weights.size(), in.options.bidirectional, in.masks);
}

bool has_tangent(const OptionalTensor& tensor) { return torch::autograd::isFwGradDefined(tensor); }
OptionalTensor tangent_of(const OptionalTensor& tensor) {
  return has_tangent(tensor) ? OptionalTensor(tensor->_fw_grad(/*level=*/0)) : std::nullopt;
}
OptionalTensor without_tangent(const OptionalTensor& tensor) {
  return has_tangent(tensor) ? OptionalTensor(tensor->_fw_primal(/*level=*/0)) : tensor;
}
void set_tangent(const at::Tensor& tensor, const at::Tensor& tangent) {
  tensor._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
}

/// layer_tangent for each of some groups of batch entries, which have weight gradients of their own. The groups' own
/// are either the tangents of the weights, or the tangents of their gradients: of the others all have the same.
std::vector<at::Tensor> tangents_by_group(const TangentInputs& in, const c10::List<bool>& wanted,
                                          const c10::SymInt& groups, bool own_tangents) {
  const int64_t sequences = in.options.batch_first ? 0 : 1, states = 1, count = groups.guard_int(__FILE__, __LINE__);
  const auto batch_dim = [&](size_t i) {  // h_n, c_n, h_0 and c_0 are states
    return i == 1 || i == 2 || i == 5 || i == 6 ? states : sequences;
  };
  const auto part = [&](const OptionalTensor& tensor, int64_t dim, int64_t group) {
    if (!tensor.has_value()) return tensor;
    const c10::SymInt size = tensor->sym_size(dim) / groups;
    return OptionalTensor(tensor->narrow_symint(dim, size * group, size));
  };
  const auto part_of_all = [&](const OptionalTensors& all, bool own_weights, int64_t group) {
    OptionalTensors result;
    for (size_t i = 0; i < all.size(); ++i) {
      const OptionalTensor tensor = all.get(i);
      if (i < TangentTensors::kFirstWeight) {
        result.push_back(part(tensor, batch_dim(i), group));
      } else if (own_weights && tensor.has_value()) {
        result.push_back(tensor->select(0, group));
      } else {
        result.push_back(tensor);
      }
    }
    return result;
  };
  std::vector<std::vector<at::Tensor>> found(wanted.size());
  for (int64_t group = 0; group < count; ++group) {
    const OptionalTensor lengths = part(in.lengths, 0, group), resets = part(in.resets, sequences, group);
    const OptionalTensors tangents = part_of_all(in.tangents, own_tangents, group);
    const OptionalTensors tensors = part_of_all(in.tensors, false, group);
    std::vector<at::Tensor> results =
        layer_tangent_call({tangents, tensors, in.batch_sizes, lengths, resets, in.masks, in.options}, wanted);
    for (size_t i = 0; i < results.size(); ++i) found[i].push_back(std::move(results[i]));
  }
  std::vector<at::Tensor> joined;
  for (size_t i = 0; i < found.size(); ++i) {
    if (!wanted.get(i)) {
      joined.push_back(found[i][0]);
    } else if (i < TangentTensors::kFirstWeight) {
      joined.push_back(at::cat(found[i], batch_dim(i)));
    } else {
      joined.push_back(own_tangents ? at::stack(found[i]).sum(0) : at::stack(found[i]));
    }
  }
  return joined;
}

/// layer_tangent in the direction of the tangents that its arguments have; by group where there are some.
std::vector<at::Tensor> derivative(const LayerInputs& in, const LayerCotangents& grads, const c10::List<bool>& wanted,
                                   const c10::SymInt& groups = 0) {
  OptionalTensors tangents, tensors;
  const auto add = [&](const OptionalTensor& tensor) {
    tangents.push_back(tangent_of(tensor));
    tensors.push_back(without_tangent(tensor));
  };
  for (const OptionalTensor* grad : {&grads.output, &grads.h_n, &grads.c_n, &grads.cells}) add(*grad);
  for (const OptionalTensor& tensor : {OptionalTensor(in.input), in.h_0, in.c_0}) add(tensor);
  for (const at::Tensor& weight : in.weights) add(weight);
  const TangentInputs inputs{tangents, tensors, in.batch_sizes, in.lengths, in.resets, in.masks, in.options};
  return groups == 0 ? layer_tangent_call(inputs, wanted) : tangents_by_group(inputs, wanted, groups, false);
}
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

/// The arguments of a backward call, as long as a node keeps them. Derivatives go through grad_* and the layer's
/// inputs; `output` and `saved` are functions of the latter, so their share is already counted there.
struct SavedBackwardCall {
  enum { kGrads = 4 };
  SavedCall call;
  SavedVariable grads[kGrads];

  void save(const LayerCotangents& cotangents, const LayerInputs& in) {
    SavedVariable* next = grads;
    for (const OptionalTensor* grad : {&cotangents.output, &cotangents.h_n, &cotangents.c_n, &cotangents.cells})
      *next++ = SavedVariable(*grad, false);
    call.save(in);
  }
  void release() {
    each([](SavedVariable& saved) { saved.reset_data(); });
  }
  template <class Fn>
  void each(const Fn& fn) {
    call.each(fn);
    for (SavedVariable& grad : grads) fn(grad);
  }
  void collect(CompiledNodeArgs& args) const {
    call.collect(args);
    for (const SavedVariable& grad : grads) args.collect(grad, false);
  }
  /// fn of these as what layer_tangent is given.
  template <class Fn>
  std::vector<at::Tensor> with_tangents(const OptionalTensors& tangents, const Fn& fn) const {
    OptionalTensors tensors;
    for (const SavedVariable& grad : grads) tensors.push_back(unpack(grad));
    for (const SavedVariable* saved : {&call.input, &call.h_0, &call.c_0}) tensors.push_back(unpack(*saved));
    for (at::Tensor& weight : call.unpack_weights()) tensors.push_back(std::move(weight));
    return fn(TangentInputs{tangents, tensors, unpack(call.batch_sizes), unpack(call.lengths), unpack(call.resets),
                            unpack_all(call.masks), call.options()});
  }
};

/// Backward of layer_backward.
struct LayerBackwardBackward : public Node {
  SavedBackwardCall saved;
  c10::SymInt groups;

  std::string name() const override { return "RnnExtLayerBackwardBackward"; }
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    saved.release();
  }
  void compiled_args(CompiledNodeArgs& args) const override {
    saved.collect(args);
    args.collect(groups);
  }
  variable_list apply_with_saved(const variable_list& grad_grads, SwapSavedVariables& others) override {
    others.before(groups);
    variable_list result = apply_with_others(
        others, [&](const auto& fn) { saved.each(fn); }, [&] { return apply(variable_list(grad_grads)); });
    others.after(groups);
    return result;
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
    return apply_with_others(others, each, [&] { return apply(variable_list(grads)); });
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
    const OptionalTensors masks = unpack_all(call.masks);
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

/// Results of a node of so many, by compute(cotangents, wanted), which leaves empty what is not; undefined gradients
/// give undefined ones.
template <class Compute>
variable_list apply_wanted(const Node& node, const variable_list& grads, size_t count, const Compute& compute) {
  variable_list result(count);
  OptionalTensors cotangents;
  bool any = false;
  for (const at::Tensor& grad : grads) {
    any |= grad.defined();
    cotangents.push_back(optional(grad));
  }
  if (!any) return result;
  const NoAutocast no_autocast(c10::autocast_dispatch_keyset);
  c10::List<bool> wanted;
  for (size_t i = 0; i < count; ++i) wanted.push_back(node.task_should_compute_output(i));
  std::vector<at::Tensor> found = compute(cotangents, wanted);
  for (size_t i = 0; i < count; ++i) {
    if (wanted.get(i)) result[i] = std::move(found[i]);
  }
  return result;
}

variable_list LayerBackwardBackward::apply(variable_list&& grad_grads) {
  std::lock_guard<std::mutex> lock(mutex_);
  const SavedCall& call = saved.call;
  const size_t count = SavedBackwardCall::kGrads + 3 + call.weights.size();
  return apply_wanted(*this, grad_grads, count, [&](const OptionalTensors& cotangents, const c10::List<bool>& wanted) {
    OptionalTensors tangents;
    tangents.resize(SavedBackwardCall::kGrads, std::nullopt);
    tangents.append(cotangents);
    return saved.with_tangents(tangents, [&](const TangentInputs& in) {
      return groups == 0 ? layer_tangent_call(in, wanted) : tangents_by_group(in, wanted, groups, true);
    });
  });
}

/// Backward of layer_tangent, by the reference, which is differentiable as often as one likes. (Not by compiled
/// autograd, inside which the reference's own call of autograd cannot begin.)
struct LayerTangentBackward : public Node {
  SavedBackwardCall saved;
  std::vector<SavedVariable> tangents;
  c10::List<bool> output_mask;

  std::string name() const override { return "RnnExtLayerTangentBackward"; }
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    saved.release();
    for (SavedVariable& tangent : tangents) tangent.reset_data();
  }
  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    return apply_wanted(*this, grads, 2 * tangents.size(),
                        [&](const OptionalTensors& cotangents, const c10::List<bool>& wanted) {
                          return saved.with_tangents(unpack_all(tangents), [&](const TangentInputs& in) {
                            return layer_tangent_backward_reference_call(cotangents, in, output_mask, wanted);
                          });
                        });
  }
};

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
  const bool differentiates = has_tangent(in);
  if (differentiates && !has_tangent_kernel(in)) {
    return layer_reference_call(in);
  }
  const bool records = torch::autograd::compute_requires_grad(input, h_0, c_0, weights);
  const auto compute = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return layer_call(in, save || (records && !recompute), recompute);
  };
  LayerResult result = records ? record_layer(in, save, recompute, compute) : compute();
  if (differentiates) {
    const bool has_cell = cell_info(cell).has_cell;
    c10::List<bool> wanted({true, true, has_cell, cell_states});
    wanted.resize(7 + weights.size(), false);
    const OptionalTensor none;
    const std::vector<at::Tensor> found = derivative(in, {none, none, none, none}, wanted);
    const auto& [output, h_n, c_n, cells, saved] = result;
    const at::Tensor* const results[] = {&output, &h_n, &c_n, &cells};
    for (size_t i = 0; i < std::size(results); ++i)
      if (wanted.get(i)) set_tangent(*results[i], found[i]);
  }
  return result;
}

/// Calls fn(i, gradient) for the gradients of the input, h_0, c_0 and the weights.
template <class Fn>
void each_gradient(const LayerGrads& grads, const Fn& fn) {
  const auto& [dx, dh_0, dc_0, dw] = grads;
  fn(0, dx);
  fn(1, dh_0);
  fn(2, dc_0);
  for (size_t i = 0; i < dw.size(); ++i) fn(3 + i, dw[i]);
}

/// Autograd's record of a backward call whose results compute() gives.
LayerGrads record_layer_backward(const LayerCotangents& grads, const LayerInputs& in,
                                 const c10::List<bool>& output_mask, const c10::SymInt& groups,
                                 c10::function_ref<LayerGrads()> compute) {
  auto node = make_node<LayerBackwardBackward>();
  torch::autograd::edge_list edges;
  for (const OptionalTensor* grad : {&grads.output, &grads.h_n, &grads.c_n, &grads.cells}) add_edge(edges, *grad);
  add_edges(edges, in);
  node->set_next_edges(std::move(edges));
  node->saved.save(grads, in);
  node->groups = groups;
  LayerGrads result = compute();
  each_gradient(result, [&](size_t i, const at::Tensor& grad) {
    torch::autograd::set_history(output_mask.get(i) ? grad : at::Tensor(), node);
  });
  return result;
}

LayerGrads layer_backward_autograd(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                   const OptionalTensor& grad_c_n, const OptionalTensor& grad_cells,
                                   const at::Tensor& input, const OptionalTensor& h_0, const OptionalTensor& c_0,
                                   at::TensorList weights, const OptionalTensor& batch_sizes,
                                   const OptionalTensor& lengths, const OptionalTensor& resets,
                                   const OptionalTensors& masks, const at::Tensor& output, const at::Tensor& saved,
                                   std::string_view cell, bool bidirectional, bool batch_first, bool cell_states,
                                   const c10::List<bool>& output_mask, c10::SymInt groups) {
  const LayerInputs in{
      input, h_0, c_0, weights, batch_sizes, lengths, resets, masks, {cell, bidirectional, batch_first, cell_states}};
  const LayerCotangents grads{grad_output, grad_h_n, grad_c_n, grad_cells};
  const bool along_inputs = has_tangent(in);
  const bool along_grads =
      has_tangent(grad_output) || has_tangent(grad_h_n) || has_tangent(grad_c_n) || has_tangent(grad_cells);
  // (Of layers without this kernel there are no groups.)
  if ((along_inputs || along_grads) && !has_tangent_kernel(in) && groups == 0) {
    const NoAutocast no_autocast(c10::autocast_dispatch_keyset);
    return layer_backward_reference_call(grads, in, output_mask);
  }
  const auto compute = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return layer_backward_call(grads, in, output, saved, output_mask, groups);
  };
  const bool records =
      torch::autograd::compute_requires_grad(grad_output, grad_h_n, grad_c_n, grad_cells, input, h_0, c_0, weights);
  LayerGrads result = records ? record_layer_backward(grads, in, output_mask, groups, compute) : compute();
  if (!along_inputs && !along_grads) return result;
  std::vector<at::Tensor> tangents;
  if (along_inputs) {
    c10::List<bool> wanted({false, false, false, false});
    wanted.append(output_mask);
    const std::vector<at::Tensor> found = derivative(in, grads, wanted, groups);
    tangents.assign(found.begin() + SavedBackwardCall::kGrads, found.end());
  } else {  // the gradients are linear in what they are made of
    const OptionalTensor along[] = {tangent_of(grad_output), tangent_of(grad_h_n), tangent_of(grad_c_n),
                                    tangent_of(grad_cells)};
    const LayerGrads found =
        layer_backward_call({along[0], along[1], along[2], along[3]}, in, output, saved, output_mask, groups);
    each_gradient(found, [&](size_t, const at::Tensor& grad) { tangents.push_back(grad); });
  }
  each_gradient(result, [&](size_t i, const at::Tensor& grad) {
    if (output_mask.get(i)) set_tangent(grad, tangents[i]);
  });
  return result;
}

/// Where something has a tangent of its own, and what there is no kernel for, the reference does it.
std::vector<at::Tensor> layer_tangent_autograd(const OptionalTensors& tangents, const OptionalTensors& tensors,
                                               const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                                               const OptionalTensor& resets, const OptionalTensors& masks,
                                               std::string_view cell, bool bidirectional, bool batch_first,
                                               bool cell_states, const c10::List<bool>& output_mask) {
  const LayerOptions options{cell, bidirectional, batch_first, cell_states};
  const TangentInputs in{tangents, tensors, batch_sizes, lengths, resets, masks, options};
  bool records = false, differentiates = false;
  for (const OptionalTensors* list : {&tangents, &tensors}) {
    for (size_t i = 0; i < list->size(); ++i) {
      const OptionalTensor tensor = list->get(i);
      records |= tensor.has_value() && torch::autograd::compute_requires_grad(*tensor);
      differentiates |= has_tangent(tensor);
    }
  }
  const TangentTensors given(tensors);
  if (differentiates || !has_tangent_kernel(given.input, given.weights.size(), bidirectional, masks)) {
    const NoAutocast no_autocast(c10::autocast_dispatch_keyset);
    return layer_tangent_reference_call(in, output_mask);
  }
  const auto compute = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return layer_tangent_call(in, output_mask);
  };
  if (!records) return compute();
  auto node = make_node<LayerTangentBackward>();
  torch::autograd::edge_list edges;
  for (const OptionalTensors* list : {&tangents, &tensors})
    for (size_t i = 0; i < list->size(); ++i) add_edge(edges, list->get(i));
  node->set_next_edges(std::move(edges));
  node->saved.save({given.grad_output, given.grad_h_n, given.grad_c_n, given.grad_cells},
                   {given.input,
                    given.h_0,
                    given.c_0,
                    given.weights,
                    batch_sizes,
                    lengths,
                    resets,
                    masks,
                    {cell, bidirectional, batch_first, cell_states}});
  for (size_t i = 0; i < tangents.size(); ++i) node->tangents.emplace_back(OptionalTensor(tangents.get(i)), false);
  node->output_mask = output_mask.copy();
  std::vector<at::Tensor> results = compute();
  for (size_t i = 0; i < results.size(); ++i)
    torch::autograd::set_history(output_mask.get(i) ? results[i] : at::Tensor(), node);
  return results;
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
  m.impl("layer_tangent", &layer_tangent_autograd);
}

TORCH_LIBRARY_IMPL(rnn_ext, AutocastCPU, m) {
  m.impl("layer", &layer_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(rnn_ext, AutocastCUDA, m) {
  m.impl("layer", &layer_autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace
}  // namespace rnn_ext::ops
