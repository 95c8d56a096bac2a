// One row times B: a step of a single sequence. As long as it multiplies, its product waits for weights to come from
// the cache and for the step before it. It can take along the tiles of another product meanwhile, one that is ready:
// the side product.

/// Bytes of weights that the first-level cache keeps beside what else a step reads.
constexpr int64_t kFirstCacheWeights = 32 * 1024;

/// Blocks of a tile of one row: few enough vectors to leave registers for a tile of a side product of as many.
template <int G>
constexpr int kRowBlocks = G == 1                                    ? 4
                           : G == 4 && RNN_EXT_VECTOR_REGISTERS < 32 ? 1
                                                                     : 2;

/// Rows of a side product's tile: at least as many multiply-adds as the tile it goes with has, and as many rows as
/// there are registers for, which need the same weights (measured).
template <int G>
constexpr int kSideRows = RNN_EXT_VECTOR_REGISTERS < 32 ? kRowBlocks<G> * G : 8;
/// Whether tiles of one row multiply so little with each k that a side tile may go on after every other k only, if
/// that is enough for all of them. (Measured on Zen 4: RNNs are 1 to 2 % faster than with some steps that take twice as
/// much along, and others nothing.)
template <int G>
constexpr bool kSparseSide = 2 * kRowBlocks<G> * G <= kSideRows<G>;
/// Tiles of fewer rows read too many weights for what they compute (measured), and none goes beside AMX's. Only float
/// and pairs of bfloat16 have them: double and weights that are widened would be a sixth more to compile.
template <int G, class S>
constexpr bool kSidePays = kSideRows<G> >= 6 && !kHasAmx && (std::is_same_v<S, float> || kPack<S> > 1);

/// The same pointer, but the compiler does not know that: else it would rather keep the distances of a dozen places
/// from each other in registers than add to one pointer, and there are not so many registers.
template <class E>
ALWAYS_INLINE const E* opaque(const E* p) {
  asm("" : "+r"(p));
  return p;
}

/// A row of A and what it is multiplied with.
template <class S, class AnySegments>
struct RowProduct {
  using Storage = S;
  const Factor<S>* a;
  const Element<S>* b;
  AnySegments segments;
  bool backwards;  // see Order

  template <int G>
  int64_t block_stride() const {
    return segments.size() * G * kLanes<Element<S>>;
  }

  /// Asks for the weights that a tile of NB blocks begins with: they come while a cell is run, and tell the processor
  /// what to fetch on its own. (Measured on Zen 4 for two k: LSTMs and GRUs of 64 units 3 % faster, of 128 2 %, of 256
  /// 0 to 1 %, RNNs the same; for one k or for eight less.)
  template <bool kBackwards, int NB, int G>
  ALWAYS_INLINE void fetch_tile(int64_t block) const {
    constexpr int kElements = 2 * G * kLanes<Element<S>>, kLine = 64 / int(sizeof(Element<S>));
    const int64_t stride = block_stride<G>();
    const Element<S>* at = b + block * stride + (kBackwards ? larger(stride - kElements, 0) : 0);
#pragma GCC unroll 4
    for (int i = 0; i < NB; ++i, at += stride) {
#pragma GCC unroll 8
      for (int e = 0; e < kElements; e += kLine) __builtin_prefetch(at + e);
    }
  }
};

/// Adds the first `Count` sets up into set 0, in pairs: the next step waits for as few additions as can be.
template <int Count, int KU, int N, class V>
ALWAYS_INLINE void add_up(V (&sets)[KU][N]) {
  if constexpr (Count > 1) {
#pragma GCC unroll 16
    for (int i = 0; i < Count / 2 * N; ++i) sets[i / N][i % N] += sets[Count / 2 + i / N][i % N];
    add_up<Count / 2>(sets);
  }
}

// As of Chain in product.inl.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

/// How many k the loop over a row takes at a time, as far as there are so many. (Zen 5, 16 instead of 4: RNNs of 128 to
/// 512 units are 2 to 15 % faster, smaller ones the same; LSTMs 1 to 3 % faster, or with tiles beside them between 5 %
/// faster and 3 % slower; GRUs 1 to 9 % slower. With AVX2 RNNs are 0 to 2 % faster, LSTMs 2 to 8 % slower.)
template <int Sums, bool kSide>
constexpr int kLoopLength = RNN_EXT_VECTOR_REGISTERS >= 32 && (Sums <= 4 || (Sums == 8 && !kSide)) ? 16 : 4;

/// Few accumulators do not hide the latency of an addition, so k is dealt out over KU sets of them. Backwards means
/// line by line: only what is read in the reverse of the order before finds all that the cache still has. The sums are
/// the same with and without a tile beside them.
template <bool kBackwards, int KU, int NB, int G, class S, class AnySegments, class Tile>
ALWAYS_INLINE void multiply_add_row(Vec<Compute<S>> (&acc)[NB * G], const Factor<S>* a, const Element<S>* b,
                                    int64_t block_stride, const AnySegments& segments, Tile& side) {
  using T = Compute<S>;
  using Op = Operand<S>;
  constexpr bool kSide = !std::is_same_v<Tile, NoSideTile>;
  constexpr int n = kLanes<Element<S>>;
  constexpr int kLeast = int(larger(KU, 4)), kMost = int(larger(KU, kLoopLength<NB * G, kSide>));
  // Where each x is multiplied often, its load does not count (measured: nothing, or a little slower).
  constexpr bool kSpread = kSpreads<S> && Tile::kLoadsAreShort && NB * G <= 4;
  constexpr int64_t kLongest = KU * kLongestChain<S>;
  const bool cuts = segments.size() > kLongest;
  T before[NB * G][kLanes<T>];  // what has been cut off
  Vec<T> part[KU][NB * G] = {};
#pragma GCC unroll 16
  for (int v = 0; v < NB * G; ++v) {
    if (cuts) {
      store(before[v], acc[v]);
    } else {
      part[0][v] = acc[v];
    }
  }
  int64_t left = kLongest;  // k until the chain is cut
  const auto cut = [&]() ALWAYS_INLINE_LAMBDA {
    add_up<KU>(part);
#pragma GCC unroll 16
    for (int v = 0; v < NB * G; ++v) store(before[v], load(before[v]) + part[0][v]);
#pragma GCC unroll 16
    for (int i = 0; i < KU * NB * G; ++i) part[i / (NB * G)][i % (NB * G)] = Vec<T>{};
    left = kLongest;
  };
  const int64_t length = segments.length, whole = in_units_of<kLeast>(length) * kLeast;
  for (int i = 0; i < segments.count; ++i) {
    const int s = kBackwards ? segments.count - 1 - i : i;
    const Factor<S>* row = a + segments.offset[s];
    const Element<S>* w = b + s * length * G * n;
    const auto rest = [&]() ALWAYS_INLINE_LAMBDA {
      for (int64_t k = whole; k < length; ++k) {
        const auto x = Op::broadcast(row[k]);
#pragma GCC unroll 16
        for (int v = 0; v < NB * G; ++v)
          part[0][v] = Op::multiply_add(x, Op::load(w + (v / G) * block_stride + (k * G + v % G) * n), part[0][v]);
      }
    };
    int64_t done = 0;
    const auto walk = [&]<bool kWithSide, int kAtOnce>(int64_t end) ALWAYS_INLINE_LAMBDA {
      for (; done + kAtOnce <= end; done += kAtOnce) {
        const int64_t k = kBackwards ? whole - kAtOnce - done : done;
        const Factor<S>* x_k = row + k;
        const Element<S>* w_k[NB] = {w + k * G * n};
#pragma GCC unroll 4
        for (int v = 1; v < NB; ++v) w_k[v] = opaque(w_k[v - 1] + block_stride);
#pragma GCC unroll 4
        for (int first = 0; first < kAtOnce; first += 4) {
          const int from = kBackwards ? kAtOnce - 4 - first : first;
          const Four<S, kSpread> x(x_k + from);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            const int of_four = kBackwards ? 3 - i : i, u = from + of_four;
#pragma GCC unroll 16
            for (int j = 0; j < NB * G; ++j) {
              const int v = kBackwards ? NB * G - 1 - j : j;
              auto& sum = part[u % KU][v];
              sum = Op::multiply_add(x[of_four], Op::load(w_k[v / G] + (u * G + v % G) * n), sum);
            }
            if (kWithSide && i % Tile::kEvery == Tile::kEvery - 1) side.multiply_add();
          }
        }
      }
    };
    const auto walk_to = [&]<bool kWithSide>(int64_t end) ALWAYS_INLINE_LAMBDA {
      walk.template operator()<kWithSide, kMost>(end);
      if constexpr (kMost > kLeast) walk.template operator()<kWithSide, kLeast>(end);
    };
    if (kBackwards) rest();
    for (int64_t begin = 0; done < whole; left -= done - begin, begin = done) {
      if (left == 0) cut();
      const int64_t end = smaller(whole, done + left);
      if constexpr (kSide) {
        if (const int64_t of_side = side.left()) {
          constexpr int kOfSide = kLeast / Tile::kEvery;
          const int64_t times = smaller(in_units_of<kLeast>(end - done), in_units_of<kOfSide>(of_side));
          walk_to.template operator()<true>(done + times * kLeast);
          if (times == 0) side.multiply_add();
          side.pass(larger(times * kOfSide, 1));
          continue;
        }
      }
      walk_to.template operator()<false>(end);
    }
    if (!kBackwards) rest();
  }
  add_up<KU>(part);
#pragma GCC unroll 16
  for (int v = 0; v < NB * G; ++v) acc[v] = part[0][v];
  if (cuts) {
#pragma GCC unroll 16
    for (int v = 0; v < NB * G; ++v) acc[v] += load(before[v]);
  }
  if constexpr (kSide) side.put_aside();
}

#pragma GCC diagnostic pop

/// Sets of accumulators for so many sums: enough that two additions can be begun a cycle, where there are registers.
/// (Zen 5: a GRU of one sequence and 32 or 64 units is 10 to 13 % faster with twelve sums than with six, or 2 to 3 %
/// with as many inputs; larger ones are as fast.)
constexpr int sets_of(int sums) {
  constexpr int kEnough = 8;
  int sets = 1;
  while (sets * sums < kEnough) sets *= 2;
  return RNN_EXT_VECTOR_REGISTERS < 32 && sets * sums > kEnough ? sets / 2 : sets;
}

/// The sums of NB blocks.
template <bool kBackwards, int NB, int G, class Product, class Tile>
ALWAYS_INLINE void multiply_tile(const Product& p, int64_t block, Vec<Compute<typename Product::Storage>> (*sums)[G],
                                 const auto& init, Tile& side) {
  using S = typename Product::Storage;
  constexpr int kSets = sets_of(NB * G);
  const int64_t stride = p.template block_stride<G>();
  const Element<S>* b = p.b + block * stride;
  Vec<Compute<S>> acc[NB * G];
  init(Patch<1, NB>{0, block}, acc);
  multiply_add_row<kBackwards, kSets, NB, G, S>(acc, p.a, b, stride, p.segments, side);
#pragma GCC unroll 16
  for (int v = 0; v < NB * G; ++v) sums[v / G][v % G] = acc[v];
}

/// `Tiles` of NB blocks one after another before a cell is run for all of them. `next`: the first block of the tile
/// after them, -1: there is none, or its weights need not be asked for.
template <bool kBackwards, int Tiles, int NB, int G, class Product, class Init, class Finish>
NO_INLINE void run_row(const Product& p, int64_t first_block, int64_t next, const Init& init, const Finish& finish) {
  Vec<Compute<typename Product::Storage>> sums[Tiles * NB][G];
#pragma GCC unroll 1
  for (int i = 0; i < Tiles; ++i) {
    const int tile = NB * (kBackwards ? Tiles - 1 - i : i);
    NoSideTile none;
    multiply_tile<kBackwards, NB, G>(p, first_block + tile, sums + tile, init, none);
  }
  if (next >= 0) p.template fetch_tile<kBackwards, NB, G>(next);
  finish_tile<1, Tiles * NB, G>(0, first_block, sums, finish);
}

/// One tile of NB blocks, with tiles of side products.
template <bool kBackwards, int NB, int G, class Tile, class Product, class Init, class Finish, class Side>
NO_INLINE void run_row_beside(const Product& p, int64_t first_block, int64_t next, const Init& init,
                              const Finish& finish, Side& side) {
  Vec<Compute<typename Product::Storage>> sums[NB][G];
  Tile tile(side);
  multiply_tile<kBackwards, NB, G>(p, first_block, sums, init, tile);
  if (next >= 0) p.template fetch_tile<kBackwards, NB, G>(next);
  finish_tile<1, NB, G>(0, first_block, sums, finish);
}

/// So many tiles from a block on.
template <bool kBackwards, int Tiles, int NB, int G, class Product, class Init, class Finish, class Side>
ALWAYS_INLINE void run_row_tiles(const Product& p, int64_t block, int64_t tiles, const Init& init, const Finish& finish,
                                 Side* side) {
  const int64_t groups = in_units_of<Tiles>(tiles);
  const auto rest = [&] {
    if constexpr (Tiles > 1)
      run_row_tiles<kBackwards, Tiles / 2, NB, G>(p, block + groups * Tiles * NB, tiles - groups * Tiles, init, finish,
                                                  side);
  };
  if (kBackwards) rest();
  for (int64_t i = 0; i < groups; ++i) {
    const int64_t at = block + Tiles * NB * (kBackwards ? groups - 1 - i : i);
    const int64_t next = Tiles > 1 || i + 1 == groups ? -1 : at + (kBackwards ? -NB : NB);
    if constexpr (Tiles == 1 && !std::is_same_v<Side, NoSideTiles>) {
      if (side && side->more()) {
        const auto beside = [&]<class Tile>() {
          run_row_beside<kBackwards, NB, G, Tile>(p, at, next, init, finish, *side);
        };
        if constexpr (kSparseSide<G> && NB == kRowBlocks<G>) {
          if (side->sparse()) {
            with_side_tile<2>(*side, beside);
            continue;
          }
        }
        with_side_tile<1>(*side, beside);
        continue;
      }
    }
    run_row<kBackwards, Tiles, NB, G>(p, at, next, init, finish);
  }
  if (!kBackwards) rest();
}

/// The blocks [block, blocks), in tiles as wide as can be.
template <bool kBackwards, int NB, int G, class Product, class Init, class Finish, class Side>
ALWAYS_INLINE void walk_row_blocks(const Product& p, int64_t block, int64_t blocks, const Init& init,
                                   const Finish& finish, Side* side) {
  const int64_t tiles = in_units_of<NB>(blocks - block);
  // Weights from beyond the first cache come while a cell is run, if it is run for one tile at a time (measured).
  constexpr int kTiles = kIsCellwise<Finish> && G > 1 ? kMostCells / NB : 1;
  bool together = kTiles > 1 && tiles * NB * p.template block_stride<G>() * int64_t(sizeof(*p.b)) <= kFirstCacheWeights;
  if constexpr (!std::is_same_v<Side, NoSideTiles>) together = together && !(side && side->more());
  if (together) {
    run_row_tiles<kBackwards, kTiles, NB, G>(p, block, tiles, init, finish, side);
  } else {
    run_row_tiles<kBackwards, 1, NB, G>(p, block, tiles, init, finish, side);
  }
  if constexpr (NB > 1) walk_row_blocks<kBackwards, NB / 2, G>(p, block + tiles * NB, blocks, init, finish, side);
}

/// The direction is known to everything below, whose loops are 1 to 4 % faster for it (measured on Zen 4).
template <int NB, int G, class Product, class Init, class Finish, class Side>
ALWAYS_INLINE void run_row_blocks(const Product& p, int64_t block, int64_t blocks, const Init& init,
                                  const Finish& finish, Side* side) {
  if (p.backwards) {
    walk_row_blocks<true, NB, G>(p, block, blocks, init, finish, side);
  } else {
    walk_row_blocks<false, NB, G>(p, block, blocks, init, finish, side);
  }
}
