// What one core can do at best: multiply-adds from registers, and reading an array that lies in some level of cache.
// Compiled by ceilings.py; C interface, no dependencies. Every function tries for about `seconds` and returns
// the best rate, in flops or bytes per second.
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "best_rate.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

volatile float sink;
constexpr int64_t kRounds = 4096;
constexpr int kChains = 12;  // independent sums: enough for two units of latency 4, few enough for 16 registers

// A macro and not a template: an attribute `target` does not carry over into a function that is inlined.
#define DEFINE_KERNELS(name, bytes, attributes)                                                \
  typedef float Vec_##name __attribute__((vector_size(bytes)));                                \
  attributes void fma_##name() {                                                               \
    Vec_##name acc[kChains] = {}, x = {}, y = {};                                              \
    for (int c = 0; c < kChains; ++c) acc[c] += float(c); /* equal chains would be merged */   \
    x += 0.5f + sink;                                                                          \
    y += 0.25f + sink;                                                                         \
    for (int64_t i = 0; i < kRounds; ++i) {                                                    \
      _Pragma("GCC unroll 12") for (int c = 0; c < kChains; ++c) acc[c] = acc[c] * x + y;      \
    }                                                                                          \
    for (int c = 1; c < kChains; ++c) acc[0] += acc[c];                                        \
    sink = acc[0][0] * 0.f;                                                                    \
  }                                                                                            \
  attributes void read_##name(const char* from, const char* to) {                              \
    Vec_##name acc[8] = {};                                                                    \
    for (const char* p = from; p < to; p += 8 * bytes) {                                       \
      _Pragma("GCC unroll 8") for (int c = 0; c < 8; ++c) acc[c] += ((const Vec_##name*)p)[c]; \
    }                                                                                          \
    for (int c = 1; c < 8; ++c) acc[0] += acc[c];                                              \
    sink = acc[0][0] * 0.f;                                                                    \
  }

DEFINE_KERNELS(baseline, 16, )
#if defined(__x86_64__)
DEFINE_KERNELS(avx2, 32, __attribute__((target("avx2,fma"))))
DEFINE_KERNELS(avx512, 64, __attribute__((target("avx512f"))))

__attribute__((target("avx512bf16,avx512vl"))) void dot_bfloat16() {
  __m512 acc[kChains] = {};
  for (int c = 0; c < kChains; ++c) acc[c] = _mm512_set1_ps(float(c));
  const __m512bh x = __m512bh(_mm512_set1_epi32(int(0x3e803e80 + int(sink))));  // pairs of 0.25
  for (int64_t i = 0; i < kRounds; ++i) {
    _Pragma("GCC unroll 12") for (int c = 0; c < kChains; ++c) acc[c] = _mm512_dpbf16_ps(acc[c], x, x);
  }
  for (int c = 1; c < kChains; ++c) acc[0] += acc[c];
  sink = acc[0][0] * 0.f;
}
#endif

struct Kernels {
  void (*fma)();
  void (*read)(const char*, const char*);
  int lanes;
};

/// Whether RNN_EXT_CPU_CAPABILITY, which holds our kernels to fewer instructions than there are, allows these.
bool allowed(const char* name) {
  const char* held = std::getenv("RNN_EXT_CPU_CAPABILITY");
  return !held || !std::strcmp(held, "avx512") || !std::strcmp(held, name);
}

Kernels kernels() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && allowed("avx512")) return {fma_avx512, read_avx512, 16};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && allowed("avx2"))
    return {fma_avx2, read_avx2, 8};
#endif
  return {fma_baseline, read_baseline, 4};
}

}  // namespace

extern "C" double fma_rate(double seconds) {
  const Kernels k = kernels();
  return best_rate(seconds, 2.0 * k.lanes * kChains * kRounds, k.fma);
}

/// bfloat16 products summed in float32; 0 where the processor has no instruction for it.
extern "C" double bfloat16_rate(double seconds) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bf16") && allowed("avx512"))
    return best_rate(seconds, 4.0 * 16 * kChains * kRounds, dot_bfloat16);
#endif
  return seconds * 0;
}

/// data: `bytes` bytes, a multiple of 4096, aligned to a cache line. Read over and over in the same order, or zigzag:
/// to the end and back, a page at a time, so that what was read last, and is still in a faster cache, comes first.
extern "C" double read_rate(const char* data, int64_t bytes, int zigzag, double seconds) {
  const Kernels k = kernels();
  constexpr int64_t kPage = 4096;
  bool back = false;
  return best_rate(seconds, double(bytes), [&] {
    if (!zigzag) return k.read(data, data + bytes);
    const int64_t pages = bytes / kPage;
    for (int64_t i = 0; i < pages; ++i) {
      const char* page = data + (back ? pages - 1 - i : i) * kPage;
      k.read(page, page + kPage);
    }
    back = !back;
  });
}
