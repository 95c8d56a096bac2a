// From a cell's number to its type: the one list of all launchers.
#pragma once

#include "cells/cells.h"
#include "cuda/launch.h"

namespace rnn_ext::cuda {

// run(a value of the cell's type). The number has been checked.
template <class Run>
auto for_cell(RnnExtCell cell, const Run& run) {
  switch (cell) {
    case RNN_EXT_RNN_TANH:
      return run(cells::RnnTanh{});
    case RNN_EXT_RNN_RELU:
      return run(cells::RnnRelu{});
    case RNN_EXT_GRU:
      return run(cells::Gru{});
    case RNN_EXT_LSTM:
      break;
  }
  return run(cells::Lstm{});
}

}  // namespace rnn_ext::cuda
