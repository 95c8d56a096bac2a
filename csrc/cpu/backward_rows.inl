// What backward walks: the rows of a sequence, in the layout's internal order, and the chunks of timesteps whose gate
// gradients it has at hand.

/// Rows that are evenly spaced; `first` null: rows of zeros.
template <class T>
struct EvenRows {
  T* first;
  int64_t distance, count;
  const void* array = nullptr;  // of which they are, where that is asked
};

/// The distance between rows of a sequence that follow each other in the layout's internal order, if they are evenly
/// spaced over all timesteps; else 0.
template <class T>
int64_t even_distance(const Sequence<T>& sequence, const Layout& layout) {
  if (layout.packed) return layout.stored ? 0 : sequence.row;
  if (!layout.has_all_rows()) return 0;
  if (layout.batch == 1) return sequence.step;
  return !layout.order && sequence.step == layout.batch * sequence.row ? sequence.row : 0;
}

/// Row (t, j) of a sequence, and those after it in the layout's internal order as far as they are evenly spaced.
template <class T>
EvenRows<T> rows_from(const Sequence<T>& sequence, const Layout& layout, int64_t t, int64_t j) {
  T* const first = sequence.at(layout, t, j);
  if (const int64_t distance = even_distance(sequence, layout))
    return {first, distance, layout.rows - layout.offsets[t] - j, sequence.data};
  return {first, sequence.row, layout.order && !layout.packed ? 1 : layout.batch_sizes[t] - j, sequence.data};
}

/// Walks the rows of a layout in their internal order, from number `row` on. find(t, j): EvenRows from row (t, j) on.
template <class Find>
class RowReader {
 public:
  RowReader(const Layout& layout, int64_t row, const Find& find) : layout_(layout), find_(find) {
    int64_t low = 0, high = layout.steps;  // the last step that starts at or before `row`
    while (low + 1 < high) {
      const int64_t middle = (low + high) / 2;
      (layout.offsets[middle] <= row ? low : high) = middle;
    }
    t_ = low;
    j_ = layout.steps ? row - layout.offsets[low] : 0;
  }

  ALWAYS_INLINE auto next() {
    if (taken_ == rows_.count) find_more();
    return rows_.first + taken_++ * rows_.distance;
  }
  ALWAYS_INLINE auto operator()(int64_t) { return next(); }

  /// The next rows, at most so many, as far as they are evenly spaced.
  auto take(int64_t most) {
    if (taken_ == rows_.count) find_more();
    auto taken = rows_;
    taken.first += taken_ * rows_.distance;
    taken.count = smaller(rows_.count - taken_, most);
    taken_ += taken.count;
    return taken;
  }

  /// The j of the row that was next, where find() finds one at a time.
  int64_t j() const { return j_; }

 private:
  NO_INLINE void find_more() {
    j_ += rows_.count;
    for (; t_ < layout_.steps && j_ >= layout_.batch_sizes[t_]; ++t_) j_ -= layout_.batch_sizes[t_];
    rows_ = find_(t_, j_);
    taken_ = 0;
  }

  const Layout& layout_;
  const Find& find_;
  int64_t t_, j_, taken_ = 0;
  decltype(std::declval<Find>()(0, 0)) rows_ = {nullptr, 0, 0};
};

/// The output before a sequence's first step, where args.h_0 is given.
template <class S>
const S* initial_output(const BackwardArgs<S>& args, int direction, int64_t j) {
  return args.h_0 + (direction * args.layout.batch + args.layout.entry(j)) * args.sizes.output();
}

/// The outputs before a row's step: those of the step before; before a sequence's first step, its initial state.
template <class S>
EvenRows<const S> previous_outputs(const BackwardArgs<S>& args, int direction, int64_t t, int64_t j) {
  const Layout& layout = args.layout;
  const bool reverse = direction == 1;
  const int64_t before = step_after(layout, !reverse, t, 1), out = args.sizes.output();
  const bool all = layout.has_all_rows();
  const int64_t rows = (all ? layout.rows - layout.offsets[t] : layout.batch_sizes[t]) - j;  // that there are
  EvenRows<const S> found = {nullptr, 0, 1};
  if (args.resets.data && begins(args.resets, layout, reverse, t, j)) return found;
  if (before >= 0 && j < layout.batch_sizes[before]) {
    found = rows_from(args.output, layout, before, j);
    found.first += direction * out;
    // Packed, those of another step would follow: not the ones before this step's other rows.
    if (!all) found.count = smaller(found.count, layout.batch_sizes[before] - j);
  } else if (args.h_0) {
    found = {initial_output(args, direction, j), out, layout.order ? 1 : layout.batch_sizes[t] - j, args.h_0};
  } else {
    found.count = layout.batch_sizes[t] - j;
  }
  found.count = args.resets.data ? 1 : smaller(found.count, rows);
  return found;
}

/// out = a * b, elementwise; out is padded to whole vectors.
template <class T>
void multiply_rows(T* out, const T* a, const T* b, int64_t columns) {
  for (int64_t i = 0; i < columns; i += kLanes<T>)
    store(out + i, load_part(a + i, columns - i) * load_part(b + i, columns - i));
}

/// Consecutive steps [first, last) whose rows are handled together, where those rows begin, and whether no chunk was
/// before it and none with rows is to come.
struct Chunk {
  int64_t first = 0, last = 0;
  int64_t row = 0, rows = 0;
  bool begins = true, ends = true;

  bool has(int64_t t) const { return t >= first && t < last; }
};

/// The chunks of one direction, in the order backward walks them; one chunk where `whole`. They do not depend on the
/// number of threads.
class Chunks {
 public:
  static constexpr int64_t kRows = 384;  // at least: their gate gradients should stay in the cache, but amortise passes

  Chunks(const Layout& layout, bool reverse, bool whole)
      : layout_(layout), reverse_(reverse), rows_(whole ? INT64_MAX : kRows), next_(reverse ? 0 : layout.steps) {}

  /// The most rows a chunk can have.
  static int64_t capacity(const Layout& layout, bool whole) {
    return whole ? layout.rows : smaller(layout.rows, kRows + layout.batch);
  }

  bool next(Chunk* chunk) {
    if (is_over()) return false;
    *chunk = Chunk{next_, next_, 0, 0, next_ == (reverse_ ? 0 : layout_.steps)};
    while (chunk->rows < rows_ && (reverse_ ? chunk->last < layout_.steps : chunk->first > 0)) {
      const int64_t t = reverse_ ? chunk->last++ : --chunk->first;
      chunk->rows += layout_.batch_sizes[t];
    }
    chunk->row = layout_.offsets[chunk->first];
    next_ = reverse_ ? chunk->last : chunk->first;
    // (All sequences may be shorter than the steps.)
    chunk->ends = is_over() || (reverse_ && layout_.batch_sizes[next_] == 0);
    return true;
  }

 private:
  bool is_over() const { return reverse_ ? next_ >= layout_.steps : next_ <= 0; }

  const Layout& layout_;
  bool reverse_;
  int64_t rows_, next_;
};

/// A distance between rows, of at least `width` numbers, at which a column of elements lies in every set of a cache: an
/// odd number of lines. Powers of two share a few sets, and the products that walk columns would miss at every row.
template <class S>
int64_t spread(int64_t width) {
  constexpr int64_t kLine = 64 / int64_t(sizeof(Element<S>));
  return width / kLine % 2 == 0 ? width + kLine : width;
}

/// The gradients a chunk's scan leaves for the products after it. The next chunk's take their place in the cache, but
/// for those of the last step, which its first step reads.
template <class Cell, class S>
struct ChunkGrads {
  /// Of so many rows at most; `pairs`: see pair().
  ChunkGrads(const Sizes& s, int64_t batch, int64_t capacity, bool pairs)
      : stride(spread<S>(Cell::kGradGates * s.padded())),
        proj_stride(s.proj ? spread<S>(Sizes::padded(s.proj)) : 0),
        gates(capacity * stride),
        last_step(batch * stride),
        proj(capacity * proj_stride),
        paired_gates(pairs && kPack<S> > 1 ? elements<S>(capacity) * stride : 0),
        paired_proj(pairs && kPack<S> > 1 ? elements<S>(capacity) * proj_stride : 0) {}
  int64_t stride, proj_stride;
  Buffer<S> gates;      // [chunk rows, gate gradients, padded H]
  Buffer<S> last_step;  // [batch, gate gradients, padded H], of the chunk before
  Buffer<S> proj;       // [chunk rows, padded P]: gradient of the projected output
  // The same as elements along the rows, where these are not the numbers themselves.
  Buffer<Element<S>> paired_gates, paired_proj;
  Chunk chunk;

  /// Keeps rows of step t, the last one of the chunk, for the first of the next. Those who have scanned it keep all of
  /// them together, each what is in its own cache.
  void keep(const Layout& layout, int64_t t, int64_t j, int64_t rows) const {
    if (chunk.ends) return;
    std::memcpy(static_cast<void*>(last_step.get() + j * stride), gates_at(layout, t, j),
                size_t(rows * stride) * sizeof(S));
  }

  /// Step t is one of the chunk, or the last of the chunk before.
  S* gates_at(const Layout& layout, int64_t t, int64_t j) const {
    return chunk.has(t) ? gates.get() + (layout.offsets[t] + j - chunk.row) * stride : last_step.get() + j * stride;
  }
  S* proj_at(const Layout& layout, int64_t t, int64_t j) const {
    return proj.get() + (layout.offsets[t] + j - chunk.row) * proj_stride;
  }

  const Element<S>* gate_columns() const { return columns(gates, paired_gates); }
  const Element<S>* proj_columns() const { return columns(proj, paired_proj); }

  /// Pair the rows up.
  void pair() {
    if constexpr (kPack<S> > 1) {
      pair(gates.get(), stride, paired_gates.get());
      pair(proj.get(), proj_stride, paired_proj.get());
    }
  }

 private:
  static const Element<S>* columns(const Buffer<S>& plain, const Buffer<Element<S>>& paired) {
    if constexpr (kPack<S> > 1) {
      return paired.get();
    } else {
      return plain.get();
    }
  }
  void pair(const S* from, int64_t width, Element<S>* to) const {
    for (int64_t r = 0; r < chunk.rows; r += 2, from += 2 * width, to += width) {
      store_paired_rows(from, r + 1 < chunk.rows ? from + width : nullptr, width,
                        [&](int64_t i) { return to + i * kLanes<Element<S>>; });
    }
  }
};
