// Packed weights kept between calls that do not train.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "cpu/layer.h"

namespace rnn_ext::ops {

/// The weights of one direction, packed; null if they are not worth keeping yet. They are recognised by where they lie
/// and compared by a digest of what they hold, so that no way of changing them goes unnoticed: not in place, not
/// through
/// `.data` and not by another process. Kept from the second call with the same values on, as long as the storage of
/// weight_hh lives; any thread may call.
template <class S>
std::shared_ptr<const cpu::PackedWeights> cached_weights(cpu::CellKind cell, const cpu::Sizes& sizes,
                                                         const cpu::Weights<const S>& weights,
                                                         const at::Tensor& weight_hh);

/// How many packed weights are kept, and forget them all; for tests.
int64_t cached_weights_count();
void clear_cached_weights();

}  // namespace rnn_ext::ops
