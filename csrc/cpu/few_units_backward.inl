// Backward of the layers of few_units.inl.

/// The gradients of some sequences after the others, and their part of those of the parameters.
template <class Cell, class T>
class FewUnitsBackward {
  using V = Abreast<T>;
  static constexpr int G = Cell::kGates;
  static constexpr bool kComputesAgain = Cell::kSaved > 0;  // else the output is enough

 public:
  /// `most`: sequences at a time. `apart`: gradients of parameters are wanted of each sequence by itself.
  FewUnitsBackward(const BackwardArgs<T>& args, int direction, int64_t most, bool apart)
      : args_(args),
        layout_(args.layout),
        weights_(args.weights[direction]),
        inputs_(args.sizes.input),
        hidden_(args.sizes.hidden),
        kept_(layout_.steps, hidden_, most),
        again_(forward_args(args)),
        forward_(again_, direction, kComputesAgain ? most : 0, kept_),
        by_rows_(!apart && prefers_rows(args.sizes)),
        x_(by_rows_ ? 0 : inputs_, most),
        h_(kComputesAgain ? 0 : hidden_, most),
        h_prev_(hidden_, most),
        c_prev_(Cell::kHasCell ? hidden_ : 0, most),
        dy_(hidden_, most),
        dcells_(Cell::kHasCell ? hidden_ : 0, most),
        dh_(hidden_, most),
        dc_(Cell::kHasCell ? hidden_ : 0, most),
        dgates_(Cell::kGradGates * hidden_, most),
        dx_(args.grad_input.data && !by_rows_ ? inputs_ : 0, most),
        of_rows_(by_rows_ ? input_numbers() : 0, true),
        lanes_(apart ? 0 : numbers(args.sizes) * kLanes<T>, true),
        apart_(apart ? numbers(args.sizes) : 0, most) {}

  /// Room for the sums over rows that the gradients of parameters are: of the weights as they lie, then of the gates'
  /// gradients.
  static int64_t numbers(const Sizes& s) {
    return Sizes::padded(G * s.hidden * (s.input + s.hidden) + Cell::kGradGates * s.hidden);
  }

  /// To `sums`, zeros before it: a row of numbers or, if they are apart, one for each sequence.
  void run(FewSequences those, T* sums) {
    those_ = those;
    if constexpr (kComputesAgain) forward_.run(those);
    const auto states = [&](auto* of) { return rows_of(of, hidden_, layout_, those_.direction, those_.first); };
    args_.grad_h_n ? dh_.read(states(args_.grad_h_n), those_.count) : dh_.clear();
    if constexpr (Cell::kHasCell) args_.grad_c_n ? dc_.read(states(args_.grad_c_n), those_.count) : dc_.clear();
    for (int64_t s = layout_.steps - 1; s >= 0; --s) {
      const int64_t t = time_of(layout_, those_.reverse(), s);
      count_ = those_.active(layout_, t);
      if (count_ == 0) continue;
      const int64_t before = s > 0 ? time_of(layout_, those_.reverse(), s - 1) : -1;
      read(t, before);
      const auto grad_input = args_.grad_input.template of<T>();
      fetch_next(args_.input, inputs_, layout_, those_, s, -1);
      if (grad_input.data) fetch_next(grad_input, inputs_, layout_, those_, s, -1);
      for (int64_t i = 0; i < count_; i += kAbreastLanes<T>) {
        for (int64_t u = 0; u < hidden_; ++u) compute(t, i, u);
      }
      pass_on(dh_, weights_.weight_hh, Cell::kDirectCarry, [](int g) { return Cell::hh_slot(g); });
      if (grad_input.data) {
        const Rows<T> rows = rows_of(grad_input, layout_, t, those_.first, 0);
        if (by_rows_) {
          pass_on_to_rows(rows);
        } else {
          pass_on(dx_, weights_.weight_ih, false, [](int g) { return Cell::ih_slot(g); });
          dx_.write(rows, count_, those_.reverse());
        }
      }
      add_to_parameters(t);
      if (s > 0 && s % kSummedRows == 0) add_lanes(sums);
      those_.each_beginning(args_, t, [&](int64_t j) {
        dh_.clear(j);
        dc_.clear(j);
      });
    }
    if (args_.grad_h_0) dh_.write(states(args_.grad_h_0), those_.count);
    if (Cell::kHasCell && args_.grad_c_0) dc_.write(states(args_.grad_c_0), those_.count);
    add_lanes(sums);
  }

 private:
  static ForwardArgs<T> forward_args(const BackwardArgs<T>& args) {
    ForwardArgs<T> again = {};
    again.sizes = args.sizes;
    again.layout = args.layout;
    again.input = args.input;
    again.resets = args.resets;
    again.h_0 = args.h_0;
    again.c_0 = args.c_0;
    for (int d = 0; d < args.sizes.directions; ++d) again.weights[d] = args.weights[d];
    return again;
  }

  /// Whether to take the input by rows: if these are whole vectors or, as columns take fewer but longer products, if
  /// there are few gates. (Other instruction sets load parts of vectors number by number.)
  static bool prefers_rows(const Sizes& s) {
    return s.input % kLanes<T> == 0 || (RNN_EXT_VECTOR_BYTES == 64 && 2 * s.input >= kLanes<T> && G * s.hidden <= 12);
  }
  int64_t input_numbers() const { return G * hidden_ * inputs_; }

  /// Adds up the sums of some steps.
  void add_lanes(T* sums) {
    if (apart_.width() > 0) {
      apart_.write({sums, apart_.width(), nullptr}, those_.count, true);
      return apart_.clear();
    }
    int64_t n = 0;
    if (by_rows_) {
      n = input_numbers();
      add_row(sums, of_rows_.get(), n);
      std::memset(of_rows_.get(), 0, size_t(n) * sizeof(T));
      n -= n % kLanes<T>;
    }
    for (; n < numbers(args_.sizes); n += kLanes<T>) {
      Vec<T> rows[kLanes<T>];
      for (int i = 0; i < kLanes<T>; ++i) {
        T* lanes = lanes_.get() + (n + i) * kLanes<T>;
        rows[i] = load(lanes);
        store(lanes, Vec<T>{});
      }
      store(sums + n, load(sums + n) + sums_of_lanes<T>(rows));
    }
  }

  /// What step t was computed from, and the gradients of its results; `before`: the step before it, -1: there is none.
  void read(int64_t t, int64_t before) {
    const int64_t first = those_.first, going_on = smaller(those_.active(layout_, before), count_);
    const auto read_step = [&](Columns<T>& to, const Sequence<const T>& from, int64_t step, int64_t count) {
      if (from.data && count > 0) to.read(rows_of(from, layout_, step, first, those_.direction * hidden_), count);
    };
    // Of sequences that have no step before it, the initial state.
    const auto read_initial = [&](Columns<T>& to, const T* initial) {
      if (going_on == count_) return;
      if (initial) return to.read(rows_of(initial, hidden_, layout_, those_.direction, first), count_);
      for (int64_t j = going_on; j < count_; ++j) to.clear(j);
    };
    if (!by_rows_) x_.read(rows_of(args_.input, layout_, t, first, 0), count_);
    if (!kComputesAgain) read_step(h_, args_.output, t, count_);
    read_step(dy_, args_.grad_output, t, count_);
    read_initial(h_prev_, args_.h_0);
    read_step(h_prev_, args_.output, before, going_on);
    if constexpr (Cell::kHasCell) {
      read_step(dcells_, args_.grad_cells, t, count_);
      read_initial(c_prev_, args_.c_0);
      for (int64_t u = 0; u < hidden_ && going_on > 0; ++u)
        copy_row(c_prev_[u], kept_.at(before, Cell::kSavedCell, u), going_on);
    }
    those_.each_beginning(args_, t, [&](int64_t j) {
      h_prev_.clear(j);
      c_prev_.clear(j);
    });
  }

  /// The gradients of the gates of unit u at step t, of the sequences from number i on. That of h becomes its direct
  /// part.
  ALWAYS_INLINE void compute(int64_t t, int64_t i, int64_t u) {
    V values[Cell::kSaved + 1], dgates[Cell::kGradGates];
    for (int v = 0; v < Cell::kSaved; ++v) values[v] = load_abreast(kept_.at(t, v, u) + i, count_ - i);
    const V h = kComputesAgain ? V{} : load_abreast(h_[u] + i);
    const V c_prev = Cell::kHasCell ? load_abreast(c_prev_[u] + i) : V{};
    V dc = Cell::kHasCell ? load_abreast(dc_[u] + i) + load_abreast(dcells_[u] + i) : V{};
    const V dh = load_abreast(dh_[u] + i) + load_abreast(dy_[u] + i);
    const V direct =
        Cell::template backward<Math<T, V>>(values, h, load_abreast(h_prev_[u] + i), c_prev, dh, dc, dgates);
    if constexpr (Cell::kDirectCarry) store_abreast(dh_[u] + i, direct, count_ - i);
    if constexpr (Cell::kHasCell) store_abreast(dc_[u] + i, dc, count_ - i);
    for (int q = 0; q < Cell::kGradGates; ++q) store_abreast(dgates_[q * hidden_ + u] + i, dgates[q]);
  }

  /// What comes of the gates' gradients by a weight: to = dgates W, `adds`: to what is there.
  void pass_on(Columns<T>& to, const T* weight, bool adds, const auto& slot) const {
    const int64_t width = to.width();
    for (int64_t i = 0; i < count_; i += kAbreastLanes<T>) {
      int64_t k = 0;
      for (; k + 2 <= width; k += 2) pass_on<2>(to, weight, adds, slot, i, k);
      if (k < width) pass_on<1>(to, weight, adds, slot, i, k);
    }
  }
  /// K columns from k on, of the sequences from number i on.
  template <int K>
  ALWAYS_INLINE void pass_on(Columns<T>& to, const T* weight, bool adds, const auto& slot, int64_t i, int64_t k) const {
    const int64_t width = to.width();
    V sums[K];
    for (int n = 0; n < K; ++n) sums[n] = adds ? load_abreast(to[k + n] + i) : V{};
    for (int g = 0; g < G; ++g) {
      const T *factors = weight + g * hidden_ * width + k, *dgate = dgates_[slot(g) * hidden_] + i;
      for (int64_t u = 0; u < hidden_; ++u, factors += width, dgate += dgates_.length()) {
        const V x = load_abreast(dgate);
#pragma GCC unroll 2
        for (int n = 0; n < K; ++n) sums[n] = fma(broadcast(factors[n]), x, sums[n]);
      }
    }
    for (int n = 0; n < K; ++n) store_abreast(to[k + n] + i, sums[n], count_ - i);
  }

  /// dx = dgates W, a vector of a row at a time.
  void pass_on_to_rows(const Rows<T>& rows) const {
    for (int64_t k = 0; k < inputs_; k += kLanes<T>) {
      int64_t j = 0;
      for (; j + 4 <= count_; j += 4) pass_on_to_rows<4>(rows, j, k);
      for (; j < count_; ++j) pass_on_to_rows<1>(rows, j, k);
    }
  }
  /// R rows from j on, from column k on.
  template <int R>
  ALWAYS_INLINE void pass_on_to_rows(const Rows<T>& rows, int64_t j, int64_t k) const {
    Vec<T> sums[R] = {};
    const T* factors = weights_.weight_ih + k;
    for (int g = 0; g < G; ++g) {
      const T* dgate = dgates_[Cell::ih_slot(g) * hidden_] + j;
      for (int64_t u = 0; u < hidden_; ++u, factors += inputs_, dgate += dgates_.length()) {
        const Vec<T> w = load_part(factors, inputs_ - k);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[r] = fma(broadcast(dgate[r]), w, sums[r]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      T* to = rows[j + r] + k;
      store_part(to, those_.reverse() ? load_part(to, inputs_ - k) + sums[r] : sums[r], inputs_ - k);
    }
  }

  /// Adds the products of the gates' gradients with the input, a vector of a row at a time.
  void add_rows(const Rows<const T>& rows) const {
    for (int64_t k = 0; k < inputs_; k += kLanes<T>) {
      int64_t row = 0;
      for (; row + 4 <= G * hidden_; row += 4) add_rows<4, 2>(rows, row, k);
      for (; row < G * hidden_; ++row) add_rows<1, 4>(rows, row, k);
    }
  }
  /// To Q rows of the weight's gradient, from column k on, in R sums of each.
  template <int Q, int R>
  ALWAYS_INLINE void add_rows(const Rows<const T>& rows, int64_t row, int64_t k) const {
    const T* dgates[Q];
    for (int q = 0; q < Q; ++q) dgates[q] = gradients_of(row + q, [](int g) { return Cell::ih_slot(g); });
    Vec<T> sums[Q][R] = {};
    const auto add = [&](int64_t j, int r) ALWAYS_INLINE_LAMBDA {
      const Vec<T> x = load_part(rows[j] + k, inputs_ - k);
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) sums[q][r] = fma(broadcast(dgates[q][j]), x, sums[q][r]);
    };
    int64_t j = 0;
    for (; j + R <= count_; j += R) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) add(j + r, r);
    }
    for (; j < count_; ++j) add(j, 0);
    for (int q = 0; q < Q; ++q) {
      for (int r = 1; r < R; ++r) sums[q][0] += sums[q][r];
      T* to = of_rows_.get() + (row + q) * inputs_ + k;
      store_part(to, load_part(to, inputs_ - k) + sums[q][0], inputs_ - k);
    }
  }

  /// The gradients of what row `row` of a weight computes.
  const T* gradients_of(int64_t row, const auto& slot) const {
    return dgates_[slot(int(row / hidden_)) * hidden_ + row % hidden_];
  }

  void add_to_parameters(int64_t t) {
    const Weights<void>& wanted = args_.grad_weights[those_.direction];
    const bool apart = apart_.width() > 0;
    const int64_t of_sum = apart ? apart_.length() : kLanes<T>;
    T* sums = apart ? apart_[0] : lanes_.get();
    const auto add = [&](bool is_wanted, const Columns<T>& columns, const auto& slot) {
      const int64_t width = columns.width(), rows = is_wanted ? G * hidden_ : 0;
      const auto dgates = [&](int64_t row) { return gradients_of(row, slot); };
      int64_t row = 0;
      for (; apart && row < rows; ++row) {
        for (int64_t k = 0; k < width; ++k) add_each(sums + (row * width + k) * of_sum, dgates(row), columns[k]);
      }
      for (; row + 2 <= rows; row += 2)
        add_products<2>(sums + row * width * of_sum, {dgates(row), dgates(row + 1)}, columns);
      if (row < rows) add_products<1>(sums + row * width * of_sum, {dgates(row)}, columns);
      sums += G * hidden_ * width * of_sum;
    };
    if (by_rows_) {
      if (wanted.weight_ih) add_rows(rows_of(args_.input, layout_, t, those_.first, 0));
      sums += input_numbers() * of_sum;
    } else {
      add(wanted.weight_ih, x_, [](int g) { return Cell::ih_slot(g); });
    }
    add(wanted.weight_hh, h_prev_, [](int g) { return Cell::hh_slot(g); });
    if (!wanted.bias_ih && !wanted.bias_hh) return;
    for (int64_t q = 0; q < Cell::kGradGates * hidden_; ++q, sums += of_sum) {
      if (apart) {
        add_row(sums, dgates_[q], count_);
      } else {
        Vec<T> sum = {};
        for (int64_t i = 0; i < count_; i += kLanes<T>) sum += load_part(dgates_[q] + i, count_ - i);
        store(sums, load(sums) + sum);
      }
    }
  }

  /// Adds the products of two columns.
  void add_each(T* to, const T* a, const T* b) const {
    for (int64_t i = 0; i < count_; i += kLanes<T>)
      store_part(to + i, fma(load(a + i), load(b + i), load(to + i)), count_ - i);
  }

  /// Adds the products of R columns with each of `columns`, each lane by itself, to R rows of as many vectors.
  template <int R>
  void add_products(T* sums, const T* const (&rows)[R], const Columns<T>& columns) const {
    int64_t k = 0;
    for (; k + 4 <= columns.width(); k += 4) add_products<R, 4>(sums, rows, columns, k);
    for (; k < columns.width(); ++k) add_products<R, 1>(sums, rows, columns, k);
  }
  template <int R, int K>
  ALWAYS_INLINE void add_products(T* sums, const T* const (&rows)[R], const Columns<T>& columns, int64_t k) const {
    Vec<T> sum[R][K] = {};
    const auto add = [&](int64_t i, const auto& load_lanes) ALWAYS_INLINE_LAMBDA {
      Vec<T> x[K];
#pragma GCC unroll 4
      for (int n = 0; n < K; ++n) x[n] = load_lanes(columns[k + n] + i);
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        const Vec<T> a = load_lanes(rows[r] + i);
#pragma GCC unroll 4
        for (int n = 0; n < K; ++n) sum[r][n] = fma(a, x[n], sum[r][n]);
      }
    };
    int64_t i = 0;
    for (; i + kLanes<T> <= count_; i += kLanes<T>) add(i, [](const T* p) ALWAYS_INLINE_LAMBDA { return load(p); });
    if (i < count_) add(i, [&](const T* p) ALWAYS_INLINE_LAMBDA { return load_part(p, count_ - i); });
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < K; ++n) {
        T* to = sums + (r * columns.width() + k + n) * kLanes<T>;
        store(to, load(to) + sum[r][n]);
      }
    }
  }

  const BackwardArgs<T>& args_;
  const Layout& layout_;
  const Weights<const T>& weights_;
  FewSequences those_ = {};
  int64_t count_ = 0;  // of them that have the step
  const int64_t inputs_, hidden_;
  const KeptColumns<Cell, T> kept_;
  const ForwardArgs<T> again_;
  FewUnitsForward<Cell, T> forward_;
  const bool by_rows_;  // inputs and their gradients are taken as they lie, x_ and dx_ hold nothing
  Columns<T> x_, h_, h_prev_, c_prev_, dy_, dcells_, dh_, dc_, dgates_, dx_;
  Buffer<T> of_rows_;  // sums for the gradient of the input's weight if by_rows_
  Buffer<T> lanes_;    // [numbers][lanes]: sums for the gradients of parameters; nothing where each sequence has its
  Columns<T> apart_;   // own: of so many numbers, else of none
};

/// Rows of a step that follow each other and belong to the same group, or to the batch if there are no groups.
struct GroupRun {
  int64_t group, first, count;
};

/// All of them, group by group, in runs of no more than `most` rows: how many.
inline int64_t find_group_runs(const Layout& layout, int64_t groups, int64_t most, GroupRun* runs) {
  int64_t found = 0;
  if (groups == 0) {
    for (int64_t first = 0; first < layout.batch; first += most)
      runs[found++] = {0, first, smaller(most, layout.batch - first)};
    return found;
  }
  const int64_t size = layout.batch / groups;
  Buffer<int64_t> rows(layout.batch);
  find_group_rows(layout, groups, rows.get());
  for (int64_t i = 0; i < layout.batch; ++i) {
    const int64_t group = i / size, row = rows.get()[i];
    GroupRun* last = found > 0 ? runs + found - 1 : nullptr;
    if (last && last->group == group && last->first + last->count == row && last->count < most) {
      ++last->count;
    } else {
      runs[found++] = {group, row, 1};
    }
  }
  return found;
}

template <class Cell, class T>
void few_units_backward(const BackwardArgs<T>& args, const Executor& executor) {
  using Part = FewUnitsBackward<Cell, T>;
  const Sizes& s = args.sizes;
  const int64_t batch = args.layout.batch, most = together<Cell>(batch), numbers = Part::numbers(s);
  Buffer<GroupRun> runs(args.groups > 0 ? batch : parts_of(batch, most));
  int64_t count = find_group_runs(args.layout, args.groups, most, runs.get());
  // Vectors of so short runs are better filled up with those of other groups, each row's gradients of parameters apart
  // from the others', and fewer rows at a time, as there are as many of those gradients.
  constexpr int64_t kShort = 16, kApart = 32;
  const bool apart = args.groups > 0 && batch < kShort * count;
  if (apart) count = find_group_runs(args.layout, args.groups, 1, runs.get());
  Buffer<T> all_sums(s.directions * count * numbers, true);
  const auto sums_of = [&](int d, int64_t i) { return all_sums.get() + (d * count + i) * numbers; };
  share_tasks(executor, apart ? parts_of(batch, kApart) : count, [&](int64_t begin, int64_t end) {
    // One direction after the other, as both add to the gradient of the input.
    for (int d = 0; d < s.directions; ++d) {
      Part part(args, d, smaller(apart ? kApart : most, batch), apart);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = apart ? i * kApart : runs.get()[i].first;
        const int64_t size = apart ? smaller(kApart, batch - first) : runs.get()[i].count;
        part.run({d, first, size}, sums_of(d, apart ? first : i));
      }
    }
  });
  for (int d = 0; d < s.directions; ++d) {
    // One of a group's runs.
    const auto sums_of_run = [&](int64_t i) { return sums_of(d, apart ? runs.get()[i].first : i); };
    for (int64_t i = 0; i < count;) {
      const int64_t group = runs.get()[i].group;
      T* sums = sums_of_run(i++);
      for (; i < count && runs.get()[i].group == group; ++i) add_row(sums, sums_of_run(i), numbers);
      const Weights<void> to = gradients_of_group<T>(args.grad_weights[d], s, Cell::kGates, group);
      const auto write = [&](void* grad, int64_t size) {
        if (grad) copy_row(static_cast<T*>(grad), sums, size);
        sums += size;
      };
      write(to.weight_ih, Cell::kGates * s.hidden * s.input);
      write(to.weight_hh, s.recurrent(Cell::kGates));
      write_bias_gradients<Cell, T>(to, sums, s.hidden, s.hidden);
    }
  }
}
