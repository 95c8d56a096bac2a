#include "cpu/memory.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

namespace rnn_ext::cpu {
namespace {

constexpr size_t kLine = 64;
constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kMostIdle = size_t(128) << 20;
constexpr int kMostPieces = 64;
constexpr size_t kMostSmall = size_t(256) << 10;

// A sanitizer is to see who uses memory that is not theirs any more.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kKeeps = false;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
constexpr bool kKeeps = false;
#else
constexpr bool kKeeps = true;
#endif
#else
constexpr bool kKeeps = true;
#endif

/// What lies before the memory that is handed out.
struct alignas(kLine) Block {
  size_t bytes;           // of that memory
  Block* next = nullptr;  // of SmallBlocks
};

/// The small blocks that wait with a thread, by their size in lines; the last to come back first, which may be in a
/// cache.
class SmallBlocks {
 public:
  ~SmallBlocks() {
    drop();
    gone = true;
  }
  Block* take(size_t bytes) {
    Block*& first = list(bytes);
    if (!first) return nullptr;
    bytes_ -= bytes;
    return std::exchange(first, first->next);
  }
  void add(Block* block) {
    if (bytes_ + block->bytes > kMostSmall) drop();
    block->next = std::exchange(list(block->bytes), block);
    bytes_ += block->bytes;
  }
  void drop() {
    for (Block*& first : lists_) {
      while (first) std::free(std::exchange(first, first->next));
    }
    bytes_ = 0;
  }
  size_t bytes() const { return bytes_; }

  static thread_local bool gone;  // the thread ends, and what it destroys now still gives memory back

 private:
  Block*& list(size_t bytes) { return lists_[bytes / kLine - 1]; }

  Block* lists_[kSmall / kLine] = {};
  size_t bytes_ = 0;
};
thread_local bool SmallBlocks::gone = false;
thread_local SmallBlocks small_blocks;

/// The blocks that wait, the last to come back at the end. No function of it allocates or throws: memory is given back
/// in destructors.
struct Idle {
  std::mutex mutex;
  Block* blocks[kMostPieces];
  int count = 0;
  size_t bytes = 0;

  Block* remove(int at) {
    Block* block = blocks[at];
    std::memmove(blocks + at, blocks + at + 1, size_t(count - at - 1) * sizeof(Block*));
    --count;
    bytes -= block->bytes;
    return block;
  }
  void add(Block* block) {
    blocks[count++] = block;
    bytes += block->bytes;
  }
};

// Never destroyed: threads may give memory back while the process ends.
alignas(Idle) char place[sizeof(Idle)];
Idle* const idle = new (place) Idle;

// In the child of a fork the mutex may be taken by a thread that the child does not have, in the midst of something.
[[maybe_unused]] const int watch_forks = pthread_atfork(nullptr, nullptr, [] { new (place) Idle; });

/// Faulting in pages of 4 KiB takes longer; where there are no huge ones, so be it.
void prefer_huge_pages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  if (bytes < 2 * kHugePage) return;
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + bytes) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

/// Of whole lines.
Block* allocate(size_t bytes) {
  void* memory = std::aligned_alloc(kLine, sizeof(Block) + bytes);
  if (!memory) return nullptr;
  prefer_huge_pages(memory, sizeof(Block) + bytes);
  return new (memory) Block{bytes};
}

/// The smallest idle block that is large enough and of which less than a quarter would go to waste.
Block* take_idle(size_t bytes) {
  const std::lock_guard<std::mutex> lock(idle->mutex);
  int best = -1;
  for (int i = 0; i < idle->count; ++i) {
    const size_t size = idle->blocks[i]->bytes;
    if (size < bytes || size > bytes + bytes / 3) continue;
    if (best < 0 || size <= idle->blocks[best]->bytes) best = i;  // of equal ones the last: it may be in a cache
  }
  return best < 0 ? nullptr : idle->remove(best);
}

}  // namespace

void* take_memory(size_t bytes) {
  Block* block = nullptr;
  if (bytes <= SIZE_MAX / 2) {
    const size_t whole = bytes ? (bytes + kLine - 1) / kLine * kLine : kLine;
    if (whole >= kPooled) block = take_idle(whole);
    if (whole <= kSmall && !SmallBlocks::gone) block = small_blocks.take(whole);
    if (!block) block = allocate(whole);
    if (!block) {
      drop_idle_memory();
      block = allocate(whole);
    }
  }
  if (!block)
    throw std::runtime_error("rnn_ext: not enough memory: " + std::to_string(bytes) + " bytes (" +
                             std::to_string(bytes >> 20) + " MiB) are needed beside the results");
  return block + 1;
}

void give_memory(void* data) {
  if (!data) return;
  Block* block = static_cast<Block*>(data) - 1;
  if (kKeeps && block->bytes <= kSmall && !SmallBlocks::gone) return small_blocks.add(block);
  if (!kKeeps || block->bytes < kPooled || block->bytes > kMostIdle) return std::free(block);
  Block* dropped[kMostPieces];  // freed without the lock
  int count = 0;
  {
    const std::lock_guard<std::mutex> lock(idle->mutex);
    while (idle->count == kMostPieces || idle->bytes + block->bytes > kMostIdle) dropped[count++] = idle->remove(0);
    idle->add(block);
  }
  for (int i = 0; i < count; ++i) std::free(dropped[i]);
}

int64_t idle_memory() {
  const std::lock_guard<std::mutex> lock(idle->mutex);
  return int64_t(idle->bytes + small_blocks.bytes());
}

void drop_idle_memory() {
  small_blocks.drop();
  Block* dropped[kMostPieces];  // freed without the lock
  int count = 0;
  {
    const std::lock_guard<std::mutex> lock(idle->mutex);
    while (idle->count > 0) dropped[count++] = idle->remove(idle->count - 1);
  }
  for (int i = 0; i < count; ++i) std::free(dropped[i]);
}

}  // namespace rnn_ext::cpu
