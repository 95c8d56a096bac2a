#include "ops/executor.h"

#include <ATen/Parallel.h>
#include <pthread.h>
#include <strings.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <system_error>
#include <thread>

#include "cpu/subnormal.h"

extern "C" {  // of libgomp, or of the OpenMP runtime that torch has in its place
void GOMP_parallel(void (*fn)(void*), void* context, unsigned threads, unsigned flags);
int omp_get_thread_num() noexcept;
int omp_get_num_procs() noexcept;
int omp_get_num_threads() noexcept;
}

namespace rnn_ext::ops {
namespace {

/// Whether this process has no other thread.
bool has_one_thread() {
  std::error_code error;
  std::filesystem::directory_iterator tasks("/proc/self/task", error);
  int count = 0;
  for (; !error && tasks != std::filesystem::directory_iterator(); tasks.increment(error)) ++count;
  return !error && count == 1;
}

// A forked child inherits an OpenMP pool whose threads do not exist: it would wait for them forever. Unless there was
// none: a parent of one thread has no pool.
std::atomic<int> inherited_pools{0};  // by this process, its parent and so on
bool forks_alone = false;
const int watch_forks = pthread_atfork([] { forks_alone = has_one_thread(); }, nullptr,
                                       [] { inherited_pools += inherited_pools > 0 || !forks_alone; });

/// Calls fn(thread, threads) on every thread of torch's pool: libgomp ends those that a smaller team leaves out, and
/// starts others in their place when they are wanted again. It is called by name because clang turns `#pragma omp` into
/// calls of a runtime of its own, which would be the second in the process.
template <class Fn>
void on_all_threads(const Fn& fn) {
  const cpu::FlushSubnormals::Not not_while_threads_start;
  GOMP_parallel(
      [](void* context) noexcept {
        const cpu::FlushSubnormals flush;
        (*static_cast<const Fn*>(context))(omp_get_thread_num(), omp_get_num_threads());
      },
      const_cast<void*>(static_cast<const void*>(&fn)), 0, 0);
}

/// The first exception of several threads, for the one that waits for them.
class FirstError {
 public:
  template <class Fn>
  void guard(const Fn& fn) noexcept {
    try {
      fn();
    } catch (const cpu::Stopped&) {
    } catch (...) {
      if (!found_.test_and_set()) error_ = std::current_exception();
    }
  }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  std::atomic_flag found_;
  std::exception_ptr error_;
};

bool is_set(const char* name, const char* value) {
  const char* found = std::getenv(name);
  return found && strcasecmp(found, value) == 0;
}

/// The most threads that wait actively for work: of more than there are processors for this process, and where OpenMP
/// has been told so, they fall asleep.
int most_waiting_actively() {
  const bool sleep =
      is_set("OMP_WAIT_POLICY", "passive") || is_set("GOMP_SPINCOUNT", "0") || is_set("KMP_BLOCKTIME", "0");
  return sleep ? 0 : omp_get_num_procs();
}

using Clock = std::chrono::steady_clock;

std::atomic<double> assumed_distance{-1};

/// The same as it was a short time ago: threads move, and so do the cores of a virtual machine.
double recent_distance() {
  constexpr Clock::duration kShort = std::chrono::milliseconds(100), kLong = std::chrono::seconds(1);
  thread_local double distance = 0;
  thread_local Clock::time_point next;
  const double assumed = assumed_distance.load(std::memory_order_relaxed);
  if (assumed >= 0) return assumed;
  const Clock::time_point begin = Clock::now();
  if (begin >= next) {
    distance = thread_distance();
    const Clock::time_point end = Clock::now();
    next = end + std::clamp(100 * (end - begin), kShort, kLong);  // threads that share a core take long to answer
  }
  return distance;
}

}  // namespace

double thread_distance() {
  // Threads, how often each is asked, and how many times in turn: reading the clock can take longer than an answer. The
  // fastest counts.
  constexpr int kMost = 16, kTimes = 4, kRounds = 4;
  struct alignas(128) Line {  // not half of a pair, which some processors fetch together
    std::atomic<int> round{0};
    void wait_for(int wanted) const {
      for (int looks = 0; round.load(std::memory_order_acquire) != wanted; ++looks)
        if (looks > 10'000) std::this_thread::yield();
    }
  };
  if (executor().threads <= 1) return 0;
  Line asked[kMost], answered[kMost];
  Clock::duration longest{0};
  on_all_threads([&](int thread, int threads) {
    threads = std::min(threads, kMost);
    if (thread >= threads) return;
    if (thread > 0) {
      for (int round = 1; round <= kTimes * kRounds; ++round) {
        asked[thread].wait_for(round);
        answered[thread].round.store(round, std::memory_order_release);
      }
      return;
    }
    for (int other = 1; other < threads; ++other) {
      Clock::duration fastest = Clock::duration::max();
      for (int time = 0; time < kTimes; ++time) {
        const Clock::time_point begin = Clock::now();
        for (int round = time * kRounds + 1; round <= (time + 1) * kRounds; ++round) {
          asked[other].round.store(round, std::memory_order_release);
          answered[other].wait_for(round);
        }
        fastest = std::min(fastest, Clock::now() - begin);
      }
      longest = std::max(longest, fastest);
    }
  });
  return std::chrono::duration<double, std::nano>(longest).count() / (2 * kRounds);
}

void assume_thread_distance(double nanoseconds) { assumed_distance = nanoseconds; }

void leave_inherited_pool() {
  // Once, and by each thread, which has a number of its own: whoever then asks for more is to have them.
  thread_local int left = 0;
  const int inherited = inherited_pools;
  if (left == inherited) return;
  left = inherited;
  if (at::get_num_threads() > 1) at::set_num_threads(1);
}

cpu::Executor executor() {
  static const int most_active = most_waiting_actively();
  cpu::Executor executor;
  executor.threads = inherited_pools > 0 || at::in_parallel_region() ? 1 : at::get_num_threads();
  executor.waits_actively = executor.threads <= most_active;
  // Cores with a last level of cache in common are up to 80 ns apart, others 160 ns and more (measured on Zen 5).
  if (executor.waits_actively) executor.are_far = [] { return recent_distance() > 120; };
  // Tasks are not equally long, so a thread takes the next one when it is free.
  executor.run = [](int64_t tasks, void (*fn)(void*, int64_t), void* context) {
    std::atomic<int64_t> next{0};
    FirstError error;
    on_all_threads([&](int, int) {
      error.guard([&] {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) fn(context, i);
      });
    });
    error.rethrow();
  };
  executor.run_team = [](int wanted, void (*fn)(void*, int, int), void* context) {
    FirstError error;
    on_all_threads([&](int thread, int threads) {
      threads = std::min(wanted, threads);
      if (thread < threads) error.guard([&] { fn(context, thread, threads); });
    });
    error.rethrow();
  };
  return executor;
}

}  // namespace rnn_ext::ops
