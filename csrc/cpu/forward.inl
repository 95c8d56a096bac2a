// The scan over time, forward.

/// Scratch memory, aligned to a cache line.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size, bool zero = false) {
    const size_t bytes = (size_t(size) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(bytes ? std::aligned_alloc(64, bytes) : nullptr);
    if (bytes && !data_) out_of_memory(bytes);
    if (zero && bytes) std::memset(static_cast<void*>(data_), 0, bytes);
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

/// One of something for each direction.
template <class Item>
struct Pair {
  Pair() = default;
  ~Pair() {
    delete item[0];
    delete item[1];
  }
  Pair(const Pair&) = delete;
  Pair& operator=(const Pair&) = delete;
  Item* item[2] = {nullptr, nullptr};
};

ALWAYS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
ALWAYS_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <class Fn>
void parallel(const Executor& executor, int64_t tasks, const Fn& fn) {
  if (executor.threads <= 1 || tasks <= 1) {
    for (int64_t i = 0; i < tasks; ++i) fn(i);
  } else {
    executor.run(
        tasks, [](void* context, int64_t i) { (*static_cast<const Fn*>(context))(i); },
        const_cast<void*>(static_cast<const void*>(&fn)));
  }
}

/// The rows of one thread: entries [first, last) of the batch, and how many of them step t still has.
struct Slice {
  int64_t first, last;
  int64_t active(const Layout& layout, int64_t t) const {
    return larger(0, smaller(last, layout.batch_sizes[t]) - first);
  }
  int64_t size() const { return last - first; }
};

/// How many pieces to cut the batch into: as many as there are threads to spare, but of no fewer than 8 rows, because a
/// tile of fewer reads the weights more often than it can use them.
inline int64_t count_slices(const Layout& layout, const Sizes& sizes, const Executor& executor) {
  return larger(1, smaller(executor.threads / sizes.directions, layout.batch / 8));
}

inline Slice slice_of(const Layout& layout, int64_t index, int64_t count) {
  return {layout.batch * index / count, layout.batch * (index + 1) / count};
}

/// Does an independent sequence begin between step t and the one that this direction ran before it?
inline bool begins(const Sequence<const bool>& resets, const Layout& layout, bool reverse, int64_t t, int64_t j) {
  if (!reverse) return *resets.at(layout, t, j);
  return t + 1 < layout.steps && j < layout.batch_sizes[t + 1] && *resets.at(layout, t + 1, j);
}

/// Copy state rows between the caller's [N, width] and a padded buffer whose first row is the slice's.
template <class T>
void read_states(T* rows, int64_t stride, const T* states, int64_t width, const Layout& layout, Slice slice) {
  if (!states) return;
  for (int64_t j = slice.first; j < slice.last; ++j)
    std::memcpy(rows + (j - slice.first) * stride, states + layout.entry(j) * width, size_t(width) * sizeof(T));
}

template <class T>
void write_states(T* states, int64_t width, const T* rows, int64_t stride, const Layout& layout, Slice slice,
                  int64_t from, int64_t to) {
  if (!states) return;
  for (int64_t j = larger(from, slice.first); j < smaller(to, slice.last); ++j)
    std::memcpy(states + layout.entry(j) * width, rows + (j - slice.first) * stride, size_t(width) * sizeof(T));
}

/// So few rows that packing the weights would cost more than it saves (measured: about even at 8).
inline bool is_short(const Layout& layout) { return layout.rows <= 4; }

/// One direction's weights as the forward scan wants them.
template <class Cell, class T>
struct ForwardWeights {
  ForwardWeights(const Weights<const T>& w, const Sizes& s, bool pack)
      : plain(w),
        input(pack ? s.input * Cell::kGates * s.padded() : 0),
        hidden(pack ? s.output() * Cell::kGates * s.padded() : 0),
        proj(pack && s.proj ? s.hidden * Sizes::padded(s.proj) : 0),
        bias(Cell::kGates * s.padded(), true),
        split_bias(s.padded(), true) {
    const int64_t gate_blocks = s.padded() / kLanes<T>;
    for (int64_t g = 0; g < Cell::kGates; ++g) {
      if (pack) {
        pack_gates(input.get() + g * gate_blocks * s.input * kLanes<T>, w.weight_ih + g * s.hidden * s.input, 1,
                   s.hidden, s.input, gate_blocks);
      }
      const bool split = g >= Cell::kGates - Cell::kSplit;
      for (int64_t u = 0; w.bias_ih && u < s.hidden; ++u) {
        const T hidden_bias = w.bias_hh[g * s.hidden + u];
        bias.get()[g * s.padded() + u] = w.bias_ih[g * s.hidden + u] + (split ? T(0) : hidden_bias);
        if (split) split_bias.get()[u] = hidden_bias;
      }
    }
    if (!pack) return;
    if constexpr (cells::kIsVariant<Cell>) {
      for (int64_t g = 0; g < Cell::kGates; ++g)
        pack_gates(hidden.get() + g * gate_blocks * s.output() * kLanes<T>, w.weight_hh + g * s.hidden * s.output(), 1,
                   s.hidden, s.output(), gate_blocks);
    } else {
      pack_gates(hidden.get(), w.weight_hh, Cell::kGates, s.hidden, s.output(), blocks_of<T>(s.hidden));
    }
    if (s.proj) pack_gates(proj.get(), w.weight_hr, 1, s.proj, s.hidden, blocks_of<T>(s.proj));
  }

  Weights<const T> plain;  // as they came; the only ones there are if not packed
  Buffer<T> input;         // [G * padded H / lanes][I][lanes]
  Buffer<T> hidden;        // [H / lanes][P][G][lanes], of a variant [G * padded H / lanes][P][lanes]
  Buffer<T> proj;          // [P / lanes][H][lanes]
  Buffer<T> bias;          // [G, padded H]: both biases, of a split gate the input's alone
  Buffer<T> split_bias;    // [padded H]: bias_hh of the split gate
};

/// What the scan of a variant has besides; see variants.inl.
template <class Cell, class T, bool = cells::kIsVariant<Cell>>
struct VariantForward {
  VariantForward(const ForwardArgs<T>&, int, Slice) {}
};

template <class Cell, class T>
class ForwardScan {
  static constexpr int G = Cell::kGates;
  using V = Vec<T>;

 public:
  ForwardScan(const ForwardArgs<T>& args, const ForwardWeights<Cell, T>& weights, int direction, Slice slice)
      : args_(args),
        layout_(args.layout),
        weights_(weights),
        direction_(direction),
        reverse_(direction == 1),
        slice_(slice),
        hidden_(args.sizes.hidden),
        padded_(args.sizes.padded()),
        out_(args.sizes.output()),
        out_padded_(Sizes::padded(out_)),
        saved_(saved_values(args.cell, args.sizes.proj != 0, args.variant)),
        short_(is_short(args.layout)),
        keep_(args.saved != nullptr && Cell::kSaved > 0),
        gates_stride_((keep_ ? saved_ : G) * padded_),
        chunk_rows_(larger(slice.size(), smaller(layout_.rows, larger(16, kChunkBytes / (gates_stride_ * sizeof(T)))))),
        gates_(keep_ ? 0 : chunk_rows_ * gates_stride_),
        input_rows_(chunk_rows_),
        gate_rows_(chunk_rows_),
        h_now_(slice.size() * out_padded_, true),
        h_next_(slice.size() * out_padded_, true),
        c_(Cell::kHasCell ? slice.size() * padded_ : 0, true),
        hidden_gates_(short_ ? G * padded_ : 0),
        unprojected_(args.sizes.proj ? slice.size() * padded_ : 0),
        output_rows_(args.sizes.proj ? slice.size() : 0),
        variant_(args, direction, slice) {}

  void run() {
    const int64_t states = layout_.batch * direction_;
    T* h_n = args_.h_n + states * out_;
    const T* h_0 = args_.h_0 ? args_.h_0 + states * out_ : nullptr;
    read_states(h_now_.get(), out_padded_, h_0, out_, layout_, slice_);
    read_states(h_next_.get(), out_padded_, h_0, out_, layout_, slice_);
    if (Cell::kHasCell && args_.c_0)
      read_states(c_.get(), padded_, args_.c_0 + states * hidden_, hidden_, layout_, slice_);

    T* now = h_now_.get();
    T* next = h_next_.get();
    const int64_t steps = layout_.steps;
    const int64_t alive = steps ? layout_.batch_sizes[0] : 0;
    write_states(h_n, out_, now, out_padded_, layout_, slice_, alive, layout_.batch);
    for (int64_t s = 0; s < steps;) {
      const int64_t end = fill_chunk(s);
      int64_t row = 0;
      for (; s < end; ++s) {
        const int64_t t = time(s);
        const int64_t rows = slice_.active(layout_, t);
        if (rows == 0) continue;
        if (args_.resets.data) reset(t, rows, now);
        if constexpr (cells::kIsVariant<Cell>) {
          variant_step(t, rows, gate_rows_.get() + row, now, next);
        } else {
          step(t, rows, gate_rows_.get() + row, now, next);
        }
        row += rows;
        const int64_t stay = reverse_        ? (t > 0 ? layout_.batch_sizes[t] : 0)
                             : t + 1 < steps ? layout_.batch_sizes[t + 1]
                                             : 0;
        write_states(h_n, out_, next, out_padded_, layout_, slice_, stay, layout_.batch_sizes[t]);
        T* swap = now;
        now = next;
        next = swap;
      }
    }
    if constexpr (Cell::kHasCell)
      write_states(args_.c_n + states * hidden_, hidden_, c_.get(), padded_, layout_, slice_, 0, layout_.batch);
  }

 private:
  static constexpr int64_t kChunkBytes = 256 * 1024;  // input gates that stay in the second-level cache until used

  int64_t time(int64_t s) const { return reverse_ ? layout_.steps - 1 - s : s; }

  /// The input gates of as many steps from s as the chunk holds, as one product. Returns the step after them.
  int64_t fill_chunk(int64_t s) {
    const T* bias = cells::kIsNormed<Cell> ? nullptr : weights_.bias.get();
    const T** inputs = input_rows_.get();
    T** gates = gate_rows_.get();
    int64_t count = 0;
    for (; s < layout_.steps; ++s) {
      const int64_t t = time(s);
      const int64_t rows = slice_.active(layout_, t);
      if (count + rows > chunk_rows_) break;
      for (int64_t j = slice_.first; j < slice_.first + rows; ++j, ++count) {
        inputs[count] = args_.input.at(layout_, t, j);
        gates[count] = keep_ ? args_.saved + (direction_ * layout_.rows + layout_.offsets[t] + j) * gates_stride_
                             : gates_.get() + count * gates_stride_;
      }
    }
    if (short_) {
      const Weights<const T>& w = weights_.plain;
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t g = 0; g < G; ++g)
          dot_rows(gates[r] + g * padded_, bias ? bias + g * padded_ : nullptr,
                   w.weight_ih + g * hidden_ * args_.sizes.input, hidden_, args_.sizes.input, inputs[r]);
      }
      return s;
    }
    PlainProduct<T> p;
    p.rows = count;
    p.columns = G * padded_;
    p.a = inputs;
    p.c = gates;
    p.b = weights_.input.get();
    p.segments.length = args_.sizes.input;
    p.bias = bias;
    plain_product(p);
    return s;
  }

  void reset(int64_t t, int64_t rows, T* now) {
    for (int64_t r = 0; r < rows; ++r) {
      if (!begins(args_.resets, layout_, reverse_, t, slice_.first + r)) continue;
      std::memset(now + r * out_padded_, 0, size_t(out_) * sizeof(T));
      if (Cell::kHasCell) std::memset(c_.get() + r * padded_, 0, size_t(hidden_) * sizeof(T));
    }
  }

  void variant_step(int64_t t, int64_t rows, T* const* gates, const T* now, T* next);

  void step(int64_t t, int64_t rows, T* const* gates, const T* now, T* next) {
    const Order order = step_order(layout_.batch_sizes[t], t);
    const bool projected = args_.sizes.proj != 0;
    const int64_t hidden = hidden_, padded = padded_, out_padded = out_padded_, out = out_;
    T* c = c_.get();
    T* unprojected = unprojected_.get();
    const T* split_bias = weights_.split_bias.get();
    const bool keep = keep_;
    const auto output = [=, this](int64_t r) {
      return args_.output.at(layout_, t, slice_.first + r) + direction_ * out;
    };
    const auto a_row = [=](int64_t r) { return now + r * out_padded; };
    const auto init = [=](int64_t r, int64_t block, V* acc) {
      const T* from = gates[r] + block * kLanes<T>;
      for (int g = 0; g < G; ++g)
        acc[g] = load(g < G - Cell::kSplit ? from + g * padded : split_bias + block * kLanes<T>);
    };
    const auto finish = [&](int64_t r, int64_t block, const V* acc) ALWAYS_INLINE_LAMBDA {
      const int64_t unit = block * kLanes<T>;
      T* row = gates[r] + unit;
      V split[1] = {}, h_prev = {}, state = {}, saved[Cell::kSaved + 1];
      if constexpr (Cell::kSplit > 0) split[0] = load(row + (G - 1) * padded);
      if constexpr (Cell::kDirectCarry) h_prev = load(now + r * out_padded + unit);
      if constexpr (Cell::kHasCell) state = load(c + r * padded + unit);
      const V h = Cell::template forward<Math<T>>(acc, split, h_prev, state, saved);
      if constexpr (Cell::kHasCell) {
        store(c + r * padded + unit, state);
        if (args_.cells.data)
          store_part(args_.cells.at(layout_, t, slice_.first + r) + direction_ * hidden + unit, state, hidden - unit);
      }
      if (keep) {
        for (int i = 0; i < Cell::kSaved; ++i) store(row + i * padded, saved[i]);
        if (projected) store(row + Cell::kSaved * padded, h);
      }
      if (projected) {
        store(unprojected + r * padded + unit, h);
      } else {
        store(next + r * out_padded + unit, h);
        store_part(output(r) + unit, h, hidden - unit);
      }
    };
    if (short_) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t g = 0; g < G; ++g)
          dot_rows(hidden_gates_.get() + g * padded, static_cast<const T*>(nullptr),
                   weights_.plain.weight_hh + g * hidden * out, hidden, out, a_row(r));
        for (int64_t block = 0; block < blocks_of<T>(hidden); ++block) {
          V acc[G];
          init(r, block, acc);
          for (int g = 0; g < G; ++g) acc[g] += load(hidden_gates_.get() + g * padded + block * kLanes<T>);
          finish(r, block, acc);
        }
      }
    } else {
      product<G>(rows, blocks_of<T>(hidden), order, a_row, weights_.hidden.get(), Segments{1, out, {}, 1}, init,
                 finish);
    }
    if (projected) project(t, rows, next);
  }

  void project(int64_t t, int64_t rows, T* next) {
    for (int64_t r = 0; r < rows; ++r) {
      input_rows_.get()[r] = unprojected_.get() + r * padded_;
      output_rows_.get()[r] = next + r * out_padded_;
    }
    if (short_) {
      for (int64_t r = 0; r < rows; ++r)
        dot_rows(next + r * out_padded_, static_cast<const T*>(nullptr), weights_.plain.weight_hr, out_, hidden_,
                 unprojected_.get() + r * padded_);
    } else {
      PlainProduct<T> p;
      p.rows = rows;
      p.columns = out_;
      p.a = input_rows_.get();
      p.c = output_rows_.get();
      p.b = weights_.proj.get();
      p.segments.length = hidden_;
      p.order = step_order(layout_.batch_sizes[t], t);
      plain_product(p);
    }
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(args_.output.at(layout_, t, slice_.first + r) + direction_ * out_, next + r * out_padded_,
                  size_t(out_) * sizeof(T));
  }

  const ForwardArgs<T>& args_;
  const Layout& layout_;
  const ForwardWeights<Cell, T>& weights_;
  const int direction_;
  const bool reverse_;
  const Slice slice_;
  const int64_t hidden_, padded_, out_, out_padded_;
  const int saved_;
  const bool short_, keep_;
  const int64_t gates_stride_, chunk_rows_;
  Buffer<T> gates_;              // [chunk rows, G, padded H], where the input gates do not go straight into `saved`
  Buffer<const T*> input_rows_;  // [chunk rows]
  Buffer<T*> gate_rows_;         // [chunk rows]
  Buffer<T> h_now_, h_next_;     // [slice, padded P]
  Buffer<T> c_;                  // [slice, padded H]
  Buffer<T> hidden_gates_;       // [G, padded H], of one row, where weights are not packed
  Buffer<T> unprojected_;        // [slice, padded H]
  Buffer<T*> output_rows_;       // [slice]
  VariantForward<Cell, T> variant_;
};

template <class Cell, class T>
void forward(const ForwardArgs<T>& args, const Executor& executor) {
  const int directions = args.sizes.directions;
  Pair<ForwardWeights<Cell, T>> weights;
  parallel(executor, directions, [&](int64_t d) {
    weights.item[d] = new ForwardWeights<Cell, T>(args.weights[d], args.sizes, !is_short(args.layout));
  });
  const int64_t slices = count_slices(args.layout, args.sizes, executor);
  parallel(executor, directions * slices, [&](int64_t task) {
    const int d = int(task / slices);
    ForwardScan<Cell, T>(args, *weights.item[d], d, slice_of(args.layout, task % slices, slices)).run();
  });
}
