// What matrix products by vectors and by tiles of AMX have in common: what they read, which is B in panels of a few
// vectors for each k, packed from weights or as it lies, and what is to be multiplied first; the tail; and one row.
//
// B is packed in blocks of G vectors: [block][k][G][lanes], but for a tail; k counts elements, see Element.

/// What a tile fetches for later: a line, or part of one, with each k; by amx_product.inl lines with each 16.
struct Fetch {
  const char* at;
  int64_t step;  // 0: the same line again and again, which costs nothing that could be measured on a Xeon; by
                 // amx_product.inl none
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

/// An `init` of product() that is a product itself: acc = begin(patch), acc += row(row) . blocks of its own B, and
/// between(patch, acc) before the other product is added.
template <class S, class Begin, class Row, class Between>
struct InitProduct {
  using E = Element<S>;
  const Begin& begin;
  const Row& row;
  const Between& between;
  const E* b;  // [gate][block][k][lanes]
  int64_t gate_stride;
  OneSegment segments;
  mutable Ahead ahead;
  mutable Fetcher fetcher = {};
  mutable bool fetches_panels = false;
  mutable Fetch fetch = {nullptr, 0};  // of the tile that runs next

  int64_t block_stride() const { return segments.length * kLanes<E>; }

  /// Before so many panels of so many tiles each. The first tiles of a panel fetch the next one (measured on Zen 4: an
  /// LSTM of 64 rows and 512 units 1.03 times as fast, of fewer the same), the others what is ahead.
  template <int NB, int G>
  void start(int64_t panels, int64_t tiles) const {
    constexpr int64_t kLeast = 3 << 19;
    const int64_t bytes = panels * NB * G * block_stride() * int64_t(sizeof(E));
    fetches_panels = bytes > larger(kLeast, tuning().fetched_bytes);
    const int64_t fetching = fetches_panels ? (panels - 1) * smaller(NB * G, tiles) : 0;
    fetcher = Fetcher(ahead, (panels * tiles - fetching) * segments.length);
    ahead = {};
  }

  /// What tile number `tile` of the panel at `block` is to fetch; the panel at `next` comes after it, if not negative.
  template <int NB, int G>
  ALWAYS_INLINE void plan(int64_t block, int64_t next, int64_t tile) const {
    if (fetches_panels && next >= 0 && tile < NB * G) {
      const E* from = b + tile % G * gate_stride + (next + tile / G) * block_stride();
      fetch = {reinterpret_cast<const char*>(from), kLanes<E> * int64_t(sizeof(E))};
    } else {
      fetch = fetcher.take(segments.length, b + block * block_stride());
    }
  }

  template <int G>
  ALWAYS_INLINE PanelByGate<G, E> panel(int64_t block) const {
    return {b + block * block_stride(), block_stride(), gate_stride};
  }

  template <int B>
  ALWAYS_INLINE void operator()(Patch<1, B> at, Vec<Compute<S>>* acc) const {
    begin(at, acc);
  }
};
template <class Init>
constexpr bool kIsInitProduct = false;
template <class S, class Begin, class Row, class Between>
constexpr bool kIsInitProduct<InitProduct<S, Begin, Row, Between>> = true;

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

/// product() of one row, by vectors.
template <int G, class S, class AnySegments, class Init, class Finish, class Side>
ALWAYS_INLINE void vector_row_product(const RowProduct<S, AnySegments>& p, int64_t block, int64_t blocks,
                                      const Init& init, const Finish& finish, bool tail, Side* side) {
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
