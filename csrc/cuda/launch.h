// The C interface of the CUDA kernels: plain structs of pointers and sizes. Nothing throws; every function returns 0,
// or 1 with a sentence in `error`. All pointers are device memory unless said otherwise, owned by the caller, and stay
// valid until the stream has passed the launches. Nothing synchronises: calls can be captured in a CUDA graph, which
// then holds the numbers that lie on the host.
//
// Letters: L timesteps, N batch, H hidden, G gates, R rows (a row is one (timestep, batch) pair that has storage),
// S saved values per unit, Q gate gradients per unit. T is the storage type, A its accumulator (double for double, else
// float).
//   cell       G  S  Q   saved                                  dgates
//   rnn_tanh   1  0  1   -                                      d gates
//   rnn_relu   1  0  1   -                                      d gates
//   gru        3  4  4   r z n, W_hn h + b_hn                   dr dz, d of the input part of n, d of its hidden part
//   lstm       4  4  4   i f g o (the cell state is in `cells`) di df dg do
// Variants (csrc/cells/variants.h). MASKED: S is 1 for rnn (h before zoneout) and 5 for lstm (its c before zoneout),
// the rest is the cell's. LAYER_NORM, lstm: S 8, LN(W_ih x) and LN(W_hh h_prev); Q 14, in the order of LayerNormLstm.
#pragma once

#include <stdint.h>

#include "cells/list.h"

#ifdef __cplusplus
extern "C" {
#endif

#define RNN_EXT_NUMBER(Cell, NAME) RNN_EXT_##NAME,
typedef enum RnnExtCell { RNN_EXT_FOR_EACH_CELL(RNN_EXT_NUMBER) } RnnExtCell;
#undef RNN_EXT_NUMBER
typedef enum RnnExtVariant { RNN_EXT_PLAIN, RNN_EXT_MASKED, RNN_EXT_LAYER_NORM } RnnExtVariant;
typedef enum RnnExtDtype { RNN_EXT_FLOAT32, RNN_EXT_FLOAT64, RNN_EXT_BFLOAT16, RNN_EXT_FLOAT16 } RnnExtDtype;

typedef struct RnnExtError {
  char message[256];
} RnnExtError;

// Which rows exist and where they lie: row(t, n) = (batch_sizes ? sum of batch_sizes[0..t) : t * time_stride) + n *
// batch_stride. Time-major: time_stride = N, batch_stride = 1. Batch-first: time_stride = 1, batch_stride = L. Packed:
// batch_stride = 1.
typedef struct RnnExtSequence {
  int64_t length, batch, hidden;
  int64_t time_stride, batch_stride;
  const int64_t* batch_sizes;  // [L] on the host, or null: not packed. Positive, non-increasing, batch_sizes[0] = N.
  const int64_t*
      row_offsets;         // [L] on the device, the first row of each timestep; only persistent kernels, packed data
  const int64_t* lengths;  // [N] or null: row (t, n) exists where t < lengths[n]; elsewhere output and dgates are zero
                           //   and the state stands still. Packed data gives it to persistent kernels only.
  const uint8_t* resets;   // [L, N] or null: nonzero where an independent sequence begins
  int64_t resets_time_stride, resets_batch_stride;
} RnnExtSequence;

// What holds or drops a state: for MASKED and LAYER_NORM, each may be null.
typedef struct RnnExtMasks {
  const void* hidden;  // A [N, H], factors of the h_prev that W_hh multiplies
  const void*
      zoneout_h;  // A [R, H], the share of h that stays what it was before the timestep; projected: of a call of
                  //   its own (rnn_ext_cuda_projected_*)
  int64_t zoneout_h_stride;
  const void* zoneout_c;  // A [R, H], the same of c
  int64_t zoneout_c_stride;
} RnnExtMasks;

// For LAYER_NORM.
enum { RNN_EXT_NORM_STATISTICS = 4, RNN_EXT_NORM_SCRATCH = 7 };
typedef struct RnnExtNorm {
  const void* weight_ih;  // T [4*H], the scales of LN(W_ih x)
  const void* weight_hh;  // T [4*H], of LN(W_hh h_prev)
  const void* weight_c;   // T [H], of LN(c)
  const void* bias_c;     // T [H]
  const void* bias_ih;    // T [4*H] or null; igates and hgates are without bias. bias_hh too
  const void* bias_hh;
  void* statistics;  // A [R, 4] or null: inference. In the order of LayerNormLstm.
  void* scratch;     // A [N, 7, H]
} RnnExtNorm;

typedef struct RnnExtForwardDirection {
  int32_t reverse;        // from the last timestep to the first
  const void* igates;     // T [R, G*H], W_ih x + b_ih
  int64_t igates_stride;  // elements from row to row, here and below
  const void* weight_hh;  // T [G*H, H]
  const void* bias_hh;    // T [G*H] or null
  const void* hgates;  // T [N, G*H] or null. W_hh h_prev (no bias) of the timestep, computed by the caller: then a call
                       //   runs one step and weight_hh is not read.
  const void* h_0;     // T [N, H] or null: zeros
  const void* c_0;     // T [N, H] or null: zeros
  void* output;        // T [R, H]
  int64_t output_stride;
  void* h_n;         // T [N, H]; with hgates the running state, written at every step
  void* c_n;         // T [N, H], cells with a cell state
  void* saved;       // T [R, S, H] or null: inference
  void* cells;       // A [R, H] or null: inference. The cell state of every row.
  void* cell_state;  // A [N, H], scratch; where there is a cell state and `cells` is null
  void* h_state;     // A [N, H], scratch or null: h as it goes on where the product does not read it (the gru's direct
                     //   way, zoneout). Null: from `output`, whose 16 bits would lose small changes at every step
  RnnExtMasks masks;
  void* h_masked;  // T [N, H] or null: with hgates, h_n times masks.hidden, written at every step
  RnnExtNorm norm;
} RnnExtForwardDirection;

typedef struct RnnExtForward {
  RnnExtCell cell;
  RnnExtDtype dtype;
  RnnExtSequence sequence;
  int32_t directions;  // 1 or 2, run side by side
  RnnExtVariant variant;
  RnnExtForwardDirection direction[2];
} RnnExtForward;

typedef struct RnnExtBackwardDirection {
  int32_t reverse;        // as in forward
  const void* weight_hh;  // T [G*H, H]
  const void*
      dh_recurrent;  // T [N, H] or null. What the later step's dgates give back through W_hh, computed by the caller:
                     //   then a call runs one step and weight_hh is not read.
  const void* h_0;   // T [N, H] or null, as in forward; c_0 too
  const void* c_0;
  const void* output;  // T [R, H], of forward
  int64_t output_stride;
  const void* saved;    // T [R, S, H], of forward
  const void* cells;    // A [R, H], of forward
  const void* doutput;  // T [R, H] or null: zeros; also the four below
  int64_t doutput_stride;
  const void* dcells;  // T [R, H], gradient of the cell states
  int64_t dcells_stride;
  const void* dh_n;  // T [N, H]
  const void* dc_n;  // T [N, H]
  void* dgates;      // T [R, Q*H]
  int64_t dgates_stride;
  void* dh_carry;  // A [N, H], scratch: the part of dh_prev that does not pass W_hh (gru, variants)
  void* dc_carry;  // A [N, H], scratch: dc (lstm)
  void* dh_0;      // T [N, H]
  void* dc_0;      // T [N, H], cells with a cell state
  RnnExtMasks masks;
  RnnExtNorm norm;
} RnnExtBackwardDirection;

typedef struct RnnExtBackward {
  RnnExtCell cell;
  RnnExtDtype dtype;
  RnnExtSequence sequence;
  int32_t directions;
  RnnExtVariant variant;
  RnnExtBackwardDirection direction[2];
} RnnExtBackward;

// Makes the device current for the launches to come. The caller's CUDA runtime may be another one than the kernels'.
int rnn_ext_cuda_set_device(int32_t device, RnnExtError* error);
// 1 if the stream is being captured in a CUDA graph, which could not copy from the host again, else 0.
int rnn_ext_cuda_is_capturing(void* stream);
// Whether there is such a device and the kernels have code for it; leaves the current device as it is.
int rnn_ext_cuda_check_device(int32_t device, RnnExtError* error);

// `step`: one launch per timestep, of any variant (LAYER_NORM: with hgates and dh_recurrent). Steps are counted in the
// order they are computed: forward has L of them; backward has L + 1, the last of which finishes dh_0 and dc_0.
// [first_step, last_step) is run; a whole layer is [0, L) and [0, L + 1).
int rnn_ext_cuda_step_forward(const RnnExtForward* args, int64_t first_step, int64_t last_step, void* stream,
                              RnnExtError* error);
int rnn_ext_cuda_step_backward(const RnnExtBackward* args, int64_t first_step, int64_t last_step, void* stream,
                               RnnExtError* error);

// The state of a projected layer's variant at one timestep; args.sequence.hidden is P, the cell is not looked at.
// Forward: `output` holds the projection of the timestep and gets h; h_n and h_masked go on. Needs masks, h_0, output,
// h_n, h_masked. Backward, one more step than forward: `dgates` (Q = 1) gets the gradient of the projection. Needs
// masks, dh_recurrent, doutput, dh_n, dgates, dh_carry, dh_0.
int rnn_ext_cuda_projected_forward(const RnnExtForward* args, int64_t step, void* stream, RnnExtError* error);
int rnn_ext_cuda_projected_backward(const RnnExtBackward* args, int64_t step, void* stream, RnnExtError* error);

// `persistent`: all timesteps and directions in one launch, the recurrent weight in shared memory. float32, bfloat16
// and float16, hidden sizes whose weight fits (see `fits`); hgates, dh_recurrent, cell_state and the carries are not
// used. Packed data needs batch_sizes, row_offsets and lengths.
int rnn_ext_cuda_persistent_forward(const RnnExtForward* args, void* stream, RnnExtError* error);
int rnn_ext_cuda_persistent_backward(const RnnExtBackward* args, void* stream, RnnExtError* error);
// `tensor`: as `persistent`, on tensor cores; hidden sizes up to 128. float32 is multiplied in TF32 (the caller has
// asked whether it may be), and ends at 64 (lstm) or 96 (gru). Any kernel's backward can follow any kernel's forward.
int rnn_ext_cuda_tensor_forward(const RnnExtForward* args, void* stream, RnnExtError* error);
int rnn_ext_cuda_tensor_backward(const RnnExtBackward* args, void* stream, RnnExtError* error);
// `cluster`: as `persistent`, on tensor cores, the weight in the registers of several blocks, which exchange the state;
// hidden sizes up to 512, sm_90 and later, where the device can hold such a cluster (see `fits`). float32 in TF32, as
// in `tensor`, and up to 384 (gru, lstm).
int rnn_ext_cuda_cluster_forward(const RnnExtForward* args, void* stream, RnnExtError* error);
int rnn_ext_cuda_cluster_backward(const RnnExtBackward* args, void* stream, RnnExtError* error);
// 1 if the kernel can run this on a device whose blocks have so much shared memory, else 0.
int rnn_ext_cuda_persistent_fits(RnnExtCell cell, RnnExtDtype dtype, int64_t hidden, int32_t backward,
                                 int64_t shared_bytes);
// The same; 0 bytes ask the current device, which alone knows how large its clusters can be.
int rnn_ext_cuda_cluster_fits(RnnExtCell cell, RnnExtDtype dtype, int64_t hidden, int32_t backward,
                              int64_t shared_bytes);

// `grid`: as `persistent`, the recurrent weight spread over blocks that wait for each other: float32, bfloat16 and
// float16, hidden sizes whose weight fits the multiprocessors' shared memory together. An error where the blocks could
// not all be resident. `units`: hidden units of a block; 0: what fills the device, as is meant. The workspace is the
// caller's, device memory aligned to 16 bytes, of so many bytes as grid_workspace says, and all zero when the kernel
// begins: flags and values that blocks exchange. It holds nothing afterwards.
int64_t rnn_ext_cuda_grid_workspace(RnnExtCell cell, RnnExtDtype dtype, int64_t batch, int64_t hidden,
                                    int32_t directions, int32_t backward);
int rnn_ext_cuda_grid_forward(const RnnExtForward* args, int64_t units, void* workspace, void* stream,
                              RnnExtError* error);
int rnn_ext_cuda_grid_backward(const RnnExtBackward* args, int64_t units, void* workspace, void* stream,
                               RnnExtError* error);

// Which of the kernels above is meant for a layer (csrc/cuda/dispatch.h), with a sentence that says why. POINTWISE:
// `step` with hgates or dh_recurrent from a library GEMM.
typedef enum RnnExtKernel {
  RNN_EXT_KERNEL_STEP,
  RNN_EXT_KERNEL_POINTWISE,
  RNN_EXT_KERNEL_PERSISTENT,
  RNN_EXT_KERNEL_TENSOR,
  RNN_EXT_KERNEL_CLUSTER,
  RNN_EXT_KERNEL_GRID
} RnnExtKernel;
typedef struct RnnExtChoice {
  RnnExtKernel kernel;
  const char* reason;
} RnnExtChoice;
// A layer on a device: `shared_bytes` is what a block can have, `multiprocessors` how many there are; 0 asks the
// current device. `allow_tf32`: whether float32 may be rounded to TF32 in a product.
typedef struct RnnExtQuestion {
  RnnExtCell cell;
  RnnExtDtype dtype;
  RnnExtVariant variant;
  int64_t length, batch, hidden;
  int32_t directions, projected, backward, allow_tf32;
  int64_t shared_bytes, multiprocessors;
} RnnExtQuestion;
RnnExtChoice rnn_ext_cuda_choose(const RnnExtQuestion* question);
// 1 if more is to be said of clusters, which is then in `remark`, else 0: the current device, which was asked, cannot
// hold those that the table would have taken; or one that was not asked is assumed to hold those that it takes.
int rnn_ext_cuda_cluster_remark(const RnnExtQuestion* question, RnnExtError* remark);

#ifdef __cplusplus
}
#endif
