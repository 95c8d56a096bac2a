// Everything of csrc/cpu that is compiled once per instruction set. The file that includes this one sets
//   RNN_EXT_ISA               the namespace the kernels go to
//   RNN_EXT_VECTOR_BYTES      width of a vector
//   RNN_EXT_VECTOR_REGISTERS  how many there are
//   RNN_EXT_BFLOAT16          defined: only the kernels for BFloat16, which the instruction set multiplies in pairs
// and includes csrc/cpu/kernels.h first, so that no library header is compiled for a special instruction set: an inline
// function of one, compiled twice, could be linked in the version that the processor cannot run.

#include "cells/cells.h"

namespace rnn_ext::cpu::RNN_EXT_ISA {
namespace {

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define ALWAYS_INLINE_LAMBDA __attribute__((always_inline))
#define NO_INLINE __attribute__((noinline))

#include "cpu/vec.inl"
#include "cpu/product.inl"
#include "cpu/forward.inl"
#include "cpu/backward.inl"

template <class S>
void forward_any(const ForwardArgs<S>& args, const Executor& executor) {
  switch (args.cell) {
    case CellKind::kRnnTanh:
      return forward<cells::RnnTanh>(args, executor);
    case CellKind::kRnnRelu:
      return forward<cells::RnnRelu>(args, executor);
    case CellKind::kGru:
      return forward<cells::Gru>(args, executor);
    case CellKind::kLstm:
      return forward<cells::Lstm>(args, executor);
  }
}

template <class S>
void backward_any(const BackwardArgs<S>& args, const Executor& executor) {
  switch (args.cell) {
    case CellKind::kRnnTanh:
      return backward<cells::RnnTanh>(args, executor);
    case CellKind::kRnnRelu:
      return backward<cells::RnnRelu>(args, executor);
    case CellKind::kGru:
      return backward<cells::Gru>(args, executor);
    case CellKind::kLstm:
      return backward<cells::Lstm>(args, executor);
  }
}

}  // namespace

#if defined(RNN_EXT_BFLOAT16)
const Kernels<BFloat16> kBFloat16 = {forward_any<BFloat16>, backward_any<BFloat16>};
#else
const Kernels<float> kFloat = {forward_any<float>, backward_any<float>};
const Kernels<double> kDouble = {forward_any<double>, backward_any<double>};
#endif

}  // namespace rnn_ext::cpu::RNN_EXT_ISA
