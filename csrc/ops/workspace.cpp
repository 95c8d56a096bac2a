#include "ops/workspace.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <vector>

namespace rnn_ext::ops {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kLarge = 2 * kHugePage;
constexpr size_t kMostIdle = size_t(128) << 20;

struct Block {
  c10::DataPtr data;
  size_t bytes;
};

// Never destroyed: tensors may die while the process ends.
std::mutex& mutex = *new std::mutex;
std::vector<Block>& idle = *new std::vector<Block>;  // the last to come back at the end

size_t idle_bytes() {
  size_t sum = 0;
  for (const Block& block : idle) sum += block.bytes;
  return sum;
}

/// The smallest that is large enough and does not waste a third of itself; empty where there is none.
Block take(size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  auto best = idle.end();
  for (auto block = idle.begin(); block != idle.end(); ++block) {
    if (block->bytes < bytes || block->bytes > bytes + bytes / 2) continue;
    if (best == idle.end() || block->bytes < best->bytes) best = block;
  }
  if (best == idle.end()) return {};
  Block found = std::move(*best);
  idle.erase(best);
  return found;
}

void give_back(Block block) {
  if (block.bytes > kMostIdle) return;
  std::vector<Block> dropped;  // freed without the lock
  const std::lock_guard<std::mutex> lock(mutex);
  idle.push_back(std::move(block));
  for (size_t sum = idle_bytes(); sum > kMostIdle; sum -= dropped.back().bytes) {
    dropped.push_back(std::move(idle.front()));
    idle.erase(idle.begin());
  }
}

}  // namespace

void prefer_huge_pages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  if (bytes < kLarge) return;
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + bytes) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // where there are none, so be it
#endif
}

at::Tensor workspace(at::IntArrayRef size, const at::TensorOptions& options) {
  size_t bytes = options.dtype().itemsize();
  for (const int64_t n : size) bytes *= size_t(n);
  if (bytes < kLarge) return at::detail::empty_cpu(size, options);
  Block block = take(bytes);
  if (!block.data) {
    block = {c10::GetCPUAllocator()->allocate(bytes), bytes};
    prefer_huge_pages(block.data.get(), bytes);
  }
  void* data = block.data.get();
  auto* owner = new Block(std::move(block));
  return at::from_blob(
      data, size,
      [owner](void*) {
        give_back(std::move(*owner));
        delete owner;
      },
      options);
}

int64_t idle_workspace_bytes() {
  const std::lock_guard<std::mutex> lock(mutex);
  return int64_t(idle_bytes());
}

void drop_idle_workspaces() {
  std::vector<Block> dropped;  // freed without the lock
  const std::lock_guard<std::mutex> lock(mutex);
  dropped.swap(idle);
}

}  // namespace rnn_ext::ops
