// From a cell's name to its type.
#pragma once

#include "cells/cells.h"
#include "cpu/layer.h"

namespace rnn_ext::cpu {

/// Calls fn.operator()<Cell>() with the cell that is meant,
template <class Fn>
auto with_cell(CellKind cell, const Fn& fn) {
#define RNN_EXT_CASE(Cell, NAME) \
  case CellKind::k##Cell:        \
    return fn.template operator()<cells::Cell>();
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

}  // namespace rnn_ext::cpu
