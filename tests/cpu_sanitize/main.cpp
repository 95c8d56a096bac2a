// Runs csrc/cpu without torch, for a build with sanitizers: every cell, layout and option at sizes that end inside a
// vector or a tile, on memory of exactly the promised extent, deliberately misaligned and filled with NaN beforehand.
//
//   main           every configuration by every instruction set: all that must be written is, nothing else, and the
//                  instruction sets agree
//   main threads   a problem large enough to be shared out, by four threads: the bits of one
//   main write FILE, main compare FILE
//                  as main, and the baseline's results are kept for, or agree with those of, another processor's build
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "run.h"
#include "threads.h"

namespace {

using namespace cpu_sanitize;

/// In 16 bits the inputs are cut off, too: this is about memory, tests/test_reduced_precision.py looks at the digits.
/// At relu's kink rounding decides whether a gradient passes.
template <class S>
void compare_16_bits(const Config& config, const Results& exact, double allowed) {
  const Results results = run<S>(config, Executor{});
  Results same = exact;
  if (same.values.size() > results.values.size()) same.values.resize(results.values.size());  // none of backward
  if (difference(config, same, results) > allowed && config.cell != CellKind::kRnnRelu)
    fail(config, "in 16 bits differs from float");
}

struct {
  std::FILE* file = nullptr;
  bool writing = false;

  void open(const char* mode, const char* path) {
    writing = std::strcmp(mode, "write") == 0;
    file = std::fopen(path, writing ? "wb" : "rb");
    if (!file || (!writing && std::strcmp(mode, "compare") != 0)) {
      std::fprintf(stderr, "expected write or compare, and a file for it: %s %s\n", mode, path);
      std::exit(1);
    }
  }
  void exchange(const Config& config, const Results& results, double allowed) {
    if (!file) return;
    Results other = results;
    const size_t size = results.values.size();
    const size_t done = writing ? std::fwrite(results.values.data(), sizeof(double), size, file)
                                : std::fread(other.values.data(), sizeof(double), size, file);
    if (done != size) fail(config, "the file has an end here");
    if (difference(config, results, other) > allowed) fail(config, "differs from the other processor's");
  }
  /// Everything is on the disk, or has been read.
  void close() {
    if (!file || (writing ? std::fclose(file) == 0 : std::fgetc(file) == EOF)) return;
    std::fprintf(stderr, "the file could not be written, or has more than was compared\n");
    std::exit(1);
  }
} record;

template <class T>
void compare(const Config& config, double allowed) {
  widen_always(config.widens);
  Results baseline;
  for (const char* name : {"baseline", "avx2", "avx512", "amx"}) {
    const bool tiles = std::strcmp(name, "amx") == 0;  // of bfloat16, and of 8 bits, which float has along
    if (tiles && !(config.with_bfloat16 && config.variant == Variant::kPlain && std::is_same_v<T, float>)) continue;
    if (!set_capability(name)) continue;
    Results results = run<T>(config, Executor{});
    if (std::strcmp(name, "baseline") == 0) record.exchange(config, results, allowed);
    if (baseline.values.empty())
      baseline = std::move(results);
    else if (difference(config, baseline, results) > allowed)
      fail(config, "differs from the baseline");
    if (config.variant != Variant::kPlain || std::is_same_v<T, double>) continue;
    if (config.with_bfloat16) {
      compare_16_bits<BFloat16>(config, baseline, 0.2);
    } else {
      compare_16_bits<Float16>(config, baseline, 0.02);
    }
  }
}

void random_masks() {
  for (int64_t size : {0, 1, 15, 63, 64, 65, 200}) {
    for (const char* name : {"baseline", "avx2", "avx512"}) {
      if (!set_capability(name)) continue;
      const Array<float> mask(size);
      const Array<double> same(size);
      random_mask<float>(uint64_t(size), 0.5, 2, mask.begin(), size);
      random_mask<double>(uint64_t(size), 0.5, 2, same.begin(), size);
      for (int64_t i = 0; i < size; ++i) {
        if (mask.begin()[i] == float(same.begin()[i]) && (mask.begin()[i] == 0 || mask.begin()[i] == 2)) continue;
        std::fprintf(stderr, "%s: a random mask of %d has %g at %d\n", name, int(size), double(mask.begin()[i]),
                     int(i));
        std::exit(1);
      }
    }
  }
}

int every_configuration() {
  const int64_t shapes[][4] = {{1, 1, 1, 1},    {2, 3, 5, 7},   {3, 1, 33, 17},   {4, 9, 1, 33},   {2, 17, 7, 16},
                               {1, 5, 65, 31},  {5, 2, 3, 65},  {3, 7, 17, 15},   {2, 140, 2, 3},  {290, 1, 2, 5},
                               {45, 8, 3, 9},   {9, 1, 3, 18},  {1, 1, 129, 64},  {35, 1, 5, 66},  {0, 3, 2, 3},
                               {3, 0, 2, 3},    {0, 0, 1, 1},   {1, 4, 41, 34},   {1, 5, 300, 66}, {1, 6, 70, 150},
                               {1, 2, 70, 150}, {6, 2, 16, 32}, {130, 3, 32, 16}, {3, 40, 70, 37}, {2, 37, 18, 3},
                               {3, 37, 5, 1}};
  int count = 0;
  Random chance{1};
  for (const auto& [L, N, I, H] : shapes) {
    for (int kind = 0; kind < 5; ++kind) {
      const CellKind cell = kind < 4 ? CellKind(kind) : CellKind::kLstm;
      if (kind == 4 && H == 1) continue;
      for (int directions : {1, 2}) {
        for (int form = 0; form < 5; ++form) {  // padded twice plain, twice with lengths and resets, packed
          Config config{cell,
                        L,
                        N,
                        I,
                        H,
                        kind == 4 ? (count % 2 ? (H + 1) / 2 : H + 19) : 0,
                        directions,
                        Config::Form(form == 4 ? 2 : form % 2),
                        count % 3 != 0,
                        form == 2 || form == 3,
                        form == 2 || form == 3,
                        count % 4 != 0,
                        cell == CellKind::kLstm && count % 2 == 0,
                        0xffff};
          if (form == 4 && (L == 0 || N == 0)) continue;
          if (form == 4) config.resets = count % 2 == 0;
          // Now and then only some gradients come in and are wanted.
          if (count % 5 == 4) config.wanted = unsigned(count * 2654435761u >> 8) & 0xffff;
          for (int variant = 0; variant < 3; ++variant) {
            config.variant = Variant(variant);
            if (config.variant == Variant::kLayerNorm && cell != CellKind::kLstm) continue;
            config.masks = variant ? unsigned(count + variant) & 7 : 0;
            // A unit alone is its own mean: its normalised gradient is rounding times rstd, some hundred.
            const double slack = config.variant == Variant::kLayerNorm ? 1000 : 1;
            // One of these by chance, so that no size, form or option always goes with the same: all take twice as
            // long.
            config.with_bfloat16 = chance.below(2) == 0;
            config.widens = chance.below(2) == 0;
            const bool plain = config.variant == Variant::kPlain, wide = chance.below(2) == 0;
            if (plain || !wide) compare<float>(config, 2e-5 * slack);
            if (plain || wide) compare<double>(config, 1e-12 * slack);
          }
          ++count;
        }
      }
    }
  }
  random_masks();
  record.close();
  std::printf("%d configurations, %s\n", count, set_capability("amx") ? "tiles too" : "no tiles");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3) record.open(argv[1], argv[2]);
  Tuning chosen = tuning();
  chosen.takes_along = true;  // a processor that takes none along would leave that code out
  set_tuning(chosen);
  return argc > 1 && std::strcmp(argv[1], "threads") == 0 ? threads() : every_configuration();
}
