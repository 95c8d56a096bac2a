// The table of kernels that each instruction set fills, and every library header the kernels use.
#pragma once

#include <sched.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/layer.h"
#include "cpu/memory.h"

namespace rnn_ext::cpu {

/// How many slices to cut the batch into, one for each thread that there is for a direction, as far as they pay.
/// `itemsize`: bytes of a weight; `or_units`: threads can share the units of one slice instead.
int64_t count_slices(const Layout& layout, const Sizes& sizes, int gates, int64_t itemsize, const Executor& executor,
                     bool or_units);

/// Deals a batch out to so many slices that take about equally long: where each ends. (If there are fewer entries, some
/// slices have none.)
void deal_out(const Layout& layout, int64_t slices, int64_t* ends);

/// Into how many parts backward takes a batch, see batch_parts.inl: 1, 2 or kMostParts.
constexpr int kMostParts = 4;
int count_parts(CellKind cell, Variant variant, const Sizes& sizes, const Layout& layout);

/// Of no more rows in all, backward reads a weight that it multiplies by once, and writes a weight's gradient, as they
/// lie in memory (16 bits by way of the cache): packing the one, and a block of columns of the other after another,
/// take longer (measured on a Xeon, one row and gradients beyond the second-level cache: 1.5 to 3 times; 128 rows: 1.02
/// to 1.25 times).
constexpr int64_t kFewRows = 128;
inline bool has_few_rows(int64_t rows) { return rows <= kFewRows; }

/// Whether the units past the last whole block, of so many lanes, are so few that the weights of all their gates go
/// into one vector, a quarter of it for each: the tail. As a block like the others they would be computed with mostly
/// empty lanes.
constexpr bool has_tail(int64_t gates, int64_t units, int64_t lanes) {
  const int64_t rest = units % lanes;
  return gates > 1 && gates <= 4 && rest > 0 && rest <= lanes / 4;
}

/// The kernels for one storage type. Of 16 bits that the instruction set does not multiply, but widens, there are
/// `forward` and `pack`, of others nothing.
template <class S>
struct Kernels {
  void (*forward)(const ForwardArgs<S>&, const Executor&);
  std::unique_ptr<PackedWeights> (*pack)(CellKind, const Sizes&, const Weights<const S>&) = nullptr;
  void (*forward_stack)(const ForwardArgs<S>*, int, const Executor&) = nullptr;
  void (*backward)(const BackwardArgs<S>&, const Executor&) = nullptr;
  void (*random_mask)(uint64_t, double, S, S*, int64_t) = nullptr;
  void (*tangent)(const TangentArgs<S>&, const Executor&) = nullptr;
};

/// Those for layers of which has_few_units() holds.
template <class T>
struct FewUnitsKernels {
  void (*forward)(const ForwardArgs<T>&, const Executor&);
  void (*backward)(const BackwardArgs<T>&, const Executor&);
};

struct QuantizedArgs;
using QuantizedKernel = void (*)(const QuantizedArgs&, const Executor&);

namespace baseline {
extern const QuantizedKernel kQuantized;
extern const FewUnitsKernels<float> kFewUnitsFloat;
extern const FewUnitsKernels<double> kFewUnitsDouble;
extern const Kernels<float> kFloat;
extern const Kernels<double> kDouble;
extern const Kernels<BFloat16> kWidenedBFloat16;
extern const Kernels<Float16> kWidenedFloat16;
void add_to_digest(Digest* digest, const void* data, size_t bytes);
}  // namespace baseline
#if defined(__x86_64__) && !defined(RNN_EXT_BASELINE_ONLY)
#define RNN_EXT_X86_KERNELS 1
namespace avx2 {
extern const QuantizedKernel kQuantized;
extern const FewUnitsKernels<float> kFewUnitsFloat;
extern const FewUnitsKernels<double> kFewUnitsDouble;
extern const Kernels<float> kFloat;
extern const Kernels<double> kDouble;
extern const Kernels<BFloat16> kWidenedBFloat16;
extern const Kernels<Float16> kWidenedFloat16;
void add_to_digest(Digest* digest, const void* data, size_t bytes);
}  // namespace avx2
namespace avx512 {
extern const QuantizedKernel kQuantized;
extern const FewUnitsKernels<float> kFewUnitsFloat;
extern const FewUnitsKernels<double> kFewUnitsDouble;
extern const Kernels<float> kFloat;
extern const Kernels<double> kDouble;
extern const Kernels<BFloat16> kWidenedBFloat16;
extern const Kernels<Float16> kWidenedFloat16;
void add_to_digest(Digest* digest, const void* data, size_t bytes);
}  // namespace avx512
namespace avx512_bf16 {
extern const Kernels<BFloat16> kBFloat16;
}
namespace avx512_amx {
extern const Kernels<BFloat16> kBFloat16;
}
namespace avx512_amx_int8 {
extern const QuantizedKernel kQuantized;
}
namespace avx512_vnni {
extern const QuantizedKernel kQuantized;
}
namespace avx2_vnni {
extern const QuantizedKernel kQuantized;
}
#endif
#if defined(__aarch64__)
namespace neon_dot {
extern const QuantizedKernel kQuantized;
}
#endif

}  // namespace rnn_ext::cpu
