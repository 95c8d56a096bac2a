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

template <class T>
constexpr int kLanes = RNN_EXT_VECTOR_BYTES / int(sizeof(T));

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

template <class T>
ALWAYS_INLINE Vec<T> broadcast(T x) {
  return Vec<T>{} + x;
}

#if defined(RNN_EXT_BFLOAT16)
ALWAYS_INLINE Vec<float> widen(__m256i bits) { return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16); }
/// The 16-bit patterns of 16 values, rounded where they are floats; lanes from `count` are zero.
ALWAYS_INLINE __m256i bits_of(Vec<float> v) { return (__m256i)_mm512_cvtneps_pbh(v); }
ALWAYS_INLINE __m256i bits_part(const BFloat16* p, int64_t count) {
  return count >= kLanes<float> ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                                : _mm256_maskz_loadu_epi16(first_lanes<__mmask16>(count), p);
}
ALWAYS_INLINE __m256i bits_part(const float* p, int64_t count) { return bits_of(load_part(p, count)); }

ALWAYS_INLINE Vec<float> load(const BFloat16* p) { return widen(bits_part(p, kLanes<float>)); }
ALWAYS_INLINE Vec<float> load_part(const BFloat16* p, int64_t count) { return widen(bits_part(p, count)); }
ALWAYS_INLINE void store(BFloat16* p, Vec<float> v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits_of(v)); }
ALWAYS_INLINE void store_part(BFloat16* p, Vec<float> v, int64_t count) {
  count >= kLanes<float> ? store(p, v) : _mm256_mask_storeu_epi16(p, first_lanes<__mmask16>(count), bits_of(v));
}
#endif

/// What the operands of a matrix product are made of: numbers of the storage type S or, where the processor multiplies
/// and adds them two at a time, pairs of them that follow each other in k.
template <class S>
struct ElementOf {
  using type = S;
};
#if defined(RNN_EXT_BFLOAT16)
struct Pair {
  BFloat16 low, high;
};
template <>
struct ElementOf<BFloat16> {
  using type = Pair;
};
#endif
template <class S>
using Element = typename ElementOf<S>::type;

/// How many elements hold `size` numbers; the last one may be filled up with a zero.
template <class S>
constexpr int kPack = int(sizeof(Element<S>) / sizeof(S));
template <class S>
constexpr int64_t elements(int64_t size) {
  return (size + kPack<S> - 1) / kPack<S>;
}

/// A vector of elements, as long as Vec<Compute<S>>, and acc + x * w.
template <class S>
struct Operand {
  using Lanes = Vec<S>;
  ALWAYS_INLINE static Lanes load(const S* p) { return RNN_EXT_ISA::load(p); }
  ALWAYS_INLINE static Lanes broadcast(const S& x) { return Lanes{} + x; }
  ALWAYS_INLINE static Lanes multiply_add(Lanes x, Lanes w, Lanes acc) { return fma(x, w, acc); }
  /// `count` numbers from p on, as elements in the lanes of an accumulator's type.
  ALWAYS_INLINE static Lanes gather(const S* p, int64_t count) { return load_part(p, count); }
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
};

/// 16 pairs, of two rows that follow each other in k.
template <class From>
ALWAYS_INLINE void store_pairs(Pair* to, const From* low, const From* high, int64_t count) {
  const __m512i zero = _mm512_setzero_si512();
  const __m512i a = low ? _mm512_cvtepu16_epi32(bits_part(low, count)) : zero;
  const __m512i b = high ? _mm512_cvtepu16_epi32(bits_part(high, count)) : zero;
  _mm512_storeu_si512(to, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
}
#endif

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

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  static constexpr int kMantissa = 23;
  static constexpr int32_t kBias = 127;
  static constexpr float kLog2e = 1.44269504f;
  static constexpr float kLn2High = 0.693359375f;
  static constexpr float kLn2Low = -2.12194440e-4f;
  static constexpr float kTanhLimit = 9.02f;     // beyond it tanh rounds to 1
  static constexpr float kSigmoidLimit = 87.0f;  // exp stays finite
  // (exp(r) - 1 - r) / r^2 on |r| <= ln(2)/2, interpolated at Chebyshev nodes: error 8e-9
  static constexpr float kPoly[] = {0.5f, 0.16666576845993976f, 0.041666554437685939f, 0.0083632029715758549f,
                                    0.0013926213466332443f};
};

template <>
struct ExpConstants<double> {
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kMantissa = 52;
  static constexpr int64_t kBias = 1023;
  static constexpr double kLog2e = 1.4426950408889634;
  static constexpr double kLn2High = 6.93145751953125e-1;
  static constexpr double kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kTanhLimit = 19.1;
  static constexpr double kSigmoidLimit = 708.0;
  // as above: error 2e-19
  static constexpr double kPoly[] = {0.5,
                                     0.16666666666666671008,
                                     0.041666666666666669767,
                                     0.0083333333333261120526,
                                     0.0013888888888883731828,
                                     0.00019841269874901259234,
                                     0.000024801587325605322782,
                                     2.7557255297969644392e-6,
                                     2.7557273570102139673e-7,
                                     2.5105259538448493419e-8,
                                     2.0914717341716375952e-9};
};

/// Elementary functions on vectors; NaN in, NaN out. To a few units in the last place, or to 4e-5 where the results are
/// rounded to 8 bits anyway.
template <class T>
struct Math {
  using V = Vec<T>;
  using Bits = typename VecOf<T>::bits;
  using C = ExpConstants<T>;

  /// exp(x) = scale (1 + q) with scale a power of two and q = expm1 of the rest, for |x| <= kSigmoidLimit.
  ALWAYS_INLINE static void split_exp(V x, V& scale, V& q) {
    const V shifted = fma(x, broadcast(C::kLog2e), broadcast(C::kRound));
    const V n = shifted - C::kRound;
    V r = fma(n, broadcast(-C::kLn2High), x);
    r = fma(n, broadcast(-C::kLn2Low), r);
#if defined(RNN_EXT_BFLOAT16)
    constexpr int kTerms = 3;
#else
    constexpr int kTerms = sizeof(C::kPoly) / sizeof(T);
#endif
    V p = broadcast(C::kPoly[kTerms - 1]);
#pragma GCC unroll 16
    for (int i = kTerms - 2; i >= 0; --i) p = fma(p, r, broadcast(C::kPoly[i]));
    q = fma(p, r * r, r);
    scale = (V)(((Bits)shifted + C::kBias) << C::kMantissa);
  }

  ALWAYS_INLINE static V over(V a, V b) {
#if defined(RNN_EXT_BFLOAT16)
    return a * _mm512_rcp14_ps(b);
#else
    return a / b;
#endif
  }

  ALWAYS_INLINE static V clamp(V x, T limit) {
    x = x > limit ? broadcast(limit) : x;  // a comparison with NaN is false and lets it through
    return x < -limit ? broadcast(-limit) : x;
  }

  ALWAYS_INLINE static V sigmoid(V x) {
    V scale, q;
    split_exp(-clamp(x, C::kSigmoidLimit), scale, q);
    const V y = over(broadcast(T(1)), 1 + fma(scale, q, scale));
    return x < -C::kSigmoidLimit ? V{} : y;  // of -inf exactly 0, so that 0 * inf is NaN as it is in torch
  }

  /// (e^2x - 1) / (e^2x + 1), with e^2x - 1 taken from q so that small x keep their digits.
  ALWAYS_INLINE static V tanh(V x) {
    V scale, q;
    split_exp(2 * clamp(x, C::kTanhLimit), scale, q);
    const V expm1 = fma(scale, q, scale - 1);
    return over(expm1, expm1 + 2);
  }

  ALWAYS_INLINE static V relu(V x) { return x < 0 ? V{} : x; }
  ALWAYS_INLINE static V relu_backward(V dh, V h) { return h <= 0 ? V{} : dh; }
};
