// Chooses the instruction set at run time.
#include <cstring>
#include <stdexcept>
#include <string>

#include "cells/cells.h"
#include "cpu/kernels.h"

namespace rnn_ext::cpu {
namespace {

struct Level {
  const char* name;
  const Kernels* kernels;
  bool (*supported)();
};

const Level kLevels[] = {
// best first
#if defined(RNN_EXT_X86_KERNELS)
    {"avx512", &avx512::kKernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
    {"avx2", &avx2::kKernels, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"baseline", &baseline::kKernels, [] { return true; }},
};

const Level* best() {
  for (const Level& level : kLevels)
    if (level.supported()) return &level;
  return nullptr;  // not reached: the last level is always supported
}

const Level* current = best();

/// Threads beyond the first cost waking them (microseconds if they are awake, milliseconds if they sleep): below this
/// many multiply-adds the job is over before they come.
constexpr double kWorthwhile = 2e7;

Executor worthwhile(const Executor& executor, const Sizes& sizes, const Layout& layout, int gates, int passes) {
  const double work = double(layout.rows) * sizes.directions * gates * double(sizes.hidden) *
                      double(sizes.input + sizes.output()) * passes;
  return work < kWorthwhile ? Executor{} : executor;
}

int gates_of(CellKind cell) { return cell == CellKind::kLstm ? 4 : cell == CellKind::kGru ? 3 : 1; }

}  // namespace

void out_of_memory(size_t bytes) {
  throw std::runtime_error("rnn_ext: not enough memory: " + std::to_string(bytes) + " bytes of workspace are needed");
}

const char* capability() { return current->name; }

bool set_capability(const char* name) {
  for (const Level& level : kLevels) {
    if (std::strcmp(level.name, name) == 0 && level.supported()) {
      current = &level;
      return true;
    }
  }
  return false;
}

int saved_values(CellKind cell, bool projected, Variant variant) {
  if (variant == Variant::kLayerNorm) return cells::LayerNormLstm::kSaved + projected;
  const bool masked = variant == Variant::kMasked;
  switch (cell) {
    case CellKind::kGru:
      return cells::Gru::kSaved;
    case CellKind::kLstm:
      return (masked ? cells::Masked<cells::Lstm>::kSaved : cells::Lstm::kSaved) + projected;  // h before it
    default:
      return masked ? cells::Masked<cells::RnnTanh>::kSaved : 0;
  }
}

template <>
void layer_forward(const ForwardArgs<float>& args, const Executor& executor) {
  current->kernels->forward_float(args, worthwhile(executor, args.sizes, args.layout, gates_of(args.cell), 1));
}
template <>
void layer_forward(const ForwardArgs<double>& args, const Executor& executor) {
  current->kernels->forward_double(args, worthwhile(executor, args.sizes, args.layout, gates_of(args.cell), 1));
}
template <>
void layer_backward(const BackwardArgs<float>& args, const Executor& executor) {
  current->kernels->backward_float(args, worthwhile(executor, args.sizes, args.layout, gates_of(args.cell), 2));
}
template <>
void layer_backward(const BackwardArgs<double>& args, const Executor& executor) {
  current->kernels->backward_double(args, worthwhile(executor, args.sizes, args.layout, gates_of(args.cell), 2));
}

}  // namespace rnn_ext::cpu
