// `cluster`: forward over all timesteps in one launch for hidden sizes whose recurrent weight fits the registers of a
// few blocks, not of one: sm_90 and later. bfloat16 and float16 as they are stored; float32 is rounded to TF32 in the
// product alone.
//
// A cluster of kBlocks blocks owns kClusterRows = 8 batch rows of one direction (blockIdx.y). Each block owns kUnits =
// K / kBlocks hidden units (K = H up to a multiple of 16 that is compiled): it computes their gates and cell, and sends
// their h to all blocks. As in `tensor`, gates are the M of the product and the batch its N, the weight is read once
// and stays in registers as fragments of mma.sync, and a lane holds all gates of its units (see tensor_kernels.h).
//
// Two warps share a tile of units. Each multiplies half of the K columns for all 8 rows; then they swap partial sums,
// so that a lane with the products of rows 2 t and 2 t + 1 runs the cell for one of them: 2 t + half. Nobody waits for
// the whole block: a pair of warps meets at a barrier of its own.
//
// h travels by st.async, 16 bytes a lane, as the next product takes it (whole it stays with its lane), and counts
// itself on an mbarrier of the block that it arrives at; a warp waits until all 8 rows of K units are there. Two
// buffers are enough: a warp sends the h after this step's only when this step's is whole in its block. Every warp of
// the cluster has then sent its part of it, and so has read the h before, which is written over. There is no barrier of
// a block or of the cluster in the loop, and no fence.
//
// Cost of one timestep and cluster (s bytes of T, G gates, H hidden, S saved values):
//   16 G K^2 operations in s G K^2 / 512 products of 8192 / s, those of a block s G K^2 / (512 kBlocks); gru as if G
//     were 4 (LSTM, H = 256, 8 blocks: 128 a block, 16 a warp, in TF32 twice as many)
//   registers: s G K^2 / kBlocks bytes of weight in a block, 144 KB of 256 at most (LSTM, K = 384: 8 blocks in 16 bits,
//          16 in TF32)
//   block: shared memory: 4 s K bytes of h read for every warp, 8 s K received; sent 8 s kUnits to each block; partial
//          sums 32 G kUnits, written and read
//   global: 8 H (s (1 + G) + (s S + 4) when saving), in segments of 8 s bytes
// The chain of a step: s K / 128 dependent products, one hand-over between two warps, the cell, one hand-over between
// blocks. Nothing of this has a measured time.
#pragma once

#include "cuda/cluster_entries.h"
#include "cuda/tensor_kernels.h"

namespace rnn_ext::cuda {

inline constexpr int kHalves = 2;         // warps that share a tile, each with half of the columns
inline constexpr int kPrefetchSteps = 4;  // how far ahead input gates are called from memory into L2

// kDepth: K in units of kTensorUnits
template <class Cell, class T, int kDepth, int kBlocks>
struct ClusterShape {
  static constexpr int kColumns = kDepth * kTensorUnits;
  static constexpr int kUnits = kColumns / kBlocks;
  // Slots of a lane in its products (see tensor_kernels.h): a lone gate leaves room for a second unit, three for none.
  static constexpr int kLaneUnits = Cell::kGates == 1 ? 2 : 1;
  static constexpr int kMmas = (Cell::kGates * kLaneUnits + 1) / 2;
  static constexpr int kTile = kMmaHalf * kLaneUnits;  // units of a pair of warps
  static constexpr int kPairs = kUnits / kTile;
  static constexpr int kWarps = kPairs * kHalves;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kPitch = kColumns + kSegment<T>;  // of h; the 8 rows that ldmatrix takes at once: other banks
  static constexpr int kProducts = kColumns / kMmaDepth<T> / kHalves;  // of a warp, along K
  static_assert(kPairs * kTile * kBlocks == kColumns && kProducts % 2 == 0);
};

template <class Cell, class T, int kDepth, int kBlocks>
RNN_EXT_DEVICE void cluster_forward_block(const PersistentLayer<ForwardPointers<T>>& layer) {
  using A = AccumulatorOf<T>;
  using Shape = ClusterShape<Cell, T, kDepth, kBlocks>;
  constexpr int kGates = Cell::kGates, kUnits = Shape::kLaneUnits, kTile = Shape::kTile;
  constexpr int kMmas = Shape::kMmas, kProducts = Shape::kProducts;
  constexpr int kColumns = Shape::kColumns, kPitch = Shape::kPitch, kThreads = Shape::kThreads;
  constexpr int kRows = static_cast<int>(kClusterRows), kWarpRows = kRows / kHalves;
  constexpr unsigned kBytes = kRows * kColumns * sizeof(T);
  RNN_EXT_SHARED(T, h_buffers, 2 * kRows * kPitch);
  RNN_EXT_SHARED(A, bias, kGates * Shape::kUnits);
  RNN_EXT_SHARED(float2, partials, Shape::kWarps * kMmas * 32);
  RNN_EXT_SHARED(T, outgoing, Shape::kWarps * kWarpRows * kTile);
  RNN_EXT_SHARED(uint64_t, full, 2);

  const ForwardPointers<T>& d = layer.direction[blockIdx.y].pointers;
  const bool reverse = layer.direction[blockIdx.y].reverse;
  const int hidden = static_cast<int>(layer.hidden), steps = static_cast<int>(layer.length);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int group = lane / 4, member = lane % 4, half = warp % kHalves;
  const int block_unit = static_cast<int>(cluster_rank()) * Shape::kUnits;
  const int tile_unit = block_unit + warp / kHalves * kTile;
  const auto unit_of = [&](int j) { return tile_unit + group + j * kMmaHalf; };

  // Through shared memory, a product's operand at a time: loads straight to the registers would all be issued at once,
  // and spill.
  uint32_t weight[kMmas][kProducts][4];
  constexpr int kOperand = 2 * kMmaHalf * kMmaDepth<T>;
  static_assert(Shape::kWarps * kOperand <= 2 * kRows * kPitch);
  T* operand = h_buffers + warp * kOperand;
#pragma unroll
  for (int m = 0; m < kMmas; ++m) {
    const int slot = 2 * m + lane / 16, unit = tile_unit + lane / 2 % kMmaHalf + slot / kGates * kMmaHalf;
    const bool used = slot < kGates * kUnits && unit < hidden;
    const T* row = d.weight_hh + static_cast<int64_t>(slot % kGates * hidden + unit) * hidden;
#pragma unroll
    for (int k = 0; k < kProducts; ++k) {
      const int column = (half * kProducts + k) * kMmaDepth<T> + lane % 2 * kSegment<T>;
#pragma unroll
      for (int i = 0; i < kSegment<T>; ++i) {
        operand[lane * kSegment<T> + i] =
            used && column + i < hidden ? stored_factor(row[column + i]) : narrow<T>(A(0));
      }
      __syncwarp(kWholeWarp);
      load_matrices(weight[m][k], operand + lane % 16 * kMmaDepth<T> + lane / 16 * kSegment<T>);
      __syncwarp(kWholeWarp);
    }
  }
  __syncthreads();  // the room is for h from here on
  for (int i = thread; i < kGates * Shape::kUnits; i += kThreads) {
    const int unit = block_unit + i % Shape::kUnits;
    bias[i] = unit < hidden ? value_or_zero(d.bias_hh, i / Shape::kUnits * hidden + unit) : A(0);
  }
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / kBlocks) * kRows;
  for (int i = thread; i < kRows * kColumns; i += kThreads) {
    const int r = i / kColumns, unit = i % kColumns;
    const bool inside = unit < hidden && first_row + r < layer.batch;
    h_buffers[r * kPitch + unit] = factor<T>(inside ? value_or_zero(d.h_0, (first_row + r) * hidden + unit) : A(0));
  }
  if (thread == 0) {
    for (int buffer = 0; buffer < 2; ++buffer) {
      mbarrier_init(&full[buffer], 1);
      mbarrier_arrive_expect(&full[buffer], kBytes);
    }
  }

  const BatchRow row(layer, first_row + 2 * member + half);
  const auto mine = [&](int j) { return unit_of(j) < hidden && row.n < layer.batch; };
  const auto state_of = [&](int j) { return row.n * hidden + unit_of(j); };
  const auto time_of = [&](int step) { return reverse ? steps - 1 - step : step; };
  // Zero in units past H, whose igates, bias and weight are zero: their h stays zero.
  A h[kUnits], c[kUnits];
#pragma unroll
  for (int j = 0; j < kUnits; ++j) {
    h[j] = mine(j) ? value_or_zero(d.h_0, state_of(j)) : A(0);
    c[j] = 0;
    if constexpr (Cell::kHasCell) c[j] = mine(j) ? value_or_zero(d.c_0, state_of(j)) : A(0);
  }

  // What the next step needs besides h: it travels over the exchange and the product.
  T igates[kUnits][kGates];
#pragma unroll
  for (int j = 0; j < kUnits; ++j) {
#pragma unroll
    for (int g = 0; g < kGates; ++g) igates[j][g] = narrow<T>(A(0));
  }
  int64_t at = 0;  // the row of the timestep
  bool cut = false;
  const auto fetch = [&](int step) {
    const int time = time_of(step);
    if (step < steps && (row.exists(time) || !layer.row_offsets)) at = row.row(layer, time);
    if (!row.exists(time)) return;
    cut = row.begins(layer, reverse ? time + 1 : time);
    const T* source = d.igates + at * d.igates_stride;
#pragma unroll
    for (int j = 0; j < kUnits; ++j) {
      if (unit_of(j) >= hidden) continue;
#pragma unroll
      for (int g = 0; g < kGates; ++g) igates[j][g] = source[g * hidden + unit_of(j)];
    }
  };
  // A lane for each gate: a tile's units lie side by side.
  const auto prefetch = [&](int step) {
    const int time = time_of(step);
    if (group < kGates && tile_unit < hidden && row.exists(time))
      prefetch_l2(d.igates + row.row(layer, time) * d.igates_stride + group * hidden + tile_unit);
  };
  fetch(0);
  for (int step = 1; step < kPrefetchSteps; ++step) prefetch(step);
  cluster_arrive();
  cluster_wait();  // h_0 and the bias are there, and every block of the cluster is ready to receive

  for (int step = 0; step < steps; ++step) {
    const int time = time_of(step), now = step & 1, next = 1 - now;
    if (step > 0) {
      mbarrier_wait(&full[now], static_cast<unsigned>((step - 1) >> 1 & 1));
      if (thread == 0) mbarrier_arrive_expect(&full[now], kBytes);  // for h two steps on
    }

    A product[2][kMmas][4] = {};  // two chains: a product waits for the one before it
    const T* h_now = h_buffers + now * kRows * kPitch + half * kProducts * kMmaDepth<T>;
#pragma unroll
    for (int k = 0; k < kProducts; k += 2) {
      uint32_t fragments[4];  // of two products
      load_matrices(fragments, h_now + lane % 8 * kPitch + k * kMmaDepth<T> + lane / 8 * kSegment<T>);
#pragma unroll
      for (int m = 0; m < kMmas; ++m) {
        multiply_16x8<T>(product[0][m], weight[m][k], fragments[0], fragments[1]);
        multiply_16x8<T>(product[1][m], weight[m][k + 1], fragments[2], fragments[3]);
      }
    }
    A sums[2 * kMmas];  // [slot], of this lane's row
#pragma unroll
    for (int m = 0; m < kMmas; ++m) {
      A all[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) all[i] = product[0][m][i] + product[1][m][i];
      sums[2 * m] = half ? all[1] : all[0];
      sums[2 * m + 1] = half ? all[3] : all[2];
      partials[(warp * kMmas + m) * 32 + lane] = half ? float2{all[0], all[2]} : float2{all[1], all[3]};
    }
    named_barrier(1 + warp / kHalves, kHalves * 32);
#pragma unroll
    for (int m = 0; m < kMmas; ++m) {
      const float2 other = partials[((warp ^ 1) * kMmas + m) * 32 + lane];
      sums[2 * m] += other.x;
      sums[2 * m + 1] += other.y;
    }

    const bool active = row.exists(time);
    A saved[kUnits][kSavedSlots<Cell>];
#pragma unroll
    for (int j = 0; j < kUnits; ++j) {
      if (active) {
        A gates[kGates], own_bias[kGates];
#pragma unroll
        for (int g = 0; g < kGates; ++g) {
          gates[g] = sums[j * kGates + g];
          own_bias[g] = bias[g * Shape::kUnits + unit_of(j) - block_unit];
        }
        run_cell<Cell>(gates, own_bias, igates[j], cut, h[j], c[j], saved[j]);
      }
      outgoing[(warp * kWarpRows + member) * kTile + group + j * kMmaHalf] = factor<T>(h[j]);
    }
    __syncwarp(kWholeWarp);
    if (step + 1 < steps) {
      constexpr int kSegments = kTile / kSegment<T>, kSends = kWarpRows * kSegments * kBlocks;
#pragma unroll 2  // more addresses at once do not fit beside the largest weight
      for (int i = lane; i < kSends; i += 32) {
        const int r = i % kWarpRows, segment = i / kWarpRows % kSegments, rank = i / kWarpRows / kSegments;
        const T* from = outgoing + (warp * kWarpRows + r) * kTile + segment * kSegment<T>;
        T* to = h_buffers + (next * kRows + 2 * r + half) * kPitch + tile_unit + segment * kSegment<T>;
        store_async_16(to, *reinterpret_cast<const uint4*>(from), &full[next], static_cast<unsigned>(rank));
      }
    }

    // While h travels: what was computed, and what the next step needs.
#pragma unroll
    for (int j = 0; j < kUnits; ++j) {
      if (!mine(j)) continue;
      if (active) {
        store_forward<Cell>(d, at, hidden, unit_of(j), h[j], c[j], saved[j]);
      } else if (!layer.row_offsets) {
        d.output[at * d.output_stride + unit_of(j)] = narrow<T>(A(0));
      }
    }
    fetch(step + 1);
    prefetch(step + kPrefetchSteps);
  }
#pragma unroll
  for (int j = 0; j < kUnits; ++j) {
    if (!mine(j)) continue;
    d.h_n[state_of(j)] = narrow<T>(h[j]);
    if constexpr (Cell::kHasCell) d.c_n[state_of(j)] = narrow<T>(c[j]);
  }
}

// grid: (ceil(N / 8) clusters of kBlocks, directions); block: ClusterShape::kThreads
template <class Cell, class T, int kDepth, int kBlocks>
__global__ void __launch_bounds__(ClusterShape<Cell, T, kDepth, kBlocks>::kThreads, 1)
    cluster_forward_kernel(const __grid_constant__ PersistentLayer<ForwardPointers<T>> layer) {
  if constexpr (kCompilesClusters) cluster_forward_block<Cell, T, kDepth, kBlocks>(layer);
}

}  // namespace rnn_ext::cuda
