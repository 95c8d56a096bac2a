// Long short-term memory (torch.nn.LSTM):
//   i, f, o = sigmoid(gates_i, gates_f, gates_o)   g = tanh(gates_g)
//   c = f c_prev + i g                             h = o tanh(c)
#pragma once

#include "cells/cell.h"

namespace rnn_ext::cells {

struct Lstm {
  static constexpr const char* kName = "lstm";
  static constexpr int kGates = 4;  // i f g o
  static constexpr int kSplit = 0;
  static constexpr int kSaved = 5;  // i f g o after their activations, c
  static constexpr int kGradGates = 4;
  static constexpr bool kHasCell = true;
  static constexpr bool kDirectCarry = false;
  static constexpr int kSavedCell = 4;  // which saved value is c
  RNN_EXT_HD static constexpr int ih_slot(int gate) { return gate; }
  RNN_EXT_HD static constexpr int hh_slot(int gate) { return gate; }

  template <class M, class V>
  RNN_EXT_HD static V forward(const V* gates, const V* /*split*/, V /*h_prev*/, V& c, V* saved) {
    const V i = M::sigmoid(gates[0]);
    const V f = M::sigmoid(gates[1]);
    const V g = M::tanh(gates[2]);
    const V o = M::sigmoid(gates[3]);
    c = f * c + i * g;
    saved[0] = i;
    saved[1] = f;
    saved[2] = g;
    saved[3] = o;
    saved[4] = c;
    return o * M::tanh(c);
  }

  template <class M, class V>
  RNN_EXT_HD static V backward(const V* saved, V /*h*/, V /*h_prev*/, V c_prev, V dh, V& dc, V* dgates) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V tanh_c = M::tanh(saved[4]);
    const V dc_all = dc + dh * o * (1 - tanh_c * tanh_c);
    dgates[0] = dc_all * g * i * (1 - i);
    dgates[1] = dc_all * c_prev * f * (1 - f);
    dgates[2] = dc_all * i * (1 - g * g);
    dgates[3] = dh * tanh_c * o * (1 - o);
    dc = dc_all * f;
    return V{};
  }
};

}  // namespace rnn_ext::cells
