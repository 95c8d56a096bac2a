// Everything of csrc/cpu that is compiled once per instruction set. The file that includes this one sets
//   RNN_EXT_ISA               the namespace the kernels go to
//   RNN_EXT_VECTOR_BYTES      width of a vector
//   RNN_EXT_VECTOR_REGISTERS  how many there are
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

template <class T>
void forward_any(const ForwardArgs<T>& args, const Executor& executor) {
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

template <class T>
void backward_any(const BackwardArgs<T>& args, const Executor& executor) {
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

extern const Kernels kKernels;
const Kernels kKernels = {forward_any<float>, forward_any<double>, backward_any<float>, backward_any<double>};

}  // namespace rnn_ext::cpu::RNN_EXT_ISA
