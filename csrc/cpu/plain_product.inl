// The product C = A B and no more, and B packed from its rows.

/// Pack B [K, columns], whose row k is row(k) (null: zeros), into [block][k][lanes]. Rows are asked for in order.
template <class S, class Row>
void pack_rows(Element<S>* out, Row&& row, int64_t depth, int64_t first_column, int64_t columns) {
  constexpr int n = kLanes<Element<S>>;
  const int64_t blocks = blocks_of<Compute<S>>(columns), packed_depth = elements<S>(depth);
  for (int64_t k = 0; k < packed_depth; ++k) {
    const auto* from = row(k * kPack<S>);
    if constexpr (kPack<S> == 1) {
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t at = block * n;
        const auto v = from ? Operand<S>::gather(from + first_column + at, columns - at) : Vec<Compute<S>>{};
        Operand<S>::store_gathered(out + (block * depth + k) * n, v);
      }
    } else {
      const auto* next = k * kPack<S> + 1 < depth ? row(k * kPack<S> + 1) : nullptr;
      store_paired_rows(from ? from + first_column : nullptr, next ? next + first_column : nullptr, columns,
                        [&](int64_t block) { return out + (block * packed_depth + k) * n; });
    }
  }
}

/// Whether rows of B are multiplied as they lie, in a tile with so many rows that it need not read them too often, see
/// BackwardWeight. Else B is packed. (Measured on Zen 5: gradients are 1.02 to 1.10 times as fast.)
template <class S>
constexpr bool kMayLie = kPack<S> == 1 && RNN_EXT_VECTOR_REGISTERS >= 32;

/// Where the rows of a plain product C = A B (+ bias or + C) lie.
template <class S>
struct PlainProduct {
  int64_t rows = 0;
  int64_t columns = 0;
  const Activation<S>* const* a = nullptr;  // [rows]
  Compute<S>* const* c = nullptr;           // [rows], of `columns` elements each, which are
  Storage storage = Storage::kComputed;     // of this; of 16 bits in a strided product that accumulates nothing
  const Element<S>* b = nullptr;            // packed, [columns / lanes][k][lanes]; or
  const UnpackedB<S>* unpacked = nullptr;   // packed as it goes; or
  int64_t b_stride = 0;                     // not 0: as it is, see PlainB; of a strided product
  Element<S>* room = nullptr;               // of the same
  int64_t b_group = 0;                      // not 0: of the same, how many rows lie together, as if they were a segment
  int64_t b_gap = 0;                        // and how wide the gap after them is
  Segments segments;
  int64_t first = 0;                 // blocks of columns, and
  int64_t last = -1;                 // the end of them; -1: of all
  const Compute<S>* bias = nullptr;  // [columns, padded to whole vectors]
  bool accumulate = false;           // add to what C holds
  bool fetch_c = false;              // which is in no near cache
  Order order = Order::kRows;
};

template <class S, bool kStrided = false>
NO_INLINE void plain_product(const PlainProduct<S>& p) {
  using T = Compute<S>;
  using V = Vec<T>;
  const int64_t last = p.last < 0 ? blocks_of<T>(p.columns) : p.last;
  const auto a_row = [&](int64_t r) { return reinterpret_cast<const Factor<S>*>(p.a[r]); };
  const auto init = [&]<int B>(Patch<1, B> at, V* acc) ALWAYS_INLINE_LAMBDA {
    const int64_t column = at.block * kLanes<T>;
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) acc[b] = p.bias ? load(p.bias + column + b * kLanes<T>) : V{};
    if (!p.accumulate && !p.fetch_c) return;
    const int64_t bytes = p.storage == Storage::kComputed ? sizeof(T) : 2;
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b)
      __builtin_prefetch(reinterpret_cast<const char*>(p.c[at.row]) + (column + b * kLanes<T>)*bytes, 1);
  };
  const auto finish = [&]<int B>(Patch<1, B> at, const Wide<T, B>* sums) ALWAYS_INLINE_LAMBDA {
    const int64_t column = at.block * kLanes<T>, rest = p.columns - column;
    T* c = p.c[at.row] + column;
    // Added at the end, not started from: so that A B + C does not depend on which of two summands came first.
    V sum[B];
    if (p.accumulate) {
      load_vectors<B>(sum, c, rest);
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) sum[b] += sums->part[b];
      store_vectors<B>(c, sum, rest);
    } else {
      store_vectors<B>(c, sums->part, rest);
    }
  };
  if constexpr (kStrided) {
    if (p.b_stride > 0) {
      const PlainB<Element<S>> b = {p.b, p.b_stride, p.room, p.b_gap};
      if constexpr (kMayLie<S>) {
        if (p.b_group > 0) {
          const EvenSegments groups = {int(p.segments.length / p.b_group), p.b_group, p.segments.stride};
          return product_as_it_lies<S>(p.rows, p.first, last, a_row, b, groups, init, finish);
        }
      }
      return product_as_it_lies<S>(p.rows, p.first, last, a_row, b, p.segments, init, finish);
    }
  }
  const auto multiply = [&](const auto& finish) ALWAYS_INLINE_LAMBDA {
    product<1, S, kStrided>(p.rows, p.first, last, p.order, a_row, PackedB<S>(p.b, p.unpacked), p.segments, init,
                            finish);
  };
  if constexpr (kStrided && std::is_same_v<T, float>) {
    if (p.storage != Storage::kComputed) {
      return with_storage<T>(p.storage, [&]<class To>() {
        const auto round = [&]<int B>(Patch<1, B> at, const Wide<T, B>* sums) ALWAYS_INLINE_LAMBDA {
          const int64_t column = at.block * kLanes<T>;
          store_vectors<B>(reinterpret_cast<To*>(p.c[at.row]) + column, sums->part, p.columns - column);
        };
        if constexpr (!std::is_same_v<To, T>) multiply(round);
      });
    }
  }
  multiply(finish);
}
