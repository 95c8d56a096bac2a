#include "ops/stack.h"

#include <ATen/ops/cat.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/FunctionsManual.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <algorithm>

#include "ops/calls.h"

namespace rnn_ext::ops {
namespace {

/// The dispatch keys a call of the layer op would see.
c10::DispatchKeySet keys_of(const at::Tensor& input, std::initializer_list<const OptionalTensor*> others,
                            at::TensorList weights) {
  c10::DispatchKeySet keys = input.key_set();
  for (const OptionalTensor* tensor : others) {
    if (tensor->has_value()) keys = keys | (*tensor)->key_set();
  }
  for (const at::Tensor& weight : weights) keys = keys | weight.key_set();
  return seen_keys(keys);
}

/// Whether nothing but autograd stands between the call and the CPU's kernels.
bool is_plain(c10::DispatchKeySet keys, const at::Tensor& input, const OptionalTensor& h_0, const OptionalTensor& c_0,
              at::TensorList weights) {
  using torch::autograd::isFwGradDefined;
  if (!reaches_cpu_kernels(keys) || isFwGradDefined(input) || isFwGradDefined(h_0) || isFwGradDefined(c_0))
    return false;
  return std::none_of(weights.begin(), weights.end(), [](const at::Tensor& weight) { return isFwGradDefined(weight); });
}

StackStates split(const OptionalTensor& state, int64_t layers, int64_t directions) {
  StackStates parts(layers);
  for (int64_t k = 0; state.has_value() && k < layers; ++k) parts[k] = state->narrow(0, k * directions, directions);
  return parts;
}

void check_state(const OptionalTensor& state, const char* name, at::IntArrayRef expected) {
  TORCH_CHECK(!state.has_value() || state->sizes() == expected, "Expected ", name, " of size ", expected, ", got ",
              state->sizes());
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> stack(
    const at::Tensor& input, const OptionalTensor& h_0, const OptionalTensor& c_0,
    const std::vector<at::Tensor>& weights, const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
    const OptionalTensor& resets, std::string_view cell, int64_t layers, bool bidirectional, bool batch_first,
    bool cell_states) {
  RECORD_FUNCTION("rnn_ext::stack", c10::ArrayRef<const c10::IValue>());
  const int64_t directions = bidirectional ? 2 : 1, given = int64_t(weights.size());
  TORCH_CHECK_VALUE(layers > 0 && given % layers == 0 && given >= 2 * layers * directions,
                    "expected 2 to 9 weights for each direction of ", layers, " layers, got ", given, " in all");
  const int64_t count = given / layers;
  StackWeights parts(layers);
  for (int64_t k = 0; k < layers; ++k) parts[k].assign(weights.begin() + k * count, weights.begin() + (k + 1) * count);
  for (int64_t k = 1; k < layers; ++k) {
    TORCH_CHECK(parts[k][1].sizes() == parts[0][1].sizes(), "expected weight_hh of size ", parts[0][1].sizes(),
                " in every layer, as in the first, got ", parts[k][1].sizes(), " in layer ", k);
  }
  const CellInfo info = cell_info(cell);
  LayerOptions options{cell, bidirectional, batch_first, cell_states};
  const bool counted =
      !batch_sizes.has_value() ||
      (batch_sizes->numel() > 0 && batch_sizes->scalar_type() == at::kLong && batch_sizes->device().is_cpu());
  if (!counted || input.dim() != (batch_sizes.has_value() ? 2 : 3) || parts[0][0].dim() != 2 ||
      parts[0][1].dim() != 2) {
    // Says what is wrong, as it would for the first layer.
    LayerShape({input, std::nullopt, std::nullopt, parts[0], batch_sizes, lengths, resets, OptionalTensors(), options});
  }
  // A tensor of a torch.func transform has no memory of its own to read.
  const auto first = [](const at::Tensor& sizes) {
    check_memory(sizes, "batch_sizes");
    return sizes.has_storage() ? sizes.const_data_ptr<int64_t>()[0] : sizes.select(0, 0).item<int64_t>();
  };
  const int64_t batch = batch_sizes.has_value() ? first(*batch_sizes) : input.size(batch_first ? 0 : 1);
  check_state(h_0, "h_0", {layers * directions, batch, parts[0][1].size(1)});
  check_state(c_0, "c_0", {layers * directions, batch, parts[0][0].size(0) / info.gates});
  const StackStates h_0s = split(h_0, layers, directions), c_0s = split(c_0, layers, directions);

  const c10::DispatchKeySet keys = keys_of(input, {&h_0, &c_0, &batch_sizes, &lengths, &resets}, weights);
  std::vector<bool> recorded(layers);
  std::optional<std::vector<LayerResult>> found;
  // As autograd would decide of one layer after the other: where nothing in it or below requires it, there is no node.
  for (int64_t k = 0; keys.has(c10::DispatchKey::AutogradCPU) && k < layers; ++k) {
    using torch::autograd::compute_requires_grad;
    recorded[k] = (k == 0 ? compute_requires_grad(input) : recorded[k - 1]) ||
                  compute_requires_grad(h_0s[k], c_0s[k], at::TensorList(parts[k]));
  }
  if (pipelines(input, batch, parts, options, recorded.back()) && is_plain(keys, input, h_0, c_0, weights)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    found = pipelined_forward(input, h_0s, c_0s, parts, batch_sizes, lengths, resets, options, recorded);
  }
  at::Tensor output = input, cells;
  std::vector<at::Tensor> h_ns, c_ns;
  for (int64_t k = 0; k < layers; ++k) {
    options.cell_states = cell_states && k == layers - 1;
    const LayerInputs in{output, h_0s[k], c_0s[k], parts[k], batch_sizes, lengths, resets, OptionalTensors(), options};
    const auto take = [&] { return std::move((*found)[k]); };
    LayerResult result = !found         ? layer_call(in, false, false)
                         : !recorded[k] ? take()
                                        : record_layer(in, false, false, take);
    output = std::get<0>(result);
    h_ns.push_back(std::get<1>(result));
    c_ns.push_back(std::get<2>(result));
    cells = std::get<3>(result);
  }
  return {output, at::cat(h_ns), info.has_cell ? at::cat(c_ns) : c_ns[0], cells};
}

}  // namespace rnn_ext::ops
