// The gradient of a weight: A^T B over the rows of chunk after chunk, A being the gradients of what came out of its
// product and B what went in.

/// grad [parts * height, width], in 16 bits of few rows only.
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
        rest_(grad && !few_ ? rest_of(width, height) : 0),
        padded_(Sizes::padded(height)),
        packed_(few_ ? elements<S>(rows) * blocks_of<T>(width) * kLanes<T> : 0),
        transposed_(rest_ * parts * padded_) {}

  /// Of few rows, which are the only chunk: takes B, for all tasks, before their add(). b_row(row) is asked for in
  /// order, null is zeros.
  template <class Row>
  void take(int64_t rows, const Row& b_row) {
    if (few_) pack_rows<S>(packed_.get(), b_row, rows, 0, width_);
  }

  int64_t tasks() const {
    if (!grad_) return 0;
    return few_ ? parts_ * tasks_of_part() : (width_ + kColumns - 1) / kColumns;
  }

  /// Adds the rows of a chunk, or begins with them, to one task's share of the gradient. A's part p is the `height`
  /// columns from a + offset[p], whose rows are elements, `stride` of them apart; b_row as of take().
  template <class Row>
  void add(int64_t task, const Element<S>* a, int64_t stride, const int64_t* offset, int64_t rows, bool begin,
           const Row& b_row) {
    if (rows == 0) return;
    if (few_) return write(task, a, stride, offset, rows);
    const int64_t first = task * kColumns, columns = smaller(kColumns, width_ - first);
    const int64_t whole = first + columns == width_ ? columns - rest_ : columns;
    constexpr int64_t kMost = 512;  // rows whose B stays in the second-level cache
    const int64_t pieces = (rows + kMost - 1) / kMost, piece = elements<S>((rows + pieces - 1) / pieces) * kPack<S>;
    Buffer<Element<S>> packed(elements<S>(piece) * blocks_of<T>(columns) * kLanes<T>);
    Buffer<const S*> from(larger(height_, rest_));
    Buffer<T*> to(larger(height_, rest_));
    for (int64_t done = 0; done < rows; done += piece) {
      const int64_t count = smaller(piece, rows - done), depth = elements<S>(count);
      pack_rows<S>(packed.get(), b_row, count, first, columns);
      PlainProduct<S> p;
      p.segments.length = depth;
      p.accumulate = !begin || done > 0;
      for (int part = 0; part < parts_; ++part) {
        const Element<S>* a_part = a + elements<S>(done) * stride + offset[part];
        if (whole > 0) {
          p.columns = whole;
          p.b = packed.get();
          p.b_stride = 0;
          p.segments.stride = stride;
          space_rows(to.get(), static_cast<T*>(grad_) + part * height_ * width_ + first, width_, height_);
          multiply_rows_of(0, height_, a_part, from.get(), to.get(), p);
        }
        if (whole < columns) {
          for (int64_t i = 0; i < rest_; ++i) {
            const int64_t block = (whole + i) / kLanes<T>, lane = (whole + i) % kLanes<T>;
            from.get()[i] = reinterpret_cast<const S*>(packed.get() + block * depth * kLanes<T> + lane);
            to.get()[i] = transposed_.get() + (i * parts_ + part) * padded_;
          }
          p.rows = rest_;
          p.a = from.get();
          p.c = to.get();
          p.columns = height_;
          p.b = a_part;
          p.b_stride = stride;
          p.segments.stride = kLanes<T>;
          plain_product<S, true>(p);
        }
      }
    }
  }

  /// After the last chunk; `any`: there was one.
  void finish(bool any) {
    if (!grad_) return;
    if (!any) {
      with_storage<T>(storage_,
                      [&]<class To>() { std::memset(grad_, 0, size_t(parts_ * height_ * width_) * sizeof(To)); });
      return;
    }
    constexpr int n = kLanes<T>;
    for (int64_t i = 0; i < rest_; i += n) {
      T* to = static_cast<T*>(grad_) + width_ - rest_ + i;
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

 private:
  static constexpr int64_t kAtOnce = 24;  // rows of the gradient that are written together, where there are few of A

  /// A task's share of the gradient, of few rows.
  void write(int64_t task, const Element<S>* a, int64_t stride, const int64_t* offset, int64_t rows) {
    // So little to compute that stores would wait for their lines (Xeon, one row of 512 units: a fifth off; from 8 rows
    // on nothing).
    constexpr int64_t kWaiting = 8;
    const int64_t pieces = tasks_of_part(), part = task / pieces, piece = task % pieces;
    const int64_t first = height_ * piece / pieces, last = height_ * (piece + 1) / pieces;
    with_storage<T>(storage_, [&]<class To>() {
      To* const grad = static_cast<To*>(grad_) + part * height_ * width_;
      if (elements<S>(rows) <= kShallow)
        return write_rows<kShallow>(elements<S>(rows), grad, first, last, a + offset[part], stride);
      const S* from[kAtOnce];
      T* to[kAtOnce];
      PlainProduct<S> p;
      p.columns = width_;
      p.b = packed_.get();
      p.storage = storage_;
      p.segments.length = elements<S>(rows);
      p.segments.stride = stride;
      p.fetch_c = rows < kWaiting;
      for (int64_t m = first; m < last; m += kAtOnce) {
        const int64_t count = smaller(kAtOnce, last - m);
        for (int64_t i = 0; i < count; ++i) to[i] = reinterpret_cast<T*>(grad + (m + i) * width_);
        multiply_rows_of(m, count, a + offset[part], from, to, p);
      }
    });
  }

  /// Sums of so few products that a tile would take longer to begin and to end than to multiply.
  static constexpr int kShallow = 4;

  /// The rows [first, last) of a part of the gradient, which is at `to`, each from its first to its last column: sums
  /// of `depth` products.
  template <int Depth, class To>
  void write_rows(int64_t depth, To* to, int64_t first, int64_t last, const Element<S>* a, int64_t stride) const {
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

  static constexpr int64_t kColumns = 4 * kLanes<T>;  // of one task: the width of a register tile

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
  const bool few_;
  const int64_t rest_, padded_;
  Buffer<Element<S>> packed_;  // [blocks][rows][lanes], of few rows: B
  Buffer<T> transposed_;       // [rest, parts, padded height]
};
