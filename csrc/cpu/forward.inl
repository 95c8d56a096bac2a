// The scan over time, forward.

/// What the members of a team share: the states after the last two steps, [slice, padded P]. Those of 16 bits that are
/// multiplied, and of weights that are read as they lie, are no more precise than what the caller sees of them.
template <class S>
struct ForwardStates {
  ForwardStates(const ForwardArgs<S>& args, int direction, Slice slice)
      : stride(Sizes::padded(args.sizes.output())),
        h{Buffer<Activation<S>>(slice.size() * stride, true), Buffer<Activation<S>>(slice.size() * stride, true)} {
    if (!args.h_0) return;
    const int64_t out = args.sizes.output();
    const S* h_0 = args.h_0 + args.layout.batch * direction * out;
    for (int i = 0; i < 2; ++i) read_states(h[i].get(), stride, h_0, out, args.layout, slice);
  }

  const int64_t stride;
  Buffer<Activation<S>> h[2];  // the neighbour of an odd P's last number, see store_padded, stays zero
};

/// What the scan of a variant has besides; see variants.inl.
template <class Cell, class S, bool = cells::kIsVariant<Cell>>
struct VariantForward {
  VariantForward(const ForwardArgs<S>&, int, Slice) {}
};

/// The scan of one direction for a slice of the batch and, where a team shares it, a part of the hidden units.
template <class Cell, class S>
class ForwardScan {
  static constexpr int G = Cell::kGates;
  static_assert(Cell::kSplit <= 1);  // as csrc/cells/cell.h has it
  using T = Compute<S>;
  using V = Vec<T>;

 public:
  ForwardScan(const ForwardArgs<S>& args, const ForwardWeights<cells::Plain<Cell>, S>& weights, int direction,
              Slice slice, ForwardStates<S>& states, Team& team, int member, int members,
              SharedChunks<T>* chunks = nullptr)
      : args_(args),
        layout_(args.layout),
        weights_(weights),
        direction_(direction),
        reverse_(direction == 1),
        slice_(slice),
        states_(states),
        team_(team),
        member_(member),
        members_(members),
        part_(part_of<T>(args.sizes.hidden, args.layout, member, members)),
        hidden_(args.sizes.hidden),
        padded_(args.sizes.padded()),
        out_(args.sizes.output()),
        out_padded_(Sizes::padded(out_)),
        saved_(saved_values(args.cell, args.sizes.proj != 0, args.variant)),
        unpacked_(weights.packing == Packing::kNone),
        by_panels_(weights.packing == Packing::kPanels),
        tail_(!unpacked_ && has_tail<T>(G, hidden_) && part_.last == blocks_of<T>(hidden_)),
        keep_(keeps(args)),
        is_plain_(!unpacked_ && has_plain_steps(layout_, args.sizes)),
        has_even_steps_(has_even_steps()),
        panel_(by_panels_ ? larger(elements<S>(args.sizes.input), elements<S>(out_)) * UnpackedB<S>::kMostVectors *
                                kLanes<Element<S>>
                          : 0),
        gates_stride_((keep_ ? saved_ : G) * padded_),
        chunks_(chunks),
        projects_ahead_(projects_ahead()),
        least_joined_(least_joined()),
        chunk_rows_(chunk_rows()),
        gates_(keep_ || chunks_ ? 0 : (1 + projects_ahead_) * chunk_rows_ * gates_stride_),
        input_rows_(chunk_rows_),
        copied_inputs_(copies_inputs() ? chunk_rows_ * Sizes::padded(args.sizes.input) : 0),
        factor_rows_(kWidens<S> && !unpacked_ ? chunk_rows_ : 0),
        narrowed_(kWidens<S> && unpacked_ ? slice.size() * larger(padded_, out_padded_) : 0),
        gate_rows_((1 + projects_ahead_) * chunk_rows_),
        c_(Cell::kHasCell ? slice.size() * padded_ : 0, true),
        hidden_gates_(unpacked_ ? slice.size() * G * padded_ : 0),
        dot_inputs_(unpacked_ ? larger(slice.size(), chunk_rows_) : 0),
        dot_outputs_(unpacked_ ? larger(slice.size(), chunk_rows_) : 0),
        unprojected_(args.sizes.proj ? slice.size() * padded_ : 0),
        projected_(args.sizes.proj && kReduced ? slice.size() * out_padded_ : 0),
        projected_rows_(args.sizes.proj ? slice.size() : 0),
        output_rows_(slice.size()),
        cell_rows_(args.cells.data ? slice.size() : 0),
        tile_room_size_(unpacked_ ? 0 : room_for_tiles()),
        tile_room_(tile_room_size_),
        variant_(args, direction, slice) {}

  void run() {
    const TileScope scope(tile_room_, tile_room_size_);
    const int64_t states = layout_.batch * direction_;
    if (Cell::kHasCell && args_.c_0)
      read_states(c_.get(), padded_, args_.c_0 + states * hidden_, hidden_, layout_, slice_);
    A *now = states_.h[0].get(), *next = states_.h[1].get();
    const auto write_h_n = [&](const A* h, int64_t from, int64_t to) {
      if (member_ == 0)
        write_states(args_.h_n + states * out_, out_, h, out_padded_, layout_, slice_, from, to, 0, out_);
    };
    const int64_t steps = layout_.steps;
    write_h_n(now, steps ? layout_.batch_sizes[0] : 0, layout_.batch);
    int64_t end = plan_chunk(0);
    project_inputs();
    for (int64_t s = 0, next_end = 0; s < steps; end = next_end) {
      T* const* gates = gate_rows();
      chunk_steps_ = end - s;
      if (projects_ahead_) {
        next_end = plan_chunk(end);
        start_ahead();
      }
      for (; s < end; ++s) {
        const int64_t t = time(s);
        const int64_t rows = slice_.active(layout_, t);
        if (rows == 0) continue;
        if (args_.resets.data) {
          reset_states(args_.resets, layout_, reverse_, t, slice_, member_ == 0 ? now : nullptr, out_, c_.get(),
                       hidden_);
          team_.meet(member_, members_);
        }
        if (joined_) copy_inputs(place_rows(t, 0));
        if constexpr (cells::kIsVariant<Cell>) {
          variant_step({t, rows, gates, now, next});
          team_.meet(member_, members_);
          if (!joined_) gates += rows;
        } else {
          const int64_t stop = is_plain_ || has_even_steps_ ? uncut_until(s, end) : s + 1;
          is_plain_ ? run_plain_steps(s, stop, gates, now, next) : run_steps(s, stop, rows, gates, now, next);
          s = stop - 1;
        }
        const int64_t last = time(s);
        write_h_n(next, first_ending(layout_, reverse_, last), layout_.batch_sizes[last]);
        std::swap(now, next);
      }
      if (args_.progress) __atomic_store_n(&args_.progress->steps, s, __ATOMIC_RELEASE);
      if (!projects_ahead_) next_end = plan_chunk(end);
      project_inputs();
    }
    if constexpr (Cell::kHasCell)
      write_states(args_.c_n + states * hidden_, hidden_, c_.get(), padded_, layout_, slice_, 0, layout_.batch,
                   part_.first * kLanes<T>, smaller(part_.last * kLanes<T>, hidden_));
  }

  /// Instead of run(): the input gates of those shared chunks that the thread which runs the steps has not come to.
  void run_ahead() {
    const TileScope scope(tile_room_, tile_room_size_);
    for (int64_t chunk; (chunk = chunks_->take_next()) * chunk_rows_ < layout_.steps; chunks_->give(chunk)) {
      chunks_->wait_for_room(chunk);
      plan_chunk(chunk * chunk_rows_);
      project_rows();
    }
  }

  /// Whether input gates and what else backward needs are kept.
  static bool keeps(const ForwardArgs<S>& args) { return args.saved != nullptr && Cell::kSaved > 0; }

 private:
  static constexpr int64_t kChunkBytes = 256 * 1024;    // input gates that stay in the second-level cache until used
  static constexpr int64_t kFarWeights = 2 << 20;       // of which that cache keeps few
  static constexpr int64_t kFartherWeights = 16 << 20;  // nor the third-level cache beside what else it keeps
  static constexpr int64_t kPipelineSteps = 12;         // of a chunk of a stack whose layers run at the same time

  using A = Activation<S>;
  static constexpr bool kReduced = !std::is_same_v<A, T>;
  static constexpr bool kTakesAlong = kSidePays<G, S> && !cells::kIsVariant<Cell>;
  using Side = std::conditional_t<kTakesAlong, SideTiles<S, kSideRows<G>>, NoSideTiles>;

  /// Rows of an odd number of inputs do not consist of whole pairs, those of 16 bits that are widened not of factors.
  bool copies_inputs() const { return !unpacked_ && (kWidens<S> || args_.sizes.input % kPack<S> != 0); }

  /// The inputs that are placed, ready to be multiplied.
  const A** input_factors() const {
    if constexpr (kWidens<S>) {
      return factor_rows_.get();
    } else {
      return input_rows_.get();
    }
  }

  /// Rows of states at a distance, for weights that are not packed.
  const S* narrowed(const A* states, int64_t rows, int64_t distance, int64_t size) {
    if constexpr (kWidens<S>) {
      for (int64_t r = 0; r < rows; ++r) copy_row(narrowed_.get() + r * distance, states + r * distance, size);
      return narrowed_.get();
    } else {
      return states;
    }
  }

  int64_t time(int64_t s) const { return time_of(layout_, reverse_, s); }

  int64_t room_for_tiles() const {
    const int64_t of_inputs = tile_room(chunk_rows_, elements<S>(args_.sizes.input));
    const int64_t projected = args_.sizes.proj ? tile_room(slice_.size(), elements<S>(hidden_)) : 0;
    return of_inputs + larger(tile_room(slice_.size(), elements<S>(out_)), projected);
  }

  T** gate_rows() const { return gate_rows_.get() + turn_ * chunk_rows_; }

  /// Whether the input gates of a chunk are computed beside the steps of the chunk before it, see row.inl.
  bool projects_ahead() const {
    // Bytes of the recurrent weights (measured).
    constexpr int64_t kWorthwhile = (RNN_EXT_VECTOR_REGISTERS < 32 ? 16 : 12) * 1024;
    return kTakesAlong && tuning().takes_along && !chunks_ && !unpacked_ && weight_bytes(out_) >= kWorthwhile &&
           args_.sizes.input > 0 && is_one_sequence(layout_) &&
           (copies_inputs() || args_.input.to_next(layout_, reverse_) % kPack<S> == 0);
  }

  /// Of a stack whose layers run at the same time: the one above waits for the first chunk, or for two if
  /// `projects_ahead_`.
  bool pipelined() const { return args_.progress || args_.below; }

  /// Whether each step has all rows, at a distance from those of the step before. (Those of its inputs must stay where
  /// they are placed: what copies them, and project(), place others there.)
  bool has_even_steps() const { return layout_.has_all_rows() && !args_.sizes.proj && !copies_inputs(); }

  /// Up to which step, at most `end`, there are no resets after those of step s.
  int64_t uncut_until(int64_t s, int64_t end) const {
    return next_reset(args_.resets, layout_, reverse_, slice_, s + 1, end);
  }

  /// Whether step t computes its input gates itself, in one go with the recurrent product: they stay in the registers,
  /// but for those of a split gate and of a tail. The sums are the same.
  bool joins(int64_t t) const { return slice_.active(layout_, t) >= least_joined_; }

  /// Of the weights of so many columns, packed; of weight_ih and weight_hh.
  int64_t weight_bytes(int64_t columns) const {
    return G * padded_ * elements<S>(columns) * int64_t(sizeof(Element<S>));
  }
  int64_t weight_bytes() const { return weight_bytes(args_.sizes.input) + weight_bytes(out_); }

  /// Where the input gates of a row go: number `row` of the layout where they are kept, else `row_of_chunk` of the
  /// chunk.
  T* gates_at(int64_t row, int64_t row_of_chunk) const {
    if (keep_) return args_.saved + (direction_ * layout_.rows + row) * gates_stride_;
    if (chunks_) return chunks_->gates(planned_first_ + row_of_chunk);
    return gates_.get() + (turn_ * chunk_rows_ + row_of_chunk) * gates_stride_;
  }

  /// A weight [G*H, depth], where by_panels_.
  UnpackedB<S> unpacked_b(const S* weight, int64_t depth) const {
    return {weight, hidden_, depth, padded_ / kLanes<T>, panel_.get()};
  }

  const T* input_bias() const { return cells::kIsNormed<Cell> ? nullptr : weights_.bias.get(); }

  /// The blocks of gate g that this member projects; a tail is one of gate 0.
  UnitBlocks projected_blocks(int g) const {
    const int64_t first = g * (padded_ / kLanes<T>);
    return {first + part_.first, first + part_.last - (tail_ && g > 0)};
  }

  // Of a variant, see variants.inl.
  struct VariantStep {
    int64_t t, rows;
    T* const* gates;
    A *now, *next;
  };
  void variant_step(const VariantStep& at);
  void normed_step(const VariantStep& at);
  void masked_step(const VariantStep& at);
  void project_variant(const VariantStep& at);
  template <class Init, class Finish>
  void variant_product(const VariantStep& at, const Init& init, const Finish& finish);
  V leave_cell(const VariantStep& at, int64_t r, int64_t unit, V h, V state);

  // See inputs.inl.
  int64_t least_joined() const;
  int64_t chunk_rows() const;
  int64_t first_chunk_rows() const;
  int64_t plan_chunk(int64_t s);
  int64_t place_rows(int64_t t, int64_t count);
  void copy_inputs(int64_t count);
  void start_ahead();
  void project_inputs();
  void project_rows();
  PlainProduct<S> projection(int64_t rows) const;
  void deal_out_tail(int64_t rows);
  void join_inputs(int64_t t, int64_t rows, const auto& fetch_output, const auto& init, const auto& recurrent);
  Ahead inputs_ahead(int64_t t) const;

  /// Where a step finds its rows and where they go.
  struct StepRows {
    T* const* gates;
    S* const* outputs;
    S* const* cells;  // null: nowhere
    A *now, *next;
  };

  /// The steps [s, end), one or more if they are even, each of so many rows that have been placed for the first one or,
  /// where they do not join, for all. Leaves gates after those of the last one, and what that has read and written.
  void run_steps(int64_t s, int64_t end, int64_t rows, T* const*& gates, A*& now, A*& next) {
    int64_t t = time(s);
    S** outputs = output_rows_.get();
    S** cells = Cell::kHasCell ? cell_rows_.get() : nullptr;
    find_rows(outputs, args_.output, layout_, t, slice_.first, rows, direction_ * out_);
    if (cells) find_rows(cells, args_.cells, layout_, t, slice_.first, rows, direction_ * hidden_);
    StepRows at = {gates, outputs, cells, now, next};
    const auto sums = first_sums(at);
    const auto fetch_output = [&]<int B>(Patch<1, B> to) ALWAYS_INLINE_LAMBDA {
      constexpr int kBlocksOfLine = 64 / RNN_EXT_VECTOR_BYTES;
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) {
        const int64_t block = to.block + b;
        if (block % kBlocksOfLine == 0) __builtin_prefetch(outputs[to.row] + block * kLanes<T>, 1);
      }
    };
    const auto init = [&]<int B>(Patch<1, B> of, V* acc) ALWAYS_INLINE_LAMBDA {
      fetch_output(of);
      sums(of, acc);
    };
    const auto finish = cell(at);
    const auto a_row = [&](int64_t r) { return reinterpret_cast<const Factor<S>*>(at.now + r * out_padded_); };
    const UnpackedB<S> unpacked = unpacked_b(args_.weights[direction_].weight_hh, out_);
    const auto recurrent = [&](UnitBlocks blocks, const auto& init, bool tail) {
      product<G, S>(rows, blocks.first, blocks.last, step_order(layout_.batch_sizes[t], t), a_row,
                    PackedB<S>(weights_.hidden.get(), by_panels_ ? &unpacked : nullptr), OneSegment{elements<S>(out_)},
                    init, finish, tail, &side_, gates_ahead(t, joined_ ? 1 : chunk_steps_));
    };
    for (;;) {
      if (unpacked_) {
        const S* rounded = narrowed(at.now, rows, out_padded_, out_);
        run_short(rows, [&](int64_t r) { return rounded + r * out_padded_; }, init, finish);
      } else {
        if constexpr (!kWidens<S>) {
          if (joined_) join_inputs(t, rows, fetch_output, init, recurrent);
        }
        if (!joined_) recurrent(part_, init, tail_);
      }
      if (args_.sizes.proj) project(t, rows, at.next);
      team_.meet(member_, members_);
      if (!joined_) at.gates += rows;
      if (++s == end) break;
      t = time(s);
      go_on(rows, outputs, cells);
      std::swap(at.now, at.next);
    }
    gates = at.gates;
    now = at.now;
    next = at.next;
  }

  /// From the rows of one even step to those of the next.
  void go_on(int64_t rows, S** outputs, S** cells) {
    const auto move = [&](auto** at, int64_t distance) {
      for (int64_t r = 0; r < rows; ++r) at[r] += distance;
    };
    move(outputs, args_.output.to_next(layout_, reverse_));
    if (cells) move(cells, args_.cells.to_next(layout_, reverse_));
    if (!joined_) return;
    move(input_rows_.get(), args_.input.to_next(layout_, reverse_));
    if (keep_) move(gate_rows(), (reverse_ ? -1 : 1) * layout_.batch * gates_stride_);
  }

  /// Where the gates of the step go that so many steps later runs, if they are kept.
  Ahead gates_ahead(int64_t t, int64_t steps) const {
    const int64_t later = step_after(layout_, reverse_, t, steps);
    if (!keep_ || members_ > 1 || later < 0) return {};
    return {gates_at(layout_.offsets[later] + slice_.first, 0),
            slice_.active(layout_, later) * gates_stride_ * int64_t(sizeof(T))};
  }

  /// The same, one or more, if they are plain.
  void run_plain_steps(int64_t s, int64_t end, T* const*& gates, A*& now, A*& next) {
    const bool with_cells = Cell::kHasCell && args_.cells.data;
    S* output = args_.output.at(layout_, time(s), 0) + direction_ * out_;
    S* cells = with_cells ? args_.cells.at(layout_, time(s), 0) + direction_ * hidden_ : nullptr;
    const int64_t to_next_output = args_.output.to_next(layout_, reverse_);
    const int64_t to_next_cells = with_cells ? args_.cells.to_next(layout_, reverse_) : 0;
    StepRows at = {gates, &output, with_cells ? &cells : nullptr, now, next};
    const auto init = first_sums(at);
    const auto finish = cell(at);
    RowProduct<S, OneSegment> row = {nullptr, weights_.hidden.get(), {elements<S>(out_)}, false};
    const UnitBlocks part = part_;
    const bool tail = tail_;
    for (;;) {
      row.a = reinterpret_cast<const Factor<S>*>(at.now);
      row.backwards = is_backwards(time(s));
      if (chunks_ && s + 1 < end) fetch_from_others(at.gates[1], G * padded_);
      row_product<G>(row, part.first, part.last, init, finish, tail, &side_);
      team_.meet(member_, members_);
      if (members_ > 1) fetch_from_others(at.next, out_);
      ++at.gates;
      if (++s == end) break;
      output += to_next_output;
      cells += to_next_cells;
      std::swap(at.now, at.next);
    }
    gates = at.gates;
    now = at.now;
    next = at.next;
  }

  /// What the sums of a step begin with. Reads `at` anew whenever it is called, as cell() does.
  auto first_sums(const StepRows& at) const {
    return [this, &at]<int B>(Patch<1, B> of, V* acc) ALWAYS_INLINE_LAMBDA {
      const int64_t unit = of.block * kLanes<T>, padded = padded_;
      const T *from = at.gates[of.row] + unit, *split_bias = weights_.split_bias.get() + unit;
#pragma GCC unroll 16
      for (int v = 0; v < B * G; ++v) {
        const int64_t g = v % G, b = v / G * kLanes<T>;
        acc[v] = load(g < G - Cell::kSplit ? from + g * padded + b : split_bias + b);
      }
    };
  }

  /// What becomes of the sums of a step: the cell.
  auto cell(const StepRows& at) {
    return Cellwise{[this, &at]<int R, int B>(Patch<R, B> patch, const Wide<T, R * B>* sums) ALWAYS_INLINE_LAMBDA {
      using Vs = Wide<T, R * B>;
      Vs split[1] = {}, h_prev = {}, state = {}, saved[Cell::kSaved + 1];
      const int64_t padded = padded_, out_padded = out_padded_, unit = patch.block * kLanes<T>;
      const int64_t rest = hidden_ - unit;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const int64_t row = patch.row + r;
        const int i = r * B;
        if constexpr (Cell::kSplit > 0)
          load_vectors<B>(split[0].part + i, at.gates[row] + unit + (G - 1) * padded, kWhole);
        if constexpr (Cell::kDirectCarry) load_vectors<B>(h_prev.part + i, at.now + row * out_padded + unit, kWhole);
        if constexpr (Cell::kHasCell) load_vectors<B>(state.part + i, c_.get() + row * padded + unit, kWhole);
      }
      const Vs h = with_exact<Cell>(args_.cell, [&]<class Exact>() ALWAYS_INLINE_LAMBDA {
        return Exact::template forward<Math<T, Vs>>(sums, split, h_prev, state, saved);
      });
      // Read before the stores, which the compiler must take for stores to these as well.
      A* const unprojected = unprojected_.get();
      T* const c = c_.get();
      A* const next = at.next;
      S* const* const outputs = at.outputs;
      S* const* const cells = at.cells;
      T* const* const gates = at.gates;
      const bool keep = keep_, rounds = kWidens<S> && unpacked_;
      const auto store_state = [=](A* to, const V* h_row) ALWAYS_INLINE_LAMBDA {
        V rounded[B];
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) rounded[b] = rounds ? as_stored<S>(h_row[b]) : h_row[b];
        store_padded<B, kPack<S>>(to, rounded, rest);
      };
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const int64_t row = patch.row + r;
        const V* h_row = h.part + r * B;
        if (unprojected) {
          store_state(unprojected + row * padded + unit, h_row);
        } else {
          store_state(next + row * out_padded + unit, h_row);
          store_vectors<B>(outputs[row] + unit, h_row, rest);
        }
        if constexpr (Cell::kHasCell) {
          const V* c_row = state.part + r * B;
          store_padded<B>(c + row * padded + unit, c_row, rest);
          if (cells) store_vectors<B>(cells[row] + unit, c_row, rest);
        }
        if (keep) {
          T* to = gates[row] + unit;
          for (int i = 0; i < Cell::kSaved; ++i) store_padded<B>(to + i * padded, saved[i].part + r * B, rest);
          if (unprojected) store_padded<B>(to + Cell::kSaved * padded, h_row, rest);
        }
      }
    }};
  }

  /// The dots of rows with this member's units of all gates of a weight [G*H, depth] that is not packed. `a_row` and
  /// `to` give where a row begins and where its gates go.
  void dot_gates(const S* weight, int64_t depth, int64_t rows, const T* bias, const auto& a_row, const auto& to) {
    const int64_t first = part_.first * kLanes<T>, last = smaller(part_.last * kLanes<T>, hidden_);
    for (int64_t r = 0; r < rows; ++r) dot_inputs_.get()[r] = a_row(r);
    for (int64_t g = 0; g < G; ++g) {
      const int64_t at = g * padded_ + first;
      for (int64_t r = 0; r < rows; ++r) dot_outputs_.get()[r] = to(r) + at;
      dot_rows(rows, dot_outputs_.get(), bias ? bias + at : nullptr, weight + (g * hidden_ + first) * depth,
               last - first, depth, dot_inputs_.get());
    }
  }

  /// A step whose weights are not packed; `init` and `finish` as those of product().
  void run_short(int64_t rows, const auto& a_row, const auto& init, const auto& finish) {
    const auto gates = [&](int64_t r) { return hidden_gates_.get() + r * G * padded_; };
    dot_gates(args_.weights[direction_].weight_hh, out_, rows, nullptr, a_row, gates);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t block = part_.first; block < part_.last; ++block) {
        V acc[1][G];
        init(Patch<1, 1>{r, block}, acc[0]);
        for (int g = 0; g < G; ++g) acc[0][g] += load(gates(r) + g * padded_ + block * kLanes<T>);
        finish_patch<1, 1, G>(r, block, acc, finish);
      }
    }
  }

  void project(int64_t t, int64_t rows, A* next) {
    for (int64_t r = 0; r < rows; ++r) {
      if constexpr (kReduced) {
        projected_rows_.get()[r] = projected_.get() + r * out_padded_;
      } else {
        projected_rows_.get()[r] = next + r * out_padded_;
      }
    }
    if (unpacked_) {
      space_rows(input_rows_.get(), narrowed(unprojected_.get(), rows, padded_, hidden_), padded_, rows);
      dot_rows(rows, projected_rows_.get(), static_cast<const T*>(nullptr), args_.weights[direction_].weight_hr, out_,
               hidden_, input_rows_.get());
    } else {
      const A** a = input_factors();
      space_rows(a, unprojected_.get(), padded_, rows);
      PlainProduct<S> p;
      p.rows = rows;
      p.columns = out_;
      p.a = a;
      p.c = projected_rows_.get();
      p.b = weights_.proj.get();
      p.segments.length = elements<S>(hidden_);
      p.order = step_order(layout_.batch_sizes[t], t);
      plain_product(p);
    }
    for (int64_t r = 0; r < rows; ++r) {
      if constexpr (kReduced) copy_row(next + r * out_padded_, projected_rows_.get()[r], out_);
      copy_row(args_.output.at(layout_, t, slice_.first + r) + direction_ * out_, next + r * out_padded_, out_);
    }
  }

  const ForwardArgs<S>& args_;
  const Layout& layout_;
  const ForwardWeights<cells::Plain<Cell>, S>& weights_;
  const int direction_;
  const bool reverse_;
  const Slice slice_;
  ForwardStates<S>& states_;
  Team& team_;
  const int member_, members_;
  const UnitBlocks part_;
  const int64_t hidden_, padded_, out_, out_padded_;
  const int saved_;
  const bool unpacked_;   // the weights are read as they lie
  const bool by_panels_;  // or packed by each product as it goes
  const bool tail_;       // this part ends with one
  const bool keep_;
  const bool is_plain_;
  const bool has_even_steps_;
  Buffer<Element<S>> panel_;  // where by_panels_
  const int64_t gates_stride_;
  SharedChunks<T>* const chunks_;  // with another thread; null: not shared
  const bool projects_ahead_;
  const int64_t least_joined_;  // rows of a step that joins
  const int64_t chunk_rows_;    // of a step, where all join
  Buffer<T>
      gates_;  // [1 + projects_ahead_, chunk rows, G, padded H], where the input gates do not go straight to `saved`
  Buffer<const S*> input_rows_;   // [chunk rows]
  Buffer<A> copied_inputs_;       // [chunk rows, padded I], where copies_inputs()
  Buffer<const A*> factor_rows_;  // [chunk rows], where weights are widened, as is
  Buffer<S> narrowed_;            // [slice, the longer of padded H and P], of narrowed()
  Buffer<T*> gate_rows_;          // [1 + projects_ahead_, chunk rows]
  Buffer<T> c_;                   // [slice, padded H]
  Buffer<T> hidden_gates_;        // [slice, G, padded H], where weights are not packed
  Buffer<const S*> dot_inputs_;   // [slice or chunk rows], of dot_gates()
  Buffer<T*> dot_outputs_;        // the same
  Buffer<A> unprojected_;         // [slice, padded H]
  Buffer<T> projected_;           // [slice, padded P], before it is rounded to h, if it is
  Buffer<T*> projected_rows_;     // [slice]
  Buffer<S*> output_rows_;        // [slice], where a step goes
  Buffer<S*> cell_rows_;          // [slice], where its cell states go, if anywhere
  const int64_t tile_room_size_;  // of what products copy
  Buffer<Pair> tile_room_;
  int64_t planned_first_ = 0;  // step of the chunk that is planned
  int64_t planned_ = 0;        // rows of the chunk that the input gates are computed of
  int64_t chunk_steps_ = 0;    // of the chunk whose steps run
  int turn_ = 0;               // of two such chunks
  bool joined_ = false;        // the steps of the chunk compute their input gates themselves
  bool started_ = false;       // of which side_ is in charge
  Side side_;
  VariantForward<Cell, S> variant_;
};
