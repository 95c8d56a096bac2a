// What the products of product.inl and row.inl have in common: how they walk, and what becomes of a finished tile.

ALWAYS_INLINE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
ALWAYS_INLINE constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/// How many whole units there are in `count`, which is not negative: the compiler need not ask.
template <int Unit>
ALWAYS_INLINE constexpr int64_t in_units_of(int64_t count) {
  return int64_t(uint64_t(count) / Unit);
}

/// In a chain of n additions, roundings grow like n. The one of a product of more k is cut into pieces of so many: each
/// begins with zeros, and what came before is added after it. (512 inputs and units: half the error.) One row sums in
/// several chains, each of which may be as long. Tiles of product.inl and of side.inl are cut at the same k, as one
/// stands for the other. Sums over lanes (dot_tile) are short as they are. Counted in elements, of which one that is
/// widened to two registers is added twice.
template <class S>
constexpr int64_t kLongestChain = 256 / kOperandRegisters<S>;

/// How a product walks its tiles. Walking every other step's blocks backwards finds what the step before read last
/// still in the cache. One row alone sums in another order than the same row in a tile and, since its k are walked
/// backwards too, in yet another backwards: so the caller decides by numbers that do not depend on threads.
enum class Order { kRows, kRowsBackwards, kRow, kRowBackwards };

inline bool is_backwards(int64_t t) { return t & 1; }

inline Order step_order(int64_t rows, int64_t t) {
  if (rows != 1) return is_backwards(t) ? Order::kRowsBackwards : Order::kRows;
  return is_backwards(t) ? Order::kRowBackwards : Order::kRow;
}

/// Up to four stretches of A's columns, one after another in k (gates whose slots do not follow each other).
struct Segments {
  int count = 1;
  int64_t length = 0;  // of each
  int64_t offset[4] = {0, 0, 0, 0};
  int64_t stride = 1;  // between consecutive k in A

  int64_t size() const { return count * length; }

  /// Makes one stretch of those that follow each other.
  void join() {
    for (int s = 1; s < count; ++s)
      if (offset[s] != offset[s - 1] + length) return;
    length *= count;
    count = 1;
  }

  /// Undoes that, of so many.
  void part(int stretches) {
    if (count > 1) return;
    length /= stretches;
    for (int s = 1; s < stretches; ++s) offset[s] = offset[0] + s * length;
    count = stretches;
  }
};

/// All of A's columns, of which the compiler knows that they are one stretch.
struct OneSegment {
  static constexpr int count = 1;
  int64_t length = 0;
  static constexpr int64_t offset[1] = {0};
  static constexpr int64_t stride = 1;

  int64_t size() const { return length; }
};

/// Any number of equally long stretches of k that follow each other in A. What they are for: B has a gap after each.
struct EvenSegments {
  int count;
  int64_t length, stride;
  struct Offsets {
    int64_t distance;
    int64_t operator[](int s) const { return s * distance; }
  } offset = {length * stride};

  int64_t size() const { return count * length; }
};

/// Blocks of hidden units or of columns.
struct UnitBlocks {
  int64_t first, last;
};

/// Some blocks of units of some rows that follow each other: a tile, or a part of one.
template <int R, int B>
struct Patch {
  int64_t row, block;  // the first of each

  /// Calls fn(row, block, i) for its places, i counting them row by row.
  template <class Fn>
  ALWAYS_INLINE void each(const Fn& fn) const {
#pragma GCC unroll 8
    for (int i = 0; i < R * B; ++i) fn(row + i / B, block + i % B, i);
  }
};

/// Marks a function for finished tiles that runs a cell: so much code that it is not repeated for each part of a tile.
/// A cell that is called, not inlined, is compiled once for tiles of all heights: a fifth less code, at the same speed
/// but for small layers (measured: their training is up to 1 % slower, forward of plain cells would be 1 to 3 %).
template <class Fn>
struct Cellwise : Fn {};
template <class Fn>
Cellwise(Fn) -> Cellwise<Fn>;
template <class Fn>
constexpr bool kIsCellwise = false;
template <class Fn>
constexpr bool kIsCellwise<Cellwise<Fn>> = true;

/// The most places a cell is run for at once: as many as fill the latency of its instructions (measured).
constexpr int kMostCells = 4;

template <int R, int B, int G, class V, class Finish>
ALWAYS_INLINE void finish_patch(int64_t row, int64_t block, const V (*sums)[G], const Finish& finish) {
  Wide<std::remove_cvref_t<decltype(sums[0][0][0])>, R * B> sum[G];
#pragma GCC unroll 8
  for (int i = 0; i < R * B; ++i) {
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) sum[g].part[i] = sums[i][g];
  }
  finish(Patch<R, B>{row, block}, sum);
}

/// Finishes a tile of R rows by B blocks, whole rows at a time, so that what a row needs is found once.
template <int R, int B, int G, class V, class Finish>
ALWAYS_INLINE void finish_tile(int64_t row, int64_t block, const V (&sums)[R * B][G], const Finish& finish) {
  static_assert(B <= kMostCells);
  if constexpr (!kIsCellwise<Finish>) {
#pragma GCC unroll 8
    for (int m = 0; m < R; ++m) finish_patch<1, B, G>(row + m, block, sums + m * B, finish);
  } else {
    constexpr int kMost = kMostCells / B, kTimes = (R + kMost - 1) / kMost, kRows = (R + kTimes - 1) / kTimes;
    constexpr int kRest = R % kRows;
#pragma GCC unroll 1
    for (int m = 0; m + kRows <= R; m += kRows) finish_patch<kRows, B, G>(row + m, block, sums + m * B, finish);
    if constexpr (kRest > 0) finish_patch<kRest, B, G>(row + R - kRest, block, sums + (R - kRest) * B, finish);
  }
}
