// The input gates of the scan forward: computed for a chunk of timesteps before they run, beside the steps of the chunk
// before it (side.inl), or by each step itself, in one go with its recurrent product.

/// From how many rows on a step joins. It reads weight_ih then, which otherwise a chunk of steps reads once: few rows
/// lose by that where the weights come from beyond the second-level cache, and many where they are larger still. Speed
/// of steps that join, measured:
///
///   weights of both products    from     so many rows
///   to 256 KiB (kNear)          2 to 4   Zen 5: see below
///   to near_bytes               8        Zen 4, 2 MiB: two 0.91 to 0.98
///   to 2 MiB (kFarWeights)      20       Ice Lake, 1.2 to 2 MiB: 8 0.83 to 0.94, 12 0.90 to 0.97, 16 0.96 to 1.02
///   to 20 MiB, if joins_far     12       Zen 5, 4 to 19 MiB: GRU and LSTM 1.02 to 1.08, RNN 0.99
///                               24       Zen 4, as large: inference 1.00 to 1.04, training 0.99; twelve 0.92 to 1.00
///   more                        never    Zen 5: 1.00 to 0.81; Zen 4, 32 MiB: four 0.72
template <class Cell, class S>
int64_t ForwardScan<Cell, S>::least_joined() const {
  constexpr int64_t kNear = 256 * 1024, kMostJoined = 20 << 20, kFewInputs = 64;
  const int64_t never = layout_.batch + 1;
  const int64_t most = G > 1 && tuning().joins_far ? kMostJoined : kFarWeights;
  if (unpacked_ || by_panels_ || kWidens<S> || cells::kIsNormed<Cell> || weight_bytes() > most) return never;
  // Tiles multiply so fast that what counts is memory, to which gates that are kept go anyway. (32 sequences of 256
  // units, AMX: joined, inference takes 0.9 to 1.0 of the time, training 1.0 to 1.15; 64 of 512 1.08 and 1.05.)
  if constexpr (kHasAmx) {
    const bool may = !keep_ && weight_bytes() <= kFarWeights;
    return may && can_alternate(elements<S>(args_.sizes.input), elements<S>(out_)) ? 16 : never;
  }
  // Few registers make a smaller tile of three gates than of the four vectors of a projection alone (measured).
  constexpr bool kSmallTile = G == 3 && RNN_EXT_VECTOR_REGISTERS < 32;
  if (kSmallTile && args_.sizes.input > kFewInputs) return never;
  if (weight_bytes() > kFarWeights) return tuning().vectors_a_cycle == 1 ? 24 : 12;
  if (weight_bytes() > tuning().near_bytes) return 20;
  if (weight_bytes() > kNear || kSmallTile) return 8;
  // A tile of few rows has few sums, which wait for each other where two could be begun a cycle. Those of a chunk's
  // input gates are many (measured on Zen 5: two rows 1.01 to 1.24 times as fast with 20 inputs or more, 0.95 to 1.01
  // with one; three rows 1.01 to 1.09 where the weights are not in the first-level cache, else 0.97 to 1.03).
  if (tuning().vectors_a_cycle == 1 || args_.sizes.input <= kLanes<T>) return 2;
  return weight_bytes() <= kFirstCacheWeights ? 3 : 4;
}

template <class Cell, class S>
int64_t ForwardScan<Cell, S>::chunk_rows() const {
  if (layout_.steps > 0 && joins(layout_.steps - 1)) return slice_.size();
  if (chunks_) return SharedChunks<T>::kSteps;
  if (projects_ahead_) {
    // The fewer rows, the better: those of the first chunk, and those by which chunks grow, no step takes along. But
    // each chunk reads weight_ih again, from beyond the second-level cache, and the more a core multiplies meanwhile,
    // the more that counts (measured: on Zen 4, of one multiply-add a cycle, two tiles are 0 to 20 % faster than eight
    // with 2 to 14 MiB, and slower with more; on Zen 5 eight are 0 to 6 % faster from 1 MiB on, sixteen as fast).
    return (pipelined() ? 1 : weight_bytes() >= tuning().far_bytes ? 8 : 2) * kSideRows<G>;
  }
  // Weights that come from memory are worth gates that leave the second-level cache (Ice Lake: one sequence of 1,024
  // units of a GRU or LSTM is 1.06 to 1.10 times as fast as with sixteen rows, four 1.16 to 1.27; with 8 MiB 0.94).
  const int64_t least = weight_bytes() >= kFartherWeights ? 64 : 16;
  return larger(slice_.size(), smaller(layout_.rows, larger(least, kChunkBytes / (gates_stride_ * sizeof(T)))));
}

/// Rows of the first chunk if all of its tiles are full. No step takes it along, so that it should be small and those
/// after it grow to chunk_rows_; but not where even the third-level cache has no room for the weights that more
/// chunks would read again (measured).
template <class Cell, class S>
int64_t ForwardScan<Cell, S>::first_chunk_rows() const {
  return weight_bytes() >= kFartherWeights ? chunk_rows_ : smaller(chunk_rows_, 2 * kSideRows<G>);
}

/// Step t's rows as numbers `count` and following: where their inputs are and their gates go. Returns the number
/// after them.
template <class Cell, class S>
int64_t ForwardScan<Cell, S>::place_rows(int64_t t, int64_t count) {
  const int64_t rows = slice_.active(layout_, t), first = slice_.first;
  find_rows(input_rows_.get() + count, args_.input, layout_, t, first, rows, 0);
  space_rows(gate_rows() + count, gates_at(layout_.offsets[t] + first, count), gates_stride_, rows);
  return count + rows;
}

template <class Cell, class S>
void ForwardScan<Cell, S>::copy_inputs(int64_t count) {
  if (!copies_inputs()) return;
  const int64_t size = args_.sizes.input;
  for (int64_t r = 0; r < count; ++r) {
    A* row = copied_inputs_.get() + r * Sizes::padded(size);
    copy_row(row, input_rows_.get()[r], size);
    if (size % kPack<S> != 0) row[size] = {};
    input_factors()[r] = row;
  }
}

/// The next chunk, from step s on: of steps that all join, or of as many that do not as it holds, whose rows are
/// placed. Returns the step after.
template <class Cell, class S>
int64_t ForwardScan<Cell, S>::plan_chunk(int64_t s) {
  planned_first_ = s;
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
  copy_inputs(count);
  return s;
}

/// Let the steps to come take along the projection of the planned chunk.
template <class Cell, class S>
void ForwardScan<Cell, S>::start_ahead() {
  if constexpr (kTakesAlong) {
    if (planned_ == 0) return;  // the last chunk has no next
    const A* const* inputs = input_factors();
    T* const* gates = gate_rows();
    SideProduct<S> p;
    p.rows = planned_;
    p.depth = elements<S>(args_.sizes.input);
    p.a = reinterpret_cast<const Factor<S>*>(inputs[0]);
    p.a_stride = (inputs[1] - inputs[0]) / kPack<S>;
    p.c = gates[0];
    p.c_stride = gates[1] - gates[0];
    p.b = weights_.input.get();
    p.bias = input_bias();
    for (int g = 0; g < G; ++g) {
      p.blocks = projected_blocks(g);
      side_.add(p);
    }
    if constexpr (kSparseSide<G>)
      side_.spread(chunk_steps_ * ((part_.last - part_.first) / kRowBlocks<G>)*elements<S>(out_));
    started_ = true;
  }
}

/// The input gates of the planned chunk, as far as no step and no other thread has computed them.
template <class Cell, class S>
void ForwardScan<Cell, S>::project_inputs() {
  if (planned_ == 0) return;
  if (started_) {
    if constexpr (kTakesAlong) side_.finish();
    started_ = false;
    if (tail_) deal_out_tail(planned_);
  } else if (!chunks_ || chunks_->take(planned_first_ / chunk_rows_)) {
    project_rows();
  }
}

template <class Cell, class S>
void ForwardScan<Cell, S>::project_rows() {
  if (unpacked_) {
    dot_gates(
        args_.weights[direction_].weight_ih, args_.sizes.input, planned_, input_bias(),
        [&](int64_t r) { return input_rows_.get()[r]; }, [&](int64_t r) { return gate_rows()[r]; });
    return;
  }
  PlainProduct<S> p = projection(planned_);
  const UnpackedB<S> unpacked = unpacked_b(args_.weights[direction_].weight_ih, args_.sizes.input);
  if (by_panels_) p.unpacked = &unpacked;
  if (members_ == 1 && !tail_) return plain_product(p);
  for (int g = 0; g < G; ++g) {
    const UnitBlocks blocks = projected_blocks(g);
    p.first = blocks.first;
    p.last = blocks.last;
    plain_product(p);
  }
  if (tail_) deal_out_tail(planned_);
}

/// Of the first rows that are placed.
template <class Cell, class S>
PlainProduct<S> ForwardScan<Cell, S>::projection(int64_t rows) const {
  PlainProduct<S> p;
  p.rows = rows;
  p.columns = G * padded_;
  p.a = input_factors();
  p.c = gate_rows();
  p.b = weights_.input.get();
  p.segments.length = elements<S>(args_.sizes.input);
  p.bias = input_bias();
  p.fetch_c = keep_;
  return p;
}

template <class Cell, class S>
void ForwardScan<Cell, S>::deal_out_tail(int64_t rows) {
  T* const* gates = gate_rows();
  for (int64_t r = 0; r < rows; ++r) {
    T* row = gates[r] + (part_.last - 1) * kLanes<T>;
    V parts[G];
    quarters<G, T>(load(row), parts, std::make_integer_sequence<int, G>());
    for (int g = 0; g < G; ++g) store(row + g * padded_, parts[g]);
  }
}

/// The step of some rows that are placed, by recurrent(blocks, init, tail): its sums begin with the inputs' product,
/// but a tail, which is another kind of block, with `init` once that is computed.
template <class Cell, class S>
void ForwardScan<Cell, S>::join_inputs(int64_t t, int64_t rows, const auto& fetch_output, const auto& init,
                                       const auto& recurrent) {
  const T *bias = weights_.bias.get(), *split_bias = weights_.split_bias.get();
  const A* const* inputs = input_factors();
  T* const* gates = gate_rows();
  const int64_t padded = padded_, depth = elements<S>(args_.sizes.input);
  const auto begin = [&]<int B>(Patch<1, B> of, V* acc) ALWAYS_INLINE_LAMBDA {
    fetch_output(of);
    const T* from = bias + of.block * kLanes<T>;
#pragma GCC unroll 16
    for (int v = 0; v < B * G; ++v) acc[v] = load(from + v % G * padded + v / G * kLanes<T>);
  };
  const auto row = [&](int64_t r) ALWAYS_INLINE_LAMBDA { return reinterpret_cast<const Factor<S>*>(inputs[r]); };
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
template <class Cell, class S>
Ahead ForwardScan<Cell, S>::inputs_ahead(int64_t t) const {
  const int64_t next = step_after(layout_, reverse_, t, 1), width = args_.sizes.input;
  const bool whole = slice_.size() == layout_.batch;
  if (next < 0 || args_.input.row != width || (layout_.order && !whole)) return {};
  const S* first =
      layout_.order ? args_.input.data + next * args_.input.step : args_.input.at(layout_, next, slice_.first);
  const int64_t rows = layout_.order ? layout_.batch : slice_.active(layout_, next);
  return {first, rows * width * int64_t(sizeof(S))};
}
