// `grid`: all timesteps in one cooperative launch, for hidden sizes whose recurrent weight fits the chip but no block:
// float32, bfloat16, float16.
//
// Batch rows form groups of 8, hidden units slices: blockIdx = (slice, block of groups, direction). A block holds the
// weight of its units (forward: their gates' rows; backward: their columns) on chip for the whole sequence, and serves
// its groups in turn, so that one group's exchange passes while another is computed. What blocks of one group tell each
// other, h or the gate gradients of a timestep in the storage type, goes through global memory, double-buffered: every
// block writes its units' values, then a flag (release) that says how many timesteps it has written; before the next
// product every block waits (acquire) for the flags of its group only. Two buffers are enough: who writes timestep s +
// 2 has seen the flags of s + 1, which their blocks set after they had read s.
//
// A product splits its columns over the warps, whose sums meet in shared memory: each value of h is read from L2 once
// by each block, into the registers of the one warp that multiplies it. The order of every sum follows from H alone,
// not from the device or the batch.
//   float32   a lane takes a column for all 8 rows: 8 FMAs for each weight that it reads from shared memory
//   16 bits   mma.m16n8k16, the weight as the stationary operand: up to 64 KB of its fragments in registers, the rest
//             in shared memory, in the order in which lanes take them
//
// Cost of one timestep, block and group (s = bytes of T, U units of a block, K = H forward, G H backward, B blocks of a
// group; in brackets an LSTM on 128 blocks, of H = 1280 in float32 or of H = 2048 at 16 bits):
//   product   16 G U H operations  [float32: 3200 clocks of FMAs; 16 bits: 512 products of 4096 operations]
//   weight    s G U H bytes of shared memory  [200 KB, 1600 clocks; 256 KB, of which 64 KB in registers, 1500 clocks]
//   exchange  8 K s bytes read from L2  [forward 40 KB, backward 160 KB; 32 KB, 128 KB], 1/B of that written;
//             B flags read at once, each by a thread of its own, until the last is set: no atomics
//   global    as `persistent`, 8 U times forward s (1 + G) + (S s + 4 when saving), backward s (Q + S + 3) + 8 bytes
// At 32 bytes a clock from L2, which is an assumption, backward in float32 is bound by its exchange (5000 clocks). It
// could send partial sums of dh instead, 4 bytes in place of G s, for B times as many bytes written. Nothing of this
// has a measured time.
#pragma once

#include "cuda/grid_plan.h"
#include "cuda/persistent_kernels.h"

namespace rnn_ext::cuda {

template <class Pointers>
struct GridLayer : PersistentLayer<Pointers> {
  int units, slices, groups;
  unsigned* flags;  // [directions][groups][kMaxGridSlices]: timesteps that a block has written
  void* exchange;   // T [directions][groups][2][columns * kGridRows], in GridProduct's order
};

// ---- products: sums[row][j] of each warp = the part of weight[j][:] x[:][row] that its columns give -----------------

// Tensor cores. Columns go in pairs of 16, lane l = 4 g + t: a fragment's word r holds row g + 8 (r % 2), columns 2 t +
// 8 (r / 2) and the next (see multiply_16x8).
template <class T>
struct GridProduct {
  static constexpr int kPairs = kHeldGridPairs;
  uint32_t held[kPairs][2][4];  // of the first 16 rows, the first kPairs pairs of this warp

  // Where column k of a row lies in x: a lane takes four words, its share of both halves of a pair, at once.
  static RNN_EXT_DEVICE int place(int k, int row) {
    const int half = k / 16 % 2, upper = k / 8 % 2, lane = row * 4 + k % 8 / 2;
    return ((k / kGridChunk * 32 + lane) * 4 + half * 2 + upper) * 2 + k % 2;
  }

  // source(j, k): the weight's value, zero outside. `along_rows`: in which direction neighbours lie side by side.
  template <class Source>
  RNN_EXT_DEVICE void load(unsigned char* weight, const Source& source, int rows, int columns, bool along_rows) {
    auto* words = reinterpret_cast<uint32_t*>(weight);
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, threads = static_cast<int>(blockDim.x);
    const auto word = [&](int j, int k) { return pack2(source(j, k), source(j, k + 1)); };
    const int pairs = columns / kGridChunk, kept = held_grid_pairs(columns);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int pair = i * kGridWarps + thread / 32;
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        const int j = lane / 4 + 8 * (r % 2), k = pair * kGridChunk + r / 4 * 16 + lane % 4 * 2 + 8 * (r / 2 % 2);
        held[i][r / 4][r % 4] = pair < pairs ? word(j, k) : 0;
      }
    }
    const int all_rows = static_cast<int>(grid_weight_rows(sizeof(T), rows)), half = columns / 2;
    for (int i = thread; i < all_rows * half; i += threads) {
      const int j = along_rows ? i % all_rows : i / half, k = 2 * (along_rows ? i / all_rows : i % half);
      const int fragment = j / kFragmentRows * pairs + k / kGridChunk - kept;
      if (fragment < 0) continue;
      const int r = j / 8 % 2 + 2 * (k / 8 % 2);
      words[((fragment * 2 + k / 16 % 2) * 32 + j % 8 * 4 + k % 8 / 2) * 4 + r] = word(j, k);
    }
  }

  // x: [columns * kGridRows], written by other blocks. sums: [kGridRows][grid_pitch(rows)] of this warp.
  RNN_EXT_DEVICE void run(const unsigned char* weight, const T* x, float* sums, int rows, int columns) const {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int pairs = columns / kGridChunk, kept = held_grid_pairs(columns);
    const auto* fragments = reinterpret_cast<const uint4*>(weight);
    const auto* words = reinterpret_cast<const uint4*>(x);
    for (int first = warp; first < pairs; first += kPairs * kGridWarps) {
      const bool begins = first == warp;
      uint4 b[kPairs];
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const int pair = first + i * kGridWarps;
        b[i] = pair < pairs ? __ldcg(words + pair * 32 + lane) : uint4{0, 0, 0, 0};
      }
      for (int tile = 0; tile < rows; tile += kFragmentRows) {
        float even[4] = {}, odd[4] = {};
        if (begins && tile == 0) {
#pragma unroll
          for (int i = 0; i < kPairs; ++i) {
            if (first + i * kGridWarps < pairs) {
              multiply_16x8<T>(even, held[i][0], b[i].x, b[i].y);
              multiply_16x8<T>(odd, held[i][1], b[i].z, b[i].w);
            }
          }
        } else {
          const uint4* at = fragments + (tile / kFragmentRows * pairs - kept) * 64 + lane;
#pragma unroll
          for (int i = 0; i < kPairs; ++i) {
            const int pair = first + i * kGridWarps;
            if (pair < pairs) {
              const uint4 low = at[pair * 64], high = at[pair * 64 + 32];
              const uint32_t a[2][4] = {{low.x, low.y, low.z, low.w}, {high.x, high.y, high.z, high.w}};
              multiply_16x8<T>(even, a[0], b[i].x, b[i].y);
              multiply_16x8<T>(odd, a[1], b[i].z, b[i].w);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int j = tile + lane / 4 + i / 2 * 8, row = lane % 4 * 2 + i % 2;
          if (j >= rows) continue;
          float& sum = sums[row * static_cast<int>(grid_pitch(rows)) + j];
          sum = (begins ? 0.f : sum) + (even[i] + odd[i]);
        }
      }
    }
  }
};

// Halves what a lane has of 32 sums and doubles what it stands for, until part[0] is the whole of sum number `lane`.
template <int kWidth>
RNN_EXT_DEVICE void reduce_to_own_sum(float (&part)[32], int lane) {
  const bool upper = lane & kWidth;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float keep = upper ? part[kWidth + i] : part[i], give = upper ? part[i] : part[kWidth + i];
    part[i] = keep + __shfl_xor_sync(kWholeWarp, give, kWidth);
  }
  if constexpr (kWidth > 1) reduce_to_own_sum<kWidth / 2>(part, lane);
}

// Plain FMAs. The weight lies as [j][k].
template <>
struct GridProduct<float> {
  static constexpr int kDepth = 8;              // columns of a lane at a time
  static constexpr int kTile = 32 / kGridRows;  // weight rows at a time: 32 sums, one for each lane in the end
  static constexpr int kStride = 32 * kGridWarps;

  static RNN_EXT_DEVICE int place(int k, int row) { return k * kGridRows + row; }

  template <class Source>
  RNN_EXT_DEVICE void load(unsigned char* weight, const Source& source, int rows, int columns, bool along_rows) {
    auto* values = reinterpret_cast<float*>(weight);
    const int threads = static_cast<int>(blockDim.x);
    for (int i = static_cast<int>(threadIdx.x); i < rows * columns; i += threads) {
      const int j = along_rows ? i % rows : i / columns, k = along_rows ? i / rows : i % columns;
      values[j * columns + k] = source(j, k);
    }
  }

  RNN_EXT_DEVICE void run(const unsigned char* weight, const float* x, float* sums, int rows, int columns) const {
    const auto* values = reinterpret_cast<const float*>(weight);
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    for (int first = thread; first < columns; first += kDepth * kStride) {  // the same for all lanes of a warp
      const bool begins = first == thread;
      float column[kDepth][kGridRows] = {};
#pragma unroll
      for (int i = 0; i < kDepth; ++i) {
        const int k = first + i * kStride;
        if (k >= columns) continue;
        const auto* from = reinterpret_cast<const float4*>(x + k * kGridRows);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float4 four = __ldcg(from + half);
          column[i][4 * half] = four.x;
          column[i][4 * half + 1] = four.y;
          column[i][4 * half + 2] = four.z;
          column[i][4 * half + 3] = four.w;
        }
      }
      for (int tile = 0; tile < rows; tile += kTile) {
        float part[32] = {};  // [j][row]
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
          const int k = first + i * kStride;
          if (k >= columns) continue;
#pragma unroll
          for (int j = 0; j < kTile; ++j) {
            const float w = values[(tile + j < rows ? tile + j : rows - 1) * columns + k];
#pragma unroll
            for (int row = 0; row < kGridRows; ++row) part[j * kGridRows + row] += w * column[i][row];
          }
        }
        reduce_to_own_sum<16>(part, lane);
        const int j = tile + lane / kGridRows;  // past the rows lies the padding of grid_pitch
        float& sum = sums[lane % kGridRows * static_cast<int>(grid_pitch(rows)) + j];
        sum = (begins ? 0.f : sum) + part[0];
      }
    }
  }
};

// ---- what a block is, forward and backward --------------------------------------------------------------------------

template <class T, bool kBackward, int kGates>
struct GridBlock {
  int rows, columns, pitch, active_warps;
  int units, slices;
  int local, row;  // this thread's unit of the block and row of a group
  int64_t unit;    // of the layer
  bool held;       // whether there is such a unit and row
  unsigned char* weight;
  float* sums;   // [active warps][kGridRows][pitch]
  float* state;  // [tiles][2][kGridThreads]: this thread's own
  unsigned* flags;
  T* exchange;

  template <class Layer>
  RNN_EXT_DEVICE GridBlock(const Layer& layer, unsigned char* memory) : units(layer.units), slices(layer.slices) {
    rows = static_cast<int>(grid_rows(kGates, kBackward, units));
    columns = static_cast<int>(grid_columns(kGates, kBackward, layer.hidden));
    pitch = static_cast<int>(grid_pitch(rows));
    active_warps = static_cast<int>(grid_active_warps(columns));
    local = static_cast<int>(threadIdx.x) % units;
    row = static_cast<int>(threadIdx.x) / units;
    unit = static_cast<int64_t>(blockIdx.x) * units + local;
    held = row < kGridRows && unit < layer.hidden;
    weight = memory;
    sums = reinterpret_cast<float*>(memory + grid_weight_bytes(sizeof(T), rows, columns));
    state = sums + active_warps * kGridRows * pitch + threadIdx.x;
    flags = layer.flags + static_cast<int64_t>(blockIdx.z) * layer.groups * kMaxGridSlices;
    exchange =
        static_cast<T*>(layer.exchange) + static_cast<int64_t>(blockIdx.z) * layer.groups * 2 * columns * kGridRows;
  }
  RNN_EXT_DEVICE float& state_of(int tile, int which) const { return state[(tile * 2 + which) * kGridThreads]; }
  RNN_EXT_DEVICE T* buffer(int group, int64_t step) const {
    return exchange + (static_cast<int64_t>(group) * 2 + (step & 1)) * columns * kGridRows;
  }
  // Waits until all blocks of the group have written what timestep `step` takes.
  RNN_EXT_DEVICE void wait(int group, int64_t step) const {
    const int threads = static_cast<int>(blockDim.x);
    for (int slice = static_cast<int>(threadIdx.x); slice < slices; slice += threads)
      wait_until(flags + group * kMaxGridSlices + slice, static_cast<unsigned>(step + 1));
    __syncthreads();  // what one thread has seen is for all to read
  }
  // Says that this block has. All its threads have passed a barrier since they wrote.
  RNN_EXT_DEVICE void tell(int group, int64_t step) const {
    if (threadIdx.x == 0) store_release(flags + group * kMaxGridSlices + blockIdx.x, static_cast<unsigned>(step + 1));
  }
  RNN_EXT_DEVICE float sum(int j) const {
    float total = 0;
    for (int warp = 0; warp < active_warps; ++warp) total += sums[(warp * kGridRows + row) * pitch + j];
    return total;
  }
  RNN_EXT_DEVICE float* own_sums() const {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    return sums + warp * kGridRows * pitch;
  }
};

// grid: (slices, blocks of groups, directions), all resident; block: grid_threads
template <class Cell, class T>
__global__ void __launch_bounds__(kGridThreads, 1)
    grid_forward_kernel(const __grid_constant__ GridLayer<ForwardPointers<T>> layer) {
  using A = AccumulatorOf<T>;
  constexpr int kGates = Cell::kGates;
  RNN_EXT_DYNAMIC_SHARED(memory);

  const ForwardPointers<T>& d = layer.direction[blockIdx.z].pointers;
  const bool reverse = layer.direction[blockIdx.z].reverse;
  const int64_t hidden = layer.hidden;
  const GridBlock<T, false, kGates> block(layer, memory);
  const int first_group = static_cast<int>(blockIdx.y), group_step = static_cast<int>(gridDim.y);

  GridProduct<T> product;
  const auto source = [&](int j, int64_t k) {
    const int64_t unit = static_cast<int64_t>(blockIdx.x) * block.units + j % block.units;
    const bool inside = j < block.rows && unit < hidden && k < hidden;
    return inside ? d.weight_hh[(j / block.units * hidden + unit) * hidden + k] : narrow<T>(A(0));
  };
  product.load(block.weight, source, block.rows, block.columns, false);
  A bias[kGates];
#pragma unroll
  for (int g = 0; g < kGates; ++g) bias[g] = block.held ? value_or_zero(d.bias_hh, g * hidden + block.unit) : A(0);

  for (int tile = 0, group = first_group; group < layer.groups; ++tile, group += group_step) {
    if (!block.held) continue;
    const int64_t n = static_cast<int64_t>(group) * kGridRows + block.row, state = n * hidden + block.unit;
    const bool mine = n < layer.batch;
    const A h = mine ? value_or_zero(d.h_0, state) : A(0);
    block.state_of(tile, 0) = h;
    if constexpr (Cell::kHasCell) block.state_of(tile, 1) = mine ? value_or_zero(d.c_0, state) : A(0);
    block.buffer(group, 0)[GridProduct<T>::place(static_cast<int>(block.unit), block.row)] = narrow<T>(h);
  }
  __syncthreads();  // all is written that the other blocks read; the weight too
  for (int group = first_group; group < layer.groups; group += group_step) block.tell(group, 0);

  for (int64_t step = 0; step < layer.length; ++step) {
    const int64_t time = reverse ? layer.length - 1 - step : step;
    for (int tile = 0, group = first_group; group < layer.groups; ++tile, group += group_step) {
      const BatchRow row(layer, static_cast<int64_t>(group) * kGridRows + block.row);
      const bool mine = block.held && row.n < layer.batch, active = mine && row.exists(time);
      const int64_t at = mine && (active || !layer.row_offsets) ? row.row(layer, time) : 0;
      A igates[kGates] = {};
      if (active) {  // they travel while this block waits for the others
        const T* from = d.igates + at * d.igates_stride + block.unit;
#pragma unroll
        for (int g = 0; g < kGates; ++g) igates[g] = widen(from[g * hidden]);
      }
      block.wait(group, step);
      product.run(block.weight, block.buffer(group, step), block.own_sums(), block.rows, block.columns);
      __syncthreads();  // all warps' sums are there

      if (block.held) {
        A h = block.state_of(tile, 0), c = 0;
        if constexpr (Cell::kHasCell) c = block.state_of(tile, 1);
        if (active) {
          A gates[kGates], saved[kSavedSlots<Cell>];
#pragma unroll
          for (int g = 0; g < kGates; ++g) gates[g] = block.sum(g * block.units + block.local);
          run_cell<Cell>(gates, bias, igates, row.begins(layer, reverse ? time + 1 : time), h, c, saved);
          store_forward<Cell>(d, at, hidden, block.unit, h, c, saved);
          block.state_of(tile, 0) = h;
          if constexpr (Cell::kHasCell) block.state_of(tile, 1) = c;
        } else if (mine && !layer.row_offsets) {
          d.output[at * d.output_stride + block.unit] = narrow<T>(A(0));
        }
        block.buffer(group, step + 1)[GridProduct<T>::place(static_cast<int>(block.unit), block.row)] = narrow<T>(h);
      }
      __syncthreads();  // h is written for the other blocks, and the sums have been read
      block.tell(group, step + 1);
    }
  }

  for (int tile = 0, group = first_group; group < layer.groups; ++tile, group += group_step) {
    const int64_t n = static_cast<int64_t>(group) * kGridRows + block.row, state = n * hidden + block.unit;
    if (!block.held || n >= layer.batch) continue;
    d.h_n[state] = narrow<T>(block.state_of(tile, 0));
    if constexpr (Cell::kHasCell) d.c_n[state] = narrow<T>(block.state_of(tile, 1));
  }
}

// grid and block as forward. Runs forward's timesteps from the last to the first; one more round gives dh_0.
template <class Cell, class T>
__global__ void __launch_bounds__(kGridThreads, 1)
    grid_backward_kernel(const __grid_constant__ GridLayer<BackwardPointers<T>> layer) {
  using A = AccumulatorOf<T>;
  constexpr int kGates = Cell::kGates, kGradGates = Cell::kGradGates;
  RNN_EXT_DYNAMIC_SHARED(memory);

  const BackwardPointers<T>& d = layer.direction[blockIdx.z].pointers;
  const bool reverse = layer.direction[blockIdx.z].reverse;
  const int64_t hidden = layer.hidden;
  const GridBlock<T, true, kGates> block(layer, memory);
  const int first_group = static_cast<int>(blockIdx.y), group_step = static_cast<int>(gridDim.y);
  const int padded = block.columns / kGates;  // columns of a gate

  GridProduct<T> product;
  const auto source = [&](int j, int64_t column) {
    const int64_t unit = static_cast<int64_t>(blockIdx.x) * block.units + j, gate = column / padded,
                  k = column % padded;
    const bool inside = unit < hidden && k < hidden;  // rows past the block's are summed up by nobody
    return inside ? d.weight_hh[(gate * hidden + k) * hidden + unit] : narrow<T>(A(0));
  };
  product.load(block.weight, source, block.rows, block.columns, true);

  for (int tile = 0, group = first_group; group < layer.groups; ++tile, group += group_step) {
    const int64_t n = static_cast<int64_t>(group) * kGridRows + block.row, state = n * hidden + block.unit;
    const bool mine = block.held && n < layer.batch;
    block.state_of(tile, 0) = mine ? value_or_zero(d.dh_n, state) : A(0);  // dh without what passes the weight
    if constexpr (Cell::kHasCell) block.state_of(tile, 1) = mine ? value_or_zero(d.dc_n, state) : A(0);
  }

  // The first round multiplies nothing; its barrier makes the weight whole.
  for (int64_t step = 0; step <= layer.length; ++step) {
    const int64_t time = reverse ? step : layer.length - 1 - step;  // -1 or L in the last round
    const int64_t after = reverse ? time - 1 : time + 1;
    const bool inside = time >= 0 && time < layer.length;
    for (int tile = 0, group = first_group; group < layer.groups; ++tile, group += group_step) {
      const BatchRow row(layer, static_cast<int64_t>(group) * kGridRows + block.row);
      const bool mine = block.held && row.n < layer.batch, active = mine && row.exists(time);
      const int64_t at = mine && inside && (active || !layer.row_offsets) ? row.row(layer, time) : 0;

      BackwardUnit<Cell, T> own;
      if (active) own.load(d, layer, reverse, row, time, at, block.unit);  // travels while this block waits for others
      if (step > 0) {  // before the first there are no gate gradients
        block.wait(group, step - 1);
        product.run(block.weight, block.buffer(group, step), block.own_sums(), block.rows, block.columns);
        __syncthreads();  // all warps' sums are there
      }

      if (block.held) {
        // The product of a row that has no timestep after this one is zero: its gate gradients were.
        const bool cut = row.exists(after) && row.begins(layer, reverse ? time : after);
        A dh = cut ? A(0) : (step > 0 ? block.sum(block.local) : A(0)) + block.state_of(tile, 0), dc = 0;
        if constexpr (Cell::kHasCell) dc = cut ? A(0) : block.state_of(tile, 1);
        A dgates[kGradGates] = {};
        if (active) dh = own.run(dh, dc, dgates);
        block.state_of(tile, 0) = dh;  // where the row has no timestep its state stood still
        if constexpr (Cell::kHasCell) block.state_of(tile, 1) = dc;
        if (mine && inside && (active || !layer.row_offsets)) store_dgates<Cell>(d, at, hidden, block.unit, dgates);
        T* to = block.buffer(group, step + 1);
#pragma unroll
        for (int g = 0; g < kGates; ++g) {
          const int k = g * padded + static_cast<int>(block.unit);
          to[GridProduct<T>::place(k, block.row)] = narrow<T>(dgates[Cell::hh_slot(g)]);
        }
      }
      __syncthreads();  // gate gradients are written for the other blocks, and the sums have been read
      block.tell(group, step);
    }
  }

  for (int tile = 0, group = first_group; group < layer.groups; ++tile, group += group_step) {
    const int64_t n = static_cast<int64_t>(group) * kGridRows + block.row, state = n * hidden + block.unit;
    if (!block.held || n >= layer.batch) continue;
    d.dh_0[state] = narrow<T>(block.state_of(tile, 0));
    if constexpr (Cell::kHasCell) d.dc_0[state] = narrow<T>(block.state_of(tile, 1));
  }
}

}  // namespace rnn_ext::cuda
