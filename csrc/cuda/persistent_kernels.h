// `persistent`: all timesteps in one launch, for hidden sizes whose recurrent weight fits one block's shared memory.
//
// A block owns kRows = 4 batch rows of one direction; blockIdx.y is the direction, so both run side by side. The weight
// is read from global memory once and stays in shared memory in its storage type; state lives in float32 registers; h
// (backward: the gate gradients) goes from thread to thread through a double buffer in shared memory: one barrier per
// timestep.
//
// A warp owns 8 hidden units; lane = slice * 8 + unit. The 4 slices split the reduction (k = 4 i + slice) for all 4
// rows, then a transposing butterfly leaves the lane of slice r with the sums of row r: that lane runs the cell for
// (row r, unit).
//
// Cost of one timestep and block (s = bytes of T, G gates, Q gate gradients, H hidden):
//   forward   8 G H^2 operations; shared memory: s G H^2 bytes of weight, read once for the 4 rows, + 16 H bytes of h
//   per warp
//             global: 4 H (s (1 + G) + (S s + 4) when saving)
//   backward  8 G H^2 operations; shared memory: s G H^2 bytes of weight + 16 G H bytes of gate gradients per warp
//             global: 4 H (s (Q + S + 3) + 8)
// Reading the weight from shared memory bounds a step: s G H^2 / 128 bytes per clock (LSTM, float32, H = 64: 512
// clocks). Nothing of this has a measured time.
#pragma once

#include "cuda/layer.h"
#include "cuda/persistent_entries.h"

namespace rnn_ext::cuda {

inline constexpr int kRows = 4;  // batch rows of a block, and slices of the reduction
inline constexpr int kWarpUnits = 32 / kRows;
inline constexpr int kMaxUnits = kMaxPersistentHidden;
inline constexpr int kMaxThreads = kMaxUnits * kRows;
inline constexpr unsigned kWholeWarp = 0xffffffffu;

template <class Pointers>
struct PersistentLayer {
  int64_t length, batch, hidden;
  int64_t time_stride, batch_stride;
  const int64_t* row_offsets;  // packed: the first row of each timestep
  const int64_t* lengths;
  const uint8_t* resets;
  int64_t resets_time_stride, resets_batch_stride;
  struct Direction {
    bool reverse;
    Pointers pointers;
  } direction[2];
};

// Shared-memory shapes. Columns of the weight are padded so that the 4 slices of a warp read 4 different quarters of
// the banks.
template <class T>
RNN_EXT_HD constexpr int64_t padded_columns(int64_t columns) {
  constexpr int64_t kBankRow = 128 / static_cast<int64_t>(sizeof(T));
  return (columns + kBankRow - 1 - kWarpUnits) / kBankRow * kBankRow + kWarpUnits;
}
RNN_EXT_HD constexpr int64_t padded_units(int64_t hidden) {
  return (hidden + kWarpUnits - 1) / kWarpUnits * kWarpUnits;
}

// Forward: weight [k][gate][unit] of T, then h [2][k][row] of A. k runs to a multiple of 8, units too; the padding is
// zero.
template <class Cell, class T>
RNN_EXT_HD constexpr int64_t forward_shared_bytes(int64_t hidden) {
  const int64_t units = padded_units(hidden);
  return units * padded_columns<T>(Cell::kGates * units) * static_cast<int64_t>(sizeof(T)) +
         2 * units * kRows * static_cast<int64_t>(sizeof(AccumulatorOf<T>));
}
// Backward: weight [gate][k][unit] of T, then gate gradients of the hidden side [2][gate][k][row] of A.
template <class Cell, class T>
RNN_EXT_HD constexpr int64_t backward_shared_bytes(int64_t hidden) {
  const int64_t units = padded_units(hidden);
  return Cell::kGates * units * padded_columns<T>(units) * static_cast<int64_t>(sizeof(T)) +
         2 * Cell::kGates * units * kRows * static_cast<int64_t>(sizeof(AccumulatorOf<T>));
}

// One thread's batch row: which timesteps it has, and where their rows lie.
struct BatchRow {
  int64_t n = 0, length = 0;  // timesteps it has; 0 past the batch

  template <class Layer>
  RNN_EXT_DEVICE BatchRow(const Layer& layer, int64_t row) : n(row) {
    if (n >= layer.batch) return;
    const int64_t given = layer.lengths ? layer.lengths[n] : layer.length;
    length = given < layer.length ? given : layer.length;
  }
  RNN_EXT_DEVICE bool exists(int64_t time) const { return time >= 0 && time < length; }

  template <class Layer>
  RNN_EXT_DEVICE int64_t row(const Layer& layer, int64_t time) const {
    return (layer.row_offsets ? layer.row_offsets[time] : time * layer.time_stride) + n * layer.batch_stride;
  }
  // Whether a sequence begins at the later of two neighbouring timesteps (see RowRules::cut).
  template <class Layer>
  RNN_EXT_DEVICE bool begins(const Layer& layer, int64_t later) const {
    return layer.resets && exists(later) &&
           layer.resets[later * layer.resets_time_stride + n * layer.resets_batch_stride] != 0;
  }
};

// What backward needs at a timestep of one unit: what forward left behind, and the gradients that flow in. Loaded
// before the product is there.
template <class Cell, class T>
struct BackwardUnit {
  using A = AccumulatorOf<T>;
  A saved[kSavedSlots<Cell>] = {}, output = 0, h_prev = 0, c_prev = 0, doutput = 0, dcell = 0;

  // Of a timestep that the row has.
  template <class Layer>
  RNN_EXT_DEVICE void load(const BackwardPointers<T>& d, const Layer& layer, bool reverse, const BatchRow& row,
                           int64_t time, int64_t at, int64_t unit) {
    const int64_t hidden = layer.hidden, before = reverse ? time + 1 : time - 1, state = row.n * hidden + unit;
    const bool cut = row.begins(layer, reverse ? time + 1 : time);
    output = widen(d.output[at * d.output_stride + unit]);
    if (d.doutput) doutput = widen(d.doutput[at * d.doutput_stride + unit]);
#pragma unroll
    for (int s = 0; s < kSavedPlanes<Cell>; ++s)
      saved[s] = widen(d.saved[(at * kSavedPlanes<Cell> + s) * hidden + unit]);
    if constexpr (Cell::kDirectCarry) {
      if (!cut) {
        h_prev = row.exists(before) ? widen(d.output[row.row(layer, before) * d.output_stride + unit])
                                    : value_or_zero(d.h_0, state);
      }
    }
    if constexpr (Cell::kHasCell) {
      if (d.dcells) dcell = widen(d.dcells[at * d.dcells_stride + unit]);
      saved[Cell::kSavedCell] = d.cells[at * hidden + unit];
      if (!cut)
        c_prev = row.exists(before) ? d.cells[row.row(layer, before) * hidden + unit] : value_or_zero(d.c_0, state);
    }
  }
  // dh, dc: what comes from the timesteps after. Returns the part of dh that does not pass the weight.
  RNN_EXT_DEVICE A run(A dh, A& dc, A (&dgates)[Cell::kGradGates]) const {
    dh += doutput;
    dc += dcell;
    return Cell::template backward<ExactMath<A>>(saved, output, h_prev, c_prev, dh, dc, dgates);
  }
};

// Every lane has a part of the sums of all 4 rows; afterwards the lane of slice r has the whole sums of row r.
template <int kColumns, class A>
RNN_EXT_DEVICE void reduce_to_own_row(const A (&part)[kRows][kColumns], int slice, A (&own)[kColumns]) {
  A half[2][kColumns];
#pragma unroll
  for (int g = 0; g < kColumns; ++g) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const A keep = slice & 2 ? part[2 + i][g] : part[i][g], give = slice & 2 ? part[i][g] : part[2 + i][g];
      half[i][g] = keep + __shfl_xor_sync(kWholeWarp, give, 2 * kWarpUnits);
    }
    const A keep = slice & 1 ? half[1][g] : half[0][g], give = slice & 1 ? half[0][g] : half[1][g];
    own[g] = keep + __shfl_xor_sync(kWholeWarp, give, kWarpUnits);
  }
}

// grid: (ceil(N / kRows), directions); block: 4 threads per padded unit
template <class Cell, class T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    persistent_forward_kernel(const __grid_constant__ PersistentLayer<ForwardPointers<T>> layer) {
  using A = AccumulatorOf<T>;
  constexpr int kGates = Cell::kGates;
  RNN_EXT_DYNAMIC_SHARED(memory);

  const ForwardPointers<T>& d = layer.direction[blockIdx.y].pointers;
  const bool reverse = layer.direction[blockIdx.y].reverse;
  const int64_t hidden = layer.hidden;
  const int units = static_cast<int>(padded_units(hidden)), pitch = static_cast<int>(padded_columns<T>(kGates * units));
  T* weight = reinterpret_cast<T*>(memory);
  A* h_buffers = reinterpret_cast<A*>(weight + units * pitch);

  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane = thread % 32, slice = lane / kWarpUnits, unit = thread / 32 * kWarpUnits + lane % kWarpUnits;
  for (int i = thread; i < kGates * units * units; i += threads) {
    const int k = i % units, u = i / units % units, gate = i / units / units;
    const bool inside = k < hidden && u < hidden;
    weight[k * pitch + gate * units + u] = inside ? d.weight_hh[(gate * hidden + u) * hidden + k] : narrow<T>(A(0));
  }

  const BatchRow row(layer, static_cast<int64_t>(blockIdx.x) * kRows + slice);
  const bool mine = unit < hidden && row.n < layer.batch;
  const int64_t state = row.n * hidden + unit;
  A h = mine ? value_or_zero(d.h_0, state) : A(0), c = 0;
  if constexpr (Cell::kHasCell) c = mine ? value_or_zero(d.c_0, state) : A(0);
  A bias[kGates];
#pragma unroll
  for (int g = 0; g < kGates; ++g) bias[g] = mine ? value_or_zero(d.bias_hh, g * hidden + unit) : A(0);
  h_buffers[unit * kRows + slice] = h;

  // The input gates of a timestep travel while the one before is computed.
  A igates[kGates] = {}, igates_next[kGates] = {};
  const auto fetch = [&](int64_t step) {
    const int64_t time = reverse ? layer.length - 1 - step : step;
    if (!mine || !row.exists(time)) return;
    const T* source = d.igates + row.row(layer, time) * d.igates_stride + unit;
#pragma unroll
    for (int g = 0; g < kGates; ++g) igates_next[g] = widen(source[g * hidden]);
  };
  fetch(0);

  for (int64_t step = 0; step < layer.length; ++step) {
    const int64_t time = reverse ? layer.length - 1 - step : step;
    const A* h_now = h_buffers + (step & 1) * units * kRows;
    A* h_new = h_buffers + ((step + 1) & 1) * units * kRows;
#pragma unroll
    for (int g = 0; g < kGates; ++g) igates[g] = igates_next[g];
    fetch(step + 1);
    __syncthreads();  // h of the step before is whole (and the weight, at first); the other buffer has been read

    A part[kRows][kGates] = {};
    for (int k = slice; k < units; k += kRows) {
      A h_of_row[kRows];
      load4(h_now + k * kRows, h_of_row);
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        const A w = widen(weight[k * pitch + g * units + unit]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) part[r][g] += h_of_row[r] * w;
      }
    }
    A gates[kGates];
    reduce_to_own_row(part, slice, gates);

    if (mine && row.exists(time)) {
      A saved[kSavedSlots<Cell>];
      run_cell<Cell>(gates, bias, igates, row.begins(layer, reverse ? time + 1 : time), h, c, saved);
      store_forward<Cell>(d, row.row(layer, time), hidden, unit, h, c, saved);
    } else if (mine && !layer.row_offsets) {
      d.output[row.row(layer, time) * d.output_stride + unit] = narrow<T>(A(0));
    }
    h_new[unit * kRows + slice] = h;
  }
  if (!mine) return;
  d.h_n[state] = narrow<T>(h);
  if constexpr (Cell::kHasCell) d.c_n[state] = narrow<T>(c);
}

// grid and block as forward. Runs forward's timesteps from the last to the first; one more round gives dh_0.
template <class Cell, class T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    persistent_backward_kernel(const __grid_constant__ PersistentLayer<BackwardPointers<T>> layer) {
  using A = AccumulatorOf<T>;
  constexpr int kGates = Cell::kGates, kGradGates = Cell::kGradGates;
  RNN_EXT_DYNAMIC_SHARED(memory);

  const BackwardPointers<T>& d = layer.direction[blockIdx.y].pointers;
  const bool reverse = layer.direction[blockIdx.y].reverse;
  const int64_t hidden = layer.hidden;
  const int units = static_cast<int>(padded_units(hidden)), pitch = static_cast<int>(padded_columns<T>(units));
  T* weight = reinterpret_cast<T*>(memory);
  A* dgates_buffers = reinterpret_cast<A*>(weight + kGates * units * pitch);

  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane = thread % 32, slice = lane / kWarpUnits, unit = thread / 32 * kWarpUnits + lane % kWarpUnits;
  for (int i = thread; i < kGates * units * units; i += threads) {
    const int u = i % units, k = i / units % units, gate = i / units / units;
    const bool inside = k < hidden && u < hidden;
    weight[(gate * units + k) * pitch + u] = inside ? d.weight_hh[(gate * hidden + k) * hidden + u] : narrow<T>(A(0));
  }

  const BatchRow row(layer, static_cast<int64_t>(blockIdx.x) * kRows + slice);
  const bool mine = unit < hidden && row.n < layer.batch;
  const int64_t state = row.n * hidden + unit;
  A direct = mine ? value_or_zero(d.dh_n, state) : A(0), dc = 0;  // dh without what passes the weight; dc
  if constexpr (Cell::kHasCell) dc = mine ? value_or_zero(d.dc_n, state) : A(0);
#pragma unroll
  for (int g = 0; g < kGates; ++g) dgates_buffers[(g * units + unit) * kRows + slice] = A(0);

  for (int64_t step = 0; step <= layer.length; ++step) {
    const int64_t time = reverse ? step : layer.length - 1 - step;  // -1 or L in the last round
    const int64_t after = reverse ? time - 1 : time + 1;
    const A* dgates_now = dgates_buffers + (step & 1) * kGates * units * kRows;
    A* dgates_new = dgates_buffers + ((step + 1) & 1) * kGates * units * kRows;
    const bool active = mine && row.exists(time);
    const int64_t at = active ? row.row(layer, time) : 0;

    BackwardUnit<Cell, T> own;
    if (active) own.load(d, layer, reverse, row, time, at, unit);  // travels while the product is computed
    __syncthreads();  // gate gradients of the round before are whole (and the weight, at first); the other buffer has
                      // been read

    A part[kRows][1] = {}, product[1];
    for (int k = slice; k < kGates * units; k += kRows) {
      const A w = widen(weight[k * pitch + unit]);
      A dgate_of_row[kRows];
      load4(dgates_now + k * kRows, dgate_of_row);
#pragma unroll
      for (int r = 0; r < kRows; ++r) part[r][0] += dgate_of_row[r] * w;
    }
    reduce_to_own_row(part, slice, product);

    // The product of a row that has no timestep after this one is zero: its gate gradients were.
    const bool cut = row.exists(after) && row.begins(layer, reverse ? time : after);
    A dh = cut ? A(0) : product[0] + direct;
    if (cut) dc = A(0);
    A dgates[kGradGates] = {};
    direct = active ? own.run(dh, dc, dgates) : dh;  // where the row has no timestep its state stood still
    const bool inside = time >= 0 && time < layer.length;
    if (active || (mine && inside && !layer.row_offsets))
      store_dgates<Cell>(d, row.row(layer, time), hidden, unit, dgates);
#pragma unroll
    for (int g = 0; g < kGates; ++g) dgates_new[(g * units + unit) * kRows + slice] = dgates[Cell::hh_slot(g)];
  }
  if (!mine) return;
  d.dh_0[state] = narrow<T>(direct);
  if constexpr (Cell::kHasCell) d.dc_0[state] = narrow<T>(dc);
}

}  // namespace rnn_ext::cuda
