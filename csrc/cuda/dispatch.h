// Which kernel runs what, and why. The table is read from the top: the first row that applies is taken.
//
// Capacity decides the first rows and is exact. The others rest on counts of operations and bytes (see the headers of
// the kernels) and on published launch costs, not on measurements of these kernels: a GPU run is to confirm or move
// them.
#pragma once

#include "cuda/cluster_entries.h"
#include "cuda/grid_plan.h"
#include "cuda/launch.h"
#include "cuda/persistent_entries.h"
#include "cuda/tensor_entries.h"

namespace rnn_ext::cuda {

struct Question : RnnExtQuestion {  // shared_bytes stands for the architecture
  bool this_device;                 // of which more can be asked
};

// A block of `persistent` serves 4 rows. Four rounds of blocks on about 130 multiprocessors take 4 s G H^2 / 128 clocks
// of shared-memory reads a step, which for the largest weights is what two launches and a library GEMM take (5 to 8
// us).
inline constexpr int64_t kMaxPersistentRows = 4 * 4 * 130;
// A block of `tensor` serves twice as many rows.
inline constexpr int64_t kMaxTensorRows = 2 * kMaxPersistentRows;
// A cluster serves 8 rows. Four rounds of as many clusters as about 130 multiprocessors hold, half a microsecond a step
// each (in TF32, with twice as many products, somewhat more), are what a launch and a library GEMM take.
constexpr int64_t max_cluster_rows(int blocks) { return 4 * kClusterRows * (128 / blocks); }
// What two launches and a library GEMM take (5 to 8 us), in clocks that `grid` may take for a timestep.
inline constexpr int64_t kMaxGridClocks = 10000;
// Its workspace is set to zero first, one launch more, and its weight and first exchange come before the first
// timestep.
inline constexpr int64_t kMinGridLength = 4;
// Up to one row tile `step` reads the weight once, as a GEMM would, and saves a launch.
inline constexpr int64_t kMaxStepRows = 32;
// Below this the product is smaller than the launch that it would cost to have it from the library.
inline constexpr int64_t kMinLibraryHidden = 256;

inline bool persistent_fits(const Question& q) {
  return q.variant == RNN_EXT_PLAIN &&
         rnn_ext_cuda_persistent_fits(q.cell, q.dtype, q.hidden, q.backward, q.shared_bytes) != 0;
}

inline bool tensor_fits(const Question& q) {
  return q.variant == RNN_EXT_PLAIN && q.hidden <= max_tensor_hidden(q.cell, q.dtype) &&
         q.batch * q.directions <= kMaxTensorRows;
}

inline int64_t value_bytes_of(RnnExtDtype dtype) {
  return dtype == RNN_EXT_FLOAT64 ? 8 : dtype == RNN_EXT_FLOAT32 ? 4 : 2;
}

inline bool cluster_fits(const Question& q) {
  const int blocks = cluster_blocks(gates_of(q.cell), value_bytes_of(q.dtype), q.hidden);
  return q.variant == RNN_EXT_PLAIN &&
         q.hidden > max_tensor_hidden(q.cell, q.dtype) &&  // what fits one block stays there
         q.batch * q.directions <= max_cluster_rows(blocks) &&
         rnn_ext_cuda_cluster_fits(q.cell, q.dtype, q.hidden, q.backward, q.this_device ? 0 : q.shared_bytes) != 0;
}

inline GridProblem grid_problem(const Question& q) {
  return {gates_of(q.cell), value_bytes_of(q.dtype), q.backward != 0, q.batch, q.hidden, q.directions};
}

inline bool grid_fits(const Question& q) {
  if (q.variant != RNN_EXT_PLAIN || q.dtype == RNN_EXT_FLOAT64 || q.length < kMinGridLength) return false;
  const GridPlan plan = grid_plan(grid_problem(q), {q.multiprocessors, q.shared_bytes});
  return plan.units > 0 && plan.clocks <= kMaxGridClocks;
}

struct DispatchRow {
  bool (*applies)(const Question&);
  RnnExtKernel kernel;
  const char* reason;
};

inline constexpr DispatchRow kDispatchTable[] = {
    {[](const Question& q) { return q.projected != 0; }, RNN_EXT_KERNEL_POINTWISE,
     "a projection is a product between two timesteps: both go to the library"},
    {[](const Question& q) { return q.variant == RNN_EXT_LAYER_NORM; }, RNN_EXT_KERNEL_POINTWISE,
     "layer normalisation takes means over a whole row of the product: a library GEMM and one kernel by rows"},
    {[](const Question& q) { return q.dtype != RNN_EXT_FLOAT32 && tensor_fits(q); }, RNN_EXT_KERNEL_TENSOR,
     "the recurrent weight fits one block's registers, as tensor cores take it: one launch"},
    {[](const Question& q) { return q.dtype == RNN_EXT_FLOAT32 && q.allow_tf32 && tensor_fits(q); },
     RNN_EXT_KERNEL_TENSOR, "torch allows TF32, and the recurrent weight fits one block's registers in it: one launch"},
    {[](const Question& q) { return q.dtype != RNN_EXT_FLOAT32 && cluster_fits(q); }, RNN_EXT_KERNEL_CLUSTER,
     "the recurrent weight fits the registers of a few blocks, which exchange the state as a cluster: one launch"},
    {[](const Question& q) { return q.dtype == RNN_EXT_FLOAT32 && q.allow_tf32 && cluster_fits(q); },
     RNN_EXT_KERNEL_CLUSTER,
     "torch allows TF32, and the recurrent weight fits the registers of a cluster of blocks in it: one launch"},
    {[](const Question& q) { return persistent_fits(q) && q.batch * q.directions <= kMaxPersistentRows; },
     RNN_EXT_KERNEL_PERSISTENT, "the recurrent weight fits one block's shared memory: one launch for all timesteps"},
    {[](const Question& q) { return grid_fits(q); }, RNN_EXT_KERNEL_GRID,
     "the recurrent weight fits the multiprocessors' shared memory together: one launch whose blocks exchange h"},
    {[](const Question& q) { return q.batch <= kMaxStepRows; }, RNN_EXT_KERNEL_STEP,
     "few rows: reading the weight bounds a timestep, and one fused launch reads it once"},
    {[](const Question& q) { return q.hidden < kMinLibraryHidden; }, RNN_EXT_KERNEL_STEP,
     "a small product: a second launch for a library GEMM would cost more than it saves"},
    {[](const Question&) { return true; }, RNN_EXT_KERNEL_POINTWISE,
     "a large product: a library GEMM and one fused pointwise kernel"},
};

inline const DispatchRow& dispatch(const Question& question) {
  const DispatchRow* row = kDispatchTable;
  while (!row->applies(question)) ++row;  // the last row always applies
  return *row;
}

}  // namespace rnn_ext::cuda
