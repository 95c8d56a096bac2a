#include "ops/each.h"

#include <ATen/WrapDimUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/stack.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/library.h>

#include <functional>
#include <utility>

#include "ops/calls.h"

namespace rnn_ext::ops {
namespace {

using c10::IValue;

constexpr int64_t kUninterrupted = 16;  // calls between two looks at signals

/// Whether nothing but the CPU's kernels looks at a tensor.
bool is_plain(const at::Tensor& tensor) {
  const bool recorded = at::GradMode::is_enabled() && tensor.requires_grad();
  return !recorded && !tensor._fw_grad(0).defined() && reaches_cpu_kernels(seen_keys(tensor.key_set()));
}

/// The entries of a tensor. Those of a plain one are made when they are asked for, without a trip through the
/// dispatcher, which takes longer than all else about an argument (measured: backward of a small RNN has nine that are
/// mapped). Of others by one operator: a node of autograd's for each would make a gradient of the whole size for each.
class TensorEntries {
 public:
  TensorEntries(const at::Tensor& tensor, int64_t dim) : tensor_(tensor), dim_(at::maybe_wrap_dim(dim, tensor.dim())) {
    if (!is_plain(tensor)) unbound_ = tensor.unbind(dim_);
  }

  at::Tensor get(int64_t entry) const {
    if (!unbound_.empty()) return unbound_[size_t(entry)];
    c10::SmallVector<int64_t, 8> sizes(tensor_.sizes()), strides(tensor_.strides());
    sizes.erase(sizes.begin() + dim_);
    strides.erase(strides.begin() + dim_);
    const int64_t offset = tensor_.storage_offset() + entry * tensor_.stride(dim_);
    at::Tensor view = at::native::as_strided_tensorimpl(tensor_, sizes, strides, offset);
    view.unsafeGetTensorImpl()->set_version_counter(tensor_.unsafeGetTensorImpl()->version_counter());
    return view;
  }

 private:
  at::Tensor tensor_;
  int64_t dim_;
  std::vector<at::Tensor> unbound_;
};

/// The entries of a tensor, or of each tensor of a list.
class Entries {
 public:
  Entries(IValue argument, const std::vector<std::optional<int64_t>>& dims) : argument_(std::move(argument)) {
    const bool is_list = argument_.isList();
    for (size_t i = 0; i < dims.size(); ++i) {
      if (!dims[i]) continue;
      parts_.emplace_back(
          i, TensorEntries(is_list ? argument_.toListRef()[i].toTensor() : argument_.toTensor(), *dims[i]));
    }
  }

  IValue get(int64_t entry) const {
    if (parts_.empty()) return argument_;
    if (!argument_.isList()) return parts_[0].second.get(entry);
    auto list = argument_.toList().copy();
    for (const auto& [i, entries] : parts_) list.set(i, entries.get(entry));
    return list;
  }

 private:
  IValue argument_;
  std::vector<std::pair<size_t, TensorEntries>> parts_;
};

/// What the op step_down is to run, once it is where it should be.
thread_local const std::function<void()>* pending = nullptr;

void run_pending() {
  TORCH_CHECK(pending, "rnn_ext::step_down is for call_each alone");
  (*std::exchange(pending, nullptr))();
}

// An op without arguments. Called from a rule of torch.func's vmap it leaves that level, and runs as soon as it has, at
// a lower level, in a mode of Python's or where nothing is left: the calls of the loop see what they would see there,
// without a step of their own.
TORCH_LIBRARY_FRAGMENT(rnn_ext, m) {
  m.def("step_down() -> ()");
  m.impl("step_down", c10::DispatchKey::CompositeExplicitAutograd, &run_pending);
}
TORCH_LIBRARY_IMPL(rnn_ext, FuncTorchDynamicLayerFrontMode, m) { m.impl("step_down", &run_pending); }
TORCH_LIBRARY_IMPL(rnn_ext, Python, m) { m.impl("step_down", &run_pending); }

void step_down(const std::function<void()>& run) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("rnn_ext::step_down", "").typed<decltype(run_pending)>();
  const struct Cleared {
    ~Cleared() { pending = nullptr; }
  } cleared;
  pending = &run;
  op.call();
  TORCH_INTERNAL_ASSERT(!pending, "something has taken rnn_ext::step_down's place");
}

/// Results of the same structure as one of that structure.
IValue stacked(const std::vector<torch::jit::Stack>& results, size_t i) {
  std::vector<at::Tensor> parts;
  const auto stack = [&](const auto& part) {
    parts.clear();
    for (const torch::jit::Stack& entry : results) parts.push_back(part(entry[i]));
    return at::stack(parts);
  };
  if (results[0][i].isTensor()) return stack([](const IValue& result) { return result.toTensor(); });
  c10::List<at::Tensor> list;
  for (size_t k = 0; k < results[0][i].toTensorList().size(); ++k)
    list.push_back(stack([&](const IValue& result) { return result.toTensorList().get(k); }));
  return list;
}

}  // namespace

pybind11::object call_each(const std::string& name, int64_t count, const MappedDims& dims, bool below,
                           const pybind11::args& arguments) {
  const c10::OperatorHandle op = c10::Dispatcher::singleton().findSchemaOrThrow(("rnn_ext::" + name).c_str(), "");
  const torch::jit::Stack given = torch::jit::createStackForSchema(op.schema(), arguments, {}, std::nullopt);
  torch::jit::Stack joined;
  {
    const pybind11::gil_scoped_release no_gil;
    const std::function<void()> loop = [&] {
      std::vector<Entries> entries;
      entries.reserve(given.size());
      for (size_t i = 0; i < given.size(); ++i)
        entries.emplace_back(given[i], i < dims.size() ? dims[i] : MappedDims::value_type());
      std::vector<torch::jit::Stack> results;
      for (int64_t entry = 0; entry < count; ++entry) {
        if (entry % kUninterrupted == kUninterrupted - 1) {
          const pybind11::gil_scoped_acquire gil;
          if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
        }
        torch::jit::Stack& stack = results.emplace_back();
        for (const Entries& argument : entries) stack.push_back(argument.get(entry));
        op.callBoxed(stack);
      }
      for (size_t i = 0; i < results[0].size(); ++i) joined.push_back(stacked(results, i));
    };
    below ? step_down(loop) : loop();
  }
  return torch::jit::createPyObjectForStack(std::move(joined));
}

}  // namespace rnn_ext::ops
