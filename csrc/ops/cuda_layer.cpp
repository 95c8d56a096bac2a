// The layer op over the CUDA kernels. Products over all timesteps (input gates, and in backward the gradients of input
// and weights) are single GEMMs of torch's, which obeys the user's precision settings; the chain through time is
// csrc/cuda's. Nothing waits for the device, and lengths are never read on the host.
//
// A row is one (timestep, entry) pair, in the order of the caller's layout: time-major, batch-first or packed. Letters
// as in cuda/launch.h, and P output size (H without projection), F any number of features.
#include "ops/cuda_layer.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <atomic>
#include <cstring>

#include "cells/cells.h"
#include "ops/layer.h"
#include "ops/saved_bytes.h"

namespace rnn_ext::ops {
namespace {

// In the order of RnnExtKernel.
constexpr const char* kKernelNames[] = {"step", "pointwise", "persistent", "tensor", "grid"};
constexpr int kByTable = -1;
std::atomic<int> forced_kernel{kByTable};

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

template <class Cell>
Facts facts() {
  Facts result{Cell::kGates,
               Cell::kSaved - (Cell::kHasCell ? 1 : 0),
               Cell::kGradGates,
               Cell::kHasCell,
               Cell::kDirectCarry,
               {},
               {}};
  const auto runs = [](int (*slot_of)(int), std::vector<Run>& to) {
    for (int gate = 0; gate < Cell::kGates; ++gate) {
      const int64_t slot = slot_of(gate);
      if (!to.empty() && to.back().slot + to.back().count == slot) {
        ++to.back().count;
      } else {
        to.push_back({slot, gate, 1});
      }
    }
  };
  runs([](int gate) { return Cell::ih_slot(gate); }, result.ih);
  runs([](int gate) { return Cell::hh_slot(gate); }, result.hh);
  return result;
}

Facts facts_of(std::string_view name) {
#define RNN_EXT_FACTS(Cell) \
  if (name == cells::Cell::kName) return facts<cells::Cell>();
  RNN_EXT_FOR_EACH_CELL(RNN_EXT_FACTS)
#undef RNN_EXT_FACTS
  TORCH_INTERNAL_ASSERT(false, "cell_info knows a cell that cells.h does not");
}

RnnExtDtype dtype_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return RNN_EXT_FLOAT32;
    case at::kDouble:
      return RNN_EXT_FLOAT64;
    case at::kBFloat16:
      return RNN_EXT_BFLOAT16;
    case at::kHalf:
      return RNN_EXT_FLOAT16;
    default:
      TORCH_CHECK_VALUE(false, "expected input of float32, float64, bfloat16 or float16, got ", dtype);
  }
}

void* pointer(const at::Tensor& tensor) { return tensor.defined() ? tensor.data_ptr() : nullptr; }
at::Tensor given(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->defined() ? tensor->contiguous() : at::Tensor();
}
at::Tensor of_direction(const at::Tensor& states, int64_t d) { return states.defined() ? states[d] : states; }

/// One call: its checked shape, where its rows lie, and what the kernels need to know about them.
class Call {
 public:
  Call(const at::Tensor& input, const OptionalTensor& h_0_, const OptionalTensor& c_0_, at::TensorList weights,
       const OptionalTensor& batch_sizes, const OptionalTensor& lengths_, const OptionalTensor& resets_,
       const OptionalTensors& masks, const LayerOptions& layer_options)
      : shape(input, h_0_, c_0_, weights, batch_sizes, lengths_, resets_, masks, layer_options),
        cell(facts_of(layer_options.cell)),
        directions(shape.sizes.directions),
        length(shape.length),
        batch(shape.batch),
        rows(shape.packed ? shape.rows : length * batch),
        hidden(shape.sizes.hidden),
        out(shape.sizes.output()),
        projected(shape.sizes.proj != 0),
        options(input.options()),
        accumulator(input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat),
        dtype(dtype_of(input.scalar_type())),
        h_0(given(h_0_)),
        c_0(given(c_0_)),
        guard_(input.device()),
        stream(kernel_stream(input.device())) {
    TORCH_CHECK_VALUE(shape.variant == cpu::Variant::kPlain,
                      "layer_norm, zoneout and recurrent_dropout have no CUDA kernel: expected input on the CPU, got ",
                      input.device());
    for (const at::Tensor& weight : weights) weights_.push_back(weight.contiguous());
    sequence.length = length;
    sequence.batch = batch;
    sequence.hidden = hidden;
    sequence.time_stride = shape.batch_first ? 1 : batch;
    sequence.batch_stride = shape.batch_first ? length : 1;
    if (shape.packed) sequence.batch_sizes = shape.batch_sizes.data();
    if (lengths_.has_value()) {
      lengths_on_device_ = lengths_->to(options.device(), at::kLong, /*non_blocking=*/true).contiguous();
      sequence.lengths = lengths_on_device_.const_data_ptr<int64_t>();
    }
    if (resets_.has_value()) {
      resets = resets_->contiguous();
      if (shape.packed) {  // the kernels want them as (L, N)
        locate_packed_rows();
        resets_grid_ = at::zeros({length * batch}, resets.options());
        resets_grid_.index_copy_(0, time_of_row_ * batch + entry_of_row_, resets);
      } else {
        resets_grid_ = resets;
      }
      sequence.resets = reinterpret_cast<const uint8_t*>(resets_grid_.const_data_ptr<bool>());
      sequence.resets_time_stride = sequence.time_stride;
      sequence.resets_batch_stride = sequence.batch_stride;
    }
  }

  const LayerShape shape;
  const Facts cell;
  const int64_t directions, length, batch, rows, hidden, out;
  const bool projected;
  const at::TensorOptions options;
  const at::ScalarType accumulator;
  const RnnExtDtype dtype;
  const at::Tensor h_0, c_0;  // contiguous, or undefined
  at::Tensor resets;          // contiguous, in the caller's layout, or undefined

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
  RnnExtKernel choose(bool backward) const {
    if (projected) return RNN_EXT_KERNEL_POINTWISE;
    const int forced = forced_kernel;
    const bool impossible = backward && forced == RNN_EXT_KERNEL_TENSOR;
    if (forced != kByTable && !impossible) return static_cast<RnnExtKernel>(forced);
    return rnn_ext_cuda_choose(cell_number(), dtype, length, batch, hidden, static_cast<int32_t>(directions), 0,
                               backward, 0, 0)
        .kernel;
  }
  /// What blocks of `grid` exchange, zero as they expect it. Lives until the launch is queued; the allocator knows the
  /// stream.
  at::Tensor grid_workspace(bool backward) const {
    const int64_t bytes =
        rnn_ext_cuda_grid_workspace(cell_number(), dtype, batch, hidden, static_cast<int32_t>(directions), backward);
    return at::zeros({bytes}, options.dtype(at::kByte));
  }
  template <class Args>
  Args arguments() const {
    Args args{};
    args.cell = cell_number();
    args.dtype = dtype;
    args.sequence = sequence;
    args.directions = static_cast<int32_t>(directions);
    return args;
  }

  /// What kernels that run all timesteps want to know of packed rows.
  void prepare_for(RnnExtKernel kernel) {
    if (!shape.packed || kernel == RNN_EXT_KERNEL_STEP || kernel == RNN_EXT_KERNEL_POINTWISE) return;
    upload_packing();
    sequence.row_offsets = offsets_on_device_.const_data_ptr<int64_t>();
    sequence.lengths = lengths_on_device_.const_data_ptr<int64_t>();
  }

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
  at::Tensor without_padding(const at::Tensor& all) const {
    if (!has_lengths()) return all;
    const at::Tensor result = at::empty(all.sizes(), all.options());
    grid(result).copy_(at::where(exists(), grid(all), at::zeros({}, all.options())));
    return result;
  }

  /// For each row [R, F] the row of its neighbour in time: that of the timestep before (after, where `after`), of
  /// `initial` [N, F] (undefined: zeros) where there is none, and zero where a reset lies between. `begins`: a reset at
  /// a sequence's first timestep cuts `initial` off.
  at::Tensor neighbours(const at::Tensor& all, const at::Tensor& initial, bool after, bool begins) {
    return shape.packed ? packed_neighbours(all, initial, after, begins)
                        : padded_neighbours(all, initial, after, begins);
  }

  /// Of each entry's first timestep in the order of direction d, the row of `all` [R, F]: [N, F]. Where there is no
  /// timestep, any row.
  at::Tensor first_rows(const at::Tensor& all, int64_t d) {
    if (d == 0) return at_time(all, 0);
    if (shape.packed) {
      upload_packing();
      const at::Tensor last = lengths_on_device_ - 1;
      return all.index_select(0, offsets_on_device_.index_select(0, last) + at::arange(batch, last.options()));
    }
    if (!has_lengths()) return at_time(all, length - 1);
    const at::Tensor last = (lengths_on_device_ - 1).clamp(0, length - 1);
    const at::Tensor entry = at::arange(batch, last.options());
    return all.index_select(0, last * sequence.time_stride + entry * sequence.batch_stride);
  }
  /// [N, 1]: whether a reset at the first timestep in the order of direction d cuts the initial state off.
  at::Tensor first_cut(int64_t d) const {
    if (d == 1 || !resets.defined()) return {};
    return at_time(resets.reshape({rows, 1}), 0);
  }
  at::Tensor no_timestep() const { return (lengths_on_device_ <= 0).unsqueeze(1); }

 private:
  at::Tensor padded_neighbours(const at::Tensor& all, const at::Tensor& initial, bool after, bool begins) const {
    const at::Tensor result = at::empty(all.sizes(), all.options());
    const at::Tensor to = grid(result), from = grid(all);
    const int64_t end = after ? length - 1 : 0;
    to.narrow(0, after ? 0 : 1, length - 1).copy_(from.narrow(0, after ? 1 : 0, length - 1));
    if (initial.defined()) {
      to.select(0, end).copy_(initial);
    } else {
      to.select(0, end).zero_();
    }
    if (after && has_lengths() && initial.defined()) {
      const at::Tensor next = at::arange(1, length + 1, lengths_on_device_.options()).unsqueeze(1);
      to.copy_(at::where((next == lengths_on_device_).unsqueeze(2), initial.unsqueeze(0), to));
    }
    if (resets.defined()) {
      at::Tensor cut = grid(resets.reshape({rows, 1}));
      if (has_lengths()) cut = cut.logical_and(exists());
      if (after) {
        to.narrow(0, 0, length - 1).masked_fill_(cut.narrow(0, 1, length - 1), 0);
      } else {
        const int64_t first = begins ? 0 : 1;
        to.narrow(0, first, length - first).masked_fill_(cut.narrow(0, first, length - first), 0);
      }
    }
    return result;
  }

  at::Tensor packed_neighbours(const at::Tensor& all, const at::Tensor& initial, bool after, bool begins) {
    locate_packed_rows();
    const at::Tensor time = after ? time_of_row_ + 1 : time_of_row_ - 1;
    const at::Tensor there = after ? time < lengths_on_device_.index_select(0, entry_of_row_) : time >= 0;
    const at::Tensor row = offsets_on_device_.index_select(0, time.clamp(0, length - 1)) + entry_of_row_;
    const at::Tensor safe_row = row.clamp(0, rows - 1), mask = there.unsqueeze(1);
    const at::Tensor otherwise =
        initial.defined() ? initial.index_select(0, entry_of_row_) : at::zeros({}, all.options());
    at::Tensor result = at::where(mask, all.index_select(0, safe_row), otherwise);
    if (resets.defined()) {
      at::Tensor cut =
          after ? resets.index_select(0, safe_row).logical_and(there) : (begins ? resets : resets.logical_and(there));
      result.masked_fill_(cut.unsqueeze(1), 0);
    }
    return result;
  }

  void upload_packing() {
    if (offsets_on_device_.defined()) return;
    const at::Tensor host = at::empty({2 * length + batch}, at::kLong);
    int64_t* to = host.mutable_data_ptr<int64_t>();
    std::copy(shape.offsets.begin(), shape.offsets.end(), to);
    std::copy(shape.batch_sizes.begin(), shape.batch_sizes.end(), to + length);
    for (int64_t time = 0, n = batch; time <= length; ++time) {
      const int64_t alive = time < length ? shape.batch_sizes[time] : 0;
      while (n > alive) to[2 * length + --n] = time;
    }
    const at::Tensor all = host.to(options.device(), /*non_blocking=*/true);
    offsets_on_device_ = all.narrow(0, 0, length);
    batch_sizes_on_device_ = all.narrow(0, length, length);
    lengths_on_device_ = all.narrow(0, 2 * length, batch);
  }
  void locate_packed_rows() {
    if (time_of_row_.defined()) return;
    upload_packing();
    time_of_row_ = at::repeat_interleave(batch_sizes_on_device_, std::optional<int64_t>(rows));
    entry_of_row_ = at::arange(rows, time_of_row_.options()) - offsets_on_device_.index_select(0, time_of_row_);
  }

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
    planes_at_ = call.cell.has_cell ? units * accumulator_size() : 0;
    raw_at_ = planes_at_ + units * call.cell.planes * size();
  }
  static int64_t numel(const Call& call) {
    return call.directions * call.rows * call.hidden *
           saved_bytes(call.cell.planes, call.cell.has_cell, call.projected, int64_t(call.options.dtype().itemsize()));
  }
  /// A [R, H], the cell state of every row.
  at::Tensor cells(int64_t d) const {
    return call_.cell.has_cell ? part(0, d, accumulator_size(), call_.accumulator) : at::Tensor();
  }
  /// T [R, S, H]
  at::Tensor planes(int64_t d) const {
    return call_.cell.planes
               ? part(planes_at_, d, call_.cell.planes * size(), at::typeMetaToScalarType(call_.options.dtype()))
               : at::Tensor();
  }
  /// T [R, H], h before its projection
  at::Tensor raw(int64_t d) const { return part(raw_at_, d, size(), at::typeMetaToScalarType(call_.options.dtype())); }

 private:
  int64_t size() const { return int64_t(call_.options.dtype().itemsize()); }
  int64_t accumulator_size() const { return int64_t(c10::elementSize(call_.accumulator)); }
  at::Tensor part(int64_t at, int64_t d, int64_t bytes_a_unit, at::ScalarType dtype) const {
    const int64_t bytes = call_.rows * call_.hidden * bytes_a_unit;
    return bytes_.narrow(0, at + d * bytes, bytes).view(dtype).view({call_.rows, -1});
  }
  const Call& call_;
  const at::Tensor bytes_;
  int64_t planes_at_, raw_at_;
};

/// to [.., F] = the gate gradients [.., Q*H] times a weight [G*H, F].
void times_weight(at::Tensor to, const at::Tensor& dgates, const at::Tensor& weight, const std::vector<Run>& runs,
                  int64_t hidden, bool add = false) {
  for (const Run& run : runs) {
    const at::Tensor left = dgates.narrow(1, run.slot * hidden, run.count * hidden);
    const at::Tensor right = weight.narrow(0, run.gate * hidden, run.count * hidden);
    if (add) {
      at::addmm_out(to, to, left, right);
    } else {
      at::mm_out(to, left, right);
    }
    add = true;
  }
}

/// The gradient [G*H, F] of a weight that multiplied `inputs` [R, F].
at::Tensor weight_gradient(const at::Tensor& dgates, const at::Tensor& inputs, const std::vector<Run>& runs,
                           int64_t gates, int64_t hidden) {
  at::Tensor result = at::empty({gates * hidden, inputs.size(1)}, inputs.options());
  for (const Run& run : runs) {
    at::Tensor to = result.narrow(0, run.gate * hidden, run.count * hidden);
    at::mm_out(to, dgates.narrow(1, run.slot * hidden, run.count * hidden).t(), inputs);
  }
  return result;
}

at::Tensor bias_gradient(const at::Tensor& sums, const std::vector<Run>& runs, int64_t hidden) {
  std::vector<at::Tensor> parts;
  for (const Run& run : runs) parts.push_back(sums.narrow(0, run.slot * hidden, run.count * hidden));
  return at::cat(parts);
}

/// The layer with the recurrent product, and a projection, from torch's GEMM at every timestep. h_n holds the running
/// state: where a row does not take part, it stands still.
void pointwise_forward(const Call& call, RnnExtForward& args, const Kept& kept, const at::Tensor& output_rows,
                       const at::Tensor& h_n) {
  const int64_t out = call.out;
  at::Tensor hgates[2], exists;
  if (call.h_0.defined()) {
    h_n.copy_(call.h_0);
  } else {
    h_n.zero_();
  }
  if (call.has_lengths() && call.projected) exists = call.exists();
  for (int64_t d = 0; d < call.directions; ++d) {
    hgates[d] = call.empty({call.batch, call.cell.gates * call.hidden});
    args.direction[d].hgates = hgates[d].data_ptr();
  }
  for (int64_t step = 0; step < call.length; ++step) {
    for (int64_t d = 0; d < call.directions; ++d) {
      const int64_t rows = call.rows_at(call.time_of(step, d));
      at::Tensor to = hgates[d].narrow(0, 0, rows);
      at::mm_out(to, h_n[d].narrow(0, 0, rows), call.weight(d, LayerShape::kWeightHh).t());
    }
    RnnExtError error{};
    check_launch(rnn_ext_cuda_step_forward(&args, step, step + 1, call.stream, &error), error);
    for (int64_t d = 0; d < call.directions && call.projected; ++d) {
      const int64_t time = call.time_of(step, d);
      at::Tensor to = call.at_time(output_rows, time).narrow(1, d * out, out);
      at::mm_out(to, call.at_time(kept.raw(d), time), call.weight(d, LayerShape::kWeightHr).t());
      const at::Tensor state = h_n[d].narrow(0, 0, call.rows_at(time));
      state.copy_(exists.defined() ? at::where(exists[time], to, state) : to);
    }
  }
}

LayerResult layer_cuda(const at::Tensor& input, const OptionalTensor& h_0, const OptionalTensor& c_0,
                       at::TensorList weights, const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                       const OptionalTensor& resets, const OptionalTensors& masks, std::string_view cell,
                       bool bidirectional, bool batch_first, bool cell_states, bool save, bool /*recompute*/) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  Call call(input, h_0, c_0, weights, batch_sizes, lengths, resets, masks,
            {cell, bidirectional, batch_first, cell_states});
  const int64_t D = call.directions, N = call.batch, R = call.rows, H = call.hidden, P = call.out;
  const bool has_cell = call.cell.has_cell;

  at::Tensor output = call.empty(call.shape.sequence_sizes(D * P));
  at::Tensor h_n = call.empty({D, N, P});
  at::Tensor c_n = has_cell ? call.empty({D, N, H}) : call.empty({0});
  at::Tensor cells = call.empty({0});
  at::Tensor saved = at::empty({save ? Kept::numel(call) : 0}, call.options.dtype(at::kByte));
  if (cell_states) cells = call.empty(call.shape.sequence_sizes(D * H));
  if (R == 0) {
    for (auto [to, from] : {std::pair(h_n, call.h_0), std::pair(c_n, call.c_0)}) {
      if (from.defined()) {
        to.copy_(from);
      } else {
        to.zero_();
      }
    }
    return {output, h_n, c_n, cells, saved};
  }

  // A projection needs h of every row in between, kept or not.
  const at::Tensor workspace =
      save || !call.projected ? saved : at::empty({Kept::numel(call)}, call.options.dtype(at::kByte));
  const Kept kept(call, workspace);
  const bool keeps = workspace.numel() > 0;
  const RnnExtKernel kernel = call.choose(false);
  call.prepare_for(kernel);
  auto args = call.arguments<RnnExtForward>();
  const at::Tensor x = input.reshape({R, call.shape.sizes.input}), output_rows = output.view({R, D * P});
  const at::Tensor raw_h_n = call.projected ? call.empty({D, N, H}) : h_n;
  at::Tensor igates[2], cell_of_row[2], cell_state[2], planes[2];
  for (int64_t d = 0; d < D; ++d) {
    const at::Tensor weight_ih = call.weight(d, LayerShape::kWeightIh), bias = call.weight(d, LayerShape::kBiasIh);
    igates[d] = bias.defined() ? at::addmm(bias, x, weight_ih.t()) : at::mm(x, weight_ih.t());
    if (has_cell) {
      if (keeps) {
        cell_of_row[d] = kept.cells(d);
      } else if (cell_states) {
        cell_of_row[d] = call.empty_accumulators({R, H});
      } else {
        cell_state[d] = call.empty_accumulators({N, H});
      }
    }
    // Rows that do not exist are not written.
    if (cell_states && call.has_lengths()) cell_of_row[d].zero_();
    if (save) planes[d] = kept.planes(d);
    RnnExtForwardDirection& to = args.direction[d];
    to.reverse = d == 1;
    to.igates = igates[d].const_data_ptr();
    to.igates_stride = call.cell.gates * H;
    to.weight_hh = call.projected ? nullptr : pointer(call.weight(d, LayerShape::kWeightHh));
    to.bias_hh = pointer(call.weight(d, LayerShape::kBiasHh));
    to.h_0 = call.projected ? nullptr : pointer(of_direction(call.h_0, d));
    to.c_0 = pointer(of_direction(call.c_0, d));
    to.output = call.projected ? kept.raw(d).data_ptr() : output_rows.narrow(1, d * P, P).data_ptr();
    to.output_stride = call.projected ? H : D * P;
    to.h_n = raw_h_n[d].data_ptr();
    to.c_n = has_cell ? c_n[d].data_ptr() : nullptr;
    to.saved = pointer(planes[d]);
    to.cells = pointer(cell_of_row[d]);
    to.cell_state = pointer(cell_state[d]);
  }
  RnnExtError error{};
  switch (kernel) {
    case RNN_EXT_KERNEL_STEP:
      check_launch(rnn_ext_cuda_step_forward(&args, 0, call.length, call.stream, &error), error);
      break;
    case RNN_EXT_KERNEL_POINTWISE:
      pointwise_forward(call, args, kept, output_rows, h_n);
      break;
    case RNN_EXT_KERNEL_PERSISTENT:
      check_launch(rnn_ext_cuda_persistent_forward(&args, call.stream, &error), error);
      break;
    case RNN_EXT_KERNEL_TENSOR:
      check_launch(rnn_ext_cuda_tensor_forward(&args, call.stream, &error), error);
      break;
    case RNN_EXT_KERNEL_GRID: {
      const at::Tensor workspace = call.grid_workspace(false);
      check_launch(rnn_ext_cuda_grid_forward(&args, 0, workspace.data_ptr(), call.stream, &error), error);
      break;
    }
  }
  for (int64_t d = 0; d < D && cell_states; ++d) cells.view({R, D * H}).narrow(1, d * H, H).copy_(cell_of_row[d]);
  return {output, h_n, c_n, cells, saved};
}

/// The chain backwards through time, its recurrent product from torch's GEMM. `recurrent`: of each direction [R, P],
/// what a row's gate gradients give back to the output before it; only kept where the layer is projected.
void pointwise_backward(const Call& call, RnnExtBackward& args, const at::Tensor* dgates, const at::Tensor* recurrent) {
  at::Tensor dh[2];
  for (int64_t d = 0; d < call.directions; ++d) {
    dh[d] = call.empty({call.batch, call.hidden});
    args.direction[d].dh_recurrent = dh[d].data_ptr();
  }
  for (int64_t step = 0; step <= call.length; ++step) {
    for (int64_t d = 0; d < call.directions && step > 0; ++d) {
      const int64_t after = call.time_of(call.length - step, d);
      at::Tensor to = dh[d].narrow(0, 0, call.rows_at(after));
      const at::Tensor product = call.projected ? call.at_time(recurrent[d], after) : to;
      times_weight(product, call.at_time(dgates[d], after), call.weight(d, LayerShape::kWeightHh), call.cell.hh,
                   call.hidden);
      if (call.projected) at::mm_out(to, product, call.weight(d, LayerShape::kWeightHr));
    }
    RnnExtError error{};
    check_launch(rnn_ext_cuda_step_backward(&args, step, step + 1, call.stream, &error), error);
  }
}

LayerGrads layer_backward_cuda(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                               const OptionalTensor& grad_c_n, const OptionalTensor& grad_cells,
                               const at::Tensor& input, const OptionalTensor& h_0, const OptionalTensor& c_0,
                               at::TensorList weights, const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                               const OptionalTensor& resets, const OptionalTensors& masks, const at::Tensor& output,
                               const at::Tensor& saved, std::string_view cell, bool bidirectional, bool batch_first,
                               bool cell_states, const c10::List<bool>& output_mask) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  Call call(input, h_0, c_0, weights, batch_sizes, lengths, resets, masks,
            {cell, bidirectional, batch_first, cell_states});
  const int64_t D = call.directions, N = call.batch, R = call.rows, H = call.hidden, P = call.out;
  const bool has_cell = call.cell.has_cell;
  TORCH_CHECK(output_mask.size() == 3 + weights.size(), "expected output_mask of ", 3 + weights.size(), " values, got ",
              output_mask.size());
  TORCH_CHECK(output.sizes() == at::IntArrayRef(call.shape.sequence_sizes(D * P)) && saved.scalar_type() == at::kByte &&
                  saved.numel() == Kept::numel(call),
              "output and saved are not those of a forward call with these inputs");
  const auto checked = [&](const OptionalTensor& grad, at::IntArrayRef expected, const char* name) {
    const at::Tensor dense = given(grad);
    TORCH_CHECK(!dense.defined() || dense.sizes() == expected, "expected ", name, " of size ", expected, ", got ",
                dense.sizes());
    TORCH_CHECK(!dense.defined() || (dense.device() == input.device() && dense.scalar_type() == input.scalar_type()),
                "expected ", name, " as ", input.scalar_type(), " on ", input.device(), ", got ", dense.scalar_type(),
                " on ", dense.device());
    return dense;
  };
  const at::Tensor doutput = checked(grad_output, call.shape.sequence_sizes(D * P), "grad_output");
  const at::Tensor dcells = checked(grad_cells, call.shape.sequence_sizes(D * H), "grad_cells");
  const at::Tensor dh_n = checked(grad_h_n, {D, N, P}, "grad_h_n"), dc_n = checked(grad_c_n, {D, N, H}, "grad_c_n");

  const at::Tensor none = call.empty({0});
  std::vector<at::Tensor> dw(weights.size(), none);
  if (R == 0) {
    const auto passed = [&](bool wanted, const at::Tensor& grad, at::IntArrayRef sizes) {
      return !wanted ? none : grad.defined() ? grad.clone() : at::zeros(sizes, call.options);
    };
    for (size_t i = 0; i < dw.size(); ++i) dw[i] = passed(output_mask.get(3 + i), {}, weights[i].sizes());
    return {passed(output_mask.get(0), {}, input.sizes()), passed(output_mask.get(1), dh_n, {D, N, P}),
            passed(output_mask.get(2), dc_n, {D, N, H}), std::move(dw)};
  }

  const Kept kept(call, saved.contiguous());
  const RnnExtKernel kernel = call.choose(true);
  call.prepare_for(kernel);
  auto args = call.arguments<RnnExtBackward>();
  const at::Tensor y = output.contiguous().view({R, D * P});
  const at::Tensor dy = doutput.defined() ? doutput.view({R, D * P}) : doutput;
  at::Tensor dh_0 = call.empty({D, N, P}), dc_0 = has_cell ? call.empty({D, N, H}) : none;
  const at::Tensor raw_dh_0 = call.projected ? call.empty({D, N, H}) : dh_0;
  at::Tensor dgates[2], recurrent[2], raw_dy[2], raw_dh_n[2], dh_carry[2], dc_carry[2], planes[2], cell_of_row[2];
  for (int64_t d = 0; d < D; ++d) {
    dgates[d] = call.empty({R, call.cell.grad_gates * H});
    if (call.cell.direct_carry) dh_carry[d] = call.empty_accumulators({N, H});
    if (has_cell) dc_carry[d] = call.empty_accumulators({N, H});
    RnnExtBackwardDirection& to = args.direction[d];
    if (call.projected) {
      const at::Tensor weight_hr = call.weight(d, LayerShape::kWeightHr);
      recurrent[d] = call.empty({R, P});
      if (dy.defined()) raw_dy[d] = at::mm(dy.narrow(1, d * P, P), weight_hr);
      if (dh_n.defined()) raw_dh_n[d] = at::mm(dh_n[d], weight_hr);
      to.output = kept.raw(d).const_data_ptr();
      to.output_stride = to.doutput_stride = H;
    } else {
      raw_dy[d] = dy.defined() ? dy.narrow(1, d * P, P) : dy;
      raw_dh_n[d] = of_direction(dh_n, d);
      to.weight_hh = pointer(call.weight(d, LayerShape::kWeightHh));
      to.h_0 = pointer(of_direction(call.h_0, d));
      to.output = y.narrow(1, d * P, P).const_data_ptr();
      to.output_stride = to.doutput_stride = D * P;
    }
    planes[d] = kept.planes(d);
    cell_of_row[d] = kept.cells(d);
    to.reverse = d == 1;
    to.c_0 = pointer(of_direction(call.c_0, d));
    to.saved = pointer(planes[d]);
    to.cells = pointer(cell_of_row[d]);
    to.doutput = pointer(raw_dy[d]);
    to.dcells = dcells.defined() ? pointer(dcells.view({R, D * H}).narrow(1, d * H, H)) : nullptr;
    to.dcells_stride = D * H;
    to.dh_n = pointer(raw_dh_n[d]);
    to.dc_n = pointer(of_direction(dc_n, d));
    to.dgates = dgates[d].data_ptr();
    to.dgates_stride = call.cell.grad_gates * H;
    to.dh_carry = pointer(dh_carry[d]);
    to.dc_carry = pointer(dc_carry[d]);
    to.dh_0 = raw_dh_0[d].data_ptr();
    to.dc_0 = has_cell ? dc_0[d].data_ptr() : nullptr;
  }
  RnnExtError error{};
  switch (kernel) {
    case RNN_EXT_KERNEL_STEP:
      check_launch(rnn_ext_cuda_step_backward(&args, 0, call.length + 1, call.stream, &error), error);
      break;
    case RNN_EXT_KERNEL_POINTWISE:
      pointwise_backward(call, args, dgates, recurrent);
      break;
    case RNN_EXT_KERNEL_PERSISTENT:
      check_launch(rnn_ext_cuda_persistent_backward(&args, call.stream, &error), error);
      break;
    case RNN_EXT_KERNEL_TENSOR:
      TORCH_INTERNAL_ASSERT(false, "tensor kernels are forward only");
    case RNN_EXT_KERNEL_GRID: {
      const at::Tensor workspace = call.grid_workspace(true);
      check_launch(rnn_ext_cuda_grid_backward(&args, 0, workspace.data_ptr(), call.stream, &error), error);
      break;
    }
  }

  at::Tensor dx = none, x;
  if (output_mask.get(0)) {
    dx = call.empty({R, call.shape.sizes.input});
    for (int64_t d = 0; d < D; ++d)
      times_weight(dx, dgates[d], call.weight(d, LayerShape::kWeightIh), call.cell.ih, H, d > 0);
    dx = dx.view(input.sizes());
  }
  for (int64_t d = 0; d < D; ++d) {
    const auto put = [&](LayerShape::Weight name, const auto& compute) {
      const int index = call.shape.index(static_cast<int>(d), name);
      if (index >= 0 && output_mask.get(3 + index)) dw[index] = compute();
    };
    at::Tensor sums;
    const auto bias_grad = [&](const std::vector<Run>& runs) {
      if (!sums.defined()) sums = dgates[d].sum(0);
      return bias_gradient(sums, runs, H);
    };
    put(LayerShape::kWeightIh, [&] {
      if (!x.defined()) x = call.without_padding(input.reshape({R, call.shape.sizes.input}));
      return weight_gradient(dgates[d], x, call.cell.ih, call.cell.gates, H);
    });
    put(LayerShape::kWeightHh, [&] {
      const at::Tensor before =
          call.neighbours(y.narrow(1, d * P, P), of_direction(call.h_0, d), /*after=*/d == 1, /*begins=*/true);
      return weight_gradient(dgates[d], before, call.cell.hh, call.cell.gates, H);
    });
    put(LayerShape::kBiasIh, [&] { return bias_grad(call.cell.ih); });
    put(LayerShape::kBiasHh, [&] { return bias_grad(call.cell.hh); });
    put(LayerShape::kWeightHr, [&] {
      // The whole gradient of each projected output: what came from outside and what the next timestep gave back.
      at::Tensor dprojected = call.neighbours(recurrent[d], of_direction(dh_n, d), /*after=*/d == 0, /*begins=*/false);
      if (dy.defined()) dprojected.add_(dy.narrow(1, d * P, P));
      return at::mm(call.without_padding(dprojected).t(), kept.raw(d));
    });
    if (call.projected && output_mask.get(1)) {
      at::Tensor first = call.first_rows(recurrent[d], d);
      if (const at::Tensor cut = call.first_cut(d); cut.defined()) first = first.masked_fill(cut, 0);
      if (call.has_lengths())
        first = at::where(call.no_timestep(), dh_n.defined() ? dh_n[d] : at::zeros({}, call.options), first);
      dh_0[d].copy_(first);
    }
  }
  return {dx, output_mask.get(1) ? dh_0 : none, output_mask.get(2) ? dc_0 : none, std::move(dw)};
}

}  // namespace

const char* kernel_name(RnnExtKernel kernel) { return kKernelNames[kernel]; }

bool force_cuda_kernel(const std::string& name) {
  if (name.empty()) {
    forced_kernel = kByTable;
    return true;
  }
  for (int kernel = 0; kernel < static_cast<int>(std::size(kKernelNames)); ++kernel) {
    if (name == kKernelNames[kernel]) {
      forced_kernel = kernel;
      return true;
    }
  }
  return false;
}

void check_launch(int failed, const RnnExtError& error) { TORCH_CHECK(!failed, "rnn_ext on CUDA: ", error.message); }

void implement_cuda_layer(torch::Library& library) {
  library.impl("layer", &layer_cuda);
  library.impl("layer_backward", &layer_backward_cuda);
}

}  // namespace rnn_ext::ops
