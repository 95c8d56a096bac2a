// The layer op over the CUDA kernels. Products over all timesteps (input gates, and in backward the gradients of input
// and weights) are single GEMMs of torch's, which obeys the user's precision settings; the chain through time is
// csrc/cuda's. Nothing waits for the device; lengths that lie on it are never read on the host.
// Words and letters: ops/cuda_call.h.
#include "ops/cuda_layer.h"

#include <c10/core/impl/LocalDispatchKeySet.h>

#include <atomic>
#include <iterator>

#include "cells/cells.h"
#include "ops/cuda_call.h"

namespace rnn_ext::ops {
namespace {

// In the order of RnnExtKernel.
constexpr const char* kKernelNames[] = {"step", "pointwise", "persistent", "tensor", "cluster", "grid"};
constexpr int kByTable = -1;
std::atomic<int> forced_kernel{kByTable};

}  // namespace

RnnExtKernel Call::choose(bool backward) const {
  if (projected || normed()) return RNN_EXT_KERNEL_POINTWISE;
  if (const int forced = forced_kernel; forced != kByTable) return static_cast<RnnExtKernel>(forced);
  RnnExtQuestion question{};
  question.cell = cell_number();
  question.dtype = dtype;
  question.variant = variant();
  question.length = length;
  question.batch = batch;
  question.hidden = hidden;
  question.directions = static_cast<int32_t>(directions);
  question.backward = backward;
  question.allow_tf32 = dtype == RNN_EXT_FLOAT32 && allows_tf32();
  return rnn_ext_cuda_choose(&question).kernel;
}

namespace {

/// Where h goes on in the precision of sums, if the step's kernels have use for it; see RnnExtForwardDirection.
at::Tensor h_state_of(const Call& call, const RnnExtMasks& masks, int64_t width) {
  const bool reads_h = call.cell.direct_carry || masks.zoneout_h;
  return reads_h && call.options.dtype().itemsize() < 4 ? call.empty_accumulators({call.batch, width}) : at::Tensor();
}

/// The layer with the recurrent product, and a projection, from torch's GEMM at every timestep. h_n holds the running
/// state: where a row does not take part, it stands still.
void pointwise_forward(const Call& call, RnnExtForward& args, const Kept& kept, const at::Tensor& output_rows,
                       const at::Tensor& h_n) {
  const int64_t out = call.out;
  const bool of_variant = call.variant() != RNN_EXT_PLAIN;
  at::Tensor hgates[2], exists, masked;
  if (call.h_0.defined()) {
    h_n.copy_(call.h_0);
  } else {
    h_n.zero_();
  }
  if (call.has_lengths() && call.projected && !of_variant) exists = call.exists();
  if (call.hidden_mask.defined()) masked = (h_n * call.hidden_mask).to(h_n.scalar_type());
  const at::Tensor& state = masked.defined() ? masked : h_n;
  auto states = call.arguments<RnnExtForward>();  // of a projected variant
  states.sequence.hidden = out;
  at::Tensor h_state[2];
  for (int64_t d = 0; d < call.directions; ++d) {
    RnnExtForwardDirection& to = (call.projected ? states : args).direction[d];
    to.h_masked = pointer(of_direction(masked, d));
    if (call.projected) {
      to.reverse = d == 1;
      to.h_0 = pointer(of_direction(call.h_0, d));
      to.output = output_rows.narrow(1, d * out, out).data_ptr();
      to.output_stride = call.directions * out;
      to.h_n = h_n[d].data_ptr();
      to.masks = call.state_masks(d);
      h_state[d] = h_state_of(call, to.masks, out);
      to.h_state = pointer(h_state[d]);
    }
    hgates[d] = call.empty({call.batch, call.cell.gates * call.hidden});
    args.direction[d].hgates = hgates[d].data_ptr();
  }
  for (int64_t step = 0; step < call.length; ++step) {
    for (int64_t d = 0; d < call.directions; ++d) {
      const int64_t rows = call.rows_at(call.time_of(step, d));
      at::Tensor to = hgates[d].narrow(0, 0, rows);
      at::mm_out(to, state[d].narrow(0, 0, rows), call.weight(d, LayerShape::kWeightHh).t());
    }
    RnnExtError error{};
    check_launch(rnn_ext_cuda_step_forward(&args, step, step + 1, call.stream, &error), error);
    for (int64_t d = 0; d < call.directions && call.projected; ++d) {
      const int64_t time = call.time_of(step, d);
      at::Tensor to = call.at_time(output_rows, time).narrow(1, d * out, out);
      at::mm_out(to, call.at_time(kept.raw(d), time), call.weight(d, LayerShape::kWeightHr).t());
      if (of_variant) continue;
      const at::Tensor h = h_n[d].narrow(0, 0, call.rows_at(time));
      h.copy_(exists.defined() ? at::where(exists[time], to, h) : to);
    }
    if (call.projected && of_variant)
      check_launch(rnn_ext_cuda_projected_forward(&states, step, call.stream, &error), error);
  }
}

/// What layer normalisation needs of direction d. scratch: A [N, 7, H].
RnnExtNorm norm_of(const Call& call, const Kept& kept, int64_t d, bool keeps, const at::Tensor& scratch) {
  RnnExtNorm norm{};
  norm.weight_ih = pointer(call.weight(d, LayerShape::kWeightNormIh));
  norm.weight_hh = pointer(call.weight(d, LayerShape::kWeightNormHh));
  norm.weight_c = pointer(call.weight(d, LayerShape::kWeightNormC));
  norm.bias_c = pointer(call.weight(d, LayerShape::kBiasNormC));
  norm.bias_ih = pointer(call.weight(d, LayerShape::kBiasIh));
  norm.bias_hh = pointer(call.weight(d, LayerShape::kBiasHh));
  norm.statistics = keeps ? kept.statistics(d).data_ptr() : nullptr;
  norm.scratch = scratch.data_ptr();
  return norm;
}

LayerResult layer_cuda(const at::Tensor& input, const OptionalTensor& h_0, const OptionalTensor& c_0,
                       at::TensorList weights, const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                       const OptionalTensor& resets, const OptionalTensors& masks, std::string_view cell,
                       bool bidirectional, bool batch_first, bool cell_states, bool save, bool /*recompute*/) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  Call call(
      {input, h_0, c_0, weights, batch_sizes, lengths, resets, masks, {cell, bidirectional, batch_first, cell_states}});
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
  at::Tensor igates[2], cell_of_row[2], cell_state[2], h_state[2], planes[2], scratch[2];
  for (int64_t d = 0; d < D; ++d) {
    const at::Tensor weight_ih = call.weight(d, LayerShape::kWeightIh), bias = call.weight(d, LayerShape::kBiasIh);
    igates[d] = bias.defined() && !call.normed() ? at::addmm(bias, x, weight_ih.t()) : at::mm(x, weight_ih.t());
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
    to.masks = call.cell_masks(d);
    if (kernel == RNN_EXT_KERNEL_STEP || kernel == RNN_EXT_KERNEL_POINTWISE) {
      h_state[d] = h_state_of(call, to.masks, H);
      to.h_state = pointer(h_state[d]);
    }
    if (call.normed()) {
      scratch[d] = call.empty_accumulators({N, RNN_EXT_NORM_SCRATCH, H});
      to.norm = norm_of(call, kept, d, save, scratch[d]);
    }
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
    case RNN_EXT_KERNEL_CLUSTER:
      check_launch(rnn_ext_cuda_cluster_forward(&args, call.stream, &error), error);
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

/// The same of a variant with a projection: before the cell's step, that of the state. `args` has dh_recurrent zero,
/// and doutput is raw_dy, which is found here. dprojected: of each direction [R, P], gradient of the projection.
void projected_variant_backward(const Call& call, RnnExtBackward& args, const RnnExtBackward& states_,
                                const at::Tensor* dgates, const at::Tensor* dprojected, const at::Tensor* raw_dy) {
  RnnExtBackward states = states_;
  at::Tensor dh[2], zeros[2];
  for (int64_t d = 0; d < call.directions; ++d) {
    dh[d] = call.empty({call.batch, call.out});
    zeros[d] = at::zeros({call.batch, call.hidden}, call.options);
    states.direction[d].dh_recurrent = dh[d].data_ptr();
    args.direction[d].dh_recurrent = zeros[d].data_ptr();
  }
  for (int64_t step = 0; step <= call.length; ++step) {
    for (int64_t d = 0; d < call.directions && step > 0; ++d) {
      const int64_t after = call.time_of(call.length - step, d);
      times_weight(dh[d].narrow(0, 0, call.rows_at(after)), call.at_time(dgates[d], after),
                   call.weight(d, LayerShape::kWeightHh), call.cell.hh, call.hidden);
    }
    RnnExtError error{};
    check_launch(rnn_ext_cuda_projected_backward(&states, step, call.stream, &error), error);
    for (int64_t d = 0; d < call.directions && step < call.length; ++d) {
      const int64_t now = call.time_of(call.length - 1 - step, d);
      at::Tensor to = call.at_time(raw_dy[d], now);
      at::mm_out(to, call.at_time(dprojected[d], now), call.weight(d, LayerShape::kWeightHr));
    }
    check_launch(rnn_ext_cuda_step_backward(&args, step, step + 1, call.stream, &error), error);
  }
}

LayerGrads layer_backward_cuda(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                               const OptionalTensor& grad_c_n, const OptionalTensor& grad_cells,
                               const at::Tensor& input, const OptionalTensor& h_0, const OptionalTensor& c_0,
                               at::TensorList weights, const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                               const OptionalTensor& resets, const OptionalTensors& masks, const at::Tensor& output,
                               const at::Tensor& saved, std::string_view cell, bool bidirectional, bool batch_first,
                               bool cell_states, const c10::List<bool>& output_mask, c10::SymInt groups) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const LayerInputs in{
      input, h_0, c_0, weights, batch_sizes, lengths, resets, masks, {cell, bidirectional, batch_first, cell_states}};
  Call call(in);
  call.shape.check_backward({grad_output, grad_h_n, grad_c_n, grad_cells}, in, output, saved, at::kByte,
                            Kept::numel(call), output_mask, groups.expect_int());
  const int64_t D = call.directions, N = call.batch, R = call.rows, H = call.hidden, P = call.out;
  const bool has_cell = call.cell.has_cell;
  const at::Tensor doutput = given(grad_output), dcells = given(grad_cells);
  const at::Tensor dh_n = given(grad_h_n), dc_n = given(grad_c_n);

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
  const bool projected_variant = call.projected && call.variant() != RNN_EXT_PLAIN;
  at::Tensor dgates[2], recurrent[2], raw_dy[2], raw_dh_n[2], dh_carry[2], dc_carry[2], planes[2], cell_of_row[2];
  at::Tensor scratch[2], dprojected[2], state_carry[2];
  auto states = call.arguments<RnnExtBackward>();  // of a projected variant
  states.sequence.hidden = P;
  for (int64_t d = 0; d < D; ++d) {
    dgates[d] = call.empty({R, call.cell.grad_gates * H});
    if (call.cell.direct_carry) dh_carry[d] = call.empty_accumulators({N, H});
    if (has_cell) dc_carry[d] = call.empty_accumulators({N, H});
    RnnExtBackwardDirection& to = args.direction[d];
    if (projected_variant) {
      dprojected[d] = call.empty({R, P});
      state_carry[d] = call.empty_accumulators({N, P});
      raw_dy[d] = call.empty({R, H});
      RnnExtBackwardDirection& state = states.direction[d];
      state.reverse = d == 1;
      state.doutput = pointer(dy.defined() ? dy.narrow(1, d * P, P) : dy);
      state.doutput_stride = D * P;
      state.dh_n = pointer(of_direction(dh_n, d));
      state.dgates = dprojected[d].data_ptr();
      state.dgates_stride = P;
      state.dh_carry = state_carry[d].data_ptr();
      state.dh_0 = dh_0[d].data_ptr();
      state.masks = call.state_masks(d);
    } else if (call.projected) {
      const at::Tensor weight_hr = call.weight(d, LayerShape::kWeightHr);
      recurrent[d] = call.empty({R, P});
      if (dy.defined()) raw_dy[d] = at::mm(dy.narrow(1, d * P, P), weight_hr);
      if (dh_n.defined()) raw_dh_n[d] = at::mm(dh_n[d], weight_hr);
    }
    if (call.projected) {
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
    to.masks = call.cell_masks(d);
    if (call.normed()) {
      scratch[d] = call.empty_accumulators({N, RNN_EXT_NORM_SCRATCH, H});
      to.norm = norm_of(call, kept, d, true, scratch[d]);
    }
  }
  RnnExtError error{};
  switch (kernel) {
    case RNN_EXT_KERNEL_STEP:
      check_launch(rnn_ext_cuda_step_backward(&args, 0, call.length + 1, call.stream, &error), error);
      break;
    case RNN_EXT_KERNEL_POINTWISE:
      if (projected_variant) {
        projected_variant_backward(call, args, states, dgates, dprojected, raw_dy);
      } else {
        pointwise_backward(call, args, dgates, recurrent);
      }
      break;
    case RNN_EXT_KERNEL_PERSISTENT:
      check_launch(rnn_ext_cuda_persistent_backward(&args, call.stream, &error), error);
      break;
    case RNN_EXT_KERNEL_TENSOR:
      check_launch(rnn_ext_cuda_tensor_backward(&args, call.stream, &error), error);
      break;
    case RNN_EXT_KERNEL_CLUSTER:
      check_launch(rnn_ext_cuda_cluster_backward(&args, call.stream, &error), error);
      break;
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
    using Normed = cells::LayerNormLstm;
    const auto slots = [&](int64_t first, int64_t count) { return dgates[d].narrow(1, first * H, count * H); };
    const auto scale_grad = [&](int64_t first_saved) {
      const at::Tensor values = planes[d].narrow(1, first_saved * H, Normed::kGates * H);
      return call.without_padding(slots(Normed::kGradGate, Normed::kGates) * values).sum(0);
    };
    at::Tensor sums;
    const auto bias_grad = [&](const std::vector<Run>& runs) {
      if (call.normed()) return slots(Normed::kGradGate, Normed::kGates).sum(0);
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
      return weight_gradient(dgates[d], call.masked(before, d), call.cell.hh, call.cell.gates, H);
    });
    put(LayerShape::kBiasIh, [&] { return bias_grad(call.cell.ih); });
    put(LayerShape::kBiasHh, [&] { return bias_grad(call.cell.hh); });
    put(LayerShape::kWeightNormIh, [&] { return scale_grad(Normed::kNormIh); });
    put(LayerShape::kWeightNormHh, [&] { return scale_grad(Normed::kNormHh); });
    put(LayerShape::kWeightNormC, [&] { return (slots(Normed::kGradNorm, 1) * slots(Normed::kNormC, 1)).sum(0); });
    put(LayerShape::kBiasNormC, [&] { return slots(Normed::kGradNorm, 1).sum(0); });
    put(LayerShape::kWeightHr, [&] {
      if (projected_variant) return at::mm(dprojected[d].t(), kept.raw(d));
      // The whole gradient of each projected output: what came from outside and what the next timestep gave back.
      at::Tensor dprojected = call.neighbours(recurrent[d], of_direction(dh_n, d), /*after=*/d == 0, /*begins=*/false);
      if (dy.defined()) dprojected.add_(dy.narrow(1, d * P, P));
      return at::mm(call.without_padding(dprojected).t(), kept.raw(d));
    });
    if (call.projected && !projected_variant && output_mask.get(1)) {
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

bool allows_tf32() {
  return !at::NoTF32Guard::should_disable_tf32() &&
         at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
             at::Float32Precision::TF32;
}

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
