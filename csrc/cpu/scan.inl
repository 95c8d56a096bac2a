// What the scans forward and backward have in common: rows, and threads that share them.

template <class Fn>
void parallel(const Executor& executor, int64_t tasks, const Fn& fn) {
  if (executor.threads <= 1 || tasks <= 1) {
    for (int64_t i = 0; i < tasks; ++i) fn(i);
  } else {
    executor.run(
        tasks, [](void* context, int64_t i) { (*static_cast<const Fn*>(context))(i); },
        const_cast<void*>(static_cast<const void*>(&fn)));
  }
}

/// The rows of one thread: entries [first, last) of the batch, and how many of them step t still has.
struct Slice {
  int64_t first, last;
  int64_t active(const Layout& layout, int64_t t) const {
    return larger(0, smaller(last, layout.batch_sizes[t]) - first);
  }
  int64_t size() const { return last - first; }
};

inline Slice whole_batch(const Layout& layout) { return {0, layout.batch}; }

/// A batch in so many slices.
class Slices {
 public:
  Slices(const Layout& layout, int64_t count) : count_(count), ends_(count) { deal_out(layout, count, ends_.get()); }
  int64_t size() const { return count_; }
  Slice operator[](int64_t i) const { return {i > 0 ? ends_.get()[i - 1] : 0, ends_.get()[i]}; }

 private:
  const int64_t count_;
  Buffer<int64_t> ends_;  // of each slice
};

/// Rows at equal distances.
template <class To, class T>
ALWAYS_INLINE void space_rows(To** rows, T* first, int64_t distance, int64_t count) {
  for (int64_t r = 0; r < count; ++r) rows[r] = first + r * distance;
}

/// Where the rows [first, first + count) of step t lie, `offset` numbers into them.
template <class To, class T>
ALWAYS_INLINE void find_rows(To** rows, const Sequence<T>& sequence, const Layout& layout, int64_t t, int64_t first,
                             int64_t count, int64_t offset) {
  if (count == 0) return;
  if (layout.order && !layout.packed) {
    T* step = sequence.data + t * sequence.step + offset;
    for (int64_t r = 0; r < count; ++r) rows[r] = step + layout.order[first + r] * sequence.row;
  } else {
    space_rows(rows, sequence.at(layout, t, first) + offset, sequence.row, count);
  }
}

/// The step that a direction runs `steps` after step t; -1: none.
inline int64_t step_after(const Layout& layout, bool reverse, int64_t t, int64_t steps) {
  const int64_t after = reverse ? t - steps : t + steps;
  return after < layout.steps ? larger(after, -1) : -1;
}

/// The step that a direction runs as number s, and the number of a step.
inline int64_t time_of(const Layout& layout, bool reverse, int64_t s) { return reverse ? layout.steps - 1 - s : s; }

/// Does an independent sequence begin between step t and the one that this direction ran before it?
inline bool begins(const Sequence<const bool>& resets, const Layout& layout, bool reverse, int64_t t, int64_t j) {
  if (!reverse) return *resets.at(layout, t, j);
  return t + 1 < layout.steps && j < layout.batch_sizes[t + 1] && *resets.at(layout, t + 1, j);
}

/// Whose sequences step t is the last of in this direction: the rows from this one on.
inline int64_t first_ending(const Layout& layout, bool reverse, int64_t t) {
  const int64_t after = step_after(layout, reverse, t, 1);
  return after < 0 ? 0 : smaller(layout.batch_sizes[t], layout.batch_sizes[after]);
}

/// The first of the steps [s, end) at which one of a slice's rows begins an independent sequence, or `end`; steps are
/// numbers of this direction.
inline int64_t next_reset(const Sequence<const bool>& resets, const Layout& layout, bool reverse, Slice slice,
                          int64_t s, int64_t end) {
  if (!resets.data) return end;
  for (; s < end; ++s) {
    const int64_t t = time_of(layout, reverse, s);
    for (int64_t r = 0; r < slice.active(layout, t); ++r)
      if (begins(resets, layout, reverse, t, slice.first + r)) return s;
  }
  return end;
}

/// Zeros the states, [rows, padded size], of those of a slice's rows where an independent sequence begins before step
/// t. Null: none, or another member's.
template <class A, class T>
void reset_states(const Sequence<const bool>& resets, const Layout& layout, bool reverse, int64_t t, Slice slice, A* h,
                  int64_t h_size, T* c, int64_t c_size) {
  const auto clear = [](auto* rows, int64_t r, int64_t size) {
    const int64_t padded = Sizes::padded(size);
    if (rows) std::memset(static_cast<void*>(rows + r * padded), 0, size_t(padded) * sizeof(*rows));
  };
  for (int64_t r = 0; r < slice.active(layout, t); ++r) {
    if (!begins(resets, layout, reverse, t, slice.first + r)) continue;
    clear(h, r, h_size);
    clear(c, r, c_size);
  }
}

/// Of one row in every step, and no part of a batch.
inline bool is_one_sequence(const Layout& layout) {
  return layout.batch == 1 && layout.has_all_rows() && !layout.stored;
}

/// One sequence, whose steps, but for those at resets, all have the same to do: of small layers the time is in finding
/// out what.
inline bool has_plain_steps(const Layout& layout, const Sizes& sizes) { return is_one_sequence(layout) && !sizes.proj; }

/// Copy state rows between the caller's [N, width] and a padded buffer whose first row is the slice's.
template <class To, class From>
void read_states(To* rows, int64_t stride, const From* states, int64_t width, const Layout& layout, Slice slice) {
  for (int64_t j = slice.first; j < slice.last; ++j)
    copy_row(rows + (j - slice.first) * stride, states + layout.entry(j) * width, width);
}

/// Columns [begin, end) of the rows [from, to).
template <class To, class From>
void write_states(To* states, int64_t width, const From* rows, int64_t stride, const Layout& layout, Slice slice,
                  int64_t from, int64_t to, int64_t begin, int64_t end) {
  for (int64_t j = larger(from, slice.first); j < smaller(to, slice.last); ++j)
    copy_row(states + layout.entry(j) * width + begin, rows + (j - slice.first) * stride + begin, end - begin);
}

/// How often a thread looks before it lets others run: it spins, because a step is shorter than waking a thread, but
/// not for long, as there may be fewer processors than threads. A wait that was in vain says so, and the next ones are
/// shorter; one that was not, that there is hope. (Measured, two threads on one processor: an LSTM of 128 units took
/// 21 ms for 200 timesteps when each of them waited in full, for 0.6 ms of one thread.)
constexpr int kLeastPatience = 64, kMostPatience = 4000;
thread_local int patience = kMostPatience;

/// Returns once condition() holds, which another thread sees to.
template <class Condition>
ALWAYS_INLINE void wait_until(const Condition& condition) {
  if (condition()) return;
  for (int spins = patience; spins > 0; --spins) {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
    if (condition()) {
      patience = int(smaller(2 * patience, kMostPatience));
      return;
    }
  }
  patience = int(larger(patience / 4, kLeastPatience));
  while (!condition()) sched_yield();
}

/// Threads that share the hidden units of a slice: each runs the whole scan for its own and meets the others after
/// every step.
class Team {
 public:
  /// Calls fn(), in which a member meets the others. If it throws, they do not wait for it in vain.
  template <class Fn>
  void run(const Fn& fn) {
    try {
      fn();
    } catch (...) {
      __atomic_store_n(&stopped_, true, __ATOMIC_RELEASE);
      throw;
    }
  }

  /// Returns once has_come(), which another member sees to. Throws Stopped if it does not.
  template <class Condition>
  ALWAYS_INLINE void wait(const Condition& has_come) {
    wait_until([&] {
      if (has_come()) return true;
      if (__atomic_load_n(&stopped_, __ATOMIC_ACQUIRE)) throw Stopped();
      return false;
    });
  }

  /// `member` is one of `members`. Throws Stopped if another one does not come.
  void meet(int member, int members) {
    if (members == 1) return;
    if (members == 2) return meet_other(member);
    const int round = __atomic_load_n(&round_, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == members) {
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&round_, round + 1, __ATOMIC_RELEASE);
      return;
    }
    wait([&] { return __atomic_load_n(&round_, __ATOMIC_ACQUIRE) != round; });
  }

 private:
  /// Of two, the one that comes last need not fetch a counter from the other: each has its own.
  void meet_other(int member) {
    const unsigned meetings = met_[member].count + 1;
    __atomic_store_n(&met_[member].count, meetings, __ATOMIC_RELEASE);
    wait([&] { return int(__atomic_load_n(&met_[1 - member].count, __ATOMIC_ACQUIRE) - meetings) >= 0; });
  }

  struct alignas(64) Meetings {
    unsigned count = 0;
  };
  alignas(64) int arrived_ = 0;
  alignas(64) int round_ = 0;
  Meetings met_[2];
  alignas(64) bool stopped_ = false;
};

/// The steps of one sequence, in its order, by chunks whose input gates are computed by the thread that runs the steps
/// or by another one, as far as that gets ahead of it.
template <class T>
class SharedChunks {
 public:
  static constexpr int64_t kSteps = 16;  // of a chunk: enough for full tiles

  /// `gates_stride`: of a step's input gates, 0 where they have a place of their own.
  explicit SharedChunks(int64_t gates_stride) : gates_stride_(gates_stride), gates_(kMost * kSteps * gates_stride) {}

  T* gates(int64_t step) const { return gates_.get() + step % (kMost * kSteps) * gates_stride_; }

  /// By the thread that runs the steps and is at this chunk: whether it is to compute it; else it is there on return.
  bool take(int64_t chunk) {
    __atomic_store_n(&run_, chunk, __ATOMIC_RELEASE);
    int64_t next = chunk;
    if (__atomic_compare_exchange_n(&next_, &next, chunk + 1, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return true;
    wait_until([&] { return __atomic_load_n(&ready_, __ATOMIC_ACQUIRE) > chunk; });
    return false;
  }

  /// By the other: the next chunk, which it is to give.
  int64_t take_next() { return __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED); }
  void wait_for_room(int64_t chunk) {
    wait_until([&] { return gates_stride_ == 0 || __atomic_load_n(&run_, __ATOMIC_ACQUIRE) > chunk - kMost; });
  }
  void give(int64_t chunk) { __atomic_store_n(&ready_, chunk + 1, __ATOMIC_RELEASE); }

 private:
  static constexpr int64_t kMost = 8;  // chunks that there is room for

  const int64_t gates_stride_;
  Buffer<T> gates_;
  alignas(64) int64_t next_ = 0;   // the chunks before it are taken
  alignas(64) int64_t run_ = 0;    // the steps of those before it have run
  alignas(64) int64_t ready_ = 0;  // those before it that the other took are there
};

/// Memory of which other members have written a part: it comes from their caches, late for a product that asks for it a
/// few lines ahead.
template <class T>
ALWAYS_INLINE void fetch_from_others(const T* from, int64_t size) {
  for (int64_t i = 0; i < size; i += 64 / int(sizeof(T))) __builtin_prefetch(from + i);
}

/// Where the units of a layer may be parted, in blocks. One row alone sums in an order that depends on the width of its
/// product: then only between whole tiles of the widest one, so that the sums do not depend on the number of members.
inline int64_t blocks_apart(const Layout& layout) {
  return layout.steps > 0 && layout.batch_sizes[layout.steps - 1] > 1 ? 1 : 4;
}

/// How many threads can share the units of each direction: only where a step is long against a meeting (0.1 to 0.3 us).
inline int team_size(const Layout& layout, const Sizes& sizes, int gates, const Executor& executor) {
  // Multiply-adds of a step. (AMX, one sequence: 0.90 to 0.96 times as fast at 6.6e4, 1.41 at 2.6e5.)
  constexpr double kWorthwhile = kHasAmx ? 1.5e5 : 6e4;
  if (!executor.run_team || sizes.proj || layout.steps == 0) return 1;
  const double step =
      double(gates) * double(sizes.hidden) * double(sizes.hidden) * double(layout.rows) / double(layout.steps);
  if (step < kWorthwhile) return 1;
  const int64_t most = sizes.hidden / (16 * blocks_apart(layout));
  return int(larger(1, smaller(executor.threads / sizes.directions, most)));
}

/// Whether a step is not long against a meeting of these threads, which takes 1 us of those that are far from each
/// other.
inline bool meet_too_late(const Sizes& sizes, int gates, const Executor& executor) {
  // Weights. (Zen 5, 250 ns apart, two or three sequences: 1.13 to 1.25 times as long as one thread takes with 4e4,
  // 0.84 times with 6.5e4.)
  constexpr int64_t kWorthwhile = 5e4;
  return sizes.recurrent(gates) < kWorthwhile && executor.are_far && executor.are_far();
}

/// How threads share a layer: each takes slices of the batch, or there is one slice and each of the `members` has a
/// part of the units of its direction.
struct Shares {
  int64_t slices = 1;
  int members = 1;
};

/// `shares_units`: threads may. `packed`: the weights are, beforehand.
inline Shares share_out(const Layout& layout, const Sizes& sizes, int gates, int64_t itemsize, const Executor& executor,
                        bool shares_units, bool packed) {
  const int members = shares_units ? team_size(layout, sizes, gates, executor) : 1;
  const auto count = [&](bool or_units) { return count_slices(layout, sizes, gates, itemsize, executor, or_units); };
  const int64_t slices = count(members > 1);
  // Each slice reads all weights in every step, and packs them if they are not, each member a part of them. But a
  // member has memory for all rows. So as many members as slices are preferred up to so many rows for each: where
  // weights come from beyond the second-level cache (measured with two threads on a Xeon, whose has 2 MiB: from 1.7 MiB
  // on 8 rows are 1.05 to 1.26 times as fast, 16 rows 1.0 to 1.1 times, 32 rows the same; with 1 MiB all are the same),
  // and where they are not packed.
  constexpr int64_t kFar = 1280 * 1024;
  const bool far = sizes.recurrent(gates) * itemsize > kFar;
  const int64_t most_each = !packed ? 128 : far ? 16 : 0;
  const bool few = layout.batch < most_each * executor.threads / sizes.directions;
  if (members == 1 || (slices > 1 && !(few && members >= slices))) return {slices, 1};
  if (meet_too_late(sizes, gates, executor)) return {count(false), 1};
  return {1, members};
}

/// Calls fn(team, member, members) for so many teams, all members of one at the same time.
template <class Fn>
void run_teams(const Executor& executor, int teams, int members, const Fn& fn) {
  struct Call {
    const Fn& fn;
    int teams, members;
  } call{fn, teams, members};
  executor.run_team(
      teams * members,
      [](void* context, int thread, int threads) {
        const Call& call = *static_cast<const Call*>(context);
        const int members = int(larger(1, smaller(call.members, threads / call.teams)));
        const int at_once = threads / members;
        for (int team = thread / members; team < call.teams && thread < at_once * members; team += at_once)
          call.fn(team, thread % members, members);
      },
      &call);
}

/// Calls fn(0) .. fn(count - 1), which may wait for each other, on `threads` threads at the same time if so many come:
/// thread t takes t, t + threads, .. in this order. fn throws nothing: others would wait in vain.
template <class Fn>
void run_together(const Executor& executor, int threads, int count, const Fn& fn) {
  struct Call {
    const Fn& fn;
    int count;
  } call{fn, count};
  executor.run_team(
      threads,
      [](void* context, int thread, int threads) {
        const Call& call = *static_cast<const Call*>(context);
        for (int i = thread; i < call.count; i += threads) call.fn(i);
      },
      &call);
}

/// to += from.
template <class T>
void add_row(T* to, const T* from, int64_t columns) {
  for (int64_t i = 0; i < columns; i += kLanes<T>)
    store_part(to + i, load_part(to + i, columns - i) + load_part(from + i, columns - i), columns - i);
}

template <class T>
UnitBlocks part_of(int64_t hidden, const Layout& layout, int member, int members) {
  const int64_t blocks = blocks_of<T>(hidden), apart = blocks_apart(layout), pieces = (blocks + apart - 1) / apart;
  return {smaller(blocks, pieces * member / members * apart), smaller(blocks, pieces * (member + 1) / members * apart)};
}
