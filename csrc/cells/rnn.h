// The Elman cell: h = act(W_ih x + b_ih + W_hh h_prev + b_hh), act = tanh or relu.
#pragma once

#include "cells/cell.h"

namespace rnn_ext::cells {

struct RnnBase {
  static constexpr int kGates = 1;
  static constexpr int kSplit = 0;
  static constexpr int kSaved = 0;  // the output is enough
  static constexpr int kGradGates = 1;
  static constexpr bool kHasCell = false;
  static constexpr bool kDirectCarry = false;
  RNN_EXT_HD static constexpr int ih_slot(int gate) { return gate; }
  RNN_EXT_HD static constexpr int hh_slot(int gate) { return gate; }
};

struct RnnTanh : RnnBase {
  static constexpr const char* kName = "rnn_tanh";

  template <class M, class V>
  RNN_EXT_HD static V forward(const V* gates, const V* /*split*/, V /*h_prev*/, V& /*c*/, V* /*saved*/) {
    return M::tanh(gates[0]);
  }

  template <class M, class V>
  RNN_EXT_HD static V backward(const V* /*saved*/, V h, V /*h_prev*/, V /*c_prev*/, V dh, V& /*dc*/, V* dgates) {
    dgates[0] = dh * (1 - h * h);
    return V{};
  }
};

struct RnnRelu : RnnBase {
  static constexpr const char* kName = "rnn_relu";

  template <class M, class V>
  RNN_EXT_HD static V forward(const V* gates, const V* /*split*/, V /*h_prev*/, V& /*c*/, V* /*saved*/) {
    return M::relu(gates[0]);
  }

  template <class M, class V>
  RNN_EXT_HD static V backward(const V* /*saved*/, V h, V /*h_prev*/, V /*c_prev*/, V dh, V& /*dc*/, V* dgates) {
    dgates[0] = M::relu_backward(dh, h);
    return V{};
  }
};

}  // namespace rnn_ext::cells
