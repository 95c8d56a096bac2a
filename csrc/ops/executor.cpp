#include "ops/executor.h"

#include <ATen/Parallel.h>
#include <pthread.h>
#include <strings.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <system_error>

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
std::atomic<bool> forked{false};
bool forks_alone = false;
const int watch_forks =
    pthread_atfork([] { forks_alone = has_one_thread(); }, nullptr, [] { forked = forked || !forks_alone; });

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

}  // namespace

void leave_inherited_pool() {
  if (forked && at::get_num_threads() > 1) at::set_num_threads(1);
}

cpu::Executor executor() {
  static const int most_active = most_waiting_actively();
  cpu::Executor executor;
  executor.threads = forked || at::in_parallel_region() ? 1 : at::get_num_threads();
  executor.waits_actively = executor.threads <= most_active;
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
