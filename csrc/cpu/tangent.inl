// The derivative of a layer in a direction: all that it computes, forward and backward, in dual numbers (cells/dual.h).
// Of its results that is forward mode; of the gradients that backward makes of those of the results it is forward over
// reverse mode and, as a Hessian is symmetric, backward of backward (Pearlmutter, "Fast exact multiplication by the
// Hessian", 1994).
//
// Values and tangents of a row go through the same products as rows of their own. Only what hangs together from step to
// step is computed step by step: the rest are products over all rows.

/// The weights of one direction, or their tangents, as the products want them; null what is not there or not wanted.
template <class Cell, class T>
struct TangentWeights {
  static constexpr int G = Cell::kGates, kSums = G + Cell::kSplit;

  TangentWeights(const Weights<const T>& w, const TangentArgs<T>& args, bool recurs)
      : TangentWeights(w, args.values.sizes, recurs,
                       args.backward && (args.values.layout.steps > 1 || args.tangents.grad_h_0),
                       args.tangents.grad_input.data) {}

  /// Which sum of a row the input part of gate g goes to; the recurrent part goes to sum g.
  static constexpr int input_sum(int g) { return g < G - Cell::kSplit ? g : g + Cell::kSplit; }

  Buffer<T> ih, hh;            // [G * padded H / lanes][I or H][lanes]
  Buffer<T> ih_rows, hh_rows;  // [I or H / lanes][G*H][lanes]
  Buffer<T> bias;              // [sums, padded H]

 private:
  TangentWeights(const Weights<const T>& w, const Sizes& s, bool from_states, bool to_states, bool to_input)
      : ih(w.weight_ih ? G * s.padded() * s.input : 0),
        hh(w.weight_hh && from_states ? G * s.padded() * s.hidden : 0),
        ih_rows(w.weight_ih && to_input ? G * s.hidden * Sizes::padded(s.input) : 0),
        hh_rows(w.weight_hh && to_states ? G * s.hidden * s.padded() : 0),
        bias(kSums * s.padded(), true) {
    pack_each_gate(ih, w.weight_ih, s, s.input);
    pack_each_gate(hh, w.weight_hh, s, s.hidden);
    pack_all_rows(ih_rows, w.weight_ih, s, s.input);
    pack_all_rows(hh_rows, w.weight_hh, s, s.hidden);
    for (int g = 0; g < G; ++g) {
      if (w.bias_hh) copy_row(bias.get() + g * s.padded(), w.bias_hh + g * s.hidden, s.hidden);
      if (w.bias_ih) {
        T* to = bias.get() + input_sum(g) * s.padded();
        for (int64_t u = 0; u < s.hidden; ++u) to[u] += w.bias_ih[g * s.hidden + u];
      }
    }
  }

  static void pack_each_gate(const Buffer<T>& to, const T* weight, const Sizes& s, int64_t depth) {
    const int64_t blocks = s.padded() / kLanes<T>;
    for (int g = 0; to.get() && g < G; ++g)
      pack_gates(to.get() + g * s.padded() * depth, weight + g * s.hidden * depth, 1, s.hidden, depth, 0, blocks);
  }
  static void pack_all_rows(const Buffer<T>& to, const T* weight, const Sizes& s, int64_t width) {
    if (to.get()) pack_rows<T>(to.get(), [&](int64_t k) { return weight + k * width; }, G * s.hidden, 0, width);
  }
};

/// One direction.
template <class Cell, class T>
class TangentPass {
  using V = Vec<T>;
  using D = cells::Dual<V>;
  using DualMath = cells::DualMath<Math<T>>;
  using PackedT = TangentWeights<Cell, T>;
  static constexpr int G = Cell::kGates;

 public:
  TangentPass(const TangentArgs<T>& args, int direction)
      : args_(args),
        values_(args.values),
        tangents_(args.tangents),
        layout_(values_.layout),
        direction_(direction),
        reverse_(direction == 1),
        hidden_(values_.sizes.hidden),
        padded_(values_.sizes.padded()),
        stride_(spread<T>(kPlanes * padded_)),
        recurs_(layout_.steps > 1 || values_.h_0),
        weights_(values_.weights[direction], args, recurs_),
        weight_tangents_(tangents_.weights[direction], args, recurs_),
        planes_(2 * layout_.rows * stride_),
        h_(2 * layout_.rows * padded_),
        zeros_(padded_, true),
        h_0_(2 * layout_.batch * padded_, true),
        c_0_(Cell::kHasCell ? 2 * layout_.batch * padded_ : 0, true),
        dh_(args.backward ? 2 * layout_.batch * padded_ : 0, true),
        dc_(args.backward && Cell::kHasCell ? 2 * layout_.batch * padded_ : 0, true),
        input_gradient_(gradients().weight_ih, Storage::kComputed, G, hidden_, values_.sizes.input, 2 * layout_.rows),
        hidden_gradient_(gradients().weight_hh, Storage::kComputed, G, hidden_, hidden_, 2 * layout_.rows),
        bias_sums_(Cell::kGradGates * padded_, true) {
    read(h_0_, kValue, values_.h_0);
    read(h_0_, kTangent, tangents_.h_0);
    if (args.backward) read(dh_, kValue, values_.grad_h_n);
    if (args.backward) read(dh_, kTangent, tangents_.grad_h_n);
    if constexpr (!Cell::kHasCell) return;
    read(c_0_, kValue, values_.c_0);
    read(c_0_, kTangent, tangents_.c_0);
    if (args.backward) read(dc_, kValue, values_.grad_c_n);
    if (args.backward) read(dc_, kTangent, tangents_.grad_c_n);
  }

  int64_t row_tasks() const { return (layout_.rows + kTaskRows - 1) / kTaskRows; }

  /// The sums of some rows' gates, but for the recurrent product.
  void project(int64_t task) {
    const int64_t first = task * kTaskRows, count = smaller(kTaskRows, layout_.rows - first);
    for (int64_t r = first; r < first + count; ++r) {
      std::memcpy(planes(kValue, r), weights_.bias.get(), size_t(PackedT::kSums * padded_) * sizeof(T));
      std::memcpy(planes(kTangent, r), weight_tangents_.bias.get(), size_t(PackedT::kSums * padded_) * sizeof(T));
    }
    const T* inputs[kTaskRows];
    find_inputs(inputs, values_, first, count);
    project(inputs, kValue, first, count, weights_.ih.get());
    if (weight_tangents_.ih.get()) project(inputs, kTangent, first, count, weight_tangents_.ih.get());
    if (!tangents_.input.data) return;
    find_inputs(inputs, tangents_, first, count);
    project(inputs, kTangent, first, count, weights_.ih.get());
  }

  void forward(Slice slice) {
    Buffer<const T*> a(2 * slice.size());
    Buffer<T*> c(2 * slice.size());
    for (int64_t s = 0; s < layout_.steps; ++s) {
      const int64_t t = time_of(layout_, reverse_, s), rows = slice.active(layout_, t);
      if (rows == 0) continue;
      for (int64_t r = 0; r < rows; ++r) {
        for (const Half half : {kTangent, kValue}) {
          a.get()[half * rows + r] = h_before(half, t, slice.first + r);
          c.get()[half * rows + r] = planes(half, layout_.offsets[t] + slice.first + r);
        }
      }
      if (s > 0 || values_.h_0) {
        PlainProduct<T> p = recurrent_product(t, a.get(), c.get(), G * padded_);
        p.segments.length = hidden_;
        multiply(p, rows, weights_.hh.get(), weight_tangents_.hh.get());
      }
      for (int64_t r = 0; r < rows; ++r) forward_cell(t, slice.first + r);
    }
  }

  void backward(Slice slice) {
    Buffer<const T*> a(2 * slice.size());
    Buffer<T*> c(2 * slice.size());
    for (int64_t s = layout_.steps - 1; s >= 0; --s) {
      const int64_t t = time_of(layout_, reverse_, s), rows = slice.active(layout_, t);
      if (rows == 0) continue;
      for (int64_t r = 0; r < rows; ++r) {
        backward_cell(t, slice.first + r);
        for (const Half half : {kTangent, kValue}) {
          a.get()[half * rows + r] = planes(half, layout_.offsets[t] + slice.first + r);
          c.get()[half * rows + r] = carried(dh_, half, slice.first + r);
        }
      }
      if (s > 0 || tangents_.grad_h_0) {
        PlainProduct<T> p = recurrent_product(t, a.get(), c.get(), hidden_);
        p.segments = gate_segments([](int g) { return Cell::hh_slot(g); });
        multiply(p, rows, weights_.hh_rows.get(), weight_tangents_.hh_rows.get());
      }
      for (int64_t r = 0; r < rows; ++r) {
        if (begins_at(t, slice.first + r)) drop_carried(slice.first + r);
      }
    }
  }

  int64_t parameter_tasks() const { return input_gradient_.tasks() + hidden_tasks() + has_bias_gradient(); }

  /// Before the tasks.
  void prepare_parameters() {
    with_inputs([&](const auto& row, int64_t rows) { input_gradient_.take(rows, row); });
    if (recurs_) with_states([&](const auto& row, int64_t rows) { hidden_gradient_.take(rows, row); });
  }

  void run_parameters(int64_t task) {
    if (task < input_gradient_.tasks())
      return with_inputs([&](const auto& row, int64_t rows) {
        add(input_gradient_, task, rows, row, [](int g) { return Cell::ih_slot(g); });
      });
    task -= input_gradient_.tasks();
    if (task < hidden_tasks())
      return with_states([&](const auto& row, int64_t rows) {
        add(hidden_gradient_, task, rows, row, [](int g) { return Cell::hh_slot(g); });
      });
    for (int slot = 0; slot < Cell::kGradGates; ++slot) {
      for (int64_t u = slot * padded_; u < slot * padded_ + hidden_; u += kLanes<T>)
        add_columns<1>(bias_sums_.get() + u, planes_.get() + u, stride_, layout_.rows);
    }
  }

  /// Some rows of the gradient of the input, to which both directions add in turn.
  void run_input(int64_t task) const {
    const int64_t first = task * kTaskRows, count = smaller(kTaskRows, layout_.rows - first);
    const auto find = [&](int64_t t, int64_t j) {
      return rows_from(tangents_.grad_input.template of<T>(), layout_, t, j);
    };
    RowReader reader(layout_, first, find);
    const T* a[kTaskRows];
    T* c[kTaskRows];
    for (int64_t r = 0; r < count; ++r) c[r] = reader.next();
    PlainProduct<T> p;
    p.rows = count;
    p.columns = values_.sizes.input;
    p.a = a;
    p.c = c;
    p.segments = gate_segments([](int g) { return Cell::ih_slot(g); });
    p.accumulate = reverse_;
    p.b = weights_.ih_rows.get();
    space_rows(a, planes(kTangent, first), stride_, count);
    plain_product(p);
    if (!weight_tangents_.ih_rows.get()) return;
    p.accumulate = true;
    p.b = weight_tangents_.ih_rows.get();
    space_rows(a, planes(kValue, first), stride_, count);
    plain_product(p);
  }

  void finish() {
    layout_.each_length([&](int64_t j, int64_t end) {
      const int64_t row = end > 0 ? layout_.offsets[reverse_ ? 0 : end - 1] + j : -1;
      write(args_.h_n, j, row < 0 ? h_0_.get() + j * padded_ : h(kTangent, row));
      if constexpr (Cell::kHasCell)
        write(args_.c_n, j, row < 0 ? c_0_.get() + j * padded_ : planes(kTangent, row) + Cell::kSavedCell * padded_);
      if (!args_.backward) return;
      write(tangents_.grad_h_0, j, carried(dh_, kTangent, j));
      if constexpr (Cell::kHasCell) write(tangents_.grad_c_0, j, carried(dc_, kTangent, j));
    });
    if (!args_.backward) return;
    input_gradient_.finish(layout_.rows > 0);
    hidden_gradient_.finish(layout_.rows > 0 && recurs_);
    write_bias_gradients<Cell, T>(gradients(), bias_sums_.get(), hidden_, padded_);
  }

 private:
  /// Which half of a buffer: so that the tangents of gate gradients, and after them the gate gradients, are the rows of
  /// one product with inputs and after them their tangents.
  enum Half { kTangent, kValue };
  // A row has the sums of its gates, then what the cell keeps of them, then their gradients.
  static constexpr int kPlanes = int(larger(larger(PackedT::kSums, Cell::kSaved), Cell::kGradGates));
  static_assert(!Cell::kHasCell || Cell::kGradGates <= cells::saved_planes<Cell>(),
                "the gradients of gates must leave c, which the step before reads");

  const Weights<void>& gradients() const { return tangents_.grad_weights[direction_]; }
  int64_t hidden_tasks() const { return recurs_ ? hidden_gradient_.tasks() : 0; }
  bool has_bias_gradient() const { return gradients().bias_ih || gradients().bias_hh; }

  T* planes(Half half, int64_t row) const { return planes_.get() + (half * layout_.rows + row) * stride_; }
  T* h(Half half, int64_t row) const { return h_.get() + (half * layout_.rows + row) * padded_; }
  T* carried(const Buffer<T>& of, Half half, int64_t j) const {
    return of.get() + (half * layout_.batch + j) * padded_;
  }

  bool begins_at(int64_t t, int64_t j) const {
    return values_.resets.data && begins(values_.resets, layout_, reverse_, t, j);
  }

  /// What `of(row)` is of the row before (t, j), an initial state or zeros in its place.
  const T* before(int64_t t, int64_t j, const T* initial, const auto& of) const {
    if (begins_at(t, j)) return zeros_.get();
    const int64_t step = step_after(layout_, !reverse_, t, 1);
    return step >= 0 && j < layout_.batch_sizes[step] ? of(layout_.offsets[step] + j) : initial;
  }
  const T* h_before(Half half, int64_t t, int64_t j) const {
    return before(t, j, carried(h_0_, half, j), [&](int64_t row) { return h(half, row); });
  }
  const T* c_before(Half half, int64_t t, int64_t j) const {
    return before(t, j, carried(c_0_, half, j),
                  [&](int64_t row) { return planes(half, row) + Cell::kSavedCell * padded_; });
  }

  void read(const Buffer<T>& to, Half half, const T* states) const {
    const Slice all = {0, layout_.batch};
    if (states)
      read_states(carried(to, half, 0), padded_, states + direction_ * layout_.batch * hidden_, hidden_, layout_, all);
  }
  void write(T* states, int64_t j, const T* row) const {
    if (states) copy_row(states + (direction_ * layout_.batch + layout_.entry(j)) * hidden_, row, hidden_);
  }
  void drop_carried(int64_t j) const {
    for (const Half half : {kTangent, kValue}) {
      std::memset(carried(dh_, half, j), 0, size_t(padded_) * sizeof(T));
      if (Cell::kHasCell) std::memset(carried(dc_, half, j), 0, size_t(padded_) * sizeof(T));
    }
  }

  void find_inputs(const T** rows, const BackwardArgs<T>& of, int64_t first, int64_t count) const {
    const auto find = [&](int64_t t, int64_t j) { return rows_from(of.input, layout_, t, j); };
    RowReader reader(layout_, first, find);
    for (int64_t r = 0; r < count; ++r) rows[r] = reader.next();
  }

  void project(const T* const* inputs, Half half, int64_t first, int64_t count, const T* weight) const {
    T* c[kTaskRows];
    PlainProduct<T> p;
    p.rows = count;
    p.columns = G * padded_;
    p.a = inputs;
    p.c = c;
    p.b = weight;
    p.segments.length = values_.sizes.input;
    p.accumulate = true;
    // The gates whose input part is kept apart go one further.
    const int64_t joined = (G - Cell::kSplit) * padded_ / kLanes<T>, all = G * padded_ / kLanes<T>;
    const auto multiply_blocks = [&](int64_t from, int64_t to, int further) {
      if (from == to) return;
      p.first = from;
      p.last = to;
      space_rows(c, planes(half, first) + further * padded_, stride_, count);
      plain_product(p);
    };
    multiply_blocks(0, joined, 0);
    multiply_blocks(joined, all, 1);
  }

  static PlainProduct<T> recurrent_product(int64_t t, const T* const* a, T* const* c, int64_t columns) {
    PlainProduct<T> p;
    p.columns = columns;
    p.a = a;
    p.c = c;
    p.accumulate = true;
    p.order = is_backwards(t) ? Order::kRowsBackwards : Order::kRows;
    return p;
  }
  /// By a weight, of tangents and values, and by its tangents, if there are any, of values for the tangents.
  static void multiply(PlainProduct<T>& p, int64_t rows, const T* weight, const T* weight_tangents) {
    p.rows = 2 * rows;
    p.b = weight;
    plain_product(p);
    if (!weight_tangents) return;
    p.rows = rows;
    p.a += kValue * rows;
    p.b = weight_tangents;
    plain_product(p);
  }
  Segments gate_segments(const auto& slot) const {
    Segments segments;
    segments.count = G;
    segments.length = hidden_;
    for (int g = 0; g < G; ++g) segments.offset[g] = slot(g) * padded_;
    segments.join();
    return segments;
  }

  /// Values and tangents of a row, from its first number on.
  struct DualRow {
    T *values, *tangents;
    ALWAYS_INLINE D get(int64_t at) const { return {load(values + at), load(tangents + at)}; }
    ALWAYS_INLINE void set(int64_t at, const D& x) const {
      store(values + at, x.value);
      store(tangents + at, x.tangent);
    }
  };
  DualRow planes(int64_t row) const { return {planes(kValue, row), planes(kTangent, row)}; }
  DualRow h(int64_t row) const { return {h(kValue, row), h(kTangent, row)}; }
  DualRow carried(const Buffer<T>& of, int64_t j) const { return {carried(of, kValue, j), carried(of, kTangent, j)}; }
  /// For reading only.
  DualRow h_before(int64_t t, int64_t j) const {
    return {const_cast<T*>(h_before(kValue, t, j)), const_cast<T*>(h_before(kTangent, t, j))};
  }
  DualRow c_before(int64_t t, int64_t j) const {
    return {const_cast<T*>(c_before(kValue, t, j)), const_cast<T*>(c_before(kTangent, t, j))};
  }

  void forward_cell(int64_t t, int64_t j) const {
    const int64_t row = layout_.offsets[t] + j;
    const DualRow kept = planes(row), after = h(row), h_prev = h_before(t, j);
    DualRow c_prev = {};
    if constexpr (Cell::kHasCell) c_prev = c_before(t, j);
    T* const output = args_.output.data ? args_.output.at(layout_, t, j) + direction_ * hidden_ : nullptr;
    T* const cells = args_.cells.data ? args_.cells.at(layout_, t, j) + direction_ * hidden_ : nullptr;
    for (int64_t unit = 0; unit < hidden_; unit += kLanes<T>) {
      D gates[G], split[1], c, saved[Cell::kSaved + 1];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) gates[g] = kept.get(g * padded_ + unit);
      if constexpr (Cell::kSplit > 0) split[0] = kept.get(G * padded_ + unit);
      if constexpr (Cell::kHasCell) c = c_prev.get(unit);
      const D out = with_exact<Cell>(values_.cell, [&]<class Exact>() ALWAYS_INLINE_LAMBDA {
        return Exact::template forward<DualMath>(gates, split, h_prev.get(unit), c, saved);
      });
#pragma GCC unroll 8
      for (int i = 0; i < Cell::kSaved; ++i) kept.set(i * padded_ + unit, saved[i]);
      after.set(unit, out);
      if (output) store_part(output + unit, out.tangent, hidden_ - unit);
      if (cells) store_part(cells + unit, c.tangent, hidden_ - unit);
    }
  }

  void backward_cell(int64_t t, int64_t j) const {
    const int64_t row = layout_.offsets[t] + j;
    const DualRow kept = planes(row), after = h(row), h_prev = h_before(t, j), dh_row = carried(dh_, j);
    DualRow c_prev = {}, dc_row = {};
    if constexpr (Cell::kHasCell) {
      c_prev = c_before(t, j);
      dc_row = carried(dc_, j);
    }
    const auto grad_row = [&](const Sequence<const T>& of) {
      return of.data ? of.at(layout_, t, j) + direction_ * hidden_ : nullptr;
    };
    const T *grad_output = grad_row(values_.grad_output), *grad_cells = grad_row(values_.grad_cells);
    const T *output_tangent = grad_row(tangents_.grad_output), *cells_tangent = grad_row(tangents_.grad_cells);
    for (int64_t unit = 0; unit < hidden_; unit += kLanes<T>) {
      D saved[Cell::kSaved + 1], c, dc, dgates[Cell::kGradGates], dh = dh_row.get(unit);
#pragma GCC unroll 8
      for (int i = 0; i < Cell::kSaved; ++i) saved[i] = kept.get(i * padded_ + unit);
      if (grad_output) dh.value += load_part(grad_output + unit, hidden_ - unit);
      if (output_tangent) dh.tangent += load_part(output_tangent + unit, hidden_ - unit);
      if constexpr (Cell::kHasCell) {
        c = c_prev.get(unit);
        dc = dc_row.get(unit);
        if (grad_cells) dc.value += load_part(grad_cells + unit, hidden_ - unit);
        if (cells_tangent) dc.tangent += load_part(cells_tangent + unit, hidden_ - unit);
      }
      const D direct = with_exact<Cell>(values_.cell, [&]<class Exact>() ALWAYS_INLINE_LAMBDA {
        return Exact::template backward<DualMath>(saved, after.get(unit), h_prev.get(unit), c, dh, dc, dgates);
      });
      dh_row.set(unit, direct);
      if constexpr (Cell::kHasCell) dc_row.set(unit, dc);
#pragma GCC unroll 4
      for (int i = 0; i < Cell::kGradGates; ++i) kept.set(i * padded_ + unit, dgates[i]);
    }
  }

  /// Calls fn(row, rows): row(i) is, whatever i, what went into the product with weight_ih in the next of so many rows,
  /// first values, then tangents.
  void with_inputs(const auto& fn) const {
    const auto find = [&](int64_t t, int64_t j) { return rows_from(values_.input, layout_, t, j); };
    const auto find_tangents = [&](int64_t t, int64_t j) { return rows_from(tangents_.input, layout_, t, j); };
    RowReader values(layout_, 0, find);
    RowReader tangents(layout_, 0, find_tangents);
    int64_t next = 0;
    fn([&](int64_t) { return next++ < layout_.rows ? values.next() : tangents.next(); },
       tangents_.input.data ? 2 * layout_.rows : layout_.rows);
  }
  /// The same of weight_hh.
  void with_states(const auto& fn) const {
    Half half = kValue;
    int64_t t = 0, j = 0;
    fn(
        [&](int64_t) {
          const T* row = h_before(half, t, j);
          if (++j == layout_.batch_sizes[t]) {
            j = 0;
            if (++t == layout_.steps || layout_.batch_sizes[t] == 0) {
              t = 0;
              half = kTangent;
            }
          }
          return row;
        },
        2 * layout_.rows);
  }

  void add(WeightGradient<T>& to, int64_t task, int64_t rows, const auto& row, const auto& slot) const {
    int64_t offset[G];
    for (int g = 0; g < G; ++g) offset[g] = slot(g) * padded_;
    to.add(task, planes_.get(), stride_, offset, Chunk{0, layout_.steps, 0, rows}, row);
  }

  const TangentArgs<T>& args_;
  const BackwardArgs<T>&values_, &tangents_;
  const Layout& layout_;
  const int direction_;
  const bool reverse_;
  const int64_t hidden_, padded_, stride_;
  const bool recurs_;  // a state that is not zero goes into a step
  const PackedT weights_, weight_tangents_;
  Buffer<T> planes_;     // [2, T, planes, padded H]
  Buffer<T> h_;          // [2, T, padded H]
  Buffer<T> zeros_;      // [padded H]
  Buffer<T> h_0_, c_0_;  // [2, N, padded H]
  Buffer<T> dh_, dc_;    // [2, N, padded H]: gradients of a row's states, as far as they are known
  WeightGradient<T> input_gradient_, hidden_gradient_;
  Buffer<T> bias_sums_;  // [gate gradients, padded H]
};

template <class Cell, class T>
void tangent(const TangentArgs<T>& args, const Executor& executor) {
  const Sizes& sizes = args.values.sizes;
  const Layout& layout = args.values.layout;
  const int directions = sizes.directions;
  Several<TangentPass<Cell, T>> passes(directions);
  parallel(executor, directions, [&](int64_t d) { passes[d] = new TangentPass<Cell, T>(args, int(d)); });
  /// Calls fn(pass, i) for i = 0 .. count - 1, for both directions.
  const auto run = [&](int64_t count, const auto& fn) {
    parallel(executor, directions * count, [&](int64_t i) { fn(*passes[i / count], i % count); });
  };
  const Slices slices(layout, count_slices(layout, sizes, Cell::kGates, sizeof(T), executor, false));
  const int64_t row_tasks = passes[0]->row_tasks();
  run(row_tasks, [](auto& pass, int64_t i) { pass.project(i); });
  run(slices.size(), [&](auto& pass, int64_t i) {
    pass.forward(slices[i]);
    if (args.backward) pass.backward(slices[i]);
  });
  if (args.backward) {
    run(1, [](auto& pass, int64_t) { pass.prepare_parameters(); });
    const int64_t first = passes[0]->parameter_tasks();
    parallel(executor, directions == 1 ? first : first + passes[1]->parameter_tasks(),
             [&](int64_t i) { i < first ? passes[0]->run_parameters(i) : passes[1]->run_parameters(i - first); });
    if (args.tangents.grad_input.data) {
      parallel(executor, row_tasks, [&](int64_t i) {
        for (int d = 0; d < directions; ++d) passes[d]->run_input(i);
      });
    }
  }
  run(1, [](auto& pass, int64_t) { pass.finish(); });
}
