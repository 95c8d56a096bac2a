// The gradient of a layer's input: gate gradients times weight_ih, for the rows of a chunk once they are scanned or,
// of one sequence, beside the scan: by the thread that scans, or by another one that follows it.

/// Rows of one task, a few heights of a register tile.
constexpr int64_t kTaskRows = 48;

/// The share of one direction.
template <class Cell, class S>
class InputGradient {
  using T = Compute<S>;
  static constexpr bool kTakesAlong = kSidePays<1, S> && !cells::kIsVariant<Cell>;
  static constexpr int64_t kRows = kSideRows<1>;  // of tiles, and after how many steps others hear of them

 public:
  /// What the steps of one sequence take along, see row.inl: gradients of the inputs of steps before them.
  using Tiles = std::conditional_t<kTakesAlong, SideTiles<S, kRows>, NoSideTiles>;

  /// Of the chunks that `grads` comes to hold. `apart` [T, I]: there instead of in args.grad_input, where that of the
  /// reverse direction is added to the other's. `alone`: one thread does all there is to do. `may_follow`: one scans,
  /// and there are others.
  InputGradient(const BackwardArgs<S>& args, const ChunkGrads<Cell, S>& grads, int direction, T* apart, bool alone,
                bool may_follow)
      : args_(args),
        grads_(grads),
        reverse_(direction == 1),
        apart_(reverse_ ? apart : nullptr),
        accumulate_(reverse_ && !apart),
        storage_(apart_ ? Storage::kComputed : args.grad_input_storage()),
        packs_whole_(may_take_along(args, direction)),
        takes_along_(alone && packs_whole_ && beside_pays(args)),
        // Not weights of 16 bits, which follow() would widen for every few rows again.
        is_followed_(may_follow && has_long_scan(args) && !args.narrow_ih[direction]),
        weight_({args.weights[direction].weight_ih, args.narrow_ih[direction], args.narrow}, args.sizes.hidden,
                args.sizes.input, args.grad_input.data, packs_whole_ ? kWhole : args.layout.rows),
        sums_stride_(Sizes::padded(args.sizes.input)),
        sums_(takes_along_ ? kRows * sums_stride_ : 0),
        tiles_(takes_along_ ? std::make_unique<Tiles>() : nullptr) {}

  /// Whether other threads are to follow() the one that scans.
  bool is_followed() const { return is_followed_; }
  /// Whether the scan is to call beside(), and end_scan() at the end of each chunk.
  bool goes_beside() const { return takes_along_ || is_followed_; }

  void begin_chunk() { begun_ = claimed_ = scanned_ = 0; }

  /// What the step may take along that is number `step` of the chunk, in the order in which they run. Of the second and
  /// those after it, before they run; not of a sequence's last, and of those at resets it need not be asked.
  ALWAYS_INLINE Tiles* beside(int64_t step) {
    if (step >= begun_ + kRows) go_on();
    return tiles_.get();
  }

  void end_scan() {
    if (takes_along_) finish_tiles();
    if (is_followed_) tell(grads_.chunk.rows);
  }

  /// The rows of the chunk as they are scanned, as many as no other thread takes.
  void follow(Team& team) {
    const int64_t rows = grads_.chunk.rows;
    for (;;) {
      const int64_t first = __atomic_fetch_add(&claimed_, kFollowed, __ATOMIC_RELAXED);
      if (first >= rows) return;
      const int64_t last = smaller(rows, first + kFollowed);
      team.wait([&] { return __atomic_load_n(&scanned_, __ATOMIC_ACQUIRE) >= last; });
      reverse_ ? multiply(first, last) : multiply(rows - last, rows - first);
    }
  }

  /// For the rows of the chunk that are not there yet.
  int64_t tasks() const {
    return args_.grad_input.data && !is_followed_ ? (grads_.chunk.rows - begun_ + kTaskRows - 1) / kTaskRows : 0;
  }

  void run(int64_t task) const {
    const int64_t begin = reverse_ ? begun_ : 0, end = begin + grads_.chunk.rows - begun_;
    multiply(begin + task * kTaskRows, smaller(end, begin + (task + 1) * kTaskRows));
  }

 private:
  static constexpr int64_t kFollowed = 12;  // rows at a time: two tiles (measured)

  /// Whether there is a scan that it could go beside, of so many steps that either way pays (measured).
  static bool has_long_scan(const BackwardArgs<S>& args) {
    constexpr int64_t kFewestSteps = 32;
    return !cells::kIsVariant<Cell> && args.grad_input.data && args.layout.steps >= kFewestSteps &&
           has_plain_steps(args.layout, args.sizes);
  }

  /// Rows of the chunk.
  NO_INLINE void multiply(int64_t first, int64_t last) const {
    const int64_t rows = last - first;
    const bool rounds = storage_ != Storage::kComputed;
    Buffer<const S*> a(rows);
    Buffer<T*> c(rows);
    Buffer<T> unrounded(rounds ? rows * sums_stride_ : 0);
    const auto each_row = [&]<class To>(const auto& fn) {
      const auto find = [&](int64_t t, int64_t j) { return rows_at<To>(t, j); };
      RowReader reader(args_.layout, grads_.chunk.row + first, find);
      for (int64_t r = 0; r < rows; ++r) fn(r, reader.next());
    };
    space_rows(a.get(), grads_.gates.get() + first * grads_.stride, grads_.stride, rows);
    if (rounds) {
      space_rows(c.get(), unrounded.get(), sums_stride_, rows);
    } else {
      each_row.template operator()<T>([&](int64_t r, T* to) { c.get()[r] = to; });
    }
    PlainProduct<S> p;
    p.rows = rows;
    p.columns = args_.sizes.input;
    p.a = a.get();
    p.c = c.get();
    p.segments.count = Cell::kGates;
    p.segments.length = elements<S>(args_.sizes.hidden);
    for (int g = 0; g < Cell::kGates; ++g) p.segments.offset[g] = Cell::ih_slot(g) * args_.sizes.padded() / kPack<S>;
    if constexpr (kHasAmx) p.segments.join();  // one stretch need not be copied
    p.accumulate = accumulate_;
    p.fetch_c = !rounds;
    weight_.multiply(p);
    if (!rounds) return;
    with_storage<T>(storage_, [&]<class To>() {
      each_row.template operator()<To>([&](int64_t r, To* to) { copy_row(to, c.get()[r], args_.sizes.input); });
    });
  }

  static int64_t recurrent_bytes(const BackwardArgs<S>& args) {
    return args.sizes.recurrent(Cell::kGates) * int64_t(sizeof(S));
  }

  /// Whether steps can take tiles along. weight_ih is packed whole for it, which can change the bits: so neither the
  /// number of threads nor the processor is asked.
  static bool may_take_along(const BackwardArgs<S>& args, int direction) {
    const bool stored = args.narrow_ih[direction] || args.narrow_hh[direction];
    return kTakesAlong && !stored && has_long_scan(args) && recurrent_bytes(args) > kFirstCacheWeights;
  }

  /// Whether a scan waits so long for recurrent weights that tiles beside it are faster than after it (measured,
  /// backward of 128 to 512 steps: on Zen 4 64 units of an LSTM 1.06 times as fast, of a GRU 1.03, 128 units 1.08, of
  /// an RNN 1.05, whose 64 units are 0.99: they fit the first-level cache; on Zen 5, whose second one is read twice as
  /// fast, 1.02 to 1.09 between these limits, else 0.93 to 1.00; on Ice Lake 0.94 to 0.99 there; not on other ones of
  /// Intel's, which are taken to be like Zen 5).
  static bool beside_pays(const BackwardArgs<S>& args) {
    if (!tuning().takes_along) return false;
    const int64_t bytes = recurrent_bytes(args);
    return tuning().vectors_a_cycle == 1 || (bytes > 128 * 1024 && bytes <= 400 * 1024);
  }

  /// Where the gradients go of the input of row (t, j) and of those after it.
  template <class To>
  EvenRows<To> rows_at(int64_t t, int64_t j) const {
    if constexpr (std::is_same_v<To, T>) {
      if (apart_) {
        const int64_t row = args_.layout.offsets[t] + j, width = args_.sizes.input;
        return {apart_ + row * width, width, args_.layout.rows - row};
      }
    }
    return rows_from(args_.grad_input.template of<To>(), args_.layout, t, j);
  }

  /// Of the last that were begun, in the chunk.
  int64_t first_row() const { return reverse_ ? begun_ - kRows : grads_.chunk.rows - begun_; }

  /// Others: so many steps have been scanned.
  void tell(int64_t steps) { __atomic_store_n(&scanned_, steps, __ATOMIC_RELEASE); }

  NO_INLINE void go_on() {
    if (takes_along_) finish_tiles();
    begun_ += kRows;
    takes_along_ ? begin_tiles() : tell(begun_);
  }

  void finish_tiles() {
    if constexpr (kTakesAlong) {
      if (begun_ == 0) return;
      tiles_->finish();
      with_storage<T>(storage_, [&]<class To>() {
        const EvenRows<To> to = rows_at<To>(grads_.chunk.first + first_row(), 0);
        for (int64_t i = 0; i < kRows; ++i) {
          To* row = to.first + i * to.distance;
          const T* from = sums_.get() + i * sums_stride_;
          if constexpr (std::is_same_v<To, T>) {
            if (accumulate_) {
              add_row(row, from, args_.sizes.input);
              continue;
            }
          }
          copy_row(row, from, args_.sizes.input);
        }
      });
    }
  }

  void begin_tiles() {
    if constexpr (kTakesAlong) {
      static_assert(Cell::ih_slot(0) == 0 && Cell::ih_slot(Cell::kGates - 1) == Cell::kGates - 1);
      SideProduct<S> p;
      p.rows = kRows;
      p.depth = Cell::kGates * elements<S>(args_.sizes.hidden);
      p.a = reinterpret_cast<const Factor<S>*>(grads_.gates.get() + first_row() * grads_.stride);
      p.a_stride = grads_.stride / kPack<S>;
      p.stretch = elements<S>(args_.sizes.hidden);
      p.gap = args_.sizes.padded() / kPack<S> - p.stretch;
      p.c = sums_.get();
      p.c_stride = sums_stride_;
      p.b = weight_.packed();
      p.blocks = {0, blocks_of<T>(args_.sizes.input)};
      tiles_->add(p);
      tiles_->spread(kRows * (blocks_of<T>(args_.sizes.output()) / kRowBlocks<1>)*p.depth);
    }
  }

  const BackwardArgs<S>& args_;
  const ChunkGrads<Cell, S>& grads_;
  const bool reverse_;
  T* const apart_;
  const bool accumulate_;
  const Storage storage_;  // of what it writes
  const bool packs_whole_, takes_along_, is_followed_;
  const BackwardWeight<Cell, S> weight_;
  const int64_t sums_stride_;
  Buffer<T> sums_;                      // [kRows, padded I], of the tiles
  int64_t begun_ = 0;                   // rows of the chunk, in the order of their steps: tiles begun, or told of
  const std::unique_ptr<Tiles> tiles_;  // null: no step takes any along
  alignas(64) int64_t scanned_ = 0;     // steps of the chunk, as far as others know
  alignas(64) int64_t claimed_ = 0;     // rows, by those who follow
};
