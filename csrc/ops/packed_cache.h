// Packed weights kept between calls that do not train.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/FunctionRef.h>

#include <memory>

#include "cpu/layer.h"

namespace rnn_ext::ops {

/// The weights of one direction, packed by `pack`; null if they are not worth keeping yet. They are recognised by where
/// they lie and compared by a digest of what they hold, so that no way of changing them goes unnoticed: not in place,
/// not through `.data` and not by another process. Kept from the second call with the same values on, until the first
/// such call after the storage of weight_hh has gone, or until 1,024 others have been used since; any thread may call.
/// weights: as the caller has them, weight_ih and weight_hh first, each in one piece. stored: what `pack` is given.
std::shared_ptr<const cpu::PackedWeights> cached_weights(cpu::CellKind cell, const cpu::Sizes& sizes,
                                                         at::TensorList weights, at::ScalarType stored,
                                                         c10::function_ref<std::unique_ptr<cpu::PackedWeights>()> pack);

/// How many packed weights are kept, and forget them all; for tests.
int64_t cached_weights_count();
void clear_cached_weights();

}  // namespace rnn_ext::ops
