#include "cpu/memory.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdlib>
#include <deque>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace rnn_ext::cpu {
namespace {

constexpr size_t kLine = 64;
constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kMostIdle = size_t(128) << 20;
constexpr size_t kMostPieces = 64;
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kKeeps = false;  // a sanitizer is to see who uses memory that is not theirs any more
#else
constexpr bool kKeeps = true;
#endif

/// What lies before the memory that is handed out.
struct alignas(kLine) Block {
  size_t bytes;  // of that memory
};

// Never destroyed: threads may give memory back while the process ends.
std::mutex& mutex = *new std::mutex;
std::deque<Block*>& idle = *new std::deque<Block*>;  // the last to come back at the end
size_t idle_bytes = 0;

// A child of a fork must not find the mutex taken by a thread that it does not have.
[[maybe_unused]] const int watch_forks =
    pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { mutex.unlock(); });

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

Block* allocate(size_t bytes) {
  if (bytes > SIZE_MAX / 2) return nullptr;
  const size_t whole = sizeof(Block) + (bytes + kLine - 1) / kLine * kLine;
  void* memory = std::aligned_alloc(kLine, whole);
  if (!memory) return nullptr;
  prefer_huge_pages(memory, whole);
  return new (memory) Block{whole - sizeof(Block)};
}

/// The smallest idle block that is large enough and of which less than a quarter would go to waste.
Block* take_idle(size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  auto best = idle.end();
  for (auto at = idle.begin(); at != idle.end(); ++at) {
    const size_t size = (*at)->bytes;
    if (size < bytes || size > bytes + bytes / 3) continue;
    if (best == idle.end() || size <= (*best)->bytes) best = at;  // of equal ones the last: it may be in a cache
  }
  if (best == idle.end()) return nullptr;
  Block* found = *best;
  idle.erase(best);
  idle_bytes -= found->bytes;
  return found;
}

}  // namespace

void* take_memory(size_t bytes) {
  Block* block = bytes >= kPooled ? take_idle(bytes) : nullptr;
  if (!block) block = allocate(bytes);
  if (!block) {
    drop_idle_memory();
    block = allocate(bytes);
  }
  if (!block)
    throw std::runtime_error("rnn_ext: not enough memory: " + std::to_string(bytes) + " bytes of workspace are needed");
  return block + 1;
}

void give_memory(void* data) {
  if (!data) return;
  Block* block = static_cast<Block*>(data) - 1;
  if (!kKeeps || block->bytes < kPooled || block->bytes > kMostIdle) return std::free(block);
  std::vector<Block*> dropped;  // freed without the lock
  {
    const std::lock_guard<std::mutex> lock(mutex);
    idle.push_back(block);
    idle_bytes += block->bytes;
    while (idle_bytes > kMostIdle || idle.size() > kMostPieces) {
      idle_bytes -= idle.front()->bytes;
      dropped.push_back(idle.front());
      idle.pop_front();
    }
  }
  for (Block* old : dropped) std::free(old);
}

int64_t idle_memory() {
  const std::lock_guard<std::mutex> lock(mutex);
  return int64_t(idle_bytes);
}

void drop_idle_memory() {
  std::deque<Block*> dropped;  // freed without the lock
  {
    const std::lock_guard<std::mutex> lock(mutex);
    dropped.swap(idle);
    idle_bytes = 0;
  }
  for (Block* block : dropped) std::free(block);
}

}  // namespace rnn_ext::cpu
