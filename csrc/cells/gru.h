// Gated recurrent unit (torch.nn.GRU: the reset gate scales the hidden part of the candidate, bias included):
//   r, z = sigmoid(gates_r, gates_z)   n = tanh(igates_n + r hgates_n)   h = (1 - z) n + z h_prev
#pragma once

#include "cells/cell.h"

namespace rnn_ext::cells {

struct Gru {
  static constexpr const char* kName = "gru";
  static constexpr int kGates = 3;      // r z n
  static constexpr int kSplit = 1;      // n
  static constexpr int kSaved = 4;      // r z n, hgates_n
  static constexpr int kGradGates = 4;  // dr dz, d igates_n, d hgates_n
  static constexpr bool kHasCell = false;
  static constexpr bool kDirectCarry = true;
  RNN_EXT_HD static constexpr int ih_slot(int gate) { return gate; }
  RNN_EXT_HD static constexpr int hh_slot(int gate) { return gate == 2 ? 3 : gate; }

  template <class M, class V>
  RNN_EXT_HD static V forward(const V* gates, const V* split, V h_prev, V& /*c*/, V* saved) {
    const V r = M::sigmoid(gates[0]);
    const V z = M::sigmoid(gates[1]);
    const V hgate_n = gates[2];
    const V n = M::tanh(split[0] + r * hgate_n);
    saved[0] = r;
    saved[1] = z;
    saved[2] = n;
    saved[3] = hgate_n;
    return n + z * (h_prev - n);
  }

  template <class M, class V>
  RNN_EXT_HD static V backward(const V* saved, V /*h*/, V h_prev, V /*c_prev*/, V dh, V& /*dc*/, V* dgates) {
    const V r = saved[0], z = saved[1], n = saved[2], hgate_n = saved[3];
    const V dn = dh * (1 - z) * (1 - n * n);
    dgates[0] = dn * hgate_n * r * (1 - r);
    dgates[1] = dh * (h_prev - n) * z * (1 - z);
    dgates[2] = dn;
    dgates[3] = dn * r;
    return dh * z;
  }
};

}  // namespace rnn_ext::cells
