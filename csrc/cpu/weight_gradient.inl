// The gradient of a weight: A^T B over the rows of chunk after chunk, A being gradients of gates and B what the weight
// was multiplied with.

/// grad [parts * height, width].
template <class S>
class WeightGradient {
  using T = Compute<S>;

 public:
  /// `grad` null: it is not wanted.
  WeightGradient(T* grad, int parts, int64_t height, int64_t width)
      : grad_(grad),
        parts_(parts),
        height_(height),
        width_(width),
        rest_(grad ? rest_of(width, height) : 0),
        padded_(Sizes::padded(height)),
        transposed_(rest_ * parts * padded_) {}

  int64_t tasks() const { return grad_ ? (width_ + kColumns - 1) / kColumns : 0; }

  /// Adds the rows of a chunk, or begins with them, to the columns of one task. A's part p is the `height` columns from
  /// a + offset[p], whose rows are elements, `stride` of them apart; b_row(row) is asked for in order, null is zeros.
  template <class Row>
  void add(int64_t task, const Element<S>* a, int64_t stride, const int64_t* offset, int64_t rows, bool begin,
           const Row& b_row) {
    const int64_t first = task * kColumns, columns = smaller(kColumns, width_ - first);
    const int64_t whole = first + columns == width_ ? columns - rest_ : columns;
    // Rows whose B stays in the second-level cache.
    constexpr int64_t kMost = 512;
    const int64_t pieces = (rows + kMost - 1) / kMost;
    const int64_t piece = pieces > 0 ? elements<S>((rows + pieces - 1) / pieces) * kPack<S> : 0;
    Buffer<Element<S>> packed(elements<S>(piece) * blocks_of<T>(columns) * kLanes<Element<S>>);
    const int64_t lines = larger(height_, rest_);
    Buffer<const S*> a_columns(lines);
    Buffer<T*> to(lines);
    for (int64_t done = 0; done < rows; done += piece) {
      const int64_t count = smaller(piece, rows - done), depth = elements<S>(count);
      pack_rows<S>(packed.get(), b_row, count, first, columns);
      PlainProduct<S> p;
      p.a = a_columns.get();
      p.c = to.get();
      p.segments.length = depth;
      p.accumulate = !begin || done > 0;
      for (int part = 0; part < parts_; ++part) {
        const Element<S>* gates = a + elements<S>(done) * stride + offset[part];
        if (whole > 0) {
          for (int64_t m = 0; m < height_; ++m) {
            a_columns.get()[m] = reinterpret_cast<const S*>(gates + m);
            to.get()[m] = grad_ + (part * height_ + m) * width_ + first;
          }
          p.rows = height_;
          p.columns = whole;
          p.b = packed.get();
          p.segments.stride = stride;
          plain_product<S, true>(p);
        }
        if (whole < columns) {
          for (int64_t i = 0; i < rest_; ++i) {
            const int64_t block = (whole + i) / kLanes<T>, lane = (whole + i) % kLanes<T>;
            a_columns.get()[i] = reinterpret_cast<const S*>(packed.get() + block * depth * kLanes<T> + lane);
            to.get()[i] = transposed_.get() + (i * parts_ + part) * padded_;
          }
          p.rows = rest_;
          p.columns = height_;
          p.b = gates;
          p.segments.stride = kLanes<T>;
          product_of_rows(p, stride);
        }
      }
    }
  }

  /// After the last chunk; `any`: there was one.
  void finish(bool any) {
    if (!grad_) return;
    if (!any) std::memset(grad_, 0, size_t(parts_ * height_ * width_) * sizeof(T));
    constexpr int n = kLanes<T>;
    for (int64_t i = 0; any && i < rest_; i += n) {
      T* to = grad_ + width_ - rest_ + i;
      for (int part = 0; part < parts_; ++part) {
        for (int64_t m = 0; m < height_; m += n) {
          Vec<T> square[n];
#pragma GCC unroll 16
          for (int k = 0; k < n; ++k) {
            const T* from = transposed_.get() + (smaller(i + k, rest_ - 1) * parts_ + part) * padded_ + m;
            square[k] = load_part(from, height_ - m);
          }
          transpose<T>(square);
#pragma GCC unroll 16
          for (int k = 0; k < n; ++k)
            if (m + k < height_) store_part(to + (part * height_ + m + k) * width_, square[k], rest_ - i);
        }
      }
    }
  }

 private:
  static constexpr int64_t kColumns = 4 * kLanes<T>;  // of one task: the width of a register tile

  /// How many of the last columns are computed transposed, along the height: those that fill no two vectors, where
  /// that is less to compute.
  static int64_t rest_of(int64_t width, int64_t height) {
    constexpr int64_t kWhole = 2 * kLanes<T>;
    const int64_t rest = width % kWhole;
    return rest * blocks_of<T>(height) < 2 * height ? rest : 0;
  }

  T* const grad_;
  const int parts_;
  const int64_t height_, width_, rest_, padded_;
  Buffer<T> transposed_;  // [rest, parts, padded height]
};
