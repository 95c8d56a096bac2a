// Random masks: a function of a seed and a position, so that nothing depends on the instruction set or on threads.
// Per element: a quarter of 10 rounds of 2 multiplications, 0.5 ns in all; torch's own numbers take ten times as long.

typedef uint64_t Words __attribute__((vector_size(RNN_EXT_VECTOR_BYTES)));
constexpr int kWords = RNN_EXT_VECTOR_BYTES / int(sizeof(uint64_t));

/// The products of the lower halves of the lanes.
ALWAYS_INLINE Words multiply_halves(Words a, Words b) {
#if RNN_EXT_VECTOR_BYTES == 64
  return (Words)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif RNN_EXT_VECTOR_BYTES == 32
  return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

constexpr int kCounters = 16;  // at a time, whatever the width of a vector

/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) with the key `seed`:
/// words[w][k] is word w of counter first + k.
ALWAYS_INLINE void philox(uint64_t seed, uint64_t first, uint32_t (&words)[4][kCounters]) {
  constexpr int n = kCounters / kWords;
  Words x[4][n] = {};  // a word is the lower half of a lane; what the upper one holds does not matter
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) {
    for (int k = 0; k < kWords; ++k) x[0][i][k] = first + uint64_t(i * kWords + k);
    x[1][i] = x[0][i] >> 32;
  }
  for (uint64_t round = 0; round < 10; ++round) {
    const uint64_t key0 = seed + round * 0x9e3779b9u, key1 = (seed >> 32) + round * 0xbb67ae85u;
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      const Words a = multiply_halves(x[0][i], Words{} + 0xd2511f53u);
      const Words b = multiply_halves(x[2][i], Words{} + 0xcd9e8d57u);
      x[0][i] = (b >> 32) ^ x[1][i] ^ key0;
      x[1][i] = b;
      x[2][i] = (a >> 32) ^ x[3][i] ^ key1;
      x[3][i] = a;
    }
  }
#pragma GCC unroll 4
  for (int w = 0; w < 4; ++w) {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i)
      for (int k = 0; k < kWords; ++k) words[w][i * kWords + k] = uint32_t(x[w][i][k]);
  }
}

template <class T>
void random_mask(uint64_t seed, double p, T value, T* out, int64_t size) {
  constexpr int kBlock = 4 * kCounters;
  const auto chosen = uint64_t(p * 4294967296.0);  // of the values of a word
  if (chosen == 0) value = T(0);
  const auto last = uint32_t(chosen - 1);
  uint32_t words[4][kCounters];
  T block[kBlock];
  for (int64_t at = 0; at < size; at += kBlock) {
    philox(seed, uint64_t(at) / 4, words);
    const bool whole = size - at >= kBlock;
    T* to = whole ? out + at : block;
    for (int w = 0; w < 4; ++w)
      for (int k = 0; k < kCounters; ++k) to[w * kCounters + k] = words[w][k] <= last ? value : T(0);
    if (!whole) std::memcpy(out + at, block, size_t(size - at) * sizeof(T));
  }
}
