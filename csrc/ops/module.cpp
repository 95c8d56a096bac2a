// The Python module rnn_ext._C: importing it registers the ops; the functions are what has no tensor in it.
#include <torch/csrc/utils/pybind.h>

#include "cpu/layer.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of rnn_ext; see rnn_ext.ops.";
  m.def("cpu_capability", [] { return rnn_ext::cpu::capability(); }, "Instruction set in use.");
  m.def(
      "set_cpu_capability", [](const char* name) { return rnn_ext::cpu::set_capability(name); },
      "Choose baseline, avx2 or avx512; False where this processor or build lacks it.");
  m.def(
      "saved_values",
      [](int cell, bool projected, int variant) {
        return rnn_ext::cpu::saved_values(rnn_ext::cpu::CellKind(cell), projected, rnn_ext::cpu::Variant(variant));
      },
      "Values per hidden unit and row kept for backward.");
  m.def(
      "require_grad", [](at::Tensor tensor) { return tensor.set_requires_grad(true); },
      "tensor.requires_grad_(), also inside a torch.func transform, for a tensor that nobody else has seen.");
}
