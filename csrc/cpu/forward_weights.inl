// The weights of a layer, packed for the scan forward; see product.inl.

/// How a layer's weights are packed: not at all, those of the gates by each product as it goes, or all beforehand.
enum class Packing { kNone, kPanels, kWhole };

/// One direction's weights as the forward scan of a cell and of its variants wants them.
template <class Cell, class S>
struct ForwardWeights : PackedWeights {
  using T = Compute<S>;
  ForwardWeights(const Weights<const S>& w, const Sizes& s, Packing packing, const Executor& executor)
      : packing(packing),
        input(packing == Packing::kWhole ? elements<S>(s.input) * Cell::kGates * s.padded() : 0),
        hidden(packing == Packing::kWhole ? elements<S>(s.output()) * Cell::kGates * s.padded() : 0),
        proj(packing != Packing::kNone && s.proj ? elements<S>(s.hidden) * Sizes::padded(s.proj) : 0),
        bias(Cell::kGates * s.padded(), true),
        split_bias(s.padded(), true) {
    if (packing == Packing::kWhole) {
      constexpr int64_t kWorthwhile = 8192;  // numbers for each thread
      const int64_t most = Cell::kGates * s.hidden * (s.input + s.output()) / kWorthwhile;
      const int64_t pieces = larger(1, smaller(executor.threads, most));
      parallel(executor, pieces, [&](int64_t piece) { pack_piece(w, s, piece, pieces); });
    }
    for (int64_t g = 0; g < Cell::kGates; ++g) {
      if (!w.bias_ih) continue;
      const bool split = g >= Cell::kGates - Cell::kSplit;
      for (int64_t u = 0; u < s.hidden; u += kLanes<T>) {
        const Vec<T> input_bias = load_part(w.bias_ih + g * s.hidden + u, s.hidden - u);
        const Vec<T> hidden_bias = load_part(w.bias_hh + g * s.hidden + u, s.hidden - u);
        store(bias.get() + g * s.padded() + u, split ? input_bias : input_bias + hidden_bias);
        if (split) store(split_bias.get() + u, hidden_bias);
      }
    }
    if (packing == Packing::kWhole && has_tail<T>(Cell::kGates, s.hidden)) join_tail(w, s);
    if (proj.get()) pack_gates(proj.get(), w.weight_hr, 1, s.proj, s.hidden, 0, blocks_of<T>(s.proj));
  }

  const Packing packing;      // unless whole, `input` and `hidden` are not here
  Buffer<Element<S>> input;   // [G * padded H / lanes][I][lanes]; a tail is the first gate's last block
  Buffer<Element<S>> hidden;  // [H / lanes][P][G][lanes]; a tail [P][lanes]
  Buffer<Element<S>> proj;    // [P / lanes][H][lanes]
  Buffer<T> bias;             // [G, padded H]: both biases, of a split gate the input's alone; joined as `input` is
  Buffer<T> split_bias;       // [padded H]: bias_hh of the split gate

 private:
  /// A share of the blocks of `input` and of `hidden`.
  void pack_piece(const Weights<const S>& w, const Sizes& s, int64_t piece, int64_t pieces) const {
    const auto each = [&](int64_t blocks, const auto& fn) {
      fn(blocks * piece / pieces, blocks * (piece + 1) / pieces);
    };
    const int64_t gate_blocks = s.padded() / kLanes<T>, depth = elements<S>(s.input) * kLanes<T>;
    each(gate_blocks, [&](int64_t first, int64_t last) {
      for (int64_t g = 0; g < Cell::kGates; ++g)
        pack_gates(input.get() + (g * gate_blocks + first) * depth, w.weight_ih + g * s.hidden * s.input, 1, s.hidden,
                   s.input, first, last);
    });
    each(blocks_of<T>(s.hidden), [&](int64_t first, int64_t last) {
      pack_gates(hidden.get() + first * elements<S>(s.output()) * Cell::kGates * kLanes<T>, w.weight_hh, Cell::kGates,
                 s.hidden, s.output(), first, last);
    });
  }

  void join_tail(const Weights<const S>& w, const Sizes& s) {
    const int64_t first = s.hidden / kLanes<T> * kLanes<T>;
    pack_tail(input.get() + first * elements<S>(s.input), w.weight_ih, Cell::kGates, s.hidden, s.input);
    alignas(64) T joined[kLanes<T>] = {};
    for (int64_t g = 0; g < Cell::kGates; ++g) {
      for (int64_t u = first; u < s.hidden; ++u)
        joined[g * (kLanes<T> / 4) + u - first] = bias.get()[g * s.padded() + u];
    }
    store(bias.get() + first, load(joined));
  }
};
