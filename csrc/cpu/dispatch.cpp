// Chooses the instruction set at run time.
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cells/cells.h"
#include "cpu/kernels.h"

namespace rnn_ext::cpu {
namespace {

struct Level {
  const char* name;
  const Kernels<float>* float_kernels;
  const Kernels<double>* double_kernels;
  void (*digest)(Digest*, const void*, size_t);
  bool (*supported)();
};

const Level kLevels[] = {
// best first
#if defined(RNN_EXT_X86_KERNELS)
    {"avx512", &avx512::kFloat, &avx512::kDouble, &avx512::add_to_digest,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
    {"avx2", &avx2::kFloat, &avx2::kDouble, &avx2::add_to_digest,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"baseline", &baseline::kFloat, &baseline::kDouble, &baseline::add_to_digest, [] { return true; }},
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

bool computes_bfloat16() {
#if defined(RNN_EXT_X86_KERNELS)
  return std::strcmp(current->name, "avx512") == 0 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

namespace {

template <class S>
const Kernels<S>& kernels() {
  if constexpr (std::is_same_v<S, float>) {
    return *current->float_kernels;
  } else if constexpr (std::is_same_v<S, double>) {
    return *current->double_kernels;
  } else {
#if defined(RNN_EXT_X86_KERNELS)
    if (computes_bfloat16()) return avx512_bf16::kBFloat16;
#endif
    throw std::logic_error("rnn_ext: this instruction set does not compute in bfloat16");
  }
}

}  // namespace

bool uses_packed_weights(const Layout& layout) {
  return layout.rows > 4;  // for fewer, packing costs more than it saves (measured: about even at 8)
}

template <class S>
std::unique_ptr<PackedWeights> pack_weights(CellKind cell, const Sizes& sizes, const Weights<const S>& weights) {
  return kernels<S>().pack(cell, sizes, weights);
}
template std::unique_ptr<PackedWeights> pack_weights(CellKind, const Sizes&, const Weights<const float>&);
template std::unique_ptr<PackedWeights> pack_weights(CellKind, const Sizes&, const Weights<const double>&);
template std::unique_ptr<PackedWeights> pack_weights(CellKind, const Sizes&, const Weights<const BFloat16>&);

void add_to_digest(Digest* digest, const void* data, size_t bytes) { current->digest(digest, data, bytes); }

template <class T>
void random_mask(uint64_t seed, double p, T value, T* out, int64_t size) {
  kernels<T>().random_mask(seed, p, value, out, size);
}
template void random_mask(uint64_t, double, float, float*, int64_t);
template void random_mask(uint64_t, double, double, double*, int64_t);

template <class S>
void layer_forward(const ForwardArgs<S>& args, const Executor& executor) {
  kernels<S>().forward(args, worthwhile(executor, args.sizes, args.layout, cells::kGatesOf[int(args.cell)], 1));
}
template <class S>
void layer_backward(const BackwardArgs<S>& args, const Executor& executor) {
  kernels<S>().backward(args, worthwhile(executor, args.sizes, args.layout, cells::kGatesOf[int(args.cell)], 2));
}
template void layer_forward(const ForwardArgs<float>&, const Executor&);
template void layer_forward(const ForwardArgs<double>&, const Executor&);
template void layer_forward(const ForwardArgs<BFloat16>&, const Executor&);
template void layer_backward(const BackwardArgs<float>&, const Executor&);
template void layer_backward(const BackwardArgs<double>&, const Executor&);
template void layer_backward(const BackwardArgs<BFloat16>&, const Executor&);

}  // namespace rnn_ext::cpu
