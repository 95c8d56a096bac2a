// Schemas, and the checks that every backend relies on.
#include "ops/layer.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <new>
#include <numeric>
#include <string>

#include "cells/cells.h"

namespace rnn_ext::ops {

#ifndef RNN_EXT_EMULATED  // tests/cuda_emulator wants the checks only: the library it is loaded beside has the schemas
TORCH_LIBRARY(rnn_ext, m) {
  m.def(
      "layer(Tensor input, Tensor? h_0, Tensor? c_0, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, "
      "Tensor? resets, Tensor?[] masks, str cell, bool bidirectional, bool batch_first, bool cell_states, bool save, "
      "bool recompute=False) "
      "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor cells, Tensor saved)");
  m.def(
      "layer_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_cells, Tensor input, "
      "Tensor? h_0, Tensor? c_0, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, Tensor? resets, "
      "Tensor?[] masks, Tensor output, Tensor saved, str cell, bool bidirectional, bool batch_first, bool cell_states, "
      "bool[] output_mask, SymInt groups=0) "
      "-> (Tensor grad_input, Tensor grad_h_0, Tensor grad_c_0, Tensor[] grad_weights)");
  // Inference with weights of 8 bits: for each direction weight_ih and weight_hh, their scales and the biases, and, of
  // a projected lstm, weight_hr and its scales, all as in cpu/quantized.h.
  m.def(
      "quantized_layer(Tensor input, Tensor? h_0, Tensor? c_0, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, "
      "Tensor? resets, str cell, bool bidirectional, bool batch_first, bool cell_states) "
      "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor cells)");
  m.def("random_mask(Tensor seed, SymInt[] size, float p, float value, ScalarType dtype) -> Tensor");
  // A derivative in a direction: `tensors` are the first eight arguments of layer_backward, `tangents` the direction in
  // the same order. Returns the derivatives of the four results of layer, then of the gradients of input, h_0, c_0 and
  // weights that layer_backward returns; empty where they are not wanted. So it is forward mode, over reverse mode,
  // too; and with the cotangents of layer_backward's results as tangents of the inputs, and no other, its backward.
  m.def(
      "layer_tangent(Tensor?[] tangents, Tensor?[] tensors, Tensor? batch_sizes, Tensor? lengths, Tensor? resets, "
      "Tensor?[] masks, str cell, bool bidirectional, bool batch_first, bool cell_states, bool[] output_mask) "
      "-> Tensor[]");
  // The following are written in Python with reference.py, and differentiable as often as one likes.
  m.def(
      "layer_reference(Tensor input, Tensor? h_0, Tensor? c_0, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, "
      "Tensor? resets, Tensor?[] masks, str cell, bool bidirectional, bool batch_first, bool cell_states) "
      "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor cells)");
  m.def(
      "layer_backward_reference(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_cells, "
      "Tensor input, Tensor? h_0, Tensor? c_0, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, Tensor? resets, "
      "Tensor?[] masks, str cell, bool bidirectional, bool batch_first, bool cell_states, bool[] output_mask) "
      "-> (Tensor grad_input, Tensor grad_h_0, Tensor grad_c_0, Tensor[] grad_weights)");
  m.def(
      "layer_tangent_reference(Tensor?[] tangents, Tensor?[] tensors, Tensor? batch_sizes, Tensor? lengths, "
      "Tensor? resets, Tensor?[] masks, str cell, bool bidirectional, bool batch_first, bool cell_states, "
      "bool[] output_mask) -> Tensor[]");
  // The gradient of that, in tangents and tensors, from the cotangents of its results.
  m.def(
      "layer_tangent_backward_reference(Tensor?[] cotangents, Tensor?[] tangents, Tensor?[] tensors, "
      "Tensor? batch_sizes, Tensor? lengths, Tensor? resets, Tensor?[] masks, str cell, bool bidirectional, "
      "bool batch_first, bool cell_states, bool[] output_mask, bool[] wanted) -> Tensor[]");
}
#endif

template <class Cell>
static CellInfo info_of(cpu::CellKind kind) {
  return {kind, Cell::kGates, Cell::kHasCell};
}

CellInfo cell_info(std::string_view name) {
#define RNN_EXT_FIND(Cell, NAME) \
  if (name == cells::Cell::kName) return info_of<cells::Cell>(cpu::CellKind::k##Cell);
  RNN_EXT_FOR_EACH_CELL(RNN_EXT_FIND)
#undef RNN_EXT_FIND
#define RNN_EXT_NAME(Cell, NAME) , " ", cells::Cell::kName
  TORCH_CHECK_VALUE(false, "unknown cell '", std::string(name),
                    "': expected one of" RNN_EXT_FOR_EACH_CELL(RNN_EXT_NAME));
#undef RNN_EXT_NAME
}

TangentTensors::TangentTensors(const OptionalTensors& tensors) {
  TORCH_CHECK(tensors.size() > kFirstWeight, "expected at least ", kFirstWeight + 1, " tensors, got ", tensors.size());
  TORCH_CHECK(tensors.get(kInput).has_value(), "expected an input as tensor ", int(kInput), ", got None");
  size_t next = 0;
  for (OptionalTensor* to : {&grad_output, &grad_h_n, &grad_c_n, &grad_cells}) *to = tensors.get(next++);
  input = *OptionalTensor(tensors.get(kInput));
  h_0 = tensors.get(kInput + 1);
  c_0 = tensors.get(kInput + 2);
  for (size_t i = kFirstWeight; i < tensors.size(); ++i) {
    TORCH_CHECK(tensors.get(i).has_value(), "expected all weights, got None for one");
    weights.push_back(*OptionalTensor(tensors.get(i)));
  }
}

void check_sizes(const at::Tensor& tensor, at::IntArrayRef expected, const char* name) {
  TORCH_CHECK(tensor.sizes() == expected, "expected ", name, " of size ", expected, ", got ", tensor.sizes());
}

void check_memory(const at::Tensor& tensor, const char* name) {
  if (!tensor.has_storage() || tensor.numel() == 0) return;
  int64_t last = tensor.storage_offset();
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  const int64_t needed = (last + 1) * int64_t(tensor.itemsize()), found = int64_t(tensor.storage().nbytes());
  TORCH_CHECK(needed <= found, name, " of size ", tensor.sizes(), " has no memory: expected a storage of at least ",
              needed, " bytes, got one of ", found);
}

namespace {

const char* const kMaskNames[] = {"hidden_mask", "zoneout_h", "zoneout_c"};
constexpr int kNormWeights = 4;

void check_like_input(const at::Tensor& tensor, const at::Tensor& input, const char* name) {
  TORCH_CHECK(tensor.scalar_type() == input.scalar_type(), name, " is ", tensor.scalar_type(), " but input is ",
              input.scalar_type(), ": expected the same dtype");
  TORCH_CHECK(tensor.device() == input.device(), name, " is on ", tensor.device(), " but input is on ", input.device(),
              ": expected the same device");
}

void check_optional(const OptionalTensor& tensor, const at::Tensor& input, at::IntArrayRef expected, const char* name) {
  if (!tensor.has_value() || !tensor->defined()) return;
  check_like_input(*tensor, input, name);
  check_sizes(*tensor, expected, name);
}

}  // namespace

const char* LayerShape::name_of(Weight weight) {
  static const char* const names[] = {"weight_ih",      "weight_hh",      "bias_ih",       "bias_hh",    "weight_hr",
                                      "weight_norm_ih", "weight_norm_hh", "weight_norm_c", "bias_norm_c"};
  return names[weight];
}

int LayerShape::index(int direction, Weight weight) const {
  const int base = direction * weights_per_direction;
  switch (weight) {
    case kWeightIh:
    case kWeightHh:
      return base + weight;
    case kBiasIh:
    case kBiasHh:
      return bias ? base + weight : -1;
    case kWeightHr:
      return sizes.proj ? base + (bias ? 4 : 2) : -1;
    default:
      return variant == cpu::Variant::kLayerNorm
                 ? base + weights_per_direction - kNormWeights + (weight - kWeightNormIh)
                 : -1;
  }
}

LayerShape::LayerShape(const LayerInputs& in)
    : cell(cell_info(in.options.cell)),
      packed(in.batch_sizes.has_value()),
      batch_first(in.options.batch_first && !packed) {
  read_weights(in);
  read_sequences(in);
}

LayerShape::LayerShape(const LayerInputs& in, const cpu::Sizes& sizes)
    : cell(cell_info(in.options.cell)),
      sizes(sizes),
      packed(in.batch_sizes.has_value()),
      batch_first(in.options.batch_first && !packed) {
  read_sequences(in);
}

void LayerShape::read_weights(const LayerInputs& in) {
  const auto& [input, h_0, c_0, weights, batch_sizes_, lengths, resets, masks, options] = in;
  sizes.directions = options.bidirectional ? 2 : 1;
  int64_t count = int64_t(weights.size()) / sizes.directions;
  const bool normed = count > 5;
  weights_per_direction = int(count);
  if (normed) count -= kNormWeights;
  TORCH_CHECK_VALUE(int64_t(weights.size()) == weights_per_direction * sizes.directions && count >= 2 && count <= 5,
                    "expected 2 to 5 weights (6 to 9 with layer normalisation) for each of ", sizes.directions,
                    " directions, got ", weights.size(), " in all");
  TORCH_CHECK_VALUE(!normed || cell.has_cell, "only an lstm can have layer normalisation, got ", weights_per_direction,
                    " weights a direction for ", std::string(options.cell));
  TORCH_CHECK_VALUE(masks.empty() || masks.size() == kMasks, "expected no masks or ", int(kMasks), ", got ",
                    masks.size());
  variant = normed ? cpu::Variant::kLayerNorm : any_mask(masks) ? cpu::Variant::kMasked : cpu::Variant::kPlain;
  bias = count >= 4;
  const bool projected = count == 3 || count == 5;
  TORCH_CHECK_VALUE(!projected || cell.has_cell, "only an lstm can be projected, got ", count,
                    " weights a direction for ", std::string(options.cell));
  TORCH_CHECK(at::isFloatingType(input.scalar_type()), "expected input of a floating-point dtype, got ",
              input.scalar_type());

  const at::Tensor& w_ih = weights[0];
  const at::Tensor& w_hh = weights[1];
  TORCH_CHECK(w_ih.dim() == 2 && w_hh.dim() == 2, "expected two-dimensional weight_ih and weight_hh, got sizes ",
              w_ih.sizes(), " and ", w_hh.sizes());
  sizes.input = w_ih.size(1);
  sizes.hidden = w_ih.size(0) / cell.gates;
  sizes.proj = projected ? w_hh.size(1) : 0;
  TORCH_CHECK_VALUE(sizes.hidden > 0, "expected at least one hidden unit, got weight_ih of size ", w_ih.sizes());
  TORCH_CHECK_VALUE(!projected || sizes.proj > 0,
                    "expected a projection to at least one feature, got weight_hh of size ", w_hh.sizes());
  const int64_t gate_rows = cell.gates * sizes.hidden;
  const int64_t input_gates[] = {gate_rows, sizes.input}, hidden_gates[] = {gate_rows, sizes.output()};
  const int64_t projection[] = {sizes.proj, sizes.hidden};
  const at::IntArrayRef gates(gate_rows), hidden(sizes.hidden);
  const at::IntArrayRef expected[] = {input_gates, hidden_gates, gates,  gates, projection,
                                      gates,       gates,        hidden, hidden};
  for (int d = 0; d < sizes.directions; ++d) {
    for (int i = 0; i < (normed ? kWeights : kWeightNormIh); ++i) {
      const Weight weight = Weight(i);
      if (index(d, weight) < 0) continue;
      const at::Tensor& tensor = weights[index(d, weight)];
      check_like_input(tensor, input, name_of(weight));
      check_sizes(tensor, expected[i], name_of(weight));
    }
  }
}

void LayerShape::read_sequences(const LayerInputs& in) {
  const auto& [input, h_0, c_0, weights, batch_sizes_, lengths, resets, masks, options] = in;
  TORCH_CHECK(input.dim() == (packed ? 2 : 3), "expected input with ", packed ? 2 : 3, " dimensions",
              packed ? " (packed)" : "", ", got size ", input.sizes());
  TORCH_CHECK(input.size(-1) == sizes.input, "input.size(-1) must be equal to input_size. Expected ", sizes.input,
              ", got ", input.size(-1));
  if (packed) {
    const at::Tensor& given = *batch_sizes_;
    TORCH_CHECK_VALUE(!lengths.has_value(), "lengths cannot be given for a packed input, which has its own");
    TORCH_CHECK(given.dim() == 1 && given.scalar_type() == at::kLong && given.device().is_cpu(),
                "expected batch_sizes as a one-dimensional int64 tensor on the CPU, got ", given.scalar_type(),
                " of size ", given.sizes(), " on ", given.device());
    TORCH_CHECK(given.numel() > 0, "expected batch_sizes of at least one timestep, got none");
    check_memory(given, "batch_sizes");
    const at::Tensor dense = given.contiguous();
    batch_sizes.assign(dense.const_data_ptr<int64_t>(), dense.const_data_ptr<int64_t>() + dense.numel());
    length = int64_t(batch_sizes.size());
    offsets.resize(length);
    batch = batch_sizes[0];
    for (int64_t t = 0; t < length; ++t) {
      TORCH_CHECK(batch_sizes[t] > 0 && batch_sizes[t] <= batch_sizes[t ? t - 1 : 0],
                  "expected positive, non-increasing batch_sizes, got ", batch_sizes[t], " at timestep ", t, " after ",
                  batch_sizes[t ? t - 1 : 0]);
    }
    TORCH_CHECK(batch <= input.size(0), "expected batch_sizes of no more than the ", input.size(0),
                " rows of packed input, got ", batch);
  } else {
    length = input.size(batch_first ? 1 : 0);
    batch = input.size(batch_first ? 0 : 1);
    int64_t positions = 0, numel = 0;
    const int64_t widest = std::max(sizes.input, cpu::Sizes::padded(sizes.hidden) * 2 * cell.gates);
    TORCH_CHECK(!__builtin_mul_overflow(length, batch, &positions) &&
                    !__builtin_mul_overflow(positions, widest * int64_t(sizeof(double)), &numel) &&
                    length <= (int64_t(1) << 40) / int64_t(sizeof(int64_t)),
                "input of size ", input.sizes(), " is too large: its gates alone would not fit any memory");
    try {
      batch_sizes.assign(length, batch);
      offsets.resize(length);
    } catch (const std::bad_alloc&) {
      TORCH_CHECK(false, "rnn_ext: not enough memory: ", 2 * length * int64_t(sizeof(int64_t)),
                  " bytes are needed for the rows of ", length, " timesteps");
    }
    if (lengths.has_value()) {
      TORCH_CHECK_TYPE(at::isIntegralType(lengths->scalar_type(), false), "expected lengths of an integer dtype, got ",
                       lengths->scalar_type());
      check_sizes(*lengths, {batch}, "lengths");
      check_memory(*lengths, "lengths");
      if (lengths->device().is_cpu() || input.device().is_cpu()) {
        order_by(lengths->to(at::kCPU, at::kLong).contiguous());
      }  // else: reading them would wait for the device, whose kernels take them as they are
    }
  }
  for (int64_t t = 0; t < length; ++t) {
    offsets[t] = rows;
    rows += batch_sizes[t];
  }
  TORCH_CHECK(!packed || rows == input.size(0), "expected ", rows,
              " rows of packed input, the sum of batch_sizes, got ", input.size(0));

  if (h_0.has_value()) {
    check_like_input(*h_0, input, "h_0");
    check_sizes(*h_0, {sizes.directions, batch, sizes.output()}, "h_0");
  }
  TORCH_CHECK_VALUE(cell.has_cell || !c_0.has_value(), "c_0 was given, but ", std::string(options.cell),
                    " has no cell state");
  if (c_0.has_value()) {
    check_like_input(*c_0, input, "c_0");
    check_sizes(*c_0, {sizes.directions, batch, sizes.hidden}, "c_0");
  }
  TORCH_CHECK_VALUE(cell.has_cell || !options.cell_states, "cell states were asked for, but ",
                    std::string(options.cell), " has none");
  if (resets.has_value()) {
    TORCH_CHECK_TYPE(resets->scalar_type() == at::kBool, "expected resets of dtype Bool, got ", resets->scalar_type());
    TORCH_CHECK(resets->device() == input.device(), "resets is on ", resets->device(), " but input is on ",
                input.device(), ": expected the same device");
    check_sizes(*resets, input.sizes().slice(0, input.dim() - 1), "resets");
    check_memory(*resets, "resets");
  }
  for (int i = 0; i < int(masks.size()); ++i) {
    const OptionalTensor mask = masks.get(size_t(i));
    if (!mask.has_value()) continue;
    TORCH_CHECK_VALUE(i != kZoneoutC || cell.has_cell, "zoneout_c was given, but ", std::string(options.cell),
                      " has no cell state");
    TORCH_CHECK(at::isFloatingType(mask->scalar_type()) && mask->device() == input.device(), "expected ", kMaskNames[i],
                " of a floating-point dtype on ", input.device(), ", got ", mask->scalar_type(), " on ",
                mask->device());
    if (i == kHiddenMask) {
      check_sizes(*mask, {sizes.directions, batch, sizes.output()}, kMaskNames[i]);
    } else {
      check_sizes(*mask, sequence_sizes(sizes.directions * (i == kZoneoutH ? sizes.output() : sizes.hidden)),
                  kMaskNames[i]);
    }
  }
}

void LayerShape::check_cotangents(const LayerCotangents& grads, const at::Tensor& input) const {
  const int64_t outputs[] = {sizes.directions, batch, sizes.output()},
                hidden[] = {sizes.directions, batch, sizes.hidden};
  check_optional(grads.output, input, sequence_sizes(sizes.directions * sizes.output()), "grad_output");
  check_optional(grads.h_n, input, outputs, "grad_h_n");
  check_optional(grads.c_n, input, hidden, "grad_c_n");
  check_optional(grads.cells, input, sequence_sizes(sizes.directions * sizes.hidden), "grad_cells");
}

void LayerShape::check_backward(const LayerCotangents& grads, const LayerInputs& in, const at::Tensor& output,
                                const at::Tensor& saved, at::ScalarType saved_dtype, int64_t saved_numel,
                                const c10::List<bool>& output_mask, int64_t groups) const {
  check_cotangents(grads, in.input);
  check_optional(output, in.input, sequence_sizes(sizes.directions * sizes.output()), "output");
  TORCH_CHECK(saved.scalar_type() == saved_dtype && saved.numel() == saved_numel, "expected saved as ", saved_numel,
              " values of ", saved_dtype, ", as a forward call with these inputs returns it, got ", saved.numel(),
              " of ", saved.scalar_type());
  TORCH_CHECK(output_mask.size() == 3 + in.weights.size(), "expected output_mask of ", 3 + in.weights.size(),
              " values, got ", output_mask.size());
  if (groups != 0) {
    TORCH_CHECK(groups > 0 && batch % groups == 0, "expected groups of equally many batch entries, got ", groups,
                " groups of ", batch, " entries");
    TORCH_CHECK_NOT_IMPLEMENTED(in.input.is_cpu() && is_basic() && !packed,
                                "groups are of plain layers without projection, not packed, on the CPU");
  }
  const OptionalTensor* const states[] = {&in.h_0, &in.c_0};
  for (size_t i = 0; i < 2; ++i) {
    TORCH_CHECK(!output_mask.get(1 + i) || states[i]->has_value(), "output_mask asks for the gradient of ",
                i ? "c_0" : "h_0", ", which was not given");
  }
}

void LayerShape::check_tangents(const OptionalTensors& tangents, const OptionalTensors& tensors,
                                const TangentTensors& given, const c10::List<bool>& output_mask) const {
  check_cotangents({given.grad_output, given.grad_h_n, given.grad_c_n, given.grad_cells}, given.input);
  TORCH_CHECK(tangents.size() == tensors.size() && output_mask.size() == tensors.size(), "expected ", tensors.size(),
              " tangents and values of output_mask, got ", tangents.size(), " and ", output_mask.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const OptionalTensor tensor = tensors.get(i), tangent = tangents.get(i);
    if (!tangent.has_value()) continue;
    TORCH_CHECK(tensor.has_value(), "a tangent was given of argument ", i, " of layer_backward, which was not");
    check_optional(tangent, given.input, tensor->sizes(), "a tangent");
  }
}

void LayerShape::order_by(const at::Tensor& lengths) {
  const int64_t* given = lengths.const_data_ptr<int64_t>();
  std::fill(batch_sizes.begin(), batch_sizes.end(), 0);
  for (int64_t n = 0; n < batch; ++n) {
    TORCH_CHECK_VALUE(given[n] >= 0 && given[n] <= length, "expected lengths between 0 and ", length, ", got ",
                      given[n], " for batch entry ", n);
    if (given[n] > 0) ++batch_sizes[given[n] - 1];
  }
  for (int64_t t = length - 2; t >= 0; --t) batch_sizes[t] += batch_sizes[t + 1];
  if (std::is_sorted(given, given + batch, std::greater())) return;  // a batch like any other
  order.resize(batch);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return given[a] > given[b]; });
}

cpu::Layout LayerShape::layout() const {
  cpu::Layout layout;
  layout.steps = length;
  layout.batch = batch;
  layout.rows = rows;
  layout.batch_sizes = batch_sizes.data();
  layout.offsets = offsets.data();
  layout.order = order.empty() ? nullptr : order.data();
  layout.packed = packed;
  return layout;
}

std::vector<int64_t> LayerShape::sequence_sizes(int64_t features) const {
  if (packed) return {rows, features};
  if (batch_first) return {batch, length, features};
  return {length, batch, features};
}

}  // namespace rnn_ext::ops
