// The emulator's state, shared by scheduler.cpp and async.cpp. Not for kernels.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "emulator.h"
#include "fiber.h"

namespace emu {

struct Thread;
struct Block;

// Threads that wait for a generation to complete. Consecutive generations have an ordering tag each, so that a fast
// thread's next arrival is not mistaken for its last.
struct Barrier {
  int arrived = 0;
  int generation = 0;
  int vote = 0, result = 0;
  Site site{nullptr, 0};  // where the first arrival of this generation came from
  std::vector<Thread*> waiting;
  char tags[2] = {0, 0};
};

struct WarpExchange {
  uint32_t mask = 0, arrived = 0;
  WarpOp op = kSync;
  int generation = 0;
  Site site{nullptr, 0};
  std::vector<Thread*> waiting;
  uint32_t words[2][32][kMaxWords];
  char tags[2] = {0, 0};
};

struct AsyncCopy {
  void* to;
  const void* from;
  int bytes, valid_bytes;
  Site site;
};

struct Thread {
  ThreadContext context;
  FiberStack fiber;
  Block* block = nullptr;
  bool done = false;
  const char* doing = "";  // for reports
  Site site{nullptr, 0};
  int cluster_generation = -1;  // of an arrive whose wait is still to come
  std::vector<AsyncCopy> open_copies;
  std::deque<std::vector<AsyncCopy>> committed_copies;
};

struct SharedArray {
  char* memory = nullptr;
  size_t bytes = 0;
};

struct Cluster {
  Barrier barrier;
  std::vector<Block*> blocks;
  int live_threads = 0;
};

struct Block {
  int threads = 0, live_threads = 0;
  unsigned rank = 0;
  Cluster* cluster = nullptr;
  SharedArray dynamic;
  std::map<const void*, SharedArray> arrays;
  Barrier barriers[16];
  std::vector<WarpExchange> warps;
  std::vector<Thread*> members;
};

struct Mbarrier {
  int count = 0, pending = 0;
  long bytes = 0;  // expected and not yet here
  unsigned phase = 0;
  std::vector<Thread*> waiting;
  char tags[2] = {0, 0};
};

struct RemoteStore {
  char* to;
  unsigned char data[16];
  int bytes;
  Mbarrier* barrier;
  Block* target;
  std::unique_ptr<char> tag;  // orders it after what its sender did before
  Site site;
};

struct Run {
  const LaunchConfig* config = nullptr;
  const std::function<void()>* kernel = nullptr;
  const char* name = "";
  int schedule = 0;
  std::mt19937 random;
  int live_threads = 0;
  long idle_spins = 0;  // spins since anything else happened
  std::deque<Thread*> ready;
  Barrier grid;
  std::map<const void*, Mbarrier> mbarriers;
  std::vector<RemoteStore> remote_stores;
  char launch_tag = 0, end_tag = 0;
};

extern Run* active_run;
extern Thread* running;

void make_ready(std::vector<Thread*>& threads);  // empties the list
void wait_here(std::vector<Thread*>& queue, const char* doing, Site site);
void deliver_remote_store();  // one, chosen by the schedule
char* allocate_shared(size_t bytes);
void check_copies_finished(const Thread& thread);

}  // namespace emu
