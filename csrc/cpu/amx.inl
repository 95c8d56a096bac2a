// Tiles of AMX: eight registers of up to 16 rows of 64 bytes, and their products of pairs of bfloat16 or fours of 8
// bits.
//
// Intel, "Architecture Instruction Set Extensions Programming Reference", chapter 3. In C += A B row m of C is 16 sums,
// row m of A 16 pairs, and row k of B the k-th pair of each of the 16 columns, as elements of weights are packed. Every
// product sums its even and its odd numbers apart, from zero, and adds the sum of both to C: so the bits of a sum do
// not depend on how many rows a tile has. Subnormal numbers are zeros. The same with fours of integers, whose sums are
// exact.

constexpr int kTileRows = 16, kTilePairs = 16;

/// Numbers of 8 bits that follow each other in k.
struct FourInt8 {
  int8_t numbers[4];
};

/// Tiles 0 to 3 are sums, 4 and 5 A and B of 16 pairs, 6 and 7 of as many as are left.
constexpr int kTileA = 4, kTileB = 5, kLastTileA = 6, kLastTileB = 7, kTileCount = 8;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

#if defined(RNN_EXT_EMULATED_TILES)  // for sanitizers, and processors without
thread_local TileConfig tile_config;
alignas(64) thread_local uint8_t tiles[kTileCount][kTileRows][64];

inline void load_tile_config(const TileConfig& config) {
  tile_config = config;
  std::memset(tiles, 0, sizeof(tiles));
}
inline void release_tiles() { tile_config = TileConfig{}; }
template <int Tile>
void load_tile(const void* from, int64_t stride) {
  std::memset(tiles[Tile], 0, sizeof(tiles[Tile]));
  for (int r = 0; r < tile_config.rows[Tile]; ++r)
    std::memcpy(tiles[Tile][r], static_cast<const char*>(from) + r * stride, tile_config.row_bytes[Tile]);
}
template <int Tile>
void store_tile(void* to, int64_t stride) {
  for (int r = 0; r < tile_config.rows[Tile]; ++r)
    std::memcpy(static_cast<char*>(to) + r * stride, tiles[Tile][r], tile_config.row_bytes[Tile]);
}
template <int Tile>
void zero_tile() {
  std::memset(tiles[Tile], 0, sizeof(tiles[Tile]));
}
template <class E, int C, int A, int B>
void multiply_tiles() {
  const auto byte = [](Int32s fours, int i) { return (fours << (24 - 8 * i)) >> 24; };
  const auto low = [](Int32s pairs) { return (Vec<float>)(pairs << 16); };
  const auto high = [](Int32s pairs) { return (Vec<float>)(pairs & int(0xffff0000)); };
  for (int m = 0; m < tile_config.rows[C]; ++m) {
    Vec<float> even = {}, odd = {};
    Int32s sum = {};
    for (int k = 0; k < tile_config.row_bytes[A] / 4; ++k) {
      int32_t element;
      std::memcpy(&element, tiles[A][m] + 4 * k, sizeof(element));
      const Int32s a = element - Int32s{}, b = *reinterpret_cast<const Int32s*>(tiles[B][k]);
      if constexpr (std::is_same_v<E, Pair>) {
        even = fma(low(a), low(b), even);
        odd = fma(high(a), high(b), odd);
      } else {
        for (int i = 0; i < 4; ++i) sum += byte(a, i) * byte(b, i);
      }
    }
    if constexpr (std::is_same_v<E, Pair>) {
      *reinterpret_cast<Vec<float>*>(tiles[C][m]) += even + odd;
    } else {
      *reinterpret_cast<Int32s*>(tiles[C][m]) += sum;
    }
  }
}
#else
// Not the compilers' intrinsics, which want the number of a tile to be written out.
inline void load_tile_config(const TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }
inline void release_tiles() { asm volatile("tilerelease"); }
template <int Tile>
ALWAYS_INLINE void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(Tile) : "memory");
}
template <int Tile>
ALWAYS_INLINE void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(Tile) : "memory");
}
template <int Tile>
ALWAYS_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(Tile));
}
template <class E, int C, int A, int B>
ALWAYS_INLINE void multiply_tiles() {
  if constexpr (std::is_same_v<E, Pair>) {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  } else {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
}
#endif

/// The tiles of a thread while there is one of these. The outermost shapes them, and leaves none behind: where that is
/// a whole scan, its products do not wait for it (100 ns).
class TileScope {
 public:
  TileScope() : outer_room_(room), outer_left_(left) { ++depth; }
  /// With room for what products copy, where these may not take memory.
  TileScope(const Buffer<Pair>& of_scan, int64_t size) : TileScope() {
    room = of_scan.get();
    left = size;
  }
  ~TileScope() {
    room = outer_room_;
    left = outer_left_;
    if (--depth > 0) return;
    if (rows > 0) release_tiles();
    rows = 0;
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

  /// For so many rows of A, and of k so many as are left of the last 16; 0: none.
  static void shape(int of_rows, int last_k) {
    if (of_rows == rows && (last_k == 0 || last_k == last)) return;
    rows = of_rows;
    if (last_k > 0) last = last_k;
    TileConfig config;
    for (int i = 0; i < kTileCount; ++i) {
      config.rows[i] = uint8_t(i == kTileB ? kTilePairs : i == kLastTileB ? last : rows);
      config.row_bytes[i] = uint16_t(i == kLastTileA ? 4 * last : 64);
    }
    load_tile_config(config);
  }

  /// Some of the room, which is given back in the reverse order; null: there is not so much.
  static Pair* take(int64_t size) {
    if (size > left) return nullptr;
    left -= size;
    return std::exchange(room, room + size);
  }
  static void give(int64_t size) {
    left += size;
    room -= size;
  }

 private:
  static thread_local int depth, rows, last;
  static thread_local Pair* room;
  static thread_local int64_t left;
  Pair* const outer_room_;
  const int64_t outer_left_;
};
thread_local int TileScope::depth = 0, TileScope::rows = 0, TileScope::last = kTilePairs;
thread_local Pair* TileScope::room = nullptr;
thread_local int64_t TileScope::left = 0;
