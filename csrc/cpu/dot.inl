// Products with a weight as it lies, along its rows.

/// Memory of which every step of a product fetches so many bytes to the second-level cache, each line once.
struct FetchAlong {
  const char* at;
  int64_t step;

  ALWAYS_INLINE void go_on() {
    const char* const end = at + step;
    for (at += -reinterpret_cast<uintptr_t>(at) % 64; at < end; at += 64) __builtin_prefetch(at, 0, 2);
    at = end;
  }
};

/// Rows of A that dot_rows() multiplies a row of W by while that is in a register.
template <class T>
constexpr int kDotRows = RNN_EXT_VECTOR_REGISTERS < 32 || kLanes<T> < 4 ? 2 : 4;

/// Some rows of W times X rows of A, as many sums as a vector has lanes: in lane x * (lanes / X) + i that of row i of W
/// and row x of A. Its order of summation depends on `depth` alone. Fetches along what is multiplied next. `near`: W
/// fits the second-level cache.
template <int X, class T, class S>
ALWAYS_INLINE Vec<T> dot_tile(const S* const (&w)[kLanes<T> / X], const S* const (&a)[X], int64_t depth, bool near,
                              FetchAlong& fetch) {
  constexpr int n = kLanes<T>, R = n / X;
  Vec<T> acc[n] = {};
  int64_t k = 0;
  if constexpr (X == 1 && std::is_same_v<S, T>) {
    // One row waits for W, whose lines come faster from there where several of a row follow each other (Zen 5, 64 KiB
    // to 1 MiB: 1.06 to 1.2 times as fast; from beyond 0.9 to 1.0).
    constexpr int kLines = RNN_EXT_VECTOR_REGISTERS / 4;
    for (; near && k + kLines * n <= depth; k += kLines * n) {
#pragma GCC unroll 4
      for (int v = 0; v < kLines; v += 2) fetch.go_on();
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < kLines; ++v) acc[i] = fma(load(a[0] + k + v * n), load(w[i] + k + v * n), acc[i]);
      }
    }
  }
  for (; k + 2 * n <= depth; k += 2 * n) {
    fetch.go_on();
    Vec<T> v[X][2], row[2];
#pragma GCC unroll 4
    for (int x = 0; x < X; ++x) load_two(a[x] + k, v[x][0], v[x][1]);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      load_two(w[i] + k, row[0], row[1]);
#pragma GCC unroll 4
      for (int x = 0; x < X; ++x) acc[x * R + i] = fma(v[x][1], row[1], fma(v[x][0], row[0], acc[x * R + i]));
    }
  }
  for (; k < depth; k += n) {
    Vec<T> v[X];
#pragma GCC unroll 4
    for (int x = 0; x < X; ++x) v[x] = load_part(a[x] + k, depth - k);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const Vec<T> row = load_part(w[i] + k, depth - k);
#pragma GCC unroll 4
      for (int x = 0; x < X; ++x) acc[x * R + i] = fma(v[x], row, acc[x * R + i]);
    }
  }
  return sums_of_lanes<T>(acc);
}

/// As many rows of W as a vector has lanes, times X rows of A.
template <int X, class T, class S>
NO_INLINE void dot_block(T* const* out, const T* init, const S* const (&w)[kLanes<T>], int64_t depth,
                         const S* const* a_rows, int64_t unit, bool near, FetchAlong& fetch) {
  constexpr int n = kLanes<T>, R = n / X;
  const S* a[X];
#pragma GCC unroll 4
  for (int x = 0; x < X; ++x) a[x] = a_rows[x];
  alignas(64) T sums[X][n], tile[n];
#pragma GCC unroll 1
  for (int at = 0; at < n; at += R) {
    const S* part[R];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) part[i] = w[at + i];
    store(tile, dot_tile<X, T>(part, a, depth, near, fetch));
#pragma GCC unroll 4
    for (int x = 0; x < X; ++x) std::memcpy(sums[x] + at, tile + x * R, R * sizeof(T));
  }
  const Vec<T> from = init ? load(init + unit) : Vec<T>{};
#pragma GCC unroll 4
  for (int x = 0; x < X; ++x) store(out[x] + unit, from + load(sums[x]));
}

/// out[r][m] = init[m] + W[m] . a[r] for the rows m of W [M, K] as it is: for so few rows of A that packing W would not
/// pay. out and init are padded to whole vectors; init may be null.
template <class T, class S>
void dot_rows(int64_t count, T* const* out, const T* init, const S* weight, int64_t rows, int64_t depth,
              const S* const* a) {
  constexpr int n = kLanes<T>;
  // While the last rows of W are multiplied by one row of A after another, the next come from beyond the second-level
  // cache (Xeon: 8 to 30 % off). Where there are too few for that, the hardware fetches as well.
  const int64_t steps = larger(1, count * (depth / (2 * n)));
  const bool near = rows * depth * int64_t(sizeof(S)) <= 1024 * 1024;
  for (int64_t m = 0; m < rows; m += n) {
    const S* w[n];
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) w[i] = weight + smaller(m + i, rows - 1) * depth;
    FetchAlong next = {nullptr, 0};
    if (count > kDotRows<T> && m + n < rows) {
      next.at = reinterpret_cast<const char*>(weight + (m + n) * depth);
      next.step = (smaller(n, rows - m - n) * depth * int64_t(sizeof(S)) + steps - 1) / steps;
    }
    int64_t r = 0;
    for (; r + kDotRows<T> <= count; r += kDotRows<T>)
      dot_block<kDotRows<T>>(out + r, init, w, depth, a + r, m, near, next);
    if constexpr (kDotRows<T> > 2) {
      for (; r + 2 <= count; r += 2) dot_block<2>(out + r, init, w, depth, a + r, m, near, next);
    }
    for (; r < count; ++r) dot_block<1>(out + r, init, w, depth, a + r, m, near, next);
  }
}
