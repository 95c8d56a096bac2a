// torch's threads, for the kernels of csrc/cpu.
#pragma once

#include "cpu/layer.h"

namespace rnn_ext::ops {

/// As many as torch would use here.
cpu::Executor executor();

/// Holds torch's own operators to one thread in a forked child whose pool does not exist, where they would wait for it:
/// those that convert here, and whatever stands between the caller's layers. Once after each fork.
void leave_inherited_pool();

/// Nanoseconds that what a thread of torch's pool writes takes to come to another one: the longest from the one that
/// calls to one of the next 15, measured now. 0 where there is none.
double thread_distance();

/// What it is taken to be from now on by those who would measure it, for tests; below 0: as it is.
void assume_thread_distance(double nanoseconds);

}  // namespace rnn_ext::ops
