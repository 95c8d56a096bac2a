// The weights of a layer as the passes backward multiply by them; see product.inl.

/// Of no more rows in all, backward reads a weight that it multiplies by once, and writes a weight's gradient, as they
/// lie in memory: packing the one, and a block of columns of the other after another, take longer (measured on a Xeon,
/// one row and gradients beyond the second-level cache: 1.5 to 3 times; 128 rows: 1.02 to 1.25 times).
constexpr int64_t kFewRows = 128;
inline bool has_few_rows(const Layout& layout) { return layout.rows <= kFewRows; }

/// A weight [G*H, width] that backward multiplies by: its rows are rows of B. For so few rows of A that packing would
/// cost more than it saves, its whole blocks of columns are taken as they are, and only what is left of a block packed.
template <class Cell, class S>
class BackwardWeight {
  using T = Compute<S>;

 public:
  BackwardWeight(const S* weight, int64_t hidden, int64_t width, bool wanted, bool few)
      : weight_(weight),
        width_(width),
        plain_blocks_(wanted && few && kPack<S> == 1 ? in_units_of<kLanes<T>>(width) : 0),
        packed_(wanted ? Cell::kGates * elements<S>(hidden) * (blocks_of<T>(width) - plain_blocks_) * kLanes<T> : 0) {
    if (packed_.get()) pack(packed_.get(), hidden);
  }

  /// All of it, if it is wanted for more than a few rows. (Null or a part else, for products over no gates.)
  const Element<S>* packed() const { return packed_.get(); }

  /// Of a product whose B this is, without a bias.
  void multiply(PlainProduct<S> p) const {
    const int64_t last = p.last < 0 ? blocks_of<T>(width_) : p.last;
    Buffer<T*> rest(plain_blocks_ > 0 ? p.rows : 0);
    if constexpr (kPack<S> == 1 && !kWidens<S>) {
      if (plain_blocks_ > 0) {
        p.last = smaller(last, plain_blocks_);
        multiply_plain(p);
        for (int64_t r = 0; r < p.rows; ++r) rest.get()[r] = p.c[r] + plain_blocks_ * kLanes<T>;
        p.c = rest.get();
        p.columns -= plain_blocks_ * kLanes<T>;
      }
    }
    if (last <= plain_blocks_) return;
    p.b = packed_.get();
    p.first = larger(0, p.first - plain_blocks_);
    p.last = last - plain_blocks_;
    plain_product(p);
  }

 private:
  /// The whole blocks of columns. A piece of the weight is read for all columns before the next piece is, as it lies in
  /// memory (Xeon, 512 units: three rows 0.35 ms -> 0.28, eight 0.73 -> 0.38).
  void multiply_plain(PlainProduct<S> p) const {
    constexpr int64_t kPiece = 256 * 1024;
    // Low tiles load a panel's scattered rows too often: for so many rows of A the panel is copied first (measured on a
    // Xeon: 1.1 to 1.35 times as fast from 12 rows on; tiles of 6 rows are slower for it).
    constexpr int64_t kCopied = RNN_EXT_VECTOR_REGISTERS < 32 ? 12 : kFewRows + 1;
    const Segments all = p.segments;
    const int64_t most = larger(1, kPiece / (width_ * int64_t(sizeof(S))));
    Buffer<Element<S>> room(p.rows >= kCopied ? smaller(most, all.size()) * 4 * kLanes<T> : 0);
    p.b = weight_;
    p.b_stride = width_;
    p.room = room.get();
    if (all.size() <= most) return plain_product<S, true>(p);
    if (p.accumulate) return add_plain(p);
    p.segments.count = 1;
    for (int s = 0; s < all.count; ++s) {
      for (int64_t k = 0; k < all.length; k += most) {
        p.segments.offset[0] = all.offset[s] + k;
        p.segments.length = smaller(most, all.length - k);
        plain_product<S, true>(p);
        p.b += p.segments.length * width_;
        p.accumulate = true;
      }
    }
  }

  /// The same apart from what C holds, so that a sum of two products does not depend on which of them came first.
  void add_plain(PlainProduct<S> p) const {
    Buffer<T> sums(p.rows * width_);
    Buffer<T*> rows(p.rows);
    space_rows(rows.get(), sums.get(), width_, p.rows);
    T* const* to = p.c;
    p.c = rows.get();
    p.accumulate = false;
    multiply_plain(p);
    const int64_t first = p.first * kLanes<T>, columns = (p.last - p.first) * kLanes<T>;
    for (int64_t r = 0; r < p.rows; ++r) add_row(to[r] + first, rows.get()[r] + first, columns);
  }

  /// Each gate begins with an element of its own. A few blocks at a time: of powers of two, all begin in the same set
  /// of the first-level cache.
  void pack(Element<S>* to, int64_t hidden) const {
    constexpr int64_t kColumns = 4 * kLanes<T>;
    const int64_t depth = elements<S>(hidden) * kPack<S>, packed_depth = Cell::kGates * elements<S>(hidden);
    for (int64_t first = plain_blocks_ * kLanes<T>; first < width_; first += kColumns, to += kColumns * packed_depth) {
      const S* next = weight_;
      int64_t unit = 0;
      const auto row = [&](int64_t) -> const S* {
        const S* at = unit < hidden ? next : nullptr;
        if (at) next += width_;
        if (++unit == depth) unit = 0;
        return at;
      };
      pack_rows<S>(to, row, Cell::kGates * depth, first, smaller(kColumns, width_ - first));
    }
  }

  const S* const weight_;
  const int64_t width_, plain_blocks_;
  Buffer<Element<S>> packed_;  // [blocks after those][G*H][lanes]
};

/// weight_hh of a direction, which is stored as W.
template <class W, class S>
const W* stored_hh(const BackwardArgs<S>& args, int direction) {
  if constexpr (std::is_same_v<W, S>) {
    return args.weights[direction].weight_hh;
  } else if constexpr (std::is_same_v<W, BFloat16>) {
    return args.bfloat16_hh[direction];
  } else {
    return args.float16_hh[direction];
  }
}

/// One direction's weights as its scan backward wants them, weight_hh stored as W.
template <class Cell, class S, class W>
struct ScanWeights {
  ScanWeights(const BackwardArgs<S>& args, int direction)
      : hidden(stored_hh<W>(args, direction), args.sizes.hidden, args.sizes.output(),
               args.layout.steps > 1 || args.grad_h_0, args.layout.steps <= 1 && has_few_rows(args.layout)),
        proj(args.sizes.proj ? elements<S>(args.sizes.proj) * args.sizes.padded() : 0) {
    const Sizes& s = args.sizes;
    const S* weight_hr = args.weights[direction].weight_hr;
    if (s.proj) pack_rows<S>(proj.get(), [&](int64_t k) { return weight_hr + k * s.hidden; }, s.proj, 0, s.hidden);
  }

  const BackwardWeight<Cell, W> hidden;
  Buffer<Element<S>> proj;  // [H / lanes][P][lanes]
};
