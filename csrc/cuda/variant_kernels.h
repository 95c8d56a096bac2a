// The variants (cells/variants.h) of `step`. Zoneout and the mask on h_prev are done where step_kernels.h loads and
// leaves a state. Here is what needs more: layer normalisation, whose means run over a row, and the state of a
// projected layer, whose h is made by a GEMM between two launches.
//
// Layer normalisation: one block per row, its threads walk the units; every mean is a sum by shuffles within a warp,
// then over the warps in their order, one barrier each (4 forward, 2 backward). What a thread has found of its units
// waits in `scratch`, where no other thread looks.
//
// Cost of one timestep beside the GEMM (s = bytes of T, a = bytes of A, per direction):
//   forward   about 100 N H operations; bytes: s N H (8 + 2) + a N H (2; scratch: 2 written, 3 read)
//             (+ 8 s N H + 4 a N when saving)
//   backward  about 200 N H operations; bytes: s N H (8 + 3 + 14) + a N H (5; scratch: 11 written, 11 read)
// A row is passed five times forward and three times backward; all but the first find it in the nearest cache. The
// barriers and passes make a launch longer than a pointwise one, by how much has not been measured.
#pragma once

#include "cuda/step_kernels.h"

namespace rnn_ext::cuda {

template <class T>
struct NormPointers {
  const T* weight_ih;
  const T* weight_hh;
  const T* weight_c;
  const T* bias_c;
  const T* bias_ih;
  const T* bias_hh;
  AccumulatorOf<T>* statistics;
  AccumulatorOf<T>* scratch;
};

template <class T>
NormPointers<T> typed(const RnnExtNorm& from) {
  using A = AccumulatorOf<T>;
  return {static_cast<const T*>(from.weight_ih), static_cast<const T*>(from.weight_hh),
          static_cast<const T*>(from.weight_c),  static_cast<const T*>(from.bias_c),
          static_cast<const T*>(from.bias_ih),   static_cast<const T*>(from.bias_hh),
          static_cast<A*>(from.statistics),      static_cast<A*>(from.scratch)};
}

template <class Step, class T>
struct NormStep : Step {
  NormPointers<T> norm[2];  // of each direction
};

using NormCell = cells::LayerNormLstm;
inline constexpr int kNormGates = NormCell::kGates, kNormStatistics = RNN_EXT_NORM_STATISTICS;
inline constexpr int kMaxNormThreads = 256, kMaxNormWarps = kMaxNormThreads / 32;
// Blocks per multiprocessor that registers must allow (see kForwardBlocks).
template <class T>
inline constexpr int kNormBlocks = sizeof(AccumulatorOf<T>) == 8 ? 1 : 2;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// Sums over the threads of a block, in the same order every time. Two sums in a row need two places, of kCount *
// kMaxNormWarps values each: then who still reads the one is safe from who writes the other.
template <int kCount, class A>
RNN_EXT_DEVICE void block_sums(A (&values)[kCount], A* place) {
  const int thread = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / 32;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) values[i] += __shfl_xor_sync(kAllLanes, values[i], bits);
    if (thread % 32 == 0) place[thread / 32 * kCount + i] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = place[i];
    for (int warp = 1; warp < warps; ++warp) values[i] += place[warp * kCount + i];
  }
}

template <class A>
RNN_EXT_DEVICE A reciprocal_deviation(A variance) {
#if !defined(__CUDACC__)
  using std::sqrt;
#endif
  return A(1) / sqrt(variance + A(cells::LayerNorm::kEps));
}

// The gates of a unit from the normalised values of its row.
template <class T>
RNN_EXT_DEVICE void normed_gates(const NormPointers<T>& norm, int64_t hidden, int64_t unit,
                                 const AccumulatorOf<T>* norm_ih, const AccumulatorOf<T>* norm_hh,
                                 AccumulatorOf<T>* gates) {
#pragma unroll
  for (int g = 0; g < kNormGates; ++g) {
    const int64_t at = g * hidden + unit;
    gates[g] = NormCell::gate(norm_ih[g], widen(norm.weight_ih[at]), norm_hh[g], widen(norm.weight_hh[at]),
                              value_or_zero(norm.bias_ih, at) + value_or_zero(norm.bias_hh, at));
  }
}

// grid: (rows, 1, directions)
template <class T>
__global__ void __launch_bounds__(kMaxNormThreads, kNormBlocks<T>)
    norm_forward_kernel(const __grid_constant__ NormStep<ForwardStep<T>, T> step) {
  using A = AccumulatorOf<T>;
  RNN_EXT_SHARED(A, places, 2 * 2 * kMaxNormWarps);
  A *even = places, *odd = places + 2 * kMaxNormWarps;
  const ForwardStepDirection<T>& d = step.direction[blockIdx.z];
  const NormPointers<T>& norm = step.norm[blockIdx.z];
  const int64_t hidden = step.hidden, n = blockIdx.x, threads = blockDim.x;
  if (n >= d.now.rows) return;
  if (!step.rules.exists(d.now, n)) {
    for (int64_t unit = threadIdx.x; unit < hidden; unit += threads) leave_absent_unit<NormCell>(step, d, n, unit);
    return;
  }
  const int64_t row = d.now.row(n, step.rules.batch_stride);
  const bool zero = step.rules.cut(d.before, d.now, n);  // h_prev is
  const T* igates = d.igates + row * d.igates_stride;
  const T* hgates = d.hgates + n * kNormGates * hidden;
  A* c_row = norm.scratch + n * RNN_EXT_NORM_SCRATCH * hidden;  // then o
  const A count = static_cast<A>(kNormGates * hidden);

  A mean[2] = {};  // of the input's gates and of the recurrent ones
  for (int64_t unit = threadIdx.x; unit < hidden; unit += threads) {
#pragma unroll
    for (int g = 0; g < kNormGates; ++g) {
      mean[0] += widen(igates[g * hidden + unit]);
      if (!zero) mean[1] += widen(hgates[g * hidden + unit]);
    }
  }
  block_sums(mean, even);
  mean[0] /= count;
  mean[1] /= count;
  A rstd[2] = {};
  for (int64_t unit = threadIdx.x; unit < hidden; unit += threads) {
#pragma unroll
    for (int g = 0; g < kNormGates; ++g) {
      const A di = widen(igates[g * hidden + unit]) - mean[0];
      const A dh = zero ? A(0) : widen(hgates[g * hidden + unit]) - mean[1];
      rstd[0] += di * di;
      rstd[1] += dh * dh;
    }
  }
  block_sums(rstd, odd);
  rstd[0] = reciprocal_deviation(rstd[0] / count);
  rstd[1] = reciprocal_deviation(rstd[1] / count);

  A mean_c[1] = {};
  for (int64_t unit = threadIdx.x; unit < hidden; unit += threads) {
    A norm_ih[kNormGates], norm_hh[kNormGates], gates[kNormGates], active[kNormGates];
#pragma unroll
    for (int g = 0; g < kNormGates; ++g) {
      norm_ih[g] = cells::LayerNorm::forward(widen(igates[g * hidden + unit]), mean[0], rstd[0]);
      norm_hh[g] = zero ? A(0) : cells::LayerNorm::forward(widen(hgates[g * hidden + unit]), mean[1], rstd[1]);
      if (d.saved) {
        T* saved = d.saved + (row * kSavedPlanes<NormCell> + g) * hidden + unit;
        saved[NormCell::kNormIh * hidden] = narrow<T>(norm_ih[g]);
        saved[NormCell::kNormHh * hidden] = narrow<T>(norm_hh[g]);
      }
    }
    normed_gates(norm, hidden, unit, norm_ih, norm_hh, gates);
    const A c = NormCell::next_cell<ExactMath<A>>(gates, previous_c(step, d, n, unit), active);
    c_row[unit] = c;
    c_row[hidden + unit] = active[3];
    mean_c[0] += c;
  }
  block_sums(mean_c, even);
  mean_c[0] /= static_cast<A>(hidden);
  A rstd_c[1] = {};
  for (int64_t unit = threadIdx.x; unit < hidden; unit += threads) {
    const A dc = c_row[unit] - mean_c[0];
    rstd_c[0] += dc * dc;
  }
  block_sums(rstd_c, odd);
  rstd_c[0] = reciprocal_deviation(rstd_c[0] / static_cast<A>(hidden));

  for (int64_t unit = threadIdx.x; unit < hidden; unit += threads) {
    const A c = c_row[unit], norm_c = cells::LayerNorm::forward(c, mean_c[0], rstd_c[0]);
    const A h = NormCell::output<ExactMath<A>>(c_row[hidden + unit], norm_c, widen(norm.weight_c[unit]),
                                               widen(norm.bias_c[unit]));
    leave_unit<NormCell, true>(step, d, n, unit, h, c);
  }
  if (norm.statistics && threadIdx.x == 0) {
    A* to = norm.statistics + row * kNormStatistics;
    to[NormCell::kRstdIh] = rstd[0];
    to[NormCell::kRstdHh] = rstd[1];
    to[NormCell::kMeanC] = mean_c[0];
    to[NormCell::kRstdC] = rstd_c[0];
  }
}

// grid: (rows, 1, directions)
template <class T>
__global__ void __launch_bounds__(kMaxNormThreads, kNormBlocks<T>)
    norm_backward_kernel(const __grid_constant__ NormStep<BackwardStep<T>, T> step) {
  using A = AccumulatorOf<T>;
  RNN_EXT_SHARED(A, places, (2 + 4) * kMaxNormWarps);
  const BackwardStepDirection<T>& d = step.direction[blockIdx.z];
  const NormPointers<T>& norm = step.norm[blockIdx.z];
  const int64_t hidden = step.hidden, n = blockIdx.x, threads = blockDim.x;
  if (n >= backward_rows(d)) return;
  const bool flows = step.rules.exists(d.after, n), has_before = step.rules.exists(d.before, n);
  const bool cut = step.rules.cut(d.before, d.now, n), there = step.rules.exists(d.now, n);
  const int64_t row = d.now.row(n, step.rules.batch_stride), row_before = d.before.row(n, step.rules.batch_stride);
  const T* norm_ih = d.saved + (row * kSavedPlanes<NormCell> + NormCell::kNormIh) * hidden;
  const T* norm_hh = d.saved + (row * kSavedPlanes<NormCell> + NormCell::kNormHh) * hidden;
  T* dgates_row = d.dgates + row * d.dgates_stride;
  enum { kActive = 0, kGradO = 3, kGradNorm = 4, kNormC = 5, kGradC = 6 };  // i f g and then their gradients
  A* scratch = norm.scratch + n * RNN_EXT_NORM_SCRATCH * hidden;
  const auto c_prev = [&](int64_t unit) {
    return previous_state(cut, has_before, d.cells + row_before * hidden + unit, d.c_0, n * hidden + unit);
  };
  A statistics[kNormStatistics];
#pragma unroll
  for (int i = 0; i < kNormStatistics; ++i) statistics[i] = there ? norm.statistics[row * kNormStatistics + i] : A(0);

  A mean_c[2] = {};  // of the gradient of LN(c) before its scale, and of it times LN(c)
  for (int64_t unit = threadIdx.x; unit < hidden; unit += threads) {
    const int64_t state = n * hidden + unit;
    A dh, dc;
    if (!gradients_arrive<NormCell>(step, d, n, unit, flows ? widen(d.dh_recurrent[state]) : A(0), dh, dc)) continue;
    d.dh_carry[state] = add_doutput<NormCell>(d, row, unit, dh);
    scratch[kGradC * hidden + unit] = dc;
    A ih[kNormGates], hh[kNormGates], gates[kNormGates], active[kNormGates], dgates[kNormGates];
#pragma unroll
    for (int g = 0; g < kNormGates; ++g) {
      ih[g] = widen(norm_ih[g * hidden + unit]);
      hh[g] = widen(norm_hh[g * hidden + unit]);
    }
    normed_gates(norm, hidden, unit, ih, hh, gates);
    const A c = NormCell::next_cell<ExactMath<A>>(gates, c_prev(unit), active);
    const A norm_c = cells::LayerNorm::forward(c, statistics[NormCell::kMeanC], statistics[NormCell::kRstdC]);
    const A weight = widen(norm.weight_c[unit]);
    const A tanh_c = NormCell::tanh_c<ExactMath<A>>(norm_c, weight, widen(norm.bias_c[unit]));
    const A dscaled = NormCell::output_backward(active[3], tanh_c, dh, dgates);
#pragma unroll
    for (int g = 0; g < 3; ++g) scratch[(kActive + g) * hidden + unit] = active[g];
    scratch[kGradO * hidden + unit] = dgates[3];
    const A dnorm = cells::LayerNorm::y_backward(dscaled, weight);
    scratch[kGradNorm * hidden + unit] = dnorm;
    scratch[kNormC * hidden + unit] = norm_c;
    dgates_row[NormCell::kGradNorm * hidden + unit] = narrow<T>(dscaled);
    dgates_row[NormCell::kNormC * hidden + unit] = narrow<T>(norm_c);
    mean_c[0] += dnorm;
    mean_c[1] += dnorm * norm_c;
  }
  if (!there) return;
  block_sums(mean_c, places);
  mean_c[0] /= static_cast<A>(hidden);
  mean_c[1] /= static_cast<A>(hidden);

  A mean[4] = {};  // of the gradients of the normalised gates, input and recurrent, and of each times its value
  for (int64_t unit = threadIdx.x; unit < hidden; unit += threads) {
    A active[kNormGates], dgates[kNormGates], dc = scratch[kGradC * hidden + unit];
    const A c_before = add_dcells<NormCell>(d, row, unit, dc);
    dc += cells::LayerNorm::backward(scratch[kGradNorm * hidden + unit], scratch[kNormC * hidden + unit],
                                     statistics[NormCell::kRstdC], mean_c[0], mean_c[1]);
#pragma unroll
    for (int g = 0; g < 3; ++g) active[g] = scratch[(kActive + g) * hidden + unit];
    d.dc_carry[n * hidden + unit] = c_before + NormCell::cell_backward(active, c_prev(unit), dc, dgates);
    dgates[3] = scratch[kGradO * hidden + unit];
#pragma unroll
    for (int g = 0; g < kNormGates; ++g) {
      const int64_t at = g * hidden + unit;
      scratch[(kActive + g) * hidden + unit] = dgates[g];
      dgates_row[NormCell::kGradGate * hidden + at] = narrow<T>(dgates[g]);
      const A d_ih = cells::LayerNorm::y_backward(dgates[g], widen(norm.weight_ih[at]));
      const A d_hh = cells::LayerNorm::y_backward(dgates[g], widen(norm.weight_hh[at]));
      mean[0] += d_ih;
      mean[1] += d_ih * widen(norm_ih[at]);
      mean[2] += d_hh;
      mean[3] += d_hh * widen(norm_hh[at]);
    }
  }
  block_sums(mean, places + 2 * kMaxNormWarps);
#pragma unroll
  for (int i = 0; i < 4; ++i) mean[i] /= static_cast<A>(kNormGates * hidden);

  for (int64_t unit = threadIdx.x; unit < hidden; unit += threads) {
#pragma unroll
    for (int g = 0; g < kNormGates; ++g) {
      const int64_t at = g * hidden + unit;
      const A dgate = scratch[(kActive + g) * hidden + unit];
      const A d_ih = cells::LayerNorm::y_backward(dgate, widen(norm.weight_ih[at]));
      const A d_hh = cells::LayerNorm::y_backward(dgate, widen(norm.weight_hh[at]));
      dgates_row[NormCell::ih_slot(g) * hidden + unit] = narrow<T>(
          cells::LayerNorm::backward(d_ih, widen(norm_ih[at]), statistics[NormCell::kRstdIh], mean[0], mean[1]));
      dgates_row[NormCell::hh_slot(g) * hidden + unit] = narrow<T>(
          cells::LayerNorm::backward(d_hh, widen(norm_hh[at]), statistics[NormCell::kRstdHh], mean[2], mean[3]));
    }
  }
}

// ---- the state of a projected layer ---------------------------------------------------------------------------------

using ProjectedState = cells::Masked<cells::RnnBase>;  // no cell state, and nothing to compute but zoneout and the mask

// One thread per (row, feature); step.hidden is P. grid: (rows, feature blocks, directions)
template <class T>
__global__ void __launch_bounds__(kTileThreads) projected_forward_kernel(const __grid_constant__ ForwardStep<T> step) {
  const ForwardStepDirection<T>& d = step.direction[blockIdx.z];
  int64_t n, unit;
  if (!pointwise_place(d.now.rows, step.hidden, n, unit)) return;
  if (!step.rules.exists(d.now, n)) {
    leave_absent_unit<ProjectedState>(step, d, n, unit);
    return;
  }
  const T projection = d.output[d.now.row(n, step.rules.batch_stride) * d.output_stride + unit];
  leave_unit<ProjectedState, true>(step, d, n, unit, widen(projection), 0);
}

template <class T>
__global__ void __launch_bounds__(kTileThreads)
    projected_backward_kernel(const __grid_constant__ BackwardStep<T> step) {
  using A = AccumulatorOf<T>;
  const BackwardStepDirection<T>& d = step.direction[blockIdx.z];
  int64_t n, unit;
  if (!pointwise_place(backward_rows(d), step.hidden, n, unit)) return;
  const int64_t row = d.now.row(n, step.rules.batch_stride), state = n * step.hidden + unit;
  const A product = step.rules.exists(d.after, n) ? widen(d.dh_recurrent[state]) : A(0);
  A dh, no_cell;
  if (!gradients_arrive<ProjectedState>(step, d, n, unit, product, dh, no_cell)) return;
  d.dh_carry[state] = add_doutput<ProjectedState>(d, row, unit, dh);
  d.dgates[row * d.dgates_stride + unit] = narrow<T>(dh);
}

}  // namespace rnn_ext::cuda
