// How much the CUDA path keeps for backward; torch-free, so that the fake kernel can ask on any build.
#pragma once

#include <cstdint>

namespace rnn_ext::ops {

/// Bytes for each hidden unit of each row and direction: the cell state as accumulator, `planes` other values and, of a
/// projected layer, the h before its projection, as stored.
inline int64_t saved_bytes(int64_t planes, bool has_cell, bool projected, int64_t itemsize) {
  const int64_t accumulator = itemsize == 8 ? 8 : 4;
  return (has_cell ? accumulator : 0) + (planes + (projected ? 1 : 0)) * itemsize;
}

}  // namespace rnn_ext::ops
