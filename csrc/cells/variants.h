// What is done around a cell to regularise it, and the LSTM with layer normalisation. Equations only: means over a row
// are the kernel's to take.
#pragma once

#include "cells/lstm.h"

namespace rnn_ext::cells {

/// Zoneout (Krueger et al. 2017): keep = 1 where a unit's state stands still, in eval the probability of that.
struct Zoneout {
  template <class V>
  RNN_EXT_HD static V forward(V keep, V before, V after) {
    return keep * before + (1 - keep) * after;
  }

  /// Returns the gradient of `before`, turns d into that of `after`.
  template <class V>
  RNN_EXT_HD static V backward(V keep, V& d) {
    const V before = keep * d;
    d = (1 - keep) * d;
    return before;
  }
};

/// A cell with zoneout, or with a mask on the h_prev of its recurrent product, or both.
template <class Cell>
struct Masked : Cell {
  using Base = Cell;
  static constexpr bool kDirectCarry = true;
  // Besides the cell's own: c after zoneout or, where the cell keeps nothing, h before it.
  static constexpr int kSaved = Cell::kSaved + (Cell::kHasCell || Cell::kSaved == 0);
  static constexpr int kSavedCell = Cell::kSaved;
};

/// Layer normalisation (Ba, Kiros and Hinton 2016): y = (x - mean) * rstd, and y * weight + bias.
struct LayerNorm {
  static constexpr double kEps = 1e-5;

  template <class V>
  RNN_EXT_HD static V forward(V x, V mean, V rstd) {
    return (x - mean) * rstd;
  }

  /// The gradient of x from dy, the row's means of dy and of dy * y.
  template <class V>
  RNN_EXT_HD static V backward(V dy, V y, V rstd, V mean_dy, V mean_dy_y) {
    return rstd * (dy - mean_dy - y * mean_dy_y);
  }

  /// The gradients of y and of the weight from d, that of y * weight + bias and of the bias.
  template <class V>
  RNN_EXT_HD static V y_backward(V d, V weight) {
    return d * weight;
  }
  template <class V>
  RNN_EXT_HD static V weight_backward(V d, V y) {
    return d * y;
  }
};

/// The LSTM with layer normalisation (Ba, Kiros and Hinton 2016, equations 20 to 22):
///   gates = LN(W_ih x) weight_norm_ih + LN(W_hh h_prev) weight_norm_hh + b_ih + b_hh      c, i f g o as in the LSTM
///   h = o tanh(LN(c) weight_norm_c + bias_norm_c)
struct LayerNormLstm : Lstm {
  static constexpr bool kDirectCarry = true;  // by zoneout
  // Saved: LN(W_ih x), LN(W_hh h_prev), c after zoneout, and in one row of values those of the whole row.
  static constexpr int kNormIh = 0, kNormHh = 4, kSavedCell = 8, kStatistics = 9, kSaved = 10;
  static constexpr int kRstdIh = 0, kRstdHh = 1, kMeanC = 2, kRstdC = 3;
  // Gradients: of W_ih x, of W_hh h_prev, of the gates, of LN(c) weight_norm_c + bias_norm_c; and LN(c).
  static constexpr int kGradGate = 8, kGradNorm = 12, kNormC = 13, kGradGates = 14;
  RNN_EXT_HD static constexpr int hh_slot(int gate) { return 4 + gate; }

  template <class V>
  RNN_EXT_HD static V gate(V norm_ih, V weight_norm_ih, V norm_hh, V weight_norm_hh, V bias) {
    return norm_ih * weight_norm_ih + norm_hh * weight_norm_hh + bias;
  }

  /// tanh of the normalised cell state, which the output gate lets out.
  template <class M, class V>
  RNN_EXT_HD static V tanh_c(V norm_c, V weight_norm_c, V bias_norm_c) {
    return M::tanh(norm_c * weight_norm_c + bias_norm_c);
  }
  template <class M, class V>
  RNN_EXT_HD static V output(V o, V norm_c, V weight_norm_c, V bias_norm_c) {
    return o * tanh_c<M>(norm_c, weight_norm_c, bias_norm_c);
  }
};

/// What a cell is a variant of, or itself.
template <class Cell>
struct PlainOf {
  using type = Cell;
};
template <class Cell>
struct PlainOf<Masked<Cell>> {
  using type = Cell;
};
template <>
struct PlainOf<LayerNormLstm> {
  using type = Lstm;
};
template <class Cell>
using Plain = typename PlainOf<Cell>::type;

template <class Cell, class P = Plain<Cell>>
constexpr bool kIsVariant = true;
template <class Cell>
constexpr bool kIsVariant<Cell, Cell> = false;

template <class Cell>
constexpr bool kIsNormed = false;
template <>
inline constexpr bool kIsNormed<LayerNormLstm> = true;

}  // namespace rnn_ext::cells
