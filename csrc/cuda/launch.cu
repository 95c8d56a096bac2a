// The C entries of launch.h: check what a kernel relies on, then go to the storage type's launcher.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <iterator>

#include "cells/cells.h"
#include "cuda/cluster_entries.h"
#include "cuda/dispatch.h"
#include "cuda/grid_entries.h"
#include "cuda/launch.h"
#include "cuda/persistent_entries.h"
#include "cuda/step_entries.h"
#include "cuda/tensor_entries.h"

namespace rnn_ext::cuda {

// Stands for all kernels, which are compiled for the same architectures.
__global__ void probe_kernel() {}

}  // namespace rnn_ext::cuda

namespace {

using namespace rnn_ext::cuda;

__attribute__((format(printf, 2, 3))) int refuse(RnnExtError* error, const char* format, ...) {
  va_list values;
  va_start(values, format);
  std::vsnprintf(error->message, sizeof error->message, format, values);
  va_end(values);
  return 1;
}

long long number(int64_t value) { return value; }

template <class Args>
int check(const Args& args, int64_t first_step, int64_t last_step, int64_t steps, RnnExtError* error) {
  const RnnExtSequence& s = args.sequence;
  if (args.variant < RNN_EXT_PLAIN || args.variant > RNN_EXT_LAYER_NORM)
    return refuse(error, "no variant has the number %d", static_cast<int>(args.variant));
  if (args.variant == RNN_EXT_LAYER_NORM && args.cell != RNN_EXT_LSTM)
    return refuse(error, "only an lstm has layer normalisation, got cell %d", static_cast<int>(args.cell));
  if (static_cast<size_t>(args.cell) >= std::size(rnn_ext::cells::kGatesOf))
    return refuse(error, "no cell has the number %d", static_cast<int>(args.cell));
  if (args.dtype < RNN_EXT_FLOAT32 || args.dtype > RNN_EXT_FLOAT16)
    return refuse(error, "no dtype has the number %d", static_cast<int>(args.dtype));
  if (args.directions < 1 || args.directions > 2)
    return refuse(error, "expected 1 or 2 directions, got %d", args.directions);
  if (s.length < 1 || s.batch < 1 || s.hidden < 1) {
    return refuse(error, "expected positive sizes, got length %lld, batch %lld, hidden size %lld", number(s.length),
                  number(s.batch), number(s.hidden));
  }
  constexpr int64_t kMaxHidden = 65535 * 16, kMaxBatch = INT32_MAX;  // grid.y counts unit tiles, grid.x rows
  if (s.hidden > kMaxHidden || s.batch > kMaxBatch) {
    return refuse(error, "batch %lld x hidden size %lld is beyond one launch", number(s.batch), number(s.hidden));
  }
  if (first_step < 0 || first_step > last_step || last_step > steps) {
    return refuse(error, "expected steps within [0, %lld), got [%lld, %lld)", number(steps), number(first_step),
                  number(last_step));
  }
  if (s.batch_sizes) {
    int64_t rows = s.batch;
    for (int64_t t = 0; t < s.length; ++t) {
      if (s.batch_sizes[t] < 1 || s.batch_sizes[t] > rows || (t == 0 && s.batch_sizes[0] != s.batch)) {
        return refuse(
            error,
            "batch_sizes[%lld] is %lld: expected %lld or fewer, not increasing, the first equal to the batch %lld",
            number(t), number(s.batch_sizes[t]), number(rows), number(s.batch));
      }
      rows = s.batch_sizes[t];
    }
  }
  return 0;
}

int check_norm(const RnnExtNorm& norm, bool backward, RnnExtError* error) {
  if (!norm.weight_ih || !norm.weight_hh || !norm.weight_c || !norm.bias_c || !norm.scratch)
    return refuse(error, "layer normalisation needs norm.weight_ih, weight_hh, weight_c, bias_c and scratch");
  if (backward && !norm.statistics) return refuse(error, "backward of layer normalisation needs norm.statistics");
  return 0;
}

int check_pointers(const RnnExtForward& args, RnnExtError* error) {
  for (int i = 0; i < args.directions; ++i) {
    const RnnExtForwardDirection& d = args.direction[i];
    if (!d.igates || !d.output || !d.h_n || !(d.weight_hh || d.hgates)) {
      return refuse(error, "igates, output, h_n and weight_hh or hgates must be given");
    }
    if (args.cell == RNN_EXT_LSTM && !d.c_n) return refuse(error, "an lstm needs c_n");
    if (d.h_masked && !d.masks.hidden) return refuse(error, "h_masked needs masks.hidden");
    if (args.variant == RNN_EXT_LAYER_NORM) {
      if (!d.hgates) return refuse(error, "layer normalisation needs hgates");
      if (check_norm(d.norm, false, error)) return 1;
    }
  }
  return 0;
}

int check_pointers(const RnnExtBackward& args, RnnExtError* error) {
  for (int i = 0; i < args.directions; ++i) {
    const RnnExtBackwardDirection& d = args.direction[i];
    if (!d.output || !d.dgates || !d.dh_0 || !(d.weight_hh || d.dh_recurrent)) {
      return refuse(error, "output, dgates, dh_0 and weight_hh or dh_recurrent must be given");
    }
    if (args.cell == RNN_EXT_LSTM && (!d.saved || !d.cells || !d.dc_0))
      return refuse(error, "an lstm needs saved, cells and dc_0");
    if (args.cell == RNN_EXT_GRU && !d.saved) return refuse(error, "a gru needs saved");
    if (args.variant != RNN_EXT_PLAIN && (!d.saved || !d.dh_carry))
      return refuse(error, "a variant needs saved and dh_carry");
    if (args.variant == RNN_EXT_LAYER_NORM) {
      if (!d.dh_recurrent) return refuse(error, "layer normalisation needs dh_recurrent");
      if (check_norm(d.norm, true, error)) return 1;
    }
  }
  return 0;
}

template <class Args>
int check_whole_sequence(const Args& args, const char* kernels, RnnExtError* error) {
  if (check(args, 0, 0, 0, error) || check_pointers(args, error)) return 1;
  const RnnExtSequence& s = args.sequence;
  if (args.variant != RNN_EXT_PLAIN) return refuse(error, "%s kernels have no variants", kernels);
  if (args.dtype == RNN_EXT_FLOAT64) return refuse(error, "%s kernels do not take float64", kernels);
  if (s.batch_sizes && (!s.row_offsets || !s.lengths))
    return refuse(error, "packed data needs row_offsets and lengths");
  for (int i = 0; i < args.directions; ++i) {
    if (!args.direction[i].weight_hh) return refuse(error, "weight_hh must be given");
  }
  return 0;
}

template <class Args>
int check_persistent(const Args& args, RnnExtError* error, const char* kernels = "persistent",
                     int64_t most = kMaxPersistentHidden) {
  if (check_whole_sequence(args, kernels, error)) return 1;
  if (args.sequence.hidden <= most) return 0;
  return refuse(error, "%s kernels of this cell and dtype end at hidden size %lld, got %lld", kernels, number(most),
                number(args.sequence.hidden));
}

template <class Args>
int check_tensor(const Args& args, RnnExtError* error) {
  return check_persistent(args, error, "tensor", max_tensor_hidden(args.cell, args.dtype));
}

template <class Args>
int check_cluster(const Args& args, RnnExtError* error) {
  return check_persistent(args, error, "cluster", max_cluster_hidden(args.cell, args.dtype));
}

template <class Args>
int check_grid(const Args& args, int64_t units, const void* workspace, RnnExtError* error) {
  if (check_whole_sequence(args, "grid", error)) return 1;
  if (units < 0) return refuse(error, "expected units of a block, or 0, got %lld", number(units));
  if (!workspace || reinterpret_cast<uintptr_t>(workspace) % 16)
    return refuse(error, "the workspace must be given, aligned to 16 bytes");
  return 0;
}

}  // namespace

#define RNN_EXT_FOR_DTYPE(function)                                          \
  const auto queue = static_cast<cudaStream_t>(stream);                      \
  switch (args->dtype) {                                                     \
    case RNN_EXT_FLOAT32:                                                    \
      return function<float>(*args, first_step, last_step, queue, error);    \
    case RNN_EXT_FLOAT64:                                                    \
      return function<double>(*args, first_step, last_step, queue, error);   \
    case RNN_EXT_BFLOAT16:                                                   \
      return function<bfloat16>(*args, first_step, last_step, queue, error); \
    case RNN_EXT_FLOAT16:                                                    \
      return function<float16>(*args, first_step, last_step, queue, error);  \
  }                                                                          \
  return 1;

#define RNN_EXT_FOR_PERSISTENT_DTYPE(function, ...)     \
  const auto queue = static_cast<cudaStream_t>(stream); \
  switch (args->dtype) {                                \
    case RNN_EXT_FLOAT32:                               \
      return function<float>(*args, __VA_ARGS__);       \
    case RNN_EXT_BFLOAT16:                              \
      return function<bfloat16>(*args, __VA_ARGS__);    \
    case RNN_EXT_FLOAT16:                               \
      return function<float16>(*args, __VA_ARGS__);     \
    default:                                            \
      return 1;                                         \
  }

extern "C" int rnn_ext_cuda_set_device(int32_t device, RnnExtError* error) {
  const char* problem = select_device(device);
  return problem ? refuse(error, "cuda:%d: %s", device, problem) : 0;
}

extern "C" int rnn_ext_cuda_is_capturing(void* stream) { return is_capturing(static_cast<cudaStream_t>(stream)); }

extern "C" int rnn_ext_cuda_check_device(int32_t device, RnnExtError* error) {
  const char* problem = check_device(device, reinterpret_cast<const void*>(&probe_kernel));
  return problem ? refuse(error, "cuda:%d: %s", device, problem) : 0;
}

extern "C" int rnn_ext_cuda_step_forward(const RnnExtForward* args, int64_t first_step, int64_t last_step, void* stream,
                                         RnnExtError* error) {
  if (check(*args, first_step, last_step, args->sequence.length, error) || check_pointers(*args, error)) return 1;
  for (int i = 0; i < args->directions; ++i) {
    const RnnExtForwardDirection& d = args->direction[i];
    if (args->cell == RNN_EXT_LSTM && !d.cells && !d.cell_state)
      return refuse(error, "an lstm needs cells or cell_state");
    if (!d.hgates != !args->direction[0].hgates)
      return refuse(error, "hgates must be given for both directions or none");
    if (d.hgates && last_step - first_step > 1) {
      return refuse(error, "hgates are those of one step, got %lld steps", number(last_step - first_step));
    }
  }
  RNN_EXT_FOR_DTYPE(step_forward)
}

extern "C" int rnn_ext_cuda_step_backward(const RnnExtBackward* args, int64_t first_step, int64_t last_step,
                                          void* stream, RnnExtError* error) {
  if (check(*args, first_step, last_step, args->sequence.length + 1, error) || check_pointers(*args, error)) return 1;
  for (int i = 0; i < args->directions; ++i) {
    const RnnExtBackwardDirection& d = args->direction[i];
    if (args->cell == RNN_EXT_LSTM && !d.dc_carry) return refuse(error, "an lstm needs dc_carry");
    if (args->cell == RNN_EXT_GRU && !d.dh_carry) return refuse(error, "a gru needs dh_carry");
    if (!d.dh_recurrent != !args->direction[0].dh_recurrent) {
      return refuse(error, "dh_recurrent must be given for both directions or none");
    }
    if (d.dh_recurrent && last_step - first_step > 1) {
      return refuse(error, "dh_recurrent is that of one step, got %lld steps", number(last_step - first_step));
    }
  }
  RNN_EXT_FOR_DTYPE(step_backward)
}

extern "C" int rnn_ext_cuda_projected_forward(const RnnExtForward* args, int64_t step, void* stream,
                                              RnnExtError* error) {
  const int64_t first_step = step, last_step = step + 1;
  if (check(*args, first_step, last_step, args->sequence.length, error)) return 1;
  for (int i = 0; i < args->directions; ++i) {
    const RnnExtForwardDirection& d = args->direction[i];
    if (!d.output || !d.h_n) return refuse(error, "output and h_n must be given");
    if (d.h_masked && !d.masks.hidden) return refuse(error, "h_masked needs masks.hidden");
  }
  RNN_EXT_FOR_DTYPE(projected_forward)
}

extern "C" int rnn_ext_cuda_projected_backward(const RnnExtBackward* args, int64_t step, void* stream,
                                               RnnExtError* error) {
  const int64_t first_step = step, last_step = step + 1;
  if (check(*args, first_step, last_step, args->sequence.length + 1, error)) return 1;
  for (int i = 0; i < args->directions; ++i) {
    const RnnExtBackwardDirection& d = args->direction[i];
    if (!d.dh_recurrent || !d.dgates || !d.dh_carry || !d.dh_0)
      return refuse(error, "dh_recurrent, dgates, dh_carry and dh_0 must be given");
  }
  RNN_EXT_FOR_DTYPE(projected_backward)
}

extern "C" int rnn_ext_cuda_persistent_forward(const RnnExtForward* args, void* stream, RnnExtError* error) {
  if (check_persistent(*args, error)) return 1;
  RNN_EXT_FOR_PERSISTENT_DTYPE(persistent_forward, queue, error)
}

extern "C" int rnn_ext_cuda_persistent_backward(const RnnExtBackward* args, void* stream, RnnExtError* error) {
  if (check_persistent(*args, error)) return 1;
  RNN_EXT_FOR_PERSISTENT_DTYPE(persistent_backward, queue, error)
}

extern "C" int rnn_ext_cuda_tensor_forward(const RnnExtForward* args, void* stream, RnnExtError* error) {
  if (check_tensor(*args, error)) return 1;
  RNN_EXT_FOR_PERSISTENT_DTYPE(tensor_forward, queue, error)
}

extern "C" int rnn_ext_cuda_tensor_backward(const RnnExtBackward* args, void* stream, RnnExtError* error) {
  if (check_tensor(*args, error)) return 1;
  RNN_EXT_FOR_PERSISTENT_DTYPE(tensor_backward, queue, error)
}

extern "C" int rnn_ext_cuda_cluster_forward(const RnnExtForward* args, void* stream, RnnExtError* error) {
  if (check_cluster(*args, error)) return 1;
  RNN_EXT_FOR_PERSISTENT_DTYPE(cluster_forward, queue, error)
}

extern "C" int rnn_ext_cuda_cluster_backward(const RnnExtBackward* args, void* stream, RnnExtError* error) {
  if (check_cluster(*args, error)) return 1;
  RNN_EXT_FOR_PERSISTENT_DTYPE(cluster_backward, queue, error)
}

extern "C" int64_t rnn_ext_cuda_grid_workspace(RnnExtCell cell, RnnExtDtype dtype, int64_t batch, int64_t hidden,
                                               int32_t directions, int32_t backward) {
  Question question{};
  question.cell = cell;
  question.dtype = dtype;
  question.batch = batch;
  question.hidden = hidden;
  question.directions = directions;
  question.backward = backward;
  return grid_workspace_bytes(grid_problem(question));
}

extern "C" int rnn_ext_cuda_grid_forward(const RnnExtForward* args, int64_t units, void* workspace, void* stream,
                                         RnnExtError* error) {
  if (check_grid(*args, units, workspace, error)) return 1;
  RNN_EXT_FOR_PERSISTENT_DTYPE(grid_forward, units, workspace, queue, error)
}

extern "C" int rnn_ext_cuda_grid_backward(const RnnExtBackward* args, int64_t units, void* workspace, void* stream,
                                          RnnExtError* error) {
  if (check_grid(*args, units, workspace, error)) return 1;
  RNN_EXT_FOR_PERSISTENT_DTYPE(grid_backward, units, workspace, queue, error)
}

extern "C" int rnn_ext_cuda_persistent_fits(RnnExtCell cell, RnnExtDtype dtype, int64_t hidden, int32_t backward,
                                            int64_t shared_bytes) {
  if (hidden < 1 || hidden > kMaxPersistentHidden || dtype == RNN_EXT_FLOAT64) return 0;
  const bool wide = dtype == RNN_EXT_FLOAT32;  // the two 16-bit types need the same
  const int64_t needed = wide ? persistent_shared_bytes<float>(cell, hidden, backward != 0)
                              : persistent_shared_bytes<float16>(cell, hidden, backward != 0);
  return needed <= shared_bytes;
}

namespace {

// Null, or why the current device cannot run this cell's clusters.
const char* missing_on_this_device(RnnExtCell cell, RnnExtDtype dtype, int64_t hidden, bool backward) {
  const auto missing = dtype == RNN_EXT_FLOAT32    ? cluster_missing<float>
                       : dtype == RNN_EXT_BFLOAT16 ? cluster_missing<bfloat16>
                                                   : cluster_missing<float16>;
  return missing(cell, hidden, backward);
}

Question completed(const RnnExtQuestion& question) {
  Question complete{question, question.shared_bytes <= 0};
  if (complete.this_device) complete.shared_bytes = shared_bytes_per_block();
  if (complete.multiprocessors <= 0) complete.multiprocessors = multiprocessors();
  return complete;
}

}  // namespace

extern "C" int rnn_ext_cuda_cluster_fits(RnnExtCell cell, RnnExtDtype dtype, int64_t hidden, int32_t backward,
                                         int64_t shared_bytes) {
  if (hidden < 1 || hidden > max_cluster_hidden(cell, dtype)) return 0;
  if (shared_bytes > 0) return shared_bytes >= kSharedBytesWithClusters;
  return missing_on_this_device(cell, dtype, hidden, backward != 0) == nullptr;
}

extern "C" RnnExtChoice rnn_ext_cuda_choose(const RnnExtQuestion* question) {
  const DispatchRow& row = dispatch(completed(*question));
  return {row.kernel, row.reason};
}

extern "C" int rnn_ext_cuda_cluster_remark(const RnnExtQuestion* question, RnnExtError* remark) {
  const Question asked = completed(*question);
  Question elsewhere = asked;  // the same GPU, with clusters of any size
  elsewhere.this_device = false;
  elsewhere.shared_bytes = std::max(asked.shared_bytes, kSharedBytesWithClusters);
  const bool taken = dispatch(asked).kernel == RNN_EXT_KERNEL_CLUSTER;
  if (asked.this_device == taken || dispatch(elsewhere).kernel != RNN_EXT_KERNEL_CLUSTER) return 0;
  if (taken) {
    return refuse(remark, "that the device can hold such clusters is assumed, since none is here to be asked");
  }
  const char* missing = missing_on_this_device(asked.cell, asked.dtype, asked.hidden, asked.backward != 0);
  return refuse(remark, "not by clusters of %d blocks: %s",
                cluster_blocks(gates_of(asked.cell), value_bytes_of(asked.dtype), asked.hidden), missing);
}
