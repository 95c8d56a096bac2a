// Dual numbers, value + tangent e with e e = 0. A cell computed in them gives beside its results their derivative in
// the direction of the tangents, and its backward that of its gradients: first and second derivatives need no equations
// of their own.
#pragma once

#include <type_traits>

#include "cells/cell.h"

namespace rnn_ext::cells {

/// The numbers that a SIMD vector V consists of, or V.
template <class V>
struct NumberOf {
  using type = std::remove_cvref_t<decltype(V{}[0])>;
};
template <class V>
  requires std::is_arithmetic_v<V>
struct NumberOf<V> {
  using type = V;
};

template <class V>
struct Dual {
  V value = {}, tangent = {};

  RNN_EXT_HD friend Dual operator+(const Dual& a, const Dual& b) { return {a.value + b.value, a.tangent + b.tangent}; }
  RNN_EXT_HD friend Dual operator-(const Dual& a, const Dual& b) { return {a.value - b.value, a.tangent - b.tangent}; }
  RNN_EXT_HD friend Dual operator*(const Dual& a, const Dual& b) {
    return {a.value * b.value, a.tangent * b.value + a.value * b.tangent};
  }
  RNN_EXT_HD friend Dual operator-(int a, const Dual& b) {
    return {typename NumberOf<V>::type(a) - b.value, -b.tangent};
  }
};

/// The elementary functions of M (see cell.h) on duals of what M is for.
template <class M>
struct DualMath {
  template <class V>
  RNN_EXT_HD static Dual<V> sigmoid(const Dual<V>& x) {
    const V y = M::sigmoid(x.value);
    return {y, y * (1 - y) * x.tangent};
  }
  template <class V>
  RNN_EXT_HD static Dual<V> tanh(const Dual<V>& x) {
    const V y = M::tanh(x.value);
    return {y, (1 - y * y) * x.tangent};
  }
  template <class V>
  RNN_EXT_HD static Dual<V> relu(const Dual<V>& x) {
    const V y = M::relu(x.value);
    return {y, M::relu_backward(x.tangent, y)};
  }
  template <class V>
  RNN_EXT_HD static Dual<V> relu_backward(const Dual<V>& dh, const Dual<V>& h) {
    return {M::relu_backward(dh.value, h.value), M::relu_backward(dh.tangent, h.value)};
  }
};

}  // namespace rnn_ext::cells
