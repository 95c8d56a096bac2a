// `tensor`: all timesteps in one launch, the recurrent product on tensor cores, for hidden sizes whose weight fits one
// block's registers. bfloat16 and float16 as they are stored; float32 is rounded to TF32 in the product alone.
//
// A block owns kTensorRows = 8 batch rows of one direction (blockIdx.y). Each step multiplies the weight by a [K, 8]
// operand with mma.sync: the batch is the N of the product. The weight is the stationary operand: it is read from
// global memory once, and stays in registers as fragments. The other operand goes from warp to warp through a double
// buffer in shared memory, [row][k], from which ldmatrix takes it: one barrier per timestep.
//
//   forward   gates [G*H, 8] = W_hh [G*H, H] h^T            M gates, K units
//   backward  dh    [H, 8]   = W_hh^T [H, G*H] dgates^T     M units, K gates
//
// In a product's result a lane holds two rows of M, g = lane / 4 and g + 8, for batch rows 2 t and 2 t + 1, t = lane
// % 4. Backward's M are the units themselves. Forward's tile of 16 * kMmas rows is laid out so that a lane holds all
// gates of its units:
//   slot s = 2 m + half of a lane (m the product, half the upper or lower 8 rows) is gate s % G of its unit s / G.
// The cell is then local to a lane, and its state (backward: dc and the part of dh that does not pass the weight)
// stays in float32 registers.
//
// Cost of one timestep and block (s bytes of T, G gates, Q gate gradients, S saved, H hidden, C = H up to what is
// compiled):
//   16 G C^2 operations, in s G C^2 / 512 products of 8192 / s; the weight takes s G C^2 bytes of registers, which is
//   half of them at most (LSTM, C = 128: 128 of the 255 of a thread)
//   forward   shared memory: 8 s C bytes of h for every warp (of 8 or 16 units)
//             global: 8 H (s (1 + G) + (S s + 4) when saving), in segments of 8 s bytes
//   backward  shared memory: 8 s G C bytes of gate gradients for every warp (of 16 units)
//             global: 8 H (s (Q + S + 3) + 8)
//   (LSTM, H = 128, 16 bits: 256 products for the 4 tensor cores, and 16 or 64 KB of operands from shared memory, of
//   which `persistent` reads 128 KB of weight for half as many rows)
// Nothing of this has a measured time.
#pragma once

#include "cuda/persistent_kernels.h"
#include "cuda/tensor_entries.h"

namespace rnn_ext::cuda {

inline constexpr int kTensorRows = 8;
inline constexpr int kTensorUnits = 16;  // hidden sizes are compiled for multiples of it
inline constexpr int kMmaHalf = 8;       // rows of a product's result that lie between the two of a lane
// Values in 16 bytes, which are a row of what ldmatrix loads; a product takes two of them of K.
template <class T>
inline constexpr int kSegment = 16 / static_cast<int>(sizeof(T));
template <class T>
inline constexpr int kMmaDepth = 2 * kSegment<T>;

// Units of a lane in forward. An odd number of gates needs two; and fewer, larger warps leave more registers for the
// weight.
template <class Cell, int kDepth>
inline constexpr int kLaneUnits = Cell::kGates % 2 == 0 && kDepth < 8 ? 1 : 2;
template <class Cell, int kDepth>
inline constexpr int kMmas = Cell::kGates * kLaneUnits<Cell, kDepth> / 2;
template <class Cell, int kDepth>
inline constexpr int kForwardThreads = 32 * kDepth * kTensorUnits / (kMmaHalf * kLaneUnits<Cell, kDepth>);
template <int kDepth>
inline constexpr int kBackwardThreads = 32 * kDepth;

// A lane's share of a product's result: units first_unit, first_unit + 8, .. and batch rows n, n + 1. Registers are
// what these kernels are short of: counts are 32-bit (the launcher checks them), offsets 64-bit.
struct TensorLane {
  int hidden, batch, steps;
  int first_unit, column;  // column: of batch row n in this block
  int n;
  int length[2];  // timesteps that the two rows have

  template <class Layer>
  RNN_EXT_DEVICE TensorLane(const Layer& layer, int warp_units)
      : hidden(static_cast<int>(layer.hidden)),
        batch(static_cast<int>(layer.batch)),
        steps(static_cast<int>(layer.length)) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    first_unit = thread / 32 * warp_units + lane / 4;
    column = 2 * (lane % 4);
    n = static_cast<int>(blockIdx.x) * kTensorRows + column;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t given = n + e >= batch ? 0 : layer.lengths ? layer.lengths[n + e] : layer.length;
      length[e] = given < 0 ? 0 : given < layer.length ? static_cast<int>(given) : steps;
    }
  }
  RNN_EXT_DEVICE int unit(int j) const { return first_unit + j * kMmaHalf; }
  RNN_EXT_DEVICE bool exists(int e, int time) const { return time >= 0 && time < length[e]; }
  RNN_EXT_DEVICE bool mine(int j, int e) const { return unit(j) < hidden && n + e < batch; }
  RNN_EXT_DEVICE int64_t state(int j, int e) const { return static_cast<int64_t>(n + e) * hidden + unit(j); }
  template <class Layer>
  RNN_EXT_DEVICE int64_t row(const Layer& layer, int e, int time) const {
    return (layer.row_offsets ? layer.row_offsets[time] : time * layer.time_stride) + (n + e) * layer.batch_stride;
  }
  // Whether a sequence begins at the later of two neighbouring timesteps (see RowRules::cut).
  template <class Layer>
  RNN_EXT_DEVICE bool begins(const Layer& layer, int e, int later) const {
    return layer.resets && exists(e, later) &&
           layer.resets[later * layer.resets_time_stride + (n + e) * layer.resets_batch_stride] != 0;
  }
};

// What a product multiplies: 16-bit values as they are stored, float32 rounded to TF32.
template <class T>
RNN_EXT_DEVICE T factor(AccumulatorOf<T> value) {
  if constexpr (sizeof(T) == 2) {
    return narrow<T>(value);
  } else {
    return round_to_tf32(value);
  }
}
template <class T>
RNN_EXT_DEVICE T stored_factor(T value) {
  if constexpr (sizeof(T) == 2) {
    return value;
  } else {
    return round_to_tf32(value);
  }
}
// The factors k, k + 1, .. of 32 bits, from[0], from[stride], ..; zero from k = count on.
template <class T>
RNN_EXT_DEVICE uint32_t factors(const T* from, int stride, int k, int count) {
  const T first = k < count ? from[0] : narrow<T>(0);
  if constexpr (sizeof(T) == 2) {
    return pack2(first, k + 1 < count ? from[stride] : narrow<T>(0));
  } else {
    return bits_of(stored_factor(first));
  }
}

// One step of the weight's way into registers: fragments [kCount][4] of this thread pass through its own place in
// shared memory, [kCount, threads]. Left to itself ptxas keeps all loads in flight at once, each word as two unpacked
// halves, and spills; what has to be stored is packed by then.
template <int kCount>
RNN_EXT_DEVICE void settle(uint32_t (&fragments)[kCount][4], uint4* staging) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    staging[i * threads + thread] = {fragments[i][0], fragments[i][1], fragments[i][2], fragments[i][3]};
  __syncwarp(kWholeWarp);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const uint4 words = staging[i * threads + thread];
    fragments[i][0] = words.x;
    fragments[i][1] = words.y;
    fragments[i][2] = words.z;
    fragments[i][3] = words.w;
  }
}

// kDepth: H in units of 16, rounded up. grid: (ceil(N / 8), directions); block: kForwardThreads
template <class Cell, class T, int kDepth>
__global__ void __launch_bounds__(kForwardThreads<Cell, kDepth>, 1)
    tensor_forward_kernel(const __grid_constant__ PersistentLayer<ForwardPointers<T>> layer) {
  using A = AccumulatorOf<T>;
  constexpr int kGates = Cell::kGates, kUnits = kLaneUnits<Cell, kDepth>;
  constexpr int kColumns = kDepth * kTensorUnits, kProducts = kColumns / kMmaDepth<T>;
  constexpr int kPitch = kColumns + kSegment<T>;  // the 8 rows that ldmatrix takes at once are then in different banks
  RNN_EXT_SHARED(T, h_buffers, 2 * kTensorRows * kPitch);
  RNN_EXT_SHARED(A, bias, kGates * kColumns);
  constexpr int kStaging = kMmas<Cell, kDepth> * kForwardThreads<Cell, kDepth>;
  RNN_EXT_SHARED(uint4, staging, kStaging);

  const ForwardPointers<T>& d = layer.direction[blockIdx.y].pointers;
  const bool reverse = layer.direction[blockIdx.y].reverse;
  const TensorLane at(layer, kMmaHalf * kUnits);
  const int hidden = at.hidden, steps = at.steps, thread = static_cast<int>(threadIdx.x), lane = thread % 32;

  uint32_t weight[kProducts][kMmas<Cell, kDepth>][4];
#pragma unroll
  for (int k = 0; k < kProducts; ++k) {
#pragma unroll
    for (int m = 0; m < kMmas<Cell, kDepth>; ++m) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int slot = 2 * m + (r & 1), unit = at.unit(slot / kGates);
        const int column = k * kMmaDepth<T> + lane % 4 * (kSegment<T> / 4) + kSegment<T> * (r >> 1);
        const T* row = d.weight_hh + (slot % kGates * hidden + unit) * hidden;
        weight[k][m][r] = factors(row + column, 1, column, unit < hidden ? hidden : 0);
      }
    }
    settle(weight[k], staging);
  }
  for (int i = thread; i < kGates * kColumns; i += kForwardThreads<Cell, kDepth>) {
    const int unit = i % kColumns;
    bias[i] = unit < hidden ? value_or_zero(d.bias_hh, i / kColumns * hidden + unit) : A(0);
  }

  T igates[kUnits][2][kGates];
  const auto fetch = [&](int step) {
    const int time = reverse ? steps - 1 - step : step;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (!at.exists(e, time)) continue;
      const T* source = d.igates + at.row(layer, e, time) * d.igates_stride;
#pragma unroll
      for (int j = 0; j < kUnits; ++j) {
        if (!at.mine(j, e)) continue;
#pragma unroll
        for (int g = 0; g < kGates; ++g) igates[j][e][g] = source[g * hidden + at.unit(j)];
      }
    }
  };
  // h in shared memory is rounded; a cell that carries h on directly has it whole besides.
  A h[kUnits][2], c[kUnits][2];
#pragma unroll
  for (int j = 0; j < kUnits; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      h[j][e] = at.mine(j, e) ? value_or_zero(d.h_0, at.state(j, e)) : A(0);
      c[j][e] = 0;
      if constexpr (Cell::kHasCell) c[j][e] = at.mine(j, e) ? value_or_zero(d.c_0, at.state(j, e)) : A(0);
      h_buffers[(at.column + e) * kPitch + at.unit(j)] = factor<T>(h[j][e]);
    }
  }
  fetch(0);

  for (int step = 0; step < steps; ++step) {
    const int time = reverse ? steps - 1 - step : step;
    const T* h_now = h_buffers + (step & 1) * kTensorRows * kPitch;
    T* h_new = h_buffers + (~step & 1) * kTensorRows * kPitch;
    __syncthreads();  // h of the step before is whole (and the bias, at first); the other buffer has been read

    A product[kMmas<Cell, kDepth>][4] = {};
#pragma unroll
    for (int k = 0; k < kProducts; k += 2) {
      uint32_t fragments[4];  // of two products
      load_matrices(fragments, h_now + lane % 8 * kPitch + k * kMmaDepth<T> + lane / 8 * kSegment<T>);
#pragma unroll
      for (int m = 0; m < kMmas<Cell, kDepth>; ++m) {
        multiply_16x8<T>(product[m], weight[k][m], fragments[0], fragments[1]);
        multiply_16x8<T>(product[m], weight[k + 1][m], fragments[2], fragments[3]);
      }
    }

#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const bool cut = at.begins(layer, e, reverse ? time + 1 : time);
#pragma unroll
      for (int j = 0; j < kUnits; ++j) {
        const int unit = at.unit(j), place = (at.column + e) * kPitch + unit;
        T h_factor = h_now[place];
        if (at.mine(j, e) && at.exists(e, time)) {
          A gates[kGates], own_bias[kGates], saved[kSavedSlots<Cell>];
#pragma unroll
          for (int g = 0; g < kGates; ++g) {
            const int slot = j * kGates + g;
            gates[g] = product[slot / 2][slot % 2 * 2 + e];
            own_bias[g] = bias[g * kColumns + unit];
          }
          run_cell<Cell>(gates, own_bias, igates[j][e], cut, h[j][e], c[j][e], saved);
          h_factor = factor<T>(h[j][e]);
          store_forward<Cell>(d, at.row(layer, e, time), hidden, unit, h[j][e], c[j][e], saved);
        } else if (at.mine(j, e) && !layer.row_offsets) {
          d.output[at.row(layer, e, time) * d.output_stride + unit] = narrow<T>(A(0));
        }
        h_new[place] = h_factor;
      }
    }
    fetch(step + 1);  // travels over the barrier and the next product
  }
#pragma unroll
  for (int j = 0; j < kUnits; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (!at.mine(j, e)) continue;
      if constexpr (sizeof(T) == 2) {  // h from shared memory, which spares a register. Its own: no barrier.
        d.h_n[at.state(j, e)] = h_buffers[((steps & 1) * kTensorRows + at.column + e) * kPitch + at.unit(j)];
      } else {
        d.h_n[at.state(j, e)] = h[j][e];
      }
      if constexpr (Cell::kHasCell) d.c_n[at.state(j, e)] = narrow<T>(c[j][e]);
    }
  }
}

// grid as forward; block: a warp for 16 units. Runs forward's timesteps from the last to the first; one more round
// gives dh_0.
template <class Cell, class T, int kDepth>
__global__ void __launch_bounds__(kBackwardThreads<kDepth>, 1)
    tensor_backward_kernel(const __grid_constant__ PersistentLayer<BackwardPointers<T>> layer) {
  using A = AccumulatorOf<T>;
  constexpr int kGates = Cell::kGates, kGradGates = Cell::kGradGates, kUnits = 2, kPlanes = kSavedPlanes<Cell>;
  constexpr int kColumns = kDepth * kTensorUnits, kProducts = kColumns / kMmaDepth<T>;
  constexpr int kChains = kGates * kProducts >= 8 ? 4 : 2;      // sums that do not wait for each other
  constexpr int kPitch = kGates * kColumns + kSegment<T>;       // as forward's
  RNN_EXT_SHARED(T, dgates_buffers, 2 * kTensorRows * kPitch);  // [row][gate][unit], gate gradients of the hidden side
  RNN_EXT_SHARED(uint4, staging, kGates * kBackwardThreads<kDepth>);

  const BackwardPointers<T>& d = layer.direction[blockIdx.y].pointers;
  const bool reverse = layer.direction[blockIdx.y].reverse;
  const TensorLane at(layer, kMmaHalf * kUnits);
  const int hidden = at.hidden, steps = at.steps, lane = static_cast<int>(threadIdx.x) % 32;

  uint32_t weight[kProducts][kGates][4];
#pragma unroll
  for (int k = 0; k < kProducts; ++k) {
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int unit = at.unit(r & 1);
        const int row = k * kMmaDepth<T> + lane % 4 * (kSegment<T> / 4) + kSegment<T> * (r >> 1);
        const T* column = d.weight_hh + g * hidden * hidden + unit;
        weight[k][g][r] = factors(column + row * hidden, hidden, row, unit < hidden ? hidden : 0);
      }
    }
    settle(weight[k], staging);
  }
  A direct[kUnits][2], dc[kUnits][2];  // dh without what passes the weight; dc
#pragma unroll
  for (int j = 0; j < kUnits; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      direct[j][e] = at.mine(j, e) ? value_or_zero(d.dh_n, at.state(j, e)) : A(0);
      dc[j][e] = 0;
      if constexpr (Cell::kHasCell) dc[j][e] = at.mine(j, e) ? value_or_zero(d.dc_n, at.state(j, e)) : A(0);
#pragma unroll
      for (int g = 0; g < kGates; ++g)
        dgates_buffers[(at.column + e) * kPitch + g * kColumns + at.unit(j)] = narrow<T>(A(0));
    }
  }

  bool cut[2] = {};  // whether a sequence begins between this timestep and the one that has been computed
  for (int step = 0; step <= steps; ++step) {
    const int time = reverse ? step : steps - 1 - step;  // -1 or L in the last round
    const int before = reverse ? time + 1 : time - 1;
    const T* dgates_now = dgates_buffers + (step & 1) * kTensorRows * kPitch;
    T* dgates_new = dgates_buffers + (~step & 1) * kTensorRows * kPitch;

    // What forward left behind travels over the barrier and the product.
    T saved[kUnits][2][kPlanes > 0 ? kPlanes : 1], output[kUnits][2], h_prev[kUnits][2], doutput[kUnits][2],
        dcell[kUnits][2];
    A c[kUnits][2], c_prev[kUnits][2];
    bool begins[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      begins[e] = at.exists(e, time) && at.begins(layer, e, reverse ? time + 1 : time);
#pragma unroll
      for (int j = 0; j < kUnits; ++j) {
        if (!at.mine(j, e) || !at.exists(e, time)) continue;
        const int unit = at.unit(j);
        const int64_t row = at.row(layer, e, time);
        const bool has_before = at.exists(e, before);
        const int64_t row_before = has_before ? at.row(layer, e, before) : 0;
        output[j][e] = d.output[row * d.output_stride + unit];
        doutput[j][e] = d.doutput ? d.doutput[row * d.doutput_stride + unit] : narrow<T>(A(0));
#pragma unroll
        for (int s = 0; s < kPlanes; ++s) saved[j][e][s] = d.saved[(row * kPlanes + s) * hidden + unit];
        if constexpr (Cell::kDirectCarry) {
          h_prev[j][e] = has_before ? d.output[row_before * d.output_stride + unit]
                         : d.h_0    ? d.h_0[at.state(j, e)]
                                    : narrow<T>(A(0));
        }
        if constexpr (Cell::kHasCell) {
          dcell[j][e] = d.dcells ? d.dcells[row * d.dcells_stride + unit] : narrow<T>(A(0));
          c[j][e] = d.cells[row * hidden + unit];
          c_prev[j][e] = has_before ? d.cells[row_before * hidden + unit] : value_or_zero(d.c_0, at.state(j, e));
        }
      }
    }
    __syncthreads();  // gate gradients of the round before are whole; the other buffer has been read

    A part[kChains][4] = {};
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
#pragma unroll
      for (int k = 0; k < kProducts; k += 2) {
        uint32_t fragments[4];  // of two products
        const T* of_gate = dgates_now + lane % 8 * kPitch + g * kColumns;
        load_matrices(fragments, of_gate + k * kMmaDepth<T> + lane / 8 * kSegment<T>);
        const int chain = (g * kProducts + k) % kChains;
        multiply_16x8<T>(part[chain], weight[k][g], fragments[0], fragments[1]);
        multiply_16x8<T>(part[chain + 1], weight[k + 1][g], fragments[2], fragments[3]);
      }
    }

    // The product of a row that has no timestep after this one is zero: its gate gradients were.
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int j = 0; j < kUnits; ++j) {
        A product = part[0][2 * j + e];
#pragma unroll
        for (int i = 1; i < kChains; ++i) product += part[i][2 * j + e];
        const int unit = at.unit(j);
        const bool active = at.mine(j, e) && at.exists(e, time);
        A dh = cut[e] ? A(0) : product + direct[j][e];
        if (cut[e]) dc[j][e] = A(0);
        A dgates[kGradGates] = {};
        if (active) {
          A values[kSavedSlots<Cell>], h_before = 0, c_before = 0;
#pragma unroll
          for (int s = 0; s < kPlanes; ++s) values[s] = widen(saved[j][e][s]);
          if constexpr (Cell::kDirectCarry) h_before = begins[e] ? A(0) : widen(h_prev[j][e]);
          if constexpr (Cell::kHasCell) {
            values[Cell::kSavedCell] = c[j][e];
            c_before = begins[e] ? A(0) : c_prev[j][e];
            dc[j][e] += widen(dcell[j][e]);
          }
          dh += widen(doutput[j][e]);
          direct[j][e] = Cell::template backward<ExactMath<A>>(values, widen(output[j][e]), h_before, c_before, dh,
                                                               dc[j][e], dgates);
        } else {
          direct[j][e] = dh;  // the state stood still
        }
        const bool inside = time >= 0 && time < steps;
        if (active || (at.mine(j, e) && inside && !layer.row_offsets))
          store_dgates<Cell>(d, at.row(layer, e, time), hidden, unit, dgates);
#pragma unroll
        for (int g = 0; g < kGates; ++g)
          dgates_new[(at.column + e) * kPitch + g * kColumns + unit] = factor<T>(dgates[Cell::hh_slot(g)]);
      }
      cut[e] = begins[e];
    }
  }
#pragma unroll
  for (int j = 0; j < kUnits; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (!at.mine(j, e)) continue;
      d.dh_0[at.state(j, e)] = narrow<T>(direct[j][e]);
      if constexpr (Cell::kHasCell) d.dc_0[at.state(j, e)] = narrow<T>(dc[j][e]);
    }
  }
}

}  // namespace rnn_ext::cuda
