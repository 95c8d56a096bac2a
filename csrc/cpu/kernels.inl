// Everything of csrc/cpu that is compiled once per instruction set. The file that includes this one sets
//   RNN_EXT_ISA               the namespace the kernels go to
//   RNN_EXT_VECTOR_BYTES      width of a vector
//   RNN_EXT_VECTOR_REGISTERS  how many there are
//   RNN_EXT_WIDENS_FLOAT16    defined: the instruction set turns Float16 into float and back
//   RNN_EXT_BFLOAT16          defined: only the kernels for BFloat16, which the instruction set multiplies in pairs
//   RNN_EXT_AMX               defined: by tiles of AMX, bfloat16 or weights of 8 bits
//   RNN_EXT_WIDENED           defined: only the kernels for 16 bits that are widened
//   RNN_EXT_FLOAT64           defined: only the kernels for double
//   RNN_EXT_FEW_UNITS         defined: only the kernels for few units and many sequences
//   RNN_EXT_QUANTIZED         defined: only the kernel for weights of 8 bits
//   RNN_EXT_VNNI              defined: the instruction set multiplies integers and adds their products, on x86-64
//   RNN_EXT_DOT_PRODUCT       defined: the same on aarch64
// and includes csrc/cpu/kernels.h first, so that no library header is compiled for a special instruction set: an inline
// function of one, compiled twice, could be linked in the version that the processor cannot run.

#include "cells/dual.h"
#include "cpu/with_cell.h"
#if defined(RNN_EXT_QUANTIZED)
#include "cpu/quantized.h"
#endif

namespace rnn_ext::cpu::RNN_EXT_ISA {
namespace {

#if defined(RNN_EXT_OUT_OF_LINE)  // a compiler that instruments every access takes minutes for what is inlined so far
#define ALWAYS_INLINE inline
#define ALWAYS_INLINE_LAMBDA
#else
#define ALWAYS_INLINE inline __attribute__((always_inline))
#define ALWAYS_INLINE_LAMBDA __attribute__((always_inline))
#endif
#define NO_INLINE __attribute__((noinline))

#if defined(RNN_EXT_AMX)
constexpr bool kHasAmx = true;
#else
constexpr bool kHasAmx = false;
#endif

// GCC warns of vectors that lambdas in templates return, as if these were functions for others to call.
#pragma GCC diagnostic ignored "-Wpsabi"
#if defined(__clang__)  // which does not know all warnings that are switched off below
#pragma GCC diagnostic ignored "-Wunknown-warning-option"
#endif

#include "cpu/buffer.inl"
#include "cpu/vec.inl"
#include "cpu/operand.inl"
#include "cpu/math.inl"
#include "cpu/tile.inl"
#include "cpu/side.inl"
#include "cpu/row.inl"
#include "cpu/panels.inl"
#if defined(RNN_EXT_AMX)
#include "cpu/amx.inl"
#include "cpu/amx_product.inl"
#else
#include "cpu/product.inl"
#endif
#include "cpu/dot.inl"
#include "cpu/plain_product.inl"
#include "cpu/scan.inl"
#include "cpu/forward_weights.inl"
#include "cpu/forward.inl"
#include "cpu/inputs.inl"
#include "cpu/forward_pass.inl"
#include "cpu/backward_weights.inl"
#include "cpu/backward_rows.inl"
#include "cpu/backward.inl"
#include "cpu/input_gradient.inl"
#include "cpu/weight_gradient.inl"
#include "cpu/batch_parts.inl"
#include "cpu/backward_pass.inl"
#include "cpu/tangent.inl"
#include "cpu/variants.inl"
#include "cpu/random.inl"
#if defined(RNN_EXT_FEW_UNITS)
#include "cpu/columns.inl"
#include "cpu/few_units.inl"
#include "cpu/few_units_backward.inl"
#endif
#if defined(RNN_EXT_QUANTIZED)
#include "cpu/quantized.inl"
#endif

/// Variants are not computed in 16 bits.
template <template <class> class Args, class S, class Fn>
void with_cell_of(const Args<S>& args, const Fn& fn) {
  if constexpr (std::is_same_v<S, Compute<S>>) {
    with_cell(args.cell, args.variant, fn);
  } else {
    with_cell(args.cell, fn);
  }
}

template <class S>
std::unique_ptr<PackedWeights> pack_any(CellKind cell, const Sizes& sizes, const Weights<const S>& weights) {
  return with_cell(cell, [&]<class Cell>() -> std::unique_ptr<PackedWeights> {
    return std::make_unique<ForwardWeights<Cell, S>>(weights, sizes, Packing::kWhole, Executor());
  });
}

template <class S>
void forward_any(const ForwardArgs<S>& args, const Executor& executor) {
  with_cell_of(args, [&]<class Cell>() { forward<Cell>(args, executor); });
}

template <class S>
void forward_stack_any(const ForwardArgs<S>* layers, int count, const Executor& executor) {
  with_cell(layers[0].cell, [&]<class Cell>() { forward_stack<Cell>(layers, count, executor); });
}

template <class S>
void backward_any(const BackwardArgs<S>& args, const Executor& executor) {
  with_cell_of(args, [&]<class Cell>() { backward<Cell>(args, executor); });
}

template <class T>
void tangent_any(const TangentArgs<T>& args, const Executor& executor) {
  with_cell(args.values.cell, [&]<class Cell>() { tangent<Cell>(args, executor); });
}

#if defined(RNN_EXT_FEW_UNITS)
/// Calls fn.operator()<Cell>() with the very cell: what the two of torch.nn.RNN take is small.
template <class Fn>
void with_exact_cell(CellKind cell, const Fn& fn) {
  with_cell(cell, [&]<class Cell>() { with_exact<Cell>(cell, fn); });
}

template <class T>
void few_units_forward_any(const ForwardArgs<T>& args, const Executor& executor) {
  with_exact_cell(args.cell, [&]<class Cell>() { few_units_forward<Cell>(args, executor); });
}

template <class T>
void few_units_backward_any(const BackwardArgs<T>& args, const Executor& executor) {
  with_exact_cell(args.cell, [&]<class Cell>() { few_units_backward<Cell>(args, executor); });
}
#endif

}  // namespace

#if defined(RNN_EXT_QUANTIZED)
const QuantizedKernel kQuantized = [](const QuantizedArgs& args, const Executor& executor) {
  with_cell(args.call.cell, [&]<class Cell>() {
    if (kHasAmx || args.pack == 4) return quantized_forward<Cell, 4>(args, executor);  // whose tiles are of 8 bits
    if constexpr (!kHasAmx) quantized_forward<Cell, 2>(args, executor);
  });
};
#elif defined(RNN_EXT_FEW_UNITS)
const FewUnitsKernels<float> kFewUnitsFloat = {few_units_forward_any<float>, few_units_backward_any<float>};
const FewUnitsKernels<double> kFewUnitsDouble = {few_units_forward_any<double>, few_units_backward_any<double>};
#elif defined(RNN_EXT_BFLOAT16)
const Kernels<BFloat16> kBFloat16 = {forward_any<BFloat16>, pack_any<BFloat16>, forward_stack_any<BFloat16>,
                                     backward_any<BFloat16>};
#elif defined(RNN_EXT_WIDENED)
const Kernels<BFloat16> kWidenedBFloat16 = {forward_any<BFloat16>, pack_any<BFloat16>};
#if defined(RNN_EXT_WIDENS_FLOAT16)
const Kernels<Float16> kWidenedFloat16 = {forward_any<Float16>, pack_any<Float16>};
#else
const Kernels<Float16> kWidenedFloat16 = {nullptr};
#endif
#elif defined(RNN_EXT_FLOAT64)
const Kernels<double> kDouble = {forward_any<double>,  pack_any<double>,    forward_stack_any<double>,
                                 backward_any<double>, random_mask<double>, tangent_any<double>};
#else
void add_to_digest(Digest* digest, const void* data, size_t bytes) {
  // Two sums over 64-bit words: of the words themselves, which any single change changes, and of the products of their
  // keyed halves (NH: Black et al., "UMAC", 1999), which tells apart most of what has the same sum. Each place has a
  // key of its own, so that words which change places are noticed.
  const char* from = static_cast<const char*>(data);
  Words plain = {}, product = {}, key = {}, words;
  for (int i = 0; i < kWords; ++i) key[i] = 0x9e3779b97f4a7c15u * uint64_t(i + 1);
  const auto add = [&] {
    key += 0xd1342543de82ef95u;
    plain += words;
    const Words keyed = words + key;
    product += multiply_halves(keyed, keyed >> 32);
  };
  for (; bytes >= sizeof(words); bytes -= sizeof(words), from += sizeof(words)) {
    std::memcpy(&words, from, sizeof(words));
    add();
  }
  words = Words{};
  std::memcpy(&words, from, bytes);
  add();
  for (int i = 0; i < kWords; ++i) {
    digest->sums[2 * i] = digest->sums[2 * i] * 0x2545f4914f6cdd1du + plain[i];
    digest->sums[2 * i + 1] = digest->sums[2 * i + 1] * 0x2545f4914f6cdd1du + product[i];
  }
}

const Kernels<float> kFloat = {forward_any<float>,  pack_any<float>,    forward_stack_any<float>,
                               backward_any<float>, random_mask<float>, tangent_any<float>};
#endif

}  // namespace rnn_ext::cpu::RNN_EXT_ISA
