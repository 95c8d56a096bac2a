// The scan over time, backward: gate gradients first, fused with the recurrent product and chained through time; then the
// gradients of input, weights and biases as products over all rows at once.

/// Walks the rows (t, j) of a layout in their internal order.
class RowCursor {
 public:
  RowCursor(const Layout& layout, int64_t row) : layout_(layout) {
    int64_t low = 0, high = layout.steps;  // the last step that starts at or before `row`
    while (low + 1 < high) {
      const int64_t middle = (low + high) / 2;
      (layout.offsets[middle] <= row ? low : high) = middle;
    }
    t = low;
    j = row - layout.offsets[low];
    settle();
  }
  void next() {
    ++j;
    settle();
  }
  int64_t t, j;

 private:
  void settle() {
    while (t < layout_.steps && j >= layout_.batch_sizes[t]) {
      ++t;
      j = 0;
    }
  }
  const Layout& layout_;
};

/// The output before step t of this direction: null is a row of zeros.
template <class T>
const T* previous_output(const BackwardArgs<T>& args, int direction, int64_t t, int64_t j) {
  const Layout& layout = args.layout;
  const bool reverse = direction == 1;
  if (args.resets.data && begins(args.resets, layout, reverse, t, j)) return nullptr;
  const bool first = reverse ? t + 1 >= layout.steps || j >= layout.batch_sizes[t + 1] : t == 0;
  const int64_t width = args.sizes.output();
  if (!first) return args.output.at(layout, reverse ? t + 1 : t - 1, j) + direction * width;
  return args.h_0 ? args.h_0 + (direction * layout.batch + layout.entry(j)) * width : nullptr;
}

/// One direction's weights as the backward passes want them: rows of the weight are rows of B.
template <class Cell, class T>
struct BackwardWeights {
  BackwardWeights(const Weights<const T>& w, const Sizes& s, bool with_input)
      : hidden(Cell::kGates * s.hidden * Sizes::padded(s.output())),
        input(with_input ? Cell::kGates * s.hidden * Sizes::padded(s.input) : 0),
        proj(s.proj ? s.proj * s.padded() : 0) {
    const int64_t depth = Cell::kGates * s.hidden;
    pack_rows(hidden.get(), [&](int64_t k) { return w.weight_hh + k * s.output(); }, depth, 0, s.output());
    if (with_input) pack_rows(input.get(), [&](int64_t k) { return w.weight_ih + k * s.input; }, depth, 0, s.input);
    if (s.proj) pack_rows(proj.get(), [&](int64_t k) { return w.weight_hr + k * s.hidden; }, s.proj, 0, s.hidden);
  }
  Buffer<T> hidden;  // [P / lanes][G*H][lanes]
  Buffer<T> input;   // [I / lanes][G*H][lanes]
  Buffer<T> proj;    // [H / lanes][P][lanes]
};

/// Gradients of one direction that live between the passes.
template <class Cell, class T>
struct RowGrads {
  RowGrads(const Sizes& s, const Layout& layout)
      : stride(Cell::kGradGates * s.padded()),
        proj_stride(s.proj ? Sizes::padded(s.proj) : 0),
        gates(layout.rows * stride),
        proj(layout.rows * proj_stride) {}
  int64_t stride, proj_stride;
  Buffer<T> gates;  // [T, gate gradients, padded H]
  Buffer<T> proj;   // [T, padded P]: gradient of the projected output
};

template <class Cell, class T>
class BackwardScan {
  using V = Vec<T>;

 public:
  BackwardScan(const BackwardArgs<T>& args, const BackwardWeights<Cell, T>& weights, const RowGrads<Cell, T>& grads,
               int direction, Slice slice)
      : args_(args),
        layout_(args.layout),
        weights_(weights),
        grads_(grads),
        direction_(direction),
        reverse_(direction == 1),
        slice_(slice),
        hidden_(args.sizes.hidden),
        padded_(args.sizes.padded()),
        out_(args.sizes.output()),
        out_padded_(Sizes::padded(out_)),
        saved_stride_(saved_values(args.cell, args.sizes.proj != 0) * padded_),
        dh_(slice.size() * out_padded_, true),
        dc_(Cell::kHasCell ? slice.size() * padded_ : 0, true),
        c_0_(Cell::kHasCell ? slice.size() * padded_ : 0, true),
        zeros_(padded_, true),
        h_before_(slice.size()),
        c_before_(slice.size()),
        cut_(slice.size()) {
    for (int g = 0; g < Cell::kGates; ++g) hidden_segments_.offset[g] = Cell::hh_slot(g) * padded_;
    hidden_segments_.count = Cell::kGates;
    hidden_segments_.length = hidden_;
  }

  void run() {
    const int64_t states = layout_.batch * direction_;
    if (args_.grad_h_n) read_states(dh_.get(), out_padded_, args_.grad_h_n + states * out_, out_, layout_, slice_);
    if (Cell::kHasCell && args_.grad_c_n)
      read_states(dc_.get(), padded_, args_.grad_c_n + states * hidden_, hidden_, layout_, slice_);
    if (Cell::kHasCell && args_.c_0)
      read_states(c_0_.get(), padded_, args_.c_0 + states * hidden_, hidden_, layout_, slice_);

    const int64_t steps = layout_.steps;
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t t = reverse_ ? s : steps - 1 - s;
      const int64_t rows = slice_.active(layout_, t);
      if (rows == 0) continue;
      const int64_t after = reverse_ ? t - 1 : t + 1;  // the step this direction ran next
      const int64_t chained = s == 0 ? 0 : smaller(rows, slice_.active(layout_, after));
      prepare(t, rows, after, chained);
      step(t, 0, chained, after);
      step(t, chained, rows, -1);
      leave(t, rows);
    }
    const int64_t alive = steps ? layout_.batch_sizes[0] : 0;
    if (args_.grad_h_0)
      write_states(args_.grad_h_0 + states * out_, out_, dh_.get(), out_padded_, layout_, slice_, alive, layout_.batch);
    if (Cell::kHasCell && args_.grad_c_0)
      write_states(args_.grad_c_0 + states * hidden_, hidden_, dc_.get(), padded_, layout_, slice_, 0, layout_.batch);
  }

 private:
  T* gate_grads(int64_t t, int64_t r) const {
    return grads_.gates.get() + (layout_.offsets[t] + slice_.first + r) * grads_.stride;
  }
  T* proj_grads(int64_t t, int64_t r) const {
    return grads_.proj.get() + (layout_.offsets[t] + slice_.first + r) * grads_.proj_stride;
  }
  const T* saved(int64_t t, int64_t r) const {
    return args_.saved + (direction_ * layout_.rows + layout_.offsets[t] + slice_.first + r) * saved_stride_;
  }

  /// Where step t's rows find their previous states, and which rows get no gradient from the step after.
  void prepare(int64_t t, int64_t rows, int64_t after, int64_t chained) {
    const int64_t before = reverse_ ? t + 1 : t - 1;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t j = slice_.first + r;
      if constexpr (Cell::kDirectCarry) {
        const T* h = previous_output(args_, direction_, t, j);
        h_before_.get()[r] = h ? h : zeros_.get();
      }
      if constexpr (Cell::kHasCell) {
        const bool first = reverse_ ? before >= layout_.steps || j >= layout_.batch_sizes[before] : t == 0;
        c_before_.get()[r] = args_.resets.data && begins(args_.resets, layout_, reverse_, t, j) ? zeros_.get()
                             : first ? c_0_.get() + r * padded_
                                     : saved(before, r) + cell_slot() * padded_;
      }
      cut_.get()[r] = r < chained && args_.resets.data && begins(args_.resets, layout_, reverse_, after, j);
      if (cut_.get()[r]) clear(r);
    }
  }

  static constexpr int64_t cell_slot() {
    if constexpr (Cell::kHasCell) return Cell::kSavedCell;
    return 0;
  }

  void clear(int64_t r) {
    std::memset(dh_.get() + r * out_padded_, 0, size_t(out_) * sizeof(T));
    if (Cell::kHasCell) std::memset(dc_.get() + r * padded_, 0, size_t(hidden_) * sizeof(T));
  }

  /// Rows [first, last) of step t. `after`: the step whose gate gradients reach them, or -1 where the sequence ends and
  /// the gradient of its final state comes in instead.
  void step(int64_t t, int64_t first, int64_t last, int64_t after) {
    if (first >= last) return;
    const bool single = layout_.batch_sizes[t] == 1;
    const bool chained = after >= 0;
    const int64_t out_padded = out_padded_, out = out_, proj = args_.sizes.proj;
    T* dh_carried = dh_.get() + first * out_padded;
    const auto a_row = [=, this](int64_t r) { return chained ? gate_grads(after, first + r) : nullptr; };
    const auto init = [](int64_t, int64_t, V* acc) { *acc = V{}; };
    Segments segments = hidden_segments_;
    if (!chained) segments.count = 0;
    const bool* cut = cut_.get() + first;
    // What reaches h beside the recurrent product.
    const auto whole_dh = [&](int64_t r, int64_t unit, V acc) ALWAYS_INLINE_LAMBDA {
      V dh = cut[r] ? V{} : acc;
      if (Cell::kDirectCarry || !chained) dh += load(dh_carried + r * out_padded + unit);
      if (args_.grad_output.data)
        dh += load_part(args_.grad_output.at(layout_, t, slice_.first + first + r) + direction_ * out + unit, out - unit);
      return dh;
    };
    const auto cell = [&](int64_t r, int64_t unit, V dh) ALWAYS_INLINE_LAMBDA { backward_cell(t, first + r, unit, dh); };
    const int64_t blocks = blocks_of<T>(out);
    if (proj == 0) {
      product<1>(last - first, blocks, single, a_row, weights_.hidden.get(), segments, init,
                 [&](int64_t r, int64_t block, const V* acc) ALWAYS_INLINE_LAMBDA {
                   cell(r, block * kLanes<T>, whole_dh(r, block * kLanes<T>, *acc));
                 });
      return;
    }
    if constexpr (Cell::kHasCell) {  // only such cells can be projected
    product<1>(last - first, blocks, single, a_row, weights_.hidden.get(), segments, init,
               [&](int64_t r, int64_t block, const V* acc) ALWAYS_INLINE_LAMBDA {
                 store(proj_grads(t, first + r) + block * kLanes<T>, whole_dh(r, block * kLanes<T>, *acc));
               });
    product<1>(
        last - first, blocks_of<T>(hidden_), single, [=, this](int64_t r) { return proj_grads(t, first + r); },
        weights_.proj.get(), Segments{1, proj, {}, 1}, init,
        [&](int64_t r, int64_t block, const V* acc) ALWAYS_INLINE_LAMBDA { cell(r, block * kLanes<T>, *acc); });
    }
  }

  ALWAYS_INLINE void backward_cell(int64_t t, int64_t r, int64_t unit, V dh) {
    const int64_t rest = hidden_ - unit;
    V kept[Cell::kSaved + 1], h = {}, h_before = {}, c_before = {}, dc = {}, dgates[Cell::kGradGates];
    if constexpr (Cell::kSaved > 0) {
      const T* from = saved(t, r) + unit;
      for (int i = 0; i < Cell::kSaved; ++i) kept[i] = load(from + i * padded_);
    } else {
      h = load_part(args_.output.at(layout_, t, slice_.first + r) + direction_ * out_ + unit, rest);
    }
    if constexpr (Cell::kDirectCarry) h_before = load_part(h_before_.get()[r] + unit, rest);
    if constexpr (Cell::kHasCell) {
      c_before = load(c_before_.get()[r] + unit);
      dc = load(dc_.get() + r * padded_ + unit);
      if (args_.grad_cells.data)
        dc += load_part(args_.grad_cells.at(layout_, t, slice_.first + r) + direction_ * hidden_ + unit, rest);
    }
    const V direct = Cell::template backward<Math<T>>(kept, h, h_before, c_before, dh, dc, dgates);
    if constexpr (Cell::kHasCell) store(dc_.get() + r * padded_ + unit, dc);
    if constexpr (Cell::kDirectCarry) store(dh_.get() + r * out_padded_ + unit, direct);
    T* to = gate_grads(t, r) + unit;
    for (int g = 0; g < Cell::kGradGates; ++g) store(to + g * padded_, dgates[g]);
  }

  /// Rows whose sequence began with step t: their gradient goes to the initial states.
  void leave(int64_t t, int64_t rows) {
    const int64_t from = reverse_ ? (t + 1 < layout_.steps ? slice_.active(layout_, t + 1) : 0) : t == 0 ? 0 : rows;
    if (from >= rows) return;
    const int64_t states = (layout_.batch * direction_);
    if (args_.grad_h_0) {
      Buffer<const T*> dgates(rows - from);
      Buffer<T*> dh(rows - from);
      for (int64_t r = from; r < rows; ++r) {
        dgates.get()[r - from] = gate_grads(t, r);
        dh.get()[r - from] = dh_.get() + r * out_padded_;
      }
      PlainProduct<T> p;
      p.rows = rows - from;
      p.columns = out_;
      p.a = dgates.get();
      p.c = dh.get();
      p.b = weights_.hidden.get();
      p.segments = hidden_segments_;
      p.accumulate = Cell::kDirectCarry;
      plain_product(p);
    }
    for (int64_t r = from; r < rows && args_.resets.data; ++r)
      if (begins(args_.resets, layout_, reverse_, t, slice_.first + r)) clear(r);
    if (args_.grad_h_0)
      write_states(args_.grad_h_0 + states * out_, out_, dh_.get(), out_padded_, layout_, slice_, slice_.first + from,
                   slice_.first + rows);
  }

  const BackwardArgs<T>& args_;
  const Layout& layout_;
  const BackwardWeights<Cell, T>& weights_;
  const RowGrads<Cell, T>& grads_;
  const int direction_;
  const bool reverse_;
  const Slice slice_;
  const int64_t hidden_, padded_, out_, out_padded_, saved_stride_;
  Segments hidden_segments_;
  Buffer<T> dh_;               // [slice, padded P]: the final state's gradient, then what skips the recurrent product
  Buffer<T> dc_;               // [slice, padded H]
  Buffer<T> c_0_;              // [slice, padded H]
  Buffer<T> zeros_;            // [padded H]
  Buffer<const T*> h_before_;  // [slice]
  Buffer<const T*> c_before_;  // [slice]
  Buffer<bool> cut_;           // [slice]
};

/// grad_input of rows [first, last): the gate gradients of all directions times weight_ih.
template <class Cell, class T, class Packed, class Grads>
void input_gradient(const BackwardArgs<T>& args, Packed* const* weights, Grads* const* grads, int64_t first,
                    int64_t last) {
  const Sizes& sizes = args.sizes;
  const Layout& layout = args.layout;
  Segments segments;
  segments.count = Cell::kGates;
  segments.length = sizes.hidden;
  for (int g = 0; g < Cell::kGates; ++g) segments.offset[g] = Cell::ih_slot(g) * sizes.padded();
  Buffer<const T*> dgates(last - first);
  Buffer<T*> to(last - first);
  RowCursor cursor(layout, first);
  for (int64_t r = 0; r < last - first; ++r, cursor.next()) to.get()[r] = args.grad_input.at(layout, cursor.t, cursor.j);
  PlainProduct<T> p;
  p.rows = last - first;
  p.columns = sizes.input;
  p.a = dgates.get();
  p.c = to.get();
  p.segments = segments;
  for (int d = 0; d < sizes.directions; ++d) {
    for (int64_t r = 0; r < last - first; ++r)
      dgates.get()[r] = grads[d]->gates.get() + (first + r) * grads[d]->stride;
    p.b = weights[d]->input.get();
    p.accumulate = d > 0;
    plain_product(p);
  }
}

/// grad += A^T B over all rows, for columns [first, first + columns) of B and of grad [sum of M, width].
/// A's row r starts at a + r * stride; its part g of the M columns at offset[g], each of `height`.
template <class T, class Row>
void weight_gradient(T* grad, int64_t width, int64_t first, int64_t columns, const T* a, int64_t stride, int parts,
                     const int64_t* offset, int64_t height, int64_t rows, const Row& b_row) {
  constexpr int64_t kChunk = 256;  // rows whose B stays in the second-level cache and whose A column in the first
  Buffer<T> packed(smaller(kChunk, larger(rows, 1)) * blocks_of<T>(columns) * kLanes<T>);
  Buffer<const T*> b_rows(kChunk), a_columns(height);
  Buffer<T*> to(height);
  PlainProduct<T> p;
  p.rows = height;
  p.columns = columns;
  p.a = a_columns.get();
  p.c = to.get();
  p.b = packed.get();
  p.segments.stride = stride;
  for (int64_t begin = 0; begin == 0 || begin < rows; begin += kChunk) {
    const int64_t count = smaller(kChunk, rows - begin);
    for (int64_t r = 0; r < count; ++r) b_rows.get()[r] = b_row(begin + r);
    pack_rows(packed.get(), [&](int64_t r) { return b_rows.get()[r]; }, count, first, columns);
    p.segments.length = count;
    p.accumulate = begin > 0;
    for (int part = 0; part < parts; ++part) {
      for (int64_t m = 0; m < height; ++m) {
        a_columns.get()[m] = a + begin * stride + offset[part] + m;
        to.get()[m] = grad + (part * height + m) * width + first;
      }
      plain_product(p);
    }
  }
}

template <class Cell, class T>
void bias_gradient(const BackwardArgs<T>& args, const RowGrads<Cell, T>& grads, const Weights<T>& to) {
  const int64_t hidden = args.sizes.hidden, padded = args.sizes.padded();
  Buffer<T> sum(grads.stride, true);
  for (int64_t r = 0; r < args.layout.rows; ++r) {
    const T* from = grads.gates.get() + r * grads.stride;
    for (int slot = 0; slot < Cell::kGradGates; ++slot) {
      for (int64_t u = slot * padded; u < slot * padded + hidden; u += kLanes<T>)
        store(sum.get() + u, load(sum.get() + u) + load(from + u));
    }
  }
  for (int g = 0; g < Cell::kGates; ++g) {
    if (to.bias_ih)
      std::memcpy(to.bias_ih + g * hidden, sum.get() + Cell::ih_slot(g) * padded, size_t(hidden) * sizeof(T));
    if (to.bias_hh)
      std::memcpy(to.bias_hh + g * hidden, sum.get() + Cell::hh_slot(g) * padded, size_t(hidden) * sizeof(T));
  }
}

/// One piece of the weight gradients: some columns of one weight, or the biases.
template <class Cell, class T>
void weight_task(const BackwardArgs<T>& args, const RowGrads<Cell, T>& grads, int direction, int kind, int64_t first,
                 int64_t columns) {
  const Sizes& sizes = args.sizes;
  const Layout& layout = args.layout;
  const Weights<T>& to = args.grad_weights[direction];
  RowCursor cursor(layout, 0);  // rows are asked for in order
  const auto in_order = [&](auto&& at) {
    return [&cursor, at](int64_t) {
      const T* row = at(cursor.t, cursor.j);
      cursor.next();
      return row;
    };
  };
  int64_t offset[4] = {0, 0, 0, 0};
  if (kind == 0) {
    for (int g = 0; g < Cell::kGates; ++g) offset[g] = Cell::ih_slot(g) * sizes.padded();
    weight_gradient(to.weight_ih, sizes.input, first, columns, grads.gates.get(), grads.stride, Cell::kGates, offset,
                    sizes.hidden, layout.rows,
                    in_order([&](int64_t t, int64_t j) -> const T* { return args.input.at(layout, t, j); }));
  } else if (kind == 1) {
    for (int g = 0; g < Cell::kGates; ++g) offset[g] = Cell::hh_slot(g) * sizes.padded();
    weight_gradient(to.weight_hh, sizes.output(), first, columns, grads.gates.get(), grads.stride, Cell::kGates, offset,
                    sizes.hidden, layout.rows,
                    in_order([&](int64_t t, int64_t j) { return previous_output(args, direction, t, j); }));
  } else {
    const int64_t stride = saved_values(args.cell, true) * sizes.padded();
    const T* unprojected = args.saved + direction * layout.rows * stride + Cell::kSaved * sizes.padded();
    weight_gradient(to.weight_hr, sizes.hidden, first, columns, grads.proj.get(), grads.proj_stride, 1, offset,
                    sizes.proj, layout.rows, [=](int64_t r) { return unprojected + r * stride; });
  }
}

template <class Cell, class T>
void backward(const BackwardArgs<T>& args, const Executor& executor) {
  using Packed = BackwardWeights<Cell, T>;
  using Grads = RowGrads<Cell, T>;
  const Sizes& sizes = args.sizes;
  const int directions = sizes.directions;
  Pair<Packed> weights;
  Pair<Grads> grads;
  parallel(executor, directions, [&](int64_t d) {
    weights.item[d] = new Packed(args.weights[d], sizes, args.grad_input.data != nullptr);
    grads.item[d] = new Grads(sizes, args.layout);
  });
  const int64_t slices = count_slices(args.layout, sizes, executor);
  parallel(executor, directions * slices, [&](int64_t task) {
    const int d = int(task / slices);
    BackwardScan<Cell, T>(args, *weights.item[d], *grads.item[d], d, slice_of(args.layout, task % slices, slices)).run();
  });

  if (args.grad_input.data) {
    constexpr int64_t kRows = 96;
    parallel(executor, (args.layout.rows + kRows - 1) / kRows, [&](int64_t i) {
      input_gradient<Cell>(args, weights.item, grads.item, i * kRows, smaller(args.layout.rows, (i + 1) * kRows));
    });
  }

  constexpr int64_t kColumns = 4 * kLanes<T>;  // of one task: the width of a register tile
  int64_t tasks[2][4];                         // how many for weight_ih, weight_hh, weight_hr, the biases
  int64_t total = 0;
  for (int d = 0; d < directions; ++d) {
    const Weights<T>& to = args.grad_weights[d];
    tasks[d][0] = to.weight_ih ? (sizes.input + kColumns - 1) / kColumns : 0;
    tasks[d][1] = to.weight_hh ? (sizes.output() + kColumns - 1) / kColumns : 0;
    tasks[d][2] = to.weight_hr ? (sizes.hidden + kColumns - 1) / kColumns : 0;
    tasks[d][3] = to.bias_ih || to.bias_hh;
    for (int kind = 0; kind < 4; ++kind) total += tasks[d][kind];
  }
  const int64_t widths[3] = {sizes.input, sizes.output(), sizes.hidden};
  parallel(executor, total, [&](int64_t task) {
    int d = 0, kind = 0;
    while (task >= tasks[d][kind]) {
      task -= tasks[d][kind];
      d += kind == 3;
      kind = (kind + 1) % 4;
    }
    if (kind == 3) return bias_gradient<Cell>(args, *grads.item[d], args.grad_weights[d]);
    const int64_t first = task * kColumns;
    weight_task<Cell>(args, *grads.item[d], d, kind, first, smaller(kColumns, widths[kind] - first));
  });
}
