// cp.async, mbarrier and st.async. Compiled without -fsanitize (see fiber.cpp); the copies themselves are in
// memory.cpp.
#include <cstring>

#include "memory.h"
#include "runtime.h"

namespace emu {
namespace {

Mbarrier& mbarrier_at(const void* address, Site site) {
  const auto found = active_run->mbarriers.find(address);
  if (found == active_run->mbarriers.end()) fail("mbarrier used before its init", site);
  return found->second;
}

void complete_phase_if_due(Mbarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  make_ready(barrier.waiting);
}

void perform_store(void* argument) {
  auto* store = static_cast<RemoteStore*>(argument);
  acquire(store->tag.get());
  checked_copy(store->to, store->data, store->bytes, store->bytes);
  release(&store->barrier->tags[store->barrier->phase & 1]);
}

bool aligned(const void* address, int bytes) {
  return reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes) == 0;
}

}  // namespace

void async_copy(void* to, const void* from, int bytes, int valid_bytes, Site site) {
  checked_poison(to, bytes);
  SanitizerPause pause;
  if (!aligned(to, bytes) || (valid_bytes && !aligned(from, bytes))) fail("misaligned cp.async", site);
  running->open_copies.push_back({to, from, bytes, valid_bytes, site});
}

void async_commit() {
  SanitizerPause pause;
  running->committed_copies.push_back(std::move(running->open_copies));
  running->open_copies.clear();
}

void async_wait(int pending_groups) {
  auto& groups = running->committed_copies;
  while (static_cast<int>(groups.size()) > pending_groups) {
    for (const AsyncCopy& copy : groups.front()) checked_copy(copy.to, copy.from, copy.bytes, copy.valid_bytes);
    SanitizerPause pause;
    groups.pop_front();
  }
}

void check_copies_finished(const Thread& thread) {
  if (!thread.open_copies.empty()) fail("thread exits with an uncommitted cp.async", thread.open_copies.front().site);
  for (const auto& group : thread.committed_copies) {
    if (!group.empty()) fail("thread exits with a cp.async in flight", group.front().site);
  }
  const_cast<Thread&>(thread).committed_copies.clear();
}

void mbarrier_init(void* barrier, unsigned count, Site site) {
  SanitizerPause pause;
  if (!aligned(barrier, 8)) fail("misaligned mbarrier", site);
  Mbarrier& state = active_run->mbarriers[barrier];
  state = Mbarrier();
  state.count = state.pending = static_cast<int>(count);
}

void mbarrier_arrive_expect(void* barrier, unsigned bytes, Site site) {
  SanitizerPause pause;
  Mbarrier& state = mbarrier_at(barrier, site);
  if (!state.pending) fail("more arrivals than the mbarrier counts", site);
  release(&state.tags[state.phase & 1]);
  state.bytes += bytes;
  --state.pending;
  complete_phase_if_due(state);
}

void mbarrier_wait(void* barrier, unsigned parity, Site site) {
  SanitizerPause pause;
  Mbarrier& state = mbarrier_at(barrier, site);
  if ((state.phase & 1) == parity) wait_here(state.waiting, "mbarrier wait", site);
  acquire(&state.tags[parity]);
}

void async_store(void* own_to, const void* data, int bytes, void* own_barrier, unsigned rank, Site site) {
  SanitizerPause pause;
  if (!aligned(own_to, bytes)) fail("misaligned st.async", site);
  RemoteStore store;
  store.to = static_cast<char*>(map_to_rank(own_to, rank, site));
  std::memcpy(store.data, data, static_cast<size_t>(bytes));
  store.bytes = bytes;
  store.barrier = &mbarrier_at(map_to_rank(own_barrier, rank, site), site);
  store.target = running->block->cluster->blocks[rank];
  store.tag.reset(new char);
  store.site = site;
  release(store.tag.get());
  active_run->remote_stores.push_back(std::move(store));
}

void deliver_remote_store() {
  Run& run = *active_run;
  size_t index = 0;
  if (run.schedule == 1) index = run.remote_stores.size() - 1;
  if (run.schedule == 2) index = run.random() % run.remote_stores.size();
  RemoteStore store = std::move(run.remote_stores[index]);
  run.remote_stores.erase(run.remote_stores.begin() + static_cast<long>(index));
  if (!store.target->live_threads) fail("st.async arrives at a block that has exited", store.site);
  on_detached_thread(&perform_store, &store);
  store.barrier->bytes -= store.bytes;
  run.idle_spins = 0;
  complete_phase_if_due(*store.barrier);
}

}  // namespace emu
