// Runs CUDA kernels on the CPU. Every CUDA thread is a fiber; a run is deterministic for a given schedule and seed.
//
// Reports (to stderr, then abort): deadlock and livelock with the place of every waiting thread, a barrier reached from
// two places or after a thread has left, warp operations whose masks or kinds disagree, misaligned or unfinished
// asynchronous copies, an impossible launch. Shared memory starts as NaN. Data races, bounds and uninitialised reads
// are for the sanitizers and for the comparison with the reference.
//
// Environment: EMU_SCHEDULE 0 (ascending), 1 (descending), 2 (random, EMU_SEED); EMU_RESIDENT_THREADS, EMU_STACK_KB;
// EMU_ARCH 80 or 90 (shared memory per block, clusters); EMU_CLUSTER, the blocks of the largest cluster (from 90 on);
// EMU_MULTIPROCESSORS (what a cooperative launch can hold).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "cuda_types.h"

namespace emu {

struct Site {  // a place in a kernel's source
  const char* file;
  int line;
};
#define EMU_CALLER const char *emu_file = __builtin_FILE(), int emu_line = __builtin_LINE()
#define EMU_SITE (::emu::Site{emu_file, emu_line})

struct LaunchConfig {
  dim3 grid, block;
  size_t shared_bytes = 0;
  unsigned cluster = 1;  // blocks along x that form a cluster
  bool cooperative = false;
};

struct ThreadContext {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
  unsigned lane, warp;
};
extern ThreadContext* current;  // the running CUDA thread; null on the host

void run(const LaunchConfig& config, const std::function<void()>& kernel, const char* name);
int arch();  // 80 or 90
unsigned largest_cluster();
int64_t shared_bytes_per_block();
int64_t multiprocessors();
int64_t resident_blocks(size_t threads, size_t shared_bytes);  // at once, of so many threads and dynamic bytes
[[noreturn]] void fail(const char* what, Site site);

// Shared memory.
void* dynamic_shared();
void* static_shared(const void* key, size_t bytes);
void* map_to_rank(const void* own_shared, unsigned rank,
                  Site site);  // the same variable in another block of the cluster
unsigned cluster_rank();

// Barriers.
void block_barrier(int id, int threads, Site site);  // threads = 0: the whole block
int block_vote(int predicate, int kind, Site site);  // 0 or, 1 and, 2 count
void cluster_arrive(Site site);
void cluster_wait(Site site);
void grid_barrier(Site site);
void spin(Site site);  // every loop that waits for another thread must come by here

// Warp exchange: the lanes of `mask` publish `count` words each and see what all of them published. The result is valid
// until this lane's second next warp operation. Only kSync orders memory.
constexpr int kMaxWords = 16;
enum WarpOp { kSync, kShuffle, kShuffleXor, kShuffleDown, kShuffleUp, kVote, kMma, kLoadMatrix, kStoreMatrix };
using WarpWords = const uint32_t (*)[kMaxWords];
WarpWords warp_exchange(uint32_t mask, const uint32_t* words, int count, WarpOp op, Site site);

// cp.async: the copy happens at the last legal moment, the wait, and the destination is NaN until then.
void async_copy(void* to, const void* from, int bytes, int valid_bytes, Site site);
void async_commit();
void async_wait(int pending_groups);

// mbarrier and st.async: a remote store arrives as late as is legal (schedule 2: at random), in an order of the
// scheduler's.
void mbarrier_init(void* barrier, unsigned count, Site site);
void mbarrier_arrive_expect(void* barrier, unsigned bytes, Site site);
void mbarrier_wait(void* barrier, unsigned parity, Site site);
void async_store(void* own_to, const void* data, int bytes, void* own_barrier, unsigned rank, Site site);

}  // namespace emu
