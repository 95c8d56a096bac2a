// SIMD vectors of the instruction set being compiled, and the elementary functions the cells ask for.
// Built on the compilers' vector extensions, so one text serves every width and architecture.

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(RNN_EXT_VECTOR_BYTES)));
  typedef float unaligned __attribute__((vector_size(RNN_EXT_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t bits __attribute__((vector_size(RNN_EXT_VECTOR_BYTES)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(RNN_EXT_VECTOR_BYTES)));
  typedef double unaligned __attribute__((vector_size(RNN_EXT_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t bits __attribute__((vector_size(RNN_EXT_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VecOf<T>::type;

/// Of 16 bits, which are widened, as many as of floats.
template <class T>
constexpr int kLanes = RNN_EXT_VECTOR_BYTES / int(sizeof(T) == 2 ? sizeof(float) : sizeof(T));

template <class T>
ALWAYS_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecOf<T>::unaligned*>(p);
}

template <class T>
ALWAYS_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecOf<T>::unaligned*>(p) = v;
}

/// The first `count` lanes (all where count >= lanes); the others are zero.
#if RNN_EXT_VECTOR_BYTES == 64
template <class Mask>
ALWAYS_INLINE Mask first_lanes(int64_t count) {
  return Mask((uint64_t(1) << count) - 1);
}
ALWAYS_INLINE Vec<float> load_part(const float* p, int64_t count) {
  return count >= kLanes<float> ? load(p) : _mm512_maskz_loadu_ps(first_lanes<__mmask16>(count), p);
}
ALWAYS_INLINE Vec<double> load_part(const double* p, int64_t count) {
  return count >= kLanes<double> ? load(p) : _mm512_maskz_loadu_pd(first_lanes<__mmask8>(count), p);
}
ALWAYS_INLINE void store_part(float* p, Vec<float> v, int64_t count) {
  count >= kLanes<float> ? store(p, v) : _mm512_mask_storeu_ps(p, first_lanes<__mmask16>(count), v);
}
ALWAYS_INLINE void store_part(double* p, Vec<double> v, int64_t count) {
  count >= kLanes<double> ? store(p, v) : _mm512_mask_storeu_pd(p, first_lanes<__mmask8>(count), v);
}
#else
template <class T>
ALWAYS_INLINE Vec<T> load_part(const T* p, int64_t count) {
  if (count >= kLanes<T>) return load(p);
  alignas(64) T lanes[kLanes<T>] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}

template <class T>
ALWAYS_INLINE void store_part(T* p, Vec<T> v, int64_t count) {
  if (count >= kLanes<T>) return store(p, v);
  alignas(64) T lanes[kLanes<T>];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}
#endif

/// a * b + c, rounded once where the processor can. Said explicitly, and compiled with -ffp-contract=off: a compiler
/// left to fuse as it likes does so differently in each instance of a template, and results would depend on the tile
/// height.
#if RNN_EXT_VECTOR_BYTES == 64
ALWAYS_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm512_fmadd_ps(a, b, c); }
ALWAYS_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm512_fmadd_pd(a, b, c); }
#elif RNN_EXT_VECTOR_BYTES == 32
ALWAYS_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm256_fmadd_ps(a, b, c); }
ALWAYS_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm256_fmadd_pd(a, b, c); }
#elif defined(__aarch64__)
ALWAYS_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
ALWAYS_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#else
template <class V>
ALWAYS_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}
#endif

/// x in every lane. Not 0 + x, which the compiler may not leave out: it would turn -0 into 0.
template <class T>
ALWAYS_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

/// The bits of as many 16-bit numbers as there are floats in a vector.
typedef uint16_t Bits16 __attribute__((vector_size(RNN_EXT_VECTOR_BYTES / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(RNN_EXT_VECTOR_BYTES)));

/// 16-bit numbers as floats, and floats rounded to them, to the nearest and the even one of two.
template <class S>
struct Convert;
template <>
struct Convert<BFloat16> {
#if RNN_EXT_VECTOR_BYTES == 64  // GCC makes halves and quarters of a general conversion
  ALWAYS_INLINE static Vec<float> widen(Bits16 v) {
    return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)v), 16);
  }
#elif RNN_EXT_VECTOR_BYTES == 32
  ALWAYS_INLINE static Vec<float> widen(Bits16 v) {
    return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)v), 16);
  }
#else
  ALWAYS_INLINE static Vec<float> widen(Bits16 v) { return (Vec<float>)(__builtin_convertvector(v, Bits32) << 16); }
#endif
#if defined(RNN_EXT_BFLOAT16)
  ALWAYS_INLINE static Bits16 narrow(Vec<float> v) { return (Bits16)_mm512_cvtneps_pbh(v); }
#else
  ALWAYS_INLINE static Bits16 narrow(Vec<float> v) {
    const Bits32 bits = (Bits32)v;
    const Bits32 rounded = bits + (0x7fff + (bits >> 16 & 1));
    const Bits32 quiet = bits | 0x400000;  // a NaN whose last digits are cut off stays one
    return __builtin_convertvector((v == v ? rounded : quiet) >> 16, Bits16);
  }
#endif
};
#if defined(RNN_EXT_WIDENS_FLOAT16)
template <>
struct Convert<Float16> {
#if RNN_EXT_VECTOR_BYTES == 64
  ALWAYS_INLINE static Vec<float> widen(Bits16 v) { return _mm512_cvtph_ps((__m256i)v); }
  ALWAYS_INLINE static Bits16 narrow(Vec<float> v) { return (Bits16)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
#elif RNN_EXT_VECTOR_BYTES == 32
  ALWAYS_INLINE static Vec<float> widen(Bits16 v) { return _mm256_cvtph_ps((__m128i)v); }
  ALWAYS_INLINE static Bits16 narrow(Vec<float> v) { return (Bits16)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
#else
  ALWAYS_INLINE static Vec<float> widen(Bits16 v) { return (Vec<float>)vcvt_f32_f16((float16x4_t)v); }
  ALWAYS_INLINE static Bits16 narrow(Vec<float> v) { return (Bits16)vcvt_f16_f32((float32x4_t)v); }
#endif
};
#endif

template <class S>
concept Stored16 = std::is_same_v<S, BFloat16> || std::is_same_v<S, Float16>;

/// The bits of `count` numbers, rounded where they are floats; zeros behind them.
template <Stored16 S>
ALWAYS_INLINE Bits16 bits_part(const S* p, int64_t count) {
  Bits16 bits = {};
  if (count >= kLanes<float>) {
    __builtin_memcpy(&bits, p, sizeof(bits));
  } else {
#if RNN_EXT_VECTOR_BYTES == 64
    bits = (Bits16)_mm256_maskz_loadu_epi16(first_lanes<__mmask16>(count), p);
#else
    for (int64_t i = 0; i < count; ++i) bits[i] = p[i].bits;
#endif
  }
  return bits;
}
template <Stored16 S>
ALWAYS_INLINE Bits16 bits_part(const float* p, int64_t count) {
  return Convert<S>::narrow(load_part(p, count));
}

template <Stored16 S>
ALWAYS_INLINE Vec<float> load_part(const S* p, int64_t count) {
  return Convert<S>::widen(bits_part(p, count));
}
template <Stored16 S>
ALWAYS_INLINE Vec<float> load(const S* p) {
  return load_part(p, kLanes<float>);
}
template <Stored16 S>
ALWAYS_INLINE void store_part(S* p, Vec<float> v, int64_t count) {
  const Bits16 bits = Convert<S>::narrow(v);
  if (count >= kLanes<float>) {
    __builtin_memcpy(static_cast<void*>(p), &bits, sizeof(bits));
  } else {
#if RNN_EXT_VECTOR_BYTES == 64
    _mm256_mask_storeu_epi16(p, first_lanes<__mmask16>(count), (__m256i)bits);
#else
    for (int64_t i = 0; i < count; ++i) p[i].bits = bits[i];
#endif
  }
}
template <Stored16 S>
ALWAYS_INLINE void store(S* p, Vec<float> v) {
  store_part(p, v, kLanes<float>);
}

/// v, rounded to what S holds.
template <class S>
ALWAYS_INLINE Vec<Compute<S>> as_stored(Vec<Compute<S>> v) {
  if constexpr (Stored16<S>) {
    return Convert<S>::widen(Convert<S>::narrow(v));
  } else {
    return v;
  }
}

/// Two vectors of numbers that follow each other, in an order that only a sum over all of them does not see.
template <class S>
ALWAYS_INLINE void load_two(const S* p, Vec<Compute<S>>& a, Vec<Compute<S>>& b) {
  if constexpr (std::is_same_v<S, BFloat16>) {  // the even ones and the odd ones: widened by one instruction each
    Bits32 bits;
    __builtin_memcpy(&bits, p, sizeof(bits));
    a = (Vec<float>)(bits << 16);
    b = (Vec<float>)(bits & 0xffff0000);
  } else {
    a = load(p);
    b = load(p + kLanes<Compute<S>>);
  }
}

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
#if defined(RNN_EXT_BFLOAT16)
template <>
struct Operand<BFloat16> {
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
  ALWAYS_INLINE static void store_gathered(Pair* p, Vec<float> v) { store(reinterpret_cast<float*>(p), v); }
};

/// 16 pairs, of two rows that follow each other in k.
template <class From>
ALWAYS_INLINE void store_pairs(Pair* to, const From* low, const From* high, int64_t count) {
  const __m512i zero = _mm512_setzero_si512();
  const __m512i a = low ? _mm512_cvtepu16_epi32((__m256i)bits_part<BFloat16>(low, count)) : zero;
  const __m512i b = high ? _mm512_cvtepu16_epi32((__m256i)bits_part<BFloat16>(high, count)) : zero;
  _mm512_storeu_si512(to, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
}
#else
template <>
struct Operand<BFloat16> {
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
  ALWAYS_INLINE static void store_gathered(Pair* p, Vec<float> v) { store(reinterpret_cast<float*>(p), v); }
};
#endif
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

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  static constexpr int kMantissa = 23;
  static constexpr int32_t kBias = 127;
  static constexpr float kLog2e = 1.44269504f;
  static constexpr float kTanhLimit = 9.02f;     // beyond it tanh rounds to 1
  static constexpr float kSigmoidLimit = 87.0f;  // exp stays finite
  static constexpr float kExpOverflow = 104.0f;  // exp is infinite
  static constexpr float kLn2High = 0.693359375f;
  static constexpr float kLn2Low = -2.12194440e-4f;
  // (e^r - 1) / r on |r| <= ln(2)/2, interpolated at Chebyshev nodes: error of e^r 5e-9
  static constexpr float kPoly[] = {1.00000001077f,  0.500000001346f,   0.166665052604f,
                                    0.041666465006f, 0.00836914849086f, 0.0013933641032f};
};

template <>
struct ExpConstants<double> {
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kMantissa = 52;
  static constexpr int64_t kBias = 1023;
  static constexpr double kLog2e = 1.4426950408889634;
  static constexpr double kTanhLimit = 19.1;
  static constexpr double kSigmoidLimit = 708.0;
  static constexpr double kExpOverflow = 750.0;
  static constexpr double kLn2High = 6.93145751953125e-1;
  static constexpr double kLn2Low = 1.42860682030941723212e-6;
  // as above: error 8e-18
  static constexpr double kPoly[] = {1.0,
                                     0.50000000000000056169,
                                     0.16666666666666670986,
                                     0.041666666666573142611,
                                     0.008333333333326140884,
                                     0.0013888888932488598181,
                                     0.00019841269874800491981,
                                     0.000024801504346997687255,
                                     2.7557255425746434282e-6,
                                     2.7626357241447222855e-7,
                                     2.5105206373957011116e-8};
};

/// x where it lies between two bounds, else the nearer one; NaN stays NaN.
#if RNN_EXT_VECTOR_BYTES == 64
ALWAYS_INLINE Vec<float> clamp(Vec<float> x, float low, float high) {
  return _mm512_max_ps(broadcast(low), _mm512_min_ps(broadcast(high), x));
}
ALWAYS_INLINE Vec<double> clamp(Vec<double> x, double low, double high) {
  return _mm512_max_pd(broadcast(low), _mm512_min_pd(broadcast(high), x));
}
#elif RNN_EXT_VECTOR_BYTES == 32
ALWAYS_INLINE Vec<float> clamp(Vec<float> x, float low, float high) {
  return _mm256_max_ps(broadcast(low), _mm256_min_ps(broadcast(high), x));
}
ALWAYS_INLINE Vec<double> clamp(Vec<double> x, double low, double high) {
  return _mm256_max_pd(broadcast(low), _mm256_min_pd(broadcast(high), x));
}
#else
template <class V, class T>
ALWAYS_INLINE V clamp(V x, T low, T high) {
  x = x > high ? broadcast(high) : x;  // a comparison with NaN is false and lets it through
  return x < low ? broadcast(low) : x;
}
#endif

/// Several vectors that go through a cell side by side. A cell is a long chain of instructions, each of which waits for
/// the one before, and the processor does not look far enough ahead to find the chain of the next vector.
template <class T, int W>
struct Wide {
  Vec<T> part[W];
};

template <class... A>
struct WidestOf {
  static constexpr bool kIsWide = false;
};
template <class T, int W, class... A>
struct WidestOf<Wide<T, W>, A...> {
  static constexpr bool kIsWide = true;
  static constexpr int kParts = W;
  using Number = T;
  using type = Wide<T, W>;
};
template <class First, class... A>
struct WidestOf<First, A...> : WidestOf<A...> {};

template <class T, int W>
ALWAYS_INLINE Vec<T> one_part(const Wide<T, W>& x, int w) {
  return x.part[w];
}
template <class T>
ALWAYS_INLINE Vec<T> one_part(Vec<T> x, int /*w*/) {
  return x;
}
template <class T>
ALWAYS_INLINE T one_part(std::type_identity_t<T> x, int /*w*/)
  requires std::is_arithmetic_v<T>
{
  return x;
}

/// fn of every part of its arguments; those that are not Wide are the same for all parts.
template <class Fn, class... A>
ALWAYS_INLINE auto each(const Fn& fn, const A&... a) {
  using Widest = WidestOf<A...>;
  if constexpr (!Widest::kIsWide) {
    return fn(a...);
  } else {
    using T = typename Widest::Number;
    typename Widest::type result;
#pragma GCC unroll 8
    for (int w = 0; w < Widest::kParts; ++w) result.part[w] = fn(one_part<T>(a, w)...);
    return result;
  }
}

template <class... A>
concept AnyWide = WidestOf<A...>::kIsWide;

template <class A, class B>
  requires AnyWide<A, B>
ALWAYS_INLINE auto operator+(const A& a, const B& b) {
  return each([](auto x, auto y) ALWAYS_INLINE_LAMBDA { return x + y; }, a, b);
}
template <class A, class B>
  requires AnyWide<A, B>
ALWAYS_INLINE auto operator-(const A& a, const B& b) {
  return each([](auto x, auto y) ALWAYS_INLINE_LAMBDA { return x - y; }, a, b);
}
template <class A, class B>
  requires AnyWide<A, B>
ALWAYS_INLINE auto operator*(const A& a, const B& b) {
  return each([](auto x, auto y) ALWAYS_INLINE_LAMBDA { return x * y; }, a, b);
}
template <class A, class B, class C>
  requires AnyWide<A, B, C>
ALWAYS_INLINE auto fma(const A& a, const B& b, const C& c) {
  return each([](auto x, auto y, auto z) ALWAYS_INLINE_LAMBDA { return fma(x, y, z); }, a, b, c);
}

/// Elementary functions on V, Vec<T> or Wide; NaN in, NaN out. To a few units in the last place, or to 7e-5 where the
/// results are rounded to 8 bits anyway (on Zen 5, for all float32 between -100 and 100; 8e-5 is what AVX-512 allows).
template <class T, class V = Vec<T>>
struct Math {
  using One = Vec<T>;
  using Bits = typename VecOf<T>::bits;
  using C = ExpConstants<T>;

  /// A power of two: itself or, where the processor scales by 2^n, its exponent. No type of its own, of which GCC would
  /// store every value.
  using Power = V;
#if RNN_EXT_VECTOR_BYTES == 64
  static constexpr bool kOverflows = true;  // scale gives inf
  ALWAYS_INLINE static Power power(V /*shifted*/, V n) { return n; }
  ALWAYS_INLINE static Vec<float> scale_one(Vec<float> x, Vec<float> n) { return _mm512_scalef_ps(x, n); }
  ALWAYS_INLINE static Vec<double> scale_one(Vec<double> x, Vec<double> n) { return _mm512_scalef_pd(x, n); }
#else
  static constexpr bool kOverflows = false;
  ALWAYS_INLINE static Power power(V shifted, V /*n*/) {
    return each([](One x) ALWAYS_INLINE_LAMBDA { return (One)(((Bits)x + C::kBias) << C::kMantissa); }, shifted);
  }
  ALWAYS_INLINE static One scale_one(One x, One p) { return x * p; }
#endif
  template <class X>
  ALWAYS_INLINE static V scale(X x, Power p) {
    return each([](One x, One p) ALWAYS_INLINE_LAMBDA { return scale_one(x, p); }, x, p);
  }

  ALWAYS_INLINE static V within(V x, T limit) {
    return each([=](One x) ALWAYS_INLINE_LAMBDA { return clamp(x, -limit, limit); }, x);
  }

#if defined(RNN_EXT_BFLOAT16)
  /// c0 + c1 x + ..
  ALWAYS_INLINE static One polynomial(V /*x*/, T c0) { return broadcast(c0); }
  template <class... More>
  ALWAYS_INLINE static V polynomial(V x, T c0, More... more) {
    return fma(polynomial(x, more...), x, broadcast(c0));
  }

  ALWAYS_INLINE static V reciprocal(V x) {  // to 2^-14
    return each([](One x) ALWAYS_INLINE_LAMBDA -> One { return _mm512_rcp14_ps(x); }, x);
  }

  /// 1 / (1 + e^-x), with e^-x = 2^t = 2^floor(t) 2^f. Of the polynomials of its degree that are 1 at 0 and 2 at 1,
  /// this one's greatest relative error in between is the least, 3.4e-6.
  ALWAYS_INLINE static V sigmoid(V x) {
    const V t = x * broadcast(-C::kLog2e);
    const V f = each(
        [](One t) ALWAYS_INLINE_LAMBDA -> One {
          return _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // 0 of an infinite t
        },
        t);
    const V power = polynomial(f, 1.0f, 0.69303215f, 0.24137977f, 0.05203237f, 0.013555747f);
    return reciprocal(1 + scale(power, t));
  }

  /// x P(x^2) / Q(x^2), with the least greatest relative error for |x| <= 6, 7.3e-6. Constant beyond, where 1 - tanh
  /// is 1.2e-5.
  ALWAYS_INLINE static V tanh(V x) {
    x = within(x, 6.0f);
    const V square = x * x;
    const V p = polynomial(square, 0.99999267f, 0.114830755f, 0.0015145787f);
    const V q = polynomial(square, 1.0f, 0.44811398f, 0.017611165f, 5.6271965e-05f);
    return x * p * reciprocal(q);
  }
#else
  template <class X>
  ALWAYS_INLINE static V over(X a, V b) {
    return each([](One a, One b) ALWAYS_INLINE_LAMBDA { return a / b; }, a, b);
  }

  /// exp(kTimes x) = p (1 + q r), p a power of two, |kTimes r| <= ln(2)/2; kTimes is a power of two or its negative.
  /// `kExact`: to the last digits where n is large, too. Where it is, tanh is flat.
  template <int kTimes, bool kExact>
  ALWAYS_INLINE static Power split_exp(V x, V& q, V& r) {
    const V shifted = fma(x, broadcast(kTimes * C::kLog2e), broadcast(C::kRound));
    const V n = shifted - C::kRound;
    if constexpr (kExact) {
      r = fma(n, broadcast(-C::kLn2High / kTimes), x);
      r = fma(n, broadcast(-C::kLn2Low / kTimes), r);
    } else {
      r = fma(n, broadcast(-(C::kLn2High + C::kLn2Low) / kTimes), x);
    }
    // By twos, which do not wait for each other.
    constexpr int kTerms = sizeof(C::kPoly) / sizeof(T);
    constexpr auto coefficient = [](int i) {
      T factor = kTimes;
      for (int k = 0; k < i; ++k) factor *= kTimes;
      return factor * C::kPoly[i];
    };
    const auto two = [&](int i) ALWAYS_INLINE_LAMBDA { return fma(broadcast(coefficient(i + 1)), r, broadcast(coefficient(i))); };
    const V square = r * r;
    q = two(kTerms / 2 * 2 - 2);
    if constexpr (kTerms % 2) q = fma(broadcast(coefficient(kTerms - 1)), square, q);
#pragma GCC unroll 16
    for (int i = kTerms / 2 * 2 - 4; i >= 0; i -= 2) q = fma(q, square, two(i));
    return power(shifted, n);
  }

  /// 1 / (1 + e^-x); of -inf exactly 0, so that 0 * inf is NaN as it is in torch.
  ALWAYS_INLINE static V sigmoid(V x) {
    constexpr T limit = kOverflows ? C::kExpOverflow : C::kSigmoidLimit;
    V q, r;
    const Power p = split_exp<-1, true>(within(x, limit), q, r);
    const V y = over(broadcast(T(1)), 1 + scale(fma(q, r, broadcast(T(1))), p));
    if constexpr (kOverflows) {
      return y;
    } else {
      return each([](One x, One y) ALWAYS_INLINE_LAMBDA { return x < -limit ? One{} : y; }, x, y);
    }
  }

  /// (e^2x - 1) / (e^2x + 1), with e^2x - 1 taken from q r so that small x keep their digits.
  ALWAYS_INLINE static V tanh(V x) {
    V q, r;
    const Power p = split_exp<2, false>(within(x, C::kTanhLimit), q, r);
    const V s = scale(broadcast(T(1)), p);
    const V sr = s * r;  // exact
    return over(fma(q, sr, s - 1), fma(q, sr, s + 1));
  }
#endif

  ALWAYS_INLINE static V relu(V x) {
    return each([](One x) ALWAYS_INLINE_LAMBDA { return x < 0 ? One{} : x; }, x);
  }
  ALWAYS_INLINE static V relu_backward(V dh, V h) {
    return each([](One dh, One h) ALWAYS_INLINE_LAMBDA { return h <= 0 ? One{} : dh; }, dh, h);
  }
};
