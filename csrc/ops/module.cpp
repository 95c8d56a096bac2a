// The Python module rnn_ext._C: importing it registers the ops.
#include <ATen/Context.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "cells/cells.h"
#include "cpu/layer.h"
#include "cpu/memory.h"
#include "cpu/quantized.h"
#include "cpu/with_cell.h"
#include "ops/calls.h"
#include "ops/each.h"
#include "ops/executor.h"
#include "ops/layer.h"
#include "ops/packed_cache.h"
#include "ops/plain_forward.h"
#include "ops/quantized_layer.h"
#include "ops/saved_bytes.h"
#include "ops/stack.h"
#ifdef RNN_EXT_WITH_CUDA
#include "ops/cuda_layer.h"
#endif

namespace {

using rnn_ext::ops::OptionalTensor;
using rnn_ext::ops::OptionalTensors;

/// The same dispatcher call as torch.ops.rnn_ext.layer, without `save`, for a third of what the latter costs to parse
/// its arguments.
rnn_ext::ops::LayerResult extended_layer(const at::Tensor& input, const OptionalTensor& h_0, const OptionalTensor& c_0,
                                         const std::vector<at::Tensor>& weights, const OptionalTensor& batch_sizes,
                                         const OptionalTensor& lengths, const OptionalTensor& resets,
                                         const std::vector<OptionalTensor>& masks, std::string_view cell,
                                         bool bidirectional, bool batch_first, bool cell_states, bool recompute) {
  const OptionalTensors all_masks{at::ArrayRef<OptionalTensor>(masks)};
  const rnn_ext::ops::LayerOptions options{cell, bidirectional, batch_first, cell_states};
  return rnn_ext::ops::layer_call({input, h_0, c_0, weights, batch_sizes, lengths, resets, all_masks, options}, false,
                                  recompute);
}

/// Without masks and recompute: each argument costs a call a little.
rnn_ext::ops::LayerResult layer(const at::Tensor& input, const OptionalTensor& h_0, const OptionalTensor& c_0,
                                const std::vector<at::Tensor>& weights, const OptionalTensor& batch_sizes,
                                const OptionalTensor& lengths, const OptionalTensor& resets, std::string_view cell,
                                bool bidirectional, bool batch_first, bool cell_states) {
  return extended_layer(input, h_0, c_0, weights, batch_sizes, lengths, resets, {}, cell, bidirectional, batch_first,
                        cell_states, false);
}

rnn_ext::ops::QuantizedResult quantized_layer(const at::Tensor& input, const OptionalTensor& h_0,
                                              const OptionalTensor& c_0, const std::vector<at::Tensor>& weights,
                                              const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                                              const OptionalTensor& resets, std::string_view cell, bool bidirectional,
                                              bool batch_first, bool cell_states) {
  return rnn_ext::ops::quantized_layer_call(input, h_0, c_0, weights, batch_sizes, lengths, resets, cell, bidirectional,
                                            batch_first, cell_states);
}

/// h and c, None if there is none.
std::pair<at::Tensor, OptionalTensor> cell(const at::Tensor& input, const OptionalTensor& h, const OptionalTensor& c,
                                           const std::vector<at::Tensor>& weights, std::string_view name) {
  auto [next_h, next_c] = rnn_ext::ops::cell_call(input, h, c, weights, name);
  return {std::move(next_h), next_c.defined() ? OptionalTensor(std::move(next_c)) : std::nullopt};
}

std::pair<int64_t, int64_t> cuda_saved_bytes(std::string_view cell, bool projected, int variant, int64_t itemsize) {
  namespace cells = rnn_ext::cells;
  const auto bytes = [&]<class Cell>() {
    const auto kept = rnn_ext::ops::saved_bytes(cells::saved_planes<Cell>(), Cell::kHasCell, projected,
                                                cells::kIsNormed<Cell>, itemsize);
    return std::pair(kept.unit, kept.row);
  };
  return rnn_ext::cpu::with_cell(rnn_ext::ops::cell_info(cell).kind, rnn_ext::cpu::Variant(variant), bytes);
}

#ifdef RNN_EXT_WITH_CUDA
constexpr bool kWithCuda = true;

std::optional<std::string> cuda_problem(int device) {
  // The kernels' CUDA runtime stays with the device that it is asked about; torch returns to its own.
  std::optional<c10::DeviceGuard> guard;
  if (at::hasCUDA()) guard.emplace(c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(device)));
  RnnExtError error{};
  if (rnn_ext_cuda_check_device(device, &error)) return error.message;
  return std::nullopt;
}

std::pair<std::string, std::string> cuda_kernel(std::string_view cell, at::ScalarType dtype, int variant,
                                                int64_t length, int64_t batch, int64_t hidden, int directions,
                                                bool projected, bool backward, int device, int64_t shared_bytes,
                                                int64_t multiprocessors) {
  const RnnExtQuestion question{RnnExtCell(rnn_ext::ops::cell_info(cell).kind),
                                rnn_ext::ops::dtype_of(dtype),
                                RnnExtVariant(variant),
                                length,
                                batch,
                                hidden,
                                directions,
                                projected,
                                backward,
                                rnn_ext::ops::allows_tf32(),
                                shared_bytes,
                                multiprocessors};
  std::optional<c10::DeviceGuard> guard;
  RnnExtError error{};
  if (shared_bytes <= 0) {
    guard.emplace(c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(device)));
    // The kernels' CUDA runtime is linked statically and has an idea of its own of the current device.
    rnn_ext::ops::check_launch(rnn_ext_cuda_set_device(device, &error), error);
  }
  const RnnExtChoice choice = rnn_ext_cuda_choose(&question);
  std::string reason = choice.reason;
  if (rnn_ext_cuda_cluster_remark(&question, &error)) reason.append("; ").append(error.message);
  return {rnn_ext::ops::kernel_name(choice.kernel), reason};
}
#else
constexpr bool kWithCuda = false;
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of rnn_ext; see rnn_ext.ops.";
  m.def("cpu_capability", [] { return rnn_ext::cpu::capability(); }, "Instruction set in use.");
  m.def("missing_cpu_capability", [] { return rnn_ext::cpu::missing_capability(); }, "See csrc/cpu/layer.h.");
  m.def("multiplies_tiles", &rnn_ext::cpu::multiplies_tiles, "See csrc/cpu/layer.h.");
  m.def(
      "set_cpu_capability", [](const char* name) { return rnn_ext::cpu::set_capability(name); },
      "Choose baseline, avx2, avx512 or amx, while nothing computes; False where this processor or build lacks it.");
  m.def(
      "tuning",
      [] {
        const rnn_ext::cpu::Tuning& chosen = rnn_ext::cpu::tuning();
        return std::make_tuple(chosen.vectors_a_cycle, chosen.takes_along, chosen.fetched_bytes, chosen.joins_far,
                               chosen.far_bytes, chosen.near_bytes);
      },
      "The Tuning of csrc/cpu/layer.h.");
  m.def(
      "set_tuning",
      [](int vectors_a_cycle, bool takes_along, int64_t fetched_bytes, bool joins_far, int64_t far_bytes,
         int64_t near_bytes) {
        rnn_ext::cpu::set_tuning({vectors_a_cycle, takes_along, fetched_bytes, joins_far, far_bytes, near_bytes});
      },
      pybind11::arg("vectors_a_cycle") = 1, pybind11::arg("takes_along") = true,
      pybind11::arg("fetched_bytes") = INT64_MAX, pybind11::arg("joins_far") = false,
      pybind11::arg("far_bytes") = 1 << 20, pybind11::arg("near_bytes") = 2 << 20,
      "Choose otherwise, for tests; while nothing computes.");
  m.def("widen_always", &rnn_ext::cpu::widen_always, "See csrc/cpu/layer.h; for tests.");
  m.def("thread_distance", &rnn_ext::ops::thread_distance, py::call_guard<py::gil_scoped_release>(),
        "See csrc/ops/executor.h.");
  m.def("assume_thread_distance", &rnn_ext::ops::assume_thread_distance, "See csrc/ops/executor.h; for tests.");
  m.def("multiply_integers", &rnn_ext::cpu::multiply_integers, "See csrc/cpu/quantized.h; for tests.");
  m.def("computes_bfloat16", &rnn_ext::cpu::computes_bfloat16,
        "Whether the instruction set in use multiplies bfloat16.");
  m.def(
      "has_few_units",
      [](std::string_view cell, int64_t input, int64_t hidden, int64_t batch) {
        const rnn_ext::cpu::Layout layout{1, batch, batch};
        return rnn_ext::cpu::has_few_units<float>(rnn_ext::ops::cell_info(cell).kind, rnn_ext::cpu::Variant::kPlain,
                                                  {input, hidden}, layout);
      },
      pybind11::arg("cell"), pybind11::arg("input"), pybind11::arg("hidden"), pybind11::arg("batch"),
      "Of a plain float32 layer whose sequences are equally long, see csrc/cpu/layer.h; for tests.");
  m.def("layer", torch::wrap_pybind_function_no_gil(&layer),
        "torch.ops.rnn_ext.layer, without masks, save and recompute.");
  m.def("extended_layer", torch::wrap_pybind_function_no_gil(&extended_layer), "The same with masks and recompute.");
  m.def("quantized_layer", torch::wrap_pybind_function_no_gil(&quantized_layer), "torch.ops.rnn_ext.quantized_layer.");
  m.def("random_mask", torch::wrap_pybind_function_no_gil(&rnn_ext::ops::draw_mask),
        "torch.ops.rnn_ext.random_mask with a seed of torch's generator, in float64 or float32.");
  if (PyModule_AddFunctions(m.ptr(), rnn_ext::ops::plain_forward) < 0) throw pybind11::error_already_set();
  m.def("cell", torch::wrap_pybind_function_no_gil(&cell), "One timestep of a cell; see rnn_ext.ops.cell.");
  m.def("stack", torch::wrap_pybind_function_no_gil(&rnn_ext::ops::stack), "Several layers; see rnn_ext.ops.stack.");
  m.def("call_each", &rnn_ext::ops::call_each, "An op for each entry of what vmap maps; see rnn_ext.batching.");
  m.def(
      "saved_values",
      [](std::string_view cell, bool projected, int variant) {
        return rnn_ext::cpu::saved_values(rnn_ext::ops::cell_info(cell).kind, projected,
                                          rnn_ext::cpu::Variant(variant));
      },
      "Values per hidden unit and row kept for backward.");
  m.def("cached_weights_count", &rnn_ext::ops::cached_weights_count, py::call_guard<py::gil_scoped_release>(),
        "Directions whose packed weights are kept.");
  m.def("clear_cached_weights", &rnn_ext::ops::clear_cached_weights, py::call_guard<py::gil_scoped_release>(),
        "Forget all packed weights.");
  m.def("idle_memory", &rnn_ext::cpu::idle_memory, "Bytes of past calls that wait for the next.");
  m.def("drop_idle_memory", &rnn_ext::cpu::drop_idle_memory, "Give them back to the system.");
  m.attr("with_cuda") = kWithCuda;
  m.def("cuda_saved_bytes", &cuda_saved_bytes, "saved_values on CUDA, in bytes, and those of a row besides.");
#ifdef RNN_EXT_WITH_CUDA
  m.def("cuda_problem", &cuda_problem, "Why the CUDA kernels cannot run on this device, or None.");
  m.def("cuda_kernel", torch::wrap_pybind_function(&cuda_kernel),
        "The kernel meant for a layer, and why; see csrc/cuda/dispatch.h.");
  m.def("force_cuda_kernel", &rnn_ext::ops::force_cuda_kernel,
        "Run this kernel whatever the table says (names: cuda_layer.cpp); \"\" is the table. False for another name.");
#endif
  m.def(
      "require_grad", [](at::Tensor tensor) { return tensor.set_requires_grad(true); },
      "tensor.requires_grad_(), also inside a torch.func transform, for a tensor that nobody else has seen.");
}
