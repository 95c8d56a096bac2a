// What a cell costs alone: its activations and sums, from and to the first level of cache, with what a timestep reads
// and writes for it. Compiled by ceilings.py against csrc, for the instruction set of the kernels; C interface.
#include "cpu/kernels.h"

#include "best_rate.h"
#include "cells/cells.h"

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define ALWAYS_INLINE_LAMBDA __attribute__((always_inline))
#define NO_INLINE __attribute__((noinline))

#define RNN_EXT_ISA alone
namespace rnn_ext::cpu::RNN_EXT_ISA {
namespace {

#include "cpu/vec.inl"
#include "cpu/operand.inl"
#include "cpu/math.inl"

constexpr int kUnits = 256;
constexpr int kPlanes = 8;  // as many values as any cell has of a unit
constexpr int kParts = 4;   // vectors at a time: enough to fill the latency of their instructions

struct Units {
  alignas(64) float gates[kPlanes][kUnits], saved[kPlanes][kUnits], grad_gates[kPlanes][kUnits], h[kUnits], c[kUnits];
};

using V = Wide<float, kParts>;
constexpr int kAtOnce = kParts * kLanes<float>;

ALWAYS_INLINE V load_units(const float* from) {
  V v;
#pragma GCC unroll 8
  for (int w = 0; w < kParts; ++w) v.part[w] = load(from + w * kLanes<float>);
  return v;
}

ALWAYS_INLINE void store_units(float* to, const V& v) {
#pragma GCC unroll 8
  for (int w = 0; w < kParts; ++w) store(to + w * kLanes<float>, v.part[w]);
}

template <class Cell>
NO_INLINE void run_forward(Units& units) {
  for (int u = 0; u < kUnits; u += kAtOnce) {
    V gates[Cell::kGates], split[1] = {}, saved[Cell::kSaved + 1], h_prev = {}, c = {};
    for (int g = 0; g < Cell::kGates; ++g) gates[g] = load_units(units.gates[g] + u);
    if constexpr (Cell::kSplit > 0) split[0] = load_units(units.gates[Cell::kGates] + u);
    if constexpr (Cell::kDirectCarry) h_prev = load_units(units.h + u);
    if constexpr (Cell::kHasCell) c = load_units(units.c + u);
    store_units(units.h + u, Cell::template forward<Math<float, V>>(gates, split, h_prev, c, saved));
    if constexpr (Cell::kHasCell) store_units(units.c + u, c);
  }
}

template <class Cell>
NO_INLINE void run_backward(Units& units) {
  for (int u = 0; u < kUnits; u += kAtOnce) {
    V saved[Cell::kSaved + 1] = {}, grad_gates[Cell::kGradGates], h_prev = {}, c_prev = {}, dc = {};
    for (int i = 0; i < Cell::kSaved; ++i) saved[i] = load_units(units.saved[i] + u);
    const V h = load_units(units.h + u), dh = load_units(units.gates[0] + u);
    if constexpr (Cell::kDirectCarry) h_prev = load_units(units.h + u);
    if constexpr (Cell::kHasCell) {
      c_prev = load_units(units.c + u);
      dc = load_units(units.gates[1] + u);
    }
    const V carried = Cell::template backward<Math<float, V>>(saved, h, h_prev, c_prev, dh, dc, grad_gates);
    for (int g = 0; g < Cell::kGradGates; ++g) store_units(units.grad_gates[g] + u, grad_gates[g]);
    if constexpr (Cell::kDirectCarry) store_units(units.grad_gates[Cell::kGradGates] + u, carried);
    if constexpr (Cell::kHasCell) store_units(units.gates[1] + u, dc);
  }
}

template <class Cell>
double rate(bool backward, double seconds) {
  static Units units;  // zeros: an instruction takes as long for other numbers
  return best_rate(seconds, kUnits, [&] { backward ? run_backward<Cell>(units) : run_forward<Cell>(units); });
}

}  // namespace
}  // namespace rnn_ext::cpu::RNN_EXT_ISA

/// Units per second of cell number `cell` (of rnn_ext.bench.CELLS: rnn, gru, lstm), of one timestep forward or
/// backward.
extern "C" double cell_rate(int cell, int backward, double seconds) {
  using namespace rnn_ext::cpu::alone;
  if (cell == 0) return rate<rnn_ext::cells::RnnTanh>(backward, seconds);
  if (cell == 1) return rate<rnn_ext::cells::Gru>(backward, seconds);
  return rate<rnn_ext::cells::Lstm>(backward, seconds);
}
