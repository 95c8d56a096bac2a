// torch's threads, for the kernels of csrc/cpu.
#pragma once

#include "cpu/layer.h"

namespace rnn_ext::ops {

/// As many as torch would use here.
cpu::Executor executor();

/// Holds torch's own operators to one thread in a forked child whose pool does not exist, where they would wait for it:
/// those that convert here, and whatever stands between the caller's layers.
void leave_inherited_pool();

}  // namespace rnn_ext::ops
