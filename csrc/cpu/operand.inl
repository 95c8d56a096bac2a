// What matrix products read and write: the elements of their operands, rows of vectors, transposed squares.

/// Numbers that follow each other in k.
struct Pair {
  BFloat16 low, high;
};
struct WidePair {
  float low, high;
};

/// What the operands of a matrix product A B are made of, B of elements and A of factors: numbers of the storage type S
/// or, of BFloat16, pairs of them, which some processors multiply and add at once. What the processor does not multiply
/// is widened: B, which are weights, as it is read (halves of a pair by one instruction each), A before the product.
template <class S>
struct ElementOf {
  using type = S;
  using factor = S;
};
template <>
struct ElementOf<BFloat16> {
  using type = Pair;
#if defined(RNN_EXT_BFLOAT16)
  using factor = Pair;
#else
  using factor = WidePair;
#endif
};
template <>
struct ElementOf<Float16> {
  using type = Float16;
  using factor = float;
};
template <class S>
using Element = typename ElementOf<S>::type;
template <class S>
using Factor = typename ElementOf<S>::factor;

template <class S>
constexpr bool kWidens = !std::is_same_v<Element<S>, Factor<S>>;
/// The numbers that factors consist of. Where weights are widened, states are floats: so are they where all is
/// converted to float, and timesteps of several rows have the same results, whichever of the two is faster.
template <class S>
using Activation = std::conditional_t<kWidens<S>, Compute<S>, S>;

/// How many elements hold `size` numbers; the last one may be filled up with a zero.
template <class S>
constexpr int kPack = int(sizeof(Element<S>) / sizeof(S));
template <class S>
constexpr int64_t elements(int64_t size) {
  return (size + kPack<S> - 1) / kPack<S>;
}

/// As many elements as Vec<Compute<S>> has lanes, one factor for all of them, and acc + x * w.
template <class S>
struct Operand {
  using Lanes = Vec<Compute<S>>;
  ALWAYS_INLINE static Lanes load(const S* p) { return RNN_EXT_ISA::load(p); }
  ALWAYS_INLINE static Lanes broadcast(const Factor<S>& x) { return RNN_EXT_ISA::broadcast(x); }
  ALWAYS_INLINE static Lanes multiply_add(Lanes x, Lanes w, Lanes acc) { return fma(x, w, acc); }
  /// `count` numbers from p on, as elements in the lanes of an accumulator's type, and back.
  ALWAYS_INLINE static Lanes gather(const S* p, int64_t count) { return load_part(p, count); }
  ALWAYS_INLINE static void store_gathered(S* p, Lanes v) { store(p, v); }
};
struct GatheredPairs {
  ALWAYS_INLINE static void store_gathered(Pair* p, Vec<float> v) { store(reinterpret_cast<float*>(p), v); }
};
#if defined(RNN_EXT_BFLOAT16)
template <>
struct Operand<BFloat16> : GatheredPairs {
  using Lanes = __m512bh;
  ALWAYS_INLINE static Lanes load(const Pair* p) { return (Lanes)_mm512_loadu_si512(p); }
  ALWAYS_INLINE static Lanes broadcast(const Pair& x) {
    int bits;
    __builtin_memcpy(&bits, &x, sizeof(bits));
    return (Lanes)_mm512_set1_epi32(bits);
  }
  ALWAYS_INLINE static Vec<float> multiply_add(Lanes x, Lanes w, Vec<float> acc) { return _mm512_dpbf16_ps(acc, x, w); }
  ALWAYS_INLINE static Vec<float> gather(const BFloat16* p, int64_t count) {
    if (count >= 32) return (Vec<float>)_mm512_loadu_si512(p);
    return (Vec<float>)_mm512_maskz_loadu_epi16(first_lanes<__mmask32>(count), p);
  }
};
#else
template <>
struct Operand<BFloat16> : GatheredPairs {
  struct Lanes {
    Vec<float> low, high;
  };
  ALWAYS_INLINE static Lanes load(const Pair* p) {
    Lanes lanes;
    load_two(&p->low, lanes.low, lanes.high);
    return lanes;
  }
  ALWAYS_INLINE static Lanes broadcast(const WidePair& x) {
    return {RNN_EXT_ISA::broadcast(x.low), RNN_EXT_ISA::broadcast(x.high)};
  }
  ALWAYS_INLINE static Vec<float> multiply_add(const Lanes& x, const Lanes& w, Vec<float> acc) {
    return fma(x.high, w.high, fma(x.low, w.low, acc));
  }
  ALWAYS_INLINE static Vec<float> gather(const BFloat16* p, int64_t count) {
    Vec<float> pairs = {};
    if (count >= 2 * kLanes<float>) {
      __builtin_memcpy(&pairs, p, sizeof(pairs));
    } else {
      __builtin_memcpy(&pairs, p, size_t(count) * sizeof(*p));
    }
    return pairs;
  }
};
#endif

/// Pairs of two rows that follow each other in k; null: zeros.
template <class From>
ALWAYS_INLINE void store_pairs(Pair* to, const From* low, const From* high, int64_t count) {
  const Bits16 none = {};
  const Bits32 first = as_words(low ? bits_part<BFloat16>(low, count) : none);
  const Bits32 second = as_words(high ? bits_part<BFloat16>(high, count) : none);
  const Bits32 pairs = first | second << 16;
  __builtin_memcpy(static_cast<void*>(to), &pairs, sizeof(pairs));
}

#if RNN_EXT_VECTOR_BYTES == 64
/// The same of two vectors of pairs, all of whose numbers are there: half the instructions.
ALWAYS_INLINE void store_pairs(Pair* to, Pair* to_second, const BFloat16* low, const BFloat16* high) {
  const __m512i a = _mm512_loadu_si512(low), b = _mm512_loadu_si512(high);
  const __m512i first = _mm512_unpacklo_epi16(a, b), second = _mm512_unpackhi_epi16(a, b);  // halves of each 16 bytes
  const __m512i order = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i order_of_second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi64(first, order, second));
  _mm512_storeu_si512(to_second, _mm512_permutex2var_epi64(first, order_of_second, second));
}
#endif

/// Pairs of two rows of `count` numbers that follow each other in k, vector i of them at to(i).
template <class From>
ALWAYS_INLINE void store_paired_rows(const From* low, const From* high, int64_t count, const auto& to) {
  constexpr int n = kLanes<Element<BFloat16>>;
  int64_t i = 0;
#if RNN_EXT_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<From, BFloat16>) {
    for (; low && high && (i + 2) * n <= count; i += 2) store_pairs(to(i), to(i + 1), low + i * n, high + i * n);
  }
#endif
  for (; i * n < count; ++i)
    store_pairs(to(i), low ? low + i * n : nullptr, high ? high + i * n : nullptr, count - i * n);
}

/// Registers that as many elements take.
template <class S>
constexpr int kOperandRegisters = int(sizeof(typename Operand<S>::Lanes) / sizeof(Vec<Compute<S>>));

/// Four factors that follow each other, each of which can be had in all lanes.
template <class S, bool kSpread>
class Four {
 public:
  explicit ALWAYS_INLINE Four(const Factor<S>* p) : p_(p) {}
  ALWAYS_INLINE auto operator[](int i) const { return Operand<S>::broadcast(p_[i]); }

 private:
  const Factor<S>* p_;
};

/// Whether there is a Four<S, true>, which is loaded at once and spread over the lanes by shuffles. A product that
/// needs a load for each of its multiply-adds anyway waits for loads, if these have no more slots than those.
#if RNN_EXT_VECTOR_BYTES < 32
template <class S>
constexpr bool kSpreads = false;
#else
template <class S>
constexpr bool kSpreads = sizeof(Factor<S>) == 4 && !kWidens<S>;  // which waits for instructions

template <class S>
class Four<S, true> {
 public:
#if RNN_EXT_VECTOR_BYTES == 64
  explicit ALWAYS_INLINE Four(const Factor<S>* p)
      : all_(_mm512_broadcast_f32x4(_mm_loadu_ps(reinterpret_cast<const float*>(p)))) {}
#define RNN_EXT_SPREAD(i) typename Operand<S>::Lanes(_mm512_permute_ps(all_, i * 0x55))
#else
  explicit ALWAYS_INLINE Four(const Factor<S>* p) : all_(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p))) {}
#define RNN_EXT_SPREAD(i) typename Operand<S>::Lanes(_mm256_permute_ps(all_, i * 0x55))
#endif
  ALWAYS_INLINE auto operator[](int i) const {
    switch (i) {  // the shuffle's number must be a constant, whether or not the compiler unrolls loops
      case 0:
        return RNN_EXT_SPREAD(0);
      case 1:
        return RNN_EXT_SPREAD(1);
      case 2:
        return RNN_EXT_SPREAD(2);
      default:
        return RNN_EXT_SPREAD(3);
    }
  }
#undef RNN_EXT_SPREAD

 private:
  const Vec<float> all_;
};
#endif

/// As a count of numbers: all there can be.
constexpr int64_t kWhole = int64_t(1) << 62;

/// B vectors of a row of which `count` numbers are left: whether all of them are is asked once. The lanes past the last
/// are zeros.
template <int B, class From, class V>
ALWAYS_INLINE void load_vectors(V* v, const From* p, int64_t count) {
  constexpr int n = kLanes<Compute<From>>;
  if (count >= B * n) {
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) v[b] = load(p + b * n);
  } else {
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) v[b] = load_part(p + b * n, count - b * n);
  }
}

template <int B, class To, class V>
ALWAYS_INLINE void store_vectors(To* p, const V* v, int64_t count) {
  constexpr int n = kLanes<Compute<To>>;
  if (count >= B * n) {
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) store(p + b * n, v[b]);
  } else {
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) store_part(p + b * n, v[b], count - b * n);
  }
}

/// The same of a row that has room for whole vectors. Where a number and its neighbour make one element of a product,
/// the one past the last has a weight of zero, but must be finite all the same. `Pack`: how many numbers make one, if
/// it is not kPack<To>.
template <int B, int Pack = 0, class To, class V>
ALWAYS_INLINE void store_padded(To* p, const V* v, int64_t count) {
  constexpr int n = kLanes<Compute<To>>;
#pragma GCC unroll 4
  for (int b = 0; b < B; ++b) store(p + b * n, v[b]);
  if constexpr ((Pack ? Pack : kPack<To>) > 1) {
    if (count < B * n) p[count] = To{};
  }
}

/// Calls fn.operator()<N>() for what numbers are that are computed in T.
template <class T, class Fn>
ALWAYS_INLINE void with_storage(Storage storage, const Fn& fn) {
  if constexpr (std::is_same_v<T, float>) {
    if (storage == Storage::kBFloat16) return fn.template operator()<BFloat16>();
#if defined(RNN_EXT_WIDENS_FLOAT16)
    if (storage == Storage::kFloat16) return fn.template operator()<Float16>();
#endif
  }
  fn.template operator()<T>();
}

/// Copy a row, rounding where the types differ.
template <class To, class From>
ALWAYS_INLINE void copy_row(To* to, const From* from, int64_t size) {
  if constexpr (std::is_same_v<To, From>) {
    std::memcpy(to, from, size_t(size) * sizeof(To));
  } else {
    for (int64_t i = 0; i < size; i += kLanes<float>) store_part(to + i, load_part(from + i, size - i), size - i);
  }
}

template <class T, int W, int... Lane>
ALWAYS_INLINE void swap_halves(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, Lane...>) {
  constexpr int n = kLanes<T>;
#if defined(__clang__)
  const Vec<T> low = __builtin_shufflevector(a, b, (Lane & W ? n + Lane - W : Lane)...);
  b = __builtin_shufflevector(a, b, (Lane & W ? n + Lane : Lane + W)...);
#else
  using Bits = typename VecOf<T>::bits;
  const Vec<T> low = __builtin_shuffle(a, b, Bits{(Lane & W ? n + Lane - W : Lane)...});
  b = __builtin_shuffle(a, b, Bits{(Lane & W ? n + Lane : Lane + W)...});
#endif
  a = low;
}

/// Transpose a square of lanes x lanes, one bit of the indices after the other.
template <class T, int W = 1>
ALWAYS_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  if constexpr (W < kLanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) {
      if (!(i & W)) swap_halves<T, W>(rows[i], rows[i + W], std::make_integer_sequence<int, kLanes<T>>());
    }
    transpose<T, W * 2>(rows);
  }
}

/// In lane i the sum of the lanes of rows[i]; in the same order in each. Destroys the rows.
template <class T, int W = 1>
ALWAYS_INLINE Vec<T> sums_of_lanes(Vec<T> (&rows)[kLanes<T>]) {
  if constexpr (W < kLanes<T>) {
#pragma GCC unroll 8
    for (int i = 0; i < kLanes<T>; i += 2 * W) {
      swap_halves<T, W>(rows[i], rows[i + W], std::make_integer_sequence<int, kLanes<T>>());
      rows[i] += rows[i + W];
    }
    return sums_of_lanes<T, W * 2>(rows);
  } else {
    return rows[0];
  }
}

/// Quarter g of v's lanes, moved to the front; zeros behind it.
template <class T, int g, int... Lane>
ALWAYS_INLINE Vec<T> quarter(Vec<T> v, std::integer_sequence<int, Lane...>) {
  constexpr int n = kLanes<T>;
#if defined(__clang__)
  return __builtin_shufflevector(v, Vec<T>{}, (Lane < n / 4 ? g * (n / 4) + Lane : n)...);
#else
  using Bits = typename VecOf<T>::bits;
  return __builtin_shuffle(v, Vec<T>{}, Bits{(Lane < n / 4 ? g * (n / 4) + Lane : n)...});
#endif
}

/// Its first G quarters.
template <int G, class T, int... g>
ALWAYS_INLINE void quarters(Vec<T> v, Vec<T> (&out)[G], std::integer_sequence<int, g...>) {
  ((out[g] = quarter<T, g>(v, std::make_integer_sequence<int, kLanes<T>>())), ...);
}
