// The list of cells. Adding one: its header, an X line here, its oracle in rnn_ext/reference.py, its module.
#pragma once

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "cells/variants.h"

namespace rnn_ext::cells {

/// How many of a cell's saved values stand before its cell state; all where it has none.
template <class Cell>
constexpr int saved_planes() {
  if constexpr (Cell::kHasCell) return Cell::kSavedCell;
  return Cell::kSaved;
}

}  // namespace rnn_ext::cells

#define RNN_EXT_FOR_EACH_CELL(X) \
  X(RnnTanh)                     \
  X(RnnRelu)                     \
  X(Gru)                         \
  X(Lstm)

namespace rnn_ext::cells {

/// G of each cell of the list, whose order is that of every enumeration of cells.
#define RNN_EXT_GATES(Cell) Cell::kGates,
inline constexpr int kGatesOf[] = {RNN_EXT_FOR_EACH_CELL(RNN_EXT_GATES)};
#undef RNN_EXT_GATES

}  // namespace rnn_ext::cells
