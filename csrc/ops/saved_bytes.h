// How much the CUDA path keeps for backward; torch-free, so that the fake kernel can ask on any build.
#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace rnn_ext::ops {

/// What is kept of every row of a direction, in bytes.
struct SavedBytes {
  int64_t
      unit;     // for each hidden unit: the cell state as accumulator, `planes` other values and, of a projected layer,
                //   the h before its projection, as stored
  int64_t row;  // besides: the statistics of layer normalisation
};

inline SavedBytes saved_bytes(int64_t planes, bool has_cell, bool projected, bool normed, int64_t itemsize) {
  const int64_t accumulator = itemsize == 8 ? 8 : 4;
  return {(has_cell ? accumulator : 0) + (planes + (projected ? 1 : 0)) * itemsize,
          normed ? RNN_EXT_NORM_STATISTICS * accumulator : 0};
}

}  // namespace rnn_ext::ops
