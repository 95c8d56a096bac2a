// `step`: one launch per timestep, any H, N and storage type. The general path.
//
// forward   tile of h_prev W_hh^T + gates + state update in one kernel
// backward  tile of dgates(next) W_hh + gate gradients in one kernel; dW, dX, db are GEMMs over all rows, done by the
// caller Both have a pointwise form for a product that the caller has computed with a library GEMM (large N and H,
// projections).
//
// Cost of one timestep (s = bytes of T, a = bytes of A, per direction):
//   forward   2 G H^2 N operations; bytes: s (G H^2 ceil(N / tile rows) + N H (1 + G) + N H) + cell state 2 a N H
//             (+ (S s + a) N H when saving)
//   backward  2 G H^2 N operations; bytes: s (G H^2 ceil(N / tile rows) + N H (2 Q + S + 3)) + a N H (3 or less)
// The weight is read from L2 by every row tile: at small N the step is bound by that read, at large N by the FMAs, and
// there the caller's GEMM is faster. Nothing of this has a measured time.
#pragma once

#include "cuda/layer.h"
#include "cuda/sequence.h"

namespace rnn_ext::cuda {

// ---- arguments of one launch ----------------------------------------------------------------------------------------

template <class A>
struct MaskPointers {
  const A* hidden;
  const A* zoneout_h;
  int64_t zoneout_h_stride;
  const A* zoneout_c;
  int64_t zoneout_c_stride;
};

template <class A>
MaskPointers<A> typed(const RnnExtMasks& from) {
  return {static_cast<const A*>(from.hidden), static_cast<const A*>(from.zoneout_h), from.zoneout_h_stride,
          static_cast<const A*>(from.zoneout_c), from.zoneout_c_stride};
}

template <class T>
struct ForwardStepDirection : ForwardPointers<T> {
  Moment before, now, after;  // in the order of computation
  MaskPointers<AccumulatorOf<T>> masks;
  T* h_masked;
};

template <class T>
struct ForwardStep {
  RowRules rules;
  int64_t hidden;
  ForwardStepDirection<T> direction[2];
};

template <class T>
struct BackwardStepDirection : BackwardPointers<T> {
  Moment before, now, after;  // in forward's order of computation: gradients come from `after`
  MaskPointers<AccumulatorOf<T>> masks;
};

template <class T>
struct BackwardStep {
  RowRules rules;
  int64_t hidden;
  BackwardStepDirection<T> direction[2];
};

// ---- one row and unit: the cell and everything around it ---------------------------------------------

template <class Cell>
struct BaseCell {
  using type = Cell;
};
template <class Cell>
struct BaseCell<cells::Masked<Cell>> {
  using type = Cell;
};
// The cell without what is done around it.
template <class Cell>
using BaseOf = typename BaseCell<Cell>::type;

// h_prev or c_prev as the cell sees it: from the row before, from the initial state, or zero after a reset.
template <class Value, class T>
RNN_EXT_DEVICE AccumulatorOf<T> previous_state(bool cut, bool has_before, const Value* before, const T* initial,
                                               int64_t initial_index) {
  if (cut) return 0;
  return has_before ? widen(*before) : value_or_zero(initial, initial_index);
}

// A row that does not exist: its output is zero, and its final state the initial one where it never does.
template <class Cell, class T>
RNN_EXT_DEVICE void leave_absent_unit(const ForwardStep<T>& step, const ForwardStepDirection<T>& d, int64_t n,
                                      int64_t unit) {
  using A = AccumulatorOf<T>;
  const int64_t row = d.now.row(n, step.rules.batch_stride), state = n * step.hidden + unit;
  d.output[row * d.output_stride + unit] = narrow<T>(A(0));
  if (d.before.rows == 0 && step.rules.never_exists(n)) {
    d.h_n[state] = narrow<T>(value_or_zero(d.h_0, state));
    if constexpr (Cell::kHasCell) d.c_n[state] = narrow<T>(value_or_zero(d.c_0, state));
  }
}

template <class T>
RNN_EXT_DEVICE AccumulatorOf<T> previous_h(const ForwardStep<T>& step, const ForwardStepDirection<T>& d, int64_t n,
                                           int64_t unit) {
  const int64_t row_before = d.before.row(n, step.rules.batch_stride), state = n * step.hidden + unit;
  const bool cut = step.rules.cut(d.before, d.now, n), has_before = step.rules.exists(d.before, n);
  if (d.h_state) return previous_state(cut, has_before, d.h_state + state, d.h_0, state);
  return previous_state(cut, has_before, d.output + row_before * d.output_stride + unit, d.h_0, state);
}
template <class T>
RNN_EXT_DEVICE AccumulatorOf<T> previous_c(const ForwardStep<T>& step, const ForwardStepDirection<T>& d, int64_t n,
                                           int64_t unit) {
  const int64_t row_before = d.before.row(n, step.rules.batch_stride), state = n * step.hidden + unit;
  const AccumulatorOf<T>* c_before = d.cells ? d.cells + row_before * step.hidden + unit : d.cell_state + state;
  return previous_state(step.rules.cut(d.before, d.now, n), step.rules.exists(d.before, n), c_before, d.c_0, state);
}

// The cell's h and c, through zoneout in a variant, to all places where they go. kKeepsState: h_n is the running state.
template <class Cell, bool kKeepsState, class T>
RNN_EXT_DEVICE void leave_unit(const ForwardStep<T>& step, const ForwardStepDirection<T>& d, int64_t n, int64_t unit,
                               AccumulatorOf<T> h, AccumulatorOf<T> c) {
  const int64_t hidden = step.hidden, row = d.now.row(n, step.rules.batch_stride), state = n * hidden + unit;
  if constexpr (cells::kIsVariant<Cell>) {
    const auto& m = d.masks;
    if (m.zoneout_h)
      h = cells::Zoneout::forward(m.zoneout_h[row * m.zoneout_h_stride + unit], previous_h(step, d, n, unit), h);
    if constexpr (Cell::kHasCell) {
      if (m.zoneout_c)
        c = cells::Zoneout::forward(m.zoneout_c[row * m.zoneout_c_stride + unit], previous_c(step, d, n, unit), c);
    }
    if (d.h_masked) d.h_masked[state] = narrow<T>(h * m.hidden[state]);
  }
  d.output[row * d.output_stride + unit] = narrow<T>(h);
  if (d.h_state) d.h_state[state] = h;
  if constexpr (Cell::kHasCell) (d.cells ? d.cells[row * hidden + unit] : d.cell_state[state]) = c;
  const bool last = !step.rules.exists(d.after, n);
  if (kKeepsState || last) d.h_n[state] = narrow<T>(h);
  if (last) {
    if constexpr (Cell::kHasCell) d.c_n[state] = narrow<T>(c);
  }
}

// product: W_hh h_prev of the G gates of this unit, zero where h_prev is.
template <class Cell, bool kKeepsState, class T>
RNN_EXT_DEVICE void forward_unit(const ForwardStep<T>& step, const ForwardStepDirection<T>& d, int64_t n, int64_t unit,
                                 const AccumulatorOf<T>* product) {
  using A = AccumulatorOf<T>;
  constexpr int kGates = Cell::kGates, kSplit = Cell::kSplit;
  const int64_t hidden = step.hidden, row = d.now.row(n, step.rules.batch_stride);
  if (!step.rules.exists(d.now, n)) {
    leave_absent_unit<Cell>(step, d, n, unit);
    return;
  }
  A h_prev = 0, c = 0;
  if constexpr (BaseOf<Cell>::kDirectCarry) h_prev = previous_h(step, d, n, unit);
  if constexpr (Cell::kHasCell) c = previous_c(step, d, n, unit);
  A gates[kGates], split[kSplit > 0 ? kSplit : 1];
  const T* igates = d.igates + row * d.igates_stride + unit;
#pragma unroll
  for (int g = 0; g < kGates; ++g) gates[g] = product[g] + value_or_zero(d.bias_hh, g * hidden + unit);
#pragma unroll
  for (int g = 0; g < kGates - kSplit; ++g) gates[g] += widen(igates[g * hidden]);
#pragma unroll
  for (int j = 0; j < kSplit; ++j) split[j] = widen(igates[(kGates - kSplit + j) * hidden]);
  A saved[Cell::kSaved > 0 ? Cell::kSaved : 1];
  const A h = Cell::template forward<ExactMath<A>>(gates, split, h_prev, c, saved);
  if constexpr (cells::kIsVariant<Cell> && BaseOf<Cell>::kSaved == 0) saved[0] = h;
  if (d.saved) {
#pragma unroll
    for (int s = 0; s < kSavedPlanes<Cell>; ++s)
      d.saved[(row * kSavedPlanes<Cell> + s) * hidden + unit] = narrow<T>(saved[s]);
  }
  leave_unit<Cell, kKeepsState>(step, d, n, unit, h, c);
}

// dh, dc: whole gradients of the state between now and after. product: what the dgates of the row after give back
// through W_hh. Returns whether the row exists; where it does not, its gradients are written.
template <class Cell, class T>
RNN_EXT_DEVICE bool gradients_arrive(const BackwardStep<T>& step, const BackwardStepDirection<T>& d, int64_t n,
                                     int64_t unit, AccumulatorOf<T> product, AccumulatorOf<T>& dh,
                                     AccumulatorOf<T>& dc) {
  using A = AccumulatorOf<T>;
  const int64_t hidden = step.hidden, row = d.now.row(n, step.rules.batch_stride), state = n * hidden + unit;
  const bool has_after = step.rules.exists(d.after, n);
  dc = 0;
  if (has_after) {
    const bool cut = step.rules.cut(d.now, d.after, n);
    if constexpr (cells::kIsVariant<Cell>) {
      if (d.masks.hidden) product *= d.masks.hidden[state];
    }
    dh = cut ? A(0) : product;
    if constexpr (Cell::kDirectCarry) dh += cut ? A(0) : d.dh_carry[state];
    if constexpr (Cell::kHasCell) dc = cut ? A(0) : d.dc_carry[state];
  } else {
    dh = value_or_zero(d.dh_n, state);
    if constexpr (Cell::kHasCell) dc = value_or_zero(d.dc_n, state);
  }
  if (step.rules.exists(d.now, n)) return true;
  // before the row's first timestep, after its last, or the row has none
  if (n < d.now.rows) {
#pragma unroll
    for (int q = 0; q < Cell::kGradGates; ++q) d.dgates[row * d.dgates_stride + q * hidden + unit] = narrow<T>(A(0));
  }
  if (has_after || (d.now.rows == 0 && step.rules.never_exists(n))) {
    d.dh_0[state] = narrow<T>(dh);
    if constexpr (Cell::kHasCell) d.dc_0[state] = narrow<T>(dc);
  }
  return false;
}

// Adds what comes from outside to the gradient of h or c; a variant then turns it into that of the cell's h or c and
// returns the gradient that goes to the state before by zoneout.
template <class Cell, class T>
RNN_EXT_DEVICE AccumulatorOf<T> add_doutput(const BackwardStepDirection<T>& d, int64_t row, int64_t unit,
                                            AccumulatorOf<T>& dh) {
  if (d.doutput) dh += widen(d.doutput[row * d.doutput_stride + unit]);
  if constexpr (cells::kIsVariant<Cell>) {
    const auto& m = d.masks;
    if (m.zoneout_h) return cells::Zoneout::backward(m.zoneout_h[row * m.zoneout_h_stride + unit], dh);
  }
  return 0;
}
template <class Cell, class T>
RNN_EXT_DEVICE AccumulatorOf<T> add_dcells(const BackwardStepDirection<T>& d, int64_t row, int64_t unit,
                                           AccumulatorOf<T>& dc) {
  if (d.dcells) dc += widen(d.dcells[row * d.dcells_stride + unit]);
  if constexpr (cells::kIsVariant<Cell>) {
    const auto& m = d.masks;
    if (m.zoneout_c) return cells::Zoneout::backward(m.zoneout_c[row * m.zoneout_c_stride + unit], dc);
  }
  return 0;
}

template <class Cell, class T>
RNN_EXT_DEVICE void backward_unit(const BackwardStep<T>& step, const BackwardStepDirection<T>& d, int64_t n,
                                  int64_t unit, AccumulatorOf<T> product) {
  using A = AccumulatorOf<T>;
  constexpr int kGradGates = Cell::kGradGates;
  const int64_t hidden = step.hidden, row = d.now.row(n, step.rules.batch_stride), state = n * hidden + unit;
  A dh, dc;
  if (!gradients_arrive<Cell>(step, d, n, unit, product, dh, dc)) return;
  const bool has_before = step.rules.exists(d.before, n);
  const bool cut = step.rules.cut(d.before, d.now, n);
  const int64_t row_before = d.before.row(n, step.rules.batch_stride);

  const A h_before = add_doutput<Cell>(d, row, unit, dh);
  A h_prev = 0, c_prev = 0, c_before = 0;
  if constexpr (BaseOf<Cell>::kDirectCarry)
    h_prev = previous_state(cut, has_before, d.output + row_before * d.output_stride + unit, d.h_0, state);
  A saved[Cell::kSaved > 0 ? Cell::kSaved : 1];
#pragma unroll
  for (int s = 0; s < kSavedPlanes<Cell>; ++s)
    saved[s] = widen(d.saved[(row * kSavedPlanes<Cell> + s) * hidden + unit]);
  if constexpr (Cell::kHasCell) {
    c_before = add_dcells<Cell>(d, row, unit, dc);
    saved[Cell::kSavedCell] = d.cells[row * hidden + unit];
    c_prev = previous_state(cut, has_before, d.cells + row_before * hidden + unit, d.c_0, state);
  }
  A h = widen(d.output[row * d.output_stride + unit]);
  if constexpr (cells::kIsVariant<Cell> && BaseOf<Cell>::kSaved == 0) h = saved[0];
  A dgates[kGradGates];
  A direct = Cell::template backward<ExactMath<A>>(saved, h, h_prev, c_prev, dh, dc, dgates);
  if constexpr (cells::kIsVariant<Cell>) {
    direct += h_before;
    dc += c_before;
  }

#pragma unroll
  for (int q = 0; q < kGradGates; ++q) d.dgates[row * d.dgates_stride + q * hidden + unit] = narrow<T>(dgates[q]);
  if constexpr (Cell::kDirectCarry) d.dh_carry[state] = direct;
  if constexpr (Cell::kHasCell) d.dc_carry[state] = dc;
}

// ---- the tile ---------------------------------------------------------------------------------------------

// A block owns kTileRows batch rows x kTileUnits hidden units; a thread owns kRows rows of one unit, all its gates, so
// the cell needs no exchange. The reduction is cut into chunks, double-buffered in shared memory: the next
// chunk travels in registers while the present one is multiplied, which leaves one barrier per chunk and asks nothing
// of alignment.
inline constexpr int kTileUnits = 16, kTileGroups = 8, kTileThreads = kTileUnits * kTileGroups;
inline constexpr int kChunk = 16;

// Blocks per multiprocessor that registers must allow. Without a number ptxas aims higher and spills a register or two.
inline constexpr int kForwardBlocks = 2, kOtherBlocks = 4;

// acc[i] += sum over k of rows[k][i] * columns[k][...], for one chunk in shared memory.
template <int kRows, int kColumns, int kRowPitch, int kColumnPitch, class A>
RNN_EXT_DEVICE void multiply_chunk(const A* rows, const A* columns, A (&acc)[kRows][kColumns]) {
#pragma unroll 8
  for (int k = 0; k < kChunk; ++k) {
    A row[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) row[i] = rows[k * kRowPitch + i];
#pragma unroll
    for (int g = 0; g < kColumns; ++g) {
      const A column = columns[k * kColumnPitch + g * kTileUnits];
#pragma unroll
      for (int i = 0; i < kRows; ++i) acc[i][g] += row[i] * column;
    }
  }
}

// grid: (row tiles, unit tiles, directions)
template <class Cell, class T, int kRows>
__global__ void __launch_bounds__(kTileThreads, kForwardBlocks)
    step_forward_kernel(const __grid_constant__ ForwardStep<T> step) {
  using A = AccumulatorOf<T>;
  constexpr int kTileRows = kTileGroups * kRows, kGates = Cell::kGates;
  constexpr int kRowPitch = kTileRows + 1,
                kColumnPitch = kGates * kTileUnits + 1;  // odd: transposing stores without conflicts
  constexpr int kRowLoads = kTileRows * kChunk / kTileThreads,
                kColumnLoads = kGates * kTileUnits * kChunk / kTileThreads;
  RNN_EXT_SHARED(const T*, h_rows, kTileRows);  // h_prev of each row of the tile; null: zero
  RNN_EXT_SHARED(A, h_chunks, 2 * kChunk * kRowPitch);
  RNN_EXT_SHARED(A, w_chunks, 2 * kChunk * kColumnPitch);

  const ForwardStepDirection<T>& d = step.direction[blockIdx.z];
  const int64_t hidden = step.hidden;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kTileRows,
                unit0 = static_cast<int64_t>(blockIdx.y) * kTileUnits;
  const int thread = static_cast<int>(threadIdx.x);
  if (row0 >= d.now.rows) return;  // the other direction of a packed batch may have more rows

  if (thread < kTileRows) {
    const int64_t n = row0 + thread;
    const T* source = nullptr;
    if (step.rules.exists(d.now, n) && !step.rules.cut(d.before, d.now, n)) {
      if (step.rules.exists(d.before, n)) {
        source = d.output + d.before.row(n, step.rules.batch_stride) * d.output_stride;
      } else if (d.h_0) {
        source = d.h_0 + n * hidden;
      }
    }
    h_rows[thread] = source;
  }
  __syncthreads();

  A h_next[kRowLoads], w_next[kColumnLoads];
  const auto fetch = [&](int64_t k0) {
#pragma unroll
    for (int i = 0; i < kRowLoads; ++i) {
      const int index = thread + i * kTileThreads;
      const int64_t k = k0 + index % kChunk;
      const T* source = h_rows[index / kChunk];
      const bool there = source && k < hidden;
      h_next[i] = there ? widen(source[k]) : A(0);
      if constexpr (cells::kIsVariant<Cell>) {
        if (there && d.masks.hidden) h_next[i] *= d.masks.hidden[(row0 + index / kChunk) * hidden + k];
      }
    }
#pragma unroll
    for (int i = 0; i < kColumnLoads; ++i) {
      const int index = thread + i * kTileThreads, column = index / kChunk;
      const int64_t k = k0 + index % kChunk, unit = unit0 + column % kTileUnits;
      w_next[i] =
          unit < hidden && k < hidden ? widen(d.weight_hh[(column / kTileUnits * hidden + unit) * hidden + k]) : A(0);
    }
  };
  const auto stage = [&](int buffer) {
#pragma unroll
    for (int i = 0; i < kRowLoads; ++i) {
      const int index = thread + i * kTileThreads;
      h_chunks[(buffer * kChunk + index % kChunk) * kRowPitch + index / kChunk] = h_next[i];
    }
#pragma unroll
    for (int i = 0; i < kColumnLoads; ++i) {
      const int index = thread + i * kTileThreads;
      w_chunks[(buffer * kChunk + index % kChunk) * kColumnPitch + index / kChunk] = w_next[i];
    }
  };

  const int unit_in_tile = thread % kTileUnits, first_row = thread / kTileUnits * kRows;
  A acc[kRows][kGates] = {};
  fetch(0);
  stage(0);
  int buffer = 0;
  for (int64_t k0 = 0; k0 < hidden; k0 += kChunk, buffer ^= 1) {
    const bool more = k0 + kChunk < hidden;
    __syncthreads();  // this chunk is staged, and the other buffer has been read
    if (more) fetch(k0 + kChunk);
    multiply_chunk<kRows, kGates, kRowPitch, kColumnPitch>(h_chunks + buffer * kChunk * kRowPitch + first_row,
                                                           w_chunks + buffer * kChunk * kColumnPitch + unit_in_tile,
                                                           acc);
    if (more) stage(buffer ^ 1);
  }

  const int64_t unit = unit0 + unit_in_tile;
  if (unit >= hidden) return;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t n = row0 + first_row + i;
    if (n < d.now.rows) forward_unit<Cell, false>(step, d, n, unit, acc[i]);
  }
}

// The row and unit of a thread where there is one thread per (row, unit); false beyond their ends.
RNN_EXT_DEVICE bool pointwise_place(int64_t rows, int64_t hidden, int64_t& n, int64_t& unit) {
  n = blockIdx.x;
  unit = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
  return n < rows && unit < hidden;
}

// One thread per (row, unit). grid: (rows, unit blocks, directions)
template <class Cell, class T>
__global__ void __launch_bounds__(kTileThreads, kOtherBlocks)
    pointwise_forward_kernel(const __grid_constant__ ForwardStep<T> step) {
  using A = AccumulatorOf<T>;
  const ForwardStepDirection<T>& d = step.direction[blockIdx.z];
  int64_t n, unit;
  if (!pointwise_place(d.now.rows, step.hidden, n, unit)) return;
  const bool zero = step.rules.cut(d.before, d.now, n);
  A product[Cell::kGates];
#pragma unroll
  for (int g = 0; g < Cell::kGates; ++g)
    product[g] = zero ? A(0) : widen(d.hgates[(n * Cell::kGates + g) * step.hidden + unit]);
  forward_unit<Cell, true>(step, d, n, unit, product);
}

// Rows that a backward launch has to look at: those of `now`, and those whose first timestep was `after`.
template <class T>
RNN_EXT_DEVICE int64_t backward_rows(const BackwardStepDirection<T>& d) {
  return d.now.rows > d.after.rows ? d.now.rows : d.after.rows;
}

// grid: (row tiles, unit tiles, directions)
template <class Cell, class T, int kRows>
__global__ void __launch_bounds__(kTileThreads, kOtherBlocks)
    step_backward_kernel(const __grid_constant__ BackwardStep<T> step) {
  using A = AccumulatorOf<T>;
  constexpr int kTileRows = kTileGroups * kRows;
  constexpr int kRowPitch = kTileRows + 1,
                kColumnPitch = kTileUnits;  // W_hh is read along its rows: nothing to transpose
  constexpr int kRowLoads = kTileRows * kChunk / kTileThreads, kColumnLoads = kTileUnits * kChunk / kTileThreads;
  RNN_EXT_SHARED(const T*, dgates_rows, kTileRows);  // dgates of the row after; null: zero
  RNN_EXT_SHARED(A, dgates_chunks, 2 * kChunk * kRowPitch);
  RNN_EXT_SHARED(A, w_chunks, 2 * kChunk * kColumnPitch);

  const BackwardStepDirection<T>& d = step.direction[blockIdx.z];
  const int64_t hidden = step.hidden, rows = backward_rows(d);
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kTileRows,
                unit0 = static_cast<int64_t>(blockIdx.y) * kTileUnits;
  const int thread = static_cast<int>(threadIdx.x);
  if (row0 >= rows) return;

  if (thread < kTileRows) {
    const int64_t n = row0 + thread;
    const bool flows = step.rules.exists(d.after, n) && !step.rules.cut(d.now, d.after, n);
    dgates_rows[thread] = flows ? d.dgates + d.after.row(n, step.rules.batch_stride) * d.dgates_stride : nullptr;
  }
  __syncthreads();

  // The reduction runs over (gate, k); a chunk lies within one gate. `gate` and `k0` are of the chunk to fetch next.
  int gate = 0;
  int64_t k0 = 0;
  A dgates_next[kRowLoads], w_next[kColumnLoads];
  const auto fetch = [&] {
    const int64_t column0 = Cell::hh_slot(gate) * hidden;
#pragma unroll
    for (int i = 0; i < kRowLoads; ++i) {
      const int index = thread + i * kTileThreads;
      const int64_t k = k0 + index % kChunk;
      const T* source = dgates_rows[index / kChunk];
      dgates_next[i] = source && k < hidden ? widen(source[column0 + k]) : A(0);
    }
#pragma unroll
    for (int i = 0; i < kColumnLoads; ++i) {
      const int index = thread + i * kTileThreads;
      const int64_t k = k0 + index / kTileUnits, unit = unit0 + index % kTileUnits;
      w_next[i] = unit < hidden && k < hidden ? widen(d.weight_hh[(gate * hidden + k) * hidden + unit]) : A(0);
    }
    k0 += kChunk;
    if (k0 >= hidden) {
      k0 = 0;
      ++gate;
    }
  };
  const auto stage = [&](int buffer) {
#pragma unroll
    for (int i = 0; i < kRowLoads; ++i) {
      const int index = thread + i * kTileThreads;
      dgates_chunks[(buffer * kChunk + index % kChunk) * kRowPitch + index / kChunk] = dgates_next[i];
    }
#pragma unroll
    for (int i = 0; i < kColumnLoads; ++i)
      w_chunks[buffer * kChunk * kColumnPitch + thread + i * kTileThreads] = w_next[i];
  };

  const int unit_in_tile = thread % kTileUnits, first_row = thread / kTileUnits * kRows;
  A acc[kRows][1] = {};
  if (d.after.rows > 0) {  // the first launch has nothing to multiply
    fetch();
    stage(0);
    int buffer = 0;
    for (bool more = true; more; buffer ^= 1) {
      more = gate < Cell::kGates;
      __syncthreads();  // this chunk is staged, and the other buffer has been read
      if (more) fetch();
      multiply_chunk<kRows, 1, kRowPitch, kColumnPitch>(dgates_chunks + buffer * kChunk * kRowPitch + first_row,
                                                        w_chunks + buffer * kChunk * kColumnPitch + unit_in_tile, acc);
      if (more) stage(buffer ^ 1);
    }
  }

  const int64_t unit = unit0 + unit_in_tile;
  if (unit >= hidden) return;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t n = row0 + first_row + i;
    if (n < rows) backward_unit<Cell>(step, d, n, unit, acc[i][0]);
  }
}

// One thread per (row, unit). grid: (rows, unit blocks, directions)
template <class Cell, class T>
__global__ void __launch_bounds__(kTileThreads)
    pointwise_backward_kernel(const __grid_constant__ BackwardStep<T> step) {
  using A = AccumulatorOf<T>;
  const BackwardStepDirection<T>& d = step.direction[blockIdx.z];
  int64_t n, unit;
  if (!pointwise_place(backward_rows(d), step.hidden, n, unit)) return;
  const bool flows = step.rules.exists(d.after, n);  // a cut is seen to by backward_unit
  backward_unit<Cell>(step, d, n, unit, flows ? widen(d.dh_recurrent[n * step.hidden + unit]) : A(0));
}

}  // namespace rnn_ext::cuda
