// The variants of the cells (cells/variants.h): the scans of forward.inl and backward.inl with a step of their own. In
// that of layer normalisation, and backward, the recurrent product is finished before the cell begins, which may need
// sums over its row.

template <class T>
ALWAYS_INLINE T lane_sum(Vec<T> v) {
#if RNN_EXT_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float>) return _mm512_reduce_add_ps(v);
  if constexpr (std::is_same_v<T, double>) return _mm512_reduce_add_pd(v);
#endif
  alignas(64) T lanes[kLanes<T>];
  store(lanes, v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

/// v with zeros from lane `count` on: a sum over a row must not see what lies past its end.
template <class T>
ALWAYS_INLINE Vec<T> only_first(Vec<T> v, int64_t count) {
  if (count >= kLanes<T>) return v;
  alignas(64) T lanes[kLanes<T>];
  store(lanes, v);
  for (int64_t i = larger(count, 0); i < kLanes<T>; ++i) lanes[i] = 0;
  return load(lanes);
}

template <class T>
struct Statistics {
  T mean, rstd;
};

/// Of each of some rows of kParts stretches of `hidden` values; the rows together, because each alone is a chain of
/// sums that the processor would wait for.
template <int kParts, int kRows, class T>
ALWAYS_INLINE void statistics(Statistics<T> (&found)[kRows], const T* const (&rows)[kRows], int64_t hidden,
                              int64_t padded) {
  using V = Vec<T>;
  const T share = T(1) / T(kParts * hidden);
  // Calls fn(r, p, values, count) for all values.
  const auto for_all = [&](const auto& fn) ALWAYS_INLINE_LAMBDA {
    const auto vectors = [&](int64_t unit, int64_t count) ALWAYS_INLINE_LAMBDA {
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int p = 0; p < kParts; ++p) fn(r, p, load(rows[r] + p * padded + unit), count);
      }
    };
    int64_t unit = 0;
    for (; unit + kLanes<T> <= hidden; unit += kLanes<T>) vectors(unit, kWhole);
    if (unit < hidden) vectors(unit, hidden - unit);
  };
  const auto total = [](V(&parts)[kParts]) ALWAYS_INLINE_LAMBDA {
#pragma GCC unroll 4
    for (int p = 1; p < kParts; ++p) parts[0] += parts[p];
    return lane_sum<T>(parts[0]);
  };
  V sum[kRows][kParts] = {}, squares[kRows][kParts] = {};
  for_all([&](int r, int p, V x, int64_t count) ALWAYS_INLINE_LAMBDA { sum[r][p] += only_first<T>(x, count); });
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) found[r].mean = total(sum[r]) * share;
  for_all([&](int r, int p, V x, int64_t count) ALWAYS_INLINE_LAMBDA {
    const V d = only_first<T>(x - found[r].mean, count);
    squares[r][p] = fma(d, d, squares[r][p]);
  });
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r)
    found[r].rstd = T(1 / __builtin_sqrt(double(total(squares[r]) * share) + cells::LayerNorm::kEps));
}

/// One direction's scales and shifts in padded rows; zeros past their ends.
template <class T>
struct NormWeights {
  NormWeights(const Weights<const T>& w, const Sizes& s)
      : ih(4 * s.padded(), true),
        hh(4 * s.padded(), true),
        bias(4 * s.padded(), true),
        c(s.padded(), true),
        c_bias(s.padded(), true) {
    for (int64_t u = 0; u < s.hidden; ++u) {
      for (int64_t g = 0; g < 4; ++g) {
        const int64_t from = g * s.hidden + u, to = g * s.padded() + u;
        ih.get()[to] = w.weight_norm_ih[from];
        hh.get()[to] = w.weight_norm_hh[from];
        if (w.bias_ih) bias.get()[to] = w.bias_ih[from] + w.bias_hh[from];
      }
      c.get()[u] = w.weight_norm_c[u];
      c_bias.get()[u] = w.bias_norm_c[u];
    }
  }
  Buffer<T> ih, hh, bias;  // [4, padded H]
  Buffer<T> c, c_bias;     // [padded H]

  template <class V>
  ALWAYS_INLINE V gate(int g, int64_t unit, int64_t padded, V norm_ih, V norm_hh) const {
    const int64_t at = g * padded + unit;
    return cells::LayerNormLstm::gate(norm_ih, load(ih.get() + at), norm_hh, load(hh.get() + at),
                                      load(bias.get() + at));
  }
};

template <class T>
struct NoNormWeights {
  NoNormWeights(const Weights<const T>&, const Sizes&) {}
};
template <class Cell, class T>
using NormWeightsOf = std::conditional_t<cells::kIsNormed<Cell>, NormWeights<T>, NoNormWeights<T>>;

template <class Cell, class T>
struct VariantForward<Cell, T, true> {
  VariantForward(const ForwardArgs<T>& args, int direction, Slice slice)
      : norm(args.weights[direction], args.sizes),
        masked(args.masks.hidden ? slice.size() * Sizes::padded(args.sizes.output()) : 0),
        inputs(slice.size()),
        hidden_gates(cells::kIsNormed<Cell> ? slice.size() * Cell::kGates * args.sizes.padded() : 0),
        products(cells::kIsNormed<Cell> ? slice.size() : 0),
        c(cells::kIsNormed<Cell> ? args.sizes.padded() : 0),
        o(cells::kIsNormed<Cell> ? args.sizes.padded() : 0) {}
  NormWeightsOf<Cell, T> norm;
  Buffer<T> masked;         // [slice, padded P]: h times its mask
  Buffer<const T*> inputs;  // [slice]
  // Of layer normalisation:
  Buffer<T> hidden_gates;  // [slice, G, padded H], where they are not to be saved
  Buffer<T*> products;     // [slice]
  Buffer<T> c, o;          // [padded H], of one row
};

template <class Cell, class S>
void ForwardScan<Cell, S>::variant_step(const VariantStep& at) {
  const T** inputs = variant_.inputs.get();
  const T* masks = args_.masks.hidden;
  for (int64_t r = 0; r < at.rows; ++r) {
    inputs[r] = at.now + r * out_padded_;
    if (masks) {
      const int64_t entry = direction_ * layout_.batch + layout_.entry(slice_.first + r);
      T* masked = variant_.masked.get() + r * out_padded_;
      multiply_rows(masked, inputs[r], masks + entry * out_, out_);
      inputs[r] = masked;
    }
  }
  if constexpr (cells::kIsNormed<Cell>) {
    normed_step(at);
  } else {
    masked_step(at);
  }
  if (args_.sizes.proj) project_variant(at);
}

/// The recurrent product of a step; init and finish as those of product().
template <class Cell, class S>
template <class Init, class Finish>
ALWAYS_INLINE void ForwardScan<Cell, S>::variant_product(const VariantStep& at, const Init& init,
                                                         const Finish& finish) {
  const T** inputs = variant_.inputs.get();
  const UnpackedB<S> unpacked = unpacked_b(args_.weights[direction_].weight_hh, out_);
  const auto packed = [&](UnitBlocks blocks, const auto& init, bool tail) {
    product<G, S>(
        at.rows, blocks.first, blocks.last, step_order(layout_.batch_sizes[at.t], at.t),
        [=](int64_t r) { return inputs[r]; }, PackedB<S>(weights_.hidden.get(), by_panels_ ? &unpacked : nullptr),
        OneSegment{out_}, init, finish, tail, &side_);
  };
  if constexpr (!cells::kIsNormed<Cell>) {
    if (joined_) return join_inputs(at.t, at.rows, [](const auto&) {}, init, packed);
  }
  if (!unpacked_) return packed(part_, init, tail_);
  run_short(at.rows, [=](int64_t r) { return inputs[r]; }, init, finish);
}

/// Zoneout, and where h and c go. Returns c as it goes on.
template <class Cell, class S>
ALWAYS_INLINE auto ForwardScan<Cell, S>::leave_cell(const VariantStep& at, int64_t r, int64_t unit, V h, V state) -> V {
  const Masks<T>& masks = args_.masks;
  const int64_t j = slice_.first + r, hidden = hidden_, padded = padded_, rest = hidden - unit;
  if constexpr (Cell::kHasCell) {
    T* c = c_.get() + r * padded + unit;
    if (masks.zoneout_c.data) {
      const T* keep = masks.zoneout_c.at(layout_, at.t, j) + direction_ * hidden + unit;
      state = cells::Zoneout::forward(load_part(keep, rest), load(c), state);
    }
    store(c, state);
    if (args_.cells.data) store_part(args_.cells.at(layout_, at.t, j) + direction_ * hidden + unit, state, rest);
  }
  if (args_.sizes.proj) {
    store(unprojected_.get() + r * padded + unit, h);
    if (keep_) store(at.gates[r] + Cell::kSaved * padded + unit, h);
  } else {
    const int64_t place = r * out_padded_ + unit;
    if (masks.zoneout_h.data) {
      const T* keep = masks.zoneout_h.at(layout_, at.t, j) + direction_ * out_ + unit;
      h = cells::Zoneout::forward(load_part(keep, rest), load(at.now + place), h);
    }
    store(at.next + place, h);
    store_part(args_.output.at(layout_, at.t, j) + direction_ * out_ + unit, h, rest);
  }
  return state;
}

template <class Cell, class S>
void ForwardScan<Cell, S>::normed_step(const VariantStep& at) {
  const int64_t hidden = hidden_, padded = padded_;
  T** products = variant_.products.get();
  for (int64_t r = 0; r < at.rows; ++r)
    products[r] = keep_ ? at.gates[r] + Cell::kNormHh * padded : variant_.hidden_gates.get() + r * G * padded;
  variant_product(
      at,
      []<int B>(Patch<1, B>, V* acc) {
        for (int v = 0; v < B * G; ++v) acc[v] = V{};
      },
      [=]<int R, int B>(Patch<R, B> patch, const Wide<T, R * B>* sums) {
        patch.each([&](int64_t r, int64_t block, int i) ALWAYS_INLINE_LAMBDA {
          for (int g = 0; g < G; ++g) store(products[r] + g * padded + block * kLanes<T>, sums[g].part[i]);
        });
      });
  const auto& norm = variant_.norm;
  T *fresh = variant_.c.get(), *o = variant_.o.get();
  for (int64_t r = 0; r < at.rows; ++r) {
    T *ig = at.gates[r], *hg = products[r], *c = c_.get() + r * padded;
    Statistics<T> of_gates[2], of_c[1];
    statistics<G>(of_gates, {ig, hg}, hidden, padded);
    const V mean_ih = broadcast(of_gates[0].mean), rstd_ih = broadcast(of_gates[0].rstd);
    const V mean_hh = broadcast(of_gates[1].mean), rstd_hh = broadcast(of_gates[1].rstd);
    for (int64_t unit = 0; unit < hidden; unit += kLanes<T>) {
      V gate[G], active[G];
      for (int g = 0; g < G; ++g) {
        T *ih = ig + g * padded + unit, *hh = hg + g * padded + unit;
        const V norm_ih = cells::LayerNorm::forward(load(ih), mean_ih, rstd_ih);
        const V norm_hh = cells::LayerNorm::forward(load(hh), mean_hh, rstd_hh);
        gate[g] = norm.gate(g, unit, padded, norm_ih, norm_hh);
        if (!keep_) continue;
        store(ih, norm_ih);
        store(hh, norm_hh);
      }
      store(fresh + unit, Cell::template next_cell<Math<T>>(gate, load(c + unit), active));
      store(o + unit, active[3]);
    }
    statistics<1>(of_c, {fresh}, hidden, padded);
    for (int64_t unit = 0; unit < hidden; unit += kLanes<T>) {
      const V state = load(fresh + unit);
      const V norm_c = cells::LayerNorm::forward(state, broadcast(of_c[0].mean), broadcast(of_c[0].rstd));
      const V h = Cell::template output<Math<T>>(load(o + unit), norm_c, load(norm.c.get() + unit),
                                                 load(norm.c_bias.get() + unit));
      const V left = leave_cell(at, r, unit, h, state);
      if (keep_) store(at.gates[r] + Cell::kSavedCell * padded + unit, left);
    }
    if (keep_) {
      T* to = at.gates[r] + Cell::kStatistics * padded;
      to[Cell::kRstdIh] = of_gates[0].rstd;
      to[Cell::kRstdHh] = of_gates[1].rstd;
      to[Cell::kMeanC] = of_c[0].mean;
      to[Cell::kRstdC] = of_c[0].rstd;
    }
  }
}

template <class Cell, class S>
void ForwardScan<Cell, S>::masked_step(const VariantStep& at) {
  using Base = typename Cell::Base;
  const int64_t padded = padded_;
  const StepRows rows_of_step = {at.gates, nullptr, nullptr, at.now, at.next};
  const Cellwise finish{[&]<int R, int B>(Patch<R, B> patch, const Wide<T, R * B>* sums) NO_INLINE {
    using Vs = Wide<T, R * B>;
    Vs split[1] = {}, h_prev = {}, state = {}, saved[Cell::kSaved + 1];
    patch.each([&](int64_t r, int64_t block, int i) ALWAYS_INLINE_LAMBDA {
      const int64_t unit = block * kLanes<T>;
      if constexpr (Cell::kSplit > 0) split[0].part[i] = load(at.gates[r] + (G - 1) * padded + unit);
      if constexpr (Base::kDirectCarry) h_prev.part[i] = load(at.now + r * out_padded_ + unit);
      if constexpr (Cell::kHasCell) state.part[i] = load(c_.get() + r * padded + unit);
    });
    const Vs h = with_exact<Base>(args_.cell, [&]<class Exact>() ALWAYS_INLINE_LAMBDA {
      return Exact::template forward<Math<T, Vs>>(sums, split, h_prev, state, saved);
    });
    patch.each([&](int64_t r, int64_t block, int i) ALWAYS_INLINE_LAMBDA {
      const int64_t unit = block * kLanes<T>;
      [[maybe_unused]] const V left = leave_cell(at, r, unit, h.part[i], state.part[i]);
      if (!keep_) return;
      T* row = at.gates[r] + unit;
      for (int s = 0; s < Base::kSaved; ++s) store(row + s * padded, saved[s].part[i]);
      if constexpr (Cell::kSaved > Base::kSaved) store(row + Base::kSaved * padded, Cell::kHasCell ? left : h.part[i]);
    });
  }};
  variant_product(at, first_sums(rows_of_step), finish);
}

/// h of a projected cell, and its zoneout.
template <class Cell, class S>
void ForwardScan<Cell, S>::project_variant(const VariantStep& at) {
  project(at.t, at.rows, at.next);
  const Sequence<const T>& zoneout = args_.masks.zoneout_h;
  for (int64_t r = 0; r < at.rows && zoneout.data; ++r) {
    const int64_t j = slice_.first + r;
    const T* keep = zoneout.at(layout_, at.t, j) + direction_ * out_;
    T *after = at.next + r * out_padded_, *output = args_.output.at(layout_, at.t, j) + direction_ * out_;
    for (int64_t i = 0; i < out_; i += kLanes<T>) {
      const V h =
          cells::Zoneout::forward(load_part(keep + i, out_ - i), load(at.now + r * out_padded_ + i), load(after + i));
      store(after + i, h);
      store_part(output + i, h, out_ - i);
    }
  }
}

template <class Cell, class T>
struct VariantBackward<Cell, T, true> {
  VariantBackward(const BackwardArgs<T>& args, int direction, Slice slice)
      : norm(args.weights[direction], args.sizes),
        product(slice.size() * Sizes::padded(args.sizes.output()), true),
        dh(slice.size() * args.sizes.padded(), true),
        inputs(slice.size()),
        products(slice.size()),
        active(cells::kIsNormed<Cell> ? 3 * args.sizes.padded() : 0) {}
  NormWeightsOf<Cell, T> norm;
  Buffer<T> product;        // [slice, padded P]
  Buffer<T> dh;             // [slice, padded H]: gradient of the cell's h
  Buffer<const T*> inputs;  // [slice]
  Buffer<T*> products;      // [slice]
  Buffer<T> active;         // [3, padded H]: i f g of one row
};

/// dh += mask * (gate gradients times weight_hh), where the sequence goes on.
template <class Cell, class S, class W>
template <class GateGrads>
void BackwardScan<Cell, S, W>::add_recurrent(int64_t first, int64_t last, Order order, const GateGrads& gate_grads) {
  for (int64_t r = first; r < last; ++r) {
    variant_.inputs.get()[r] = gate_grads(r);
    variant_.products.get()[r] = variant_.product.get() + r * out_padded_;
  }
  PlainProduct<T> p;
  p.rows = last - first;
  p.columns = out_;
  p.a = variant_.inputs.get() + first;
  p.c = variant_.products.get() + first;
  p.segments = hidden_segments_;
  p.order = order;
  weights_.hidden.multiply(p);
  for (int64_t r = first; r < last; ++r) {
    const T* add = variant_.product.get() + r * out_padded_;
    const int64_t entry = direction_ * layout_.batch + layout_.entry(slice_.first + r);
    const T* mask = args_.masks.hidden ? args_.masks.hidden + entry * out_ : nullptr;
    T* dh = dh_.get() + r * out_padded_;
    for (int64_t i = 0; i < out_; i += kLanes<T>) {
      const V x = load(add + i);
      store(dh + i, load(dh + i) + (mask ? load_part(mask + i, out_ - i) * x : x));
    }
  }
}

template <class Cell, class S, class W>
void BackwardScan<Cell, S, W>::variant_step(int64_t t, int64_t first, int64_t last, int64_t after, bool chained) {
  if (first >= last) return;
  const Order order = step_order(layout_.batch_sizes[t], t);
  const int64_t proj = args_.sizes.proj;
  if (chained) {
    add_recurrent(first, last, order, [&](int64_t r) { return gate_grads(after, r); });
    for (int64_t r = first; r < last; ++r)
      if (cut_.get()[r]) std::memset(dh_.get() + r * out_padded_, 0, size_t(out_) * sizeof(T));
  }
  for (int64_t r = first; r < last; ++r) {
    const int64_t j = slice_.first + r;
    const Sequence<const T>&keep = args_.masks.zoneout_h, &grad = args_.grad_output;
    const T* keep_h = keep.data ? keep.at(layout_, t, j) + direction_ * out_ : nullptr;
    const T* dy = grad.data ? grad.at(layout_, t, j) + direction_ * out_ : nullptr;
    T* carried = dh_.get() + r * out_padded_;
    T* to = proj ? proj_grads(t, r) : variant_.dh.get() + r * padded_;
    for (int64_t i = 0; i < out_; i += kLanes<T>) {
      V dh = load(carried + i), before = {};
      if (dy) dh += load_part(dy + i, out_ - i);
      if (keep_h) before = cells::Zoneout::backward(load_part(keep_h + i, out_ - i), dh);
      store(carried + i, before);
      store(to + i, dh);
    }
  }
  if (proj) {
    for (int64_t r = first; r < last; ++r) {
      variant_.inputs.get()[r] = proj_grads(t, r);
      variant_.products.get()[r] = variant_.dh.get() + r * padded_;
    }
    PlainProduct<T> p;
    p.rows = last - first;
    p.columns = hidden_;
    p.a = variant_.inputs.get() + first;
    p.c = variant_.products.get() + first;
    p.b = weights_.proj.get();
    p.segments.length = proj;
    p.order = order;
    plain_product(p);
  }
  for (int64_t r = first; r < last; ++r) {
    if constexpr (cells::kIsNormed<Cell>) {
      normed_cell(t, r, variant_.dh.get() + r * padded_);
    } else {
      masked_cell(t, r, variant_.dh.get() + r * padded_);
    }
  }
}

/// Where the gradient of a row's c comes from.
template <class T>
struct CarriedCell {
  T* dc;
  const T *keep, *grad;  // of zoneout, and from outside; null: neither
  int64_t hidden;

  /// All of it, of the cell's c; `before` becomes what reaches c_prev directly.
  ALWAYS_INLINE Vec<T> whole(int64_t unit, Vec<T>& before) const {
    Vec<T> sum = load(dc + unit);
    if (grad) sum += load_part(grad + unit, hidden - unit);
    before = Vec<T>{};
    if (keep) before = cells::Zoneout::backward(load_part(keep + unit, hidden - unit), sum);
    return sum;
  }
};

template <class Cell, class S, class W>
auto BackwardScan<Cell, S, W>::carried_cell(int64_t t, int64_t r) const -> CarriedCell<T> {
  const auto row = [&](const Sequence<const T>& of) {
    return of.data ? of.at(layout_, t, slice_.first + r) + direction_ * hidden_ : nullptr;
  };
  return {dc_.get() + r * padded_, row(args_.masks.zoneout_c), row(args_.grad_cells), hidden_};
}

/// One row's cell: the gradients of its gates and of its previous states, from that of the cell's h.
template <class Cell, class S, class W>
void BackwardScan<Cell, S, W>::normed_cell(int64_t t, int64_t r, const T* dh_row) {
  using Norm = cells::LayerNorm;
  constexpr int G = Cell::kGates;
  const int64_t hidden = hidden_, padded = padded_;
  const T* kept = saved(t, r);
  T* to = gate_grads(t, r);
  const CarriedCell<T> carried = carried_cell(t, r);
  const auto& norm = variant_.norm;
  const T *c_before = c_before_.get()[r], *s = kept + Cell::kStatistics * padded;
  const T* norm_ih = kept + Cell::kNormIh * padded;
  const T* norm_hh = kept + Cell::kNormHh * padded;
  const V mean_c = broadcast(s[Cell::kMeanC]), rstd_c = broadcast(s[Cell::kRstdC]);
  T* dgate_row = to + Cell::kGradGate * padded;
  T* active_row = variant_.active.get();
  V sum = {}, sum_y = {};  // over the row: of the gradient of a normalised value, and of it times the value
  for (int64_t unit = 0; unit < hidden; unit += kLanes<T>) {
    V gate[G], active[G], dgates[G];
    for (int g = 0; g < G; ++g)
      gate[g] = norm.gate(g, unit, padded, load(norm_ih + g * padded + unit), load(norm_hh + g * padded + unit));
    const V c = Cell::template next_cell<Math<T>>(gate, load(c_before + unit), active);
    const V norm_c = Norm::forward(c, mean_c, rstd_c);
    const V weight = load(norm.c.get() + unit);
    const V tanh_c = Cell::template tanh_c<Math<T>>(norm_c, weight, load(norm.c_bias.get() + unit));
    const V dscaled = Cell::output_backward(active[3], tanh_c, load(dh_row + unit), dgates);
    for (int g = 0; g < 3; ++g) store(active_row + g * padded + unit, active[g]);
    store(dgate_row + 3 * padded + unit, dgates[3]);
    store(to + Cell::kGradNorm * padded + unit, dscaled);
    store(to + Cell::kNormC * padded + unit, norm_c);
    const V dnorm = Norm::y_backward(dscaled, weight);
    sum += dnorm;
    sum_y = fma(dnorm, norm_c, sum_y);
  }
  const V mean_d = broadcast(lane_sum<T>(sum) / T(hidden)), mean_dy = broadcast(lane_sum<T>(sum_y) / T(hidden));
  V ih[G] = {}, ih_y[G] = {}, hh[G] = {}, hh_y[G] = {};
  for (int64_t unit = 0; unit < hidden; unit += kLanes<T>) {
    V active[G], dgates[G], before;
    const V dnorm = Norm::y_backward(load(to + Cell::kGradNorm * padded + unit), load(norm.c.get() + unit));
    const V norm_c = load(to + Cell::kNormC * padded + unit);
    V dc = carried.whole(unit, before);
    dc = only_first<T>(dc + Norm::backward(dnorm, norm_c, rstd_c, mean_d, mean_dy), hidden - unit);
    for (int g = 0; g < 3; ++g) active[g] = load(active_row + g * padded + unit);
    store(carried.dc + unit, before + Cell::cell_backward(active, load(c_before + unit), dc, dgates));
    for (int g = 0; g < 3; ++g) store(dgate_row + g * padded + unit, dgates[g]);
    dgates[3] = load(dgate_row + 3 * padded + unit);
    for (int g = 0; g < G; ++g) {
      const int64_t at = g * padded + unit;
      const V d_ih = Norm::y_backward(dgates[g], load(norm.ih.get() + at));
      const V d_hh = Norm::y_backward(dgates[g], load(norm.hh.get() + at));
      ih[g] += d_ih;
      ih_y[g] = fma(d_ih, load(norm_ih + at), ih_y[g]);
      hh[g] += d_hh;
      hh_y[g] = fma(d_hh, load(norm_hh + at), hh_y[g]);
    }
  }
  const auto mean = [&](const V* x) ALWAYS_INLINE_LAMBDA {
    return broadcast(lane_sum<T>(x[0] + x[1] + x[2] + x[3]) / T(G * hidden));
  };
  const V mean_ih = mean(ih), mean_ih_y = mean(ih_y), mean_hh = mean(hh), mean_hh_y = mean(hh_y);
  const V rstd_ih = broadcast(s[Cell::kRstdIh]), rstd_hh = broadcast(s[Cell::kRstdHh]);
  for (int g = 0; g < G; ++g) {
    for (int64_t at = g * padded; at < g * padded + hidden; at += kLanes<T>) {
      const V d = load(dgate_row + at);
      const V d_ih = Norm::y_backward(d, load(norm.ih.get() + at)),
              d_hh = Norm::y_backward(d, load(norm.hh.get() + at));
      store(to + Cell::ih_slot(0) * padded + at, Norm::backward(d_ih, load(norm_ih + at), rstd_ih, mean_ih, mean_ih_y));
      store(to + Cell::hh_slot(0) * padded + at, Norm::backward(d_hh, load(norm_hh + at), rstd_hh, mean_hh, mean_hh_y));
    }
  }
}

/// The same of a cell with masks.
template <class Cell, class S, class W>
void BackwardScan<Cell, S, W>::masked_cell(int64_t t, int64_t r, const T* dh_row) {
  using Base = typename Cell::Base;
  const int64_t hidden = hidden_, padded = padded_;
  const T* kept = saved(t, r);
  T* to = gate_grads(t, r);
  const CarriedCell<T> carried_c = carried_cell(t, r);
  for (int64_t unit = 0; unit < hidden; unit += kLanes<T>) {
    V values[Cell::kSaved + 1], h = {}, h_before = {}, c_before = {}, dc = {}, before = {}, dgates[Cell::kGradGates];
    for (int i = 0; i < Cell::kSaved; ++i) values[i] = load(kept + i * padded + unit);
    if constexpr (Base::kSaved == 0) h = values[0];
    if constexpr (Base::kDirectCarry) h_before = load_part(h_before_.get()[r] + unit, hidden - unit);
    if constexpr (Cell::kHasCell) {
      c_before = load(c_before_.get()[r] + unit);
      dc = carried_c.whole(unit, before);
    }
    const V dh = load(dh_row + unit);
    const V direct = with_exact<Base>(args_.cell, [&]<class Exact>() ALWAYS_INLINE_LAMBDA {
      return Exact::template backward<Math<T>>(values, h, h_before, c_before, dh, dc, dgates);
    });
    if constexpr (Cell::kHasCell) store(carried_c.dc + unit, dc + before);
    if constexpr (Base::kDirectCarry) {
      T* carried = dh_.get() + r * out_padded_ + unit;
      store(carried, load(carried) + direct);
    }
    for (int g = 0; g < Cell::kGradGates; ++g) store(to + g * padded + unit, dgates[g]);
  }
}

/// Where each gradient stands among the sums, in units of padded H.
struct NormSums {
  static constexpr int kBias = 0, kWeightIh = 4, kWeightHh = 8, kWeightC = 12, kBiasC = 13;
};

template <class T>
void norm_sums(const BackwardArgs<T>& args, const ChunkGrads<cells::LayerNormLstm, T>& grads, int direction, T* sums) {
  using Cell = cells::LayerNormLstm;
  using Norm = cells::LayerNorm;
  using V = Vec<T>;
  const int64_t hidden = args.sizes.hidden, padded = args.sizes.padded();
  const int64_t stride = saved_values(args.cell, args.sizes.proj != 0, args.variant) * padded;
  const T* saved = args.saved + (direction * args.layout.rows + grads.chunk.row) * stride;
  Buffer<T> some(grads.stride, true);  // of kSummedRows
  const auto add = [&](int64_t at, V x) ALWAYS_INLINE_LAMBDA {
    T* to = some.get() + at;
    store(to, load(to) + x);
  };
  for (int64_t r = 0; r < grads.chunk.rows; ++r) {
    if (r > 0 && r % kSummedRows == 0) {
      add_row(sums, some.get(), grads.stride);
      std::memset(some.get(), 0, size_t(grads.stride) * sizeof(T));
    }
    const T *from = grads.gates.get() + r * grads.stride, *kept = saved + r * stride;
    for (int g = 0; g < Cell::kGates; ++g) {
      for (int64_t at = g * padded; at < g * padded + hidden; at += kLanes<T>) {
        const V d = load(from + Cell::kGradGate * padded + at);
        add(NormSums::kBias * padded + at, d);
        add(NormSums::kWeightIh * padded + at, Norm::weight_backward(d, load(kept + Cell::kNormIh * padded + at)));
        add(NormSums::kWeightHh * padded + at, Norm::weight_backward(d, load(kept + Cell::kNormHh * padded + at)));
      }
    }
    for (int64_t unit = 0; unit < hidden; unit += kLanes<T>) {
      const V d = load(from + Cell::kGradNorm * padded + unit);
      add(NormSums::kWeightC * padded + unit, Norm::weight_backward(d, load(from + Cell::kNormC * padded + unit)));
      add(NormSums::kBiasC * padded + unit, d);
    }
  }
  add_row(sums, some.get(), grads.stride);
}

template <class To, class T>
void write_norm_sums(const Weights<void>& to, const T* sums, int64_t hidden, int64_t padded) {
  const auto write = [=](void* grad, int slot, int count) {
    for (int g = 0; grad && g < count; ++g)
      copy_row(static_cast<To*>(grad) + g * hidden, sums + (slot + g) * padded, hidden);
  };
  write(to.bias_ih, NormSums::kBias, 4);
  write(to.bias_hh, NormSums::kBias, 4);
  write(to.weight_norm_ih, NormSums::kWeightIh, 4);
  write(to.weight_norm_hh, NormSums::kWeightHh, 4);
  write(to.weight_norm_c, NormSums::kWeightC, 1);
  write(to.bias_norm_c, NormSums::kBiasC, 1);
}
