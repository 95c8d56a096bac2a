// All cells. CONTRIBUTING.md says how to add one.
#pragma once

#include "cells/gru.h"
#include "cells/list.h"
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

/// G of each cell of the list.
#define RNN_EXT_GATES(Cell, NAME) Cell::kGates,
inline constexpr int kGatesOf[] = {RNN_EXT_FOR_EACH_CELL(RNN_EXT_GATES)};
#undef RNN_EXT_GATES

}  // namespace rnn_ext::cells
