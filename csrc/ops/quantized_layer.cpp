// The op for inference with weights of 8 bits.
#include "ops/quantized_layer.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "cpu/quantized.h"
#include "ops/cpu_call.h"
#include "ops/executor.h"
#include "ops/node.h"

namespace rnn_ext::ops {
namespace {

enum Part { kWeightIh, kWeightHh, kFactors, kWeightHr, kScaleHr };
constexpr int64_t kPlainParts = 3, kProjectedParts = 5;

at::Tensor dense(const at::Tensor& tensor, at::ScalarType dtype, at::IntArrayRef expected, const char* name) {
  TORCH_CHECK(tensor.scalar_type() == dtype, "expected ", name, " of dtype ", dtype, ", got ", tensor.scalar_type());
  check_sizes(tensor, expected, name);
  check_memory(tensor, name);
  return tensor.contiguous();
}

/// The weights of all directions, checked, in one piece each.
struct QuantizedTensors {
  QuantizedTensors(const LayerInputs& in) {
    const CellInfo cell = cell_info(in.options.cell);
    sizes.directions = in.options.bidirectional ? 2 : 1;
    const int64_t count = int64_t(in.weights.size()) / sizes.directions;
    TORCH_CHECK_VALUE(count * sizes.directions == int64_t(in.weights.size()) &&
                          (count == kPlainParts || (count == kProjectedParts && cell.has_cell)),
                      "expected 3 quantized weights (5 of a projected lstm) for each of ", sizes.directions,
                      " directions, got ", in.weights.size(), " in all");
    TORCH_CHECK(in.weights[kFactors].dim() == 3, "expected factors with 3 dimensions, got size ",
                in.weights[kFactors].sizes());
    TORCH_CHECK(in.input.dim() > 0, "expected input with features, got size ", in.input.sizes());
    sizes.input = in.input.size(-1);
    sizes.hidden = in.weights[kFactors].size(2);
    TORCH_CHECK_VALUE(sizes.hidden > 0, "expected at least one hidden unit, got factors of size ",
                      in.weights[kFactors].sizes());
    if (count == kProjectedParts) {
      sizes.proj = in.weights[kScaleHr].numel();
      TORCH_CHECK_VALUE(sizes.proj > 0, "expected a projection to at least one feature, got scale_hr of size ",
                        in.weights[kScaleHr].sizes());
    }
    constexpr int64_t block = cpu::kQuantizedBlock;
    pack = in.weights[kWeightIh].dim() > 0 && in.weights[kWeightIh].size(-1) == cell.gates * block * 4 ? 4 : 2;
    // Three dimensions: torch takes what has four or five for images, whose memory may be ordered by channels.
    for (int64_t size : {sizes.input, sizes.hidden, sizes.proj}) {
      TORCH_CHECK_VALUE(size <= cpu::kMostQuantized, "expected at most ", cpu::kMostQuantized,
                        " features and units of a quantized layer, got ", size);
    }
    const auto packed = [&](int64_t units, int64_t depth, int64_t gates) -> std::vector<int64_t> {
      return {(units + block - 1) / block, (depth + pack - 1) / pack, gates * block * pack};
    };
    for (int64_t d = 0; d < sizes.directions; ++d) {
      const at::TensorList own = in.weights.slice(d * count, count);
      const at::ScalarType integer = at::kChar, number = at::kFloat;
      tensors.push_back(dense(own[kWeightIh], integer, packed(sizes.hidden, sizes.input, cell.gates), "weight_ih"));
      tensors.push_back(dense(own[kWeightHh], integer, packed(sizes.hidden, sizes.output(), cell.gates), "weight_hh"));
      tensors.push_back(dense(own[kFactors], number, {4, cell.gates, sizes.hidden}, "factors"));
      if (!sizes.proj) continue;
      tensors.push_back(dense(own[kWeightHr], integer, packed(sizes.proj, sizes.hidden, 1), "weight_hr"));
      tensors.push_back(dense(own[kScaleHr], number, {sizes.proj}, "scale_hr"));
    }
  }

  cpu::QuantizedWeights of_direction(int d) const {
    const auto own = at::TensorList(tensors).slice(d * tensors.size() / sizes.directions);
    cpu::QuantizedWeights weights;
    weights.weight_ih = own[kWeightIh].const_data_ptr<int8_t>();
    weights.weight_hh = own[kWeightHh].const_data_ptr<int8_t>();
    weights.factors = own[kFactors].const_data_ptr<float>();
    if (sizes.proj) {
      weights.weight_hr = own[kWeightHr].const_data_ptr<int8_t>();
      weights.scale_hr = own[kScaleHr].const_data_ptr<float>();
    }
    return weights;
  }

  cpu::Sizes sizes;
  int pack = 2;
  std::vector<at::Tensor> tensors;
};

QuantizedResult quantized_layer_cpu(const at::Tensor& input, const OptionalTensor& h_0, const OptionalTensor& c_0,
                                    at::TensorList weights, const OptionalTensor& batch_sizes,
                                    const OptionalTensor& lengths, const OptionalTensor& resets, std::string_view cell,
                                    bool bidirectional, bool batch_first, bool cell_states) {
  leave_inherited_pool();
  const OptionalTensors no_masks;
  const LayerInputs in{input,   h_0,         c_0,
                       weights, batch_sizes, lengths,
                       resets,  no_masks,    {cell, bidirectional, batch_first, cell_states}};
  const at::ScalarType type = input.scalar_type(), number = at::kFloat;
  TORCH_CHECK(type == number || type == at::kBFloat16 || type == at::kHalf,
              "expected input of float32, bfloat16 or float16 for a quantized layer, got ", type);
  const QuantizedTensors quantized(in);
  const LayerShape shape(in, quantized.sizes);
  const cpu::Sizes& sizes = shape.sizes;
  const at::Tensor x = prepare_sequence(input, number, "input");
  const OptionalTensor h = prepare(h_0, number, "h_0"), c = prepare(c_0, number, "c_0");
  const auto like = input.options().dtype(number);
  const at::Tensor output = empty(shape.sequence_sizes(sizes.directions * sizes.output()), like);
  const at::Tensor h_n = empty({sizes.directions, shape.batch, sizes.output()}, like);
  at::Tensor c_n = empty({0}, like), cells = empty({0}, like);
  if (shape.cell.has_cell) c_n = empty({sizes.directions, shape.batch, sizes.hidden}, like);
  if (cell_states) cells = empty(shape.sequence_sizes(sizes.directions * sizes.hidden), like);

  cpu::QuantizedArgs args;
  cpu::ForwardArgs<float>& call = args.call;
  call.cell = shape.cell.kind;
  call.sizes = sizes;
  call.layout = shape.layout();
  call.input = sequence<const float>(x, shape);
  call.resets = sequence<const bool>(resets, shape);
  call.h_0 = pointer<float>(h);
  call.c_0 = pointer<float>(c);
  call.output = sequence<float>(output, shape);
  if (lengths.has_value()) zero_past_end(call.output, call.layout, output.size(-1));
  if (cell_states) {
    call.cells = sequence<float>(cells, shape);
    if (lengths.has_value()) zero_past_end(call.cells, call.layout, cells.size(-1));
  }
  call.h_n = data<float>(h_n);
  call.c_n = shape.cell.has_cell ? data<float>(c_n) : nullptr;
  args.pack = quantized.pack;
  for (int d = 0; d < sizes.directions; ++d) args.weights[d] = quantized.of_direction(d);
  cpu::quantized_forward(args, executor());
  return {cast(output, type), cast(h_n, type), cast(c_n, type), cast(cells, type)};
}

constexpr const char* kNoDerivative =
    "rnn_ext::quantized_layer has no derivative: call quantized layers under torch.no_grad(), when torch.compile "
    "compiles them, too, or differentiate what rnn_ext.dequantize makes of them";

/// Backward through what this returns raises an error.
QuantizedResult quantized_layer_autograd(const at::Tensor& input, const OptionalTensor& h_0, const OptionalTensor& c_0,
                                         at::TensorList weights, const OptionalTensor& batch_sizes,
                                         const OptionalTensor& lengths, const OptionalTensor& resets,
                                         std::string_view cell, bool bidirectional, bool batch_first,
                                         bool cell_states) {
  const auto has_tangent = [](const auto& tensor) { return torch::autograd::isFwGradDefined(tensor); };
  TORCH_CHECK_NOT_IMPLEMENTED(!has_tangent(input) && !has_tangent(h_0) && !has_tangent(c_0), kNoDerivative);
  QuantizedResult result;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    result = quantized_layer_call(input, h_0, c_0, weights, batch_sizes, lengths, resets, cell, bidirectional,
                                  batch_first, cell_states);
  }
  if (torch::autograd::compute_requires_grad(input, h_0, c_0, weights)) {
    const auto node = make_node<torch::autograd::Error>(kNoDerivative);
    node->set_next_edges(torch::autograd::collect_next_edges(input, h_0, c_0, weights));
    auto& [output, h_n, c_n, cells] = result;
    for (at::Tensor* tensor : {&output, &h_n, &c_n, &cells}) torch::autograd::set_history(*tensor, node);
  }
  return result;
}

TORCH_LIBRARY_IMPL(rnn_ext, CPU, m) { m.impl("quantized_layer", &quantized_layer_cpu); }
TORCH_LIBRARY_IMPL(rnn_ext, Autograd, m) { m.impl("quantized_layer", &quantized_layer_autograd); }

}  // namespace

QuantizedResult quantized_layer_call(const at::Tensor& input, const OptionalTensor& h_0, const OptionalTensor& c_0,
                                     at::TensorList weights, const OptionalTensor& batch_sizes,
                                     const OptionalTensor& lengths, const OptionalTensor& resets, std::string_view cell,
                                     bool bidirectional, bool batch_first, bool cell_states) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rnn_ext::quantized_layer", "")
                             .typed<decltype(quantized_layer_call)>();
  return op.call(input, h_0, c_0, weights, batch_sizes, lengths, resets, cell, bidirectional, batch_first, cell_states);
}

}  // namespace rnn_ext::ops
