// What one core can do: multiply-adds from registers, of float32, of bfloat16, and of numbers of 16 bits that are
// widened for each, and reading an array that lies in some level of cache. Compiled by ceilings.py; C interface, no
// dependencies. Functions named rate try for about `seconds` and return the best rate, in flops or bytes per second;
// the others do the same work a fixed number of times on each of some threads at once, for the caller to time.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "best_rate.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

volatile float sink;
constexpr int64_t kRounds = 4096;
constexpr int kChains = 12;  // independent sums: enough for two units of latency 4, few enough for 16 registers

// Macros and not templates: an attribute `target` does not carry over into a function that is inlined.

/// The sums acc[0] .. acc[kChains - 1], `step` of which grow by the statements behind `setup`, which are repeated.
#define DEFINE_SUMS(name, Vec, step, attributes, setup, ...)                                 \
  attributes void name() {                                                                   \
    Vec acc[kChains] = {};                                                                   \
    for (int c = 0; c < kChains; ++c) acc[c] += float(c); /* equal chains would be merged */ \
    setup for (int64_t i = 0; i < kRounds; ++i) {                                            \
      _Pragma("GCC unroll 12") for (int c = 0; c < kChains; c += step) { __VA_ARGS__ }       \
    }                                                                                        \
    for (int c = 1; c < kChains; ++c) acc[0] += acc[c];                                      \
    sink = acc[0][0] * 0.f;                                                                  \
  }

#define DEFINE_KERNELS(name, bytes, attributes)                                                              \
  typedef float Vec_##name __attribute__((vector_size(bytes)));                                              \
  DEFINE_SUMS(fma_##name, Vec_##name, 1, attributes, Vec_##name x = {}; Vec_##name y = {}; x += 0.5f + sink; \
              y += 0.25f + sink;, acc[c] = acc[c] * x + y;)                                                  \
  attributes void read_##name(const char* from, const char* to) {                                            \
    Vec_##name acc[8] = {};                                                                                  \
    for (const char* p = from; p < to; p += 8 * bytes) {                                                     \
      _Pragma("GCC unroll 8") for (int c = 0; c < 8; ++c) acc[c] += ((const Vec_##name*)p)[c];               \
    }                                                                                                        \
    for (int c = 1; c < 8; ++c) acc[0] += acc[c];                                                            \
    sink = acc[0][0] * 0.f;                                                                                  \
  }

DEFINE_KERNELS(baseline, 16, )
#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX512 __attribute__((target("avx512f")))
DEFINE_KERNELS(avx2, 32, AVX2)
DEFINE_KERNELS(avx512, 64, AVX512)

// Pairs of 0.25.
DEFINE_SUMS(dot_bfloat16, __m512, 1, __attribute__((target("avx512bf16,avx512vl"))),
            const __m512bh x = __m512bh(_mm512_set1_epi32(int(0x3e803e80 + int(sink))));
            , acc[c] = _mm512_dpbf16_ps(acc[c], x, x);)

// Tiles of 16 rows of 16 pairs times 16 columns of them, four sums in turns.
constexpr int kTiles = 4;
void dot_tiles() {
  alignas(64) unsigned char config[64] = {1}, pairs[1024] = {};
  for (int i = 0; i < kTiles + 2; ++i) {
    config[16 + 2 * i] = 64;  // bytes of a row
    config[48 + i] = 16;      // rows
  }
  asm volatile("ldtilecfg %0" : : "m"(config));
  asm volatile("tileloadd (%0,%1,1), %%tmm4\n\ttileloadd (%0,%1,1), %%tmm5" : : "r"(pairs), "r"(64l) : "memory");
  asm volatile("tilezero %tmm0\n\ttilezero %tmm1\n\ttilezero %tmm2\n\ttilezero %tmm3");
  for (int64_t i = 0; i < kRounds; ++i)
    asm volatile(
        "tdpbf16ps %tmm5, %tmm4, %tmm0\n\ttdpbf16ps %tmm5, %tmm4, %tmm1\n\t"
        "tdpbf16ps %tmm5, %tmm4, %tmm2\n\ttdpbf16ps %tmm5, %tmm4, %tmm3");
  asm volatile("tilerelease");
}

/// Whether there are such tiles, and Linux lets this process use them. (Virtual machines take long to say.)
bool has_tiles() {
  static const bool has = [] {
    unsigned eax = 7, ebx, ecx = 0, edx;
    asm("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    return (edx >> 22 & 1) && (edx >> 24 & 1) && syscall(SYS_arch_prctl, 0x1023l, 18l) == 0;
  }();
  return has;
}

// As many multiply-adds, of numbers that are widened for each: two of bfloat16 by a shift and a mask, one vector of
// float16 by a conversion. The asm keeps the compiler from widening them once for all.
#define DEFINE_WIDENED(name, Vec, Bits, step, attributes, ...)                                     \
  DEFINE_SUMS(widened_##name, Vec, step, attributes, Vec x = {}; x += 0.5f + sink; Bits bits = {}; \
              , asm("" : "+x"(bits)); __VA_ARGS__)
DEFINE_WIDENED(bfloat16_avx2, Vec_avx2, __m256i, 2, AVX2, acc[c] = Vec_avx2(_mm256_slli_epi32(bits, 16)) * x + acc[c];
               acc[c + 1] = Vec_avx2(_mm256_and_si256(bits, _mm256_set1_epi32(-65536))) * x + acc[c + 1];)
DEFINE_WIDENED(bfloat16_avx512, Vec_avx512, __m512i, 2, AVX512,
               acc[c] = Vec_avx512(_mm512_slli_epi32(bits, 16)) * x + acc[c];
               acc[c + 1] = Vec_avx512(_mm512_and_si512(bits, _mm512_set1_epi32(-65536))) * x + acc[c + 1];)
DEFINE_WIDENED(float16_avx2, Vec_avx2, __m128i, 1, AVX2, acc[c] = Vec_avx2(_mm256_cvtph_ps(bits)) * x + acc[c];)
DEFINE_WIDENED(float16_avx512, Vec_avx512, __m256i, 1, AVX512, acc[c] = Vec_avx512(_mm512_cvtph_ps(bits)) * x + acc[c];)
#endif

struct Kernels {
  void (*fma)();
  void (*read)(const char*, const char*);
  int lanes;
  void (*dot)();              // of bfloat16, or null
  double dot_flops;           // of a call
  void (*widened[2])() = {};  // of bfloat16 and float16, or null

  double flops() const { return 2.0 * lanes * kChains * double(kRounds); }  // of a call of fma
};

/// Whether RNN_EXT_CPU_CAPABILITY, which holds our kernels to fewer instructions than there are, allows these.
bool allowed(const char* name) {
  const char* held = std::getenv("RNN_EXT_CPU_CAPABILITY");
  if (!held || !*held || !std::strcmp(held, "amx") || !std::strcmp(held, name)) return true;
  return !std::strcmp(held, "avx512") && std::strcmp(name, "amx");
}

Kernels kernels() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && allowed("avx512")) {
    const bool pairs = __builtin_cpu_supports("avx512bf16"), tiles = pairs && allowed("amx") && has_tiles();
    return {fma_avx512,
            read_avx512,
            16,
            tiles   ? dot_tiles
            : pairs ? dot_bfloat16
                    : nullptr,
            tiles ? 2.0 * 16 * 16 * 32 * kTiles * kRounds : 2.0 * 32 * kChains * kRounds,
            {widened_bfloat16_avx512, widened_float16_avx512}};
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && allowed("avx2"))
    return {fma_avx2, read_avx2, 8, nullptr, 0, {widened_bfloat16_avx2, widened_float16_avx2}};
#endif
  return {fma_baseline, read_baseline, 4, nullptr, 0};
}

/// data: `bytes` bytes, a multiple of 4096, aligned to a cache line; from its end to its start a page at a time, so
/// that what was read last by a pass the other way, and is still in a faster cache, comes first.
void read_once(const Kernels& k, const char* data, int64_t bytes, bool back) {
  if (!back) return k.read(data, data + bytes);
  constexpr int64_t kPage = 4096;
  for (int64_t at = bytes - kPage; at >= 0; at -= kPage) k.read(data + at, data + at + kPage);
}

template <class Work>
void on_threads(int threads, const Work& work) {
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work, i);
  work(0);
  for (std::thread& other : others) other.join();
}

}  // namespace

extern "C" double fma_rate(double seconds) {
  const Kernels k = kernels();
  return best_rate(seconds, k.flops(), k.fma);
}

/// The same where products are of bfloat16 and summed in float32; 0 where the processor has no instruction for it.
extern "C" double bfloat16_rate(double seconds) {
  const Kernels k = kernels();
  return k.dot ? best_rate(seconds, k.dot_flops, k.dot) : 0.;
}

/// The same of float32 and a number of 16 bits that is widened for it, bfloat16 or float16; 0 where there are no such
/// kernels.
extern "C" double widened_rate(int float16, double seconds) {
  const Kernels k = kernels();
  return k.widened[float16] ? best_rate(seconds, k.flops(), k.widened[float16]) : 0.;
}

/// Returns how many flops each thread has done; none of bfloat16 where the processor has no instruction for them.
extern "C" double multiply_add(int bfloat16, int64_t times, int threads) {
  const Kernels k = kernels();
  const auto work = bfloat16 ? k.dot : k.fma;
  if (!work) return 0;
  on_threads(threads, [&](int) {
    for (int64_t i = 0; i < times; ++i) work();
  });
  return (bfloat16 ? k.dot_flops : k.flops()) * double(times);
}

extern "C" double read_rate(const char* data, int64_t bytes, int zigzag, double seconds) {
  const Kernels k = kernels();
  bool back = false;
  return best_rate(seconds, double(bytes), [&] {
    read_once(k, data, bytes, back);
    back = zigzag && !back;
  });
}

/// data: as many arrays of `bytes` bytes, one after another, as threads.
extern "C" void read_array(const char* data, int64_t bytes, int zigzag, int64_t times, int threads) {
  const Kernels k = kernels();
  on_threads(threads, [&](int thread) {
    for (int64_t i = 0; i < times; ++i) read_once(k, data + thread * bytes, bytes, zigzag && i % 2);
  });
}
