// The one matrix product everything rests on: a register tile of MR rows x NB blocks of columns, with whatever should
// happen to the finished tile (store it, run a cell) inlined behind it. A is read factor by factor and broadcast.

/// Products of vectors need nothing prepared for all of a scan, those of tiles do, see amx.inl.
struct TileScope {
  TileScope() {}
  template <class E>
  TileScope(const Buffer<E>&, int64_t) {}
};
inline int64_t tile_room(int64_t, int64_t) { return 0; }

/// Whether products of so many k and of so many others take turns at no cost.
inline bool can_alternate(int64_t, int64_t) { return true; }

/// Where consecutive k of A are rows of a matrix, which no hardware prefetcher follows: how many k before its use a
/// line is fetched. (Rows of B are several lines, and fetching them gained nothing.) Of few rows most of that would lie
/// behind them, where it costs a look at the page table each time.
constexpr int64_t kAhead = 24, kFewestAhead = 4 * kAhead;

// GCC does not see that what was before a cut is read only if there was one.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

/// What the sums of a tile had come to before they were cut, see kLongestChain.
template <class S, int MR, int N>
class Chain {
  using T = Compute<S>;

 public:
  explicit Chain(int64_t size) : left_(size > kLongestChain<S> ? 0 : size) {}

  /// How many of `wanted` k are added next.
  ALWAYS_INLINE int64_t next(Vec<T> (&acc)[MR][N], int64_t wanted) {
    if (left_ == 0) cut(acc);
    const int64_t count = smaller(wanted, left_);
    left_ -= count;
    return count;
  }

  ALWAYS_INLINE void finish(Vec<T> (&acc)[MR][N]) const {
    if (!cut_) return;
#pragma GCC unroll 32
    for (int i = 0; i < MR * N; ++i) acc[i / N][i % N] += load(before_ + i * kLanes<T>);
  }

 private:
  ALWAYS_INLINE void cut(Vec<T> (&acc)[MR][N]) {
    finish(acc);
#pragma GCC unroll 32
    for (int i = 0; i < MR * N; ++i) {
      store(before_ + i * kLanes<T>, acc[i / N][i % N]);
      acc[i / N][i % N] = Vec<T>{};
    }
    left_ = kLongestChain<S>;
    cut_ = true;
  }

  int64_t left_;
  bool cut_ = false;
  alignas(64) T before_[MR * N * kLanes<T>];
};

#pragma GCC diagnostic pop

template <int MR, int NB, int G, bool kStrided, class S, class AnyPanel, class AnySegments>
ALWAYS_INLINE void multiply_add(Vec<Compute<S>> (&acc)[MR][NB * G], const Factor<S>* const (&a)[MR], AnyPanel panel,
                                const AnySegments& segments, Fetch fetch) {
  using Op = Operand<S>;
  const int64_t stride = kStrided ? segments.stride : 1;
  const int64_t ahead = kStrided && segments.size() >= kFewestAhead ? kAhead * stride : 0;
  Chain<S, MR, NB * G> chain(segments.size());
  for (int s = 0; s < segments.count; ++s) {
    const int64_t offset = segments.offset[s];
    const int64_t length = segments.length;
    const Factor<S>* row[MR];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) row[m] = a[m] + offset;
    for (int64_t done = 0, end; done < length; done = end) {
      end = done + chain.next(acc, length - done);
#pragma GCC unroll 2
      for (int64_t k = done; k < end; ++k) {
        if constexpr (kStrided) {
          __builtin_prefetch(row[MR - 1] + k * stride + ahead);
        } else if constexpr (MR >= kFetchingRows) {
          __builtin_prefetch(fetch.at, 0, 2);  // to the second-level cache
          fetch.at += fetch.step;
        }
        // The fewer of the two stay in registers, the others come one at a time.
        if constexpr (MR < NB * G) {
          typename Op::Lanes x[MR];
#pragma GCC unroll 8
          for (int m = 0; m < MR; ++m) x[m] = Op::broadcast(row[m][k * stride]);
#pragma GCC unroll 8
          for (int v = 0; v < NB * G; ++v) {
            const auto w = Op::load(panel.vector(v));
#pragma GCC unroll 8
            for (int m = 0; m < MR; ++m) acc[m][v] = Op::multiply_add(x[m], w, acc[m][v]);
          }
        } else {
          typename Op::Lanes w[NB * G];
#pragma GCC unroll 8
          for (int v = 0; v < NB * G; ++v) w[v] = Op::load(panel.vector(v));
#pragma GCC unroll 8
          for (int m = 0; m < MR; ++m) {
            const auto x = Op::broadcast(row[m][k * stride]);
#pragma GCC unroll 8
            for (int v = 0; v < NB * G; ++v) acc[m][v] = Op::multiply_add(x, w[v], acc[m][v]);
          }
        }
        panel.next();
      }
    }
    if constexpr (requires { panel.end_segment(); }) panel.end_segment();
  }
  chain.finish(acc);
}

/// Adds what an InitProduct multiplies to what a tile's sums begin with.
template <int MR, int NB, int G, class S, class Begin, class Row, class Between>
ALWAYS_INLINE void add_first(Vec<Compute<S>> (&acc)[MR][NB * G], int64_t first_row, int64_t first_block,
                             const InitProduct<S, Begin, Row, Between>& init) {
  const auto panel = init.template panel<G>(first_block);
  const Factor<S>* a[MR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) a[m] = init.row(first_row + m);
  multiply_add<MR, NB, G, false, S>(acc, a, panel, init.segments, init.fetch);
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) init.between(Patch<1, NB>{first_row + m, first_block}, acc[m]);
}

/// Rows of a tile whose accumulators (rows x vectors) stay in the registers beside the fewer of a column of inputs and
/// a row of weights, and one of the others; of a tile that is taller than wide two, lest the compiler spill (measured).
/// No more than four of weights that are widened, as these are for few rows: eight gain 0 to 6 %, for twice the code.
template <class S>
constexpr int tile_rows(int vectors) {
  const auto registers = [=](int rows) {
    const int fewer = rows > vectors ? vectors : rows;
    return rows * vectors + (fewer + 1) * kOperandRegisters<S> + (rows > vectors);
  };
  int rows = 1;
  while (rows < (kWidens<S> ? 4 : 8) && registers(rows + 1) <= RNN_EXT_VECTOR_REGISTERS) ++rows;
  return rows;
}

/// The height of the next of so many tiles, for so many rows that are left: as equal as can be.
inline int64_t next_height(int64_t rows, int64_t tiles) { return (rows + tiles - 1) / tiles; }

/// All of a product's k.
struct Whole {};

/// Some of a deep product's k: what its sums have come to before, if not null, and where they go, if these are not the
/// last. Both are [tile row][vectors][lanes].
template <class T>
struct Piece {
  const T* before = nullptr;
  T* after = nullptr;
  int64_t first = 0;  // of A's columns
};

template <int MR, int NB, int G, bool kStrided, class S, class Row, class AnyPanel, class AnySegments, class Init,
          class Finish, class AnyPiece>
NO_INLINE void run_tile(const Row& a_row, int64_t first_row, int64_t first_block, AnyPanel panel,
                        const AnySegments& segments, Fetch fetch, const Init& init, const Finish& finish,
                        const AnyPiece& piece) {
  constexpr bool kInPieces = !std::is_same_v<AnyPiece, Whole>;
  constexpr int n = kLanes<Compute<S>>, kVectors = NB * G;
  Vec<Compute<S>> acc[MR][kVectors];
  const Factor<S>* a[MR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    a[m] = a_row(first_row + m);
    if constexpr (kInPieces) {
      a[m] += piece.first;
      if (piece.before) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[m][v] = load(piece.before + (m * kVectors + v) * n);
        continue;
      }
    }
    init(Patch<1, NB>{first_row + m, first_block}, acc[m]);
  }
  if constexpr (kIsInitProduct<Init>) add_first<MR, NB, G>(acc, first_row, first_block, init);
  multiply_add<MR, NB, G, kStrided, S>(acc, a, panel, segments, fetch);
  if constexpr (kInPieces) {
    if (piece.after) {
#pragma GCC unroll 32
      for (int i = 0; i < MR * kVectors; ++i) store(piece.after + i * n, acc[i / kVectors][i % kVectors]);
      return;
    }
  }
  Vec<Compute<S>> sums[MR * NB][G];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 16
    for (int v = 0; v < NB * G; ++v) sums[m * NB + v / G][v % G] = acc[m][v];
  }
  finish_tile<MR, NB, G>(first_row, first_block, sums, finish);
}

template <int MR, int NB, int G, bool kStrided, class S, class Row, class AnyPanel, class AnySegments, class Init,
          class Finish, class AnyPiece>
ALWAYS_INLINE void run_rows(int64_t rows, const Row& a_row, int64_t first_row, int64_t first_block, AnyPanel panel,
                            const AnySegments& segments, Fetch fetch, const Init& init, const Finish& finish,
                            const AnyPiece& piece) {
  if constexpr (MR > 1) {
    if (rows < MR)
      return run_rows<MR - 1, NB, G, kStrided, S>(rows, a_row, first_row, first_block, panel, segments, fetch, init,
                                                  finish, piece);
  }
  run_tile<MR, NB, G, kStrided, S>(a_row, first_row, first_block, panel, segments, fetch, init, finish, piece);
}

/// A panel of one gate that is so deep that the second-level cache would not keep it, beside A, from one tile to the
/// next: some of its k after the others, for as many tiles at a time as have their sums beside them. Cut where chains
/// of sums are, see Chain: the bits are those of tiles that sum all k in one go. `far`: what is next is fetched;
/// after this panel that is `next`, if not null.
template <int NB, class S, int kMaxRows, class Row, class AnySegments, class Init, class Finish>
NO_INLINE void run_deep_panel(int64_t rows, int64_t tiles, int64_t block, const Row& a_row,
                              const Panel<1, Element<S>>& panel, bool far, const Element<S>* next,
                              const AnySegments& segments, const Init& init, const Finish& finish) {
  using T = Compute<S>;
  constexpr int64_t kTiles = 32, kPiece = 4 * kLongestChain<S>, kSums = NB * kLanes<T>, kStep = kLanes<Element<S>>;
  alignas(64) T sums[kTiles * kMaxRows * kSums];
  int64_t first_row = 0;
  for (int64_t first = 0, last; first < tiles; first = last) {
    last = smaller(tiles, first + kTiles);
    int64_t row = first_row, done = 0;
    for (int s = 0; s < segments.count; ++s) {
      for (int64_t k = 0, length; k < segments.length; k += length, done += length) {
        // None is as short as a chain, which would begin with what has been summed before.
        const int64_t left = segments.length - k;
        length = left <= kPiece + kLongestChain<S> ? left : kPiece;
        AnySegments part = segments;
        part.length = length;
        if constexpr (requires { part.count = 1; }) {
          part.count = 1;
          part.offset[0] = 0;
        }
        Panel<1, Element<S>> of = panel;
        of.b += done * kStep;
        const bool is_last = done + length == segments.size();
        const Element<S>* const then = !is_last ? of.b + length * kStep : last < tiles ? panel.b : next;
        row = first_row;
        for (int64_t tile = first; tile < last; ++tile) {
          const int64_t height = next_height(rows - row, tiles - tile);
          T* const at = sums + (row - first_row) * kSums;
          const Piece<T> piece = {done > 0 ? at : nullptr, is_last ? nullptr : at, segments.offset[s] + k};
          Fetch fetch = {reinterpret_cast<const char*>(of.b), 0};
          if (far && then && tile - first < NB)
            fetch = {reinterpret_cast<const char*>(then + (tile - first) * of.block_stride), 64};
          run_rows<kMaxRows, NB, 1, false, S>(height, a_row, row, block, of, part, fetch, init, finish, piece);
          row += height;
        }
      }
    }
    first_row = row;
  }
}

/// Whether a panel of so many bytes, for so many tiles, is so deep and may be cut. (Ice Lake, 64 to 256 rows, training:
/// GRU and LSTM of 512 and 1,024 units 1.02 to 1.07 times as fast, RNN of 2,048 1.00 to 1.03; the step forward of four
/// gates of 2,048 units gained nothing. Zen 4: 0.98 to 1.03.)
template <class S, class AnySegments>
ALWAYS_INLINE bool is_deep(int64_t bytes, int64_t tiles, const AnySegments& segments) {
  constexpr int64_t kDeep = 512 * 1024, kTiles = 8;
  const bool may = segments.count == 1 || segments.length % kLongestChain<S> == 0;
  return bytes >= kDeep && tiles >= kTiles && may && segments.length > kLongestChain<S>;
}

/// The blocks [block, blocks), NB of them at a time, a panel, as far as that goes; returns the first that is left. The
/// first call that has a panel fetches what is `ahead`.
template <int NB, int G, bool kStrided, class S, int kMaxRows = tile_rows<S>(NB * G), class Row, class AnyB,
          class AnySegments, class Init, class Finish>
ALWAYS_INLINE int64_t run_blocks(int64_t rows, int64_t block, int64_t blocks, bool backwards, const Row& a_row,
                                 const AnyB& b, const AnySegments& segments, const Init& init, const Finish& finish,
                                 Ahead& ahead) {
  const int64_t depth = segments.size(), panels = (blocks - block) / NB, tiles = (rows + kMaxRows - 1) / kMaxRows;
  if (panels <= 0) return block;
  const int64_t bytes = NB * G * depth * kLanes<Element<S>> * int64_t(sizeof(Element<S>));
  // Weights that the second-level cache does not keep from one step to the next would be waited for by each panel's
  // first tile, or when it is packed: while a panel is multiplied, its first tiles fetch the next (those of too few
  // rows in name only).
  const bool far = panels * bytes > tuning().fetched_bytes;
  constexpr bool kMayBeDeep = NB == 4 && G == 1 && !kStrided && !kIsInitProduct<Init>;
  if constexpr (kMayBeDeep) {
    if (is_deep<S>(bytes, tiles, segments)) {
      for (int64_t i = 0; i < panels; ++i) {
        const int64_t at = block + NB * (backwards ? panels - 1 - i : i);
        const auto panel = b.template panel<G, NB>(at, depth);
        const bool is_there = !b.unpacked && i + 1 < panels;
        const Element<S>* next = is_there ? panel.b + (backwards ? -NB : NB) * panel.block_stride : nullptr;
        run_deep_panel<NB, S, kMaxRows>(rows, tiles, at, a_row, panel, far, next, segments, init, finish);
      }
      return block + panels * NB;
    }
  }
  const std::conditional_t<kMayBeDeep, Piece<Compute<S>>, Whole> all_k = {};  // the same tiles as of a deep panel
  Fetcher fetcher(ahead, panels * tiles * depth);
  ahead = {};
  if constexpr (kIsInitProduct<Init>) init.template start<NB, G>(panels, tiles);
  for (int64_t i = 0; i < panels; ++i) {
    const int64_t at = block + NB * (backwards ? panels - 1 - i : i);
    const int64_t next = i + 1 == panels ? -1 : backwards ? at - NB : at + NB;
    const auto panel = b.template panel<G, NB>(at, depth);
    for (int64_t row = 0, tile = 0; tile < tiles; ++tile) {
      const int64_t height = next_height(rows - row, tiles - tile);
      Fetch fetch = {nullptr, 0};
      if (far && next >= 0) fetch = b.template ahead<G, NB>(next, depth, tile);
      if (fetch.step == 0) fetch = fetcher.take(depth, panel.b);
      if constexpr (kIsInitProduct<Init>) init.template plan<NB, G>(at, next, tile);
      run_rows<kMaxRows, NB, G, kStrided, S>(height, a_row, row, at, panel, segments, fetch, init, finish, all_k);
      row += height;
    }
  }
  return block + panels * NB;
}

/// The blocks [block, blocks) of a product of one gate, in panels as wide as can be. Not one block alone, if that can
/// be helped: so few sums wait for each other, and need as many loads.
template <bool kStrided, class S, class Row, class AnyB, class AnySegments, class Init, class Finish>
ALWAYS_INLINE void run_panels(int64_t rows, int64_t block, int64_t blocks, bool backwards, const Row& a_row,
                              const AnyB& b, const AnySegments& segments, const Init& init, const Finish& finish,
                              Ahead& ahead) {
  const int64_t left = blocks - block, rest = left % 4 == 1 && left > 4 ? 5 : left % 4;
  const auto run = [&]<int NB>(int64_t end) ALWAYS_INLINE_LAMBDA {
    block = run_blocks<NB, 1, kStrided, S>(rows, block, end, backwards, a_row, b, segments, init, finish, ahead);
  };
  run.template operator()<4>(blocks - rest);
  run.template operator()<3>(blocks);
  run.template operator()<2>(blocks);
  run.template operator()<1>(blocks);
}

template <int G, class S, class AnySegments, class Init, class Finish, class Side>
ALWAYS_INLINE void row_product(const RowProduct<S, AnySegments>& p, int64_t block, int64_t blocks, const Init& init,
                               const Finish& finish, bool tail, Side* side) {
  vector_row_product<G>(p, block, blocks, init, finish, tail, side);
}

/// For rows 0..rows-1 and the blocks [block, blocks) of B: acc[B * G] = init(Patch<1, B>), acc += A row . B blocks,
/// finish(Patch<R, B>, sums), which are a Wide of the patch's places for each of the G gates. `tail`: the last of these
/// blocks is one. One row alone takes tiles of `side` along, as many as there are. Where `init` is a product there are
/// several rows, and no tail.
///
/// a_row(row) points at the row's factor k = 0. kStrided: segments.stride counts, else it is 1.
template <int G, class S, bool kStrided = false, class Row, class AnySegments, class Init, class Finish,
          class Side = NoSideTiles>
ALWAYS_INLINE void product(int64_t rows, int64_t block, int64_t blocks, Order order, const Row& a_row, PackedB<S> b,
                           const AnySegments& segments, const Init& init, const Finish& finish, bool tail = false,
                           Side* side = nullptr, Ahead ahead = {}) {
  if constexpr (!kStrided && !kIsInitProduct<Init>) {
    if (order == Order::kRow || order == Order::kRowBackwards) {
      const RowProduct<S, AnySegments> row = {a_row(0), b.b, segments, order == Order::kRowBackwards};
      return vector_row_product<G>(row, block, blocks, init, finish, tail, side);
    }
  }
  const bool backwards = order == Order::kRowsBackwards;
  if constexpr (G == 1) {
    run_panels<kStrided, S>(rows, block, blocks, backwards, a_row, b, segments, init, finish, ahead);
  } else {
    // A sum waits for the one before, so that a tile wants as many as can be begun meanwhile: few rows take two blocks
    // (Zen 5: 3 to 34 % faster; with more sums than these GRU and LSTM are slower, whose weights come in two streams).
    constexpr int kEnough = kPack<S> > 1 && !kWidens<S> ? 12 : 8, kFewest = (kEnough - 1) / G;
    if constexpr (kFewest > 1) {
      if (rows <= kFewest)
        block = run_blocks<2, G, kStrided, S, kFewest>(rows, block, blocks - tail, backwards, a_row, b, segments, init,
                                                       finish, ahead);
    }
    run_blocks<1, G, kStrided, S>(rows, block, blocks - tail, backwards, a_row, b, segments, init, finish, ahead);
  }
  if constexpr (G > 1 && !kIsInitProduct<Init>) {
    if (!tail) return;
    const auto run = [&](const Element<S>* b, const auto& init, const auto& finish) ALWAYS_INLINE_LAMBDA {
      Ahead nothing;
      run_blocks<1, 1, kStrided, S>(rows, blocks - 1, blocks, backwards, a_row, PackedB<S>(b), segments, init, finish,
                                    nothing);
    };
    run_tail<G, S>(blocks - 1, b.b, segments.size(), init, finish, run);
  }
}

/// The same of one gate and strided, with a B as it lies.
template <class S, class Row, class AnySegments, class Init, class Finish>
ALWAYS_INLINE void product_as_it_lies(int64_t rows, int64_t block, int64_t blocks, const Row& a_row,
                                      const PlainB<Element<S>>& b, const AnySegments& segments, const Init& init,
                                      const Finish& finish) {
  Ahead nothing;
  run_panels<true, S>(rows, block, blocks, false, a_row, b, segments, init, finish, nothing);
}
