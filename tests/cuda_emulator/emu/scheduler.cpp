// Launches, scheduling, barriers and warp exchange. Compiled without -fsanitize (see fiber.cpp).
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>

#include "memory.h"
#include "runtime.h"

namespace emu {

ThreadContext* current = nullptr;
Run* active_run = nullptr;
Thread* running = nullptr;

namespace {

std::vector<std::unique_ptr<Thread>> thread_pool;  // fibers are reused by later blocks and launches
std::mutex launch_mutex;
constexpr long kLivelockSpins = 4000000;

long setting(const char* name, long otherwise) {
  const char* text = std::getenv(name);
  return text ? std::atol(text) : otherwise;
}

[[noreturn]] void report_stuck(const char* how) {
  std::fprintf(stderr, "emu: %s in kernel %s; waiting threads:\n", how, active_run->name);
  std::map<std::string, int> places;
  for (const auto& thread : thread_pool) {
    if (!thread->block || thread->done) continue;
    const Site at = thread->site;
    ++places[std::string(thread->doing) + " at " + (at.file ? at.file : "?") + ":" + std::to_string(at.line)];
  }
  for (const auto& [place, count] : places) std::fprintf(stderr, "  %5d x %s\n", count, place.c_str());
  std::abort();
}

void enter(Thread* thread) {
  running = thread;
  current = &thread->context;
  fiber_enter(thread->fiber);
  running = nullptr;
  current = nullptr;
}

void complete(Barrier& barrier) {
  barrier.arrived = 0;
  barrier.result = barrier.vote;
  barrier.vote = 0;
  barrier.site = {nullptr, 0};
  ++barrier.generation;
  make_ready(barrier.waiting);
}

void arrive_and_wait(Barrier& barrier, int threads, const char* doing, Site site) {
  if (barrier.site.file && (barrier.site.line != site.line || std::strcmp(barrier.site.file, site.file) != 0)) {
    std::fprintf(stderr, "emu: other threads wait at %s:%d\n", barrier.site.file, barrier.site.line);
    fail("divergent barrier", site);
  }
  barrier.site = site;
  const int parity = barrier.generation & 1;
  release(&barrier.tags[parity]);
  const bool last = ++barrier.arrived >= threads;
  if (last) {
    barrier.waiting.push_back(running);
    running->doing = doing;
    running->site = site;
    complete(barrier);
    fiber_leave(running->fiber, false);
  } else {
    wait_here(barrier.waiting, doing, site);
  }
  acquire(&barrier.tags[parity]);
}

void thread_exits() {
  Thread* thread = running;
  Block* block = thread->block;
  check_copies_finished(*thread);
  if (thread->cluster_generation >= 0) fail("thread exits between cluster arrive and wait", thread->site);
  thread->done = true;
  --active_run->live_threads;
  active_run->idle_spins = 0;
  --block->live_threads;
  --block->cluster->live_threads;
  // Named barriers are of some warps: others may leave.
  if (const Barrier& barrier = block->barriers[0]; barrier.arrived)
    fail("thread exits while others wait at a block barrier", barrier.site);
}

void thread_main() {
  fiber_entered();
  acquire(&active_run->launch_tag);
  (*active_run->kernel)();
  Thread* self = running;
  release(&active_run->end_tag);
  {
    SanitizerPause pause;  // ended before the switch: a later launch reuses this fiber's TSan state
    thread_exits();
  }
  fiber_leave(self->fiber, true);
}

Thread* pooled_thread(size_t index) {
  while (thread_pool.size() <= index) {
    thread_pool.push_back(std::make_unique<Thread>());
    fiber_allocate(thread_pool.back()->fiber, static_cast<size_t>(setting("EMU_STACK_KB", 128)) << 10);
  }
  return thread_pool[index].get();
}

uint3 unflatten(unsigned index, dim3 size) {
  return {index % size.x, index / size.x % size.y, index / size.x / size.y};
}

size_t volume(dim3 size) { return size_t{size.x} * size.y * size.z; }

void check_launch(const LaunchConfig& config, const char* name) {
  const size_t threads = volume(config.block);
  const char* mistake = nullptr;
  if (threads < 1 || threads > 1024) mistake = "a block has 1 to 1024 threads";
  if (volume(config.grid) < 1) mistake = "empty grid";
  if (config.grid.y > 65535 || config.grid.z > 65535) mistake = "grid.y and grid.z end at 65535";
  if (config.shared_bytes > static_cast<size_t>(shared_bytes_per_block()))
    mistake = "more dynamic shared memory than a block can have";
  if (config.cluster < 1 || config.grid.x % config.cluster) mistake = "the cluster does not divide the grid";
  if (config.cluster > 1 && arch() < 90) mistake = "clusters need sm_90";
  if (config.cluster > largest_cluster()) mistake = "a cluster of more blocks than the device can hold";
  if (config.cooperative && volume(config.grid) > static_cast<size_t>(resident_blocks(threads, config.shared_bytes)))
    mistake = "a cooperative launch of more blocks than can be resident";
  if (mistake) fail(mistake, {name, 0});
}

std::unique_ptr<Block> make_block(unsigned index, size_t first_pooled, Cluster* cluster) {
  const LaunchConfig& config = *active_run->config;
  auto block = std::make_unique<Block>();
  block->threads = block->live_threads = static_cast<int>(volume(config.block));
  block->dynamic = {allocate_shared(config.shared_bytes), config.shared_bytes};
  block->warps.resize((static_cast<size_t>(block->threads) + 31) / 32);
  block->cluster = cluster;
  block->rank = static_cast<unsigned>(cluster->blocks.size());
  cluster->blocks.push_back(block.get());
  cluster->live_threads += block->threads;
  for (int i = 0; i < block->threads; ++i) {
    Thread* thread = pooled_thread(first_pooled + static_cast<size_t>(i));
    const auto flat = static_cast<unsigned>(i);
    thread->context = {
        unflatten(flat, config.block), unflatten(index, config.grid), config.block, config.grid, flat % 32, flat / 32};
    thread->block = block.get();
    thread->done = false;
    thread->doing = "running";
    thread->site = {nullptr, 0};
    thread->cluster_generation = -1;
    fiber_prepare(thread->fiber, &thread_main);
    block->members.push_back(thread);
  }
  return block;
}

// Runs the blocks [first, last) of `order` together until all of them have ended.
void run_wave(const std::vector<unsigned>& order, size_t first, size_t last) {
  Run& run = *active_run;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<Thread*> threads;
  for (size_t i = first; i < last; ++i) {
    if ((i - first) % run.config->cluster == 0) clusters.push_back(std::make_unique<Cluster>());
    blocks.push_back(make_block(order[i], (i - first) * volume(run.config->block), clusters.back().get()));
    threads.insert(threads.end(), blocks.back()->members.begin(), blocks.back()->members.end());
  }
  run.live_threads = static_cast<int>(threads.size());
  make_ready(threads);
  while (run.live_threads) {
    if (!run.remote_stores.empty() && (run.ready.empty() || (run.schedule == 2 && run.random() % 8 == 0))) {
      deliver_remote_store();
      continue;
    }
    if (run.ready.empty()) report_stuck("deadlock");
    if (run.schedule == 2) std::swap(run.ready.front(), run.ready[run.random() % run.ready.size()]);
    Thread* next = run.ready.front();
    run.ready.pop_front();
    enter(next);
  }
  if (!run.remote_stores.empty()) fail("blocks exit with st.async in flight", run.remote_stores.front().site);
  run.mbarriers.clear();
  for (auto& block : blocks) {
    std::free(block->dynamic.memory);
    for (auto& entry : block->arrays) std::free(entry.second.memory);
    for (Thread* thread : block->members) thread->block = nullptr;
  }
}

}  // namespace

int arch() { return static_cast<int>(setting("EMU_ARCH", 90)); }

unsigned largest_cluster() { return arch() >= 90 ? static_cast<unsigned>(setting("EMU_CLUSTER", 16)) : 1; }

int64_t shared_bytes_per_block() { return (arch() >= 90 ? 227 : 163) * 1024; }

int64_t multiprocessors() { return setting("EMU_MULTIPROCESSORS", arch() >= 90 ? 132 : 108); }

// The limits of compute capabilities 8.0 and 9.0: 2048 threads and 32 blocks of a multiprocessor, and shared memory, of
// which a block takes 1 KB besides its own. Registers are not modelled.
int64_t resident_blocks(size_t threads, size_t shared_bytes) {
  constexpr int64_t kThreads = 2048, kBlocks = 32, kReserved = 1024;
  const auto own = static_cast<int64_t>(shared_bytes), warps = static_cast<int64_t>((threads + 31) / 32);
  const int64_t by_shared = (shared_bytes_per_block() + kReserved) / (own + kReserved);
  return multiprocessors() * std::min({kBlocks, kThreads / (32 * warps), by_shared});
}

void fail(const char* what, Site site) {
  const uint3 block = current ? current->block : uint3{0, 0, 0}, thread = current ? current->thread : uint3{0, 0, 0};
  std::fprintf(stderr, "emu: %s at %s:%d, kernel %s, block (%u,%u,%u) thread (%u,%u,%u)\n", what,
               site.file ? site.file : "?", site.line, active_run ? active_run->name : "?", block.x, block.y, block.z,
               thread.x, thread.y, thread.z);
  std::abort();
}

char* allocate_shared(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, bytes ? bytes : 1) != 0) std::abort();
  std::memset(memory, 0xff, bytes);  // NaN
  return static_cast<char*>(memory);
}

void make_ready(std::vector<Thread*>& threads) {
  Run& run = *active_run;
  if (run.schedule == 1) std::reverse(threads.begin(), threads.end());
  if (run.schedule == 2) std::shuffle(threads.begin(), threads.end(), run.random);
  run.ready.insert(run.ready.end(), threads.begin(), threads.end());
  run.idle_spins = 0;
  threads.clear();
}

void wait_here(std::vector<Thread*>& queue, const char* doing, Site site) {
  running->doing = doing;
  running->site = site;
  queue.push_back(running);
  fiber_leave(running->fiber, false);
}

void run(const LaunchConfig& config, const std::function<void()>& kernel, const char* name) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  check_launch(config, name);
  Run run;
  run.config = &config;
  run.kernel = &kernel;
  run.name = name;
  run.schedule = static_cast<int>(setting("EMU_SCHEDULE", 0));
  run.random.seed(static_cast<unsigned>(setting("EMU_SEED", 1)));
  active_run = &run;
  fiber_bind_scheduler();

  std::vector<unsigned> order(volume(config.grid));
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<unsigned>(i);
  if (config.cluster == 1 && run.schedule == 1) std::reverse(order.begin(), order.end());
  if (config.cluster == 1 && run.schedule == 2) std::shuffle(order.begin(), order.end(), run.random);
  size_t resident = static_cast<size_t>(setting("EMU_RESIDENT_THREADS", 8192)) / volume(config.block);
  resident = std::max<size_t>(1, resident / config.cluster) * config.cluster;
  if (config.cooperative) resident = order.size();

  release(&run.launch_tag);
  {
    SanitizerPause pause;
    for (size_t first = 0; first < order.size(); first += resident) {
      run_wave(order, first, std::min(order.size(), first + resident));
    }
  }
  acquire(&run.end_tag);
  active_run = nullptr;
}

void* dynamic_shared() { return running->block->dynamic.memory; }

void* static_shared(const void* key, size_t bytes) {
  SanitizerPause pause;
  SharedArray& array = running->block->arrays[key];
  if (!array.memory) array = {allocate_shared(bytes), bytes};
  return array.memory;
}

unsigned cluster_rank() { return running->block->rank; }

void* map_to_rank(const void* own_shared, unsigned rank, Site site) {
  SanitizerPause pause;
  Block* own = running->block;
  if (rank >= own->cluster->blocks.size()) fail("no such rank in the cluster", site);
  Block* other = own->cluster->blocks[rank];
  const auto* address = static_cast<const char*>(own_shared);
  const auto offset_in = [address](const SharedArray& array) { return static_cast<size_t>(address - array.memory); };
  if (offset_in(own->dynamic) < own->dynamic.bytes) return other->dynamic.memory + offset_in(own->dynamic);
  for (auto& [key, array] : own->arrays) {
    if (offset_in(array) >= array.bytes) continue;
    SharedArray& theirs = other->arrays[key];
    if (!theirs.memory) theirs = {allocate_shared(array.bytes), array.bytes};
    return theirs.memory + offset_in(array);
  }
  fail("address outside this block's shared memory", site);
}

void block_barrier(int id, int threads, Site site) {
  SanitizerPause pause;
  Block* block = running->block;
  if (!threads && block->live_threads != block->threads)
    fail("block barrier after a thread of the block has exited", site);
  arrive_and_wait(block->barriers[id], threads ? threads : block->threads, "block barrier", site);
}

int block_vote(int predicate, int kind, Site site) {
  Barrier& barrier = running->block->barriers[0];
  const int vote = predicate != 0;
  if (!barrier.arrived) barrier.vote = kind == 1;
  if (kind == 0) barrier.vote |= vote;
  if (kind == 1) barrier.vote &= vote;
  if (kind == 2) barrier.vote += vote;
  block_barrier(0, 0, site);
  return barrier.result;
}

void cluster_arrive(Site site) {
  SanitizerPause pause;
  Barrier& barrier = running->block->cluster->barrier;
  if (running->cluster_generation >= 0) fail("second cluster arrive without a wait", site);
  running->cluster_generation = barrier.generation;
  running->site = site;
  release(&barrier.tags[barrier.generation & 1]);
  if (++barrier.arrived >= running->block->cluster->live_threads) complete(barrier);
}

void cluster_wait(Site site) {
  SanitizerPause pause;
  Barrier& barrier = running->block->cluster->barrier;
  const int generation = running->cluster_generation;
  if (generation < 0) fail("cluster wait without an arrive", site);
  running->cluster_generation = -1;
  if (barrier.generation == generation) wait_here(barrier.waiting, "cluster wait", site);
  acquire(&barrier.tags[generation & 1]);
}

void grid_barrier(Site site) {
  SanitizerPause pause;
  if (!active_run->config->cooperative) fail("grid barrier in a launch that is not cooperative", site);
  arrive_and_wait(active_run->grid, active_run->live_threads, "grid barrier", site);
}

void spin(Site site) {
  SanitizerPause pause;
  Thread* self = running;
  self->doing = "spinning";
  self->site = site;
  active_run->ready.push_back(self);
  if (++active_run->idle_spins > kLivelockSpins + 1000L * active_run->live_threads) report_stuck("livelock");
  fiber_leave(self->fiber, false);
}

WarpWords warp_exchange(uint32_t mask, const uint32_t* words, int count, WarpOp op, Site site) {
  SanitizerPause pause;
  WarpExchange& warp = running->block->warps[running->context.warp];
  const unsigned lane = running->context.lane;
  if (!(mask >> lane & 1u)) fail("the calling lane is not in its mask", site);
  if (warp.arrived && (warp.mask != mask || warp.op != op || warp.site.line != site.line)) {
    std::fprintf(stderr, "emu: other lanes wait at %s:%d with mask %08x\n", warp.site.file, warp.site.line, warp.mask);
    fail("lanes of one warp meet in different warp operations", site);
  }
  warp.mask = mask;
  warp.op = op;
  warp.site = site;
  const int parity = warp.generation & 1;
  for (int i = 0; i < count; ++i) warp.words[parity][lane][i] = words[i];
  release(&warp.tags[parity]);
  warp.arrived |= 1u << lane;
  if (warp.arrived == mask) {
    warp.arrived = 0;
    ++warp.generation;
    make_ready(warp.waiting);
  } else {
    wait_here(warp.waiting, "warp operation", site);
  }
  if (op == kSync) acquire(&warp.tags[parity]);  // shuffles order nothing
  return warp.words[parity];
}

}  // namespace emu
