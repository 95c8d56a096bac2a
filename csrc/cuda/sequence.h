// Which rows exist at a timestep, what precedes and follows them, and where a reset cuts the chain. Pure integer logic,
// the same for every kernel, forward and backward.
#pragma once

#include <cstdint>

#include "cells/cell.h"

namespace rnn_ext::cuda {

// One timestep. Rows 0..rows-1 have storage; a time outside the sequence has none.
struct Moment {
  int64_t time = 0;
  int64_t rows = 0;
  int64_t offset = 0;  // of its row 0

  RNN_EXT_HD int64_t row(int64_t n, int64_t batch_stride) const { return offset + n * batch_stride; }
};

// What decides, beyond storage, whether a row takes part.
struct RowRules {
  int64_t batch_stride = 1;
  const int64_t* lengths = nullptr;  // [N] or null
  const uint8_t* resets = nullptr;   // [L, N] or null
  int64_t resets_time_stride = 0, resets_batch_stride = 0;

  RNN_EXT_HD bool exists(const Moment& at, int64_t n) const {
    return n < at.rows && (!lengths || at.time < lengths[n]);
  }

  // Whether a sequence begins between two neighbouring timesteps, that is at the later of them, whichever way time
  // runs.
  RNN_EXT_HD bool cut(const Moment& a, const Moment& b, int64_t n) const {
    if (!resets) return false;
    const Moment& later = a.time > b.time ? a : b;
    return exists(later, n) && resets[later.time * resets_time_stride + n * resets_batch_stride] != 0;
  }

  RNN_EXT_HD bool never_exists(int64_t n) const { return lengths && lengths[n] <= 0; }
};

}  // namespace rnn_ext::cuda
