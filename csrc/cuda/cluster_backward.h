// `cluster`, backward: the chain of the gradients over all timesteps in one launch, for the same cells and sizes as
// forward (cluster_kernels.h), whatever kernel ran that.
//
// A cluster owns 8 batch rows of one direction, a block kUnits hidden units: it turns their dh and dc into gate
// gradients, a thread for each (row, unit), and keeps in registers the rows of the weight that belong to its gates. The
// product dh [K, 8] = W_hh^T [K, G*H] dgates [G*H, 8] is therefore split along its depth: units are the M, the block's
// own G * kUnits gates the depth, the batch the N. Every block gets a part of dh of all K units, and sends each part to
// the block that owns the units: one float for a (row, unit), where its gate gradients would be G values of T.
//
// What travels, and how a block waits for it, is as in forward: st.async of the 4 values that a lane has of a product,
// an mbarrier for each of two buffers. A block adds the parts in the order of the blocks. Its own gate gradients go
// from thread to thread through a double buffer in shared memory: one barrier of the block per timestep. A part of step
// s + 1 is sent over that of s - 1 when all parts of s have come, of every block, and each was sent after that barrier:
// all threads had read s - 1 before it.
//
// Cost of one timestep and cluster (s bytes of T, G gates, Q gate gradients, S saved values, H hidden, K as in
// forward):
//   16 G K^2 operations in s G K^2 / 512 products of 8192 / s, those of a block s G K^2 / (512 kBlocks)
//   block: shared memory: 8 s G kUnits bytes of gate gradients read for every warp; 32 K bytes of dh received and read,
//          32 K sent
//   global: 8 H (s (Q + S + 3) + 8), in segments of 16 s bytes
// Nothing of this has a measured time.
#pragma once

#include "cuda/cluster_kernels.h"

namespace rnn_ext::cuda {

template <class Cell, class T, int kDepth, int kBlocks>
struct ClusterBackwardShape {
  static constexpr int kColumns = kDepth * kTensorUnits;
  static constexpr int kUnits = kColumns / kBlocks;
  static constexpr int kThreads = kUnits * static_cast<int>(kClusterRows);
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kTile = 2 * kMmaHalf;                                // units of a product
  static constexpr int kWarpTiles = kColumns / kTile / kWarps;              // of all K, those that a warp multiplies
  static constexpr int kOwnGates = Cell::kGates * kUnits;                   // [gate][unit], the depth of the product
  static constexpr int kProducts = (kOwnGates / kMmaDepth<T> + 1) / 2 * 2;  // along it, two at a time
  static constexpr int kPitch = kProducts * kMmaDepth<T> + kSegment<T>;
  static_assert(kUnits * kBlocks == kColumns && kUnits % 2 == 0 && kWarpTiles * kWarps * kTile == kColumns);
};

template <class Cell, class T, int kDepth, int kBlocks>
RNN_EXT_DEVICE void cluster_backward_block(const PersistentLayer<BackwardPointers<T>>& layer) {
  using A = AccumulatorOf<T>;
  using Shape = ClusterBackwardShape<Cell, T, kDepth, kBlocks>;
  constexpr int kGates = Cell::kGates, kGradGates = Cell::kGradGates, kPlanes = kSavedPlanes<Cell>;
  constexpr int kRows = static_cast<int>(kClusterRows), kUnits = Shape::kUnits, kTile = Shape::kTile;
  constexpr int kPitch = Shape::kPitch, kThreads = Shape::kThreads, kWarpTiles = Shape::kWarpTiles;
  constexpr int kProducts = Shape::kProducts;
  // A product waits for the one before it: two chains of them, where threads and weight leave the registers for it.
  constexpr int kChains = (kThreads > 256 && kWarpTiles > 1) || kWarpTiles * kProducts > 40 ? 1 : 2;
  constexpr unsigned kBytes = kBlocks * kThreads * sizeof(A);
  RNN_EXT_SHARED(A, received, 2 * kBlocks * kThreads);  // [buffer][from block][thread]
  RNN_EXT_SHARED(T, dgates_buffers, 2 * kRows * kPitch);
  RNN_EXT_SHARED(uint64_t, full, 2);

  const BackwardPointers<T>& d = layer.direction[blockIdx.y].pointers;
  const bool reverse = layer.direction[blockIdx.y].reverse;
  const int hidden = static_cast<int>(layer.hidden), steps = static_cast<int>(layer.length);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int rank = static_cast<int>(cluster_rank()), block_unit = rank * kUnits;

  // An operand of a product at a time, as in forward. Neighbours in memory lie 8 rows of M apart: so a lane has both in
  // its result.
  uint32_t weight[kWarpTiles][kProducts][4];
  static_assert(Shape::kWarps * kTile * kMmaDepth<T> * sizeof(T) <= sizeof(A) * 2 * kBlocks * kThreads);
  T* operand = reinterpret_cast<T*>(received) + warp * kTile * kMmaDepth<T>;
  constexpr int kSegments = kTile / kSegment<T>;
#pragma unroll
  for (int m = 0; m < kWarpTiles; ++m) {
    const int first = lane % kSegments * kSegment<T>, column = (warp * kWarpTiles + m) * kTile + first;
#pragma unroll
    for (int k = 0; k < kProducts; ++k) {
      const int own = k * kMmaDepth<T> + lane / kSegments, unit = block_unit + own % kUnits;
      const bool used = own < Shape::kOwnGates && unit < hidden;
      const T* row = d.weight_hh + static_cast<int64_t>(own / kUnits * hidden + unit) * hidden;
#pragma unroll
      for (int i = 0; i < kSegment<T>; ++i) {
        operand[(i % 2 * kMmaHalf + (first + i) / 2) * kMmaDepth<T> + lane / kSegments] =
            used && column + i < hidden ? stored_factor(row[column + i]) : narrow<T>(A(0));
      }
      __syncwarp(kWholeWarp);
      load_matrices(weight[m][k], operand + lane % 16 * kMmaDepth<T> + lane / 16 * kSegment<T>);
      __syncwarp(kWholeWarp);
    }
  }
  for (int i = thread; i < 2 * kRows * kPitch; i += kThreads) dgates_buffers[i] = narrow<T>(A(0));
  if (thread == 0) {
    for (int buffer = 0; buffer < 2; ++buffer) {
      mbarrier_init(&full[buffer], 1);
      mbarrier_arrive_expect(&full[buffer], kBytes);
    }
  }

  // This thread's unit and row are those of its place in `received`, [row / 2][unit][row % 2].
  const int own_unit = thread / 2 % kUnits, own_row = thread / (2 * kUnits) * 2 + thread % 2;
  const int unit = block_unit + own_unit;
  const BatchRow row(layer, static_cast<int64_t>(blockIdx.x / kBlocks) * kRows + own_row);
  const bool mine = unit < hidden && row.n < layer.batch;
  const int64_t state = row.n * hidden + unit;
  A direct = mine ? value_or_zero(d.dh_n, state) : A(0), dc = 0;  // dh without what passes the weight; dc
  if constexpr (Cell::kHasCell) dc = mine ? value_or_zero(d.dc_n, state) : A(0);

  // What a step needs of what forward left behind, and of what flows in: it travels over the exchange.
  const T zero = narrow<T>(A(0));
  T planes[kPlanes > 0 ? kPlanes : 1], output = zero, h_prev = zero, doutput = zero, dcell = zero;
  A cell = 0, c_prev = 0;
  bool active = false, cut = false, cut_after = false;  // whether a sequence begins behind this timestep; before it
  int64_t at = 0;
  const auto time_of = [&](int step) { return reverse ? step : steps - 1 - step; };  // -1 or L in the last round
  const auto fetch = [&](int step) {
    const int time = time_of(step), before = reverse ? time + 1 : time - 1;
    active = mine && row.exists(time);
    if (active || (step < steps && !layer.row_offsets)) at = row.row(layer, time);
    cut_after = cut;
    cut = active && row.begins(layer, reverse ? time + 1 : time);
    if (!active) return;
    output = d.output[at * d.output_stride + unit];
    doutput = d.doutput ? d.doutput[at * d.doutput_stride + unit] : zero;
#pragma unroll
    for (int s = 0; s < kPlanes; ++s) planes[s] = d.saved[(at * kPlanes + s) * hidden + unit];
    const bool follows = row.exists(before);
    const int64_t at_before = follows ? row.row(layer, before) : 0;
    if constexpr (Cell::kDirectCarry) {
      h_prev = zero;
      if (!cut && follows) h_prev = d.output[at_before * d.output_stride + unit];
      if (!cut && !follows && d.h_0) h_prev = d.h_0[state];
    }
    if constexpr (Cell::kHasCell) {
      dcell = d.dcells ? d.dcells[at * d.dcells_stride + unit] : zero;
      cell = d.cells[at * hidden + unit];
      c_prev = cut ? A(0) : follows ? d.cells[at_before * hidden + unit] : value_or_zero(d.c_0, state);
    }
  };
  fetch(0);
  cluster_arrive();
  cluster_wait();  // every block of the cluster is ready to receive

  for (int step = 0; step <= steps; ++step) {
    const int now = step & 1, next = 1 - now;
    A product = 0;
    if (step > 0) {
      mbarrier_wait(&full[now], static_cast<unsigned>((step - 1) >> 1 & 1));
      if (thread == 0) mbarrier_arrive_expect(&full[now], kBytes);  // for the parts two steps on
#pragma unroll
      for (int from = 0; from < kBlocks; ++from) product += received[(now * kBlocks + from) * kThreads + thread];
    }

    // The product of a row that has no timestep after this one is zero: its gate gradients were.
    A dh = cut_after ? A(0) : product + direct;
    if (cut_after) dc = A(0);
    A dgates[kGradGates] = {};
    if (active) {
      dh += widen(doutput);
      A saved[kSavedSlots<Cell>], before = 0;
#pragma unroll
      for (int s = 0; s < kPlanes; ++s) saved[s] = widen(planes[s]);
      if constexpr (Cell::kDirectCarry) before = widen(h_prev);
      if constexpr (Cell::kHasCell) {
        saved[Cell::kSavedCell] = cell;
        dc += widen(dcell);
      }
      direct = Cell::template backward<ExactMath<A>>(saved, widen(output), before, c_prev, dh, dc, dgates);
    } else {
      direct = dh;  // the state stood still
    }
    if (step == steps) break;

    T* own = dgates_buffers + now * kRows * kPitch;
#pragma unroll
    for (int g = 0; g < kGates; ++g)
      own[own_row * kPitch + g * kUnits + own_unit] = factor<T>(dgates[Cell::hh_slot(g)]);
    __syncthreads();  // the block's gate gradients are whole; the other buffer has been read

    A part[kChains][kWarpTiles][4] = {};
#pragma unroll
    for (int k = 0; k < kProducts; k += 2) {
      uint32_t fragments[4];  // of two products
      load_matrices(fragments, own + lane % 8 * kPitch + k * kMmaDepth<T> + lane / 8 * kSegment<T>);
#pragma unroll
      for (int m = 0; m < kWarpTiles; ++m) {
        multiply_16x8<T>(part[0][m], weight[m][k], fragments[0], fragments[1]);
        multiply_16x8<T>(part[kChains - 1][m], weight[m][k + 1], fragments[2], fragments[3]);
      }
    }
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m) {
      const int first = (warp * kWarpTiles + m) * kTile + lane / 4 * 2, owner = first / kUnits;
      const int place = (lane % 4 * kUnits + first % kUnits) * 2;
      A values[4];  // of two units of two rows, as its owner's threads lie
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] = kChains == 1 ? part[0][m][i] : part[0][m][i] + part[kChains - 1][m][i];
      A* to = received + (next * kBlocks + rank) * kThreads + place;
      store_async_16(to, bits_of(values), &full[next], static_cast<unsigned>(owner));
    }

    // While dh travels: what was computed, and what the next step needs.
    if (active || (mine && !layer.row_offsets)) store_dgates<Cell>(d, at, hidden, unit, dgates);
    fetch(step + 1);
  }
  if (!mine) return;
  d.dh_0[state] = narrow<T>(direct);
  if constexpr (Cell::kHasCell) d.dc_0[state] = narrow<T>(dc);
}

// grid: (ceil(N / 8) clusters of kBlocks, directions); block: ClusterBackwardShape::kThreads
template <class Cell, class T, int kDepth, int kBlocks>
__global__ void __launch_bounds__(ClusterBackwardShape<Cell, T, kDepth, kBlocks>::kThreads, 1)
    cluster_backward_kernel(const __grid_constant__ PersistentLayer<BackwardPointers<T>> layer) {
  if constexpr (kCompilesClusters) cluster_backward_block<Cell, T, kDepth, kBlocks>(layer);
}

}  // namespace rnn_ext::cuda
