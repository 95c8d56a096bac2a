// What `step` and `persistent` share: a direction's pointers in their storage type (shapes: launch.h), and small
// helpers.
#pragma once

#include "cells/cells.h"
#include "cuda/device_ops.h"
#include "cuda/launch.h"

namespace rnn_ext::cuda {

template <class T>
struct ForwardPointers {
  const T* igates;
  int64_t igates_stride;
  const T* weight_hh;
  const T* bias_hh;
  const T* hgates;
  const T* h_0;
  const T* c_0;
  T* output;
  int64_t output_stride;
  T* h_n;
  T* c_n;
  T* saved;
  AccumulatorOf<T>* cells;
  AccumulatorOf<T>* cell_state;
};

template <class T>
struct BackwardPointers {
  const T* weight_hh;
  const T* dh_recurrent;
  const T* h_0;
  const T* c_0;
  const T* output;
  int64_t output_stride;
  const T* saved;
  const AccumulatorOf<T>* cells;
  const T* doutput;
  int64_t doutput_stride;
  const T* dcells;
  int64_t dcells_stride;
  const T* dh_n;
  const T* dc_n;
  T* dgates;
  int64_t dgates_stride;
  AccumulatorOf<T>* dh_carry;
  AccumulatorOf<T>* dc_carry;
  T* dh_0;
  T* dc_0;
};

template <class T>
ForwardPointers<T> typed(const RnnExtForwardDirection& from) {
  using A = AccumulatorOf<T>;
  ForwardPointers<T> to{};
  to.igates = static_cast<const T*>(from.igates);
  to.igates_stride = from.igates_stride;
  to.weight_hh = static_cast<const T*>(from.weight_hh);
  to.bias_hh = static_cast<const T*>(from.bias_hh);
  to.hgates = static_cast<const T*>(from.hgates);
  to.h_0 = static_cast<const T*>(from.h_0);
  to.c_0 = static_cast<const T*>(from.c_0);
  to.output = static_cast<T*>(from.output);
  to.output_stride = from.output_stride;
  to.h_n = static_cast<T*>(from.h_n);
  to.c_n = static_cast<T*>(from.c_n);
  to.saved = static_cast<T*>(from.saved);
  to.cells = static_cast<A*>(from.cells);
  to.cell_state = static_cast<A*>(from.cell_state);
  return to;
}

template <class T>
BackwardPointers<T> typed(const RnnExtBackwardDirection& from) {
  using A = AccumulatorOf<T>;
  BackwardPointers<T> to{};
  to.weight_hh = static_cast<const T*>(from.weight_hh);
  to.dh_recurrent = static_cast<const T*>(from.dh_recurrent);
  to.h_0 = static_cast<const T*>(from.h_0);
  to.c_0 = static_cast<const T*>(from.c_0);
  to.output = static_cast<const T*>(from.output);
  to.output_stride = from.output_stride;
  to.saved = static_cast<const T*>(from.saved);
  to.cells = static_cast<const A*>(from.cells);
  to.doutput = static_cast<const T*>(from.doutput);
  to.doutput_stride = from.doutput_stride;
  to.dcells = static_cast<const T*>(from.dcells);
  to.dcells_stride = from.dcells_stride;
  to.dh_n = static_cast<const T*>(from.dh_n);
  to.dc_n = static_cast<const T*>(from.dc_n);
  to.dgates = static_cast<T*>(from.dgates);
  to.dgates_stride = from.dgates_stride;
  to.dh_carry = static_cast<A*>(from.dh_carry);
  to.dc_carry = static_cast<A*>(from.dc_carry);
  to.dh_0 = static_cast<T*>(from.dh_0);
  to.dc_0 = static_cast<T*>(from.dc_0);
  return to;
}

// Saved values that have the storage type: those before the cell state.
template <class Cell>
inline constexpr int kSavedPlanes = cells::saved_planes<Cell>();

template <class T>
RNN_EXT_DEVICE AccumulatorOf<T> value_or_zero(const T* array, int64_t index) {
  return array ? widen(array[index]) : AccumulatorOf<T>(0);
}

}  // namespace rnn_ext::cuda
