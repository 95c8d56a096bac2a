// The scan over time, backward. Time is walked in chunks: the gate gradients of a chunk, fused with the recurrent
// product and chained from step to step; then, while they are in the cache, their share of the gradients of input,
// weights and biases, as products over all rows of the chunk. So no gradient of all gates at all timesteps ever exists.

template <class T>
struct CarriedCell;

template <class Cell, class S>
class InputGradient;

/// What the scan of a variant has besides; see variants.inl.
template <class Cell, class S, bool = cells::kIsVariant<Cell>>
struct VariantBackward {
  VariantBackward(const BackwardArgs<S>&, int, Slice) {}
};

/// The scan of one direction for a slice of the batch and, where a team shares it, a part of the hidden units.
/// weight_hh is stored as W; if that is widened, there is one sequence.
template <class Cell, class S, class W = S>
class BackwardScan {
  using T = Compute<S>;
  using V = Vec<T>;

 public:
  BackwardScan(const BackwardArgs<S>& args, const ScanWeights<Cell, S, W>& weights, int direction, Slice slice,
               int member, int members)
      : args_(args),
        layout_(args.layout),
        weights_(weights),
        direction_(direction),
        reverse_(direction == 1),
        slice_(slice),
        alone_(members == 1),
        hidden_part_(part_of<T>(args.sizes.hidden, args.layout, member, members)),
        out_part_(part_of<T>(args.sizes.output(), args.layout, member, members)),
        hidden_(args.sizes.hidden),
        padded_(args.sizes.padded()),
        out_(args.sizes.output()),
        out_padded_(Sizes::padded(out_)),
        saved_stride_(saved_values(args.cell, args.sizes.proj != 0, args.variant) * padded_),
        dh_(slice.size() * out_padded_, true),
        dc_(Cell::kHasCell ? slice.size() * padded_ : 0, true),
        c_0_(Cell::kHasCell ? slice.size() * padded_ : 0, true),
        zeros_(padded_, true),
        sums_stride_(larger(padded_, out_padded_)),
        sums_(Cell::kHasCell && !cells::kIsVariant<Cell> && args.sizes.proj ? slice.size() * sums_stride_ : 0, true),
        sum_rows_(sums_.get() ? slice.size() : 0),
        is_plain_(has_plain_steps(layout_, args.sizes)),
        saved_rows_(Cell::kSaved > 0 ? slice.size() : 0),
        h_rows_(Cell::kSaved > 0 ? 0 : slice.size()),
        h_before_(slice.size()),
        c_before_(slice.size()),
        grad_output_rows_(args.grad_output.data ? slice.size() : 0),
        grad_cell_rows_(args.grad_cells.data ? slice.size() : 0),
        after_rows_(slice.size(), true),
        gate_rows_(slice.size()),
        proj_rows_(args.sizes.proj ? slice.size() : 0),
        cut_(slice.size(), true),
        variant_(args, direction, slice) {
    for (int g = 0; g < Cell::kGates; ++g) hidden_segments_.offset[g] = Cell::hh_slot(g) * padded_ / kPack<W>;
    hidden_segments_.count = Cell::kGates;
    hidden_segments_.length = elements<W>(hidden_);
    hidden_segments_.join();
    if (sums_.get()) space_rows(sum_rows_.get(), sums_.get(), sums_stride_, slice_.size());
    const int64_t states = layout_.batch * direction_;
    if (args_.grad_h_n) read_states(dh_.get(), out_padded_, args_.grad_h_n + states * out_, out_, layout_, slice_);
    if (Cell::kHasCell && args_.grad_c_n)
      read_states(dc_.get(), padded_, args_.grad_c_n + states * hidden_, hidden_, layout_, slice_);
    if (Cell::kHasCell && args_.c_0)
      read_states(c_0_.get(), padded_, args_.c_0 + states * hidden_, hidden_, layout_, slice_);
  }

  /// The steps of `now`'s chunk, for some members of a team of which `threads` threads run a share each; by one of
  /// them. `inputs`: what plain steps call beside() of, if not null.
  static void run(BackwardScan* const* scans, int count, const ChunkGrads<Cell, S>& now, InputGradient<Cell, S>* inputs,
                  Team& team, int thread, int threads) {
    const TileScope scope;
    const BackwardScan& any = *scans[0];
    const int64_t steps = now.chunk.last - now.chunk.first;
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t t = any.time(now, s);
      if constexpr (!cells::kIsVariant<Cell>) {
        // A thread with the shares of several members goes step by step, to the same bits.
        const int64_t plain = s > 0 && any.is_plain_ && count == 1 ? any.plain_steps(t, steps - s) : 0;
        if (plain > 0) {
          scans[0]->run_plain_steps(s, plain, now, inputs, team, thread, threads);
          s += plain - 1;
          continue;
        }
      }
      const int64_t rows = any.slice_.active(any.layout_, t);
      if (rows == 0) continue;
      for (int i = 0; i < count; ++i) scans[i]->run_step(t, rows, now);
      team.meet(thread, threads);
      for (int i = 0; i < count; ++i) scans[i]->leave(t, rows);
    }
    if (steps == 0) return;
    const int64_t t = any.time(now, steps - 1), rows = any.slice_.active(any.layout_, t);
    const Slice share = {rows * thread / threads, rows * (thread + 1) / threads};
    now.keep(any.layout_, t, any.slice_.first + share.first, share.size());
  }

  /// What no step has written: the gradients of the initial states of sequences without a timestep, and of all c_0.
  void finish() {
    const int64_t states = layout_.batch * direction_;
    const int64_t alive = layout_.steps ? layout_.batch_sizes[0] : 0;
    if (args_.grad_h_0) write_grad_h_0(alive, layout_.batch);
    if (Cell::kHasCell && args_.grad_c_0)
      write_states(args_.grad_c_0 + states * hidden_, hidden_, dc_.get(), padded_, layout_, slice_, 0, layout_.batch,
                   hidden_part_.first * kLanes<T>, smaller(hidden_part_.last * kLanes<T>, hidden_));
  }

 private:
  void run_step(int64_t t, int64_t rows, const ChunkGrads<Cell, S>& now) {
    now_ = &now;
    const int64_t after = step_after(layout_, reverse_, t, 1);  // the step this direction ran next
    const int64_t chained = after < 0 ? 0 : smaller(rows, slice_.active(layout_, after));
    prepare(t, rows, after, chained);
    if constexpr (cells::kIsVariant<Cell>) {
      variant_step(t, 0, chained, after, true);
      variant_step(t, chained, rows, after, false);
    } else {
      place(t, rows, after, chained);
      next_saved_ = rows >= kFetchingRows && !kHasAmx ? saved_ahead(t) : Ahead();
      const Order order = step_order(layout_.batch_sizes[t], t);
      if (chained > 0) step(0, chained, order, true);
      if (chained < rows) step(chained, rows, order, false);
    }
  }

  /// Of step number `s` of the chunk, in this direction's order.
  int64_t time(const ChunkGrads<Cell, S>& now, int64_t s) const {
    return reverse_ ? now.chunk.first + s : now.chunk.last - 1 - s;
  }

  /// How many of `most` steps of one sequence, from step t on, are plain: before the first at a reset, or that ran
  /// right before one, and without the sequence's first.
  int64_t plain_steps(int64_t t, int64_t most) const {
    const int64_t before = time_of(layout_, reverse_, t), count = smaller(most, before);
    if (!args_.resets.data) return count;
    const auto is_cut = [&](int64_t number) {
      return begins(args_.resets, layout_, reverse_, time_of(layout_, reverse_, number), 0);
    };
    if (before + 1 < layout_.steps && is_cut(before + 1)) return 0;
    int64_t plain = 0;
    while (plain < count && !is_cut(before - plain)) ++plain;
    return plain;
  }

  /// Steps of one sequence from number `s` of its chunk on, which are plain, and none of which is the first of the
  /// chunk: all that a row needs lies one step before what the last one needed.
  void run_plain_steps(int64_t s, int64_t count, const ChunkGrads<Cell, S>& now, InputGradient<Cell, S>* inputs,
                       Team& team, int thread, int threads) {
    using Side = std::conditional_t<std::is_same_v<S, W>, typename InputGradient<Cell, S>::Tiles, NoSideTiles>;
    const int64_t back = reverse_ ? 1 : -1, gates_step = back * now.stride, saved_step = back * saved_stride_;
    const int64_t output_step = args_.output.to_next(layout_, !reverse_);
    const int64_t grad_step = args_.grad_output.to_next(layout_, !reverse_);
    const int64_t cell_step = args_.grad_cells.to_next(layout_, !reverse_);
    const bool has_grad = args_.grad_output.data, has_cell_grad = args_.grad_cells.data;
    const auto init = first_sum(0);
    const Cellwise finish{[this]<int R, int B>(Patch<R, B> at, const Wide<T, R * B>* sums) ALWAYS_INLINE_LAMBDA {
      Wide<T, R * B> dh = *sums;
      add_dh(at, &dh, Cell::kDirectCarry);
      backward_cells(at, dh);
    }};
    RowProduct<W, Segments> row = {nullptr, weights_.hidden.packed(), hidden_segments_, false};
    const UnitBlocks part = out_part_;
    for (const int64_t end = s + count; s < end; ++s) {
      Side* side = nullptr;
      if (inputs) {
        [[maybe_unused]] auto* const tiles = inputs->beside(s);  // none where weights are widened
        if constexpr (!std::is_same_v<Side, NoSideTiles>) side = tiles;
      }
      row.a = reinterpret_cast<const Factor<W>*>(*gate_rows_.get());
      row.backwards = is_backwards(time(now, s));
      *gate_rows_.get() += gates_step;
      if constexpr (Cell::kSaved > 0) {
        *saved_rows_.get() += saved_step;
      } else {
        *h_rows_.get() += output_step;
      }
      if constexpr (Cell::kDirectCarry) *h_before_.get() += output_step;
      if constexpr (Cell::kHasCell) *c_before_.get() += saved_step;
      if (has_grad) *grad_output_rows_.get() += grad_step;
      if (has_cell_grad) *grad_cell_rows_.get() += cell_step;
      row_product<1>(row, part.first, part.last, init, finish, false, side);
      team.meet(thread, threads);
      if (threads > 1) fetch_from_others(*gate_rows_.get(), now.stride);
    }
  }

  /// What forward left for the step that is next.
  Ahead saved_ahead(int64_t t) const {
    const int64_t next = step_after(layout_, !reverse_, t, 1);
    if (Cell::kSaved == 0 || !alone_ || next < 0) return {};
    return {saved(next, 0), slice_.active(layout_, next) * saved_stride_ * int64_t(sizeof(T))};
  }

  /// What the recurrent product's sums begin with. What forward left for the cell, where it is too much to be in the
  /// cache still, comes while the product is computed. Rows are counted from `first`.
  auto first_sum(int64_t first) const {
    const bool far = layout_.rows * larger(saved_stride_, out_padded_) * int64_t(sizeof(T)) > kFarBytes;
    return [this, first, far]<int B>(Patch<1, B> of, V* acc) ALWAYS_INLINE_LAMBDA {
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) {
        acc[b] = V{};
        if (far) prefetch_cell(first + of.row, (of.block + b) * kLanes<T>);
      }
    };
  }

  /// Makes of the recurrent product's sums all that reaches h: besides them what skips the product if `carried`, and
  /// what comes from outside.
  template <int R, int B>
  ALWAYS_INLINE void add_dh(Patch<R, B> at, Wide<T, R * B>* sums, bool carried) const {
    constexpr int n = kLanes<T>;
    const int64_t unit = at.block * n, out_padded = out_padded_, rest = out_ - unit;
    const S* const* grads = grad_output_rows_.get();
    const T* dh = dh_.get();
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      V* sum = sums->part + r * B;
      const int64_t row = at.row + r;
      if (carried) {
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) sum[b] += load(dh + row * out_padded + unit + b * n);
      }
      if (grads) {
        V grad[B];
        load_vectors<B>(grad, grads[row] + unit, rest);
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) sum[b] += grad[b];
      }
    }
  }

  /// The same, but for rows that a sequence ends in; `chained`: see step().
  template <int R, int B>
  ALWAYS_INLINE void all_dh(Patch<R, B> at, Wide<T, R * B>* sums, bool chained) const {
    const bool* cut = cut_.get();
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      if (!cut[at.row + r]) continue;
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) sums->part[r * B + b] = V{};
    }
    add_dh(at, sums, Cell::kDirectCarry || !chained);
  }

  void write_grad_h_0(int64_t from, int64_t to) {
    write_states(args_.grad_h_0 + layout_.batch * direction_ * out_, out_, dh_.get(), out_padded_, layout_, slice_,
                 from, to, out_part_.first * kLanes<T>, smaller(out_part_.last * kLanes<T>, out_));
  }

  S* gate_grads(int64_t t, int64_t r) const { return now_->gates_at(layout_, t, slice_.first + r); }
  S* proj_grads(int64_t t, int64_t r) const { return now_->proj_at(layout_, t, slice_.first + r); }
  const T* saved(int64_t t, int64_t r) const {
    const int64_t row = layout_.stored_offsets()[t] + slice_.first + r;
    return args_.saved + (direction_ * layout_.rows + row) * saved_stride_;
  }

  /// Where step t's rows find their previous states, and which rows get no gradient from the step after.
  void prepare(int64_t t, int64_t rows, int64_t after, int64_t chained) {
    const int64_t before = step_after(layout_, !reverse_, t, 1), first = slice_.first;
    const int64_t going_on = before < 0 ? 0 : smaller(rows, slice_.active(layout_, before));
    if constexpr (Cell::kDirectCarry) {
      const S** h_before = h_before_.get();
      find_rows(h_before, args_.output, layout_, before, first, going_on, direction_ * out_);
      for (int64_t r = going_on; r < rows; ++r)
        h_before[r] = args_.h_0 ? initial_output(args_, direction_, first + r) : no_state();
    }
    if constexpr (Cell::kHasCell) {
      const T** c_before = c_before_.get();
      if (going_on > 0) space_rows(c_before, saved(before, 0) + cell_slot() * padded_, saved_stride_, going_on);
      space_rows(c_before + going_on, c_0_.get() + going_on * padded_, padded_, rows - going_on);
    }
    for (int64_t r = 0; r < rows && args_.resets.data; ++r) {
      if (begins(args_.resets, layout_, reverse_, t, first + r)) {
        if constexpr (Cell::kDirectCarry) h_before_.get()[r] = no_state();
        if constexpr (Cell::kHasCell) c_before_.get()[r] = zeros_.get();
      }
      cut_.get()[r] = r < chained && begins(args_.resets, layout_, reverse_, after, first + r);
      if (cut_.get()[r]) clear(r);
    }
  }

  const S* no_state() const { return reinterpret_cast<const S*>(zeros_.get()); }

  static constexpr int64_t cell_slot() {
    if constexpr (Cell::kHasCell) return Cell::kSavedCell;
    return 0;
  }

  void clear(int64_t r) {
    std::memset(dh_.get() + r * out_padded_, 0, size_t(out_) * sizeof(T));
    if (Cell::kHasCell) std::memset(dc_.get() + r * padded_, 0, size_t(padded_) * sizeof(T));
  }

  /// Where step t's rows find what their cells need, and where their gate gradients go.
  void place(int64_t t, int64_t rows, int64_t after, int64_t chained) {
    const int64_t first = slice_.first;
    space_rows(gate_rows_.get(), gate_grads(t, 0), now_->stride, rows);
    if (chained > 0) space_rows(after_rows_.get(), gate_grads(after, 0), now_->stride, chained);
    if constexpr (Cell::kSaved > 0) {
      space_rows(saved_rows_.get(), saved(t, 0), saved_stride_, rows);
    } else {
      find_rows(h_rows_.get(), args_.output, layout_, t, first, rows, direction_ * out_);
    }
    if (args_.grad_output.data)
      find_rows(grad_output_rows_.get(), args_.grad_output, layout_, t, first, rows, direction_ * out_);
    if (args_.grad_cells.data)
      find_rows(grad_cell_rows_.get(), args_.grad_cells, layout_, t, first, rows, direction_ * hidden_);
    if (args_.sizes.proj) space_rows(proj_rows_.get(), proj_grads(t, 0), now_->proj_stride, rows);
  }

  /// Rows [first, last) of the step whose rows are in their places. `chained`: the gate gradients of the step after it
  /// reach them; else the sequence ends here and the gradient of its final state comes in instead.
  void step(int64_t first, int64_t last, Order order, bool chained) {
    if constexpr (Cell::kHasCell && !kWidens<W>) {  // only such cells can be projected
      if (args_.sizes.proj) return projected_step(first, last, order, chained);
    }
    Segments segments = hidden_segments_;
    if (!chained) segments.count = 0;
    const auto after = [this, first](int64_t r) {
      return reinterpret_cast<const Factor<W>*>(after_rows_.get()[first + r]);
    };
    const auto init = first_sum(first);
    const Cellwise finish{[this, first, chained]<int R, int B>(Patch<R, B> at, const Wide<T, R * B>* sums) NO_INLINE {
      at.row += first;
      Wide<T, R * B> dh = *sums;
      this->all_dh(at, &dh, chained);
      this->backward_cells(at, dh);
    }};
    NoSideTiles* const alone = nullptr;
    if constexpr (kWidens<W>) {
      const RowProduct<W, Segments> row = {after(0), weights_.hidden.packed(), segments, order == Order::kRowBackwards};
      row_product<1>(row, out_part_.first, out_part_.last, init, finish, false, alone);
    } else {
      product<1, S>(last - first, out_part_.first, out_part_.last, order, after, weights_.hidden.packed(), segments,
                    init, finish, false, alone, next_saved_);
    }
  }

  /// Both products apart from what follows them: rarely used, and a cell for each height and width of a tile took long
  /// to compile (0 to 2 % slower).
  void projected_step(int64_t first, int64_t last, Order order, bool chained) {
    PlainProduct<S> p;
    p.rows = last - first;
    p.c = sum_rows_.get() + first;
    p.order = order;
    p.columns = out_;
    if (chained) {
      p.a = after_rows_.get() + first;
      p.segments = hidden_segments_;
      weights_.hidden.multiply(p);
    }
    for (int64_t r = first; r < last; ++r) {
      for (int64_t block = 0; block < blocks_of<T>(out_); ++block) {
        const int64_t unit = block * kLanes<T>;
        Wide<T, 1> dh = {};
        if (chained) dh.part[0] = load(sum_rows_.get()[r] + unit);
        all_dh(Patch<1, 1>{r, block}, &dh, chained);
        store_padded<1>(proj_rows_.get()[r] + unit, dh.part, out_ - unit);
      }
    }
    p.columns = hidden_;
    p.a = proj_rows_.get() + first;
    p.b = weights_.proj.get();
    p.segments = {};
    p.segments.length = elements<S>(args_.sizes.proj);
    plain_product(p);
    const int64_t blocks = blocks_of<T>(hidden_);
    const auto cells = [&]<int B>(int64_t r, int64_t block) ALWAYS_INLINE_LAMBDA {
      Wide<T, B> dh;
      load_vectors<B>(dh.part, sum_rows_.get()[r] + block * kLanes<T>, kWhole);
      backward_cells(Patch<1, B>{r, block}, dh);
    };
    for (int64_t r = first; r < last; ++r) {
      int64_t block = 0;
      for (; block + kMostCells <= blocks; block += kMostCells) cells.template operator()<kMostCells>(r, block);
      for (; block < blocks; ++block) cells.template operator()<1>(r, block);
    }
  }

  // Of a variant, see variants.inl.
  void variant_step(int64_t t, int64_t first, int64_t last, int64_t after, bool chained);
  CarriedCell<T> carried_cell(int64_t t, int64_t r) const;
  void normed_cell(int64_t t, int64_t r, const T* dh);
  void masked_cell(int64_t t, int64_t r, const T* dh);
  template <class GateGrads>
  void add_recurrent(int64_t first, int64_t last, Order order, const GateGrads& gate_grads);

  template <int R, int B>
  ALWAYS_INLINE void backward_cells(Patch<R, B> at, const Wide<T, R * B>& dh) {
    using Vs = Wide<T, R * B>;
    constexpr int n = kLanes<T>;
    Vs kept[Cell::kSaved + 1], h = {}, h_before = {}, c_before = {}, dc = {}, dgates[Cell::kGradGates];
    const int64_t padded = padded_, out_padded = out_padded_, unit = at.block * n, rest = hidden_ - unit;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const int64_t row = at.row + r;
      const int i = r * B;
      if constexpr (Cell::kSaved > 0) {
        const T* from = saved_rows_.get()[row] + unit;
        for (int s = 0; s < Cell::kSaved; ++s) load_vectors<B>(kept[s].part + i, from + s * padded, kWhole);
      } else {
        load_vectors<B>(h.part + i, h_rows_.get()[row] + unit, rest);
      }
      if constexpr (Cell::kDirectCarry) load_vectors<B>(h_before.part + i, h_before_.get()[row] + unit, rest);
      if constexpr (Cell::kHasCell) {
        load_vectors<B>(c_before.part + i, c_before_.get()[row] + unit, kWhole);
        load_vectors<B>(dc.part + i, dc_.get() + row * padded + unit, kWhole);
        if (grad_cell_rows_.get()) {
          V grad[B];
          load_vectors<B>(grad, grad_cell_rows_.get()[row] + unit, rest);
#pragma GCC unroll 4
          for (int b = 0; b < B; ++b) dc.part[i + b] += grad[b];
        }
      }
    }
    const Vs direct = with_exact<Cell>(args_.cell, [&]<class Exact>() ALWAYS_INLINE_LAMBDA {
      return Exact::template backward<Math<T, Vs>>(kept, h, h_before, c_before, dh, dc, dgates);
    });
    // Read before the stores, which the compiler must take for stores to these as well.
    S* const* const gate_rows = gate_rows_.get();
    T* const dc_rows = dc_.get();
    T* const dh_rows = dh_.get();
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const int64_t row = at.row + r;
      S* to = gate_rows[row] + unit;
      for (int g = 0; g < Cell::kGradGates; ++g)
        store_padded<B, kPack<W>>(to + g * padded, dgates[g].part + r * B, rest);
      if constexpr (Cell::kHasCell) store_padded<B>(dc_rows + row * padded + unit, dc.part + r * B, rest);
      if constexpr (Cell::kDirectCarry) store_padded<B>(dh_rows + row * out_padded + unit, direct.part + r * B, rest);
    }
  }

  static constexpr int64_t kFarBytes = 2 << 20;
  ALWAYS_INLINE void prefetch_cell(int64_t r, int64_t unit) const {
    if constexpr (Cell::kSaved > 0) {
      for (int i = 0; i < Cell::kSaved && next_saved_.bytes == 0; ++i)
        __builtin_prefetch(saved_rows_.get()[r] + i * padded_ + unit);
    } else {
      __builtin_prefetch(h_rows_.get()[r] + unit);
    }
    if constexpr (Cell::kDirectCarry) __builtin_prefetch(h_before_.get()[r] + unit);
    if constexpr (Cell::kHasCell) __builtin_prefetch(c_before_.get()[r] + unit);
    if (grad_output_rows_.get()) __builtin_prefetch(grad_output_rows_.get()[r] + unit);
  }

  /// Rows whose sequence began with step t: their gradient goes to the initial states.
  void leave(int64_t t, int64_t rows) {
    const int64_t from = reverse_ ? (t + 1 < layout_.steps ? slice_.active(layout_, t + 1) : 0) : t == 0 ? 0 : rows;
    if (from >= rows) return;
    if constexpr (cells::kIsVariant<Cell>) {
      if (args_.grad_h_0) add_recurrent(from, rows, Order::kRows, [&](int64_t r) { return gate_grads(t, r); });
    } else if (args_.grad_h_0) {
      Buffer<T*> dh(rows - from);
      space_rows(dh.get(), dh_.get() + from * out_padded_, out_padded_, rows - from);
      PlainProduct<W> p;
      p.rows = rows - from;
      p.columns = out_;
      p.a = gate_rows_.get() + from;
      p.c = dh.get();
      p.segments = hidden_segments_;
      p.first = out_part_.first;
      p.last = out_part_.last;
      p.accumulate = Cell::kDirectCarry;
      weights_.hidden.multiply(p);
    }
    for (int64_t r = from; r < rows && args_.resets.data; ++r)
      if (begins(args_.resets, layout_, reverse_, t, slice_.first + r)) clear(r);
    if (args_.grad_h_0) write_grad_h_0(slice_.first + from, slice_.first + rows);
  }

  const BackwardArgs<S>& args_;
  const Layout& layout_;
  const ScanWeights<Cell, S, W>& weights_;
  const ChunkGrads<Cell, S>* now_ = nullptr;
  Ahead next_saved_;
  const int direction_;
  const bool reverse_;
  const Slice slice_;
  const bool alone_;                         // no other member has a share of the hidden units
  const UnitBlocks hidden_part_, out_part_;  // this member's
  const int64_t hidden_, padded_, out_, out_padded_, saved_stride_;
  Segments hidden_segments_;
  Buffer<T> dh_;     // [slice, padded P]: the final state's gradient, then what skips the recurrent product
  Buffer<T> dc_;     // [slice, padded H]
  Buffer<T> c_0_;    // [slice, padded H]
  Buffer<T> zeros_;  // [padded H]
  const int64_t sums_stride_;
  Buffer<T> sums_;  // [slice, the longer of padded H and P], of projected_step()
  Buffer<T*> sum_rows_;
  const bool is_plain_;
  // [slice] each: where the rows of a step lie, as far as there are any
  Buffer<const T*> saved_rows_;
  Buffer<const S*> h_rows_;
  Buffer<const S*> h_before_;
  Buffer<const T*> c_before_;
  Buffer<const S*> grad_output_rows_, grad_cell_rows_;
  Buffer<const S*> after_rows_;  // the gate gradients of the step after
  Buffer<S*> gate_rows_;         // and of this one
  Buffer<S*> proj_rows_;
  Buffer<bool> cut_;  // [slice]: no gradient comes from the step after
  VariantBackward<Cell, S> variant_;
};
