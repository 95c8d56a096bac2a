// The layer op on the CPU: hands tensors to csrc/cpu. What its kernels do not take of float16 and bfloat16 is converted
// to float32 and back.
#include <torch/library.h>

#include <algorithm>
#include <deque>
#include <optional>
#include <utility>

#include "ops/cpu_call.h"
#include "ops/executor.h"
#include "ops/layer.h"
#include "ops/packed_cache.h"
#include "ops/stack.h"
#include "ops/workspace.h"

namespace rnn_ext::ops {
namespace {

/// What the kernels store sequences, states and weights in, forward.
at::ScalarType forward_type(const at::Tensor& input, cpu::CellKind cell, cpu::Variant variant, const cpu::Sizes& sizes,
                            const cpu::Layout& layout) {
  const at::ScalarType type = input.scalar_type();
  const bool plain = variant == cpu::Variant::kPlain;
  if (type == at::kBFloat16 && plain && cpu::computes_forward<cpu::BFloat16>(cell, sizes, layout)) return type;
  if (type == at::kHalf && plain && cpu::computes_forward<cpu::Float16>(cell, sizes, layout)) return type;
  return compute_type(input);
}
/// The same of backward.
at::ScalarType backward_type(const at::Tensor& input, cpu::CellKind cell, cpu::Variant variant, const cpu::Sizes& sizes,
                             const cpu::Layout& layout) {
  const bool computes = input.scalar_type() == at::kBFloat16 && variant == cpu::Variant::kPlain &&
                        cpu::computes_bfloat16() && !cpu::has_few_units<cpu::BFloat16>(cell, variant, sizes, layout);
  return computes ? at::kBFloat16 : compute_type(input);
}

bool has_few_units(at::ScalarType dtype, const LayerShape& shape) {
  bool result = false;
  with_stored<float, double, cpu::BFloat16>(dtype, [&](auto storage) {
    result = cpu::has_few_units<decltype(storage)>(shape.cell.kind, shape.variant, shape.sizes, shape.layout());
  });
  return result;
}

cpu::Storage storage_of(at::ScalarType type) {
  if (type == at::kBFloat16) return cpu::Storage::kBFloat16;
  return type == at::kHalf ? cpu::Storage::kFloat16 : cpu::Storage::kComputed;
}

/// What of a layer of 16 bits they take and give as it is stored.
cpu::Narrow narrow_backward(at::ScalarType type, const LayerShape& shape) {
  const cpu::Sizes& sizes = shape.sizes;
  const cpu::Layout layout = shape.layout();
  if (type == at::kBFloat16) return cpu::narrow_backward<cpu::BFloat16>(shape.cell.kind, shape.variant, sizes, layout);
  if (type == at::kHalf) return cpu::narrow_backward<cpu::Float16>(shape.cell.kind, shape.variant, sizes, layout);
  return {};
}

/// The masks in the dtype the kernels compute in; all null where there are none.
struct PreparedMasks {
  PreparedMasks(const OptionalTensors& masks, at::ScalarType dtype) {
    if (masks.empty()) return;
    hidden = prepare(OptionalTensor(masks.get(LayerShape::kHiddenMask)), dtype, "hidden_mask");
    zoneout_h = prepare_sequence(OptionalTensor(masks.get(LayerShape::kZoneoutH)), dtype, "zoneout_h");
    zoneout_c = prepare_sequence(OptionalTensor(masks.get(LayerShape::kZoneoutC)), dtype, "zoneout_c");
  }
  OptionalTensor hidden, zoneout_h, zoneout_c;

  template <class T>
  cpu::Masks<T> get(const LayerShape& shape) const {
    return {pointer<T>(hidden), sequence<const T>(zoneout_h, shape), sequence<const T>(zoneout_c, shape)};
  }
};

/// Of padded input every position counts, so that the size does not depend on the lengths' values.
int64_t saved_numel(const LayerShape& shape) {
  const int64_t rows = shape.packed ? shape.rows : shape.length * shape.batch;
  return shape.sizes.directions * rows * cpu::saved_values(shape.cell.kind, shape.sizes.proj != 0, shape.variant) *
         shape.sizes.padded();
}

/// A forward call: what it reads made ready for the kernels, and room for what they write.
class ForwardCall {
 public:
  ForwardCall(const LayerInputs& in, bool save)
      : shape(in),
        dtype(forward_type(in.input, shape.cell.kind, shape.variant, shape.sizes, shape.layout())),
        input_(in.input),
        resets_(in.resets),
        x_(prepare_sequence(in.input, dtype, "input")),
        h_0_(prepare(in.h_0, dtype, "h_0")),
        c_0_(prepare(in.c_0, dtype, "c_0")),
        masks_(in.masks, dtype),
        ends_(in.lengths.has_value()),
        save_(save),
        weights_(in.weights.vec()) {
    const auto like = in.input.options().dtype(dtype);
    const cpu::Sizes& sizes = shape.sizes;
    const auto new_sequence = [&](int64_t features) { return empty(shape.sequence_sizes(features), like); };
    output = new_sequence(sizes.directions * sizes.output());
    cells_ = in.options.cell_states ? new_sequence(sizes.directions * sizes.hidden) : empty({0}, like);
    h_n_ = empty({sizes.directions, shape.batch, sizes.output()}, like);
    c_n_ = shape.cell.has_cell ? empty({sizes.directions, shape.batch, sizes.hidden}, like) : empty({0}, like);
    saved_ = empty({save ? saved_numel(shape) : 0}, like.dtype(compute_type(in.input)));
  }
  ForwardCall(const ForwardCall&) = delete;
  ForwardCall& operator=(const ForwardCall&) = delete;

  /// For the kernels, as long as this object lives.
  template <class S>
  cpu::ForwardArgs<S> args() {
    cpu::ForwardArgs<S> args;
    args.cell = shape.cell.kind;
    args.sizes = shape.sizes;
    args.layout = shape.layout();
    args.variant = shape.variant;
    args.masks = masks_.get<S>(shape);
    args.input = sequence<const S>(x_, shape);
    args.resets = sequence<const bool>(resets_, shape);
    args.h_0 = pointer<S>(h_0_);
    args.c_0 = pointer<S>(c_0_);
    args.output = sequence<S>(output, shape);
    if (ends_) zero_past_end(args.output, args.layout, output.size(-1));
    if (cells_.dim() > 1) {
      args.cells = sequence<S>(cells_, shape);
      if (ends_) zero_past_end(args.cells, args.layout, cells_.size(-1));
    }
    args.h_n = data<S>(h_n_);
    args.c_n = shape.cell.has_cell ? data<S>(c_n_) : nullptr;
    args.trains = save_;
    args.saved = save_ ? data<cpu::Compute<S>>(saved_) : nullptr;
    for (int d = 0; d < shape.sizes.directions; ++d) {
      if (!save_ && reuses_packed<S>(args)) args.packed[d] = find_packed<S>(d);
      prepare_direction(weights_, d, args.packed[d] != nullptr);
      args.weights[d] = named_weights<const S>(weights_, shape, d);
    }
    return args;
  }

  LayerResult result() const {
    const at::ScalarType type = input_.scalar_type();
    return {cast(output, type), cast(h_n_, type), cast(c_n_, type), cast(cells_, type), saved_};
  }

  const LayerShape shape;
  const at::ScalarType dtype;
  at::Tensor output;

 private:
  template <class S>
  bool reuses_packed(const cpu::ForwardArgs<S>& args) const {
    if (cpu::has_few_units<S>(args.cell, args.variant, args.sizes, args.layout)) return false;
    if constexpr (sizeof(S) > 2) {
      const bool converted = input_.scalar_type() != dtype;  // which is not to be done again
      if (!converted && shape.variant == cpu::Variant::kPlain)
        return cpu::reuses_packed_weights<S>(args.cell, args.sizes, args.layout);
    }
    return cpu::uses_packed_weights<S>(args.sizes, args.layout);
  }

  /// The packed weights of a direction, if they are kept; as long as this object lives.
  template <class S>
  const cpu::PackedWeights* find_packed(int d) {
    const auto all = at::TensorList(weights_).slice(d * shape.weights_per_direction, shape.weights_per_direction);
    for (int i = 0; i < LayerShape::kWeights; ++i) {
      const auto weight = LayerShape::Weight(i);
      if (shape.index(d, weight) < 0) continue;
      check_memory(weights_[shape.index(d, weight)], LayerShape::name_of(weight));
      if (!weights_[shape.index(d, weight)].is_contiguous()) return nullptr;
    }
    packed_[d] = cached_weights(shape.cell.kind, shape.sizes, all, dtype, [&] {
      std::vector<at::Tensor> prepared = weights_;
      prepare_direction(prepared, d, false);
      return cpu::pack_weights(shape.cell.kind, shape.sizes, named_weights<const S>(prepared, shape, d));
    });
    return packed_[d].get();
  }

  /// The weights of a direction; what is packed the kernels do not look at.
  void prepare_direction(std::vector<at::Tensor>& weights, int d, bool packed) const {
    prepare_weights(weights, shape, d, [&](LayerShape::Weight weight) {
      const bool is_bias = weight == LayerShape::kBiasIh || weight == LayerShape::kBiasHh;
      const bool is_normed = weight >= LayerShape::kWeightNormIh || is_bias;
      const bool read = !packed || (is_normed && shape.variant == cpu::Variant::kLayerNorm);
      return read ? std::optional(dtype) : std::nullopt;
    });
  }

  const at::Tensor input_;
  const OptionalTensor resets_;
  const at::Tensor x_;
  const OptionalTensor h_0_, c_0_;
  const PreparedMasks masks_;
  const bool ends_, save_;
  std::vector<at::Tensor> weights_;
  at::Tensor cells_, h_n_, c_n_, saved_;
  std::shared_ptr<const cpu::PackedWeights> packed_[2];
};

LayerResult layer_cpu(const at::Tensor& input, const OptionalTensor& h_0, const OptionalTensor& c_0,
                      at::TensorList weights, const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                      const OptionalTensor& resets, const OptionalTensors& masks, std::string_view cell,
                      bool bidirectional, bool batch_first, bool cell_states, bool save, bool /*recompute*/) {
  leave_inherited_pool();
  ForwardCall call(
      {input, h_0, c_0, weights, batch_sizes, lengths, resets, masks, {cell, bidirectional, batch_first, cell_states}},
      save);
  with_stored<float, double, cpu::BFloat16, cpu::Float16>(
      call.dtype, [&](auto storage) { cpu::layer_forward(call.args<decltype(storage)>(), executor()); });
  return call.result();
}

LayerGrads layer_backward_cpu(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                              const OptionalTensor& grad_c_n, const OptionalTensor& grad_cells, const at::Tensor& input,
                              const OptionalTensor& h_0, const OptionalTensor& c_0, at::TensorList weights,
                              const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                              const OptionalTensor& resets, const OptionalTensors& masks, const at::Tensor& output,
                              const at::Tensor& saved, std::string_view cell, bool bidirectional, bool batch_first,
                              bool cell_states, const c10::List<bool>& output_mask, c10::SymInt sym_groups) {
  const int64_t groups = sym_groups.expect_int();  // (declared as an int, torch takes 1 us to make it one)
  leave_inherited_pool();
  const LayerInputs in{
      input, h_0, c_0, weights, batch_sizes, lengths, resets, masks, {cell, bidirectional, batch_first, cell_states}};
  const LayerShape shape(in);
  shape.check_backward({grad_output, grad_h_n, grad_c_n, grad_cells}, in, output, saved, compute_type(input),
                       saved_numel(shape), output_mask, groups);
  const at::ScalarType dtype = backward_type(input, shape.cell.kind, shape.variant, shape.sizes, shape.layout());
  const auto options = input.options().dtype(compute_type(input));
  const cpu::Sizes& sizes = shape.sizes;

  const at::Tensor x = prepare_sequence(input, dtype, "input");
  const at::Tensor y = prepare_sequence(output, dtype, "output");
  const at::Tensor kept = prepare(saved, saved.scalar_type(), "saved");
  const OptionalTensor h = prepare(h_0, dtype, "h_0"), c = prepare(c_0, dtype, "c_0");
  const PreparedMasks prepared_masks(masks, dtype);
  const OptionalTensor dy = prepare_sequence(grad_output, dtype, "grad_output"),
                       dcells = prepare_sequence(grad_cells, dtype, "grad_cells");
  const OptionalTensor dh_n = prepare(grad_h_n, dtype, "grad_h_n"), dc_n = prepare(grad_c_n, dtype, "grad_c_n");
  std::vector<at::Tensor> w = weights.vec();
  const cpu::Narrow narrow = narrow_backward(input.scalar_type(), shape);
  // What no gradient passes through the kernels do not look at, of biases only at layer normalisation's; but of few
  // units they compute the gates again.
  const bool normed = shape.variant == cpu::Variant::kLayerNorm;
  const bool few = has_few_units(dtype, shape);
  const auto passed = [&](LayerShape::Weight weight) {
    if (few) return true;
    if (weight == LayerShape::kWeightIh) return output_mask.get(0);
    if (weight == LayerShape::kWeightHh) return output_mask.get(1) || shape.layout().steps > 1;
    return weight == LayerShape::kWeightHr || normed;
  };
  const auto type_of = [&](LayerShape::Weight weight) -> std::optional<at::ScalarType> {
    if (!passed(weight)) return std::nullopt;
    const bool as_stored =
        (weight == LayerShape::kWeightIh && narrow.weight_ih) || (weight == LayerShape::kWeightHh && narrow.weight_hh);
    return as_stored ? input.scalar_type() : dtype;
  };
  for (int d = 0; d < sizes.directions; ++d) prepare_weights(w, shape, d, type_of);

  at::Tensor dx, dh_0, dc_0;
  if (output_mask.get(0)) dx = empty(shape.sequence_sizes(sizes.input), narrow.grad_input ? input.options() : options);
  if (output_mask.get(1)) dh_0 = empty({sizes.directions, shape.batch, sizes.output()}, options);
  if (output_mask.get(2)) dc_0 = empty({sizes.directions, shape.batch, sizes.hidden}, options);
  std::vector<at::Tensor> dw(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!output_mask.get(3 + i)) continue;
    const auto& options_of_grad = narrow.grads ? input.options() : options;
    if (groups == 0) {
      dw[i] = empty(weights[i].sizes(), options_of_grad);
    } else {
      std::vector<int64_t> size = weights[i].sizes().vec();
      size.insert(size.begin(), groups);
      dw[i] = empty(size, options_of_grad);
      if (shape.rows == 0) dw[i].zero_();
    }
  }

  with_stored<float, double, cpu::BFloat16>(dtype, [&](auto storage) {
    using scalar_t = decltype(storage);
    using compute_t = cpu::Compute<scalar_t>;
    cpu::BackwardArgs<scalar_t> args;
    args.cell = shape.cell.kind;
    args.sizes = sizes;
    args.layout = shape.layout();
    args.variant = shape.variant;
    args.masks = prepared_masks.get<scalar_t>(shape);
    args.input = sequence<const scalar_t>(x, shape);
    args.resets = sequence<const bool>(resets, shape);
    args.h_0 = pointer<scalar_t>(h);
    args.c_0 = pointer<scalar_t>(c);
    args.output = sequence<const scalar_t>(y, shape);
    args.saved = data<const compute_t>(kept);
    args.grad_output = sequence<const scalar_t>(dy, shape);
    args.grad_cells = sequence<const scalar_t>(dcells, shape);
    args.grad_h_n = pointer<scalar_t>(dh_n);
    args.grad_c_n = pointer<scalar_t>(dc_n);
    if (dx.defined()) {
      args.grad_input = sequence<void>(dx, shape);
      const auto zero = [&]<class T>() { zero_past_end(args.grad_input.template of<T>(), args.layout, sizes.input); };
      if (lengths.has_value())
        narrow.grad_input ? zero.template operator()<uint16_t>() : zero.template operator()<compute_t>();
    }
    args.grad_h_0 = dh_0.defined() ? data<compute_t>(dh_0) : nullptr;
    args.grad_c_0 = dc_0.defined() ? data<compute_t>(dc_0) : nullptr;
    for (int d = 0; d < sizes.directions; ++d) {
      args.weights[d] = named_weights<const scalar_t>(w, shape, d);
      args.grad_weights[d] = named_weights<void>(dw, shape, d);
      if (narrow.weight_ih) args.narrow_ih[d] = std::exchange(args.weights[d].weight_ih, nullptr);
      if (narrow.weight_hh) args.narrow_hh[d] = std::exchange(args.weights[d].weight_hh, nullptr);
    }
    args.narrow = storage_of(input.scalar_type());
    args.narrow_grads = narrow.grads;
    args.narrow_grad_input = narrow.grad_input;
    args.groups = groups;
    cpu::layer_backward(args, executor());
  });

  // A schema's results are defined: what was not asked for is empty.
  const auto finish = [&](const at::Tensor& grad) {
    return grad.defined() ? cast(grad, input.scalar_type()) : empty({0}, input.options());
  };
  for (at::Tensor& grad : dw) grad = finish(grad);
  return {finish(dx), finish(dh_0), finish(dc_0), std::move(dw)};
}

}  // namespace

bool pipelines(const at::Tensor& input, int64_t batch, const StackWeights& weights, const LayerOptions& options,
               bool trains) {
  const cpu::Executor threads = executor();
  if (threads.threads == 1 || options.bidirectional || batch == 0 || weights[0].size() > 5) return false;
  const CellInfo cell = cell_info(options.cell);
  const at::Tensor &weight_ih = weights[0][0], &weight_hh = weights[0][1];
  if (weight_ih.dim() != 2 || weight_hh.dim() != 2 || weight_ih.size(1) == 0) return false;
  cpu::Sizes sizes;
  sizes.input = weight_ih.size(1);
  sizes.hidden = weight_ih.size(0) / cell.gates;
  sizes.proj = weight_hh.size(1) == sizes.hidden ? 0 : weight_hh.size(1);
  cpu::Layout layout;
  layout.batch = batch;
  layout.rows = input.numel() / sizes.input;
  layout.steps = std::max<int64_t>(1, layout.rows / batch);
  // The next layer reads the output as the caller sees it, rounded: not what is converted to float. Layers whose
  // weights are widened are too large.
  if (backward_type(input, cell.kind, cpu::Variant::kPlain, sizes, layout) != input.scalar_type()) return false;
  bool result = false;
  with_stored<float, double, cpu::BFloat16>(input.scalar_type(), [&](auto storage) {
    result = cpu::pipelines<decltype(storage)>(cell.kind, sizes, layout, int64_t(weights.size()), trains, threads);
  });
  return result;
}

std::vector<LayerResult> pipelined_forward(const at::Tensor& input, const StackStates& h_0, const StackStates& c_0,
                                           const StackWeights& weights, const OptionalTensor& batch_sizes,
                                           const OptionalTensor& lengths, const OptionalTensor& resets,
                                           const LayerOptions& options, const std::vector<bool>& save) {
  std::deque<ForwardCall> calls;
  for (size_t k = 0; k < weights.size(); ++k) {
    LayerOptions own = options;
    own.cell_states &= k + 1 == weights.size();
    calls.emplace_back(LayerInputs{k ? calls.back().output : input, h_0[k], c_0[k], weights[k], batch_sizes, lengths,
                                   resets, OptionalTensors(), own},
                       save[k]);
  }
  with_stored<float, double, cpu::BFloat16>(calls[0].dtype, [&](auto storage) {
    std::vector<cpu::ForwardArgs<decltype(storage)>> args;
    for (ForwardCall& call : calls) args.push_back(call.args<decltype(storage)>());
    cpu::stack_forward(args.data(), int(args.size()), executor());
  });
  std::vector<LayerResult> results;
  for (const ForwardCall& call : calls) results.push_back(call.result());
  return results;
}

namespace {

TORCH_LIBRARY_IMPL(rnn_ext, CPU, m) {
  m.impl("layer", &layer_cpu);
  m.impl("layer_backward", &layer_backward_cpu);
}

}  // namespace
}  // namespace rnn_ext::ops
