// What the kernels share: a direction's pointers in their storage type (shapes: launch.h), and what those that run
// whole sequences do with a unit of a batch row at a timestep.
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
  AccumulatorOf<T>* h_state;
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
  to.h_state = static_cast<A*>(from.h_state);
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
// Of an array of all saved values.
template <class Cell>
inline constexpr int kSavedSlots = Cell::kSaved > 0 ? Cell::kSaved : 1;

template <class T>
RNN_EXT_DEVICE AccumulatorOf<T> value_or_zero(const T* array, int64_t index) {
  return array ? widen(array[index]) : AccumulatorOf<T>(0);
}

// gates: the recurrent product, which counts for nothing where a sequence begins (`cut`). h and c become the
// timestep's.
template <class Cell, class Value, class A>
RNN_EXT_DEVICE void run_cell(A (&gates)[Cell::kGates], const A (&bias)[Cell::kGates],
                             const Value (&igates)[Cell::kGates], bool cut, A& h, A& c, A (&saved)[kSavedSlots<Cell>]) {
  constexpr int kGates = Cell::kGates, kSplit = Cell::kSplit;
  if (cut) h = c = A(0);
  A split[kSplit > 0 ? kSplit : 1];
#pragma unroll
  for (int g = 0; g < kGates; ++g) gates[g] = (cut ? A(0) : gates[g]) + bias[g];
#pragma unroll
  for (int g = 0; g < kGates - kSplit; ++g) gates[g] += widen(igates[g]);
#pragma unroll
  for (int j = 0; j < kSplit; ++j) split[j] = widen(igates[kGates - kSplit + j]);
  h = Cell::template forward<ExactMath<A>>(gates, split, h, c, saved);
}

// at: the row of the timestep, here and below.
template <class Cell, class Size, class T>
RNN_EXT_DEVICE void store_forward(const ForwardPointers<T>& d, int64_t at, Size hidden, int64_t unit,
                                  AccumulatorOf<T> h, AccumulatorOf<T> c,
                                  const AccumulatorOf<T> (&saved)[kSavedSlots<Cell>]) {
  d.output[at * d.output_stride + unit] = narrow<T>(h);
  if constexpr (Cell::kHasCell) {
    if (d.cells) d.cells[at * hidden + unit] = c;
  }
  if (d.saved) {
#pragma unroll
    for (int s = 0; s < kSavedPlanes<Cell>; ++s)
      d.saved[(at * kSavedPlanes<Cell> + s) * hidden + unit] = narrow<T>(saved[s]);
  }
}

template <class Cell, class Size, class T>
RNN_EXT_DEVICE void store_dgates(const BackwardPointers<T>& d, int64_t at, Size hidden, int64_t unit,
                                 const AccumulatorOf<T> (&dgates)[Cell::kGradGates]) {
  T* target = d.dgates + at * d.dgates_stride + unit;
#pragma unroll
  for (int q = 0; q < Cell::kGradGates; ++q) target[q * hidden] = narrow<T>(dgates[q]);
}

}  // namespace rnn_ext::cuda
