// The one matrix product everything rests on: a register tile of MR rows x NB blocks of columns, with whatever should
// happen to the finished tile (store it, run a cell) inlined behind it.
//
// B is packed in blocks of G vectors: [block][k][G][lanes], but for a tail. A is read factor by factor and broadcast;
// k counts elements, see Element.

/// Where consecutive k of A are rows of a matrix, which no hardware prefetcher follows: how many k before its use a
/// line is fetched. (Rows of B are several lines, and fetching them gained nothing.) Of few rows most of that would lie
/// behind them, where it costs a look at the page table each time.
constexpr int64_t kAhead = 24, kFewestAhead = 4 * kAhead;

/// What a tile fetches for later: a line, or part of one, with each k.
struct Fetch {
  const char* at;
  int64_t step;  // 0: the same line again and again, which costs nothing that could be measured on a Xeon
};

template <class S>
void pack_gates(Element<S>* out, const S* weight, int64_t gates, int64_t hidden, int64_t depth, int64_t first,
                int64_t last);

/// Memory that the next steps want: it comes to the second-level cache while a product multiplies. None, where it would
/// push out what the product itself has there (measured).
struct Ahead {
  Ahead() = default;
  Ahead(const void* at, int64_t bytes) : at(static_cast<const char*>(at)), bytes(bytes <= 384 * 1024 ? bytes : 0) {}
  const char* at = nullptr;
  int64_t bytes = 0;
};

/// Hands such memory out to the tiles of a product, evenly.
class Fetcher {
 public:
  Fetcher() = default;
  /// `depth`: the k of all tiles.
  Fetcher(Ahead ahead, int64_t depth)
      : at_(ahead.at), step_(depth > 0 ? smaller(64, (ahead.bytes + depth - 1) / depth) : 0) {}

  /// For a tile of so many k. `near`: what it reads anyway.
  ALWAYS_INLINE Fetch take(int64_t depth, const void* near) {
    if (step_ == 0) return {static_cast<const char*>(near), 0};
    const Fetch fetch = {at_, step_};
    at_ += depth * step_;
    return fetch;
  }

 private:
  const char* at_ = nullptr;
  int64_t step_ = 0;
};

/// A tile of fewer rows is busy loading what it multiplies.
constexpr int kFetchingRows = 3;

/// The weights of a tile: of each k a vector for every block and gate. From B as above.
template <int G, class E>
struct Panel {
  const E* b;
  int64_t block_stride;
  ALWAYS_INLINE const E* vector(int v) const { return b + v / G * block_stride + v % G * kLanes<E>; }
  ALWAYS_INLINE void next() { b += G * kLanes<E>; }
};

/// The same from [gate][block][k][lanes].
template <int G, class E>
struct PanelByGate {
  const E* b;
  int64_t block_stride, gate_stride;
  ALWAYS_INLINE const E* vector(int v) const { return b + v / G * block_stride + v % G * gate_stride; }
  ALWAYS_INLINE void next() { b += kLanes<E>; }
};

/// The same from the rows of a matrix as it is, which may have a gap after each segment.
template <class E>
struct PanelOfRows {
  const E* b;
  int64_t stride;
  int64_t gap = 0;
  ALWAYS_INLINE const E* vector(int v) const { return b + v * kLanes<E>; }
  ALWAYS_INLINE void next() { b += stride; }
  ALWAYS_INLINE void end_segment() { b += gap; }
};

/// A weight W [gates * H, K] as it lies, seen as B, whose panels are packed when a product comes to them: one that is
/// the only one to read it would write it to memory and read it again (measured on a Xeon: 32 to 64 rows of 512 units
/// take a fifth less, 256 rows a tenth). It has no tail.
template <class S>
struct UnpackedB {
  static constexpr int kMostVectors = 8;

  const S* weight;
  int64_t hidden, depth;
  int64_t gate_blocks;  // from one gate's first block to the next one's, in a product of one gate
  Element<S>* panel;    // room for so many vectors of each k

  template <int G, int NB>
  NO_INLINE const Element<S>* pack(int64_t block) const {
    static_assert(G * NB <= kMostVectors);
    const int64_t step = G * elements<S>(depth) * kLanes<Element<S>>;
    for (int i = 0; i < NB; ++i) {
      const int64_t gate = gate_of<G>(block + i), of_gate = block + i - gate * gate_blocks;
      pack_gates(panel + i * step, weight + gate * hidden * depth, G, hidden, depth, of_gate, of_gate + 1);
    }
    return panel;
  }

  /// See PackedB::ahead: as many tiles fetch the rows of a gate as these are long.
  template <int G, int NB>
  ALWAYS_INLINE Fetch ahead(int64_t block, int64_t tile) const {
    constexpr int kBytes = NB * kLanes<Compute<S>> * int(sizeof(S)), kStep = kBytes < 64 ? kBytes : 64;
    constexpr int kTiles = kBytes / kStep;
    if (tile >= G * kTiles) return {nullptr, 0};
    const int64_t first = gate_of<G>(block), gate = first + tile / kTiles;
    const S* rows = weight + (gate * hidden + (block - first * gate_blocks) * kLanes<Compute<S>>)*depth;
    return {reinterpret_cast<const char*>(rows) + tile % kTiles * depth * kStep, kStep};
  }

 private:
  template <int G>
  ALWAYS_INLINE int64_t gate_of(int64_t block) const {
    return G == 1 ? block / gate_blocks : 0;
  }
};

/// B, packed as above, or as it goes.
template <class S>
struct PackedB {
  using E = Element<S>;
  PackedB(const E* b, const UnpackedB<S>* unpacked = nullptr) : b(b), unpacked(unpacked) {}
  const E* b;
  const UnpackedB<S>* unpacked;

  template <int G, int NB>
  ALWAYS_INLINE Panel<G, E> panel(int64_t block, int64_t depth) const {
    const int64_t stride = depth * G * kLanes<E>;
    return {unpacked ? unpacked->template pack<G, NB>(block) : b + block * stride, stride};
  }

  /// What tile number `tile` of a panel fetches of the one at `block`, which is next; no step: nothing.
  template <int G, int NB>
  ALWAYS_INLINE Fetch ahead(int64_t block, int64_t depth, int64_t tile) const {
    if (unpacked) return unpacked->template ahead<G, NB>(block, tile);
    constexpr int64_t kLines = (NB * G * kLanes<E> * int64_t(sizeof(E)) + 63) / 64;  // with each k
    if (tile >= kLines) return {nullptr, 0};
    return {reinterpret_cast<const char*>(b + block * depth * G * kLanes<E>) + tile * depth * 64, 64};
  }
};

/// B as it is, with room for whole vectors; its rows lie `stride` elements apart, and `gap` more after each segment.
/// Where there is room for a panel, each is copied there first; then there are no gaps.
template <class E>
struct PlainB {
  const E* b;
  int64_t stride;
  E* room;
  int64_t gap = 0;

  template <int G, int NB>
  ALWAYS_INLINE PanelOfRows<E> panel(int64_t block, int64_t depth) const {
    static_assert(G == 1);
    const E* from = b + block * kLanes<E>;
    if (!room) return {from, stride, gap};
    E* to = room;
    for (int64_t k = 0; k < depth; ++k, from += stride, to += NB * kLanes<E>) {
#pragma GCC unroll 4
      for (int v = 0; v < NB; ++v) std::memcpy(to + v * kLanes<E>, from + v * kLanes<E>, kLanes<E> * sizeof(E));
    }
    return {room, NB * kLanes<E>};
  }

  template <int G, int NB>
  ALWAYS_INLINE Fetch ahead(int64_t, int64_t, int64_t) const {
    return {nullptr, 0};
  }
};

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

/// An `init` of product() that is a product itself: acc = begin(patch), acc += row(row) . blocks of its own B, and
/// between(patch, acc) before the other product is added. Fetches what is `ahead`.
template <class S, class Begin, class Row, class Between>
struct InitProduct {
  const Begin& begin;
  const Row& row;
  const Between& between;
  const Element<S>* b;  // [gate][block][k][lanes]
  int64_t gate_stride;
  OneSegment segments;
  mutable Ahead ahead;
  mutable Fetcher fetcher = {};

  void start(int64_t tiles) const {
    fetcher = Fetcher(ahead, tiles * segments.length);
    ahead = {};
  }

  template <int B>
  ALWAYS_INLINE void operator()(Patch<1, B> at, Vec<Compute<S>>* acc) const {
    begin(at, acc);
  }

  template <int MR, int NB, int G>
  ALWAYS_INLINE void add(Vec<Compute<S>> (&acc)[MR][NB * G], int64_t first_row, int64_t first_block) const {
    const int64_t block_stride = segments.length * kLanes<Element<S>>;
    const PanelByGate<G, Element<S>> panel = {b + first_block * block_stride, block_stride, gate_stride};
    const Factor<S>* a[MR];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) a[m] = row(first_row + m);
    multiply_add<MR, NB, G, false, S>(acc, a, panel, segments, fetcher.take(segments.length, panel.b));
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) between(Patch<1, NB>{first_row + m, first_block}, acc[m]);
  }
};
template <class Init>
constexpr bool kIsInitProduct = false;
template <class S, class Begin, class Row, class Between>
constexpr bool kIsInitProduct<InitProduct<S, Begin, Row, Between>> = true;

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
  if constexpr (kIsInitProduct<Init>) init.template add<MR, NB, G>(acc, first_row, first_block);
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
/// of sums are, see Chain: the bits are those of tiles that sum all k in one go. `next`: the panel after this one, if
/// it is there.
template <int NB, class S, int kMaxRows, class Row, class AnySegments, class Init, class Finish>
NO_INLINE void run_deep_panel(int64_t rows, int64_t tiles, int64_t block, const Row& a_row,
                              const Panel<1, Element<S>>& panel, const Element<S>* next, const AnySegments& segments,
                              const Init& init, const Finish& finish) {
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
          if (then && tile - first < NB && tuning().fetch_panels)
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
/// gates of 2,048 units gained nothing. Not measured: other processors.)
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
  // rows in name only). That is also so of a good part of the cache, beside the input weights (Xeon, 2 MiB: 0 to 3 %
  // less time for 560 to 770 KiB).
  constexpr int64_t kFar = 400 * 1024;
  const bool far = panels * bytes > kFar && tuning().fetch_panels;
  constexpr bool kMayBeDeep = NB == 4 && G == 1 && !kStrided && !kIsInitProduct<Init>;
  if constexpr (kMayBeDeep) {
    if (is_deep<S>(bytes, tiles, segments)) {
      for (int64_t i = 0; i < panels; ++i) {
        const int64_t at = block + NB * (backwards ? panels - 1 - i : i);
        const auto panel = b.template panel<G, NB>(at, depth);
        const bool is_there = !b.unpacked && i + 1 < panels;
        const Element<S>* next = is_there ? panel.b + (backwards ? -NB : NB) * panel.block_stride : nullptr;
        run_deep_panel<NB, S, kMaxRows>(rows, tiles, at, a_row, panel, next, segments, init, finish);
      }
      return block + panels * NB;
    }
  }
  const std::conditional_t<kMayBeDeep, Piece<Compute<S>>, Whole> all_k = {};  // the same tiles as of a deep panel
  Fetcher fetcher(ahead, panels * tiles * depth);
  ahead = {};
  if constexpr (kIsInitProduct<Init>) init.start(panels * tiles);
  for (int64_t i = 0; i < panels; ++i) {
    const int64_t at = block + NB * (backwards ? panels - 1 - i : i);
    const auto panel = b.template panel<G, NB>(at, depth);
    for (int64_t row = 0, tile = 0; tile < tiles; ++tile) {
      const int64_t height = next_height(rows - row, tiles - tile);
      Fetch fetch = {nullptr, 0};
      if (far && i + 1 < panels) fetch = b.template ahead<G, NB>(backwards ? at - NB : at + NB, depth, tile);
      if (fetch.step == 0) fetch = fetcher.take(depth, panel.b);
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

template <class T>
constexpr bool has_tail(int64_t gates, int64_t units) {
  return cpu::has_tail(gates, units, kLanes<T>);
}

/// The tail, block number `block`, by run(b, init, finish): as a product of one gate, whose sums are dealt out to the
/// gates.
template <int G, class S, class Init, class Finish, class Run>
ALWAYS_INLINE void run_tail(int64_t block, const Element<S>* b, int64_t depth, const Init& init, const Finish& finish,
                            const Run& run) {
  using T = Compute<S>;
  using V = Vec<T>;
  const auto nothing = [](Patch<1, 1>, V* acc) { *acc = V{}; };
  const Cellwise deal_out{[&]<int R>(Patch<R, 1> at, const Wide<T, R>* sums) ALWAYS_INLINE_LAMBDA {
    Wide<T, R> all[G];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      V acc[G], sum[G];
      init(Patch<1, 1>{at.row + r, at.block}, acc);
      quarters<G, T>(sums->part[r], sum, std::make_integer_sequence<int, G>());
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) all[g].part[r] = acc[g] + sum[g];
    }
    finish(at, all);
  }};
  // Which are all counted as of one gate now, from where the tail is block number `block`.
  run(b + block * (G - 1) * depth * kLanes<Element<S>>, nothing, deal_out);
}

/// product() of one row.
template <int G, class S, class AnySegments, class Init, class Finish, class Side>
ALWAYS_INLINE void row_product(const RowProduct<S, AnySegments>& p, int64_t block, int64_t blocks, const Init& init,
                               const Finish& finish, bool tail, Side* side) {
  run_row_blocks<kRowBlocks<G>, G>(p, block, blocks - tail, init, finish, side);
  if constexpr (G > 1) {
    if (!tail) return;
    const auto run = [&](const Element<S>* b, const auto& init, const auto& finish) ALWAYS_INLINE_LAMBDA {
      const RowProduct<S, AnySegments> one_gate = {p.a, b, p.segments, p.backwards};
      run_row_blocks<1, 1>(one_gate, blocks - 1, blocks, init, finish, static_cast<NoSideTiles*>(nullptr));
    };
    run_tail<G, S>(blocks - 1, p.b, p.segments.size(), init, finish, run);
  }
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
      return row_product<G>(row, block, blocks, init, finish, tail, side);
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

template <class T>
constexpr int64_t blocks_of(int64_t columns) {
  return (columns + kLanes<T> - 1) / kLanes<T>;
}

/// Pack the tail of a weight W [G*H, K], into [k][lanes].
template <class S>
void pack_tail(Element<S>* out, const S* weight, int64_t gates, int64_t hidden, int64_t depth) {
  constexpr int64_t n = kLanes<Compute<S>>;
  const int64_t packed_depth = elements<S>(depth), first = hidden / n * n;
  std::memset(static_cast<void*>(out), 0, size_t(packed_depth * n) * sizeof(Element<S>));
  S* numbers = reinterpret_cast<S*>(out);
  for (int64_t g = 0; g < gates; ++g) {
    for (int64_t unit = first; unit < hidden; ++unit) {
      const S* from = weight + (g * hidden + unit) * depth;
      const int64_t lane = g * (n / 4) + unit - first;
      for (int64_t k = 0; k < depth; ++k) numbers[(k / kPack<S> * n + lane) * kPack<S> + k % kPack<S>] = from[k];
    }
  }
}

/// Pack the blocks [first, last) of a weight W [G*H, K], seen as B [K, G*H], into [block of units][k][G][lanes]; units
/// past H are zeros, or a tail.
template <class S>
void pack_gates(Element<S>* out, const S* weight, int64_t gates, int64_t hidden, int64_t depth, int64_t first,
                int64_t last) {
  using T = Compute<S>;
  constexpr int n = kLanes<T>;
  const int64_t packed_depth = elements<S>(depth);
  const bool tail = has_tail<T>(gates, hidden) && last == blocks_of<T>(hidden);
  if (tail) pack_tail(out + (last - 1 - first) * packed_depth * gates * n, weight, gates, hidden, depth);
  for (int64_t block = first; block < last - tail; ++block) {
    for (int64_t g = 0; g < gates; ++g) {
      Element<S>* to = out + ((block - first) * packed_depth * gates + g) * n;
      const int64_t unit = block * n;
      const S* from = weight + (g * hidden + unit) * depth;
      for (int64_t k = 0; k < packed_depth; k += n) {
        Vec<T> square[n];
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) {
          const int64_t at = k * kPack<S>;
          square[i] = unit + i < hidden ? Operand<S>::gather(from + i * depth + at, depth - at) : Vec<T>{};
        }
        transpose<T>(square);
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) {
          if (k + i < packed_depth) Operand<S>::store_gathered(to + (k + i) * gates * n, square[i]);
        }
      }
    }
  }
}
