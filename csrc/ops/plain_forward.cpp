#include "ops/plain_forward.h"

#include <ATen/EmptyTensor.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones_like.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
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

/// Whether its elements lie in memory by sizes that are numbers.
bool is_dense(const at::Tensor& tensor) {
  return tensor.layout() == at::kStrided && !tensor.is_nested() &&
         !tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
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
  Key parameters{"_parameters"}, buffers{"_buffers"}, input_size{"input_size"}, names{"_flat_weights_names"},
      mode{"mode"}, backend{"backend"}, dropout{"dropout"}, training{"training"}, num_layers{"num_layers"},
      bidirectional{"bidirectional"}, batch_first{"batch_first"};
  Key recompute{"recompute"}, zoneout{"zoneout"}, recurrent_dropout{"recurrent_dropout"},
      weight_dropout{"weight_dropout"}, hidden_size{"hidden_size"}, proj_size{"proj_size"};
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

/// The class, borrowed.
PyTypeObject* packed_sequence() {
  static PyObject* type = nullptr;  // not by its initialiser, in which Python may let go of the GIL
  if (!type)
    type = pybind11::object(pybind11::module_::import("torch.nn.utils.rnn").attr("PackedSequence")).release().ptr();
  return reinterpret_cast<PyTypeObject*>(type);
}

/// Whether nothing of it that is asked for runs code of its own.
bool is_number(PyObject* value) {
  return value && (PyBool_Check(value) || PyLong_CheckExact(value) || PyFloat_CheckExact(value));
}

/// A probability, of 1 if the event may be certain; nothing for all else, True among it.
std::optional<double> probability(PyObject* value, bool certain = false) {
  const double p = is_number(value) && value != Py_True ? PyFloat_AsDouble(value) : -1.0;
  return 0.0 <= p && (p < 1.0 || (certain && p == 1.0)) ? std::optional(p) : std::nullopt;
}

/// A module's attributes.
class Attributes {
 public:
  explicit Attributes(PyObject* dict) : dict_(dict) {}

  /// Borrowed; null if there is none.
  PyObject* get(PyObject* key) const { return PyDict_GetItemWithError(dict_, key); }
  /// Whether it is there and False, or a number that is zero.
  bool is_off(PyObject* key) const {
    PyObject* value = get(key);
    return is_number(value) && PyObject_IsTrue(value) == 0;
  }
  /// A bool that is there; nothing for all else.
  std::optional<bool> flag(PyObject* key) const {
    PyObject* value = get(key);
    return value == Py_True || value == Py_False ? std::optional(value == Py_True) : std::nullopt;
  }
  /// A size that is there, -1 for all else.
  int64_t size(PyObject* key) const {
    PyObject* value = get(key);
    return value && PyLong_Check(value) ? PyLong_AsLongLong(value) : -1;
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
  PyObject *input, *hx, *lengths = Py_None, *resets = Py_None, *return_cell_states = Py_False;
};

/// What that is to do, of a batch on the CPU.
struct ModuleCall {
  std::string_view cell;
  int64_t layers;
  bool has_cell, bidirectional, batch_first, cell_states;
  bool is_step;                // input and output lack the dimension of timesteps
  bool is_unbatched = false;   // and these, states and resets lack that of sequences
  PyObject* packed = nullptr;  // the PackedSequence that input is the data of, borrowed
  at::Tensor input = {};       // with all dimensions, as the following
  OptionalTensor states[2] = {}, batch_sizes = {}, lengths = {}, resets = {};
  OptionalTensor order = {}, inverse = {};  // of a PackedSequence whose sequences did not come in the order of lengths

  /// Sequences of a padded input.
  int64_t batch() const { return input.size(batch_first ? 0 : 1); }
};

/// Whether it is a tensor that calls without more ado can take.
bool is_plain(const at::Tensor* input) {
  return input && input->is_cpu() && !at::impl::torch_function_mode_enabled() && is_dense(*input) &&
         !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Tracer);  // by torch.jit.trace
}

bool is_computed(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

/// Of readers of arguments, false says that Python is to look at them.

/// Those in hx, None or as torch.nn takes it, of these dimensions.
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

/// None or a vector on the CPU.
bool read_vector(PyObject* object, OptionalTensor& vector) {
  if (object == Py_None) return true;
  const at::Tensor* given = tensor(object);
  if (!given || !given->is_cpu() || !is_dense(*given) || given->dim() != 1) return false;
  vector = *given;
  return true;
}

/// What is in a PackedSequence.
bool read_packed(PyObject* packed, ModuleCall& call) {
  if (PyTuple_GET_SIZE(packed) != 4) return false;  // as tuple.__new__ may make it
  const at::Tensor* data = tensor(PyTuple_GET_ITEM(packed, 0));
  if (!is_plain(data) || data->dim() != 2) return false;
  call.packed = packed;
  call.input = *data;
  return read_vector(PyTuple_GET_ITEM(packed, 1), call.batch_sizes) && call.batch_sizes.has_value() &&
         read_vector(PyTuple_GET_ITEM(packed, 2), call.order) &&
         read_vector(PyTuple_GET_ITEM(packed, 3), call.inverse) && call.order.has_value() == call.inverse.has_value();
}

/// A padded batch, or one sequence, of timesteps, or at one of them.
bool read_padded(PyObject* object, ModuleCall& call) {
  const at::Tensor* input = tensor(object);
  if (!is_plain(input)) return false;
  call.input = call.is_step ? input->unsqueeze(0) : *input;
  call.is_unbatched = call.input.dim() == 2;
  if (call.is_unbatched) call.input = call.input.unsqueeze(1);
  return call.input.dim() == 3;
}

/// None, or one for each of `batch` sequences: integers in a tensor, or a list or tuple of those from 0 to `steps`.
bool read_lengths(PyObject* object, int64_t batch, int64_t steps, OptionalTensor& lengths) {
  if (!PyList_CheckExact(object) && !PyTuple_CheckExact(object)) {
    if (!read_vector(object, lengths)) return false;
    if (!lengths.has_value()) return true;
    if (!at::isIntegralType(lengths->scalar_type(), false) || lengths->size(0) != batch) return false;
    check_memory(*lengths, "lengths");
    lengths = lengths->to(at::kLong);
    return true;
  }
  if (PySequence_Fast_GET_SIZE(object) != batch) return false;
  if (c10::impl::TorchDispatchModeTLS::any_modes_set()) return false;  // which have a part in making a tensor
  lengths = at::Tensor(at::detail::empty_cpu({batch}, at::kLong));
  for (int64_t n = 0; n < batch; ++n) {
    PyObject* item = PySequence_Fast_GET_ITEM(object, n);
    if (!PyLong_CheckExact(item)) return false;
    int overflow = 0;
    const int64_t length = PyLong_AsLongLongAndOverflow(item, &overflow);
    if (overflow || length < 0 || length > steps) return false;
    lengths->mutable_data_ptr<int64_t>()[n] = length;
  }
  return true;
}

/// Those of a padded input, None or a tensor of the timesteps' shape.
bool read_resets(PyObject* object, const ModuleCall& call, OptionalTensor& resets) {
  if (object == Py_None) return true;
  const at::Tensor* given = tensor(object);
  if (!given || !given->is_cpu() || !is_dense(*given) || given->scalar_type() != at::kBool) return false;
  if (given->dim() != 2 - call.is_unbatched) return false;
  resets = call.is_unbatched ? given->unsqueeze(1) : *given;
  return resets->sizes() == call.input.sizes().slice(0, 2);
}

/// Of the input, too.
bool read_sequences(const Given& given, ModuleCall& call) {
  if (!call.is_step && Py_TYPE(given.input) == packed_sequence()) {
    const bool has_more = given.lengths != Py_None || given.resets != Py_None;  // which it cannot have
    if (has_more || !read_packed(given.input, call) || !read_hx(given.hx, call.has_cell, 3, call.states)) return false;
    return std::all_of(std::begin(call.states), std::end(call.states), [&](const OptionalTensor& state) {
      return !state.has_value() || !call.order.has_value() || state->size(1) == call.order->size(0);
    });
  }
  if (!read_padded(given.input, call) || !read_hx(given.hx, call.has_cell, 3 - call.is_unbatched, call.states))
    return false;
  call.batch_first = call.batch_first && !call.is_step && !call.is_unbatched;
  for (OptionalTensor& state : call.states) {
    if (call.is_unbatched && state.has_value()) state = state->unsqueeze(1);
  }
  const int64_t steps = call.input.size(call.batch_first ? 1 : 0);
  return read_lengths(given.lengths, call.batch(), steps, call.lengths) && read_resets(given.resets, call, call.resets);
}

/// Nothing: Python is to look at it.
std::optional<ModuleCall> read_call(const Keys& keys, const Attributes& own, const Given& given, bool step) {
  const std::string_view cell = cell_of(keys, own.get(keys.mode));
  if (cell.empty()) return std::nullopt;
  const std::optional<bool> bidirectional = own.flag(keys.bidirectional), batch_first = own.flag(keys.batch_first);
  if (!bidirectional || !batch_first) return std::nullopt;
  // A step has its states computed in their own type under autocast, and one direction.
  if (step && (*bidirectional || at::autocast::is_autocast_enabled(at::kCPU))) return std::nullopt;
  ModuleCall call{.cell = cell,
                  .layers = own.size(keys.num_layers),
                  .has_cell = cell_info(cell).has_cell,
                  .bidirectional = *bidirectional,
                  .batch_first = *batch_first,
                  .cell_states = given.return_cell_states == Py_True,
                  .is_step = step};
  if (call.cell_states ? !call.has_cell : given.return_cell_states != Py_False) return std::nullopt;
  return call.layers >= 1 && read_sequences(given, call) ? std::optional(std::move(call)) : std::nullopt;
}

/// Dropout between layers and the options that torch.nn's layers lack, as they act in a call.
struct Extras {
  bool recompute = false;
  double zoneout_h = 0, zoneout_c = 0, recurrent_dropout = 0, weight_dropout = 0, dropout = 0;

  bool need_masks() const { return zoneout_h > 0 || zoneout_c > 0 || recurrent_dropout > 0; }
  bool any() const { return recompute || weight_dropout > 0 || dropout > 0 || need_masks(); }
};

/// Nothing: Python is to look at them.
std::optional<Extras> read_extras(const Keys& keys, const Attributes& own, bool trains, const ModuleCall& call) {
  const std::optional<bool> recompute = own.flag(keys.recompute);
  const std::optional<double> recurrent = probability(own.get(keys.recurrent_dropout));
  const std::optional<double> weight = probability(own.get(keys.weight_dropout));
  PyObject* zoneout = own.get(keys.zoneout);
  const bool is_pair = zoneout && call.has_cell && PyTuple_CheckExact(zoneout) && PyTuple_GET_SIZE(zoneout) == 2;
  const std::optional<double> of_h = probability(is_pair ? PyTuple_GET_ITEM(zoneout, 0) : zoneout);
  const std::optional<double> of_c = is_pair ? probability(PyTuple_GET_ITEM(zoneout, 1)) : of_h;
  const std::optional<double> dropout = call.layers > 1 ? probability(own.get(keys.dropout), true) : 0;
  if (!recompute || !recurrent || !weight || !of_h || !of_c || !dropout) return std::nullopt;
  const auto in_training = [&](double p) { return trains ? p : 0; };
  return Extras{*recompute,           *of_h, call.has_cell ? *of_c : 0, in_training(*recurrent), in_training(*weight),
                in_training(*dropout)};
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

using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;  // output, h_n, c_n, cells

/// A tensor, or the PackedSequence of it whose sequences are those of `packed`.
PyObject* wrap(PyObject* packed, at::Tensor data) {
  PyObject* object = THPVariable_Wrap(std::move(data));
  if (!packed || !object) return object;
  const auto item = [&](int i) { return PyTuple_GET_ITEM(packed, i); };
  // As it would make itself, without asking about sequences once more.
  PyObject* arguments = Py_BuildValue("((NOOO))", object, item(1), item(2), item(3));
  PyObject* result = arguments ? PyTuple_Type.tp_new(Py_TYPE(packed), arguments, nullptr) : nullptr;
  Py_XDECREF(arguments);
  return result;
}

/// What the module returns, of what `compute` does.
template <class Compute>
PyObject* results_of(ModuleCall& call, const Compute& compute) {
  at::Tensor output, h_n, c_n, cells;
  {
    const pybind11::gil_scoped_release no_gil;
    for (int i = 0; i < 2 && call.order.has_value(); ++i) {
      OptionalTensor& state = call.states[i];
      if (!state.has_value()) continue;
      check_memory(*state, i == 0 ? "h_0" : "c_0");
      state = state->index_select(1, *call.order);
    }
    std::tie(output, h_n, c_n, cells) = compute();
    if (!call.has_cell) c_n = at::Tensor();
    if (!call.cell_states) cells = at::Tensor();
    for (at::Tensor* state : {&h_n, &c_n}) {
      if (state->defined() && call.inverse.has_value()) *state = state->index_select(1, *call.inverse);
    }
    for (at::Tensor* result : {&output, &h_n, &c_n, &cells}) {
      if (result->defined() && call.is_unbatched) *result = result->squeeze(1);
    }
    if (call.is_step) output = output.squeeze(0);
  }
  PyObject* state = THPVariable_Wrap(std::move(h_n));
  if (call.has_cell) state = Py_BuildValue("NN", state, THPVariable_Wrap(std::move(c_n)));
  PyObject* out = wrap(call.packed, std::move(output));
  return cells.defined() ? Py_BuildValue("NNN", out, state, wrap(call.packed, std::move(cells)))
                         : Py_BuildValue("NN", out, state);
}

/// What a layer hands on to the next one. torch.nn draws the mask of a padded batch in time-major order.
at::Tensor drop_out(const at::Tensor& output, double p, bool batch_first) {
  if (!batch_first) return at::dropout(output, p, true);
  const at::Tensor ones = at::ones_like(output.transpose(0, 1), {}, at::MemoryFormat::Contiguous);
  return output * at::dropout(ones, p, true).transpose(0, 1);
}

/// The layers of a call one after the other, each by layer(input, h_0, c_0, its weights, cell_states), with dropout
/// between them.
template <class Layer>
Results one_after_another(const ModuleCall& call, at::TensorList weights, double dropout, const Layer& layer) {
  const int64_t directions = call.bidirectional ? 2 : 1;
  const size_t count = weights.size() / size_t(call.layers);
  at::Tensor output = call.input, h_n, c_n, cells;
  std::vector<at::Tensor> h_ns, c_ns;
  for (int64_t k = 0; k < call.layers; ++k) {
    if (k > 0 && dropout > 0) output = drop_out(output, dropout, call.batch_first && !call.packed);
    const auto part = [&](const OptionalTensor& state) {
      const bool all = !state.has_value() || call.layers == 1;
      return all ? state : OptionalTensor(state->narrow(0, k * directions, directions));
    };
    std::tie(output, h_n, c_n, cells) =
        layer(output, part(call.states[0]), part(call.states[1]), weights.slice(size_t(k) * count, count),
              call.cell_states && k == call.layers - 1);
    h_ns.push_back(h_n);
    c_ns.push_back(c_n);
  }
  if (call.layers > 1) h_n = at::cat(h_ns);
  if (call.layers > 1 && call.has_cell) c_n = at::cat(c_ns);
  return {std::move(output), std::move(h_n), std::move(c_n), std::move(cells)};
}

/// Whether states have the sizes that all layers together need. What an op of a single layer would refuse Python says
/// of all of them.
bool fits(const ModuleCall& call, int64_t out, int64_t hidden) {
  for (int i = 0; i < 2; ++i) {
    const OptionalTensor& state = call.states[i];
    if (!state.has_value()) continue;
    const int64_t batch = call.packed ? state->size(1) : call.batch();
    const int64_t sizes[] = {call.layers * (call.bidirectional ? 2 : 1), batch, i == 0 ? out : hidden};
    if (state->sizes() != at::IntArrayRef(sizes)) return false;
  }
  return true;
}

/// 0 with probability p, else 1 / (1 - p).
at::Tensor draw_dropout(at::IntArrayRef size, double p, bool wide) {
  return draw_mask(c10::fromIntArrayRefSlow(size), 1 - p, 1 / (1 - p), wide);
}

/// What Python's function of that name makes for one layer, of the same numbers.
OptionalTensors masks_of(const ModuleCall& call, const Extras& extras, bool trains, const at::Tensor& input,
                         at::TensorList weights) {
  if (!extras.need_masks()) return OptionalTensors();
  const bool wide = input.scalar_type() == at::kDouble;
  const int64_t directions = call.bidirectional ? 2 : 1;
  const int64_t features = weights[1].size(1), hidden = weights[0].size(0) / cell_info(call.cell).gates;
  OptionalTensor masks[LayerShape::kMasks];
  if (extras.recurrent_dropout > 0)
    masks[LayerShape::kHiddenMask] = draw_dropout({directions, call.batch(), features}, extras.recurrent_dropout, wide);
  // Of `count` such tensors, in one.
  const auto keep = [&](double p, int64_t count, int64_t width) {
    c10::SmallVector<int64_t, 4> size = {count};
    size.append(input.sizes().begin(), input.sizes().end() - 1);
    size.push_back(directions * width);
    if (trains) return draw_mask(c10::fromIntArrayRefSlow(size), p, 1, wide);
    return at::full({size.back()}, p, input.options().dtype(wide ? at::kDouble : at::kFloat)).expand(size);
  };
  const auto [of_h, of_c] = std::pair(extras.zoneout_h, extras.zoneout_c);
  const bool together = of_h == of_c && features == hidden;
  const at::Tensor both = together && of_h > 0 ? keep(of_h, 2, hidden) : at::Tensor();
  if (of_h > 0)
    masks[LayerShape::kZoneoutH] = both.defined() ? both.select(0, 0) : keep(of_h, 1, features).select(0, 0);
  if (of_c > 0) masks[LayerShape::kZoneoutC] = both.defined() ? both.select(0, 1) : keep(of_c, 1, hidden).select(0, 0);
  return OptionalTensors(at::ArrayRef<OptionalTensor>(masks));
}

/// A module's call with options.
Results run_extras(const ModuleCall& call, const Extras& extras, bool trains, Weights weights) {
  const size_t directions = call.bidirectional ? 2 : 1, count = weights.size() / (size_t(call.layers) * directions);
  for (size_t i = 1; i < weights.size() && extras.weight_dropout > 0; i += count) {
    const at::Tensor& weight = weights[i];
    check_memory(weight, "weight_hh");
    const at::Tensor mask = draw_dropout(weight.sizes(), extras.weight_dropout, weight.scalar_type() == at::kDouble);
    weights[i] = weight * mask.to(weight.scalar_type());
  }
  const auto layer = [&](const at::Tensor& input, const OptionalTensor& h_0, const OptionalTensor& c_0,
                         at::TensorList of_layer, bool cell_states) -> Results {
    const OptionalTensors masks = masks_of(call, extras, trains, input, of_layer);
    const LayerOptions options = {call.cell, call.bidirectional, call.batch_first, cell_states};
    auto [output, h_n, c_n, cells, saved] =
        layer_call({input, h_0, c_0, of_layer, call.batch_sizes, call.lengths, call.resets, masks, options}, false,
                   extras.recompute);
    return {std::move(output), std::move(h_n), std::move(c_n), std::move(cells)};
  };
  return one_after_another(call, weights, extras.dropout, layer);
}

/// Whether Python need not look at a call with options: nothing in it is to be refused before masks are drawn.
bool can_run_extras(const ModuleCall& call, const Extras& extras, const Weights& weights) {
  // What a call draws of a packed batch Python knows, whose sizes may be anything yet.
  if (extras.recurrent_dropout > 0 && call.packed) return false;
  const size_t states = size_t(call.layers) * (call.bidirectional ? 2 : 1), count = weights.size() / states;
  if (count < 2 || count * states != weights.size()) return false;
  if (weights[0].dim() != 2 || weights[1].dim() != 2) return false;
  return call.layers == 1 || fits(call, weights[1].size(1), weights[0].size(0) / cell_info(call.cell).gates);
}

/// Nothing: not a plain call.
template <bool kStep>
std::optional<PyObject*> run_plain(const Keys& keys, const Attributes& own, const Given& given) {
  PyObject* backend = own.get(keys.backend);
  if (!(keys.auto_ == backend || keys.custom == backend)) return std::nullopt;
  std::optional<ModuleCall> call = read_call(keys, own, given, kStep);
  if (!call) return std::nullopt;
  const bool trains = !own.is_off(keys.training);
  const std::optional<Extras> extras = read_extras(keys, own, trains, *call);
  if (!extras || (kStep && (extras->recurrent_dropout > 0 || extras->weight_dropout > 0))) return std::nullopt;
  const Weights weights = read_weights(own.get(keys.parameters), own.get(keys.names));
  const at::ScalarType type = call->input.scalar_type();
  if (!is_computed(type) || weights.empty() || weights[0].scalar_type() != type || PyErr_Occurred())
    return std::nullopt;
  if (extras->any() && !(own.flag(keys.training) && can_run_extras(*call, *extras, weights))) return std::nullopt;
  return results_of(*call, [&]() -> Results {
    if (extras->any()) return run_extras(*call, *extras, trains, weights);
    const auto& [h_0, c_0] = call->states;
    if (call->layers > 1)
      return stack(call->input, h_0, c_0, {weights.begin(), weights.end()}, call->batch_sizes, call->lengths,
                   call->resets, call->cell, call->layers, call->bidirectional, call->batch_first, call->cell_states);
    const LayerOptions options = {call->cell, call->bidirectional, call->batch_first, call->cell_states};
    auto [output, h_n, c_n, cells, saved] = layer_call(
        {call->input, h_0, c_0, weights, call->batch_sizes, call->lengths, call->resets, OptionalTensors(), options},
        false, false);
    return {std::move(output), std::move(h_n), std::move(c_n), std::move(cells)};
  });
}

/// The same of a module of rnn_ext.quantized.
std::optional<PyObject*> run_quantized(const Keys& keys, const Attributes& own, const Given& given) {
  std::optional<ModuleCall> call = read_call(keys, own, given, false);
  if (!call) return std::nullopt;
  const at::ScalarType type = call->input.scalar_type();
  // What the ops of single layers would refuse Python says of all of them, and another type of states it may cast.
  if (!is_computed(type) || type == at::kDouble || own.size(keys.input_size) != call->input.size(-1))
    return std::nullopt;
  const int64_t hidden = own.size(keys.hidden_size), proj = own.size(keys.proj_size);
  const bool same_type = std::all_of(std::begin(call->states), std::end(call->states), [&](const auto& state) {
    return !state.has_value() || state->scalar_type() == type;
  });
  if (!same_type || !fits(*call, proj > 0 ? proj : hidden, hidden)) return std::nullopt;
  const Weights weights = read_weights(own.get(keys.buffers), own.get(keys.names));
  if (weights.empty() || weights.size() % size_t(call->layers) != 0 || PyErr_Occurred()) return std::nullopt;
  return results_of(*call, [&]() -> Results {
    const auto layer = [&](const at::Tensor& input, const OptionalTensor& h_0, const OptionalTensor& c_0,
                           at::TensorList of_layer, bool cell_states) {
      return quantized_layer_call(input, h_0, c_0, of_layer, call->batch_sizes, call->lengths, call->resets, call->cell,
                                  call->bidirectional, call->batch_first, cell_states);
    };
    return one_after_another(*call, weights, 0, layer);
  });
}

/// The next state of one of rnn_ext's cells, for an LSTMCell the two of them; nothing: Python is to look at it.
std::optional<PyObject*> run_cell(const Keys& keys, const Attributes& own, PyObject* mode, PyObject* input_object,
                                  PyObject* hx) {
  PyObject* backend = own.get(keys.backend);
  const at::Tensor* input = tensor(input_object);
  const std::string_view cell = cell_of(keys, mode);
  if (!(keys.auto_ == backend || keys.custom == backend) || cell.empty() || !is_plain(input)) return std::nullopt;
  if (at::autocast::is_autocast_enabled(at::kCPU)) return std::nullopt;  // as of read_call()
  const bool has_cell = cell_info(cell).has_cell;
  const int64_t dims = input->dim();  // one of them: not a batch
  OptionalTensor states[2];
  if (dims < 1 || dims > 2 || !read_hx(hx, has_cell, dims, states)) return std::nullopt;
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
    for (OptionalTensor& state : states) {
      if (dims == 1 && state.has_value()) state = state->unsqueeze(0);
    }
    std::tie(h, c) = cell_call(dims == 1 ? input->unsqueeze(0) : *input, states[0], states[1], weights, cell);
    if (dims == 1) h = h.squeeze(0);
    if (dims == 1 && has_cell) c = c.squeeze(0);
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
  TORCH_CHECK_TYPE(count == 6 && PyDict_Check(args[0]),
                   "expected vars(module), input, hx, lengths, resets and return_cell_states");
  return or_none(Run(known_keys(), Attributes(args[0]), {args[1], args[2], args[3], args[4], args[5]}));
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
     "forward of a module on the CPU, or None: see csrc/ops/plain_forward.h."},
    {"plain_step", as_method(step_method), METH_FASTCALL, "The same of step."},
    {"plain_cell", as_method(cell_method), METH_FASTCALL, "The same of a cell."},
    {"quantized_forward", as_method(forward_method<run_quantized>), METH_FASTCALL,
     "forward of a layer of rnn_ext.quantized, or None: see csrc/ops/plain_forward.h."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace rnn_ext::ops
