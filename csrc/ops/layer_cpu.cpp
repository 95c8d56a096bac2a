// The layer op on the CPU: hands tensors to csrc/cpu. Reduced precision is storage: computed in float32.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <pthread.h>
#include <torch/library.h>

#include <atomic>

#include "ops/layer.h"

namespace rnn_ext::ops {
namespace {

// A forked child inherits an OpenMP pool whose threads do not exist: it would wait for them forever.
std::atomic<bool> forked{false};
const int watch_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });

cpu::Executor executor() {
  cpu::Executor executor;
  executor.threads = forked || at::in_parallel_region() ? 1 : at::get_num_threads();
  executor.run = [](int64_t tasks, void (*fn)(void*, int64_t), void* context) {
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) fn(context, i);
    });
  };
  return executor;
}

bool reduced(const at::Tensor& input) {
  return input.scalar_type() == at::kBFloat16 || input.scalar_type() == at::kHalf;
}

/// The dtype the kernels compute in, in memory they can walk.
at::Tensor prepare(const at::Tensor& tensor, at::ScalarType dtype) { return tensor.to(dtype).contiguous(); }

OptionalTensor prepare(const OptionalTensor& tensor, at::ScalarType dtype) {
  if (!tensor.has_value() || !tensor->defined()) return std::nullopt;
  return prepare(*tensor, dtype);
}

/// A sequence only needs unit stride in its features: transposed, sliced and expanded ones are read where they lie.
at::Tensor prepare_sequence(const at::Tensor& tensor, at::ScalarType dtype) {
  const at::Tensor cast = tensor.to(dtype);
  return cast.stride(-1) == 1 || cast.size(-1) <= 1 ? cast : cast.contiguous();
}

OptionalTensor prepare_sequence(const OptionalTensor& tensor, at::ScalarType dtype) {
  if (!tensor.has_value() || !tensor->defined()) return std::nullopt;
  return prepare_sequence(*tensor, dtype);
}

template <class T>
cpu::Sequence<T> sequence(const at::Tensor& tensor, const LayerShape& shape) {
  using Value = std::remove_const_t<T>;
  cpu::Sequence<T> result;
  if constexpr (std::is_const_v<T>) {
    result.data = tensor.const_data_ptr<Value>();
  } else {
    result.data = tensor.data_ptr<Value>();
  }
  if (shape.packed) {
    result.row = tensor.stride(0);
  } else {
    result.step = tensor.stride(shape.batch_first ? 1 : 0);
    result.row = tensor.stride(shape.batch_first ? 0 : 1);
  }
  return result;
}

template <class T>
cpu::Sequence<T> sequence(const OptionalTensor& tensor, const LayerShape& shape) {
  return tensor.has_value() ? sequence<T>(*tensor, shape) : cpu::Sequence<T>{};
}

template <class T>
const T* pointer(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

/// The weights of one direction: T is const for weights, not for their gradients. Undefined tensors give null.
template <class T>
cpu::Weights<T> named_weights(at::TensorList flat, const LayerShape& shape, int direction) {
  const auto find = [&](LayerShape::Weight weight) -> T* {
    const int index = shape.index(direction, weight);
    if (index < 0 || !flat[index].defined()) return nullptr;
    if constexpr (std::is_const_v<T>) {
      return flat[index].const_data_ptr<std::remove_const_t<T>>();
    } else {
      return flat[index].data_ptr<T>();
    }
  };
  return {find(LayerShape::kWeightIh),     find(LayerShape::kWeightHh),    find(LayerShape::kBiasIh),
          find(LayerShape::kBiasHh),       find(LayerShape::kWeightHr),    find(LayerShape::kWeightNormIh),
          find(LayerShape::kWeightNormHh), find(LayerShape::kWeightNormC), find(LayerShape::kBiasNormC)};
}

/// The masks in the dtype the kernels compute in; all null where there are none.
struct PreparedMasks {
  PreparedMasks(const OptionalTensors& masks, at::ScalarType dtype) {
    if (masks.empty()) return;
    hidden = prepare(OptionalTensor(masks.get(LayerShape::kHiddenMask)), dtype);
    zoneout_h = prepare_sequence(OptionalTensor(masks.get(LayerShape::kZoneoutH)), dtype);
    zoneout_c = prepare_sequence(OptionalTensor(masks.get(LayerShape::kZoneoutC)), dtype);
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

LayerResult layer_cpu(const at::Tensor& input, const OptionalTensor& h_0, const OptionalTensor& c_0,
                      at::TensorList weights, const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                      const OptionalTensor& resets, const OptionalTensors& masks, std::string_view cell,
                      bool bidirectional, bool batch_first, bool cell_states, bool save, bool /*recompute*/) {
  const LayerShape shape(input, h_0, c_0, weights, batch_sizes, lengths, resets, masks,
                         {cell, bidirectional, batch_first, cell_states});
  const at::ScalarType dtype = reduced(input) ? at::kFloat : input.scalar_type();
  const auto options = input.options().dtype(dtype);
  const cpu::Sizes& sizes = shape.sizes;

  const at::Tensor x = prepare_sequence(input, dtype);
  const OptionalTensor h = prepare(h_0, dtype), c = prepare(c_0, dtype);
  const PreparedMasks prepared_masks(masks, dtype);
  std::vector<at::Tensor> w;
  w.reserve(weights.size());
  for (const at::Tensor& weight : weights) w.push_back(prepare(weight, dtype));

  // Positions past a sequence's length are not visited.
  const auto new_sequence = [&](int64_t features) {
    return lengths.has_value() ? at::zeros(shape.sequence_sizes(features), options)
                               : at::empty(shape.sequence_sizes(features), options);
  };
  at::Tensor output = new_sequence(sizes.directions * sizes.output());
  at::Tensor cells = cell_states ? new_sequence(sizes.directions * sizes.hidden) : at::empty({0}, options);
  at::Tensor h_n = at::empty({sizes.directions, shape.batch, sizes.output()}, options);
  at::Tensor c_n =
      shape.cell.has_cell ? at::empty({sizes.directions, shape.batch, sizes.hidden}, options) : at::empty({0}, options);
  at::Tensor saved = at::empty({save ? saved_numel(shape) : 0}, options);

  AT_DISPATCH_FLOATING_TYPES(dtype, "rnn_ext::layer", [&] {
    cpu::ForwardArgs<scalar_t> args;
    args.cell = shape.cell.kind;
    args.sizes = sizes;
    args.layout = shape.layout();
    args.variant = shape.variant;
    args.masks = prepared_masks.get<scalar_t>(shape);
    args.input = sequence<const scalar_t>(x, shape);
    args.resets = sequence<const bool>(resets, shape);
    args.h_0 = pointer<scalar_t>(h);
    args.c_0 = pointer<scalar_t>(c);
    args.output = sequence<scalar_t>(output, shape);
    if (cell_states) args.cells = sequence<scalar_t>(cells, shape);
    args.h_n = h_n.data_ptr<scalar_t>();
    args.c_n = shape.cell.has_cell ? c_n.data_ptr<scalar_t>() : nullptr;
    args.saved = save ? saved.data_ptr<scalar_t>() : nullptr;
    for (int d = 0; d < sizes.directions; ++d) args.weights[d] = named_weights<const scalar_t>(w, shape, d);
    cpu::layer_forward(args, executor());
  });
  const at::ScalarType result = input.scalar_type();
  return {output.to(result), h_n.to(result), c_n.to(result), cells.to(result), saved};
}

LayerGrads layer_backward_cpu(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                              const OptionalTensor& grad_c_n, const OptionalTensor& grad_cells, const at::Tensor& input,
                              const OptionalTensor& h_0, const OptionalTensor& c_0, at::TensorList weights,
                              const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                              const OptionalTensor& resets, const OptionalTensors& masks, const at::Tensor& output,
                              const at::Tensor& saved, std::string_view cell, bool bidirectional, bool batch_first,
                              bool cell_states, const c10::List<bool>& output_mask) {
  const LayerShape shape(input, h_0, c_0, weights, batch_sizes, lengths, resets, masks,
                         {cell, bidirectional, batch_first, cell_states});
  const at::ScalarType dtype = reduced(input) ? at::kFloat : input.scalar_type();
  const auto options = input.options().dtype(dtype);
  const cpu::Sizes& sizes = shape.sizes;
  TORCH_CHECK(output_mask.size() == 3 + weights.size(), "expected output_mask of ", 3 + weights.size(), " values, got ",
              output_mask.size());
  TORCH_CHECK(output.sizes() == at::IntArrayRef(shape.sequence_sizes(sizes.directions * sizes.output())) &&
                  saved.scalar_type() == dtype && saved.numel() == saved_numel(shape),
              "output and saved are not those of a forward call with these inputs");
  const auto check_grad = [&](const OptionalTensor& grad, at::IntArrayRef expected, const char* name) {
    TORCH_CHECK(!grad.has_value() || !grad->defined() || grad->sizes() == expected, "expected ", name, " of size ",
                expected, ", got ", grad.has_value() && grad->defined() ? grad->sizes() : at::IntArrayRef());
  };
  check_grad(grad_output, shape.sequence_sizes(sizes.directions * sizes.output()), "grad_output");
  check_grad(grad_cells, shape.sequence_sizes(sizes.directions * sizes.hidden), "grad_cells");
  check_grad(grad_h_n, {sizes.directions, shape.batch, sizes.output()}, "grad_h_n");
  check_grad(grad_c_n, {sizes.directions, shape.batch, sizes.hidden}, "grad_c_n");

  const at::Tensor x = prepare_sequence(input, dtype);
  const at::Tensor y = prepare_sequence(output, dtype);
  const at::Tensor kept = saved.contiguous();
  const OptionalTensor h = prepare(h_0, dtype), c = prepare(c_0, dtype);
  const PreparedMasks prepared_masks(masks, dtype);
  const OptionalTensor dy = prepare_sequence(grad_output, dtype), dcells = prepare_sequence(grad_cells, dtype);
  const OptionalTensor dh_n = prepare(grad_h_n, dtype), dc_n = prepare(grad_c_n, dtype);
  std::vector<at::Tensor> w;
  w.reserve(weights.size());
  for (const at::Tensor& weight : weights) w.push_back(prepare(weight, dtype));

  at::Tensor dx, dh_0, dc_0;
  if (output_mask.get(0)) {
    const auto size = shape.sequence_sizes(sizes.input);
    dx = lengths.has_value() ? at::zeros(size, options) : at::empty(size, options);
  }
  if (output_mask.get(1)) dh_0 = at::empty({sizes.directions, shape.batch, sizes.output()}, options);
  if (output_mask.get(2)) dc_0 = at::empty({sizes.directions, shape.batch, sizes.hidden}, options);
  std::vector<at::Tensor> dw(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    if (output_mask.get(3 + i)) dw[i] = at::empty(weights[i].sizes(), options);
  }

  AT_DISPATCH_FLOATING_TYPES(dtype, "rnn_ext::layer_backward", [&] {
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
    args.saved = kept.const_data_ptr<scalar_t>();
    args.grad_output = sequence<const scalar_t>(dy, shape);
    args.grad_cells = sequence<const scalar_t>(dcells, shape);
    args.grad_h_n = pointer<scalar_t>(dh_n);
    args.grad_c_n = pointer<scalar_t>(dc_n);
    if (dx.defined()) args.grad_input = sequence<scalar_t>(dx, shape);
    args.grad_h_0 = dh_0.defined() ? dh_0.data_ptr<scalar_t>() : nullptr;
    args.grad_c_0 = dc_0.defined() ? dc_0.data_ptr<scalar_t>() : nullptr;
    for (int d = 0; d < sizes.directions; ++d) {
      args.weights[d] = named_weights<const scalar_t>(w, shape, d);
      args.grad_weights[d] = named_weights<scalar_t>(dw, shape, d);
    }
    cpu::layer_backward(args, executor());
  });

  // A schema's results are defined: what was not asked for is empty.
  const auto finish = [&](const at::Tensor& grad) {
    return grad.defined() ? grad.to(input.scalar_type()) : at::empty({0}, input.options());
  };
  for (at::Tensor& grad : dw) grad = finish(grad);
  return {finish(dx), finish(dh_0), finish(dc_0), std::move(dw)};
}

TORCH_LIBRARY_IMPL(rnn_ext, CPU, m) {
  m.impl("layer", &layer_cpu);
  m.impl("layer_backward", &layer_backward_cpu);
}

}  // namespace
}  // namespace rnn_ext::ops
