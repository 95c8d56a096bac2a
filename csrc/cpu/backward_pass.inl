// Backward of a layer: the scans of backward.inl and, while a chunk's gate gradients are in the cache, their share of
// the gradients of input, weights and biases.

/// So many rows are added up before what comes of them is added to the sum of all: in one chain roundings would grow
/// like the rows, and ones would not be counted beyond 2^24.
constexpr int64_t kSummedRows = 256;

/// Adds the rows of N vectors to what `sums` holds.
template <int N, class T, class S>
ALWAYS_INLINE void add_columns(T* sums, const S* from, int64_t stride, int64_t rows) {
  for (int64_t left = rows; left > 0; left -= kSummedRows) {
    Vec<T> sum[N] = {};
    for (int64_t r = smaller(left, kSummedRows); r > 0; --r, from += stride) {
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) sum[i] += load(from + i * kLanes<T>);
    }
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) store(sums + i * kLanes<T>, load(sums + i * kLanes<T>) + sum[i]);
  }
}

/// The sums over a chunk's rows that the gradients of the biases and of layer normalisation consist of.
template <class T>
void norm_sums(const BackwardArgs<T>& args, const ChunkGrads<cells::LayerNormLstm, T>& grads, int direction, T* sums);
template <class To, class T>
void write_norm_sums(const Weights<void>& to, const T* sums, int64_t hidden, int64_t padded);

/// The gradients of the biases from the sums of those of the gates.
template <class Cell, class To, class T>
void write_bias_gradients(const Weights<void>& to, const T* sums, int64_t hidden, int64_t padded) {
  const auto write = [&](void* grad, int g, int slot) {
    if (grad) copy_row(static_cast<To*>(grad) + g * hidden, sums + slot * padded, hidden);
  };
  for (int g = 0; g < Cell::kGates; ++g) {
    write(to.bias_ih, g, Cell::ih_slot(g));
    write(to.bias_hh, g, Cell::hh_slot(g));
  }
}

// Rows of B for WeightGradient, in types that do not depend on the cell: see there.

/// To find what went into the product with weight_ih.
template <class S>
struct FindInputs {
  const BackwardArgs<S>& args;
  auto operator()(int64_t t, int64_t j) const { return rows_from(args.input, args.layout, t, j); }
};

/// The same of weight_hh, `singly` or as many rows at a time as are evenly spaced; null where that was zeros.
template <class S>
struct FindPreviousOutputs {
  const BackwardArgs<S>& args;
  int direction;
  bool singly;
  auto operator()(int64_t t, int64_t j) const {
    auto found = previous_outputs(args, direction, t, j);
    if (singly) found.count = 1;
    return found;
  }
};

/// Previous outputs with a variant's mask, if there is one.
template <class S>
class MaskedOutputs {
 public:
  MaskedOutputs(const BackwardArgs<S>& args, int direction, int64_t row)
      : args_(args),
        direction_(direction),
        masked_(args.masks.hidden ? Sizes::padded(args.sizes.output()) : 0),
        find_{args, direction, args.masks.hidden != nullptr},
        reader_(args.layout, row, find_) {}

  const S* operator()(int64_t) {
    const S* at = reader_.next();
    if (!args_.masks.hidden || !at) return at;
    const int64_t width = args_.sizes.output();
    const int64_t entry = direction_ * args_.layout.batch + args_.layout.entry(reader_.j());
    multiply_rows(masked_.get(), at, args_.masks.hidden + entry * width, width);
    return masked_.get();
  }

 private:
  const BackwardArgs<S>& args_;
  const int direction_;
  Buffer<S> masked_;
  const FindPreviousOutputs<S> find_;
  RowReader<FindPreviousOutputs<S>> reader_;
};

/// Rows that follow each other, a distance apart.
template <class T>
struct SpacedRows {
  const T* next;
  int64_t distance;
  const T* operator()(int64_t) { return std::exchange(next, next + distance); }
};

/// The gradients of one direction's parameters, a chunk's share at a time. Each task has gradients of its own.
template <class Cell, class S>
class ParameterGradients {
  using T = Compute<S>;

 public:
  ParameterGradients(const BackwardArgs<S>& args, const ChunkGrads<Cell, S>& grads, int direction)
      : args_(args),
        grads_(grads),
        to_(args.grad_weights[direction]),
        direction_(direction),
        storage_(args.grad_storage()),
        input_(to_.weight_ih, storage_, Cell::kGates, args.sizes.hidden, args.sizes.input, args.layout.rows),
        hidden_(to_.weight_hh, storage_, Cell::kGates, args.sizes.hidden, args.sizes.output(), args.layout.rows),
        proj_(to_.weight_hr, storage_, 1, args.sizes.proj, args.sizes.hidden, args.layout.rows),
        bias_tasks_(to_.bias_ih || to_.bias_hh || to_.weight_norm_ih || to_.weight_norm_hh || to_.weight_norm_c ||
                    to_.bias_norm_c),
        bias_sums_(grads.stride, true) {}

  int64_t tasks() const { return input_.tasks() + hidden_.tasks() + proj_.tasks() + bias_tasks_; }

  /// Of few rows, before the tasks.
  void take() {
    const int64_t rows = grads_.chunk.rows;
    with_inputs([&](auto& row, const Cuts& cuts) { input_.take(rows, row, cuts); });
    with_previous_outputs([&](auto& row, const Cuts& cuts) { hidden_.take(rows, row, cuts); });
    if (args_.sizes.proj) with_unprojected([&](auto& row, const Cuts& cuts) { proj_.take(rows, row, cuts); });
  }

  void run(int64_t task) {
    if (task < input_.tasks()) {
      const auto slot = [](int g) { return Cell::ih_slot(g); };
      return add_gates(input_, task, slot, [&](const auto& fn) { with_inputs(fn); });
    }
    task -= input_.tasks();
    if (task < hidden_.tasks()) {
      const auto slot = [](int g) { return Cell::hh_slot(g); };
      return add_gates(hidden_, task, slot, [&](const auto& fn) { with_previous_outputs(fn); });
    }
    task -= hidden_.tasks();
    if (task < proj_.tasks()) {
      const int64_t offset[1] = {0};
      return add(proj_, task, grads_.proj_columns(), grads_.proj_stride, offset,
                 [&](const auto& fn) { with_unprojected(fn); });
    }
    add_biases();
  }

  void finish() {
    const bool any = args_.layout.rows > 0;
    input_.finish(any);
    hidden_.finish(any);
    proj_.finish(any);
    with_storage<T>(storage_, [&]<class To>() {
      const int64_t hidden = args_.sizes.hidden, padded = args_.sizes.padded();
      if constexpr (cells::kIsNormed<Cell>) {
        write_norm_sums<To>(to_, bias_sums_.get(), hidden, padded);
      } else {
        write_bias_gradients<Cell, To>(to_, bias_sums_.get(), hidden, padded);
      }
    });
  }

 private:
  /// A task of one gradient. with_rows: one of with_..() below.
  void add(WeightGradient<S>& to, int64_t task, const Element<S>* columns, int64_t stride, const int64_t* offset,
           const auto& with_rows) {
    with_rows([&](auto& row, const Cuts& cuts) { to.add(task, columns, stride, offset, grads_.chunk, row, cuts); });
  }

  /// `slot(g)`: the gate gradients of gate g.
  void add_gates(WeightGradient<S>& to, int64_t task, const auto& slot, const auto& with_rows) {
    int64_t offset[Cell::kGates];
    for (int g = 0; g < Cell::kGates; ++g) offset[g] = slot(g) * args_.sizes.padded();
    add(to, task, grads_.gate_columns(), grads_.stride, offset, with_rows);
  }

  /// Rows of each step, where all have as many.
  int64_t step_rows() const { return args_.layout.has_all_rows() ? args_.layout.batch : 0; }

  /// Calls fn(row, cuts): row(i) is, whatever i, what went into the product with weight_ih in the next row of the
  /// chunk; it may be a RowReader.
  void with_inputs(const auto& fn) const {
    const FindInputs<S> find = {args_};
    RowReader reader(args_.layout, grads_.chunk.row, find);
    fn(reader, Cuts{0, step_rows()});
  }

  /// The same of weight_hh.
  void with_previous_outputs(const auto& fn) const {
    const Layout& layout = args_.layout;
    const Chunk& chunk = grads_.chunk;
    Cuts cuts = {0, step_rows()};  // initial states before outputs, or after them
    if (direction_ == 0 && chunk.first == 0) cuts.apart = layout.steps ? layout.batch_sizes[0] : 0;
    if (direction_ == 1 && chunk.last == layout.steps && cuts.step) cuts.apart = chunk.rows - cuts.step;
    if constexpr (cells::kIsVariant<Cell>) {
      MaskedOutputs<S> rows(args_, direction_, chunk.row);
      fn(rows, cuts);
    } else {
      const FindPreviousOutputs<S> find = {args_, direction_, false};
      RowReader reader(layout, chunk.row, find);
      fn(reader, cuts);
    }
  }

  /// The same of weight_hr.
  void with_unprojected(const auto& fn) const {
    const int64_t padded = args_.sizes.padded(), stride = saved_values(args_.cell, true, args_.variant) * padded;
    const int64_t row = direction_ * args_.layout.rows + grads_.chunk.row;
    SpacedRows<T> rows = {args_.saved + row * stride + Cell::kSaved * padded, stride};
    fn(rows, Cuts{});
  }

  void add_biases() {
    if constexpr (cells::kIsNormed<Cell>) {
      norm_sums(args_, grads_, direction_, bias_sums_.get());
    } else {
      constexpr int kTogether = 4;
      const int64_t padded = args_.sizes.padded(), rows = grads_.chunk.rows;
      T* sums = bias_sums_.get();
      for (int slot = 0; slot < Cell::kGradGates; ++slot) {
        int64_t u = slot * padded, end = u + blocks_of<T>(args_.sizes.hidden) * kLanes<T>;
        for (; u + kTogether * kLanes<T> <= end; u += kTogether * kLanes<T>)
          add_columns<kTogether>(sums + u, grads_.gates.get() + u, grads_.stride, rows);
        for (; u < end; u += kLanes<T>) add_columns<1>(sums + u, grads_.gates.get() + u, grads_.stride, rows);
      }
    }
  }

  const BackwardArgs<S>& args_;
  const ChunkGrads<Cell, S>& grads_;
  const Weights<void>& to_;
  const int direction_;
  const Storage storage_;  // of these gradients
  WeightGradient<S> input_, hidden_, proj_;
  const int64_t bias_tasks_;
  Buffer<T> bias_sums_;  // [gate gradients, padded H]
};

/// Where those of a group of batch entries go, of which one group's follow the other's.
template <class To>
Weights<void> gradients_of_group(Weights<void> to, const Sizes& sizes, int gates, int64_t group) {
  const auto move = [&](void*& grad, int64_t width) {
    if (grad) grad = static_cast<To*>(grad) + group * gates * sizes.hidden * width;
  };
  move(to.weight_ih, sizes.input);
  move(to.weight_hh, sizes.hidden);
  move(to.bias_ih, 1);
  move(to.bias_hh, 1);
  return to;
}

/// For each group of batch entries, one after the other, which rows of a step are its rows.
inline void find_group_rows(const Layout& layout, int64_t groups, int64_t* rows) {
  const int64_t size = layout.batch / groups;
  Buffer<int64_t> found(groups, true);
  for (int64_t j = 0; j < layout.batch; ++j) {
    const int64_t group = layout.entry(j) / size;
    rows[group * size + found.get()[group]++] = j;
  }
}

/// The gradients of one direction's parameters of a group of batch entries alone, once all steps have been scanned:
/// as if the group were a batch of its own.
template <class Cell, class S>
class GroupGradients {
 public:
  /// `rows`: those of the group, as of find_group_rows().
  GroupGradients(const BackwardArgs<S>& all, const ChunkGrads<Cell, S>& grads, int direction, int64_t group,
                 const int64_t* rows)
      : first_(all.layout.batch / all.groups * group),
        order_(all.layout.batch / all.groups),
        entries_(all.layout.steps),
        args_(args_of(all, direction, group, rows)),
        grads_(args_.sizes, args_.layout.batch, args_.layout.rows, true),
        parameters_(args_, grads_, direction) {
    const Layout& layout = args_.layout;
    grads_.chunk = {0, layout.steps, 0, layout.rows};
    for (int64_t t = 0; t < layout.steps; ++t) {
      for (int64_t j = 0; j < layout.batch_sizes[t]; ++j)
        std::memcpy(static_cast<void*>(grads_.gates_at(layout, t, j)), grads.gates_at(all.layout, t, rows[j]),
                    size_t(grads_.stride) * sizeof(S));
    }
    grads_.pair();
    parameters_.take();
  }

  int64_t tasks() const { return parameters_.tasks(); }
  void run(int64_t task) { parameters_.run(task); }
  void finish() { parameters_.finish(); }

 private:
  BackwardArgs<S> args_of(const BackwardArgs<S>& all, int direction, int64_t group, const int64_t* rows) {
    const int64_t batch = all.layout.batch / all.groups;
    BackwardArgs<S> args = all;
    args.groups = 0;
    int64_t alive = batch;
    args.layout = entries_.layout(all.layout, batch, [&](int64_t t) {
      while (alive > 0 && rows[alive - 1] >= all.layout.batch_sizes[t]) --alive;
      return alive;
    });
    if (all.layout.order) {
      for (int64_t j = 0; j < batch; ++j) order_.get()[j] = all.layout.entry(rows[j]) - first_;
      args.layout.order = order_.get();
    }
    args.input.data += first_ * args.input.row;
    args.output.data += first_ * args.output.row;
    if (args.resets.data) args.resets.data += first_ * args.resets.row;
    if (args.h_0) args.h_0 += (direction * (all.layout.batch - batch) + first_) * all.sizes.hidden;
    with_storage<Compute<S>>(args.grad_storage(), [&]<class To>() {
      Weights<void>& to = args.grad_weights[direction];
      to = gradients_of_group<To>(to, args.sizes, Cell::kGates, group);
    });
    return args;
  }

  const int64_t first_;  // entry
  Buffer<int64_t> order_;
  SomeEntries entries_;
  const BackwardArgs<S> args_;
  ChunkGrads<Cell, S> grads_;
  ParameterGradients<Cell, S> parameters_;
};

/// The scans of one direction: one for each slice of the batch, or for each member of the team that shares the units.
template <class Cell, class S>
class Scans {
 public:
  virtual ~Scans() = default;
  /// The steps of `now`'s chunk, for scans [first, last), which are members of a team or have it to themselves.
  /// `inputs`: what they call beside() of, if not null.
  virtual void run(int64_t first, int64_t last, const ChunkGrads<Cell, S>& now, InputGradient<Cell, S>* inputs,
                   Team& team, int thread, int threads) const = 0;
  /// After the last chunk.
  virtual void finish() const = 0;
};

/// The same of weight_hh that is stored as W: all that depends on it.
template <class Cell, class S, class W>
class ScansOf final : public Scans<Cell, S> {
  using Scan = BackwardScan<Cell, S, W>;

 public:
  ScansOf(const BackwardArgs<S>& args, int direction, Shares shares)
      : weights_(args, direction), scans_(shares.slices * shares.members) {
    const Slices slices(args.layout, shares.slices);
    for (int64_t i = 0; i < scans_.size(); ++i) {
      const int member = int(i % shares.members);
      scans_[i] = new Scan(args, weights_, direction, slices[i / shares.members], member, shares.members);
    }
  }
  void run(int64_t first, int64_t last, const ChunkGrads<Cell, S>& now, InputGradient<Cell, S>* inputs, Team& team,
           int thread, int threads) const override {
    Scan::run(&scans_[first], int(last - first), now, inputs, team, thread, threads);
  }
  void finish() const override {
    for (int64_t i = 0; i < scans_.size(); ++i) scans_[i]->finish();
  }

 private:
  const ScanWeights<Cell, S, W> weights_;
  Several<Scan> scans_;
};

template <class Cell, class S>
std::unique_ptr<Scans<Cell, S>> make_scans(const BackwardArgs<S>& args, int direction, Shares shares) {
  if constexpr (std::is_same_v<S, float> && !cells::kIsVariant<Cell>) {
    // Of one timestep there is no scan, whose steps would widen it.
    std::unique_ptr<Scans<Cell, S>> scans;
    const bool widens = args.narrow_hh[direction] && args.layout.steps > 1;
    with_storage<S>(widens ? args.narrow : Storage::kComputed,
                    [&]<class W>() { scans = std::make_unique<ScansOf<Cell, S, W>>(args, direction, shares); });
    return scans;
  }
  return std::make_unique<ScansOf<Cell, S, S>>(args, direction, shares);
}

/// Backward of one direction, a chunk at a time.
template <class Cell, class S>
class BackwardPass {
  using T = Compute<S>;

 public:
  /// `apart` and `may_follow`: see InputGradient.
  BackwardPass(const BackwardArgs<S>& args, int direction, Shares shares, int threads, T* apart, bool may_follow)
      : args_(args),
        direction_(direction),
        chunks_(args.layout, direction == 1, args.groups > 0),
        grads_(args.sizes, args.layout.batch, Chunks::capacity(args.layout, args.groups > 0), args.groups == 0),
        input_(args, grads_, direction, apart, threads <= 1, may_follow),
        scans_(make_scans<Cell>(args, direction, shares)),
        members_(shares.members),
        group_tasks_(args.groups < threads ? 0 : args.groups),
        group_rows_(args.groups > 0 ? args.layout.batch : 0),
        parameters_(args.groups > 0 ? nullptr
                                    : std::make_unique<ParameterGradients<Cell, S>>(args, grads_, direction)) {
    if (args.groups > 0) find_group_rows(args.layout, args.groups, group_rows_.get());
  }

  bool next_chunk() {
    input_.begin_chunk();
    taken_ = false;
    return chunks_.next(&grads_.chunk);
  }

  void scan(int64_t slice) {
    Team alone;
    InputGradient<Cell, S>* const inputs = input_.goes_beside() ? &input_ : nullptr;
    scans_->run(slice * members_, (slice + 1) * members_, grads_, inputs, alone, 0, 1);
    if (inputs) inputs->end_scan();
  }

  /// The share of one of several threads in the only slice.
  void scan_share(int thread, int threads) {
    const int first = members_ * thread / threads, last = members_ * (thread + 1) / threads;
    team_.run([&] { scans_->run(first, last, grads_, nullptr, team_, thread, threads); });
  }

  /// Whether threads are to call scan_or_follow() instead.
  bool is_followed() const { return input_.is_followed(); }
  void scan_or_follow(int thread) {
    team_.run([&] {
      if (thread == 0) {
        scan(0);
      } else {
        take();
      }
      input_.follow(team_);
    });
  }

  /// After the scans, before the products; there is something to do only where prepares().
  void prepare() {
    if (!parameters_) return;
    grads_.pair();
    take();
  }
  bool prepares() const { return kPack<S> > 1 || has_few_rows(args_.layout.rows); }

  /// Before the products: the gradients of groups that are fewer than the threads, which share each.
  void run_groups(const Executor& executor) {
    for (int64_t group = group_tasks_; group < args_.groups; ++group) run_group(group, executor);
  }

  /// Once the scans have run.
  int64_t product_tasks() const { return parameter_tasks() + input_.tasks(); }

  void run_product(int64_t task) {
    const TileScope scope;
    if (task >= parameter_tasks()) return input_.run(task - parameter_tasks());
    parameters_ ? parameters_->run(task) : run_group(task, Executor());
  }

  void finish() {
    scans_->finish();
    if (parameters_) parameters_->finish();
  }

 private:
  /// What gradients of parameters are made of besides those of the gates.
  void take() {
    if (parameters_ && !std::exchange(taken_, true)) parameters_->take();
  }

  int64_t parameter_tasks() const { return parameters_ ? parameters_->tasks() : group_tasks_; }

  void run_group(int64_t group, const Executor& executor) {
    const int64_t* rows = group_rows_.get() + args_.layout.batch / args_.groups * group;
    GroupGradients<Cell, S> gradients(args_, grads_, direction_, group, rows);
    parallel(executor, gradients.tasks(), [&](int64_t task) {
      const TileScope scope;
      gradients.run(task);
    });
    gradients.finish();
  }

  const BackwardArgs<S>& args_;
  const int direction_;
  Chunks chunks_;
  ChunkGrads<Cell, S> grads_;
  InputGradient<Cell, S> input_;
  const std::unique_ptr<Scans<Cell, S>> scans_;
  const int members_;
  Team team_;
  const int64_t group_tasks_;  // groups of entries that are a task each
  Buffer<int64_t> group_rows_;
  const std::unique_ptr<ParameterGradients<Cell, S>> parameters_;  // null: each group has its own
  bool taken_ = false;                                             // of the chunk
};

/// What a BackwardPass goes over.
template <class S>
struct PassArgs {
  const BackwardArgs<S>* args = nullptr;
  int direction = 0;
};

/// Walks the chunks of so many passes side by side, of both directions or of all parts of a batch, so that every thread
/// has work in each; `share`: as many have one pass. grad_input of the reverse direction goes to `apart` or, if that is
/// null, is added to what is there.
template <class Cell, class S>
void walk(const PassArgs<S>* ways, int count, const Executor& executor, const Executor& share, Compute<S>* apart) {
  const BackwardArgs<S>& any = *ways->args;
  const Shares shares =
      share_out(any.layout, any.sizes, Cell::kGates, sizeof(S), share, !cells::kIsVariant<Cell>, true);
  const bool may_follow = executor.run_team && executor.threads > 1 && count == 1 && shares.members == 1;
  Several<BackwardPass<Cell, S>> passes(count);
  parallel(executor, count, [&](int64_t i) {
    passes[i] =
        new BackwardPass<Cell, S>(*ways[i].args, ways[i].direction, shares, executor.threads, apart, may_follow);
  });
  for (;;) {
    // Those that have another chunk, and the tasks up to theirs.
    BackwardPass<Cell, S>* going_on[kMostParts];
    int64_t tasks[kMostParts + 1] = {};
    int n = 0;
    for (int i = 0; i < count; ++i)
      if (passes[i]->next_chunk()) going_on[n++] = passes[i];
    if (n == 0) break;
    if (shares.members > 1) {
      run_teams(executor, n, shares.members,
                [&](int i, int thread, int threads) { going_on[i]->scan_share(thread, threads); });
    } else if (going_on[0]->is_followed()) {
      run_teams(executor, 1, 2, [&](int, int thread, int) { going_on[0]->scan_or_follow(thread); });
    } else {
      parallel(executor, n * shares.slices,
               [&](int64_t task) { going_on[task / shares.slices]->scan(task % shares.slices); });
    }
    bool prepares = false;
    for (int i = 0; i < n; ++i) prepares |= going_on[i]->prepares();
    if (prepares) parallel(executor, n, [&](int64_t i) { going_on[i]->prepare(); });
    for (int i = 0; i < n; ++i) {
      going_on[i]->run_groups(executor);
      tasks[i + 1] = tasks[i] + going_on[i]->product_tasks();
    }
    parallel(executor, tasks[n], [&](int64_t task) {
      int i = 0;
      while (task >= tasks[i + 1]) ++i;
      going_on[i]->run_product(task - tasks[i]);
    });
  }
  for (int i = 0; i < count; ++i) passes[i]->finish();
}

inline Executor with_so_many(const Executor& executor, int threads) {
  Executor fewer = executor;
  fewer.threads = threads;
  return fewer;
}

/// Each thread takes parts of its own or, where these cannot be dealt out evenly, shares all of them with the others.
template <class Cell, class S>
void backward_in_parts(const BackwardArgs<S>& args, int count, const Executor& executor) {
  const Slices slices(args.layout, count);
  Several<BatchPart<S>> parts(count);
  PassArgs<S> ways[kMostParts];
  const auto make = [&](int64_t i) {
    parts[i] = new BatchPart<S>(args, Cell::kGates, slices[i]);
    ways[i].args = &parts[i]->args;
  };
  const int threads = executor.threads;
  Compute<S>* const nowhere = nullptr;
  if (count % threads == 0) {
    const Executor alone = with_so_many(executor, 1);
    // Tasks are taken in turns. What a thread scanned forward, as one slice, are parts that follow each other.
    const auto part_of_task = [&](int64_t task) { return task % threads * (count / threads) + task / threads; };
    parallel(executor, count, [&](int64_t task) {
      const int64_t i = part_of_task(task);
      make(i);
      walk<Cell>(ways + i, 1, alone, alone, nowhere);
    });
  } else {
    // Of slices that are not as many as threads, so many that none has much more to do than another.
    const Executor share =
        with_so_many(executor, threads % count == 0 ? threads / count : (2 * threads - 1) / count + 1);
    for (int i = 0; i < count; ++i) make(i);
    walk<Cell>(ways, count, executor, share, nowhere);
  }
  add_parts(args, Cell::kGates, parts);
}

template <class Cell, class S>
void backward(const BackwardArgs<S>& args, const Executor& executor) {
  using T = Compute<S>;
  const int directions = args.sizes.directions;
  const int parts = args.groups > 0 ? 1 : count_parts(args.cell, args.variant, args.sizes, args.layout);
  if constexpr (!cells::kIsVariant<Cell>) {
    if (parts > 1) return backward_in_parts<Cell>(args, parts, executor);
  }
  const PassArgs<S> ways[2] = {{&args, 0}, {&args, 1}};
  if (executor.threads <= 1 || directions == 1) {
    for (int d = 0; d < directions; ++d) walk<Cell>(ways + d, 1, executor, executor, static_cast<T*>(nullptr));
    return;
  }
  const int64_t width = args.sizes.input, rows = args.layout.rows;
  Buffer<T> apart(args.grad_input.data ? rows * width : 0);
  if (executor.threads == 2) {
    // Each thread takes a direction, multiplies what is in its own cache, and waits only at the end: one whose core
    // another process takes does not hold up the other in every chunk.
    const Executor alone = with_so_many(executor, 1);
    parallel(executor, 2, [&](int64_t d) { walk<Cell>(ways + d, 1, alone, alone, apart.get()); });
  } else {
    walk<Cell>(ways, 2, executor, executor, apart.get());
  }
  if (!args.grad_input.data) return;
  const auto find = [&](int64_t t, int64_t j) {
    return rows_from(args.grad_input.template of<T>(), args.layout, t, j);
  };
  RowReader reader(args.layout, 0, find);
  for (int64_t r = 0; r < rows; ++r) {
    T* to = reader.next();
    add_row(to, apart.get() + r * width, width);
  }
}
