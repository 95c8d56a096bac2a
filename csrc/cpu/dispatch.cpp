// Chooses the instruction set at run time. RNN_EXT_WITHOUT_AVX512 and the like say which kernels the build left out:
// see rnn_ext/_processor.py.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include "cpu/kernels.h"
#include "cpu/quantized.h"
#include "cpu/subnormal.h"
#include "cpu/with_cell.h"

namespace rnn_ext::cpu {
namespace {

struct Level {
  const char* name;
  std::tuple<const Kernels<float>*, const Kernels<double>*, const Kernels<BFloat16>*, const Kernels<Float16>*> kernels;
  const QuantizedKernel* quantized;
  std::tuple<const FewUnitsKernels<float>*, const FewUnitsKernels<double>*> few_units;
  void (*digest)(Digest*, const void*, size_t);  // null: the build left the kernels out
  bool (*supported)();                           // by the processor and the system

  bool usable() const { return digest && supported(); }
};

#if defined(RNN_EXT_X86_KERNELS)
/// __builtin_cpu_supports("f16c"), which not every compiler knows.
bool supports_f16c() {
  unsigned eax, ebx, ecx = 0, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

/// __builtin_cpu_supports("avxvnni"), which not every compiler knows.
[[maybe_unused]] bool supports_avx_vnni() {
  constexpr unsigned kAvxVnni = 1 << 4;
  unsigned eax = 0, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & kAvxVnni);
}

bool supports_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && supports_f16c(); }

bool supports_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

constexpr int kTileData = 18;  // Linux's number of what a process may ask for

/// Whether the processor multiplies tiles of bfloat16 and of 8 bits, and all that goes with them by vectors, and Linux
/// (5.16 and later) saves tiles.
bool supports_amx() {
  const auto has_vectors = [] {
    return supports_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  };
#if defined(RNN_EXT_EMULATED_TILES)
  static const bool supports = has_vectors();
#else
  static const bool supports = [&] {
    constexpr unsigned kAmx = 1 << 22 | 1 << 24 | 1 << 25;  // bfloat16, tiles, 8 bits
    constexpr long kGetSupported = 0x1021;
    unsigned eax = 0, ebx, ecx, edx;
    uint64_t saved = 0;
    return has_vectors() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kAmx) == kAmx &&
           syscall(SYS_arch_prctl, kGetSupported, &saved) == 0 && (saved >> kTileData & 1);
  }();
#endif
  return supports;
}

/// Asks Linux for the tiles, which it saves only of processes that have asked: their signals have larger frames, so
/// that none asks before it computes in bfloat16, or with activations of 8 bits. Linux refuses where a thread has too
/// small a stack for such signals.
bool may_use_amx() {
#if defined(RNN_EXT_EMULATED_TILES)
  return true;
#else
  constexpr long kRequest = 0x1023;
  static const bool granted = syscall(SYS_arch_prctl, kRequest, long(kTileData)) == 0;
  return granted;
#endif
}
#endif

#define RNN_EXT_LEVEL(name, isa, supported)                                      \
  {name,                                                                         \
   {&isa::kFloat, &isa::kDouble, &isa::kWidenedBFloat16, &isa::kWidenedFloat16}, \
   &isa::kQuantized,                                                             \
   {&isa::kFewUnitsFloat, &isa::kFewUnitsDouble},                                \
   &isa::add_to_digest,                                                          \
   supported}
#define RNN_EXT_LEVEL_LEFT_OUT(name, supported) {name, {}, nullptr, {}, nullptr, supported}

const Level kLevels[] = {
// best first
#if defined(RNN_EXT_X86_KERNELS)
// amx has kernels of its own for bfloat16 and 8 bits, see kernels(); for the other types it has those of avx512.
#if defined(RNN_EXT_WITHOUT_AVX512_AMX)
    RNN_EXT_LEVEL_LEFT_OUT("amx", supports_amx),
#else
    RNN_EXT_LEVEL("amx", avx512, supports_amx),
#endif
#if defined(RNN_EXT_WITHOUT_AVX512)
    RNN_EXT_LEVEL_LEFT_OUT("avx512", supports_avx512),
#else
    RNN_EXT_LEVEL("avx512", avx512, supports_avx512),
#endif
#if defined(RNN_EXT_WITHOUT_AVX2)
    RNN_EXT_LEVEL_LEFT_OUT("avx2", supports_avx2),
#else
    RNN_EXT_LEVEL("avx2", avx2, supports_avx2),
#endif
#endif
    RNN_EXT_LEVEL("baseline", baseline, [] { return true; }),
};

const Level* best() {
  for (const Level& level : kLevels)
    if (level.usable()) return &level;
  return nullptr;  // not reached: the last level is always usable
}

const Level* current = best();

#if defined(RNN_EXT_X86_KERNELS)
/// The family of an x86 processor as its maker counts them.
int family() {
  unsigned eax = 0, ebx, ecx, edx;
  __get_cpuid(1, &eax, &ebx, &ecx, &edx);
  const int base = int(eax >> 8 & 15), extended = int(eax >> 20 & 255);
  return base == 15 ? base + extended : base;
}
#endif

Tuning chosen = [] {
  constexpr int64_t kNothing = INT64_MAX;
#if defined(RNN_EXT_X86_KERNELS)
  // Which loads and multiplies two vectors of 64 bytes a cycle, as Intel's do. Measured on a server: the mobile ones of
  // the family have narrower units.
  constexpr int kZen5 = 26;
  // Part of the second-level cache is for other things. (Xeon, 2 MiB: 0 to 3 % less time for 560 to 770 KiB.)
  constexpr int64_t kFetchedOfIntel = 400 * 1024;
  // Ice Lake's load ports have enough to do with one product's vectors, and it multiplies at a lower clock: forward of
  // one sequence and 32 to 512 units is 1.00 to 1.17 times as fast (but an LSTM of 128 units 0.98) if its input gates
  // are a product of their own. Its second-level cache is smaller than the others', and the third one slower.
  if (__builtin_cpu_is("icelake-server")) return Tuning{2, false, kFetchedOfIntel, false, 2 << 20, 1 << 20};
  if (__builtin_cpu_is("intel")) return Tuning{2, true, kFetchedOfIntel, false, 2 << 20, 2 << 20};
  if (__builtin_cpu_is("amd") && family() >= kZen5) return Tuning{2, true, kNothing, true, 1 << 20, 2 << 20};
  // Zen 4, both weights of 4 to 32 MiB: panels that are fetched make forward of several rows 1.02 to 1.10 times as
  // fast, in float64 and with AVX2 too, training 1.00 to 1.03; bfloat16 and float16 0.99 to 1.05. Of an LSTM of 256
  // units, 1 MiB each, 0.97 to 1.00.
  if (__builtin_cpu_is("amd")) return Tuning{1, true, 3 << 19, true, 16 << 20, 2 << 20};
#endif
  return Tuning{1, true, kNothing, false, 16 << 20, 2 << 20};
}();

/// Threads beyond the first cost waking them, some 50 us if they sleep: below this many multiply-adds of the forward
/// pass, 0.1 ms, one thread is as fast. (Measured with two threads, 8 ms between calls: about even at 4e6, 1.2 to 1.6
/// times as fast at 8e6.)
constexpr double kWorthwhile = 5e6;
/// The same of threads that are awake. (One timestep, calls up to 0.3 ms apart: 1.0 to 1.3 times as fast at 1e6, up to
/// 2.4 times at 2.6e6, one row of 512 units; 0.8 to 1.1 at 5e5.)
constexpr double kWorthwhileAwake = 1e6;
/// Threads that wait actively do so longer: libgomp's for some 5 to 15 ms, if there are no more than processors.
constexpr auto kAwake = std::chrono::milliseconds(1);

double multiply_adds(CellKind cell, const Sizes& sizes, const Layout& layout) {
  return double(layout.rows) * sizes.directions * cells::kGatesOf[int(cell)] * double(sizes.hidden) *
         double(sizes.input + sizes.output());
}

/// From how many multiply-adds on a layer is worth threads that are far from each other, as each reads what another one
/// has written; 0: from as many as near ones. (Zen 5, 250 ns apart.)
double least_far(CellKind cell, Variant variant, const Sizes& sizes, const Layout& layout, bool trains) {
  constexpr double kInferred = 2e6;  // (1.16 times as long at 1.6e6, 0.64 to 0.87 at 2e6 to 4e6)
  constexpr double kParts = 4e6;     // (0.82 to 0.88 times at 3e6, but less so between other layers)
  // And of a row. (0.98 to 1.04 times as long at 3e6 to 4e6, 0.95 at 6.5e6; with 2e3 of a row 1.2 times backward, with
  // 6e3 1.04 in all, with 8e3 0.91.)
  constexpr double kSequences = 6e6, kRowOfSequences = 7e3;
  // One sequence, two or three. (About even at 3.3e4 of a row, one of an RNN of 128 units; one of 64 takes 1.3 to 1.4
  // times as long backward, two 1.04 in all.)
  constexpr double kFewSequences = 5e6, kRowOfFew = 4e4;
  if (sizes.directions > 1) return 0;  // of which each thread has one
  if (!trains) return kInferred;
  const double rows = double(layout.rows);
  if (layout.batch < 4) return std::max(kFewSequences, kRowOfFew * rows);
  return count_parts(cell, variant, sizes, layout) > 1 ? kParts : std::max(kSequences, kRowOfSequences * rows);
}

/// When the last call of a thread ended that had work for its pool, were that awake.
thread_local std::chrono::steady_clock::time_point last_end;

/// What matters of a call besides its sizes.
struct Pace {
  double times_float = 1;  // how many times as fast as float it is
  double least_far = 0;    // see there
};

/// Calls fn(executor) with as many threads as it is worth to have.
template <class Fn>
void with_threads(const Executor& executor, CellKind cell, const Sizes& sizes, const Layout& layout, Pace pace,
                  const Fn& fn) {
  using Clock = std::chrono::steady_clock;
  // Few rows take as long as their weights take to come from the third-level cache (measured on a Xeon: one timestep of
  // a row and 1e6 weights or more is as fast with a thread that has to be woken, twice as fast with one that is awake).
  constexpr double kLeastRows = 5;
  if (executor.threads <= 1 || layout.rows == 0) return fn(Executor{});
  const double work =
      multiply_adds(cell, sizes, layout) * std::max(1., kLeastRows / double(layout.rows)) / pace.times_float;
  if (work < kWorthwhileAwake) return fn(Executor{});
  // Soon after such a call the threads are awake or, if that did without them, will be from this call on.
  const bool awake = executor.waits_actively && work < kWorthwhile && Clock::now() - last_end < kAwake;
  bool shares = awake || work >= kWorthwhile;
  if (shares && work < pace.least_far && executor.are_far) shares = !executor.are_far();
  fn(shares ? executor : Executor{});
  last_end = Clock::now();
}

}  // namespace

const char* capability() { return current->name; }

const char* missing_capability() {
  for (const Level& level : kLevels)
    if (level.supported()) return level.digest ? nullptr : level.name;
  return nullptr;
}

namespace {

#if defined(RNN_EXT_X86_KERNELS)
bool uses_amx() { return std::strcmp(capability(), "amx") == 0; }
bool uses_avx512() { return uses_amx() || std::strcmp(capability(), "avx512") == 0; }
[[maybe_unused]] bool uses_avx2() { return std::strcmp(capability(), "avx2") == 0; }
#else
constexpr bool uses_avx512() { return false; }
#endif

/// Of the instruction set in use.
int64_t vector_bytes() { return uses_avx512() ? 64 : std::strcmp(capability(), "avx2") == 0 ? 32 : 16; }

}  // namespace

bool multiplies_tiles() {
#if defined(RNN_EXT_X86_KERNELS)
  return uses_amx() && may_use_amx();
#else
  return false;
#endif
}

namespace {

/// How many times as fast as float a layer of S is.
template <class S>
double times_float(const Layout& layout) {
  // (Two threads, awake: 16 sequences, 32 timesteps, 64 units of an RNN 0.9 times as fast as one, of an LSTM 1.0
  // to 1.1.)
  if (std::is_same_v<S, BFloat16> && multiplies_tiles()) return layout.batch < 4 ? 2 : 5;
  return 1;
}

}  // namespace

bool set_capability(const char* name) {
  for (const Level& level : kLevels) {
    if (std::strcmp(level.name, name) == 0 && level.usable()) {
      current = &level;
      return true;
    }
  }
  return false;
}

const Tuning& tuning() { return chosen; }

void set_tuning(const Tuning& tuning) {
  chosen = tuning;
  chosen.vectors_a_cycle = tuning.vectors_a_cycle == 2 ? 2 : 1;
}

int saved_values(CellKind cell, bool projected, Variant variant) {
  // Of a projection h before it.
  return with_cell(cell, variant, [&]<class Cell>() { return Cell::kSaved + projected; });
}

bool computes_bfloat16() {
#if defined(RNN_EXT_X86_KERNELS) && !defined(RNN_EXT_WITHOUT_AVX512_BF16)
  return uses_avx512() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

namespace {

template <class S>
const Kernels<S>& kernels() {
#if defined(RNN_EXT_X86_KERNELS)
  if constexpr (std::is_same_v<S, BFloat16>) {
#if !defined(RNN_EXT_WITHOUT_AVX512_AMX)
    if (multiplies_tiles()) return avx512_amx::kBFloat16;
#endif
#if !defined(RNN_EXT_WITHOUT_AVX512_BF16)
    if (computes_bfloat16()) return avx512_bf16::kBFloat16;
#endif
  }
#endif
  return *std::get<const Kernels<S>*>(current->kernels);
}

}  // namespace

template <class S>
bool has_few_units(CellKind cell, Variant variant, const Sizes& sizes, const Layout& layout) {
  // Half a vector of units; of RNNs in float, whose cell takes the least time, a quarter. (Zen 4, one thread, 1 to 64
  // timesteps of 16 to 65,536 sequences, forward and training, against vectors of units. AVX-512: one unit takes 0.05
  // to 0.8 of the time, 4 units of GRU and LSTM 0.27 to 0.95, of RNN 0.5 to 0.95, 8 of GRU 0.6 to 1.0, of LSTM 0.65
  // to 1.0; AVX2: 4 of GRU and LSTM 0.7 to 0.95, 6 up to 1.25, 4 of RNN up to 1.2. With more inputs up to 1.4: what is
  // a product alone is better with units in the lanes.)
  const bool gated = cells::kGatesOf[int(cell)] > 1;
  const int64_t lanes = vector_bytes() / int64_t(sizeof(Compute<S>));
  const int64_t most_units = gated || sizeof(Compute<S>) > sizeof(float) ? lanes / 2 : lanes / 4;
  const int64_t most_weights = gated ? 128 : 32;                       // of a gate, for inputs
  const int64_t least_rows = std::max<int64_t>(16, 4 * sizes.hidden);  // of a step, on average
  return variant == Variant::kPlain && !sizes.proj && sizes.hidden <= most_units &&
         sizes.hidden * sizes.input <= most_weights && layout.steps > 0 && layout.rows >= least_rows * layout.steps;
}
template bool has_few_units<float>(CellKind, Variant, const Sizes&, const Layout&);
template bool has_few_units<double>(CellKind, Variant, const Sizes&, const Layout&);
template bool has_few_units<BFloat16>(CellKind, Variant, const Sizes&, const Layout&);
template bool has_few_units<Float16>(CellKind, Variant, const Sizes&, const Layout&);

template <class S>
bool uses_packed_weights(const Sizes& sizes, const Layout& layout) {
  // For fewer rows, packing, or the look whether the weights have changed, costs more than it saves. Several rows of
  // one timestep are multiplied by weights as they are: four at a time or, with few registers, two, and each sum at the
  // cost of adding up the lanes of a vector, which long rows of weights make up for (measured on a Xeon, 64 to 512
  // units). Pairs of 16 bits that the instruction set multiplies would have to be widened. The rule is the same in
  // training, where it could go further, and in inference: so are the bits.
  int64_t most = 4;
  if (layout.steps == 1 && !(std::is_same_v<S, BFloat16> && computes_bfloat16())) {
    // Of 16 bits that are widened in every pass no more than converting them would have made up for (Zen 4, 512 units:
    // 8 rows take 0.65 to 0.85 of the time, 24 rows 0.9 to 0.97; a Xeon with AMX, float16, 32 rows 0.89 to 0.93,
    // 48 1.0).
    const int64_t limit = !uses_avx512() ? 16 : sizeof(S) > 2 ? 64 : 32;
    const int64_t depth = std::min(sizes.input, sizes.output()) - 32;
    most = std::max(most, std::min(limit, depth / (uses_avx512() ? 8 : 28)));
  }
  return layout.rows > most;
}
template bool uses_packed_weights<float>(const Sizes&, const Layout&);
template bool uses_packed_weights<double>(const Sizes&, const Layout&);
template bool uses_packed_weights<BFloat16>(const Sizes&, const Layout&);
template bool uses_packed_weights<Float16>(const Sizes&, const Layout&);

template <class S>
bool reuses_packed_weights(CellKind cell, const Sizes& sizes, const Layout& layout) {
  if (!uses_packed_weights<S>(sizes, layout)) return false;
  // One timestep reads its weights once, and packs them meanwhile in less time than they take to come from beyond the
  // second-level cache once more. (Ice Lake, 24 to 256 rows of 512 units, with what training takes besides: GRU and
  // LSTM 0.80 to 0.97 of the time, RNN, whose weights are these 2 MiB, 0.94 to 1.04; Zen 4, in inference: 0.94 to 1.01
  // and, with 2 MiB, 1.02 to 1.05. Not measured: processors that do not ask for panels beforehand.)
  constexpr int64_t kFar = 2 << 20;
  const int64_t gates = cells::kGatesOf[int(cell)];
  const int64_t bytes = gates * sizes.hidden * (sizes.input + sizes.output()) * int64_t(sizeof(S));
  if (layout.steps != 1 || bytes <= kFar || bytes / 2 <= tuning().fetched_bytes) return true;
  // A tail would be packed first, with all else.
  return has_tail(gates, sizes.hidden, (uses_avx512() ? 64 : 32) / int64_t(sizeof(S)));
}
template bool reuses_packed_weights<float>(CellKind, const Sizes&, const Layout&);
template bool reuses_packed_weights<double>(CellKind, const Sizes&, const Layout&);

namespace {

bool widens_always = false;

/// Whether weights of 16 bits are better widened in every step than once: they fit a cache that they would not fit as
/// floats, or come from behind it in half the time, and each is used for so few rows that widening does not count.
/// (Measured on a Xeon, 2 MiB of second-level cache, at these limits 0.97 to 1.2 times as fast; one row of 512 units:
/// GRU and LSTM 1.9 to 2.0 times in bfloat16, 1.7 to 1.8 in float16, with AVX2 1.35 to 1.6.)
template <class S>
bool widens_packed_weights(CellKind cell, const Sizes& sizes, const Layout& layout) {
  if (widens_always) return true;
  struct Limit {
    int64_t rows, base, per_row;  // the most rows, and the least KiB as floats
  };
  const bool bfloat16 = std::is_same_v<S, BFloat16>;  // which takes fewer instructions there
  Limit limit = {8, 480, 288};
  if (!bfloat16) limit = {4, 1280, 416};
  if (!uses_avx512()) limit = {bfloat16 ? 2 : 4, 768, 768};  // 16 registers make tiles of two rows of pairs
  const int64_t bytes = sizes.recurrent(cells::kGatesOf[int(cell)]) * int64_t(sizeof(float));
  return layout.steps > 1 && layout.batch <= limit.rows && bytes >= (limit.base + layout.batch * limit.per_row) * 1024;
}

}  // namespace

template <class S>
bool computes_forward(CellKind cell, const Sizes& sizes, const Layout& layout) {
  if constexpr (sizeof(S) > 2) {
    return true;
  } else {
    if (has_few_units<S>(cell, Variant::kPlain, sizes, layout)) return false;
    if (kernels<S>().backward) return true;
    if (!kernels<S>().forward) return false;
    return !uses_packed_weights<S>(sizes, layout) || widens_packed_weights<S>(cell, sizes, layout);
  }
}
template bool computes_forward<float>(CellKind, const Sizes&, const Layout&);
template bool computes_forward<double>(CellKind, const Sizes&, const Layout&);
template bool computes_forward<BFloat16>(CellKind, const Sizes&, const Layout&);
template bool computes_forward<Float16>(CellKind, const Sizes&, const Layout&);

namespace {

/// Whether the scan backward reads weight_hh as it is stored, and widens it in every step.
template <class S>
bool widens_backward(CellKind cell, const Sizes& sizes, const Layout& layout) {
  // Of several rows a tile would widen its weights for each.
  if (layout.batch != 1 || layout.steps < 2 || sizes.proj) return false;
  // As floats. (Measured on a Xeon: bfloat16 1.03 to 1.14 times as fast from here on, float16 1.0 to 1.04; where the
  // weights would not fit the second-level cache 1.2 to 1.5 times. With AVX2 bfloat16 1.04 to 1.08 times.)
  const int64_t least = (std::is_same_v<S, BFloat16> ? 128 : 1280) * 1024;
  return widens_always || sizes.recurrent(cells::kGatesOf[int(cell)]) * int64_t(sizeof(float)) >= least;
}

}  // namespace

template <class S>
Narrow narrow_backward(CellKind cell, Variant variant, const Sizes& sizes, const Layout& layout) {
  Narrow narrow;
  if (!kernels<S>().forward) return narrow;  // cannot widen them
  if (has_few_units<S>(cell, variant, sizes, layout)) return narrow;
  const bool few = has_few_rows(layout.rows);
  narrow.grads = true;
  narrow.grad_input = sizes.directions == 1;  // else it is the sum of two
  if (kernels<S>().backward || variant != Variant::kPlain) return narrow;
  narrow.weight_ih = few;
  narrow.weight_hh = (few && layout.steps <= 1) || widens_backward<S>(cell, sizes, layout);
  return narrow;
}
template Narrow narrow_backward<BFloat16>(CellKind, Variant, const Sizes&, const Layout&);
template Narrow narrow_backward<Float16>(CellKind, Variant, const Sizes&, const Layout&);

void widen_always(bool always) { widens_always = always; }

template <class S>
std::unique_ptr<PackedWeights> pack_weights(CellKind cell, const Sizes& sizes, const Weights<const S>& weights) {
  const FlushSubnormals flush;
  return kernels<S>().pack(cell, sizes, weights);
}
template std::unique_ptr<PackedWeights> pack_weights(CellKind, const Sizes&, const Weights<const float>&);
template std::unique_ptr<PackedWeights> pack_weights(CellKind, const Sizes&, const Weights<const double>&);
template std::unique_ptr<PackedWeights> pack_weights(CellKind, const Sizes&, const Weights<const BFloat16>&);
template std::unique_ptr<PackedWeights> pack_weights(CellKind, const Sizes&, const Weights<const Float16>&);

void add_to_digest(Digest* digest, const void* data, size_t bytes) { current->digest(digest, data, bytes); }

template <class T>
void random_mask(uint64_t seed, double p, T value, T* out, int64_t size) {
  kernels<T>().random_mask(seed, p, value, out, size);
}
template void random_mask(uint64_t, double, float, float*, int64_t);
template void random_mask(uint64_t, double, double, double*, int64_t);

int64_t count_slices(const Layout& layout, const Sizes& sizes, int gates, int64_t itemsize, const Executor& executor,
                     bool or_units) {
  // A tile of few rows reads the weights more often than it can use them: two rows are enough where these come from the
  // second-level cache, else one slice, whose units threads share, is faster (measured: even at 1 MiB). share_out() may
  // prefer that for more rows.
  constexpr int64_t kCached = 512 * 1024;
  const bool cached = sizes.recurrent(gates) * itemsize <= kCached;
  const int64_t threads = executor.threads / sizes.directions;
  int64_t slices = std::min(threads, layout.batch / (cached ? 2 : 4));
  // Where only one thread would have work else, a row is enough. (Two threads, two or three sequences: 0.67 to 0.83 of
  // one thread's time. Not measured: how many threads may read all of larger weights for it.)
  if (!or_units) slices = std::max(slices, std::min(cached ? threads : std::min<int64_t>(threads, 2), layout.batch));
  return std::max<int64_t>(1, slices);
}

void deal_out(const Layout& layout, int64_t slices, int64_t* ends) {
  const int64_t batch = layout.batch;
  if (slices == 1 || layout.has_all_rows()) {
    for (int64_t i = 0; i < slices; ++i) ends[i] = batch * (i + 1) / slices;
    return;
  }
  std::vector<int64_t> lengths;
  layout.each_length([&](int64_t, int64_t length) { lengths.push_back(length); });
  // Gives each slice as many entries as take no longer than `most` rows, but at least one, and leaves one for each
  // slice after it: whether those are all entries. The longest sequences come first, so that the first slices have
  // fewer.
  const auto fits = [&](int64_t most) {
    int64_t j = 0;
    for (int64_t i = 0; i < slices; ++i) {
      const int64_t last = batch - (slices - 1 - i);
      // What a slice takes: a step about as long as a row more (measured, 2 to 32 rows of 32 to 256 units).
      int64_t sum = lengths[j];
      for (bool first = true; j < last && (first || sum + lengths[j] <= most); first = false) sum += lengths[j++];
      ends[i] = j;
    }
    return j == batch;
  };
  // With `most` they fit: each slice but the last has more rows than that less two sequences.
  int64_t least = layout.rows / slices, most = least + 2 * layout.steps + 1;
  while (most - least > 1 + least / 128) {
    const int64_t middle = least + (most - least) / 2;
    (fits(middle) ? most : least) = middle;
  }
  fits(most);
}

int count_parts(CellKind cell, Variant variant, const Sizes& sizes, const Layout& layout) {
  // Rows of a step, on average, whose tiles are as good as those of more; fewer where a step multiplies much. (Zen 5,
  // one thread: at these limits 1.00 to 1.07 and 1.00 to 1.03 times as long as the whole; smaller steps 1.03 to 1.18.)
  constexpr double kGoodRows = 12, kFairRows = 8, kLargeStep = 9e4;
  // Beside so much in all, rows and multiply-adds of forward, adding up the gradients does not count.
  constexpr int64_t kLeastRows = 400;
  constexpr double kLeastWork = 1.5e6;
  // Of more weights, which take long to come from the second-level cache for half the rows, one thread takes 1.03 to
  // 1.06 times as long, and two that are near gain nothing.
  constexpr int64_t kMostWeights = 256 * 1024;
  const int gates = cells::kGatesOf[int(cell)];
  const int64_t weights = gates * sizes.hidden * (sizes.input + sizes.hidden);
  if (variant != Variant::kPlain || sizes.directions > 1 || sizes.proj || weights > kMostWeights) return 1;
  int64_t steps = layout.steps;  // that any sequence has; of a stack they are not known
  while (layout.batch_sizes && steps > 0 && layout.batch_sizes[steps - 1] == 0) --steps;
  const auto pays = [&](int parts) {
    const double of_step = double(layout.rows) / double(parts * steps);
    const bool fair = of_step >= kFairRows && of_step * double(sizes.recurrent(gates)) >= kLargeStep;
    return (of_step >= kGoodRows || (fair && parts == 2)) && layout.rows >= parts * kLeastRows &&
           double(weights) * double(layout.rows) >= parts * kLeastWork;
  };
  return pays(kMostParts) ? kMostParts : pays(2) ? 2 : 1;
}

template <class S>
bool pipelines(CellKind cell, const Sizes& sizes, const Layout& layout, int64_t layers, bool trains,
               const Executor& executor) {
  if (layers < 2 || executor.threads < 2 || !executor.run_team) return false;
  if (has_few_units<S>(cell, Variant::kPlain, sizes, layout)) return false;
  if (!uses_packed_weights<S>(sizes, layout)) return false;
  const int gates = cells::kGatesOf[int(cell)];
  if (count_slices(layout, sizes, gates, sizeof(S), executor, true) > 1) return false;  // these need not wait
  const double work = multiply_adds(cell, sizes, layout);
  if (work * double(layers) < kWorthwhile) return false;
  // Layers wait for each other every few steps, threads that share a layer's units in every step, but hold half of its
  // weights each. Measured with two threads: about even from here on, and twice as fast as one at half of it.
  constexpr double kShared = 2e5;  // multiply-adds of a recurrent step
  const double hidden = double(sizes.hidden);
  if (gates * hidden * hidden * double(layout.rows) >= kShared * double(layout.steps)) return false;
  const bool little = trains && work < least_far(cell, Variant::kPlain, sizes, layout, true);
  return !(little && executor.are_far && executor.are_far());
}
template bool pipelines<float>(CellKind, const Sizes&, const Layout&, int64_t, bool, const Executor&);
template bool pipelines<double>(CellKind, const Sizes&, const Layout&, int64_t, bool, const Executor&);
template bool pipelines<BFloat16>(CellKind, const Sizes&, const Layout&, int64_t, bool, const Executor&);

namespace {

/// Those for a layer of few units and many sequences, or null.
template <class S>
const FewUnitsKernels<S>* few_units_kernels(const auto& args) {
  if constexpr (std::is_same_v<S, Compute<S>>) {
    if (has_few_units<S>(args.cell, args.variant, args.sizes, args.layout))
      return std::get<const FewUnitsKernels<S>*>(current->few_units);
  }
  return nullptr;
}

/// Most of their time goes to cells: how many times as fast as float's products their multiply-adds are.
constexpr Pace kPaceOfFewUnits = {.times_float = 1. / 16};

}  // namespace

template <class S>
void layer_forward(const ForwardArgs<S>& args, const Executor& executor) {
  const FlushSubnormals flush;
  if (const auto* few = few_units_kernels<S>(args))
    return with_threads(executor, args.cell, args.sizes, args.layout, kPaceOfFewUnits,
                        [&](const Executor& threads) { few->forward(args, threads); });
  // What backward will read on one thread is not written by two. (Of one timestep that is little.)
  const double least =
      args.layout.steps > 1 ? least_far(args.cell, args.variant, args.sizes, args.layout, args.trains) : 0;
  with_threads(executor, args.cell, args.sizes, args.layout,
               {.times_float = times_float<S>(args.layout), .least_far = least},
               [&](const Executor& threads) { kernels<S>().forward(args, threads); });
}
template <class S>
void stack_forward(ForwardArgs<S>* layers, int count, const Executor& executor) {
  const FlushSubnormals flush;
  std::vector<Progress> progress(count);
  for (int k = 0; k < count; ++k) {
    layers[k].below = k > 0 ? &progress[k - 1] : nullptr;
    layers[k].progress = &progress[k];
  }
  kernels<S>().forward_stack(layers, count, executor);
}
template <class S>
void layer_backward(const BackwardArgs<S>& args, const Executor& executor) {
  const FlushSubnormals flush;
  if (const auto* few = few_units_kernels<S>(args))
    return with_threads(executor, args.cell, args.sizes, args.layout, kPaceOfFewUnits,
                        [&](const Executor& threads) { few->backward(args, threads); });
  const double least = least_far(args.cell, args.variant, args.sizes, args.layout, true);
  with_threads(executor, args.cell, args.sizes, args.layout,
               {.times_float = times_float<S>(args.layout), .least_far = least},
               [&](const Executor& threads) { kernels<S>().backward(args, threads); });
}
namespace {

bool multiplies_integers = true;

QuantizedKernel quantized_kernel([[maybe_unused]] int pack) {
  if (!multiplies_integers) return *current->quantized;
#if defined(RNN_EXT_X86_KERNELS)
#if !defined(RNN_EXT_WITHOUT_AVX512_AMX)
  if (pack == 4 && multiplies_tiles()) return avx512_amx_int8::kQuantized;
#endif
#if !defined(RNN_EXT_WITHOUT_AVX512_VNNI)
  if (uses_avx512() && __builtin_cpu_supports("avx512vnni")) return avx512_vnni::kQuantized;
#endif
#if !defined(RNN_EXT_WITHOUT_AVX2_VNNI)
  if (uses_avx2() && supports_avx_vnni()) return avx2_vnni::kQuantized;
#endif
#elif defined(__aarch64__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) return neon_dot::kQuantized;
#endif
  return *current->quantized;
}

}  // namespace

void multiply_integers(bool allowed) { multiplies_integers = allowed; }

void quantized_forward(const QuantizedArgs& args, const Executor& executor) {
  const FlushSubnormals flush;
  const ForwardArgs<float>& call = args.call;
  const QuantizedKernel kernel = quantized_kernel(args.pack);
  // (Zen 4: 2 and 3.5 times; with AVX2 1.3 times, where more would gain little.)
  with_threads(executor, call.cell, call.sizes, call.layout, {.times_float = args.pack == 4 ? 4. : 2.},
               [&](const Executor& threads) { kernel(args, threads); });
}
template <class T>
void layer_tangent(const TangentArgs<T>& args, const Executor& executor) {
  const FlushSubnormals flush;
  with_threads(executor, args.values.cell, args.values.sizes, args.values.layout, {},
               [&](const Executor& threads) { kernels<T>().tangent(args, threads); });
}
template void layer_tangent(const TangentArgs<float>&, const Executor&);
template void layer_tangent(const TangentArgs<double>&, const Executor&);
template void layer_forward(const ForwardArgs<float>&, const Executor&);
template void layer_forward(const ForwardArgs<double>&, const Executor&);
template void layer_forward(const ForwardArgs<BFloat16>&, const Executor&);
template void layer_forward(const ForwardArgs<Float16>&, const Executor&);
template void stack_forward(ForwardArgs<float>*, int, const Executor&);
template void stack_forward(ForwardArgs<double>*, int, const Executor&);
template void stack_forward(ForwardArgs<BFloat16>*, int, const Executor&);
template void layer_backward(const BackwardArgs<float>&, const Executor&);
template void layer_backward(const BackwardArgs<double>&, const Executor&);
template void layer_backward(const BackwardArgs<BFloat16>&, const Executor&);

}  // namespace rnn_ext::cpu
