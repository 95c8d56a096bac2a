// SIMD vectors of the instruction set being compiled: numbers to and from memory, 16-bit ones too.
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
typedef int32_t Int32s __attribute__((vector_size(RNN_EXT_VECTOR_BYTES)));

#if RNN_EXT_VECTOR_BYTES == 64  // GCC makes halves and quarters of a general conversion
ALWAYS_INLINE Bits32 as_words(Bits16 v) { return (Bits32)_mm512_cvtepu16_epi32((__m256i)v); }
#elif RNN_EXT_VECTOR_BYTES == 32
ALWAYS_INLINE Bits32 as_words(Bits16 v) { return (Bits32)_mm256_cvtepu16_epi32((__m128i)v); }
#else
ALWAYS_INLINE Bits32 as_words(Bits16 v) { return __builtin_convertvector(v, Bits32); }
#endif

/// 16-bit numbers as floats, and floats rounded to them, to the nearest and the even one of two.
template <class S>
struct Convert;
template <>
struct Convert<BFloat16> {
  ALWAYS_INLINE static Vec<float> widen(Bits16 v) { return (Vec<float>)(as_words(v) << 16); }
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
