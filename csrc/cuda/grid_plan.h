// How `grid` divides a layer over the blocks of a device: pure integer logic, for the launcher and the dispatch table.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/for_cell.h"

namespace rnn_ext::cuda {

inline constexpr int kGridWarps = 8, kGridThreads = 32 * kGridWarps;
inline constexpr int kGridRows = 8;                             // batch rows of a group: the N of a tensor core product
inline constexpr int kMaxGridUnits = kGridThreads / kGridRows;  // a thread for each (unit, row)
inline constexpr int kMinGridUnits = 4;                         // fewer would leave most of a product's tile empty
inline constexpr int kMaxGridSlices = kGridThreads;             // a thread for each flag of a group
inline constexpr int kGridChunk = 32;                           // columns that a warp takes at a time
inline constexpr int64_t kGridStateBytes = 2 * kGridThreads * 4;  // two float32 values for each (unit, row)
inline constexpr int kFragmentRows = 16;                          // weight rows of a tensor core product

RNN_EXT_HD constexpr int64_t rounded_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// What a block multiplies: `rows` of the weight's values by `columns` of exchanged ones. Forward: its units' gates by
// h; backward: its units by all gate gradients.
RNN_EXT_HD constexpr int64_t grid_rows(int gates, bool backward, int64_t units) {
  return backward ? units : gates * units;
}
RNN_EXT_HD constexpr int64_t grid_columns(int gates, bool backward, int64_t hidden) {
  return (backward ? gates : 1) * rounded_up(hidden, kGridChunk);
}
// Rows as they lie in shared memory, and those of a warp's sums: an odd multiple of 4 keeps 8 of them in different
// banks.
RNN_EXT_HD constexpr int64_t grid_weight_rows(int64_t value_bytes, int64_t rows) {
  return value_bytes == 2 ? rounded_up(rows, kFragmentRows) : rows;
}
RNN_EXT_HD constexpr int64_t grid_pitch(int64_t rows) { return ((rows + 3) / 4 | 1) * 4; }
// Of the 16-bit types, each warp holds the first 16 rows of so many of its chunks in registers (see GridProduct).
inline constexpr int kHeldGridPairs = 8;
RNN_EXT_HD constexpr int held_grid_pairs(int64_t columns) {
  const int64_t chunks = columns / kGridChunk, most = kHeldGridPairs * kGridWarps;
  return static_cast<int>(chunks < most ? chunks : most);
}
RNN_EXT_HD constexpr int64_t grid_weight_bytes(int64_t value_bytes, int64_t rows, int64_t columns) {
  const int64_t all = grid_weight_rows(value_bytes, rows) * columns * value_bytes;
  return value_bytes == 2 ? all - held_grid_pairs(columns) * kGridChunk * kFragmentRows * value_bytes : all;
}
// Warps that have columns.
RNN_EXT_HD constexpr int64_t grid_active_warps(int64_t columns) {
  return columns / kGridChunk < kGridWarps ? columns / kGridChunk : kGridWarps;
}

// Of a block: warps for all columns, threads for all of its units and rows.
inline int grid_threads(int64_t columns, int64_t units) {
  return static_cast<int>(32 * std::max(grid_active_warps(columns), rounded_up(units * kGridRows, 32) / 32));
}

inline int gates_of(RnnExtCell cell) {
  return for_cell(cell, [](auto of) { return decltype(of)::kGates; });
}

struct GridProblem {
  int gates;
  int64_t value_bytes;  // of the storage type
  bool backward;
  int64_t batch, hidden;
  int directions;

  int64_t groups() const { return (batch + kGridRows - 1) / kGridRows; }
  int64_t columns() const { return grid_columns(gates, backward, hidden); }
};

struct GridDevice {
  int64_t multiprocessors, shared_bytes;  // of a block
};

// A block holds the weight of `units` units and serves `tiles` groups of kGridRows batch rows in turn.
struct GridPlan {
  int64_t units = 0, slices = 0;        // of the hidden units; 0: there is no plan
  int64_t group_blocks = 0, tiles = 0;  // how many blocks share the groups of a slice, and how many groups each has
  int64_t shared_bytes = 0;
  int64_t clocks = 0;  // of a timestep, as the kernels' header counts them

  int64_t blocks(int directions) const { return slices * group_blocks * directions; }
};

// Estimates: what a group costs besides its product (barriers, the cell, what of the exchange nothing hides), and what
// a multiprocessor gets from L2 where all of them read.
inline constexpr int64_t kGridTileClocks = 1000;
inline constexpr int64_t kGridBytesPerClock = 32;

inline GridPlan grid_plan_of(const GridProblem& problem, int64_t units, int64_t group_blocks) {
  GridPlan plan;
  plan.units = units;
  plan.slices = (problem.hidden + units - 1) / units;
  plan.tiles = (problem.groups() + group_blocks - 1) / group_blocks;
  plan.group_blocks = (problem.groups() + plan.tiles - 1) / plan.tiles;
  const int64_t rows = grid_rows(problem.gates, problem.backward, units), columns = problem.columns();
  plan.shared_bytes = grid_weight_bytes(problem.value_bytes, rows, columns) +
                      grid_active_warps(columns) * kGridRows * grid_pitch(rows) * 4 + plan.tiles * kGridStateBytes;
  const int64_t values_per_clock = problem.value_bytes == 2 ? 64 : 16;
  plan.clocks = plan.tiles * (grid_weight_rows(problem.value_bytes, rows) * columns / values_per_clock +
                              columns * kGridRows * problem.value_bytes / kGridBytesPerClock + kGridTileClocks);
  return plan;
}

// The plan with the most groups side by side, since what blocks read of each other is all rows of their groups. Every
// block needs a multiprocessor to itself. `units`: 0, or those of a block.
inline GridPlan grid_plan(const GridProblem& problem, const GridDevice& device, int64_t units = 0) {
  const int64_t available = device.multiprocessors / problem.directions;
  for (int64_t group_blocks = std::min(problem.groups(), available); group_blocks > 0; --group_blocks) {
    const int64_t slices = std::min<int64_t>(available / group_blocks, kMaxGridSlices);
    const int64_t least = std::max<int64_t>((problem.hidden + slices - 1) / slices, kMinGridUnits);
    const GridPlan plan = grid_plan_of(problem, units > 0 ? units : least, group_blocks);
    if (plan.units <= kMaxGridUnits && plan.slices <= slices && plan.shared_bytes <= device.shared_bytes) return plan;
  }
  return {};
}

// Bytes of the workspace: the flags, then the exchanged values of two timesteps.
inline int64_t grid_flag_bytes(const GridProblem& problem) {
  return problem.directions * problem.groups() * kMaxGridSlices * static_cast<int64_t>(sizeof(unsigned));
}
inline int64_t grid_workspace_bytes(const GridProblem& problem) {
  return grid_flag_bytes(problem) +
         problem.directions * problem.groups() * 2 * problem.columns() * kGridRows * problem.value_bytes;
}

}  // namespace rnn_ext::cuda
