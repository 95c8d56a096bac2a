#include "ops/plain_forward.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <iterator>
#include <optional>
#include <string_view>
#include <tuple>
#include <utility>

#include "cells/cells.h"
#include "ops/calls.h"
#include "ops/layer.h"
#include "ops/stack.h"

namespace rnn_ext::ops {
namespace {

/// The tensor in an object that is one and not of a subclass, or null.
const at::Tensor* tensor(PyObject* object) {
  return object && THPVariable_CheckExact(object) ? &THPVariable_Unpack(object) : nullptr;
}

/// Interned, so that looking one up compares pointers.
struct Key {
  explicit Key(const char* name) : string(PyUnicode_InternFromString(name)) {}
  operator PyObject*() const { return string; }
  bool operator==(PyObject* other) const {
    return other == string || (other && PyUnicode_Check(other) && PyUnicode_Compare(other, string) == 0);
  }
  PyObject* string;
};

struct Keys {
  Key parameters{"_parameters"}, names{"_flat_weights_names"}, mode{"mode"}, backend{"backend"}, dropout{"dropout"},
      training{"training"}, num_layers{"num_layers"}, bidirectional{"bidirectional"}, batch_first{"batch_first"};
  Key options[5] = {Key("recompute"), Key("layer_norm"), Key("zoneout"), Key("recurrent_dropout"),
                    Key("weight_dropout")};
  Key auto_{"auto"}, custom{"custom"};
#define RNN_EXT_MODE(Cell, NAME) {Key(#NAME), cells::Cell::kName},
  std::pair<Key, std::string_view> cells[std::size(cells::kGatesOf)] = {RNN_EXT_FOR_EACH_CELL(RNN_EXT_MODE)};
#undef RNN_EXT_MODE
};

/// A module's attributes.
class Attributes {
 public:
  explicit Attributes(PyObject* dict) : dict_(dict) {}

  /// Borrowed; null if there is none.
  PyObject* get(PyObject* key) const { return PyDict_GetItemWithError(dict_, key); }
  /// Whether it is there and False, or a number that is zero: nothing that would run code of its own to say so.
  bool is_off(PyObject* key) const {
    PyObject* value = get(key);
    const bool number = value && (PyBool_Check(value) || PyLong_CheckExact(value) || PyFloat_CheckExact(value));
    return number && PyObject_IsTrue(value) == 0;
  }
  /// A bool that is there; nothing for all else.
  std::optional<bool> flag(PyObject* key) const {
    PyObject* value = get(key);
    return value == Py_True || value == Py_False ? std::optional(value == Py_True) : std::nullopt;
  }

 private:
  PyObject* dict_;
};

/// Empty for any other.
std::string_view cell_of(const Keys& keys, PyObject* mode) {
  for (const auto& [key, cell] : keys.cells) {
    if (key == mode) return cell;
  }
  return {};
}

/// Nothing: not a plain call.
std::optional<PyObject*> run(PyObject* dict, PyObject* input_object, PyObject* hx) {
  static const Keys keys;
  const Attributes own(dict);
  const at::Tensor* input = tensor(input_object);
  if (!input || !input->is_cpu() || input->dim() != 3 || at::impl::torch_function_mode_enabled()) return std::nullopt;
  const auto is_strided = [](const at::Tensor& t) { return t.layout() == at::kStrided; };
  if (!is_strided(*input) || input->is_nested()) return std::nullopt;
  if (c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Tracer)) return std::nullopt;  // by torch.jit.trace
  PyObject* backend = own.get(keys.backend);
  if (!(keys.auto_ == backend || keys.custom == backend)) return std::nullopt;
  for (const Key& option : keys.options) {
    if (!own.is_off(option)) return std::nullopt;
  }
  PyObject* num_layers = own.get(keys.num_layers);
  if (!num_layers || !PyLong_Check(num_layers)) return std::nullopt;
  const int64_t layers = PyLong_AsLongLong(num_layers);
  const bool drops = !own.is_off(keys.training) && !own.is_off(keys.dropout);
  if (layers < 1 || (layers > 1 && drops)) return std::nullopt;

  PyObject *parameters = own.get(keys.parameters), *names = own.get(keys.names);
  if (!parameters || !PyDict_Check(parameters) || !names || !PyList_Check(names)) return std::nullopt;
  c10::SmallVector<at::Tensor, 10> weights;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(names); ++i) {
    const at::Tensor* weight = tensor(PyDict_GetItemWithError(parameters, PyList_GET_ITEM(names, i)));
    if (!weight || !is_strided(*weight)) return std::nullopt;
    weights.push_back(*weight);
  }
  const at::ScalarType type = input->scalar_type();
  if (type != at::kFloat && type != at::kDouble && type != at::kBFloat16 && type != at::kHalf) return std::nullopt;
  if (weights.empty() || weights[0].scalar_type() != type) return std::nullopt;

  const std::string_view cell = cell_of(keys, own.get(keys.mode));
  if (cell.empty()) return std::nullopt;
  const bool has_cell = cell_info(cell).has_cell;
  OptionalTensor states[2];
  if (hx != Py_None) {
    if (has_cell && (!PyTuple_CheckExact(hx) || PyTuple_GET_SIZE(hx) != 2)) return std::nullopt;
    for (int i = 0; i < 1 + has_cell; ++i) {
      const at::Tensor* state = tensor(has_cell ? PyTuple_GET_ITEM(hx, i) : hx);
      if (!state || state->dim() != 3) return std::nullopt;
      states[i] = *state;
    }
  }
  const std::optional<bool> bidirectional = own.flag(keys.bidirectional), batch_first = own.flag(keys.batch_first);
  if (!bidirectional || !batch_first || PyErr_Occurred()) return std::nullopt;
  const LayerOptions options{cell, *bidirectional, *batch_first, false};

  at::Tensor output, h_n, c_n;
  {
    const pybind11::gil_scoped_release no_gil;
    if (layers == 1) {
      LayerResult result = layer_call(
          {*input, states[0], states[1], weights, std::nullopt, std::nullopt, std::nullopt, OptionalTensors(), options},
          false, false);
      std::tie(output, h_n, c_n) = std::tie(std::get<0>(result), std::get<1>(result), std::get<2>(result));
    } else {
      auto result = stack(*input, states[0], states[1], {weights.begin(), weights.end()}, std::nullopt, std::nullopt,
                          std::nullopt, cell, layers, options.bidirectional, options.batch_first, false);
      std::tie(output, h_n, c_n) = std::tie(std::get<0>(result), std::get<1>(result), std::get<2>(result));
    }
  }
  PyObject* state = THPVariable_Wrap(std::move(h_n));
  if (has_cell) state = Py_BuildValue("NN", state, THPVariable_Wrap(std::move(c_n)));
  return Py_BuildValue("NN", THPVariable_Wrap(std::move(output)), state);
}

PyObject* plain_forward_method(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 3 && PyDict_Check(args[0]), "expected vars(module), input and hx");
  const std::optional<PyObject*> result = run(args[0], args[1], args[2]);
  if (result) return *result;
  PyErr_Clear();
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

}  // namespace

PyMethodDef plain_forward[] = {
    {"plain_forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(plain_forward_method)), METH_FASTCALL,
     "forward of a module without options on the CPU, or None: see csrc/ops/plain_forward.h."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace rnn_ext::ops
