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
#include "cpu/variants.inl"

template <class Cell, class T>
void forward_cell(const ForwardArgs<T>& args, const Executor& executor) {
  if (args.variant == Variant::kPlain) return forward<Cell>(args, executor);
  if (args.variant == Variant::kMasked) return forward<cells::Masked<Cell>>(args, executor);
  return forward<cells::LayerNormLstm>(args, executor);
}

template <class Cell, class T>
void backward_cell(const BackwardArgs<T>& args, const Executor& executor) {
  if (args.variant == Variant::kPlain) return backward<Cell>(args, executor);
  if (args.variant == Variant::kMasked) return backward<cells::Masked<Cell>>(args, executor);
  return backward<cells::LayerNormLstm>(args, executor);
}

template <class T>
void forward_any(const ForwardArgs<T>& args, const Executor& executor) {
  switch (args.cell) {
    case CellKind::kRnnTanh:
      return forward_cell<cells::RnnTanh>(args, executor);
    case CellKind::kRnnRelu:
      return forward_cell<cells::RnnRelu>(args, executor);
    case CellKind::kGru:
      return forward_cell<cells::Gru>(args, executor);
    case CellKind::kLstm:
      return forward_cell<cells::Lstm>(args, executor);
  }
}

template <class T>
void backward_any(const BackwardArgs<T>& args, const Executor& executor) {
  switch (args.cell) {
    case CellKind::kRnnTanh:
      return backward_cell<cells::RnnTanh>(args, executor);
    case CellKind::kRnnRelu:
      return backward_cell<cells::RnnRelu>(args, executor);
    case CellKind::kGru:
      return backward_cell<cells::Gru>(args, executor);
    case CellKind::kLstm:
      return backward_cell<cells::Lstm>(args, executor);
  }
}

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels = {forward_any<float>, forward_any<double>, backward_any<float>, backward_any<double>};

}  // namespace rnn_ext::cpu::RNN_EXT_ISA
