// A product that is computed tile by tile beside another one, which would wait for memory meanwhile; see row.inl.

/// C = A B + bias, with the sums of the PlainProduct that it stands for. C has room for whole vectors, and is read
/// again where a chain cannot have all k.
template <class S>
struct SideProduct {
  int64_t rows = 0;  // a multiple of those of a tile
  int64_t depth = 0;
  const Factor<S>* a = nullptr;
  int64_t a_stride = 0;          // between rows
  int64_t stretch = 0, gap = 0;  // of A's columns, where there is a gap every so many k
  Compute<S>* c = nullptr;
  int64_t c_stride = 0;
  const Element<S>* b = nullptr;     // packed, [block][k][lanes]
  const Compute<S>* bias = nullptr;  // [columns] or null
  UnitBlocks blocks = {0, 0};        // of columns
};

/// The tiles of some side products: of R rows by one vector or two and, where a chain may not have all k, of as many as
/// it may have.
template <class S, int R>
class SideTiles {
  using T = Compute<S>;
  static constexpr int n = kLanes<Element<S>>;

 public:
  /// A tile of two vectors needs fewer loads, one of a single vector fewer instructions (loads are part of its
  /// multiply-adds). Measured: two are 4 to 13 % faster on a Xeon and 2 to 8 % on Zen 5, which load two vectors a cycle
  /// and wait for the loads of both products, and 4 to 6 % slower on Zen 4, which multiplies one a cycle.
  static constexpr int kMostVectors = RNN_EXT_VECTOR_REGISTERS < 32 || kPack<S> > 1 ? 1 : 2;

  void add(const SideProduct<S>& product) {
    if (product.blocks.first >= product.blocks.last) return;
    products_[count_++] = product;
    if (count_ == 1) begin_product();
  }

  /// Of products that will multiply so many k meanwhile: whether every other of these is enough to take all tiles
  /// along.
  void spread(int64_t others) { sparse_ = 2 * count_k() <= others; }

  bool more() const { return at_ < count_; }
  int vectors() const { return vectors_; }
  bool sparse() const { return sparse_; }

  /// Computes those that no other product has taken along.
  NO_INLINE void finish();

 private:
  template <class, int, int, int>
  friend class SideTile;

  int64_t count_k() const {
    int64_t count = 0;
    for (int i = 0; i < count_; ++i) {
      const SideProduct<S>& p = products_[i];
      count += p.rows / R * ((p.blocks.last - p.blocks.first + vectors_ - 1) / vectors_) * p.depth;
    }
    return count;
  }

  /// What follows the tile at hand.
  ALWAYS_INLINE void next() {
    rows_left_ -= R;
    if (whole_ && rows_left_ > 0) {  // most of them
      a_ += R * a_stride_;
      c_ += R * c_stride_;
    } else {
      next_column();
    }
  }

  void next_column() {
    const SideProduct<S>& p = products_[at_];
    if (!whole_) {
      k_ += kLongestChain<S>;
      if (k_ < p.depth) {
        rows_left_ += R;
        return find_tile();
      }
      k_ = 0;
      if (rows_left_ > 0) return find_tile();
    }
    rows_left_ = p.rows;
    block_ += vectors_;
    if (block_ < p.blocks.last) return find_tile();
    if (++at_ < count_) begin_product();
  }

  void begin_product() {
    const SideProduct<S>& p = products_[at_];
    block_ = p.blocks.first;
    rows_left_ = p.rows;
    a_stride_ = p.a_stride;
    c_stride_ = p.c_stride;
    stretch_ = p.gap > 0 ? p.stretch : p.depth;
    gap_ = p.gap;
    whole_ = p.depth <= kLongestChain<S>;
    find_tile();
  }

  void find_tile() {
    const SideProduct<S>& p = products_[at_];
    const int64_t row = p.rows - rows_left_, block_stride = p.depth * n;
    a_ = p.a + row * a_stride_;
    b_ = p.b + block_ * block_stride + k_ * n;
    c_ = p.c + row * c_stride_ + block_ * kLanes<T>;
    bias_ = p.bias ? p.bias + block_ * kLanes<T> : nullptr;
    depth_ = smaller(p.depth - k_, kLongestChain<S>);
    to_second_ = block_ + 1 < p.blocks.last ? block_stride : 0;
  }

  SideProduct<S> products_[4];
  int count_ = 0, at_ = 0;
  bool sparse_ = false;
  const int vectors_ = tuning().vectors_a_cycle < kMostVectors ? tuning().vectors_a_cycle : kMostVectors;

  // The tile at hand.
  int64_t rows_left_ = 0, block_ = 0, k_ = 0;
  bool whole_ = true;  // it has all k
  const Factor<S>* a_ = nullptr;
  const Element<S>* b_ = nullptr;
  T* c_ = nullptr;
  const T* bias_ = nullptr;
  int64_t a_stride_ = 0, c_stride_ = 0, stretch_ = 0, gap_ = 0, depth_ = 0;
  int64_t to_second_ = 0;               // of b; 0: there is no other vector beside the first, which is computed twice
  int64_t done_ = 0;                    // k of it
  T sums_[kMostVectors][R][kLanes<T>];  // of these; aligned, an RNN of 128 units is 2 % slower on Zen 4
};

// GCC does not see that nothing is read of a tile before there is one.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

/// The tile at hand, and after it the next: `Vectors` are those of the tiles, which go on after every `Every` k of the
/// product that takes them along.
template <class S, int R, int Vectors, int Every>
class SideTile {
  using T = Compute<S>;
  using Op = Operand<S>;

 public:
  static constexpr bool kLoadsAreShort = Vectors == 1;  // see kMostVectors
  static constexpr int kEvery = Every;

  explicit ALWAYS_INLINE SideTile(SideTiles<S, R>& tiles) : tiles_(tiles) {
    if (tiles.done_ == 0) return;
    place(tiles.done_);
    tiles.done_ = 0;
    each_sum([&](int v, int r) ALWAYS_INLINE_LAMBDA { sums_[v][r] = load(tiles_.sums_[v][r]); });
  }

  /// The k that can be multiplied before pass(), as far as a stretch of A goes: 0 if there is no tile left.
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
      next_stretch();
    } else {
      end();
    }
  }

  /// Puts a tile aside that has been begun.
  ALWAYS_INLINE void put_aside() {
    if (left_ == 0) return;
    tiles_.done_ = tiles_.depth_ - later_ - left_;
    each_sum([&](int v, int r) ALWAYS_INLINE_LAMBDA { store(tiles_.sums_[v][r], sums_[v][r]); });
  }

 private:
  template <class Fn>
  ALWAYS_INLINE static void each_sum(const Fn& fn) {
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) fn(v, r);
    }
  }

  /// From the first vector of c to the second, see to_second_.
  ALWAYS_INLINE int64_t lanes_to(int v) const { return v > 0 && tiles_.to_second_ ? kLanes<T> : 0; }

  ALWAYS_INLINE void place(int64_t done) {
    const int64_t k = tiles_.k_ + done, stretches = tiles_.gap_ > 0 ? k / tiles_.stretch_ : 0;
    stride_ = tiles_.a_stride_;
#pragma GCC unroll 2
    for (int i = 0; i < kPointers; ++i) a_[i] = tiles_.a_ + 4 * i * stride_ + k + stretches * tiles_.gap_;
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) b_[v] = tiles_.b_ + v * tiles_.to_second_ + done * kLanes<Element<S>>;
    left_ = smaller((stretches + 1) * tiles_.stretch_ - k, tiles_.depth_ - done);
    later_ = tiles_.depth_ - done - left_;
  }

  ALWAYS_INLINE void next_stretch() {
#pragma GCC unroll 2
    for (int i = 0; i < kPointers; ++i) a_[i] += tiles_.gap_;
    left_ = smaller(tiles_.stretch_, later_);
    later_ -= left_;
  }

  ALWAYS_INLINE void begin() {
    place(0);
    Vec<T> init[Vectors] = {};
    if (tiles_.whole_ && tiles_.bias_) {
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) init[v] = load(tiles_.bias_ + lanes_to(v));
    }
    each_sum([&](int v, int r) ALWAYS_INLINE_LAMBDA { sums_[v][r] = init[v]; });
  }

  ALWAYS_INLINE void end() {
    if (!tiles_.whole_) add_before();
    each_sum([&](int v, int r)
                 ALWAYS_INLINE_LAMBDA { store(tiles_.c_ + lanes_to(v) + r * tiles_.c_stride_, sums_[v][r]); });
    tiles_.next();
  }

  /// What Chain of product.inl has set aside until then: the bias, then the tile before, which C has.
  ALWAYS_INLINE void add_before() {
    const bool first = tiles_.k_ == 0;
    const T* before = first ? tiles_.bias_ : tiles_.c_;
    const int64_t stride = first ? 0 : tiles_.c_stride_;
    each_sum([&](int v, int r) ALWAYS_INLINE_LAMBDA {
      // The zeros, too, that a sum without a bias begins with: they make a zero of -0.
      sums_[v][r] += before ? load(before + lanes_to(v) + r * stride) : Vec<T>{};
    });
  }

  static constexpr int kPointers = (R + 3) / 4;  // to rows 0, 4, ..: each reaches three more by its distance

  SideTiles<S, R>& tiles_;
  const Factor<S>* a_[kPointers];
  const Element<S>* b_[Vectors];
  int64_t stride_;
  Vec<T> sums_[Vectors][R];
  int64_t left_ = 0, later_ = 0;  // k of this stretch of A, and after it
};

#pragma GCC diagnostic pop

/// Calls fn.operator()<Tile>() for the kind of tile that there is.
template <int Every, class S, int R, class Fn>
ALWAYS_INLINE void with_side_tile(const SideTiles<S, R>& tiles, const Fn& fn) {
  if constexpr (SideTiles<S, R>::kMostVectors > 1) {
    if (tiles.vectors() > 1) return fn.template operator()<SideTile<S, R, 2, Every>>();
  }
  fn.template operator()<SideTile<S, R, 1, Every>>();
}

template <class S, int R>
void SideTiles<S, R>::finish() {
  while (more()) {
    with_side_tile<1>(*this, [this]<class Tile>() {
      Tile tile(*this);
      const int64_t left = tile.left();
      for (int64_t k = 0; k < left; ++k) tile.multiply_add();
      tile.pass(left);
      tile.put_aside();  // before another stretch of A
    });
  }
  count_ = at_ = 0;
}

/// No tiles beside another product's.
struct NoSideTiles {};
struct NoSideTile {
  static constexpr bool kLoadsAreShort = true;
  static constexpr int kEvery = 1;
  static void multiply_add() {}  // never called, but clang looks it up
};
