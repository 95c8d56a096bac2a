// Several vectors side by side, and the elementary functions that the cells ask for.

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

  // Reciprocals are right to 2^-14. A result that is as near to 1 is exactly 1: else 1e-4 would pass a saturated gate
  // backward, 1 - tanh^2 or sigmoid (1 - sigmoid), instead of nothing, and be multiplied by whatever came in.

  /// Not where x > limit.
  ALWAYS_INLINE static __mmask16 is_within(One x, float limit) {
    return _mm512_cmp_ps_mask(x, broadcast(limit), _CMP_NGT_UQ);
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
    return each([](One x, One b)
                    ALWAYS_INLINE_LAMBDA -> One { return _mm512_mask_rcp14_ps(broadcast(1.0f), is_within(x, 9.6f), b); },
                x, 1 + scale(power, t));
  }

  /// x P(x^2) / Q(x^2), with the least greatest relative error for |x| <= 6, 7.3e-6.
  ALWAYS_INLINE static V tanh(V x) {
    const V square = x * x;
    const V p = polynomial(square, 0.99999267f, 0.114830755f, 0.0015145787f);
    const V q = polynomial(square, 1.0f, 0.44811398f, 0.017611165f, 5.6271965e-05f);
    return each(
        [](One x, One square, One p, One q) ALWAYS_INLINE_LAMBDA -> One {
          const One one = (One)(((Bits)x & INT32_MIN) | (Bits)broadcast(1.0f));
          return _mm512_mask_mul_ps(one, is_within(square, 5.2f * 5.2f), x * p, _mm512_rcp14_ps(q));
        },
        x, square, p, q);
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
