// The scan over time, forward.

/// What the members of a team share: the states after the last two steps, [slice, padded P], and as the recurrent
/// product wants them too, where that is another type.
template <class S>
struct ForwardStates {
  using T = Compute<S>;
  static constexpr bool kReduced = !std::is_same_v<S, T>;

  ForwardStates(const ForwardArgs<S>& args, int direction, Slice slice)
      : stride(Sizes::padded(args.sizes.output())),
        h{Buffer<T>(slice.size() * stride, true), Buffer<T>(slice.size() * stride, true)},
        reduced{Buffer<S>(kReduced ? slice.size() * stride : 0, true),
                Buffer<S>(kReduced ? slice.size() * stride : 0, true)} {
    if (!args.h_0) return;
    const int64_t out = args.sizes.output();
    const S* h_0 = args.h_0 + args.layout.batch * direction * out;
    for (int i = 0; i < 2; ++i) {
      read_states(h[i].get(), stride, h_0, out, args.layout, slice);
      if constexpr (kReduced) read_states(reduced[i].get(), stride, h_0, out, args.layout, slice);
    }
  }

  const int64_t stride;
  Buffer<T> h[2];
  Buffer<S> reduced[2];
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
  using T = Compute<S>;
  using V = Vec<T>;

 public:
  ForwardScan(const ForwardArgs<S>& args, const ForwardWeights<cells::Plain<Cell>, S>& weights, int direction,
              Slice slice, ForwardStates<S>& states, Team& team, int member, int members)
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
        short_(!uses_packed_weights(args.layout)),
        tail_(!short_ && has_tail<T>(G, hidden_) && part_.last == blocks_of<T>(hidden_)),
        keep_(args.saved != nullptr && Cell::kSaved > 0),
        is_plain_(!short_ && has_plain_steps(layout_, args.sizes, args.resets.data)),
        gates_stride_((keep_ ? saved_ : G) * padded_),
        projects_ahead_(projects_ahead()),
        least_joined_(least_joined()),
        chunk_rows_(chunk_rows()),
        gates_(keep_ ? 0 : (1 + projects_ahead_) * chunk_rows_ * gates_stride_),
        input_rows_(chunk_rows_),
        filled_up_(fill_up() ? chunk_rows_ * Sizes::padded(args.sizes.input) : 0),
        gate_rows_((1 + projects_ahead_) * chunk_rows_),
        c_(Cell::kHasCell ? slice.size() * padded_ : 0, true),
        hidden_gates_(short_ ? G * padded_ : 0),
        unprojected_(args.sizes.proj ? slice.size() * padded_ : 0, kReduced),
        projected_rows_(args.sizes.proj ? slice.size() : 0),
        output_rows_(slice.size()),
        cell_rows_(args.cells.data ? slice.size() : 0),
        variant_(args, direction, slice) {}

  void run() {
    const int64_t states = layout_.batch * direction_;
    if (Cell::kHasCell && args_.c_0)
      read_states(c_.get(), padded_, args_.c_0 + states * hidden_, hidden_, layout_, slice_);
    State now = {states_.h[0].get(), states_.reduced[0].get()};
    State next = {states_.h[1].get(), states_.reduced[1].get()};
    const auto write_h_n = [&](const State& state, int64_t from, int64_t to) {
      if (member_ == 0)
        write_states(args_.h_n + states * out_, out_, state.h, out_padded_, layout_, slice_, from, to, 0, out_);
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
        if constexpr (kTakesAlong) start_ahead();
      }
      if constexpr (!cells::kIsVariant<Cell>) {
        if (is_plain_) {
          s = run_plain_steps(s, end, gates, now, next);
          if (s == steps) write_h_n(now, 0, 1);
        }
      }
      for (; s < end; ++s) {
        const int64_t t = time(s);
        const int64_t rows = slice_.active(layout_, t);
        if (rows == 0) continue;
        if (args_.resets.data) {
          reset(t, rows, now);
          team_.meet(members_);
        }
        if (joined_) fill_up_rows(place_rows(t, 0));
        if constexpr (cells::kIsVariant<Cell>) {
          variant_step(t, rows, gates, now, next);
        } else {
          step(t, rows, gates, now, next);
        }
        team_.meet(members_);
        if (!joined_) gates += rows;
        const int64_t stay = reverse_        ? (t > 0 ? layout_.batch_sizes[t] : 0)
                             : t + 1 < steps ? layout_.batch_sizes[t + 1]
                                             : 0;
        write_h_n(next, stay, layout_.batch_sizes[t]);
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

 private:
  static constexpr int64_t kChunkBytes = 256 * 1024;  // input gates that stay in the second-level cache until used
  static constexpr int64_t kPipelineSteps = 12;       // of a chunk of a stack whose layers run at the same time

  static constexpr bool kReduced = ForwardStates<S>::kReduced;
  static constexpr bool kTakesAlong = kSidePays<G>;
  using Side = std::conditional_t<kTakesAlong, SideTiles<S, kSideRows<G>>, NoSideTiles>;

  struct State {
    T* h;
    S* reduced;

    const S* operand(int64_t at) const {
      if constexpr (kReduced) {
        return reduced + at;
      } else {
        return h + at;
      }
    }
    /// h, which is no more precise than what the caller sees of it, so that both go on from the same state.
    /// B vectors of a row of which `count` numbers are left.
    template <int B>
    ALWAYS_INLINE void set(int64_t at, const V* value, int64_t count) const {
      if constexpr (kReduced) {
        store_padded<B>(reduced + at, value, count);
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) store(h + at + b * kLanes<T>, load(reduced + at + b * kLanes<T>));
      } else {
        store_padded<B>(h + at, value, count);
      }
    }
  };

  /// Rows of an odd number of inputs do not consist of whole elements.
  bool fill_up() const { return args_.sizes.input % kPack<S> != 0; }

  int64_t time(int64_t s) const { return reverse_ ? layout_.steps - 1 - s : s; }

  T** gate_rows() const { return gate_rows_.get() + turn_ * chunk_rows_; }

  /// Whether the input gates of a chunk are computed beside the steps of the chunk before it, see row.inl.
  bool projects_ahead() const {
    // Bytes of the recurrent weights (measured).
    constexpr int64_t kWorthwhile = (RNN_EXT_VECTOR_REGISTERS < 32 ? 16 : 12) * 1024;
    return kTakesAlong && !short_ && weight_bytes(out_) >= kWorthwhile && args_.sizes.input > 0 && layout_.batch == 1 &&
           layout_.rows == layout_.steps && (fill_up() || args_.input.to_next(layout_, reverse_) % kPack<S> == 0);
  }

  /// Of a stack whose layers run at the same time: the one above waits for the first chunk, or for two if
  /// `projects_ahead_`.
  bool pipelined() const { return args_.progress || args_.below; }

  /// Whether step t computes its input gates itself, in one go with the recurrent product: they stay in the registers,
  /// but for those of a split gate and of a tail. The sums are the same.
  bool joins(int64_t t) const { return slice_.active(layout_, t) >= least_joined_; }

  /// From how many rows on a step joins. Each reads weight_ih then, instead of each chunk, which costs few rows more
  /// than it saves where the weights come from beyond the second-level cache, and many rows where they are larger still
  /// (measured: two rows 0.91 to 0.98 times as fast with 2 MiB, four 0.72 with 32 MiB).
  int64_t least_joined() const {
    constexpr int64_t kNear = 256 * 1024, kFar = 2 << 20, kFewInputs = 64;
    const int64_t never = layout_.batch + 1;
    if (short_ || cells::kIsNormed<Cell> || weight_bytes() > kFar) return never;
    // Few registers make a smaller tile of three gates than of the four vectors of a projection alone (measured).
    if (G == 3 && RNN_EXT_VECTOR_REGISTERS < 32) return args_.sizes.input <= kFewInputs ? 8 : never;
    return weight_bytes() <= kNear ? 2 : 8;
  }

  int64_t chunk_rows() const {
    if (layout_.steps > 0 && joins(layout_.steps - 1)) return slice_.size();
    if (projects_ahead_) {
      // The fewer rows, the better, but each chunk reads weight_ih again, which costs more where the weights come from
      // beyond the second-level cache (measured).
      constexpr int64_t kFar = 2 << 20;
      return (pipelined() ? 1 : weight_bytes() >= kFar ? 8 : 2) * kSideRows<G>;
    }
    return larger(slice_.size(), smaller(layout_.rows, larger(16, kChunkBytes / (gates_stride_ * sizeof(T)))));
  }

  /// Rows of the first chunk if all of its tiles are full. No step takes it along, so that it should be small and those
  /// after it grow to chunk_rows_; but not where even the third-level cache has no room for the weights that more
  /// chunks would read again (measured).
  int64_t first_chunk_rows() const {
    constexpr int64_t kFarther = 16 << 20;
    return weight_bytes() >= kFarther ? chunk_rows_ : smaller(chunk_rows_, 2 * kSideRows<G>);
  }

  /// Of the weights of so many columns, packed; of weight_ih and weight_hh.
  int64_t weight_bytes(int64_t columns) const {
    return G * padded_ * elements<S>(columns) * int64_t(sizeof(Element<S>));
  }
  int64_t weight_bytes() const { return weight_bytes(args_.sizes.input) + weight_bytes(out_); }

  /// Where the input gates of a row go: number `row` of the layout where they are kept, else `row_of_chunk` of the
  /// chunk.
  T* gates_at(int64_t row, int64_t row_of_chunk) const {
    return keep_ ? args_.saved + (direction_ * layout_.rows + row) * gates_stride_
                 : gates_.get() + (turn_ * chunk_rows_ + row_of_chunk) * gates_stride_;
  }

  /// Step t's rows as numbers `count` and following: where their inputs are and their gates go. Returns the number
  /// after them.
  int64_t place_rows(int64_t t, int64_t count) {
    const int64_t rows = slice_.active(layout_, t), first = slice_.first;
    find_rows(input_rows_.get() + count, args_.input, layout_, t, first, rows, 0);
    space_rows(gate_rows() + count, gates_at(layout_.offsets[t] + first, count), gates_stride_, rows);
    return count + rows;
  }

  void fill_up_rows(int64_t count) {
    if (!fill_up()) return;
    const S** inputs = input_rows_.get();
    const int64_t width = Sizes::padded(args_.sizes.input);
    for (int64_t r = 0; r < count; ++r) {
      S* row = filled_up_.get() + r * width;
      std::memcpy(row, inputs[r], size_t(args_.sizes.input) * sizeof(S));
      std::memset(row + args_.sizes.input, 0, sizeof(S));
      inputs[r] = row;
    }
  }

  /// The next chunk, from step s on: of steps that all join, or of as many that do not as it holds, whose rows are
  /// placed. Returns the step after.
  int64_t plan_chunk(int64_t s) {
    if (projects_ahead_) turn_ ^= 1;
    const S** inputs = input_rows_.get();
    T** gates = gate_rows();
    int64_t count = 0, end = layout_.steps;
    if (projects_ahead_) {
      // What is odd comes first: all other chunks have full tiles.
      const int64_t least = first_chunk_rows(), odd = end % least;
      const int64_t grown = larger(least, 2 * planned_ / least * least);
      end = smaller(end, s == 0 ? (odd ? odd : least) : s + smaller(chunk_rows_, grown));
    } else if (args_.progress) {
      end = smaller(end, s + kPipelineSteps);
    }
    if (args_.below) wait_until([&] { return __atomic_load_n(&args_.below->steps, __ATOMIC_ACQUIRE) >= end; });
    if (is_plain_ && s < end) {
      const S* input = args_.input.at(layout_, time(s), 0);
      const int64_t to_next = args_.input.to_next(layout_, reverse_);
      T* gate_row = gates_at(layout_.offsets[time(s)], 0);
      const int64_t to_next_row = keep_ && reverse_ ? -gates_stride_ : gates_stride_;
      end = smaller(end, s + chunk_rows_);
      for (; s < end; ++s, ++count, input += to_next, gate_row += to_next_row) {
        inputs[count] = input;
        gates[count] = gate_row;
      }
    }
    joined_ = s < end && joins(time(s));
    for (; s < end; ++s) {
      const int64_t t = time(s);
      if (joins(t) != joined_) break;
      if (joined_) continue;
      if (count + slice_.active(layout_, t) > chunk_rows_) break;
      count = place_rows(t, count);
    }
    planned_ = count;
    fill_up_rows(count);
    return s;
  }

  const T* input_bias() const { return cells::kIsNormed<Cell> ? nullptr : weights_.bias.get(); }

  /// The blocks of gate g that this member projects; a tail is one of gate 0.
  UnitBlocks projected_blocks(int g) const {
    const int64_t first = g * (padded_ / kLanes<T>);
    return {first + part_.first, first + part_.last - (tail_ && g > 0)};
  }

  /// Let the steps to come take along the projection of the planned chunk.
  void start_ahead()
    requires kTakesAlong
  {
    if (planned_ == 0) return;  // the last chunk has no next
    const S* const* inputs = input_rows_.get();
    T* const* gates = gate_rows();
    SideProduct<S> p;
    p.rows = planned_;
    p.depth = elements<S>(args_.sizes.input);
    p.a = reinterpret_cast<const Element<S>*>(inputs[0]);
    p.a_stride = (inputs[1] - inputs[0]) / kPack<S>;
    p.c = gates[0];
    p.c_stride = gates[1] - gates[0];
    p.b = weights_.input.get();
    p.bias = input_bias();
    for (int g = 0; g < G; ++g) {
      p.blocks = projected_blocks(g);
      side_.add(p);
    }
    started_ = true;
  }

  /// The input gates of the planned chunk, as far as no step has computed them.
  void project_inputs() {
    if (started_) {
      if constexpr (kTakesAlong) side_.finish();
      started_ = false;
    } else {
      project_rows();
    }
    if (tail_) deal_out_tail(planned_);
  }

  void deal_out_tail(int64_t rows) {
    T* const* gates = gate_rows();
    for (int64_t r = 0; r < rows; ++r) {
      T* row = gates[r] + (part_.last - 1) * kLanes<T>;
      V parts[G];
      quarters<G, T>(load(row), parts, std::make_integer_sequence<int, G>());
      for (int g = 0; g < G; ++g) store(row + g * padded_, parts[g]);
    }
  }

  void project_rows() {
    if (short_) {
      const T* bias = input_bias();
      T* const* gates = gate_rows();
      const Weights<const S>& w = args_.weights[direction_];
      for (int64_t r = 0; r < planned_; ++r) {
        for (int64_t g = 0; g < G; ++g)
          dot_rows(gates[r] + g * padded_, bias ? bias + g * padded_ : nullptr,
                   w.weight_ih + g * hidden_ * args_.sizes.input, hidden_, args_.sizes.input, input_rows_.get()[r]);
      }
      return;
    }
    PlainProduct<S> p = projection(planned_);
    if (members_ == 1 && !tail_) return plain_product(p);
    for (int g = 0; g < G; ++g) {
      const UnitBlocks blocks = projected_blocks(g);
      p.first = blocks.first;
      p.last = blocks.last;
      plain_product(p);
    }
  }

  /// Of the first rows that are placed.
  PlainProduct<S> projection(int64_t rows) const {
    PlainProduct<S> p;
    p.rows = rows;
    p.columns = G * padded_;
    p.a = input_rows_.get();
    p.c = gate_rows();
    p.b = weights_.input.get();
    p.segments.length = elements<S>(args_.sizes.input);
    p.bias = input_bias();
    p.fetch_c = keep_;
    return p;
  }

  void reset(int64_t t, int64_t rows, State now) {
    for (int64_t r = 0; r < rows; ++r) {
      if (!begins(args_.resets, layout_, reverse_, t, slice_.first + r)) continue;
      if (member_ == 0) {
        std::memset(now.h + r * out_padded_, 0, size_t(out_) * sizeof(T));
        if (kReduced) std::memset(now.reduced + r * out_padded_, 0, size_t(out_) * sizeof(S));
      }
      if (Cell::kHasCell) std::memset(c_.get() + r * padded_, 0, size_t(hidden_) * sizeof(T));
    }
  }

  void variant_step(int64_t t, int64_t rows, T* const* gates, State before_step, State after_step);

  /// Where a step finds its rows and where they go.
  struct StepRows {
    T* const* gates;
    S* const* outputs;
    S* const* cells;  // null: nowhere
    State now, next;
  };

  void step(int64_t t, int64_t rows, T* const* gates, State now, State next) {
    S** outputs = output_rows_.get();
    S** cells = cell_rows_.get();
    find_rows(outputs, args_.output, layout_, t, slice_.first, rows, direction_ * out_);
    if (Cell::kHasCell && cells) find_rows(cells, args_.cells, layout_, t, slice_.first, rows, direction_ * hidden_);
    const StepRows at = {gates, outputs, cells, now, next};
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
    const auto a_row = [&](int64_t r) { return reinterpret_cast<const Element<S>*>(now.operand(r * out_padded_)); };
    const auto recurrent = [&](UnitBlocks blocks, const auto& init, bool tail) {
      product<G, S>(rows, blocks.first, blocks.last, step_order(layout_.batch_sizes[t], t), a_row,
                    weights_.hidden.get(), OneSegment{elements<S>(out_)}, init, finish, tail, &side_,
                    gates_ahead(t, joined_ ? 1 : chunk_steps_));
    };
    if (short_) {
      run_short(rows, at, init, finish);
    } else if (joined_) {
      join_inputs(t, rows, fetch_output, init, recurrent);
    } else {
      recurrent(part_, init, tail_);
    }
    if (args_.sizes.proj) project(t, rows, next);
  }

  /// The step of some rows that are placed, by recurrent(blocks, init, tail): its sums begin with the inputs' product,
  /// but a tail, which is another kind of block, with `init` once that is computed.
  void join_inputs(int64_t t, int64_t rows, const auto& fetch_output, const auto& init, const auto& recurrent) {
    const T *bias = weights_.bias.get(), *split_bias = weights_.split_bias.get();
    const S* const* inputs = input_rows_.get();
    T* const* gates = gate_rows();
    const int64_t padded = padded_, depth = elements<S>(args_.sizes.input);
    const auto begin = [&]<int B>(Patch<1, B> of, V* acc) ALWAYS_INLINE_LAMBDA {
      fetch_output(of);
      const T* from = bias + of.block * kLanes<T>;
#pragma GCC unroll 16
      for (int v = 0; v < B * G; ++v) acc[v] = load(from + v % G * padded + v / G * kLanes<T>);
    };
    const auto row = [&](int64_t r) ALWAYS_INLINE_LAMBDA { return reinterpret_cast<const Element<S>*>(inputs[r]); };
    const auto between = [&]<int B>(Patch<1, B> of, V* acc) ALWAYS_INLINE_LAMBDA {
      if constexpr (Cell::kSplit > 0) {  // whose input part the cell wants alone
        const int64_t unit = of.block * kLanes<T>;
        T* to = gates[of.row] + (G - 1) * padded + unit;
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) {
          V& sum = acc[b * G + G - 1];
          store(to + b * kLanes<T>, sum);
          sum = load(split_bias + unit + b * kLanes<T>);
        }
      }
    };
    const InitProduct<S, decltype(begin), decltype(row), decltype(between)> inputs_first = {
        begin, row, between, weights_.input.get(), padded * depth, {depth}, inputs_ahead(t)};
    const UnitBlocks whole = {part_.first, part_.last - tail_}, tail = {whole.last, part_.last};
    recurrent(whole, inputs_first, false);
    if (!tail_) return;
    PlainProduct<S> p = projection(rows);
    p.first = tail.first;
    p.last = tail.last;
    plain_product(p);
    deal_out_tail(rows);
    recurrent(tail, init, true);
  }

  /// The inputs of the step that runs next, if they lie together.
  Ahead inputs_ahead(int64_t t) const {
    const int64_t next = reverse_ ? t - 1 : t + 1, width = args_.sizes.input;
    const bool whole = slice_.size() == layout_.batch;
    if (next < 0 || next >= layout_.steps || args_.input.row != width || (layout_.order && !whole)) return {};
    const S* first =
        layout_.order ? args_.input.data + next * args_.input.step : args_.input.at(layout_, next, slice_.first);
    const int64_t rows = layout_.order ? layout_.batch : slice_.active(layout_, next);
    return {first, rows * width * int64_t(sizeof(S))};
  }

  /// Where the gates of the step go that so many steps later runs, if they are kept.
  Ahead gates_ahead(int64_t t, int64_t steps) const {
    const int64_t later = reverse_ ? t - steps : t + steps;
    if (!keep_ || members_ > 1 || later < 0 || later >= layout_.steps) return {};
    return {gates_at(layout_.offsets[later] + slice_.first, 0),
            slice_.active(layout_, later) * gates_stride_ * int64_t(sizeof(T))};
  }

  int64_t run_plain_steps(int64_t s, int64_t end, T* const* gates, State& now, State& next) {
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
    for (; s < end; ++s) {
      row.a = reinterpret_cast<const Element<S>*>(at.now.operand(0));
      row.backwards = is_backwards(time(s));
      row_product<G>(row, part.first, part.last, init, finish, tail, &side_);
      team_.meet(members_);
      ++at.gates;
      output += to_next_output;
      cells += to_next_cells;
      std::swap(at.now, at.next);
    }
    now = at.now;
    next = at.next;
    return s;
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
      constexpr int n = kLanes<T>;
      Vs split[1] = {}, h_prev = {}, state = {}, saved[Cell::kSaved + 1];
      const int64_t padded = padded_, out_padded = out_padded_, unit = patch.block * n, rest = hidden_ - unit;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const int64_t row = patch.row + r;
        const T* gates = at.gates[row] + unit + (G - 1) * padded;
        const T *h = at.now.h + row * out_padded + unit, *c = c_.get() + row * padded + unit;
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) {
          const int i = r * B + b;
          if constexpr (Cell::kSplit > 0) split[0].part[i] = load(gates + b * n);
          if constexpr (Cell::kDirectCarry) h_prev.part[i] = load(h + b * n);
          if constexpr (Cell::kHasCell) state.part[i] = load(c + b * n);
        }
      }
      const Vs h = Cell::template forward<Math<T, Vs>>(sums, split, h_prev, state, saved);
      // Read before the stores, which the compiler must take for stores to these as well.
      S* const unprojected = unprojected_.get();
      T* const c = c_.get();
      const State next = at.next;
      S* const* const outputs = at.outputs;
      S* const* const cells = at.cells;
      T* const* const gates = at.gates;
      const bool keep = keep_;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const int64_t row = patch.row + r;
        const V* h_row = h.part + r * B;
        if (unprojected) {
          store_padded<B>(unprojected + row * padded + unit, h_row, rest);
        } else {
          next.template set<B>(row * out_padded + unit, h_row, rest);
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

  void run_short(int64_t rows, const StepRows& at, const auto& init, const auto& finish) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t g = 0; g < G; ++g)
        dot_rows(hidden_gates_.get() + g * padded_, static_cast<const T*>(nullptr),
                 args_.weights[direction_].weight_hh + g * hidden_ * out_, hidden_, out_,
                 at.now.operand(r * out_padded_));
      for (int64_t block = 0; block < blocks_of<T>(hidden_); ++block) {
        V acc[1][G];
        init(Patch<1, 1>{r, block}, acc[0]);
        for (int g = 0; g < G; ++g) acc[0][g] += load(hidden_gates_.get() + g * padded_ + block * kLanes<T>);
        finish_patch<1, 1, G>(r, block, acc, finish);
      }
    }
  }

  void project(int64_t t, int64_t rows, State next) {
    for (int64_t r = 0; r < rows; ++r) {
      input_rows_.get()[r] = unprojected_.get() + r * padded_;
      projected_rows_.get()[r] = next.h + r * out_padded_;
    }
    if (short_) {
      for (int64_t r = 0; r < rows; ++r)
        dot_rows(next.h + r * out_padded_, static_cast<const T*>(nullptr), args_.weights[direction_].weight_hr, out_,
                 hidden_, unprojected_.get() + r * padded_);
    } else {
      PlainProduct<S> p;
      p.rows = rows;
      p.columns = out_;
      p.a = input_rows_.get();
      p.c = projected_rows_.get();
      p.b = weights_.proj.get();
      p.segments.length = elements<S>(hidden_);
      p.order = step_order(layout_.batch_sizes[t], t);
      plain_product(p);
    }
    for (int64_t r = 0; r < rows; ++r) {
      if constexpr (kReduced) {
        for (int64_t i = 0; i < out_; i += kLanes<T>) {
          const V h = load_part(next.h + r * out_padded_ + i, out_ - i);
          next.template set<1>(r * out_padded_ + i, &h, out_ - i);
        }
      }
      copy_row(args_.output.at(layout_, t, slice_.first + r) + direction_ * out_, next.operand(r * out_padded_), out_);
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
  const bool short_;
  const bool tail_;  // this part ends with one
  const bool keep_;
  const bool is_plain_;
  const int64_t gates_stride_;
  const bool projects_ahead_;
  const int64_t least_joined_;  // rows of a step that joins
  const int64_t chunk_rows_;    // of a step, where all join
  Buffer<T>
      gates_;  // [1 + projects_ahead_, chunk rows, G, padded H], where the input gates do not go straight to `saved`
  Buffer<const S*> input_rows_;  // [chunk rows]
  Buffer<S> filled_up_;          // [chunk rows, padded I], where fill_up()
  Buffer<T*> gate_rows_;         // [1 + projects_ahead_, chunk rows]
  Buffer<T> c_;                  // [slice, padded H]
  Buffer<T> hidden_gates_;       // [G, padded H], of one row, where weights are not packed
  Buffer<S> unprojected_;        // [slice, padded H]
  Buffer<T*> projected_rows_;    // [slice]
  Buffer<S*> output_rows_;       // [slice], where a step goes
  Buffer<S*> cell_rows_;         // [slice], where its cell states go, if anywhere
  int64_t planned_ = 0;          // rows of the chunk that the input gates are computed of
  int64_t chunk_steps_ = 0;      // of the chunk whose steps run
  int turn_ = 0;                 // of two such chunks
  bool joined_ = false;          // the steps of the chunk compute their input gates themselves
  bool started_ = false;         // of which side_ is in charge
  Side side_;
  VariantForward<Cell, S> variant_;
};

template <class Cell, class S>
void forward(const ForwardArgs<S>& args, const Executor& executor) {
  const int directions = args.sizes.directions;
  using Packed = ForwardWeights<cells::Plain<Cell>, S>;
  const bool pack = uses_packed_weights(args.layout);
  Both<Packed> own;
  const Packed* weights[2] = {};
  parallel(executor, directions, [&](int64_t d) {
    const bool given = pack && args.packed[d];
    if (!given) own.item[d] = new Packed(args.weights[d], args.sizes, pack);
    weights[d] = given ? static_cast<const Packed*>(args.packed[d]) : own.item[d];
  });
  const int64_t slices = count_slices(args.layout, args.sizes, Cell::kGates, sizeof(S), executor);
  const auto scan = [&](int d, Slice slice, ForwardStates<S>& states, Team& team, int member, int members) {
    ForwardScan<Cell, S>(args, *weights[d], d, slice, states, team, member, members).run();
  };
  const int members = cells::kIsNormed<Cell> ? 1 : team_size(args.layout, args.sizes, Cell::kGates, executor, slices);
  if (members == 1) {
    return parallel(executor, directions * slices, [&](int64_t task) {
      const int d = int(task / slices);
      const Slice slice = slice_of(args.layout, task % slices, slices);
      ForwardStates<S> states(args, d, slice);
      Team alone;
      scan(d, slice, states, alone, 0, 1);
    });
  }
  const Slice whole = slice_of(args.layout, 0, 1);
  Both<ForwardStates<S>> states;
  Team teams[2];
  for (int d = 0; d < directions; ++d) states.item[d] = new ForwardStates<S>(args, d, whole);
  run_teams(executor, directions, members,
            [&](int d, int member, int actual) { scan(d, whole, *states.item[d], teams[d], member, actual); });
}

/// One layer of a stack, ready to run.
template <class Cell, class S>
struct StackLayer {
  using Packed = ForwardWeights<Cell, S>;
  explicit StackLayer(const ForwardArgs<S>& args)
      : own(args.packed[0] ? nullptr : new Packed(args.weights[0], args.sizes, uses_packed_weights(args.layout))),
        states(args, 0, slice_of(args.layout, 0, 1)),
        scan(args, args.packed[0] ? static_cast<const Packed&>(*args.packed[0]) : *own, 0, slice_of(args.layout, 0, 1),
             states, alone, 0, 1) {}
  const std::unique_ptr<Packed> own;
  ForwardStates<S> states;
  Team alone;
  ForwardScan<Cell, S> scan;
};

template <class Cell, class S>
void forward_stack(const ForwardArgs<S>* args, int count, const Executor& executor) {
  struct Stack {
    explicit Stack(int count) : count(count), layers(count, true) {}
    ~Stack() {
      for (int k = 0; k < count; ++k) delete layers.get()[k];
    }
    void run(int thread, int threads) const {
      for (int k = thread; k < count; k += threads) layers.get()[k]->scan.run();
    }
    const int count;
    Buffer<StackLayer<Cell, S>*> layers;
  } stack(count);
  for (int k = 0; k < count; ++k) stack.layers.get()[k] = new StackLayer<Cell, S>(args[k]);
  executor.run_team(
      int(smaller(executor.threads, count)),
      [](void* context, int thread, int threads) { static_cast<const Stack*>(context)->run(thread, threads); }, &stack);
}
