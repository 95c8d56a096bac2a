#include "ops/each.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/stack.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include <utility>

namespace rnn_ext::ops {
namespace {

using c10::IValue;

constexpr int64_t kUninterrupted = 16;  // calls between two looks at signals

/// The entries of a tensor, or of each tensor of a list.
class Entries {
 public:
  Entries(IValue argument, const std::vector<std::optional<int64_t>>& dims) : argument_(std::move(argument)) {
    const bool is_list = argument_.isList();
    for (size_t i = 0; i < dims.size(); ++i) {
      if (!dims[i]) continue;
      const at::Tensor tensor = is_list ? argument_.toListRef()[i].toTensor() : argument_.toTensor();
      parts_.emplace_back(i, tensor.unbind(*dims[i]));
    }
  }

  IValue get(int64_t entry) const {
    if (parts_.empty()) return argument_;
    if (!argument_.isList()) return parts_[0].second[size_t(entry)];
    auto list = argument_.toList().copy();
    for (const auto& [i, entries] : parts_) list.set(i, entries[size_t(entry)]);
    return list;
  }

 private:
  IValue argument_;
  std::vector<std::pair<size_t, std::vector<at::Tensor>>> parts_;
};

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

pybind11::object call_each(const std::string& name, int64_t count, const MappedDims& dims,
                           const pybind11::args& arguments) {
  const c10::OperatorHandle op = c10::Dispatcher::singleton().findSchemaOrThrow(("rnn_ext::" + name).c_str(), "");
  const torch::jit::Stack given = torch::jit::createStackForSchema(op.schema(), arguments, {}, std::nullopt);
  torch::jit::Stack joined;
  {
    const pybind11::gil_scoped_release no_gil;
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
  }
  return torch::jit::createPyObjectForStack(std::move(joined));
}

}  // namespace rnn_ext::ops
