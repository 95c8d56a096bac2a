// `tensor`: forward over all timesteps in one launch, the recurrent product on tensor cores, for bfloat16 and float16
// and hidden sizes whose weight fits one block's registers.
//
// A block owns kTensorRows = 8 batch rows of one direction (blockIdx.y). Each step multiplies W_hh [G*H, H] by h^T
// [H, 8] with mma.m16n8k16: gates are the M of the product, the batch its N. The weight is the stationary operand: it
// is read from global memory once, and stays in registers as fragments. h goes from warp to warp through a double
// buffer in shared memory, [row][unit] of T, which ldmatrix turns into the other operand: one barrier per timestep.
//
// In a product's result a lane holds two rows of M, g = lane / 4 and g + 8, for batch rows 2 t and 2 t + 1, t = lane
// % 4. A warp's tile of 16 * kMmas rows of the weight is laid out so that a lane holds all gates of its units:
//   slot s = 2 m + half of a lane (m the product, half the upper or lower 8 rows) is gate s % G of its unit s / G.
// The cell is then local to a lane, and its state stays in float32 registers.
//
// Cost of one timestep and block (G gates, H hidden, K = H up to a multiple of 16 that is compiled):
//   16 G K^2 operations in G K^2 / 256 products of 4096; shared memory: 16 K bytes of h for every warp
//   (LSTM, H = 96: 144 products for the 4 tensor cores, where `persistent` reads 72 KB of weight from shared memory)
//
//   global: 8 H (2 (1 + G) + (2 S + 4) when saving), in segments of 16 bytes
// Nothing of this has a measured time.
#pragma once

#include "cuda/persistent_kernels.h"
#include "cuda/tensor_entries.h"

namespace rnn_ext::cuda {

inline constexpr int kTensorRows = 8;
inline constexpr int kMmaDepth = 16, kMmaHalf = 8;

// Units of a lane: an odd number of gates needs two.
template <class Cell>
inline constexpr int kLaneUnits = Cell::kGates % 2 == 0 ? 1 : 2;
template <class Cell>
inline constexpr int kMmas = Cell::kGates * kLaneUnits<Cell> / 2;
template <class Cell>
inline constexpr int kWarpTile = kMmaHalf * kLaneUnits<Cell>;  // units of a warp
template <class Cell, int kDepth>
inline constexpr int kTensorThreads = 32 * kDepth * kMmaDepth / kWarpTile<Cell>;

// kDepth: H in units of 16, rounded up. grid: (ceil(N / 8), directions); block: kTensorThreads
template <class Cell, class T, int kDepth>
__global__ void __launch_bounds__(kTensorThreads<Cell, kDepth>, 1)
    tensor_forward_kernel(const __grid_constant__ PersistentLayer<ForwardPointers<T>> layer) {
  using A = AccumulatorOf<T>;
  constexpr int kGates = Cell::kGates, kSplit = Cell::kSplit, kUnits = kLaneUnits<Cell>;
  constexpr int kColumns = kDepth * kMmaDepth;
  constexpr int kPitch = kColumns + kMmaHalf;  // the 8 rows that ldmatrix takes at once are then in different banks
  RNN_EXT_SHARED(T, h_buffers, 2 * kTensorRows * kPitch);
  RNN_EXT_SHARED(A, bias, kGates * kColumns);

  const ForwardPointers<T>& d = layer.direction[blockIdx.y].pointers;
  const bool reverse = layer.direction[blockIdx.y].reverse;
  // Registers are what this kernel is short of: counts are 32-bit (the launcher checks them), offsets 64-bit.
  const int hidden = static_cast<int>(layer.hidden), batch = static_cast<int>(layer.batch);
  const int steps = static_cast<int>(layer.length);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int group = lane / 4, member = lane % 4;
  const int first_unit = thread / 32 * kWarpTile<Cell> + group;
  const auto unit_of = [&](int j) { return first_unit + j * kMmaHalf; };

  uint32_t weight[kMmas<Cell>][kDepth][4];
#pragma unroll
  for (int m = 0; m < kMmas<Cell>; ++m) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int slot = 2 * m + (r & 1), unit = unit_of(slot / kGates);
      const T* row = d.weight_hh + (slot % kGates * hidden + unit) * hidden;
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
        const int column = k * kMmaDepth + 2 * member + kMmaHalf * (r >> 1);
        const T low = unit < hidden && column < hidden ? row[column] : narrow<T>(A(0));
        const T high = unit < hidden && column + 1 < hidden ? row[column + 1] : narrow<T>(A(0));
        weight[m][k][r] = pack2(low, high);
      }
    }
  }
  for (int i = thread; i < kGates * kColumns; i += kTensorThreads<Cell, kDepth>) {
    const int unit = i % kColumns;
    bias[i] = unit < hidden ? value_or_zero(d.bias_hh, i / kColumns * hidden + unit) : A(0);
  }

  // The two batch rows of this lane, n and n + 1, and which timesteps they have.
  const int n = static_cast<int>(blockIdx.x) * kTensorRows + 2 * member;
  int length[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int64_t given = n + e >= batch ? 0 : layer.lengths ? layer.lengths[n + e] : layer.length;
    length[e] = given < 0 ? 0 : given < layer.length ? static_cast<int>(given) : steps;
  }
  const auto exists = [&](int e, int time) { return time >= 0 && time < length[e]; };
  const auto mine = [&](int j, int e) { return unit_of(j) < hidden && n + e < batch; };
  const auto row_of = [&](int e, int time) {
    return (layer.row_offsets ? layer.row_offsets[time] : time * layer.time_stride) + (n + e) * layer.batch_stride;
  };
  const auto state_of = [&](int j, int e) { return static_cast<int64_t>(n + e) * hidden + unit_of(j); };

  T igates[kUnits][2][kGates];
  const auto fetch = [&](int step) {
    const int time = reverse ? steps - 1 - step : step;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (!exists(e, time)) continue;
      const T* source = d.igates + row_of(e, time) * d.igates_stride;
#pragma unroll
      for (int j = 0; j < kUnits; ++j) {
        if (!mine(j, e)) continue;
#pragma unroll
        for (int g = 0; g < kGates; ++g) igates[j][e][g] = source[g * hidden + unit_of(j)];
      }
    }
  };
  // h in shared memory is rounded to T; a cell that carries h on directly has it whole besides.
  A h[kUnits][2], c[kUnits][2];
#pragma unroll
  for (int j = 0; j < kUnits; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      h[j][e] = mine(j, e) ? value_or_zero(d.h_0, state_of(j, e)) : A(0);
      c[j][e] = 0;
      if constexpr (Cell::kHasCell) c[j][e] = mine(j, e) ? value_or_zero(d.c_0, state_of(j, e)) : A(0);
      h_buffers[(2 * member + e) * kPitch + unit_of(j)] = narrow<T>(h[j][e]);
    }
  }
  fetch(0);

  for (int step = 0; step < steps; ++step) {
    const int time = reverse ? steps - 1 - step : step;
    const T* h_now = h_buffers + (step & 1) * kTensorRows * kPitch;
    T* h_new = h_buffers + (~step & 1) * kTensorRows * kPitch;
    __syncthreads();  // h of the step before is whole (and the bias, at first); the other buffer has been read

    A product[kMmas<Cell>][4] = {};
#pragma unroll
    for (int k = 0; k < kDepth; k += 2) {
      uint32_t fragments[4];  // two steps of 16 units
      load_matrices(fragments, h_now + lane % 8 * kPitch + k * kMmaDepth + lane / 8 * kMmaHalf);
#pragma unroll
      for (int m = 0; m < kMmas<Cell>; ++m) {
        multiply_16x8<T>(product[m], weight[m][k], fragments[0], fragments[1]);
        multiply_16x8<T>(product[m], weight[m][k + 1], fragments[2], fragments[3]);
      }
    }

#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int later =
          reverse ? time + 1 : time;  // where a sequence would begin between this timestep and the one before
      const bool cut = layer.resets && exists(e, later) &&
                       layer.resets[later * layer.resets_time_stride + (n + e) * layer.resets_batch_stride] != 0;
#pragma unroll
      for (int j = 0; j < kUnits; ++j) {
        const int unit = unit_of(j), place = (2 * member + e) * kPitch + unit;
        T h_rounded = h_now[place];
        if (mine(j, e) && exists(e, time)) {
          const int64_t at = row_of(e, time);
          if (cut) h[j][e] = c[j][e] = A(0);
          A gates[kGates], split[kSplit > 0 ? kSplit : 1];
#pragma unroll
          for (int g = 0; g < kGates; ++g) {
            const int slot = j * kGates + g;
            gates[g] = (cut ? A(0) : product[slot / 2][slot % 2 * 2 + e]) + bias[g * kColumns + unit];
          }
#pragma unroll
          for (int g = 0; g < kGates - kSplit; ++g) gates[g] += widen(igates[j][e][g]);
#pragma unroll
          for (int s = 0; s < kSplit; ++s) split[s] = widen(igates[j][e][kGates - kSplit + s]);
          A saved[Cell::kSaved > 0 ? Cell::kSaved : 1];
          h[j][e] = Cell::template forward<ExactMath<A>>(gates, split, h[j][e], c[j][e], saved);

          h_rounded = narrow<T>(h[j][e]);
          d.output[at * d.output_stride + unit] = h_rounded;
          if constexpr (Cell::kHasCell) {
            if (d.cells) d.cells[at * hidden + unit] = c[j][e];
          }
          if (d.saved) {
#pragma unroll
            for (int s = 0; s < kSavedPlanes<Cell>; ++s)
              d.saved[(at * kSavedPlanes<Cell> + s) * hidden + unit] = narrow<T>(saved[s]);
          }
        } else if (mine(j, e) && !layer.row_offsets) {
          d.output[row_of(e, time) * d.output_stride + unit] = narrow<T>(A(0));
        }
        h_new[place] = h_rounded;
      }
    }
    fetch(step + 1);  // travels over the barrier and the next product
  }
#pragma unroll
  for (int j = 0; j < kUnits; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (!mine(j, e)) continue;
      // Its own: no barrier.
      d.h_n[state_of(j, e)] = h_buffers[((steps & 1) * kTensorRows + 2 * member + e) * kPitch + unit_of(j)];
      if constexpr (Cell::kHasCell) d.c_n[state_of(j, e)] = narrow<T>(c[j][e]);
    }
  }
}

}  // namespace rnn_ext::cuda
