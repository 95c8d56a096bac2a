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
    c = next_cell<M>(gates, c, saved);
    saved[4] = c;
    return saved[3] * M::tanh(c);
  }

  template <class M, class V>
  RNN_EXT_HD static V backward(const V* saved, V /*h*/, V /*h_prev*/, V c_prev, V dh, V& dc, V* dgates) {
    const V dc_all = dc + output_backward(saved[3], M::tanh(saved[4]), dh, dgates);
    dc = cell_backward(saved, c_prev, dc_all, dgates);
    return V{};
  }

  // The halves of the above, between which a variant does something to c.

  /// Returns c, fills active with i f g o after their activations.
  template <class M, class V>
  RNN_EXT_HD static V next_cell(const V* gates, V c_prev, V* active) {
    active[0] = M::sigmoid(gates[0]);
    active[1] = M::sigmoid(gates[1]);
    active[2] = M::tanh(gates[2]);
    active[3] = M::sigmoid(gates[3]);
    return active[1] * c_prev + active[0] * active[2];
  }

  /// h = o tanh(x): returns dx, fills dgates[3].
  template <class V>
  RNN_EXT_HD static V output_backward(V o, V tanh_x, V dh, V* dgates) {
    dgates[3] = dh * tanh_x * o * (1 - o);
    return dh * o * (1 - tanh_x * tanh_x);
  }

  /// Returns the gradient of c_prev, fills the first three of dgates.
  template <class V>
  RNN_EXT_HD static V cell_backward(const V* active, V c_prev, V dc, V* dgates) {
    const V i = active[0], f = active[1], g = active[2];
    dgates[0] = dc * g * i * (1 - i);
    dgates[1] = dc * c_prev * f * (1 - f);
    dgates[2] = dc * i * (1 - g * g);
    return dc * f;
  }
};

}  // namespace rnn_ext::cells
