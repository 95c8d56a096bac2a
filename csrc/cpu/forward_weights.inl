// The weights of a layer, packed for the scan forward; see product.inl.

/// How a layer's weights are packed: not at all, those of the gates by each product as it goes, or all beforehand.
enum class Packing { kNone, kPanels, kWhole };

/// One direction's weights as the forward scan of a cell and of its variants wants them.
template <class Cell, class S>
struct ForwardWeights : PackedWeights {
  using T = Compute<S>;
  ForwardWeights(const Weights<const S>& w, const Sizes& s, Packing packing)
      : packing(packing),
        input(packing == Packing::kWhole ? elements<S>(s.input) * Cell::kGates * s.padded() : 0),
        hidden(packing == Packing::kWhole ? elements<S>(s.output()) * Cell::kGates * s.padded() : 0),
        proj(packing != Packing::kNone && s.proj ? elements<S>(s.hidden) * Sizes::padded(s.proj) : 0),
        bias(Cell::kGates * s.padded(), true),
        split_bias(s.padded(), true) {
    const int64_t gate_blocks = s.padded() / kLanes<T>;
    for (int64_t g = 0; g < Cell::kGates; ++g) {
      if (packing == Packing::kWhole)
        pack_gates(input.get() + g * gate_blocks * elements<S>(s.input) * kLanes<T>,
                   w.weight_ih + g * s.hidden * s.input, 1, s.hidden, s.input, 0, gate_blocks);
      if (!w.bias_ih) continue;
      const bool split = g >= Cell::kGates - Cell::kSplit;
      for (int64_t u = 0; u < s.hidden; u += kLanes<T>) {
        const Vec<T> input_bias = load_part(w.bias_ih + g * s.hidden + u, s.hidden - u);
        const Vec<T> hidden_bias = load_part(w.bias_hh + g * s.hidden + u, s.hidden - u);
        store(bias.get() + g * s.padded() + u, split ? input_bias : input_bias + hidden_bias);
        if (split) store(split_bias.get() + u, hidden_bias);
      }
    }
    if (packing == Packing::kWhole) pack_recurrent(w, s);
    if (proj.get()) pack_gates(proj.get(), w.weight_hr, 1, s.proj, s.hidden, 0, blocks_of<T>(s.proj));
  }

  const Packing packing;      // unless whole, `input` and `hidden` are not here
  Buffer<Element<S>> input;   // [G * padded H / lanes][I][lanes]; a tail is the first gate's last block
  Buffer<Element<S>> hidden;  // [H / lanes][P][G][lanes]; a tail [P][lanes]
  Buffer<Element<S>> proj;    // [P / lanes][H][lanes]
  Buffer<T> bias;             // [G, padded H]: both biases, of a split gate the input's alone; joined as `input` is
  Buffer<T> split_bias;       // [padded H]: bias_hh of the split gate

 private:
  void pack_recurrent(const Weights<const S>& w, const Sizes& s) {
    if (has_tail<T>(Cell::kGates, s.hidden)) join_tail(w, s);
    pack_gates(hidden.get(), w.weight_hh, Cell::kGates, s.hidden, s.output(), 0, blocks_of<T>(s.hidden));
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
