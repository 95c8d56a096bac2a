// Memory that goes from one call to the next.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rnn_ext::cpu {

/// From so many bytes on, what is given back waits for the next to take it.
constexpr size_t kPooled = size_t(128) << 10;
/// Up to so many, it waits for the next of the same size in the same thread.
constexpr size_t kSmall = size_t(8) << 10;

/// At least so many bytes that hold anything, aligned to a cache line. Large memory comes fresh from the system, which
/// fills every page with zeros when it is first touched: up to a quarter of a training step, if every call has it anew.
/// And a training step takes three dozen small pieces, which is a thirtieth of it where it has little to compute. So
/// what has been given back is taken first. Any thread may call; throws std::runtime_error if there is none left.
void* take_memory(size_t bytes);

/// Of large memory up to 128 MiB wait, in at most 64 pieces; then those that have waited the longest go back to the
/// system. Of small pieces up to 256 KiB wait with a thread; then all of its go. Null does nothing.
void give_memory(void* data);

/// Bytes that wait, with the small pieces of the calling thread, and an end to that.
int64_t idle_memory();
void drop_idle_memory();

}  // namespace rnn_ext::cpu
