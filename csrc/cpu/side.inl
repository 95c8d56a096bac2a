// A product that is computed tile by tile beside another one, which would wait for memory meanwhile; see row.inl.

/// C = A B + bias, with the sums of the PlainProduct that it stands for. C has room for whole vectors.
template <class S>
struct SideProduct {
  int64_t rows = 0;  // a multiple of those of a tile
  int64_t depth = 0;
  const Element<S>* a = nullptr;
  int64_t a_stride = 0;  // between rows
  Compute<S>* c = nullptr;
  int64_t c_stride = 0;
  const Element<S>* b = nullptr;     // packed, [block][k][lanes]
  const Compute<S>* bias = nullptr;  // [columns] or null
  UnitBlocks blocks = {0, 0};        // of columns
};

/// The tiles, of R rows by one vector, of some side products.
template <class S, int R>
class SideTiles {
 public:
  static constexpr int kRows = R;

  void add(const SideProduct<S>& product) {
    if (product.blocks.first >= product.blocks.last) return;
    products_[count_++] = product;
    if (count_ == 1) block_ = product.blocks.first;
  }

  bool more() const { return at_ < count_; }

  const SideProduct<S>& product() const { return products_[at_]; }
  int64_t block() const { return block_; }
  int64_t row() const { return row_; }

  void next() {
    row_ += R;
    if (row_ < product().rows) return;
    row_ = 0;
    if (++block_ < product().blocks.last) return;
    if (++at_ < count_) block_ = product().blocks.first;
  }

  /// Computes those that no other product has taken along.
  NO_INLINE void finish();

 private:
  SideProduct<S> products_[4];
  int count_ = 0, at_ = 0;
  int64_t row_ = 0, block_ = 0;
};

/// The tile at hand, and after it the next.
template <class S, int R>
class SideTile {
  using T = Compute<S>;
  using Op = Operand<S>;

 public:
  explicit SideTile(SideTiles<S, R>& tiles) : tiles_(tiles) {}

  /// The k that can be multiplied before pass(): 0 if there is no tile left.
  ALWAYS_INLINE int64_t left() {
    if (left_ == 0 && tiles_.more()) begin();
    return left_;
  }

  ALWAYS_INLINE void multiply_add() {
    const auto w = Op::load(b_);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums_[r] = Op::multiply_add(Op::broadcast(a_[r / 4][r % 4 * stride_]), w, sums_[r]);
#pragma GCC unroll 2
    for (int i = 0; i < kPointers; ++i) ++a_[i];
    b_ += kLanes<Element<S>>;
  }

  /// `count` k have been multiplied.
  ALWAYS_INLINE void pass(int64_t count) {
    left_ -= count;
    if (left_ == 0) end();
  }

  /// The rest of a tile that has been begun.
  ALWAYS_INLINE void finish() {
    if (left_ == 0) return;
    for (int64_t k = 0; k < left_; ++k) multiply_add();
    pass(left_);
  }

 private:
  ALWAYS_INLINE void begin() {
    const SideProduct<S>& p = tiles_.product();
    stride_ = p.a_stride;
    for (int i = 0; i < kPointers; ++i) a_[i] = p.a + (tiles_.row() + 4 * i) * stride_;
    b_ = p.b + tiles_.block() * p.depth * kLanes<Element<S>>;
    const Vec<T> init = p.bias ? load(p.bias + tiles_.block() * kLanes<T>) : Vec<T>{};
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums_[r] = init;
    left_ = p.depth;
  }

  ALWAYS_INLINE void end() {
    const SideProduct<S>& p = tiles_.product();
    T* c = p.c + tiles_.row() * p.c_stride + tiles_.block() * kLanes<T>;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r, c += p.c_stride) store(c, sums_[r]);
    tiles_.next();
  }

  static constexpr int kPointers = (R + 3) / 4;  // to rows 0, 4, ..: each reaches three more by its distance

  SideTiles<S, R>& tiles_;
  const Element<S>*a_[kPointers], *b_;
  int64_t stride_;
  Vec<T> sums_[R];
  int64_t left_ = 0;
};

template <class S, int R>
void SideTiles<S, R>::finish() {
  while (more()) {
    SideTile<S, R> tile(*this);
    tile.left();
    tile.finish();
  }
  count_ = at_ = 0;
}

/// No tiles beside another product's.
struct NoSideTiles {};
struct NoSideTile {};
