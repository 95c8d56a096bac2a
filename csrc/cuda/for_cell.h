// From a cell's number to its type.
#pragma once

#include "cells/cells.h"
#include "cuda/launch.h"

namespace rnn_ext::cuda {

// run(a value of the cell's type). The number has been checked.
template <class Run>
auto for_cell(RnnExtCell cell, const Run& run) {
#define RNN_EXT_CASE(Cell, NAME) \
  case RNN_EXT_##NAME:           \
    return run(cells::Cell{});
  switch (cell) { RNN_EXT_FOR_EACH_CELL(RNN_EXT_CASE) }
#undef RNN_EXT_CASE
  __builtin_unreachable();
}

}  // namespace rnn_ext::cuda
