// How the rates of ceilings.cpp and cells.cpp are measured.
#pragma once

#include <chrono>
#include <cstdint>

/// The best rate in about `seconds`. Tries are as short as can be timed well: on a machine that does other things too,
/// some are left alone.
template <class Work>
double best_rate(double seconds, double amount_per_call, const Work& work) {
  using Clock = std::chrono::steady_clock;
  constexpr double kTry = 3e-4;
  double best = 0, total = 0;
  int64_t calls = 1;
  for (int tries = 0; tries < 5 || total < seconds; ++tries) {
    const auto start = Clock::now();
    for (int64_t i = 0; i < calls; ++i) work();
    const double elapsed = std::chrono::duration<double>(Clock::now() - start).count();
    const double rate = amount_per_call * double(calls) / elapsed;
    best = rate > best ? rate : best;
    total += elapsed;
    if (elapsed < kTry) calls *= 2;
  }
  return best;
}
