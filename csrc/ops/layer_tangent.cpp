// The op layer_tangent on the CPU: forward mode and second derivatives of the layer op. In 16 bits they are computed in
// float32.
#include <torch/library.h>

#include "ops/cpu_call.h"
#include "ops/executor.h"

namespace rnn_ext::ops {
namespace {

constexpr size_t kInput = TangentTensors::kInput, kFirstWeight = TangentTensors::kFirstWeight;

/// `tensors`, or their tangents, made ready for the kernels.
class Prepared {
 public:
  Prepared(const OptionalTensors& tensors, at::ScalarType dtype)
      : grad_output_(prepare_sequence(OptionalTensor(tensors.get(0)), dtype, "grad_output")),
        grad_h_n_(prepare(OptionalTensor(tensors.get(1)), dtype, "grad_h_n")),
        grad_c_n_(prepare(OptionalTensor(tensors.get(2)), dtype, "grad_c_n")),
        grad_cells_(prepare_sequence(OptionalTensor(tensors.get(3)), dtype, "grad_cells")),
        input_(prepare_sequence(OptionalTensor(tensors.get(kInput)), dtype, "input")),
        h_0_(prepare(OptionalTensor(tensors.get(kInput + 1)), dtype, "h_0")),
        c_0_(prepare(OptionalTensor(tensors.get(kInput + 2)), dtype, "c_0")) {
    for (size_t i = kFirstWeight; i < tensors.size(); ++i)
      weights_.push_back(prepare(OptionalTensor(tensors.get(i)), dtype, "a weight").value_or(at::Tensor()));
  }

  template <class T>
  cpu::BackwardArgs<T> args(const LayerShape& shape) const {
    cpu::BackwardArgs<T> args;
    args.cell = shape.cell.kind;
    args.sizes = shape.sizes;
    args.layout = shape.layout();
    args.input = sequence<const T>(input_, shape);
    args.h_0 = pointer<T>(h_0_);
    args.c_0 = pointer<T>(c_0_);
    for (int d = 0; d < shape.sizes.directions; ++d) args.weights[d] = named_weights<const T>(weights_, shape, d);
    args.grad_output = sequence<const T>(grad_output_, shape);
    args.grad_h_n = pointer<T>(grad_h_n_);
    args.grad_c_n = pointer<T>(grad_c_n_);
    args.grad_cells = sequence<const T>(grad_cells_, shape);
    return args;
  }

 private:
  const OptionalTensor grad_output_, grad_h_n_, grad_c_n_, grad_cells_, input_, h_0_, c_0_;
  std::vector<at::Tensor> weights_;
};

std::vector<at::Tensor> layer_tangent_cpu(const OptionalTensors& tangents, const OptionalTensors& tensors,
                                          const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                                          const OptionalTensor& resets, const OptionalTensors& masks,
                                          std::string_view cell, bool bidirectional, bool batch_first, bool cell_states,
                                          const c10::List<bool>& output_mask) {
  leave_inherited_pool();
  const TangentTensors given(tensors);
  const at::Tensor& input = given.input;
  const LayerInputs in{input,         given.h_0,   given.c_0,
                       given.weights, batch_sizes, lengths,
                       resets,        masks,       {cell, bidirectional, batch_first, cell_states}};
  const LayerShape shape(in);
  shape.check_tangents(tangents, tensors, given, output_mask);
  TORCH_CHECK_NOT_IMPLEMENTED(shape.is_basic(), "layer_tangent is for plain layers without projection");
  const at::ScalarType dtype = compute_type(input);
  const auto options = input.options().dtype(dtype);
  const cpu::Sizes& sizes = shape.sizes;
  const Prepared values(tensors, dtype), along(tangents, dtype);

  std::vector<at::Tensor> results(tensors.size());
  const auto want = [&](size_t i, bool there, at::IntArrayRef size) {
    if (there && output_mask.get(i)) results[i] = empty(size, options);
  };
  const int64_t states[] = {sizes.directions, shape.batch, sizes.hidden};
  const std::vector<int64_t> outputs = shape.sequence_sizes(sizes.directions * sizes.hidden);
  const bool has_cell = shape.cell.has_cell;
  want(0, true, outputs);
  want(1, true, states);
  want(2, has_cell, states);
  want(3, has_cell, outputs);
  want(4, true, shape.sequence_sizes(sizes.input));
  want(5, given.h_0.has_value(), states);
  want(6, given.c_0.has_value(), states);
  for (size_t i = 0; i < given.weights.size(); ++i) want(kFirstWeight + i, true, given.weights[i].sizes());
  const std::vector<at::Tensor> weight_grads(results.begin() + kFirstWeight, results.end());

  with_stored<float, double>(dtype, [&](auto number) {
    using T = decltype(number);
    const auto wanted = [&](size_t i) { return results[i].defined() ? data<T>(results[i]) : nullptr; };
    const auto wanted_sequence = [&](size_t i) {
      if (!results[i].defined()) return cpu::Sequence<T>{};
      const auto found = sequence<T>(results[i], shape);
      if (lengths.has_value()) zero_past_end(found, shape.layout(), results[i].size(-1));
      return found;
    };
    cpu::TangentArgs<T> args;
    args.values = values.args<T>(shape);
    args.values.resets = sequence<const bool>(resets, shape);
    args.tangents = along.args<T>(shape);
    args.output = wanted_sequence(0);
    args.h_n = wanted(1);
    args.c_n = wanted(2);
    args.cells = wanted_sequence(3);
    args.tangents.grad_input = wanted_sequence(4).template of<void>();
    args.tangents.grad_h_0 = wanted(5);
    args.tangents.grad_c_0 = wanted(6);
    for (int d = 0; d < sizes.directions; ++d)
      args.tangents.grad_weights[d] = named_weights<void>(weight_grads, shape, d);
    for (size_t i = kInput; i < results.size(); ++i) args.backward |= results[i].defined();
    cpu::layer_tangent(args, executor());
  });
  for (at::Tensor& result : results)
    result = result.defined() ? cast(result, input.scalar_type()) : empty({0}, input.options());
  return results;
}

TORCH_LIBRARY_IMPL(rnn_ext, CPU, m) { m.impl("layer_tangent", &layer_tangent_cpu); }

}  // namespace
}  // namespace rnn_ext::ops
