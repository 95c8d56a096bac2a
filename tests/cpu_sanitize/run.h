// A configuration, run on csrc/cpu: everything that it computes, forward and backward, and whatever else the kernels
// make of the same numbers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/layer.h"
#include "cpu/quantized.h"
#include "problem.h"

namespace cpu_sanitize {

/// Backward of a layer of 16 bits with all that may stay as it is stored gives what it gives with the same numbers as
/// floats, gradients of weights and of the input rounded to the nearest.
template <class W>
void compare_narrow(const Config& config, BackwardArgs<float> args, Random& random, const Executor& executor) {
  constexpr bool kIsFloat16 = std::is_same_v<W, Float16>;
  constexpr double kRounding = kIsFloat16 ? 0x1p-11 : 0x1p-8;
  const bool baseline = std::strcmp(capability(), "baseline") == 0;  // which may not widen Float16
  if (kIsFloat16 && baseline) return;
  if (has_few_units<W>(config.cell, config.variant, args.sizes, args.layout)) return;   // of which nothing stays so
  const auto decide = baseline ? narrow_backward<BFloat16> : narrow_backward<Float16>;  // which none multiplies
  // Backward with other weights than those of forward, through so many normalised steps, overflows.
  if (config.variant == Variant::kLayerNorm && args.layout.rows > 128) return;
  const Narrow narrow = decide(config.cell, config.variant, args.sizes, args.layout);
  const int64_t D = args.sizes.directions, N = args.layout.batch;
  const std::vector<int64_t> sizes = weight_sizes(config);
  std::vector<Array<W>> weights;
  std::vector<Array<float>> wide;
  for (int64_t i = 0; i < 2 * D; ++i) {
    weights.emplace_back(sizes[size_t(i % 2)], random, 1 / std::sqrt(double(config.hidden)));
    wide.emplace_back(weights.back().size());
    for (int64_t k = 0; k < wide.back().size(); ++k) wide.back().begin()[k] = float(number(weights.back().begin()[k]));
  }
  const auto gradients = [&]<class Grad, class GradInput>(Grad, GradInput) {
    const int64_t positions = config.form == Config::kPacked ? args.layout.rows : config.steps * N;
    const Array<GradInput> grad_input(positions * config.input);
    const Array<float> grad_h_0(D * N * args.sizes.output());
    const Array<float> grad_c_0(config.has_cell() ? D * N * config.hidden : 0);
    std::vector<Array<Grad>> grads;
    const bool wants_input = args.grad_input.data, wants_h_0 = args.grad_h_0, wants_c_0 = args.grad_c_0;
    if (wants_input) args.grad_input = sequence<GradInput>(grad_input, config, config.input).template of<void>();
    if (wants_h_0) args.grad_h_0 = grad_h_0.begin();
    if (wants_c_0) args.grad_c_0 = grad_c_0.begin();
    for (int d = 0; d < D; ++d) {
      for (int i = 0; i < kWeights; ++i) {
        void*& grad = args.grad_weights[d].*kMembers<void>[i];
        if (!grad) continue;
        grads.emplace_back(sizes[size_t(i)]);
        grad = grads.back().begin();
      }
    }
    layer_backward(args, executor);
    Results results;
    if (wants_input) results.add(grad_input, "grad_input", config, args.layout, config.input);
    const size_t states = results.values.size();
    if (wants_h_0) results.add(grad_h_0, "grad_h_0");
    if (wants_c_0) results.add(grad_c_0, "grad_c_0");
    const size_t parameters = results.values.size();
    for (const Array<Grad>& grad : grads) results.add(grad, "gradient of a weight");
    return std::tuple(results, states, parameters);
  };
  const auto weights_of = [&](int64_t d, int i) { return size_t(2 * d + i); };
  for (int d = 0; d < D; ++d) {
    args.weights[d].weight_ih = wide[weights_of(d, 0)].begin();
    args.weights[d].weight_hh = wide[weights_of(d, 1)].begin();
  }
  const auto [expected, states, parameters] = gradients(float(), float());
  args.narrow = kIsFloat16 ? Storage::kFloat16 : Storage::kBFloat16;
  args.narrow_grads = narrow.grads;
  args.narrow_grad_input = narrow.grad_input;
  for (int d = 0; d < D; ++d) {
    if (narrow.weight_ih) {
      args.weights[d].weight_ih = nullptr;
      args.narrow_ih[d] = weights[weights_of(d, 0)].begin();
    }
    if (narrow.weight_hh) {
      args.weights[d].weight_hh = nullptr;
      args.narrow_hh[d] = weights[weights_of(d, 1)].begin();
    }
  }
  if (!narrow.grads) fail(config, "backward in 16 bits does not round gradients");
  const Results found = std::get<0>(narrow.grad_input ? gradients(W(), W()) : gradients(W(), float()));
  if (!found.problem.empty()) fail(config, "backward in 16 bits: " + found.problem);
  if (found.values.size() != expected.values.size()) fail(config, "backward in 16 bits has other results");
  double largest = 1;
  for (double value : expected.values) largest = std::max(largest, std::abs(value));
  for (size_t i = 0; i < found.values.size(); ++i) {
    const bool rounded = i >= parameters || (narrow.grad_input && i < states);
    const double value = expected.values[i], rounding = rounded ? kRounding : 0;
    if (std::abs(found.values[i] - value) > 1e-5 * largest + rounding * std::abs(value))
      fail(config,
           "backward in 16 bits has " + std::to_string(found.values[i]) + " for float's " + std::to_string(value));
  }
}

/// The derivatives of all that a plain layer without projection computes, in a direction in which, by config.wanted,
/// everything moves or only a part of it.
template <class T>
void add_tangents(const Config& config, const BackwardArgs<T>& backward, const Executor& executor, Results& results) {
  Random random{uint64_t(config.hidden)};  // of its own: how much has been drawn before depends on the instruction set
  const int64_t D = config.directions, N = config.batch, H = config.hidden, I = config.input;
  const int64_t positions = config.form == Config::kPacked ? backward.layout.rows : config.steps * N;
  const auto bit = [&](int i) { return (config.wanted >> i & 1) != 0; };
  const std::vector<int64_t> sizes = weight_sizes(config);
  const Array<T> input(positions * I, random, 1), h_0(D * N * H, random, 1), c_0(D * N * H, random, 1);
  const Array<T> grad_output(positions * D * H, random, 1), grad_cells(positions * D * H, random, 1);
  const Array<T> grad_h_n(D * N * H, random, 1), grad_c_n(D * N * H, random, 1);
  const Array<T> output(positions * D * H), cells(positions * D * H), h_n(D * N * H), c_n(D * N * H);
  const Array<T> grad_input(positions * I), grad_h_0(D * N * H), grad_c_0(D * N * H);
  std::vector<Array<T>> weights, grad_weights;
  for (int64_t i = 0; i < D * kWeights; ++i) {
    weights.emplace_back(sizes[size_t(i % kWeights)], random, 1 / std::sqrt(double(H)));
    grad_weights.emplace_back(sizes[size_t(i % kWeights)]);
  }
  TangentArgs<T> args;
  args.values = args.tangents = backward;
  args.tangents.input = bit(12) ? sequence<const T>(input, config, I) : Sequence<const T>{};
  args.tangents.h_0 = bit(13) && config.states ? h_0.begin() : nullptr;
  args.tangents.c_0 = bit(14) && config.states && config.has_cell() ? c_0.begin() : nullptr;
  if (args.values.grad_output.data) args.tangents.grad_output = sequence<const T>(grad_output, config, D * H);
  if (args.values.grad_cells.data) args.tangents.grad_cells = sequence<const T>(grad_cells, config, D * H);
  if (args.values.grad_h_n) args.tangents.grad_h_n = grad_h_n.begin();
  if (args.values.grad_c_n) args.tangents.grad_c_n = grad_c_n.begin();
  if (bit(0)) args.output = sequence<T>(output, config, D * H);
  if (config.cells) args.cells = sequence<T>(cells, config, D * H);
  if (bit(2)) args.h_n = h_n.begin();
  if (bit(3) && config.has_cell()) args.c_n = c_n.begin();
  if (backward.grad_input.data) args.tangents.grad_input = sequence<T>(grad_input, config, I).template of<void>();
  if (backward.grad_h_0) args.tangents.grad_h_0 = grad_h_0.begin();
  if (backward.grad_c_0) args.tangents.grad_c_0 = grad_c_0.begin();
  args.backward = args.tangents.grad_input.data || args.tangents.grad_h_0 || args.tangents.grad_c_0;
  for (int d = 0; d < config.directions; ++d) {
    for (int i = 0; i < kWeights; ++i) {
      const size_t at = size_t(d * kWeights + i);
      const T*& weight = args.tangents.weights[d].*kMembers<const T>[i];
      if (weight) weight = bit(15 - i % 4) ? weights[at].begin() : nullptr;
      void*& grad = args.tangents.grad_weights[d].*kMembers<void>[i];
      if (grad) grad = grad_weights[at].begin();
      args.backward |= grad != nullptr;
    }
  }
  layer_tangent(args, executor);
  if (args.output.data) results.add(output, "tangent of output", config, backward.layout, D * H);
  if (args.cells.data) results.add(cells, "tangent of cells", config, backward.layout, D * H);
  if (args.h_n) results.add(h_n, "tangent of h_n");
  if (args.c_n) results.add(c_n, "tangent of c_n");
  if (args.tangents.grad_input.data) results.add(grad_input, "tangent of grad_input", config, backward.layout, I);
  if (args.tangents.grad_h_0) results.add(grad_h_0, "tangent of grad_h_0");
  if (args.tangents.grad_c_0) results.add(grad_c_0, "tangent of grad_c_0");
  for (int64_t i = 0; i < D * kWeights; ++i) {
    if (args.tangents.grad_weights[i / kWeights].*kMembers<void>[i % kWeights])
      results.add(grad_weights[size_t(i)], "tangent of a weight's gradient");
  }
}

/// Gradients of weights by group, of which what is given has the sums. Pairs of batch entries, or single ones.
template <class S>
void add_groups(const Config& config, BackwardArgs<S> args, const Executor& executor, Results& results) {
  using T = Compute<S>;
  args.groups = config.batch % 2 == 0 ? config.batch / 2 : config.batch;
  args.grad_input = {};
  args.grad_h_0 = args.grad_c_0 = nullptr;
  const std::vector<int64_t> sizes = weight_sizes(config);
  std::vector<Array<T>> grads;
  std::vector<const T*> sums;
  for (int64_t i = 0; i < config.directions * kWeights; ++i) {
    void*& grad = args.grad_weights[i / kWeights].*kMembers<void>[i % kWeights];
    grads.emplace_back(grad ? args.groups * sizes[size_t(i % kWeights)] : 0);
    sums.push_back(static_cast<const T*>(grad));
    if (grad) grad = grads.back().begin();
  }
  layer_backward(args, executor);
  for (size_t i = 0; i < grads.size(); ++i) {
    results.add(grads[i], "a group's gradient of a weight");
    const int64_t size = grads[i].size() / args.groups;
    double largest = 1;
    for (int64_t k = 0; k < size; ++k) largest = std::max(largest, std::abs(double(sums[i][k])));
    for (int64_t k = 0; k < size; ++k) {
      double sum = 0;
      for (int64_t group = 0; group < args.groups; ++group) sum += grads[i].begin()[group * size + k];
      if (!(std::abs(sum - sums[i][k]) <= 1e-4 * largest)) fail(config, "gradients of groups have another sum");
    }
  }
}

/// Forward with weights of 8 bits, and so many side by side.
inline void add_quantized(const Config& config, int pack, const ForwardArgs<float>& call, const Executor& executor,
                          Results& results) {
  Random random{uint64_t(config.input)};  // of its own, as above
  const Sizes& sizes = call.sizes;
  const int64_t D = config.directions, N = config.batch, G = config.gates(), H = config.hidden, out = sizes.output();
  const int64_t positions = config.form == Config::kPacked ? call.layout.rows : config.steps * N;
  const Array<float> output(positions * D * out), cells(positions * D * H), h_n(D * N * out);
  const Array<float> c_n(config.has_cell() ? D * N * H : 0);
  QuantizedArgs args;
  args.pack = pack;
  args.call = call;
  args.call.output = sequence<float>(output, config, D * out);
  if (config.cells) args.call.cells = sequence<float>(cells, config, D * H);
  args.call.h_n = h_n.begin();
  args.call.c_n = config.has_cell() ? c_n.begin() : nullptr;
  args.call.saved = nullptr;
  std::vector<std::unique_ptr<int8_t[]>> weights;
  std::vector<Array<float>> scales;
  const auto add_weight = [&](int64_t units, int64_t depth, int64_t gates) -> const int8_t* {
    const int64_t block = kQuantizedBlock, groups = (depth + pack - 1) / pack;
    const int64_t size = (units + block - 1) / block * groups * gates * block * pack;
    weights.emplace_back(new int8_t[size_t(size)]());
    for (int64_t at = 0; at < size; ++at) {
      const int64_t unit = at / (groups * gates * block * pack) * block + at / pack % block;
      const int64_t k = at / (gates * block * pack) % groups * pack + at % pack;
      if (unit < units && k < depth) weights.back()[size_t(at)] = int8_t(random.below(255) - 127);
    }
    return weights.back().get();
  };
  const auto add_scales = [&](int64_t size) -> const float* {
    scales.emplace_back(size, random, 1 / (127 * std::sqrt(double(H))));
    return scales.back().begin();
  };
  for (int d = 0; d < config.directions; ++d) {
    args.weights[d] = {add_weight(H, config.input, G), add_weight(H, out, G), add_scales(4 * G * H),
                       config.proj ? add_weight(config.proj, H, 1) : nullptr,
                       config.proj ? add_scales(config.proj) : nullptr};
  }
  quantized_forward(args, executor);
  results.add(output, "output with weights of 8 bits", config, call.layout, D * out);
  results.add(h_n, "h_n with weights of 8 bits");
  results.add(c_n, "c_n with weights of 8 bits");
  if (config.cells) results.add(cells, "cells with weights of 8 bits", config, call.layout, D * H);
}

/// Forward and backward, or forward alone of what is only widened; nothing of a layout for which not even that is
/// there.
template <class S>
Results run(const Config& config, const Executor& executor) {
  using T = Compute<S>;
  Random random(uint64_t(config.steps * 7 + config.batch * 31 + config.input * 101 + config.hidden * 1009));
  const Steps steps(config, random);
  const Layout& layout = steps.layout;
  const int64_t D = config.directions, N = config.batch, H = config.hidden;
  const Sizes sizes{config.input, H, config.proj, config.directions};
  if (!computes_forward<S>(config.cell, sizes, layout)) return {};
  const int64_t out = sizes.output();
  const int64_t positions = config.form == Config::kPacked ? layout.rows : config.steps * N;
  const double scale = 1 / std::sqrt(double(H));
  const bool normed = config.variant == Variant::kLayerNorm;

  const Array<S> input(positions * config.input, random, 1);
  const Array<S> h_0(D * N * out, random, 1), c_0(D * N * H, random, 1);
  std::vector<Array<S>> weights;
  std::vector<Array<T>> grad_weights;
  for (int d = 0; d < config.directions; ++d) {
    for (int64_t size : weight_sizes(config)) {
      weights.emplace_back(size, random, scale);
      grad_weights.emplace_back(size);
    }
  }
  const Array<S> hidden_mask(D * N * out, random, 1);
  const Array<S> zoneout_h(positions * D * out, random, 1), zoneout_c(positions * D * H, random, 1);
  const std::unique_ptr<bool[]> resets(new bool[size_t(positions)]);
  for (int64_t i = 0; i < positions; ++i) resets[size_t(i)] = random.below(4) == 0;

  ForwardArgs<S> forward;
  forward.cell = config.cell;
  forward.sizes = sizes;
  forward.layout = layout;
  forward.input = sequence<const S>(input, config, config.input);
  if (config.resets) {
    const bool by_batch = config.form == Config::kBatchMajor;
    forward.resets = {resets.get(), by_batch ? 1 : N, by_batch ? config.steps : 1};
    if (config.form == Config::kPacked) forward.resets = {resets.get(), 0, 1};
  }
  if (config.states) {
    forward.h_0 = h_0.begin();
    forward.c_0 = config.has_cell() ? c_0.begin() : nullptr;
  }
  for (int d = 0; d < config.directions; ++d) {
    const Array<S>* w = &weights[size_t(kWeights * d)];
    forward.weights[d] = {w[0].begin(), w[1].begin(), config.bias ? w[2].begin() : nullptr,
                          config.bias ? w[3].begin() : nullptr, config.proj ? w[4].begin() : nullptr};
    if (normed) {
      forward.weights[d].weight_norm_ih = w[5].begin();
      forward.weights[d].weight_norm_hh = w[6].begin();
      forward.weights[d].weight_norm_c = w[7].begin();
      forward.weights[d].bias_norm_c = w[8].begin();
    }
  }
  forward.variant = config.variant;
  if (config.masks & 1) forward.masks.hidden = hidden_mask.begin();
  if (config.masks & 2) forward.masks.zoneout_h = sequence<const S>(zoneout_h, config, D * out);
  if (config.masks & 4 && config.has_cell()) forward.masks.zoneout_c = sequence<const S>(zoneout_c, config, D * H);
  Results results;
  // First without keeping anything for backward, then with: the same outputs.
  std::vector<double> first;
  for (bool save : {false, true}) {
    const Array<S> output(positions * D * out), cells(positions * D * H), h_n(D * N * out);
    const Array<S> c_n(config.has_cell() ? D * N * H : 0);
    const int64_t kept = D * layout.rows * saved_values(config.cell, config.proj != 0, config.variant) * sizes.padded();
    const Array<T> saved(save ? kept : 0);
    forward.output = sequence<S>(output, config, D * out);
    forward.cells = config.cells ? sequence<S>(cells, config, D * H) : Sequence<S>{};
    forward.h_n = h_n.begin();
    forward.c_n = config.has_cell() ? c_n.begin() : nullptr;
    forward.saved = save ? saved.begin() : nullptr;
    layer_forward(forward, executor);
    results.values.clear();
    results.add(output, "output", config, layout, D * out);
    results.add(h_n, "h_n");
    results.add(c_n, "c_n");
    if (config.cells) results.add(cells, "cells", config, layout, D * H);
    if (!save) {
      first = results.values;
      continue;
    }
    if (first != results.values) results.problem = "outputs differ with and without saving";
    constexpr bool kIs16Bit = sizeof(S) == 2;
    if (kIs16Bit && !(std::is_same_v<S, BFloat16> && computes_bfloat16())) break;

    const auto bit = [&](int i) { return (config.wanted >> i & 1) != 0; };
    const Array<S> grad_output(positions * D * out, random, 1), grad_cells(positions * D * H, random, 1);
    const Array<S> grad_h_n(D * N * out, random, 1), grad_c_n(D * N * H, random, 1);
    const Array<T> grad_input(positions * config.input), grad_h_0(D * N * out), grad_c_0(D * N * H);
    BackwardArgs<S> backward;
    backward.cell = config.cell;
    backward.sizes = sizes;
    backward.layout = layout;
    backward.input = forward.input;
    backward.resets = forward.resets;
    backward.h_0 = forward.h_0;
    backward.c_0 = forward.c_0;
    backward.output = sequence<const S>(output, config, D * out);
    backward.saved = saved.begin();
    backward.variant = forward.variant;
    backward.masks = forward.masks;
    if (bit(0)) backward.grad_output = sequence<const S>(grad_output, config, D * out);
    if (bit(1) && config.cells) backward.grad_cells = sequence<const S>(grad_cells, config, D * H);
    if (bit(2)) backward.grad_h_n = grad_h_n.begin();
    if (bit(3) && config.has_cell()) backward.grad_c_n = grad_c_n.begin();
    if (bit(4)) backward.grad_input = sequence<T>(grad_input, config, config.input).template of<void>();
    if (bit(5)) backward.grad_h_0 = grad_h_0.begin();
    if (bit(6) && config.has_cell()) backward.grad_c_0 = grad_c_0.begin();
    for (int d = 0; d < config.directions; ++d) {
      const Array<T>* g = &grad_weights[size_t(kWeights * d)];
      backward.weights[d] = forward.weights[d];
      for (int i = 0; i < kWeights; ++i)
        if (bit(7 + i) && forward.weights[d].*kMembers<const S>[i])
          backward.grad_weights[d].*kMembers<void>[i] = g[i].begin();
    }
    if constexpr (!std::is_same_v<S, Float16>) layer_backward(backward, executor);
    if constexpr (std::is_same_v<S, float>) {
      if (config.with_bfloat16) {
        compare_narrow<BFloat16>(config, backward, random, executor);
      } else {
        compare_narrow<Float16>(config, backward, random, executor);
      }
    }
    if (bit(4)) results.add(grad_input, "grad_input", config, layout, config.input);
    if (bit(5)) results.add(grad_h_0, "grad_h_0");
    if (bit(6) && config.has_cell()) results.add(grad_c_0, "grad_c_0");
    for (int d = 0; d < config.directions; ++d) {
      const Array<T>* g = &grad_weights[size_t(kWeights * d)];
      for (int i = 0; i < kWeights; ++i)
        if (backward.grad_weights[d].*kMembers<void>[i]) results.add(g[i], kGradNames[i]);
    }
    const bool plain = config.variant == Variant::kPlain && !config.proj;
    if constexpr (!std::is_same_v<S, Float16>) {
      if (plain && config.form != Config::kPacked && config.steps > 0 && N > 0)
        add_groups(config, backward, executor, results);
    }
    if constexpr (!kIs16Bit) {
      if (plain) add_tangents<T>(config, backward, executor, results);
    }
    if constexpr (std::is_same_v<S, float>) {
      if (config.variant == Variant::kPlain) {
        for (int pack : {2, 4}) {
          multiply_integers(false);
          Results plain;
          add_quantized(config, pack, forward, executor, plain);
          multiply_integers(true);
          const size_t size = results.values.size();
          add_quantized(config, pack, forward, executor, results);
          if (!std::equal(plain.values.begin(), plain.values.end(), results.values.begin() + long(size)))
            fail(config, "instructions that multiply integers give other bits");
        }
      }
    }
  }
  if (!results.problem.empty()) fail(config, results.problem);
  return results;
}

}  // namespace cpu_sanitize
