// From a cell's name to the type that code is compiled for, and to its equations.
#pragma once

#include <type_traits>

#include "cells/cells.h"
#include "cpu/layer.h"

namespace rnn_ext::cpu {

/// Either of the cells of torch.nn.RNN. They differ in a few instructions, which are chosen in each step: kernels that
/// were compiled for each were a fifth of all that is compiled.
struct AnyRnn : cells::RnnBase {};

template <class Cell>
using Compiled = std::conditional_t<std::is_base_of_v<cells::RnnBase, Cell>, AnyRnn, Cell>;

/// Calls fn.operator()<Cell>() with what the cell that is meant is compiled as,
template <class Fn>
auto with_cell(CellKind cell, const Fn& fn) {
#define RNN_EXT_CASE(Cell, NAME) \
  case CellKind::k##Cell:        \
    return fn.template operator()<Compiled<cells::Cell>>();
  switch (cell) { RNN_EXT_FOR_EACH_CELL(RNN_EXT_CASE) }
#undef RNN_EXT_CASE
  __builtin_unreachable();
}

/// and with this variant of it.
template <class Fn>
auto with_cell(CellKind cell, Variant variant, const Fn& fn) {
  if (variant == Variant::kLayerNorm) return fn.template operator()<cells::LayerNormLstm>();
  return with_cell(cell, [&]<class Cell>() {
    if (variant == Variant::kMasked) return fn.template operator()<cells::Masked<Cell>>();
    return fn.template operator()<Cell>();
  });
}

/// Calls fn.operator()<Exact>() with the cell whose equations are meant, `cell`, of those that are compiled as Cell.
template <class Cell, class Fn>
RNN_EXT_HD auto with_exact(CellKind cell, const Fn& fn) {
#define RNN_EXT_COUNT(Cell, NAME) +std::is_base_of_v<cells::RnnBase, cells::Cell>
  static_assert(RNN_EXT_FOR_EACH_CELL(RNN_EXT_COUNT) == 2);
#undef RNN_EXT_COUNT
  if constexpr (std::is_same_v<Cell, AnyRnn>) {
    if (cell == CellKind::kRnnRelu) return fn.template operator()<cells::RnnRelu>();
    return fn.template operator()<cells::RnnTanh>();
  } else {
    return fn.template operator()<Cell>();
  }
}

}  // namespace rnn_ext::cpu
