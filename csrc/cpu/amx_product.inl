// The products of product.inl by tiles of amx.inl: up to 32 rows by two vectors of a panel at a time, or 16 by four.
// Weights are packed as for vectors: the k of a panel's vector are rows of a tile. Every sum adds its k in the same
// order, whatever else is computed with it: bits depend neither on the rows there are (but for one row and few k, which
// is left to vectors) nor on threads.

/// Whether products of so many k and of so many others take turns at no cost: by tiles of the same shapes.
inline bool can_alternate(int64_t k, int64_t other_k) {
  const int64_t last = k % kTilePairs, other_last = other_k % kTilePairs;
  return last == 0 || other_last == 0 || last == other_last;
}

inline int64_t tiles_of(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

/// Elements between the rows of so many k in a copy: an odd number of lines.
inline int64_t copied_distance(int64_t depth) { return ((depth + kTilePairs - 1) / kTilePairs | 1) * kTilePairs; }

/// The most elements that a product of so many rows and k copies.
inline int64_t tile_room(int64_t rows, int64_t depth) { return tiles_of(rows) * kTileRows * copied_distance(depth); }

/// What the rows of a product's A are as tiles: where they lie, if they are evenly spaced, else copied.
template <class S>
class TileRows {
  using E = Element<S>;

 public:
  template <class Row, class AnySegments>
  TileRows(int64_t rows, const Row& a_row, const AnySegments& segments)
      : tile_rows_(int(smaller(rows, kTileRows))),
        lying_(tiles_as_they_lie(rows, a_row, segments)),
        depth_(segments.size()),
        copied_stride_(copied_distance(depth_)),
        size_((tiles_of(rows) - lying_) * kTileRows * copied_stride_),
        room_(TileScope::take(size_)),
        own_(room_ ? 0 : size_),
        copies_(room_ ? room_ : own_.get()) {
    if (lying_ > 0) {
      first_ = bytes(a_row(0) + segments.offset[0]);
      stride_ = rows > 1 ? bytes(a_row(1)) - bytes(a_row(0)) : 0;
    }
    for (int64_t tile = lying_; tile < tiles_of(rows); ++tile) {
      const int64_t row = tile * kTileRows, count = smaller(kTileRows, rows - row);
      E* to = copies_ + (tile - lying_) * kTileRows * copied_stride_;
      for (int s = 0; s < segments.count; ++s, to += segments.length) {
        if (segments.stride != 1) {
          copy_columns(to, count, a_row, row, segments.offset[s], segments.length, segments.stride);
        } else {
          for (int64_t r = 0; r < count; ++r)
            std::memcpy(static_cast<void*>(to + r * copied_stride_), a_row(row + r) + segments.offset[s],
                        size_t(segments.length) * sizeof(E));
        }
      }
    }
  }

  ~TileRows() {
    if (room_) TileScope::give(size_);
  }
  TileRows(const TileRows&) = delete;
  TileRows& operator=(const TileRows&) = delete;

  int64_t depth() const { return depth_; }
  int tile_rows() const { return tile_rows_; }

  struct Tile {
    const char* at;
    int64_t stride;  // bytes
  };
  ALWAYS_INLINE Tile operator[](int64_t tile) const {
    if (tile < lying_) return {first_ + tile * kTileRows * stride_, stride_};
    return {bytes(copies_ + (tile - lying_) * kTileRows * copied_stride_), copied_stride_ * int64_t(sizeof(E))};
  }

 private:
  /// Rows of whole pairs may be an odd number of numbers apart.
  static const char* bytes(const void* p) { return static_cast<const char*>(p); }

  /// How many of the first tiles need not be copied. A tile of fewer rows is, where the shape is that of full ones.
  template <class Row, class AnySegments>
  static int64_t tiles_as_they_lie(int64_t rows, const Row& a_row, const AnySegments& segments) {
    constexpr int64_t kPage = 4096;  // at which all rows would share a few sets of a cache
    if (segments.count != 1 || segments.stride != 1 || rows == 0) return 0;
    const int64_t stride = rows > 1 ? bytes(a_row(1)) - bytes(a_row(0)) : 0;
    if (rows > 1 && stride % kPage == 0) return 0;
    for (int64_t r = 2; r < rows; ++r)
      if (bytes(a_row(r)) - bytes(a_row(r - 1)) != stride) return 0;
    return rows < kTileRows ? 1 : rows / kTileRows;
  }

  /// Rows whose k are `stride` apart in memory, and which themselves are columns there that follow each other.
  template <class Row>
  void copy_columns(E* to, int64_t count, const Row& a_row, int64_t row, int64_t offset, int64_t length,
                    int64_t stride) const {
    static_assert(sizeof(E) == sizeof(float));
    const float* from = reinterpret_cast<const float*>(a_row(row)) + offset;
    for (int64_t k = 0; k < length; k += kTilePairs) {
      const int64_t rest = smaller(kTilePairs, length - k);
      Vec<float> square[kTilePairs];
#pragma GCC unroll 16
      for (int i = 0; i < kTilePairs; ++i)
        square[i] = i < rest ? load_part(from + (k + i) * stride, count) : Vec<float>{};
      transpose<float>(square);
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r)
        if (r < count) store_part(reinterpret_cast<float*>(to) + r * copied_stride_ + k, square[r], rest);
    }
  }

  const int tile_rows_;
  const int64_t lying_, depth_, copied_stride_;
  const int64_t size_;  // of the copies, which are in the scan's room or
  E* const room_;
  const Buffer<E> own_;
  E* const copies_;
  const char* first_ = nullptr;
  int64_t stride_ = 0;
};

/// From the vectors of a panel to the tiles of B: bytes between the k of one.
template <int G, class E>
int64_t tile_stride(const Panel<G, E>&) {
  return G * kLanes<E> * int64_t(sizeof(E));
}
template <int G, class E>
int64_t tile_stride(const PanelByGate<G, E>&) {
  return kLanes<E> * int64_t(sizeof(E));
}
template <class E>
int64_t tile_stride(const PanelOfRows<E>& panel) {
  return panel.stride * int64_t(sizeof(E));
}

/// Rows x V sums, which are in tiles 0 to 3, one row's vectors after another's, plus 16 k of A times B.
template <int Rows, int V, int A, int B, class ATiles, class E>
ALWAYS_INLINE void multiply_add_tiles(const ATiles& a, const E* const (&b)[V], int64_t k, int64_t b_stride) {
  const int64_t of_b = k * b_stride;
  const auto load_b = [&](int v)
                          ALWAYS_INLINE_LAMBDA { load_tile<B>(reinterpret_cast<const char*>(b[v]) + of_b, b_stride); };
  const int64_t of_a = k * int64_t(sizeof(E));
  load_tile<A>(a[0].at + of_a, a[0].stride);
  load_b(0);
  multiply_tiles<E, 0, A, B>();
  if constexpr (Rows == 1) {
    if constexpr (V > 1) {
      load_b(1);
      multiply_tiles<E, 1, A, B>();
    }
    if constexpr (V > 2) {
      load_b(2);
      multiply_tiles<E, 2, A, B>();
    }
    if constexpr (V > 3) {
      load_b(3);
      multiply_tiles<E, 3, A, B>();
    }
  } else {  // what is loaded last is multiplied twice
    static_assert(V <= 2);
    load_tile<A>(a[1].at + of_a, a[1].stride);
    multiply_tiles<E, V, A, B>();
    if constexpr (V > 1) {
      load_b(1);
      multiply_tiles<E, 3, A, B>();
      load_tile<A>(a[0].at + of_a, a[0].stride);
      multiply_tiles<E, 1, A, B>();
    }
  }
}

/// Rows tiles of A times V vectors of a panel, whose sums lie `distance` apart from row to row.
template <int Rows, int V, class Sum, class ATiles, class AnyPanel>
ALWAYS_INLINE void multiply_vectors(Sum* sums, int64_t distance, const ATiles& a, const AnyPanel& panel, int first,
                                    int64_t depth, Fetch& fetch) {
  const int64_t stride = distance * int64_t(sizeof(Sum)), b_stride = tile_stride(panel);
  std::remove_cvref_t<decltype(panel.vector(0))> b[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) b[v] = panel.vector(first + v);
  zero_tile<0>();
  if constexpr (Rows * V > 1) zero_tile<1>();
  if constexpr (Rows * V > 2) zero_tile<2>();
  if constexpr (Rows * V > 3) zero_tile<3>();
  int64_t k = 0;
  for (; k + kTilePairs <= depth; k += kTilePairs) {
    for (const char* const end = fetch.at + fetch.step; fetch.at < end; fetch.at += 64)
      __builtin_prefetch(fetch.at, 0, 2);
    multiply_add_tiles<Rows, V, kTileA, kTileB>(a, b, k, b_stride);
  }
  if (k < depth) multiply_add_tiles<Rows, V, kLastTileA, kLastTileB>(a, b, k, b_stride);
  const auto store_row = [&]<int Row>(Sum* to) ALWAYS_INLINE_LAMBDA {
    store_tile<Row * V>(to, stride);
    if constexpr (V > 1) store_tile<Row * V + 1>(to + kLanes<float>, stride);
    if constexpr (V > 2) store_tile<Row * V + 2>(to + 2 * kLanes<float>, stride);
    if constexpr (V > 3) store_tile<Row * V + 3>(to + 3 * kLanes<float>, stride);
  };
  store_row.template operator()<0>(sums);
  if constexpr (Rows == 2) store_row.template operator()<1>(sums + kTileRows * distance);
}

/// The same for all vectors of a panel.
template <int Rows, int Vectors, int First = 0, class Sum, class ATiles, class AnyPanel>
NO_INLINE void multiply_panel(Sum* sums, int64_t distance, const ATiles& a, const AnyPanel& panel, int64_t depth,
                              Fetch& fetch) {
  constexpr int kMost = 4 / Rows, V = Vectors - First < kMost ? Vectors - First : kMost;
  multiply_vectors<Rows, V>(sums + First * kLanes<float>, distance, a, panel, First, depth, fetch);
  if constexpr (First + V < Vectors) multiply_panel<Rows, Vectors, First + V>(sums, distance, a, panel, depth, fetch);
}

/// Calls fn.operator()<Tiles>(row, height) for the rows of two tiles at a time, then of one: `height` from `row` on.
/// Not `kByPairs`: there are no more than one tile's.
template <bool kByPairs, class Fn>
ALWAYS_INLINE void in_row_tiles(int64_t rows, const Fn& fn) {
  int64_t row = 0;
  if constexpr (kByPairs)
    for (; row + kTileRows < rows; row += 2 * kTileRows)
      fn.template operator()<2>(row, smaller(rows - row, 2 * kTileRows));
  if (row < rows) fn.template operator()<1>(row, rows - row);
}

/// Calls fn.operator()<R>(row) for the rows [row, rows), R of them at a time, then half as many.
template <int R, class Fn>
ALWAYS_INLINE void in_rows_of(int64_t row, int64_t rows, const Fn& fn) {
#pragma GCC unroll 1
  for (; row + R <= rows; row += R) fn.template operator()<R>(row);
  if constexpr (R > 1) in_rows_of<R / 2>(row, rows, fn);
}

/// Blocks [block, block + NB) of some rows from first_row on: of two tiles or, where `Rows` is 1, of one.
template <int Rows, int NB, int G, class S, class AnyPanel, class Init, class Finish>
ALWAYS_INLINE void run_tiles(int64_t first_row, int64_t rows, int64_t block, const TileRows<S>& a,
                             const TileRows<S>* first_a, const AnyPanel& panel, Fetch& fetch, const Init& init,
                             const Finish& finish) {
  constexpr int n = kLanes<float>, kVectors = NB * G, kDistance = kVectors * n;
  constexpr bool kHasFirst = kIsInitProduct<Init>;
  alignas(64) float sums[1 + kHasFirst][Rows * kTileRows * kDistance];
#pragma GCC unroll 1
  for (int64_t r = 0; r < rows; ++r) {  // only for what it fetches
    Vec<float> unused[kVectors];
    init(Patch<1, NB>{first_row + r, block}, unused);
  }
  const auto multiply = [&](float* to, const TileRows<S>& a, const auto& panel, Fetch& fetch) ALWAYS_INLINE_LAMBDA {
    TileScope::shape(a.tile_rows(), int(a.depth() % kTilePairs));
    typename TileRows<S>::Tile tiles[Rows];
    for (int i = 0; i < Rows; ++i) tiles[i] = a[first_row / kTileRows + i];
    multiply_panel<Rows, kVectors>(to, kDistance, tiles, panel, a.depth(), fetch);
  };
  if constexpr (kHasFirst) {
    Fetch none = {nullptr, 0};
    multiply(sums[1], *first_a, init.template panel<G>(block), none);
  }
  multiply(sums[0], a, panel, fetch);
  in_rows_of<kMostCells / NB>(0, rows, [&]<int R>(int64_t row) ALWAYS_INLINE_LAMBDA {
    Vec<float> of_rows[R * NB][G];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Patch<1, NB> at = {first_row + row + r, block};
      const int64_t of_row = (row + r) * kDistance;
      Vec<float> acc[kVectors];
      init(at, acc);
      if constexpr (kHasFirst) {
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) acc[v] += load(sums[1] + of_row + v * n);
        init.between(at, acc);
      }
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) of_rows[r * NB + v / G][v % G] = acc[v] + load(sums[0] + of_row + v * n);
    }
    finish_tile<R, NB, G>(first_row + row, block, of_rows, finish);
  });
}

/// What is fetched of the panel at `block`, with each 16 k of all tiles of the one before it, where the second-level
/// cache does not keep the weights of so many panels from one step to the next.
template <int NB, int G, class S>
Fetch next_panel(int64_t rows, int64_t block, int64_t panels, int64_t depth, const PackedB<S>& b) {
  constexpr int64_t kFar = 1536 * 1024, kLine = 64;
  const int64_t bytes = NB * G * depth * kLanes<Element<S>> * int64_t(sizeof(Element<S>));
  if (rows <= kTileRows || panels * bytes <= larger(kFar, tuning().fetched_bytes) || b.unpacked) return {nullptr, 0};
  const int64_t times = (rows + 2 * kTileRows - 1) / (2 * kTileRows) * ((NB * G + 1) / 2) * (depth / kTilePairs);
  const Element<S>* from = b.b + block * depth * G * kLanes<Element<S>>;
  return {reinterpret_cast<const char*>(from), (bytes / larger(times, 1) + kLine - 1) / kLine * kLine};
}
template <int NB, int G, class S>
Fetch next_panel(int64_t, int64_t, int64_t, int64_t, const PlainB<Element<S>>&) {
  return {nullptr, 0};
}

/// The blocks [block, blocks), NB of them at a time, as far as that goes; returns the first that is left.
template <int NB, int G, class S, class AnyB, class Init, class Finish>
ALWAYS_INLINE int64_t run_blocks(int64_t rows, int64_t block, int64_t blocks, bool backwards, const TileRows<S>& a,
                                 const TileRows<S>* first_a, const AnyB& b, const Init& init, const Finish& finish) {
  const int64_t panels = (blocks - block) / NB, depth = a.depth();
  for (int64_t i = 0; i < panels; ++i) {
    const int64_t at = block + NB * (backwards ? panels - 1 - i : i);
    const auto panel = b.template panel<G, NB>(at, depth);
    Fetch fetch = {nullptr, 0};
    if (i + 1 < panels) fetch = next_panel<NB, G, S>(rows, backwards ? at - NB : at + NB, panels, depth, b);
    in_row_tiles<G == 1 || NB == 1>(rows, [&]<int Tiles>(int64_t row, int64_t height) ALWAYS_INLINE_LAMBDA {
      run_tiles<Tiles, NB, G, S>(row, height, at, a, first_a, panel, fetch, init, finish);
    });
  }
  return block + panels * NB;
}

/// Panels as wide as a cell is run for at once: of few rows several blocks.
template <int G, class S, class AnyB, class Init, class Finish>
ALWAYS_INLINE void run_panels(int64_t rows, int64_t block, int64_t blocks, bool backwards, const TileRows<S>& a,
                              const TileRows<S>* first_a, const AnyB& b, const Init& init, const Finish& finish) {
  const auto run = [&]<int NB>() ALWAYS_INLINE_LAMBDA {
    block = run_blocks<NB, G, S>(rows, block, blocks, backwards, a, first_a, b, init, finish);
  };
  if constexpr (G == 1) run.template operator()<4>();
  if constexpr (!kIsInitProduct<Init>) {
    if (G == 1 || rows < 4) run.template operator()<2>();
  }
  run.template operator()<1>();
}

/// See product() of product.inl; `order` and what is `ahead` change no bits.
template <int G, class S, bool kStrided = false, class Row, class AnySegments, class Init, class Finish,
          class Side = NoSideTiles>
ALWAYS_INLINE void product(int64_t rows, int64_t block, int64_t blocks, Order order, const Row& a_row, PackedB<S> b,
                           const AnySegments& segments, const Init& init, const Finish& finish, bool tail = false,
                           Side* side = nullptr, Ahead = {}) {
  if (rows == 0) return;
  const bool backwards = order == Order::kRowsBackwards || order == Order::kRowBackwards;
  if constexpr (!kStrided && !kIsInitProduct<Init>) {
    // A tile's sums come late, and by way of memory. (32 units: forward 1.0 to 1.2 times as fast by vectors; 64: 0.84
    // to 0.9.)
    if ((order == Order::kRow || order == Order::kRowBackwards) && segments.size() <= kTilePairs) {
      const RowProduct<S, AnySegments> row = {a_row(0), b.b, segments, backwards};
      return vector_row_product<G>(row, block, blocks, init, finish, tail, side);
    }
  }
  const TileScope scope;
  const TileRows<S> a(rows, a_row, segments);
  if constexpr (kIsInitProduct<Init>) {
    const TileRows<S> first_a(rows, init.row, init.segments);
    run_panels<G, S>(rows, block, blocks, backwards, a, &first_a, b, init, finish);
  } else {
    run_panels<G, S>(rows, block, blocks - tail, backwards, a, nullptr, b, init, finish);
    if constexpr (G > 1) {
      if (!tail) return;
      const auto run = [&](const Element<S>* b, const auto& init, const auto& finish) ALWAYS_INLINE_LAMBDA {
        run_blocks<1, 1, S>(rows, blocks - 1, blocks, backwards, a, nullptr, PackedB<S>(b), init, finish);
      };
      run_tail<G, S>(blocks - 1, b.b, a.depth(), init, finish, run);
    }
  }
}

/// The same of one gate, with a B as it lies.
template <class S, class Row, class AnySegments, class Init, class Finish>
ALWAYS_INLINE void product_as_it_lies(int64_t rows, int64_t block, int64_t blocks, const Row& a_row,
                                      const PlainB<Element<S>>& b, const AnySegments& segments, const Init& init,
                                      const Finish& finish) {
  static_assert(kPack<S> > 1);  // nothing of which lies in groups, see kMayLie
  if (rows == 0) return;
  const TileScope scope;
  const TileRows<S> a(rows, a_row, segments);
  run_panels<1, S>(rows, block, blocks, false, a, nullptr, b, init, finish);
}

/// The same of one row.
template <int G, class S, class AnySegments, class Init, class Finish, class Side>
ALWAYS_INLINE void row_product(const RowProduct<S, AnySegments>& p, int64_t block, int64_t blocks, const Init& init,
                               const Finish& finish, bool tail, Side* side) {
  const auto a_row = [&](int64_t) { return p.a; };
  product<G, S>(1, block, blocks, p.backwards ? Order::kRowBackwards : Order::kRow, a_row, PackedB<S>(p.b), p.segments,
                init, finish, tail, side);
}
