#include "ops/plain_forward.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/cat.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <iterator>
#include <optional>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "cells/cells.h"
#include "ops/calls.h"
#include "ops/layer.h"
#include "ops/quantized_layer.h"
#include "ops/stack.h"

namespace rnn_ext::ops {
namespace {

/// The tensor in an object that is one and not of a subclass, or null.
const at::Tensor* tensor(PyObject* object) {
  return object && THPVariable_CheckExact(object) ? &THPVariable_Unpack(object) : nullptr;
}

bool is_dense(const at::Tensor& tensor) { return tensor.layout() == at::kStrided && !tensor.is_nested(); }

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
  Key parameters{"_parameters"}, buffers{"_buffers"}, input_size{"input_size"}, names{"_flat_weights_names"},
      mode{"mode"}, backend{"backend"}, dropout{"dropout"}, training{"training"}, num_layers{"num_layers"},
      bidirectional{"bidirectional"}, batch_first{"batch_first"};
  Key options[5] = {Key("recompute"), Key("layer_norm"), Key("zoneout"), Key("recurrent_dropout"),
                    Key("weight_dropout")};
  Key auto_{"auto"}, custom{"custom"};
  Key of_cell[4] = {Key("weight_ih"), Key("weight_hh"), Key("bias_ih"), Key("bias_hh")};
#define RNN_EXT_MODE(Cell, NAME) {Key(#NAME), cells::Cell::kName},
  std::pair<Key, std::string_view> cells[std::size(cells::kGatesOf)] = {RNN_EXT_FOR_EACH_CELL(RNN_EXT_MODE)};
#undef RNN_EXT_MODE
};

const Keys& known_keys() {
  static const Keys keys;
  return keys;
}

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

/// The arguments of a module's forward, or of its step.
struct Given {
  PyObject *input, *hx, *resets = Py_None, *return_cell_states = Py_False;
};

/// What that is to do, of a padded batch on the CPU.
struct ModuleCall {
  at::Tensor input;
  std::string_view cell;
  OptionalTensor states[2], resets;
  int64_t layers;
  bool has_cell, bidirectional, batch_first, cell_states;
};

/// Whether it is a tensor that calls without more ado can take.
bool is_plain(const at::Tensor* input, int64_t dims) {
  return input && input->is_cpu() && input->dim() == dims && !at::impl::torch_function_mode_enabled() &&
         is_dense(*input) && !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Tracer);  // by torch.jit.trace
}

bool is_computed(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

/// Those in hx, None or as torch.nn takes it, of these dimensions; false: Python is to look at it.
bool read_hx(PyObject* hx, bool has_cell, int64_t dims, OptionalTensor (&states)[2]) {
  if (hx == Py_None) return true;
  if (has_cell && (!PyTuple_CheckExact(hx) || PyTuple_GET_SIZE(hx) != 2)) return false;
  for (int i = 0; i < 1 + has_cell; ++i) {
    const at::Tensor* state = tensor(has_cell ? PyTuple_GET_ITEM(hx, i) : hx);
    if (!state || !is_dense(*state) || state->dim() != dims) return false;
    states[i] = *state;
  }
  return true;
}

/// Those of a padded input, None or a tensor of the timesteps' shape; false: Python is to look at them.
bool read_resets(PyObject* object, const at::Tensor& input, OptionalTensor& resets) {
  if (object == Py_None) return true;
  const at::Tensor* given = tensor(object);
  if (!given || !given->is_cpu() || !is_dense(*given) || given->scalar_type() != at::kBool ||
      given->sizes() != input.sizes().slice(0, 2))
    return false;
  resets = *given;
  return true;
}

/// Of one timestep, without that dimension, the call with it. Nothing: Python is to look at it.
std::optional<ModuleCall> read_call(const Keys& keys, const Attributes& own, const Given& given, bool step) {
  const at::Tensor* input = tensor(given.input);
  if (!is_plain(input, 3 - step)) return std::nullopt;
  PyObject* num_layers = own.get(keys.num_layers);
  if (!num_layers || !PyLong_Check(num_layers)) return std::nullopt;
  const std::string_view cell = cell_of(keys, own.get(keys.mode));
  if (cell.empty()) return std::nullopt;
  const std::optional<bool> bidirectional = own.flag(keys.bidirectional), batch_first = own.flag(keys.batch_first);
  if (!bidirectional || !batch_first) return std::nullopt;
  // A step has its states computed in their own type under autocast, and one direction.
  if (step && (*bidirectional || at::autocast::is_autocast_enabled(at::kCPU))) return std::nullopt;
  ModuleCall call{step ? input->unsqueeze(0) : *input,
                  cell,
                  {},
                  {},
                  PyLong_AsLongLong(num_layers),
                  cell_info(cell).has_cell,
                  *bidirectional,
                  *batch_first && !step,
                  given.return_cell_states == Py_True};
  if (call.cell_states ? !call.has_cell : given.return_cell_states != Py_False) return std::nullopt;
  if (call.layers < 1 || !read_hx(given.hx, call.has_cell, 3, call.states)) return std::nullopt;
  return read_resets(given.resets, *input, call.resets) ? std::optional(call) : std::nullopt;
}

using Weights = c10::SmallVector<at::Tensor, 10>;

/// Those of _flat_weights_names; none where one is no ordinary tensor.
Weights read_weights(PyObject* tensors, PyObject* names) {
  Weights weights;
  if (!tensors || !PyDict_Check(tensors) || !names || !PyList_Check(names)) return {};
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(names); ++i) {
    const at::Tensor* weight = tensor(PyDict_GetItemWithError(tensors, PyList_GET_ITEM(names, i)));
    if (!weight || !is_dense(*weight)) return {};
    weights.push_back(*weight);
  }
  return weights;
}

/// `cells`: undefined where they are not asked for.
PyObject* wrap(bool has_cell, at::Tensor output, at::Tensor h_n, at::Tensor c_n, at::Tensor cells = {}) {
  PyObject* state = THPVariable_Wrap(std::move(h_n));
  if (has_cell) state = Py_BuildValue("NN", state, THPVariable_Wrap(std::move(c_n)));
  PyObject* out = THPVariable_Wrap(std::move(output));
  return cells.defined() ? Py_BuildValue("NNN", out, state, THPVariable_Wrap(std::move(cells)))
                         : Py_BuildValue("NN", out, state);
}

/// Nothing: not a plain call.
template <bool kStep>
std::optional<PyObject*> run_plain(const Keys& keys, const Attributes& own, const Given& given) {
  PyObject* backend = own.get(keys.backend);
  if (!(keys.auto_ == backend || keys.custom == backend)) return std::nullopt;
  for (const Key& option : keys.options) {
    if (!own.is_off(option)) return std::nullopt;
  }
  const std::optional<ModuleCall> call = read_call(keys, own, given, kStep);
  if (!call) return std::nullopt;
  const bool drops = !own.is_off(keys.training) && !own.is_off(keys.dropout);
  if (call->layers > 1 && drops) return std::nullopt;
  const Weights weights = read_weights(own.get(keys.parameters), own.get(keys.names));
  const at::ScalarType type = call->input.scalar_type();
  if (!is_computed(type) || weights.empty() || weights[0].scalar_type() != type || PyErr_Occurred())
    return std::nullopt;
  const auto& [x, cell, states, resets, layers, has_cell, bidirectional, batch_first, cell_states] = *call;
  at::Tensor output, h_n, c_n, cells;
  {
    const pybind11::gil_scoped_release no_gil;
    if (layers == 1) {
      const LayerOptions options = {cell, bidirectional, batch_first, cell_states};
      std::tie(output, h_n, c_n, cells, std::ignore) =
          layer_call({x, states[0], states[1], weights, std::nullopt, std::nullopt, resets, OptionalTensors(), options},
                     false, false);
    } else {
      std::tie(output, h_n, c_n, cells) =
          stack(x, states[0], states[1], {weights.begin(), weights.end()}, std::nullopt, std::nullopt, resets, cell,
                layers, bidirectional, batch_first, cell_states);
    }
    if constexpr (kStep) output = output.squeeze(0);
  }
  return wrap(has_cell, std::move(output), std::move(h_n), std::move(c_n), cell_states ? cells : at::Tensor());
}

/// The same of a module of rnn_ext.quantized.
std::optional<PyObject*> run_quantized(const Keys& keys, const Attributes& own, const Given& given) {
  const std::optional<ModuleCall> call = read_call(keys, own, given, false);
  if (!call) return std::nullopt;
  const auto& [x, cell, states, resets, layers, has_cell, bidirectional, batch_first, cell_states] = *call;
  const int64_t directions = bidirectional ? 2 : 1;
  for (const OptionalTensor& state : states) {  // another type Python may cast
    if (state.has_value() && (state->scalar_type() != x.scalar_type() || state->size(0) != layers * directions))
      return std::nullopt;
  }
  PyObject* input_size = own.get(keys.input_size);
  if (!input_size || !PyLong_Check(input_size) || PyLong_AsLongLong(input_size) != x.size(2)) return std::nullopt;
  const Weights weights = read_weights(own.get(keys.buffers), own.get(keys.names));
  const size_t count = weights.size() / size_t(layers);
  if (count == 0 || count * size_t(layers) != weights.size() || PyErr_Occurred()) return std::nullopt;
  at::Tensor output = x, h_n, c_n, cells;
  {
    const pybind11::gil_scoped_release no_gil;
    std::vector<at::Tensor> h_ns, c_ns;
    for (int64_t k = 0; k < layers; ++k) {
      const auto part = [&](const OptionalTensor& state) {
        const bool all = !state.has_value() || call->layers == 1;
        return all ? state : OptionalTensor(state->narrow(0, k * directions, directions));
      };
      std::tie(output, h_n, c_n, cells) = quantized_layer_call(
          output, part(states[0]), part(states[1]), at::TensorList(weights).slice(size_t(k) * count, count),
          std::nullopt, std::nullopt, resets, cell, bidirectional, batch_first, cell_states && k == layers - 1);
      h_ns.push_back(h_n);
      c_ns.push_back(c_n);
    }
    if (layers > 1) h_n = at::cat(h_ns);
    if (layers > 1 && has_cell) c_n = at::cat(c_ns);
  }
  return wrap(has_cell, std::move(output), std::move(h_n), std::move(c_n), cell_states ? cells : at::Tensor());
}

/// The next state of one of rnn_ext's cells, for an LSTMCell the two of them; nothing: Python is to look at it.
std::optional<PyObject*> run_cell(const Keys& keys, const Attributes& own, PyObject* mode, PyObject* input_object,
                                  PyObject* hx) {
  PyObject* backend = own.get(keys.backend);
  const at::Tensor* input = tensor(input_object);
  const std::string_view cell = cell_of(keys, mode);
  if (!(keys.auto_ == backend || keys.custom == backend) || cell.empty() || !is_plain(input, 2)) return std::nullopt;
  if (at::autocast::is_autocast_enabled(at::kCPU)) return std::nullopt;  // as of read_call()
  const bool has_cell = cell_info(cell).has_cell;
  OptionalTensor states[2];
  if (!read_hx(hx, has_cell, 2, states)) return std::nullopt;
  PyObject* parameters = own.get(keys.parameters);
  if (!parameters || !PyDict_Check(parameters)) return std::nullopt;
  Weights weights;
  for (const Key& name : keys.of_cell) {
    PyObject* object = PyDict_GetItemWithError(parameters, name);
    if (object == Py_None) continue;  // of a cell without biases
    const at::Tensor* weight = tensor(object);
    if (!weight || !is_dense(*weight)) return std::nullopt;
    weights.push_back(*weight);
  }
  const at::ScalarType type = input->scalar_type();
  if (weights.size() % 2 != 0 || weights.empty() || weights[0].scalar_type() != type || !is_computed(type) ||
      PyErr_Occurred())
    return std::nullopt;
  if (weights[0].dim() == 2 && weights[0].size(0) == 0) return std::nullopt;  // of no units
  at::Tensor h, c;
  {
    const pybind11::gil_scoped_release no_gil;
    std::tie(h, c) = cell_call(*input, states[0], states[1], weights, cell);
  }
  PyObject* next = THPVariable_Wrap(std::move(h));
  return has_cell ? Py_BuildValue("NN", next, THPVariable_Wrap(std::move(c))) : next;
}

PyObject* or_none(std::optional<PyObject*> result) {
  if (result) return *result;
  PyErr_Clear();
  Py_RETURN_NONE;
}

PyObject* cell_method(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 4 && PyDict_Check(args[0]), "expected vars(cell), mode, input and hx");
  return or_none(run_cell(known_keys(), Attributes(args[0]), args[1], args[2], args[3]));
  END_HANDLE_TH_ERRORS
}

template <auto Run>
PyObject* forward_method(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 5 && PyDict_Check(args[0]),
                   "expected vars(module), input, hx, resets and return_cell_states");
  return or_none(Run(known_keys(), Attributes(args[0]), {args[1], args[2], args[3], args[4]}));
  END_HANDLE_TH_ERRORS
}

PyObject* step_method(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 3 && PyDict_Check(args[0]), "expected vars(module), input and state");
  return or_none(run_plain<true>(known_keys(), Attributes(args[0]), {args[1], args[2]}));
  END_HANDLE_TH_ERRORS
}

}  // namespace

using FastMethod = PyObject*(PyObject*, PyObject* const*, Py_ssize_t);
PyCFunction as_method(FastMethod* method) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(method));
}

PyMethodDef plain_forward[] = {
    {"plain_forward", as_method(forward_method<run_plain<false>>), METH_FASTCALL,
     "forward of a module without options on the CPU, or None: see csrc/ops/plain_forward.h."},
    {"plain_step", as_method(step_method), METH_FASTCALL, "The same of step."},
    {"plain_cell", as_method(cell_method), METH_FASTCALL, "The same of a cell."},
    {"quantized_forward", as_method(forward_method<run_quantized>), METH_FASTCALL,
     "forward of a layer of rnn_ext.quantized, or None: see csrc/ops/plain_forward.h."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace rnn_ext::ops
