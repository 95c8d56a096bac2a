// What ops/cuda_call.h declares.
#include "ops/cuda_call.h"

#include "cpu/with_cell.h"
#include "ops/cuda_layer.h"

namespace rnn_ext::ops {
namespace {

template <class Cell>
Facts facts() {
  Facts result{Cell::kGates, cells::saved_planes<Cell>(), Cell::kGradGates, Cell::kHasCell, Cell::kDirectCarry, {}, {}};
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

Facts facts_of(cpu::CellKind kind, cpu::Variant variant) {
  return cpu::with_cell(kind, variant, []<class Cell>() { return facts<Cell>(); });
}

}  // namespace

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

Call::Call(const LayerInputs& in)
    : shape(in),
      cell(facts_of(shape.cell.kind, shape.variant)),
      directions(shape.sizes.directions),
      length(shape.length),
      batch(shape.batch),
      rows(shape.packed ? shape.rows : length * batch),
      hidden(shape.sizes.hidden),
      out(shape.sizes.output()),
      projected(shape.sizes.proj != 0),
      options(in.input.options()),
      accumulator(in.input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat),
      dtype(dtype_of(in.input.scalar_type())),
      h_0(given(in.h_0)),
      c_0(given(in.c_0)),
      guard_(in.input.device()),
      stream(kernel_stream(in.input.device())) {
  check_memory(in.input, "input");
  for (const at::Tensor& weight : in.weights) {
    if (weight.dim() == 2) check_memory(weight, "a weight");  // backward does not read biases
    weights_.push_back(weight.contiguous());
  }
  sequence.length = length;
  sequence.batch = batch;
  sequence.hidden = hidden;
  sequence.time_stride = shape.batch_first ? 1 : batch;
  sequence.batch_stride = shape.batch_first ? length : 1;
  if (shape.packed) sequence.batch_sizes = shape.batch_sizes.data();
  if (in.lengths.has_value()) {
    if (in.lengths->is_cpu() && !in.input.is_cpu()) check_not_captured("lengths on the CPU");
    lengths_on_device_ = in.lengths->to(options.device(), at::kLong, /*non_blocking=*/true).contiguous();
    sequence.lengths = lengths_on_device_.const_data_ptr<int64_t>();
  }
  for (int i = 0; i < int(in.masks.size()); ++i) {
    const OptionalTensor mask = in.masks.get(size_t(i));
    if (!mask.has_value()) continue;
    const at::Tensor wide = mask->to(accumulator);
    if (i == LayerShape::kHiddenMask) {
      hidden_mask = wide.contiguous();
    } else {  // a row that was expanded to all stays one
      const at::Tensor all = wide.reshape({rows, wide.size(-1)});
      (i == LayerShape::kZoneoutH ? zoneout_h : zoneout_c) = all.stride(1) == 1 ? all : all.contiguous();
    }
  }
  if (in.resets.has_value()) {
    resets = in.resets->contiguous();
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

RnnExtMasks Call::state_masks(int64_t d) const {
  RnnExtMasks masks{};
  if (hidden_mask.defined()) masks.hidden = hidden_mask[d].const_data_ptr();
  const auto share = [&](const at::Tensor& all, int64_t features, const void*& data, int64_t& stride) {
    if (!all.defined()) return;
    data = all.narrow(1, d * features, features).const_data_ptr();
    stride = all.stride(0);
  };
  share(zoneout_h, out, masks.zoneout_h, masks.zoneout_h_stride);
  share(zoneout_c, hidden, masks.zoneout_c, masks.zoneout_c_stride);
  return masks;
}

RnnExtMasks Call::cell_masks(int64_t d) const {
  RnnExtMasks masks = state_masks(d);
  if (projected) masks.hidden = masks.zoneout_h = nullptr;
  return masks;
}

at::Tensor Call::masked(at::Tensor all, int64_t d) {
  if (!hidden_mask.defined()) return all;
  if (shape.packed) {
    locate_packed_rows();
    return all.mul_(hidden_mask[d].index_select(0, entry_of_row_));
  }
  grid(all).mul_(hidden_mask[d]);
  return all;
}

at::Tensor Call::grid_workspace(bool backward) const {
  const int64_t bytes =
      rnn_ext_cuda_grid_workspace(cell_number(), dtype, batch, hidden, static_cast<int32_t>(directions), backward);
  return at::zeros({bytes}, options.dtype(at::kByte));
}

void Call::prepare_for(RnnExtKernel kernel) {
  if (!shape.packed || kernel == RNN_EXT_KERNEL_STEP || kernel == RNN_EXT_KERNEL_POINTWISE) return;
  upload_packing();
  sequence.row_offsets = offsets_on_device_.const_data_ptr<int64_t>();
  sequence.lengths = lengths_on_device_.const_data_ptr<int64_t>();
}

at::Tensor Call::without_padding(const at::Tensor& all) const {
  if (!has_lengths()) return all;
  const at::Tensor result = at::empty(all.sizes(), all.options());
  grid(result).copy_(at::where(exists(), grid(all), at::zeros({}, all.options())));
  return result;
}

at::Tensor Call::first_rows(const at::Tensor& all, int64_t d) {
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

at::Tensor Call::padded_neighbours(const at::Tensor& all, const at::Tensor& initial, bool after, bool begins) const {
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

at::Tensor Call::packed_neighbours(const at::Tensor& all, const at::Tensor& initial, bool after, bool begins) {
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

void Call::check_not_captured(const char* what) const {
  TORCH_CHECK(!rnn_ext_cuda_is_capturing(stream), what,
              " cannot be captured in a CUDA graph: expected a padded input, ", "with lengths on ", options.device());
}

void Call::upload_packing() {
  if (offsets_on_device_.defined()) return;
  check_not_captured("a packed sequence");
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

void Call::locate_packed_rows() {
  if (time_of_row_.defined()) return;
  upload_packing();
  time_of_row_ = at::repeat_interleave(batch_sizes_on_device_, std::optional<int64_t>(rows));
  entry_of_row_ = at::arange(rows, time_of_row_.options()) - offsets_on_device_.index_select(0, time_of_row_);
}

void times_weight(at::Tensor to, const at::Tensor& dgates, const at::Tensor& weight, const std::vector<Run>& runs,
                  int64_t hidden, bool add) {
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

}  // namespace rnn_ext::ops
