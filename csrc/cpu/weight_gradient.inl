// The gradient of a weight: A^T B over the rows of chunk after chunk, A being the gradients of what came out of its
// product and B what went in.

/// Where the sums over the rows of a chunk are cut. The layout says so, not where the rows lie: whether they are
/// multiplied there or packed must make no difference.
struct Cuts {
  int64_t apart = 0;  // so many of the first rows come from another array than those after them
  int64_t step = 0;   // rows of each step; 0: some have fewer
};

/// grad [parts * height, width]. What is large of it is compiled once for all cells, out of line.
template <class S>
class WeightGradient {
  using T = Compute<S>;

 public:
  /// `grad` null: it is not wanted. `rows`: of A and B, in all.
  WeightGradient(void* grad, Storage storage, int parts, int64_t height, int64_t width, int64_t rows)
      : grad_(grad),
        storage_(storage),
        parts_(parts),
        height_(height),
        width_(width),
        few_(grad && has_few_rows(rows)),
        rounds_(grad && !few_ && storage != Storage::kComputed),
        rest_(grad && !few_ ? rest_of(width, height) : 0),
        padded_(Sizes::padded(height)),
        packed_(few_ ? elements<S>(rows) * blocks_of<T>(width) * kLanes<T> : 0),
        unrounded_(rounds_ ? parts * height * width : 0),
        transposed_(rest_ * parts * padded_) {}

  /// Of few rows, which are the only chunk: takes B, for all tasks, before their add(). b_row(row) is asked for in
  /// order, null is zeros.
  template <class Row>
  NO_INLINE void take(int64_t rows, Row& b_row, const Cuts& cuts = {}) {
    if (!few_) return;
    is_zero_ = rows > 0 && is_zero(b_row, rows);
    // (What is rounded in the tiles, see PlainProduct, is packed: by way of memory of their own it takes up to a third
    // longer.)
    const bool rounds = storage_ != Storage::kComputed;
    const bool may = !rounds && may_lie(width_) && rows > kShallow;
    const int64_t apart = may ? cuts.apart : 0;
    runs_[0].count = apart;
    runs_[1].count = rows - apart;
    Element<S>* packed = packed_.get();
    for (Run& run : runs_) {
      const int64_t count = run.count;
      run.lies = count > 0 && may && find_run(b_row, count, &run);
      if (!run.lies) {
        pack_rows<S>(packed, b_row, count, 0, width_);
      } else if (!run.first) {
        pack_rows<S>(packed, no_row, count, 0, width_);
      }
      packed += elements<S>(count) * blocks_of<T>(width_) * kLanes<T>;
    }
  }

  int64_t tasks() const {
    if (!grad_) return 0;
    return few_ ? parts_ * tasks_of_part() : (width_ + kColumns - 1) / kColumns;
  }

  /// Adds the rows of a chunk, or begins with them, to one task's share of the gradient. A's part p is the `height`
  /// columns from a + offset[p], whose rows are elements, `stride` of them apart; b_row as of take().
  template <class Row>
  NO_INLINE void add(int64_t task, const Element<S>* a, int64_t stride, const int64_t* offset, const Chunk& chunk,
                     Row& b_row, const Cuts& given = {}) {
    const int64_t rows = chunk.rows;
    if (rows == 0) return;
    if (few_) return write(task, a, stride, offset, rows);
    const int64_t first = task * kColumns, columns = smaller(kColumns, width_ - first);
    const int64_t whole = first + columns == width_ ? columns - rest_ : columns;
    const bool may = may_lie(whole);
    const Cuts cuts = may ? given : Cuts{};
    const int64_t lengths[2] = {cuts.apart, rows - cuts.apart};
    const int64_t room = larger(piece_of(lengths[0], cuts.step), piece_of(lengths[1], cuts.step));
    Buffer<Element<S>> packed(elements<S>(room) * blocks_of<T>(columns) * kLanes<T>);
    Buffer<const S*> from(larger(height_, rest_));
    Buffer<T*> to(larger(height_, rest_));
    bool accumulate = !chunk.begins;
    // `rows_of_b`: B, and how many rows.
    const auto add_piece = [&](int64_t done, PlainProduct<S> rows_of_b) {
      rows_of_b.accumulate = std::exchange(accumulate, true);
      for (int part = 0; part < parts_; ++part) {
        const Element<S>* a_part = a + elements<S>(done) * stride + offset[part];
        if (whole > 0) {
          PlainProduct<S> p = rows_of_b;
          p.columns = whole;
          p.segments.stride = stride;
          space_rows(to.get(), sums() + part * height_ * width_ + first, width_, height_);
          multiply_rows_of(0, height_, a_part, from.get(), to.get(), p);
        }
        if (whole < columns) {
          PlainProduct<S> p = rows_of_b;
          const bool as_it_lies = p.b_stride > 0;
          for (int64_t i = 0; i < rest_; ++i) {
            const int64_t block = (whole + i) / kLanes<T>, lane = (whole + i) % kLanes<T>;
            const Element<S>* column = p.b + (as_it_lies ? whole + i : block * p.segments.length * kLanes<T> + lane);
            from.get()[i] = reinterpret_cast<const S*>(column);
            to.get()[i] = transposed_.get() + (i * parts_ + part) * padded_;
          }
          p.rows = rest_;
          p.a = from.get();
          p.c = to.get();
          p.columns = height_;
          p.b = a_part;
          p.segments.stride = as_it_lies ? p.b_stride : kLanes<T>;
          p.b_stride = stride;
          plain_product<S, true>(p);
        }
      }
    };
    const auto add_packed = [&](int64_t done, int64_t count, auto&& row) {
      pack_rows<S>(packed.get(), row, count, first, columns);
      PlainProduct<S> p;
      p.b = packed.get();
      p.segments.length = elements<S>(count);
      add_piece(done, p);
    };
    const auto are_all_numbers = [&](int64_t done, int64_t count) {
      for (int part = 0; part < parts_; ++part)
        if (!are_numbers(a + elements<S>(done) * stride + offset[part], stride, height_, count)) return false;
      return true;
    };
    int64_t done = 0;
    for (const int64_t length : lengths) {
      const int64_t piece = piece_of(length, cuts.step);
      Run run = {};
      // (What is computed transposed takes no groups.)
      run.lies = length > 0 && may && find_run(b_row, length, &run, true, whole == columns ? cuts.step : 0);
      for (int64_t k = 0, count; k < length; k += count, done += count) {
        count = smaller(piece, length - k);
        if (piece < cuts.step) count = smaller(count, cuts.step - k % cuts.step);
        if (!run.lies) {
          add_packed(done, count, b_row);
        } else if (run.first) {
          PlainProduct<S> p;
          p.b = lying(run.at(k) + first);
          p.b_stride = run.distance;
          if (run.group > 0 && run.group < count) {
            p.b_group = run.group;
            p.b_gap = run.gap();
          }
          p.segments.length = count;
          add_piece(done, p);
        } else if (!(accumulate || done + count < rows) || !are_all_numbers(done, count)) {
          add_packed(done, count, no_row);
        }
      }
    }
    if (chunk.ends && rounds_) {
      with_storage<T>(storage_, [&]<class To>() {
        for (int64_t i = first; i < parts_ * height_ * width_; i += width_)
          copy_row(static_cast<To*>(grad_) + i, unrounded_.get() + i, whole);
      });
    }
  }

  /// After the last chunk; `any`: there was one.
  NO_INLINE void finish(bool any) {
    if (!grad_) return;
    with_storage<T>(storage_, [&]<class To>() {
      if (!any) {
        std::memset(grad_, 0, size_t(parts_ * height_ * width_) * sizeof(To));
      } else {
        write_rest(static_cast<To*>(grad_));
      }
    });
  }

 private:
  /// How many of so many rows of B are multiplied at a time: whole steps, or about equal parts of one.
  static int64_t piece_of(int64_t rows, int64_t step) {
    constexpr int64_t kMost = 512;  // whose B stays in the second-level cache
    const auto share = [](int64_t count, int64_t most) {
      const int64_t pieces = larger(1, (count + most - 1) / most);
      return (count + pieces - 1) / pieces;
    };
    if (step > kMost) return share(step, kMost);
    return step > 0 ? share(rows / step, kMost / step) * step : elements<S>(share(rows, kMost)) * kPack<S>;
  }

  static constexpr int64_t kAtOnce = 24;  // rows of the gradient that are written together, where there are few of A

  /// Where its sums are.
  T* sums() const { return rounds_ ? unrounded_.get() : static_cast<T*>(grad_); }

  /// What is computed transposed.
  template <class To>
  void write_rest(To* grad) const {
    constexpr int n = kLanes<T>;
    for (int64_t i = 0; i < rest_; i += n) {
      To* to = grad + width_ - rest_ + i;
      for (int part = 0; part < parts_; ++part) {
        for (int64_t m = 0; m < height_; m += n) {
          Vec<T> square[n];
#pragma GCC unroll 16
          for (int k = 0; k < n; ++k)
            square[k] = load(transposed_.get() + (smaller(i + k, rest_ - 1) * parts_ + part) * padded_ + m);
          transpose<T>(square);
#pragma GCC unroll 16
          for (int k = 0; k < n; ++k)
            if (m + k < height_) store_part(to + (part * height_ + m + k) * width_, square[k], rest_ - i);
        }
      }
    }
  }

  /// Whether so many columns of B, if find_runs(), are multiplied as they lie: whole vectors.
  static bool may_lie(int64_t columns) { return kMayLie<S> && columns % kLanes<T> == 0; }

  /// Rows of B, evenly spaced or in groups that are; zeros where `first` is null.
  struct Run : EvenRows<const S> {
    int64_t group = 0;           // so many; 0: one group
    int64_t group_distance = 0;  // from one to the next
    bool lies = false;           // is multiplied as it lies; else packed, and only `count` is of use

    const S* at(int64_t row) const {
      return group ? this->first + row / group * group_distance + row % group * this->distance
                   : this->first + row * this->distance;
    }
    int64_t gap() const { return group ? group_distance - group * this->distance : 0; }
    bool is_zero() const { return lies && !this->first; }
  };
  /// What may lie has elements that are numbers.
  static const Element<S>* lying(const S* row) {
    if constexpr (kPack<S> == 1) {
      return row;
    } else {
      return nullptr;
    }
  }
  static const S* no_row(int64_t) { return nullptr; }

  /// Whether so many rows of B are all zeros, as initial states that were not given.
  template <class Row>
  static bool is_zero(const Row& b_row, int64_t rows) {
    if constexpr (requires(Row& row) { row.take(rows); }) {
      Row ahead = b_row;
      const EvenRows<const S> all = ahead.take(rows);
      return !all.first && all.count == rows;
    }
    return false;
  }

  /// Rows that are so far apart are on pages of their own and, of 1,024 floats for instance, share a few sets of a
  /// cache.
  static constexpr int64_t kPage = 4096 / int64_t(sizeof(S));

  /// Whether the next so many rows of B are a run, which are taken then. `many`: only if their vectors are aligned and
  /// less than a page apart, and also groups of so many rows. (Many rows are read more slowly than packed ones if they
  /// are not aligned, on Zen 5 by 3 to 10 %; few are not. Pages apart, 256 of 1,024 inputs and units, on Ice Lake: all
  /// of training takes 1.17 to 1.26 times as long.)
  template <class Row>
  static bool find_run(Row& b_row, int64_t rows, Run* run, bool many = false, int64_t group = 0) {
    if constexpr (requires(Row& row) { row.take(rows); }) {
      Row ahead = b_row;
      Run found = {ahead.take(rows)};
      for (int64_t left = rows - found.count; left > 0;) {
        const EvenRows<const S> next = ahead.take(left);
        left -= next.count;
        if (!many || !joins(found, next)) return false;
      }
      if (found.first) {
        const bool is_aligned =
            found.distance % kLanes<T> == 0 && reinterpret_cast<uintptr_t>(found.first) % RNN_EXT_VECTOR_BYTES == 0;
        if (found.distance <= 0 || (found.group && found.group != group)) return false;
        if (many && (!is_aligned || found.distance >= kPage)) return false;
      }
      for (int64_t left = rows; left > 0;) left -= b_row.take(left).count;
      *run = found;
      return true;
    }
    return false;
  }

  /// Whether `next` is another group of the run's, which it is added to then: a part's rows of the next step.
  static bool joins(Run& run, const EvenRows<const S>& next) {
    if (!run.first || next.array != run.array) return false;
    if (next.count == 1 && run.group == 0) {  // no group: of each the product begins anew, which takes longer than it
      const int64_t distance = next.first - run.at(run.count - 1);
      const bool fits = distance > 0 && distance < kPage && distance % kLanes<T> == 0;
      if (run.count == 1 ? !fits : distance != run.distance) return false;
      run.distance = distance;
      ++run.count;
      return true;
    }
    const int64_t group = run.group ? run.group : run.count;
    if (next.distance != run.distance || next.count != group) return false;
    const int64_t distance = next.first - run.at(run.count - group);
    if (run.distance >= kPage || distance % kLanes<T> != 0) return false;
    if (run.group && distance != run.group_distance) return false;
    run.group = group;
    run.group_distance = distance;
    run.count += group;
    return true;
  }

  /// Whether so many rows of some columns of A are numbers, neither infinite nor NaN: their product with zeros is
  /// zeros.
  static bool are_numbers(const Element<S>* a, int64_t stride, int64_t columns, int64_t rows) {
    if constexpr (kPack<S> > 1) return false;  // nor does any B lie
    Vec<T> zeros = {};
    for (int64_t r = 0; r < rows; ++r, a += stride)
      for (int64_t i = 0; i < columns; i += kLanes<T>)
        zeros += load_part(reinterpret_cast<const T*>(a + i), columns - i) * Vec<T>{};
    for (int i = 0; i < kLanes<T>; ++i)
      if (zeros[i] != 0) return false;
    return true;
  }

  /// A task's share of the gradient, of few rows.
  void write(int64_t task, const Element<S>* a, int64_t stride, const int64_t* offset, int64_t rows) {
    // So little to compute that stores would wait for their lines (Xeon, one row of 512 units: a fifth off; from 8 rows
    // on nothing).
    constexpr int64_t kWaiting = 8;
    const int64_t pieces = tasks_of_part(), part = task / pieces, piece = task % pieces;
    const int64_t first = height_ * piece / pieces, last = height_ * (piece + 1) / pieces;
    bool adds[2] = {true, true};  // each of the runs something
    if constexpr (kPack<S> == 1) {
      if (is_zero_ && are_numbers(a + offset[part] + first, stride, last - first, rows)) {
        return with_storage<T>(storage_, [&]<class To>() {
          To* const grad = static_cast<To*>(grad_) + (part * height_ + first) * width_;
          std::memset(static_cast<void*>(grad), 0, size_t((last - first) * width_) * sizeof(To));
        });
      }
      const S* a_run = a + offset[part] + first;
      for (int i = 0; i < 2; a_run += runs_[i++].count * stride) {
        const Run& other = runs_[1 - i];
        if (runs_[i].is_zero() && other.count > 0 && !other.is_zero())
          adds[i] = !are_numbers(a_run, stride, last - first, runs_[i].count);
      }
    }
    with_storage<T>(storage_, [&]<class To>() {
      To* const grad = static_cast<To*>(grad_) + part * height_ * width_;
      if (elements<S>(rows) <= kShallow)
        return write_rows<kShallow>(elements<S>(rows), grad, first, last, a + offset[part], stride);
      const S* from[kAtOnce];
      T* to[kAtOnce];
      PlainProduct<S> p;
      p.columns = width_;
      p.storage = storage_;
      p.segments.stride = stride;
      p.fetch_c = rows < kWaiting;
      for (int64_t m = first; m < last; m += kAtOnce) {
        const int64_t count = smaller(kAtOnce, last - m);
        for (int64_t i = 0; i < count; ++i) to[i] = reinterpret_cast<T*>(grad + (m + i) * width_);
        const Element<S>*a_run = a + offset[part], *packed = packed_.get();
        p.accumulate = false;
        for (int i = 0; i < 2; ++i) {
          const Run& run = runs_[i];
          const int64_t length = elements<S>(run.count);
          if (length > 0 && adds[i]) {
            const bool lies = run.lies && run.first;
            p.b = lies ? lying(run.first) : packed;
            p.b_stride = lies ? run.distance : 0;
            p.segments.length = length;
            multiply_rows_of(m, count, a_run, from, to, p);
            p.accumulate = true;
          }
          a_run += length * stride;
          packed += length * blocks_of<T>(width_) * kLanes<T>;
        }
      }
    });
  }

  /// Sums of so few products that a tile would take longer to begin and to end than to multiply.
  static constexpr int kShallow = 4;

  /// The rows [first, last) of a part of the gradient, which is at `to`, each from its first to its last column: sums
  /// of `depth` products.
  template <int Depth, class To>
  NO_INLINE void write_rows(int64_t depth, To* to, int64_t first, int64_t last, const Element<S>* a,
                            int64_t stride) const {
    if constexpr (Depth > 1) {
      if (depth < Depth) return write_rows<Depth - 1>(depth, to, first, last, a, stride);
    }
    using Op = Operand<S>;
    constexpr int64_t kFetched = 1024;  // bytes ahead
    constexpr int n = kLanes<T>;
    to += first * width_;
    for (int64_t m = first; m < last; ++m, to += width_) {
      typename Op::Lanes x[Depth];
#pragma GCC unroll 4
      for (int k = 0; k < Depth; ++k) x[k] = Op::broadcast(reinterpret_cast<const Factor<S>&>(a[k * stride + m]));
      const Element<S>* b = packed_.get();
      for (int64_t column = 0; column < width_; column += n, b += Depth * n) {
        Vec<T> sum = {};
#pragma GCC unroll 4
        for (int k = 0; k < Depth; ++k) sum = Op::multiply_add(x[k], Op::load(b + k * n), sum);
        __builtin_prefetch(reinterpret_cast<const char*>(to + column) + kFetched, 1);
        store_part(to + column, sum, width_ - column);
      }
    }
  }

  /// Of about equal heights.
  int64_t tasks_of_part() const { return (height_ + 4 * kAtOnce - 1) / (4 * kAtOnce); }

  /// The product `p` for so many rows of a part of the gradient, from its row `first` on, which go `to` places. `a`:
  /// the columns of A for the part; `from`: room for so many.
  void multiply_rows_of(int64_t first, int64_t count, const Element<S>* a, const S** from, T** to,
                        PlainProduct<S>& p) const {
    for (int64_t i = 0; i < count; ++i) from[i] = reinterpret_cast<const S*>(a + first + i);
    p.rows = count;
    p.a = from;
    p.c = to;
    plain_product<S, true>(p);
  }

  // Of one task: the width of a register tile or, where A is copied for each task, of four.
  static constexpr int64_t kColumns = (kHasAmx ? 16 : 4) * kLanes<T>;

  /// How many of the last columns, past whole pairs of blocks, are computed transposed, the height along the vectors:
  /// where that is less than they would be. One block alone costs as much as two (measured), a third beside two does
  /// not.
  static int64_t rest_of(int64_t width, int64_t height) {
    const int64_t rest = width % (2 * kLanes<T>);
    const bool third = rest <= kLanes<T> && width % kColumns > rest;
    return rest * blocks_of<T>(height) < (third ? 1 : 2) * height ? rest : 0;
  }

  void* const grad_;
  const Storage storage_;
  const int parts_;
  const int64_t height_, width_;
  const bool few_, rounds_;
  const int64_t rest_, padded_;
  Buffer<Element<S>> packed_;  // [blocks][rows][lanes], of few rows: B
  bool is_zero_ = false;       // of few rows: B is
  Run runs_[2] = {};           // of few rows: B's
  Buffer<T> unrounded_;        // [parts * height, width], where it rounds_
  Buffer<T> transposed_;       // [rest, parts, padded height]
};
