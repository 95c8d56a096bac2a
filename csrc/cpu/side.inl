// A product that is computed tile by tile beside another one, which would wait for memory meanwhile; see row.inl.

/// C = A B + bias, with the sums of the PlainProduct that it stands for. C has room for whole vectors.
template <class S>
struct SideProduct {
  int64_t rows = 0;  // a multiple of those of a tile
  int64_t depth = 0;
  const Factor<S>* a = nullptr;
  int64_t a_stride = 0;  // between rows
  Compute<S>* c = nullptr;
  int64_t c_stride = 0;
  const Element<S>* b = nullptr;     // packed, [block][k][lanes]
  const Compute<S>* bias = nullptr;  // [columns] or null
  UnitBlocks blocks = {0, 0};        // of columns
};

/// The tiles of some side products, of R rows by one vector or two.
template <class S, int R>
class SideTiles {
 public:
  static constexpr int kRows = R;
  /// A tile of two vectors needs fewer loads, one of a single vector fewer instructions (loads are part of its
  /// multiply-adds). Measured: two are 4 to 13 % faster on a Xeon and 2 to 8 % on Zen 5, which load two vectors a cycle
  /// and wait for the loads of both products, and 4 to 6 % slower on Zen 4, which multiplies one a cycle.
  static constexpr int kMostVectors = RNN_EXT_VECTOR_REGISTERS < 32 || kPack<S> > 1 ? 1 : 2;

  void add(const SideProduct<S>& product) {
    if (product.blocks.first >= product.blocks.last) return;
    products_[count_++] = product;
    if (count_ == 1) block_ = product.blocks.first;
  }

  bool more() const { return at_ < count_; }
  int vectors() const { return vectors_; }

  const SideProduct<S>& product() const { return products_[at_]; }
  int64_t block() const { return block_; }
  int64_t row() const { return row_; }

  void next() {
    row_ += R;
    if (row_ < product().rows) return;
    row_ = 0;
    block_ += vectors_;
    if (block_ < product().blocks.last) return;
    if (++at_ < count_) block_ = product().blocks.first;
  }

  /// Computes those that no other product has taken along.
  NO_INLINE void finish();

 private:
  SideProduct<S> products_[4];
  int count_ = 0, at_ = 0;
  int64_t row_ = 0, block_ = 0;
  const int vectors_ = tuning().vectors_a_cycle < kMostVectors ? tuning().vectors_a_cycle : kMostVectors;
};

/// The tile at hand, and after it the next: `Vectors` are those of the tiles.
template <class S, int R, int Vectors>
class SideTile {
  using T = Compute<S>;
  using Op = Operand<S>;

 public:
  static constexpr bool kLoadsAreShort = Vectors == 1;  // see kMostVectors

  explicit SideTile(SideTiles<S, R>& tiles) : tiles_(tiles) {}

  /// The k that can be multiplied before pass(): 0 if there is no tile left.
  ALWAYS_INLINE int64_t left() {
    if (left_ == 0 && tiles_.more()) begin();
    return left_;
  }

  ALWAYS_INLINE void multiply_add() {
    typename Op::Lanes w[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) w[v] = Op::load(b_[v]);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto x = Op::broadcast(a_[r / 4][r % 4 * stride_]);
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) sums_[v][r] = Op::multiply_add(x, w[v], sums_[v][r]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < kPointers; ++i) ++a_[i];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) b_[v] += kLanes<Element<S>>;
  }

  /// `count` k have been multiplied.
  ALWAYS_INLINE void pass(int64_t count) {
    left_ -= count;
    if (left_ > 0) return;
    if (later_ > 0) {
      cut();
    } else {
      end();
    }
  }

  /// The rest of a tile that has been begun.
  ALWAYS_INLINE void finish() {
    while (left_ > 0) {
      for (int64_t k = 0; k < left_; ++k) multiply_add();
      pass(left_);
    }
  }

 private:
  /// Of vector v: the last block is computed twice where there is no other beside it.
  int64_t block(int v) const {
    const int64_t last = tiles_.product().blocks.last - 1;
    return smaller(tiles_.block() + v, last);
  }

  ALWAYS_INLINE void begin() {
    const SideProduct<S>& p = tiles_.product();
    stride_ = p.a_stride;
    for (int i = 0; i < kPointers; ++i) a_[i] = p.a + (tiles_.row() + 4 * i) * stride_;
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      b_[v] = p.b + block(v) * p.depth * kLanes<Element<S>>;
      const Vec<T> init = p.bias ? load(p.bias + block(v) * kLanes<T>) : Vec<T>{};
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums_[v][r] = init;
    }
    cut_ = false;
    left_ = p.depth;
    later_ = 0;
    if (p.depth <= kLongestChain<S>) return;
    later_ = p.depth;
    cut();
  }

  /// The chain of each sum, where Chain of product.inl cuts it.
  ALWAYS_INLINE void cut() {
    add_before();
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        store(before_[v][r], sums_[v][r]);
        sums_[v][r] = Vec<T>{};
      }
    }
    cut_ = true;
    left_ = smaller(later_, kLongestChain<S>);
    later_ -= left_;
  }

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // as of Chain
  ALWAYS_INLINE void add_before() {
    if (!cut_) return;
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums_[v][r] += load(before_[v][r]);
    }
  }
#pragma GCC diagnostic pop

  ALWAYS_INLINE void end() {
    add_before();
    const SideProduct<S>& p = tiles_.product();
    const int64_t stride = p.c_stride;  // which no store changes
    T* const row = p.c + tiles_.row() * stride;
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      T* c = row + block(v) * kLanes<T>;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r, c += stride) store(c, sums_[v][r]);
    }
    tiles_.next();
  }

  static constexpr int kPointers = (R + 3) / 4;  // to rows 0, 4, ..: each reaches three more by its distance

  SideTiles<S, R>& tiles_;
  const Factor<S>* a_[kPointers];
  const Element<S>* b_[Vectors];
  int64_t stride_;
  Vec<T> sums_[Vectors][R];
  int64_t left_ = 0, later_ = 0;  // k until the chain is cut, and after that
  bool cut_ = false;
  alignas(64) T before_[Vectors][R][kLanes<T>];
};

/// Calls fn(tile) for the tiles that are left.
template <class S, int R, class Fn>
ALWAYS_INLINE void with_side_tile(SideTiles<S, R>& tiles, const Fn& fn) {
  if constexpr (SideTiles<S, R>::kMostVectors > 1) {
    if (tiles.vectors() > 1) {
      SideTile<S, R, 2> tile(tiles);
      return fn(tile);
    }
  }
  SideTile<S, R, 1> tile(tiles);
  fn(tile);
}

template <class S, int R>
void SideTiles<S, R>::finish() {
  while (more()) {
    with_side_tile(*this, [](auto& tile) {
      tile.left();
      tile.finish();
    });
  }
  count_ = at_ = 0;
}

/// No tiles beside another product's.
struct NoSideTiles {};
struct NoSideTile {
  static constexpr bool kLoadsAreShort = true;
  static void multiply_add() {}  // never called, but clang looks it up
};
