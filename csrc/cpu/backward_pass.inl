// Backward of a layer: the scans of backward.inl and, while a chunk's gate gradients are in the cache, their share of
// the gradients of input, weights and biases.

/// Rows [first, last) of the chunk's grad_input: gate gradients times weight_ih, on top of another direction's where
/// `accumulate`. They go to args.grad_input or, if it is given, to `apart` [T, I].
template <class Cell, class S>
void input_gradient(const BackwardArgs<S>& args, const BackwardWeights<Cell, S>& weights,
                    const ChunkGrads<Cell, S>& grads, Compute<S>* apart, bool accumulate, int64_t first, int64_t last) {
  const Layout& layout = args.layout;
  Buffer<const S*> a(last - first);
  Buffer<Compute<S>*> c(last - first);
  RowCursor cursor(layout, grads.chunk.row + first);
  for (int64_t r = 0; r < last - first; ++r, cursor.next()) {
    a.get()[r] = grads.gates.get() + (first + r) * grads.stride;
    c.get()[r] = apart ? apart + (grads.chunk.row + first + r) * args.sizes.input
                       : args.grad_input.at(layout, cursor.t, cursor.j);
  }
  PlainProduct<S> p;
  p.rows = last - first;
  p.columns = args.sizes.input;
  p.a = a.get();
  p.c = c.get();
  p.b = weights.input.get();
  p.segments.count = Cell::kGates;
  p.segments.length = elements<S>(args.sizes.hidden);
  for (int g = 0; g < Cell::kGates; ++g) p.segments.offset[g] = Cell::ih_slot(g) * args.sizes.padded() / kPack<S>;
  p.accumulate = accumulate;
  p.fetch_c = true;
  plain_product(p);
}

/// Columns [first, first + columns) of grad [parts * height, width] += A^T B over the rows of a chunk. A's part p is
/// the `height` columns of A, whose rows are elements, from a + offset[p].
template <class S, class Row>
void weight_gradient(Compute<S>* grad, int64_t width, int64_t first, int64_t columns, const Element<S>* a,
                     int64_t stride, int parts, const int64_t* offset, int64_t height, int64_t rows, bool accumulate,
                     const Row& b_row) {
  constexpr int64_t kPiece = 256;  // rows whose B stays in the second-level cache and whose column of A in the first
  Buffer<Element<S>> packed(elements<S>(smaller(kPiece, larger(rows, 1))) * blocks_of<Compute<S>>(columns) *
                            kLanes<Element<S>>);
  Buffer<const S*> a_columns(height);
  Buffer<Compute<S>*> to(height);
  PlainProduct<S> p;
  p.rows = height;
  p.columns = columns;
  p.a = a_columns.get();
  p.c = to.get();
  p.b = packed.get();
  p.segments.stride = stride;
  for (int64_t begin = 0; begin < rows; begin += kPiece) {
    const int64_t count = smaller(kPiece, rows - begin);
    pack_rows<S>(packed.get(), b_row, count, first, columns);
    p.segments.length = elements<S>(count);
    p.accumulate = accumulate || begin > 0;
    for (int part = 0; part < parts; ++part) {
      for (int64_t m = 0; m < height; ++m) {
        a_columns.get()[m] = reinterpret_cast<const S*>(a + elements<S>(begin) * stride + offset[part] + m);
        to.get()[m] = grad + (part * height + m) * width + first;
      }
      plain_product<S, true>(p);
    }
  }
}

/// Adds the rows of N vectors up, one after another, on top of what `sums` holds.
template <int N, class T, class S>
ALWAYS_INLINE void add_columns(T* sums, const S* from, int64_t stride, int64_t rows) {
  Vec<T> sum[N];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) sum[i] = load(sums + i * kLanes<T>);
  for (int64_t r = 0; r < rows; ++r, from += stride) {
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) sum[i] += load(from + i * kLanes<T>);
  }
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) store(sums + i * kLanes<T>, sum[i]);
}

/// What the gradients of one direction's parameters are made of.
enum class Part { kWeightIh, kWeightHh, kWeightHr, kBias };

/// The sums over a chunk's rows that the gradients of the biases and of layer normalisation consist of.
template <class T>
void norm_sums(const BackwardArgs<T>& args, const ChunkGrads<cells::LayerNormLstm, T>& grads, int direction, T* sums);
template <class T>
void write_norm_sums(const Weights<T>& to, const T* sums, int64_t hidden, int64_t padded);

/// Adds a chunk's share of some columns of one weight's gradient, or of the sum of the gate gradients for the biases.
template <class Cell, class S>
void weight_task(const BackwardArgs<S>& args, const ChunkGrads<Cell, S>& grads, int direction, Part part, int64_t first,
                 int64_t columns, bool accumulate, Compute<S>* bias_sum) {
  using T = Compute<S>;
  const Sizes& sizes = args.sizes;
  const Layout& layout = args.layout;
  const Weights<T>& to = args.grad_weights[direction];
  const int64_t padded = sizes.padded(), rows = grads.chunk.rows;
  int64_t offset[4] = {0, 0, 0, 0};
  RowCursor cursor(layout, grads.chunk.row);  // rows are asked for in order
  if (part == Part::kWeightIh) {
    for (int g = 0; g < Cell::kGates; ++g) offset[g] = Cell::ih_slot(g) * padded;
    const auto row = [&](int64_t) -> const S* {
      const S* at = args.input.at(layout, cursor.t, cursor.j);
      cursor.next();
      return at;
    };
    weight_gradient<S>(to.weight_ih, sizes.input, first, columns, grads.gate_columns(), grads.stride, Cell::kGates,
                       offset, sizes.hidden, rows, accumulate, row);
  } else if (part == Part::kWeightHh) {
    for (int g = 0; g < Cell::kGates; ++g) offset[g] = Cell::hh_slot(g) * padded;
    Buffer<S> masked(cells::kIsVariant<Cell> && args.masks.hidden ? Sizes::padded(sizes.output()) : 0);
    const auto row = [&](int64_t) -> const S* {
      const S* at = previous_output(args, direction, cursor.t, cursor.j);
      if constexpr (cells::kIsVariant<Cell>) {
        if (args.masks.hidden && at) {
          const int64_t entry = direction * layout.batch + layout.entry(cursor.j);
          multiply_rows(masked.get(), at, args.masks.hidden + entry * sizes.output(), sizes.output());
          at = masked.get();
        }
      }
      cursor.next();
      return at;
    };
    weight_gradient<S>(to.weight_hh, sizes.output(), first, columns, grads.gate_columns(), grads.stride, Cell::kGates,
                       offset, sizes.hidden, rows, accumulate, row);
  } else if (part == Part::kWeightHr) {
    const int64_t stride = saved_values(args.cell, true, args.variant) * padded;
    const T* unprojected = args.saved + (direction * layout.rows + grads.chunk.row) * stride + Cell::kSaved * padded;
    const auto row = [&](int64_t) {
      const T* at = unprojected;
      unprojected += stride;
      return at;
    };
    weight_gradient<S>(to.weight_hr, sizes.hidden, first, columns, grads.proj_columns(), grads.proj_stride, 1, offset,
                       sizes.proj, rows, accumulate, row);
  } else if constexpr (cells::kIsNormed<Cell>) {
    norm_sums(args, grads, direction, bias_sum);
  } else {
    constexpr int kTogether = 4;
    for (int slot = 0; slot < Cell::kGradGates; ++slot) {
      int64_t u = slot * padded, end = u + blocks_of<T>(sizes.hidden) * kLanes<T>;
      for (; u + kTogether * kLanes<T> <= end; u += kTogether * kLanes<T>)
        add_columns<kTogether>(bias_sum + u, grads.gates.get() + u, grads.stride, rows);
      for (; u < end; u += kLanes<T>) add_columns<1>(bias_sum + u, grads.gates.get() + u, grads.stride, rows);
    }
  }
}

/// Backward of one direction, a chunk at a time.
template <class Cell, class S>
class BackwardPass {
  using T = Compute<S>;

 public:
  BackwardPass(const BackwardArgs<S>& args, int direction, int64_t slices, int members)
      : args_(args),
        direction_(direction),
        weights_(args.weights[direction], args.sizes, args.grad_input.data != nullptr),
        chunks_(args.layout, direction == 1),
        grads_(args.sizes, args.layout),
        scans_(slices * members),
        slices_(slices),
        members_(members),
        bias_sum_(grads_.stride, true) {
    for (int64_t i = 0; i < slices * members; ++i) {
      const Slice slice = slice_of(args.layout, i / members, slices);
      scans_.get()[i] = new BackwardScan<Cell, S>(args, weights_, direction, slice, int(i % members), members);
    }
    const Weights<T>& to = args.grad_weights[direction];
    const auto pieces = [](const T* grad, int64_t width) { return grad ? (width + kColumns - 1) / kColumns : 0; };
    tasks_[0] = pieces(to.weight_ih, args.sizes.input);
    tasks_[1] = pieces(to.weight_hh, args.sizes.output());
    tasks_[2] = pieces(to.weight_hr, args.sizes.hidden);
    tasks_[3] =
        to.bias_ih || to.bias_hh || to.weight_norm_ih || to.weight_norm_hh || to.weight_norm_c || to.bias_norm_c;
  }
  ~BackwardPass() {
    for (int64_t i = 0; i < slices_ * members_; ++i) delete scans_.get()[i];
  }

  bool next_chunk() {
    ++count_;
    return grads_.next(chunks_, args_.layout, direction_ == 1);
  }

  void scan(int64_t slice) {
    Team alone;
    BackwardScan<Cell, S>::run(scans_.get() + slice * members_, members_, grads_, alone, 1);
  }

  /// The share of one of several threads in the only slice.
  void scan_share(int thread, int threads) {
    const int first = members_ * thread / threads, last = members_ * (thread + 1) / threads;
    BackwardScan<Cell, S>::run(scans_.get() + first, last - first, grads_, team_, threads);
  }

  /// After the scans, before the products.
  void pair() { grads_.pair(); }

  int64_t product_tasks() const {
    const int64_t input = args_.grad_input.data ? (grads_.chunk.rows + kInputRows - 1) / kInputRows : 0;
    return tasks_[0] + tasks_[1] + tasks_[2] + tasks_[3] + input;
  }

  void run_product(int64_t task, T* input_apart, bool accumulate_input) {
    const int64_t widths[] = {args_.sizes.input, args_.sizes.output(), args_.sizes.hidden, 1};
    for (int part = 0; part < 4; ++part) {
      if (task < tasks_[part]) {
        const int64_t first = task * kColumns;
        return weight_task<Cell>(args_, grads_, direction_, Part(part), first, smaller(kColumns, widths[part] - first),
                                 count_ > 1, bias_sum_.get());
      }
      task -= tasks_[part];
    }
    const int64_t first = task * kInputRows;
    input_gradient<Cell>(args_, weights_, grads_, input_apart, accumulate_input, first,
                         smaller(grads_.chunk.rows, first + kInputRows));
  }

  void finish() {
    for (int64_t i = 0; i < slices_ * members_; ++i) scans_.get()[i]->finish();
    const Weights<T>& to = args_.grad_weights[direction_];
    const int64_t hidden = args_.sizes.hidden, padded = args_.sizes.padded();
    const size_t bytes = size_t(hidden) * sizeof(T);
    if constexpr (cells::kIsNormed<Cell>) write_norm_sums(to, bias_sum_.get(), hidden, padded);
    for (int g = 0; g < Cell::kGates && !cells::kIsNormed<Cell>; ++g) {
      if (to.bias_ih) std::memcpy(to.bias_ih + g * hidden, bias_sum_.get() + Cell::ih_slot(g) * padded, bytes);
      if (to.bias_hh) std::memcpy(to.bias_hh + g * hidden, bias_sum_.get() + Cell::hh_slot(g) * padded, bytes);
    }
    if (args_.layout.rows > 0) return;
    const int64_t gates = Cell::kGates * hidden;  // no chunk has written the weights' gradients
    const auto clear = [](T* grad, int64_t size) {
      if (grad) std::memset(grad, 0, size_t(size) * sizeof(T));
    };
    clear(to.weight_ih, gates * args_.sizes.input);
    clear(to.weight_hh, gates * args_.sizes.output());
    clear(to.weight_hr, args_.sizes.proj * hidden);
  }

 private:
  static constexpr int64_t kColumns = 4 * kLanes<T>;  // of one task: the width of a register tile
  static constexpr int64_t kInputRows = 48;           // of one task: a few heights of a register tile

  const BackwardArgs<S>& args_;
  const int direction_;
  const BackwardWeights<Cell, S> weights_;
  Chunks chunks_;
  ChunkGrads<Cell, S> grads_;
  Buffer<BackwardScan<Cell, S>*> scans_;
  const int64_t slices_;
  const int members_;
  Team team_;
  Buffer<T> bias_sum_;  // [gate gradients, padded H]
  int64_t tasks_[4];    // weight_ih, weight_hh, weight_hr, biases
  int64_t count_ = 0;
};

/// Walks the chunks of directions [first, last) side by side, so that every thread has work in each. grad_input of the
/// second of two goes to `apart`; where only one is walked, `accumulate` adds it to what is there.
template <class Cell, class S>
void walk(const BackwardArgs<S>& args, const Executor& executor, int first, int last, Compute<S>* apart,
          bool accumulate) {
  const int64_t slices = count_slices(args.layout, args.sizes, Cell::kGates, sizeof(S), executor);
  const int members = cells::kIsVariant<Cell> ? 1 : team_size(args.layout, args.sizes, Cell::kGates, executor, slices);
  Both<BackwardPass<Cell, S>> passes;
  parallel(executor, last - first,
           [&](int64_t i) { passes.item[i] = new BackwardPass<Cell, S>(args, first + int(i), slices, members); });
  for (;;) {
    bool more[2] = {false, false};
    int64_t scans = 0, products[2] = {0, 0};
    for (int i = 0; i < last - first; ++i) {
      more[i] = passes.item[i]->next_chunk();
      if (!more[i]) continue;
      scans += slices;
      products[i] = passes.item[i]->product_tasks();
    }
    if (scans == 0) break;
    const int lead = more[0] ? 0 : 1;
    if (members > 1) {
      run_teams(executor, int(scans), members,
                [&](int i, int thread, int threads) { passes.item[lead + i]->scan_share(thread, threads); });
    } else {
      parallel(executor, scans, [&](int64_t task) { passes.item[lead + task / slices]->scan(task % slices); });
    }
    if (kPack<S> > 1) {
      parallel(executor, last - first, [&](int64_t i) {
        if (more[i]) passes.item[i]->pair();
      });
    }
    parallel(executor, products[0] + products[1], [&](int64_t task) {
      const int i = task < products[0] ? 0 : 1;
      passes.item[i]->run_product(i ? task - products[0] : task, i ? apart : nullptr, accumulate);
    });
  }
  for (int i = 0; i < last - first; ++i) passes.item[i]->finish();
}

template <class Cell, class S>
void backward(const BackwardArgs<S>& args, const Executor& executor) {
  using T = Compute<S>;
  const int directions = args.sizes.directions;
  if (executor.threads <= 1 || directions == 1) {
    for (int d = 0; d < directions; ++d) walk<Cell, S>(args, executor, d, d + 1, nullptr, d > 0);
    return;
  }
  const int64_t width = args.sizes.input, rows = args.layout.rows;
  Buffer<T> apart(args.grad_input.data ? rows * width : 0);
  walk<Cell, S>(args, executor, 0, 2, apart.get(), false);
  if (!args.grad_input.data) return;
  RowCursor cursor(args.layout, 0);
  for (int64_t r = 0; r < rows; ++r, cursor.next()) {
    T* to = args.grad_input.at(args.layout, cursor.t, cursor.j);
    const T* from = apart.get() + r * width;
    for (int64_t i = 0; i < width; i += kLanes<T>)
      store_part(to + i, load_part(to + i, width - i) + load_part(from + i, width - i), width - i);
  }
}
