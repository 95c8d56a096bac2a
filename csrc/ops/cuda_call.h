// One call of the layer op over the CUDA kernels: its checked shape, where its rows lie, and what forward keeps.
//
// A row is one (timestep, entry) pair, in the order of the caller's layout: time-major, batch-first or packed. Letters
// as in cuda/launch.h, and P output size (H without projection), F any number of features.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include <vector>

#include "cuda/launch.h"
#include "ops/layer.h"
#include "ops/saved_bytes.h"

namespace rnn_ext::ops {

/// Neighbouring gate gradients that belong to neighbouring row blocks of a weight.
struct Run {
  int64_t slot, gate, count;
};

/// A cell's constants, for code that is not a template.
struct Facts {
  int64_t gates = 0, planes = 0, grad_gates = 0;
  bool has_cell = false, direct_carry = false;
  std::vector<Run> ih, hh;
};

inline void* pointer(const at::Tensor& tensor) { return tensor.defined() ? tensor.data_ptr() : nullptr; }
inline at::Tensor given(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->defined() ? tensor->contiguous() : at::Tensor();
}
inline at::Tensor of_direction(const at::Tensor& states, int64_t d) { return states.defined() ? states[d] : states; }

/// One call: its checked shape, where its rows lie, and what the kernels need to know about them.
class Call {
 public:
  explicit Call(const LayerInputs& in);

  const LayerShape shape;
  const Facts cell;
  const int64_t directions, length, batch, rows, hidden, out;
  const bool projected;
  const at::TensorOptions options;
  const at::ScalarType accumulator;
  const RnnExtDtype dtype;
  const at::Tensor h_0, c_0;  // contiguous, or undefined
  at::Tensor resets;          // contiguous, in the caller's layout, or undefined
  // Of a variant, each or none, accumulators: [D, N, P]; rows [R, D*P] and [R, D*H], which may be one for all
  at::Tensor hidden_mask, zoneout_h, zoneout_c;

 private:
  const c10::DeviceGuard guard_;

 public:
  void* const stream;
  RnnExtSequence sequence{};

  at::Tensor weight(int64_t d, LayerShape::Weight name) const {
    const int index = shape.index(static_cast<int>(d), name);
    return index < 0 ? at::Tensor() : weights_[index];
  }
  at::Tensor empty(at::IntArrayRef sizes) const { return at::empty(sizes, options); }
  at::Tensor empty_accumulators(at::IntArrayRef sizes) const { return at::empty(sizes, options.dtype(accumulator)); }
  bool has_lengths() const { return lengths_on_device_.defined() && !shape.packed; }

  RnnExtCell cell_number() const { return static_cast<RnnExtCell>(shape.cell.kind); }
  RnnExtVariant variant() const { return static_cast<RnnExtVariant>(shape.variant); }
  bool normed() const { return shape.variant == cpu::Variant::kLayerNorm; }
  RnnExtKernel choose(bool backward) const;
  template <class Args>
  Args arguments() const {
    Args args{};
    args.cell = cell_number();
    args.dtype = dtype;
    args.sequence = sequence;
    args.directions = static_cast<int32_t>(directions);
    args.variant = variant();
    return args;
  }
  /// Those of a direction's state h, and those of its cell: the same but where a projection lies between.
  RnnExtMasks state_masks(int64_t d) const;
  RnnExtMasks cell_masks(int64_t d) const;

  /// What blocks of `grid` exchange, zero as they expect it. Lives until the launch is queued; the allocator knows the
  /// stream.
  at::Tensor grid_workspace(bool backward) const;

  /// What kernels that run all timesteps want to know of packed rows.
  void prepare_for(RnnExtKernel kernel);

  // Timesteps in the order in which a direction computes them.
  int64_t time_of(int64_t step, int64_t d) const { return d == 1 ? length - 1 - step : step; }
  int64_t rows_at(int64_t time) const { return shape.packed ? shape.batch_sizes[time] : batch; }
  /// The rows [R, F] of one timestep.
  at::Tensor at_time(const at::Tensor& all, int64_t time) const {
    if (shape.packed) return all.narrow(0, shape.offsets[time], shape.batch_sizes[time]);
    return grid(all).select(0, time);
  }
  /// Rows [R, F] of a padded layout as [L, N, F].
  at::Tensor grid(const at::Tensor& all) const {
    if (shape.batch_first) return all.unflatten(0, {batch, length}).transpose(0, 1);
    return all.unflatten(0, {length, batch});
  }
  /// (L, N, 1) of padded rows with lengths: whether the timestep exists.
  at::Tensor exists() const {
    return (at::arange(length, lengths_on_device_.options()).unsqueeze(1) < lengths_on_device_).unsqueeze(2);
  }
  /// Rows that do not exist become zero, whatever stood there.
  at::Tensor without_padding(const at::Tensor& all) const;

  /// For each row [R, F] the row of its neighbour in time: that of the timestep before (after, where `after`), of
  /// `initial` [N, F] (undefined: zeros) where there is none, and zero where a reset lies between. `begins`: a reset at
  /// a sequence's first timestep cuts `initial` off.
  at::Tensor neighbours(const at::Tensor& all, const at::Tensor& initial, bool after, bool begins) {
    return shape.packed ? packed_neighbours(all, initial, after, begins)
                        : padded_neighbours(all, initial, after, begins);
  }

  /// Of each entry's first timestep in the order of direction d, the row of `all` [R, F]: [N, F]. Where there is no
  /// timestep, any row.
  at::Tensor first_rows(const at::Tensor& all, int64_t d);
  /// [N, 1]: whether a reset at the first timestep in the order of direction d cuts the initial state off.
  at::Tensor first_cut(int64_t d) const {
    if (d == 1 || !resets.defined()) return {};
    return at_time(resets.reshape({rows, 1}), 0);
  }
  /// Rows [R, P] times the direction's hidden mask, in place.
  at::Tensor masked(at::Tensor all, int64_t d);
  at::Tensor no_timestep() const { return (lengths_on_device_ <= 0).unsqueeze(1); }

 private:
  at::Tensor padded_neighbours(const at::Tensor& all, const at::Tensor& initial, bool after, bool begins) const;
  at::Tensor packed_neighbours(const at::Tensor& all, const at::Tensor& initial, bool after, bool begins);
  void upload_packing();
  /// Raises where a CUDA graph is being captured: a replay would not copy from the host again.
  void check_not_captured(const char* what) const;
  void locate_packed_rows();

  std::vector<at::Tensor> weights_;
  at::Tensor lengths_on_device_;  // [N] int64: as given, or those of packed entries
  at::Tensor resets_grid_;
  at::Tensor offsets_on_device_, batch_sizes_on_device_, time_of_row_, entry_of_row_;  // packed
};

/// What forward keeps for backward, in one tensor of bytes; views of each part of a direction.
class Kept {
 public:
  Kept(const Call& call, const at::Tensor& bytes) : call_(call), bytes_(bytes) {
    const int64_t units = call.directions * call.rows * call.hidden;
    statistics_at_ = call.cell.has_cell ? units * accumulator_size() : 0;
    planes_at_ = statistics_at_ +
                 (call.normed() ? call.directions * call.rows * RNN_EXT_NORM_STATISTICS * accumulator_size() : 0);
    raw_at_ = planes_at_ + units * call.cell.planes * size();
  }
  static int64_t numel(const Call& call) {
    const SavedBytes bytes = saved_bytes(call.cell.planes, call.cell.has_cell, call.projected, call.normed(),
                                         int64_t(call.options.dtype().itemsize()));
    return call.directions * call.rows * (call.hidden * bytes.unit + bytes.row);
  }
  /// A [R, H], the cell state of every row.
  at::Tensor cells(int64_t d) const {
    return call_.cell.has_cell ? part(0, d, call_.hidden * accumulator_size(), call_.accumulator) : at::Tensor();
  }
  /// A [R, 4], of layer normalisation
  at::Tensor statistics(int64_t d) const {
    return part(statistics_at_, d, RNN_EXT_NORM_STATISTICS * accumulator_size(), call_.accumulator);
  }
  /// T [R, S, H]
  at::Tensor planes(int64_t d) const {
    return call_.cell.planes ? part(planes_at_, d, call_.hidden * call_.cell.planes * size(),
                                    at::typeMetaToScalarType(call_.options.dtype()))
                             : at::Tensor();
  }
  /// T [R, H], h before its projection
  at::Tensor raw(int64_t d) const {
    return part(raw_at_, d, call_.hidden * size(), at::typeMetaToScalarType(call_.options.dtype()));
  }

 private:
  int64_t size() const { return int64_t(call_.options.dtype().itemsize()); }
  int64_t accumulator_size() const { return int64_t(c10::elementSize(call_.accumulator)); }
  at::Tensor part(int64_t at, int64_t d, int64_t bytes_a_row, at::ScalarType dtype) const {
    const int64_t bytes = call_.rows * bytes_a_row;
    return bytes_.narrow(0, at + d * bytes, bytes).view(dtype).view({call_.rows, -1});
  }
  const Call& call_;
  const at::Tensor bytes_;
  int64_t statistics_at_, planes_at_, raw_at_;
};

/// to [.., F] = the gate gradients [.., Q*H] times a weight [G*H, F].
void times_weight(at::Tensor to, const at::Tensor& dgates, const at::Tensor& weight, const std::vector<Run>& runs,
                  int64_t hidden, bool add = false);
/// The gradient [G*H, F] of a weight that multiplied `inputs` [R, F].
at::Tensor weight_gradient(const at::Tensor& dgates, const at::Tensor& inputs, const std::vector<Run>& runs,
                           int64_t gates, int64_t hidden);
at::Tensor bias_gradient(const at::Tensor& sums, const std::vector<Run>& runs, int64_t hidden);

}  // namespace rnn_ext::ops
