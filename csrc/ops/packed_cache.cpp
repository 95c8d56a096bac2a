#include "ops/packed_cache.h"

#include <pthread.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace rnn_ext::ops {
namespace {

struct Key {
  const void* weight_hh;
  const void* weight_ih;
  const char* capability;  // a literal: packed for one instruction set only
  cpu::CellKind cell;
  int64_t input, hidden, proj;
  at::ScalarType given, stored;
  bool operator==(const Key&) const = default;
};

struct Entry {
  Key key;
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  cpu::Digest digest;
  std::shared_ptr<const cpu::PackedWeights> packed;  // null after the first call
  uint64_t used;                                     // number of the last call that found it
};

// Never destroyed: other threads may still compute while the process ends.
std::mutex& mutex = *new std::mutex;
std::vector<Entry>& entries = *new std::vector<Entry>;
uint64_t calls = 0;
constexpr size_t kMost = 1024;  // looked through by every call

// In the child of a fork the mutex may be taken by a thread that the child does not have, in the midst of something.
[[maybe_unused]] const int watch_forks = pthread_atfork(nullptr, nullptr, [] {
  new (&mutex) std::mutex;
  new (&entries) std::vector<Entry>;
});

Entry* find(const Key& key) {
  const auto found = std::find_if(entries.begin(), entries.end(), [&](const Entry& e) { return e.key == key; });
  if (found == entries.end()) return nullptr;
  found->used = ++calls;
  return &*found;
}

void add(Entry entry) {
  if (entries.size() < kMost) return entries.push_back(std::move(entry));
  *std::min_element(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.used < b.used; }) =
      std::move(entry);
}

void forget_expired() {
  std::erase_if(entries, [](const Entry& entry) { return entry.storage.expired(); });
}

cpu::Digest digest_of(at::TensorList weights) {
  cpu::Digest digest;
  for (const at::Tensor& weight : weights)
    if (weight.numel() > 0) cpu::add_to_digest(&digest, weight.const_data_ptr(), weight.nbytes());
  return digest;
}

}  // namespace

std::shared_ptr<const cpu::PackedWeights> cached_weights(
    cpu::CellKind cell, const cpu::Sizes& sizes, at::TensorList weights, at::ScalarType stored,
    c10::function_ref<std::unique_ptr<cpu::PackedWeights>()> pack) {
  const at::Tensor &weight_ih = weights[0], &weight_hh = weights[1];
  const Key key{weight_hh.const_data_ptr(),
                weight_ih.const_data_ptr(),
                cpu::capability(),
                cell,
                sizes.input,
                sizes.hidden,
                sizes.proj,
                weight_hh.scalar_type(),
                stored};
  const cpu::Digest digest = digest_of(weights);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    forget_expired();
    Entry* entry = find(key);
    if (!entry || entry->digest != digest) {
      const auto storage = c10::weak_intrusive_ptr<c10::StorageImpl>(weight_hh.storage().getWeakStorageImpl());
      Entry fresh{key, storage, digest, nullptr, ++calls};
      entry ? void(*entry = std::move(fresh)) : add(std::move(fresh));
      return nullptr;
    }
    if (entry->packed) return entry->packed;
  }
  const std::shared_ptr<const cpu::PackedWeights> packed = pack();
  if (digest_of(weights) != digest) return packed;  // another thread has changed them meanwhile: not to be kept
  const std::lock_guard<std::mutex> lock(mutex);
  Entry* entry = find(key);
  if (entry && entry->digest == digest) entry->packed = packed;
  return packed;
}

int64_t cached_weights_count() {
  const std::lock_guard<std::mutex> lock(mutex);
  return std::count_if(entries.begin(), entries.end(), [](const Entry& e) { return e.packed != nullptr; });
}

void clear_cached_weights() {
  const std::lock_guard<std::mutex> lock(mutex);
  entries.clear();
}

}  // namespace rnn_ext::ops
