// Layers of few units and many sequences. The scans of forward.inl and backward.inl hold units of a sequence in the
// lanes of a vector, of which such a layer would leave most empty: here they hold sequences, and units take turns.
// Nothing is kept for backward, which computes what it needs once more, of few timesteps in the cache: it may be called
// for a larger batch than forward was (by vmap), one of few units where that was none. It never is for a smaller one,
// whose scan would look for what forward has not kept.

/// Sequences that go through a step together: enough to hide how long a cell takes, and what they need of the step
/// nearly always fits the first-level cache. An RNN, which computes little of what it reads, is held up by memory where
/// there are many, and memory gives more of what follows each other. The number of threads must not decide it, as sums
/// depend on it.
template <class Cell>
int64_t together(int64_t batch) {
  constexpr int64_t kMany = 8192;
  return Cell::kSaved == 0 && batch >= kMany ? 512 : 128;
}

/// Sequences that follow each other, in one direction.
struct FewSequences {
  int direction;
  int64_t first, count;

  bool reverse() const { return direction == 1; }
  /// How many of them have step t, the first ones; of step -1 none.
  int64_t active(const Layout& layout, int64_t t) const {
    return t < 0 ? 0 : Slice{first, first + count}.active(layout, t);
  }
  /// Calls fn(j) for those of which an independent sequence begins before step t.
  void each_beginning(const auto& args, int64_t t, const auto& fn) const {
    if (!args.resets.data) return;
    for (int64_t j = 0; j < active(args.layout, t); ++j)
      if (begins(args.resets, args.layout, reverse(), t, first + j)) fn(j);
  }
};

/// Asks for `width` features of what is next after step number `s`, of steps that go `by` 1 or -1: the same sequences'
/// or, at their end, the next ones', which lies too far from these for the processor to see it coming.
template <class T>
void fetch_next(const Sequence<T>& sequence, int64_t width, const Layout& layout, FewSequences those, int64_t s,
                int by) {
  s += by;
  if (s < 0 || s >= layout.steps) {
    s = by > 0 ? 0 : layout.steps - 1;
    those.first += those.count;
    those.count = smaller(those.count, layout.batch - those.first);
    if (those.count <= 0) return;
  }
  const int64_t t = time_of(layout, those.reverse(), s), count = those.active(layout, t);
  fetch_rows(rows_of(sequence, layout, t, those.first, 0), width, count);
}

/// A cell's values that backward needs, of all steps of up to so many sequences; of no steps, none.
template <class Cell, class T>
class KeptColumns {
 public:
  KeptColumns(int64_t steps, int64_t hidden, int64_t count)
      : hidden_(hidden), length_(whole_abreast<T>(count)), data_(steps * Cell::kSaved * hidden * length_) {}

  explicit operator bool() const { return data_.get(); }
  T* at(int64_t t, int value, int64_t unit) const {
    return data_.get() + ((t * Cell::kSaved + value) * hidden_ + unit) * length_;
  }

 private:
  const int64_t hidden_, length_;
  Buffer<T> data_;
};

/// The steps of some sequences after the others, whose results are written if there is a place for them.
template <class Cell, class T>
class FewUnitsForward {
  using V = Abreast<T>;
  using Sums = TangentWeights<Cell, T>;  // which says what of a cell is summed apart
  static constexpr int G = Cell::kGates, kSums = Sums::kSums;

 public:
  /// `most`: sequences at a time.
  FewUnitsForward(const ForwardArgs<T>& args, int direction, int64_t most, const KeptColumns<Cell, T>& kept)
      : args_(args),
        layout_(args.layout),
        weights_(args.weights[direction]),
        kept_(kept),
        hidden_(args.sizes.hidden),
        bias_(kSums * hidden_, true),
        x_(args.sizes.input, most),
        h_(hidden_, most),
        next_(hidden_, most),
        c_(Cell::kHasCell ? hidden_ : 0, most) {
    for (int64_t i = 0; i < G * hidden_ && weights_.bias_ih; ++i) {
      bias_.get()[i] += weights_.bias_hh[i];
      bias_.get()[Sums::input_sum(int(i / hidden_)) * hidden_ + i % hidden_] += weights_.bias_ih[i];
    }
  }

  void run(FewSequences those) {
    const int64_t first = those.first, of_direction = those.direction * hidden_;
    const auto states = [&](auto* of) { return rows_of(of, hidden_, layout_, those.direction, first); };
    args_.h_0 ? h_.read(states(args_.h_0), those.count) : h_.clear();
    if constexpr (Cell::kHasCell) args_.c_0 ? c_.read(states(args_.c_0), those.count) : c_.clear();
    for (int64_t s = 0; s < layout_.steps; ++s) {
      const int64_t t = time_of(layout_, those.reverse(), s), count = those.active(layout_, t);
      if (count == 0) continue;
      x_.read(rows_of(args_.input, layout_, t, first, 0), count);
      fetch_next(args_.input, x_.width(), layout_, those, s, 1);
      those.each_beginning(args_, t, [&](int64_t j) {
        h_.clear(j);
        c_.clear(j);
      });
      for (int64_t i = 0; i < count; i += kAbreastLanes<T>) {
        for (int64_t u = 0; u < hidden_; ++u) compute(t, i, count - i, u);
      }
      for (int64_t u = 0; u < hidden_; ++u) copy_row(h_[u], next_[u], count);
      if (args_.output.data) h_.write(rows_of(args_.output, layout_, t, first, of_direction), count);
      if (Cell::kHasCell && args_.cells.data) c_.write(rows_of(args_.cells, layout_, t, first, of_direction), count);
    }
    if (args_.h_n) h_.write(states(args_.h_n), those.count);
    if (Cell::kHasCell && args_.c_n) c_.write(states(args_.c_n), those.count);
  }

 private:
  /// Step t of unit u of the sequences from number i on, of which `left` have it.
  ALWAYS_INLINE void compute(int64_t t, int64_t i, int64_t left, int64_t u) {
    V sums[kSums], saved[Cell::kSaved + 1];
    for (int q = 0; q < kSums; ++q) sums[q] = broadcast_abreast(bias_.get()[q * hidden_ + u]);
    add_products(sums, weights_.weight_ih, x_, i, u, [](int g) { return Sums::input_sum(g); });
    add_products(sums, weights_.weight_hh, h_, i, u, [](int g) { return g; });
    V c = Cell::kHasCell ? load_abreast(c_[u] + i) : V{};
    const V h =
        Cell::template forward<Math<T, V>>(sums, sums + kSums - Cell::kSplit, load_abreast(h_[u] + i), c, saved);
    store_abreast(next_[u] + i, h);
    if constexpr (Cell::kHasCell) store_abreast(c_[u] + i, c, left);
    for (int v = 0; v < Cell::kSaved && kept_; ++v) store_abreast(kept_.at(t, v, u) + i, saved[v], left);
  }

  ALWAYS_INLINE void add_products(V* sums, const T* weight, const Columns<T>& columns, int64_t i, int64_t u,
                                  const auto& sum_of) const {
    const int64_t width = columns.width();
    for (int64_t k = 0; k < width; ++k) {
      const V x = load_abreast(columns[k] + i);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        const T factor = weight[(g * hidden_ + u) * width + k];
        sums[sum_of(g)] = fma(broadcast(factor), x, sums[sum_of(g)]);
      }
    }
  }

  const ForwardArgs<T>& args_;
  const Layout& layout_;
  const Weights<const T>& weights_;
  const KeptColumns<Cell, T>& kept_;
  const int64_t hidden_;
  Buffer<T> bias_;  // [sums, H]
  Columns<T> x_, h_, next_, c_;
};

inline int64_t parts_of(int64_t batch, int64_t most) { return (batch + most - 1) / most; }

/// Calls fn(first, last) for shares of so many tasks, each of which makes memory for all of its.
void share_tasks(const Executor& executor, int64_t tasks, const auto& fn) {
  const int64_t shares = smaller(tasks, executor.threads > 1 ? 4 * executor.threads : 1);
  parallel(executor, shares, [&](int64_t i) { fn(tasks * i / shares, tasks * (i + 1) / shares); });
}

template <class Cell, class T>
void few_units_forward(const ForwardArgs<T>& args, const Executor& executor) {
  const int64_t batch = args.layout.batch, most = together<Cell>(batch);
  const KeptColumns<Cell, T> nothing(0, 0, 0);
  share_tasks(executor, parts_of(batch, most), [&](int64_t part, int64_t end) {
    for (int d = 0; d < args.sizes.directions; ++d) {
      FewUnitsForward<Cell, T> forward(args, d, smaller(most, batch), nothing);
      for (int64_t i = part; i < end; ++i) forward.run({d, i * most, smaller(most, batch - i * most)});
    }
  });
}
