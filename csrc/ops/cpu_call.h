// Tensors as the kernels of csrc/cpu take them.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "ops/layer.h"
#include "ops/workspace.h"

namespace rnn_ext::ops {

/// What the kernels sum, keep for backward and return gradients in.
inline at::ScalarType compute_type(const at::Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

template <class S>
constexpr at::ScalarType kScalarType = at::kFloat;
template <>
constexpr at::ScalarType kScalarType<double> = at::kDouble;
template <>
constexpr at::ScalarType kScalarType<cpu::BFloat16> = at::kBFloat16;
template <>
constexpr at::ScalarType kScalarType<cpu::Float16> = at::kHalf;

/// Calls fn(S()) with that one of the types S of csrc/cpu that a storage type stands for.
template <class... S, class Fn>
void with_stored(at::ScalarType type, const Fn& fn) {
  const bool found = ((type == kScalarType<S> && (fn(S()), true)) || ...);
  TORCH_INTERNAL_ASSERT(found, "no kernels for tensors of ", type);
}

template <class T>
T* data(const at::Tensor& tensor) {
  if constexpr (std::is_const_v<T>) {
    return static_cast<T*>(tensor.const_data_ptr());
  } else {
    return static_cast<T*>(tensor.mutable_data_ptr());
  }
}

/// tensor.to(dtype), which even with nothing to do costs a trip through the dispatcher, and new pages for what is
/// large; and negated where that is only noted, which torch sees to but in lists.
inline at::Tensor cast(const at::Tensor& tensor, at::ScalarType dtype) {
  if (tensor.is_neg()) return cast(tensor.resolve_neg(), dtype);
  if (tensor.scalar_type() == dtype) return tensor;
  if (!tensor.is_contiguous()) return tensor.to(dtype);
  return empty(tensor.sizes(), tensor.options().dtype(dtype)).copy_(tensor);
}

/// In memory the kernels can walk. RuntimeError with the name if there is none.
inline at::Tensor prepare(const at::Tensor& tensor, at::ScalarType dtype, const char* name) {
  check_memory(tensor, name);
  return cast(tensor, dtype).contiguous();
}

inline OptionalTensor prepare(const OptionalTensor& tensor, at::ScalarType dtype, const char* name) {
  if (!tensor.has_value() || !tensor->defined()) return std::nullopt;
  return prepare(*tensor, dtype, name);
}

/// A sequence only needs unit stride in its features: transposed, sliced and expanded ones are read where they lie.
inline at::Tensor prepare_sequence(const at::Tensor& tensor, at::ScalarType dtype, const char* name) {
  check_memory(tensor, name);
  const at::Tensor result = cast(tensor, dtype);
  return result.stride(-1) == 1 || result.size(-1) <= 1 ? result : result.contiguous();
}

inline OptionalTensor prepare_sequence(const OptionalTensor& tensor, at::ScalarType dtype, const char* name) {
  if (!tensor.has_value() || !tensor->defined()) return std::nullopt;
  return prepare_sequence(*tensor, dtype, name);
}

template <class T>
cpu::Sequence<T> sequence(const at::Tensor& tensor, const LayerShape& shape) {
  cpu::Sequence<T> result;
  result.data = data<T>(tensor);
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
  return tensor.has_value() ? data<const T>(*tensor) : nullptr;
}

/// The weights of one direction: T is const for weights, not for their gradients. Undefined tensors give null.
template <class T>
cpu::Weights<T> named_weights(at::TensorList flat, const LayerShape& shape, int direction) {
  const auto find = [&](LayerShape::Weight weight) -> T* {
    const int index = shape.index(direction, weight);
    return index < 0 || !flat[index].defined() ? nullptr : data<T>(flat[index]);
  };
  return {find(LayerShape::kWeightIh),     find(LayerShape::kWeightHh),    find(LayerShape::kBiasIh),
          find(LayerShape::kBiasHh),       find(LayerShape::kWeightHr),    find(LayerShape::kWeightNormIh),
          find(LayerShape::kWeightNormHh), find(LayerShape::kWeightNormC), find(LayerShape::kBiasNormC)};
}

/// Those of one direction, made ready for the kernels as what type_of(weight) says; undefined if that is nothing.
template <class TypeOf>
void prepare_weights(std::vector<at::Tensor>& flat, const LayerShape& shape, int direction, const TypeOf& type_of) {
  for (int i = 0; i < LayerShape::kWeights; ++i) {
    const auto weight = LayerShape::Weight(i);
    const int index = shape.index(direction, weight);
    if (index < 0) continue;
    const std::optional<at::ScalarType> type = type_of(weight);
    flat[index] = type ? prepare(flat[index], *type, LayerShape::name_of(weight)) : at::Tensor();
  }
}

/// Zeros where a sequence has ended: the kernels do not visit these positions.
template <class T>
void zero_past_end(const cpu::Sequence<T>& sequence, const cpu::Layout& layout, int64_t features) {
  layout.each_length([&](int64_t j, int64_t end) {
    if (sequence.step == features) {
      std::fill_n(sequence.at(layout, end, j), (layout.steps - end) * features, T{});
    } else {
      for (int64_t t = end; t < layout.steps; ++t) std::fill_n(sequence.at(layout, t, j), features, T{});
    }
  });
}

}  // namespace rnn_ext::ops
