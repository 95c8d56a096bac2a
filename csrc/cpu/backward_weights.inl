// The weights of a layer as the passes backward multiply by them; see product.inl.

/// A weight as it is stored: its numbers or, in their place, 16 bits.
template <class S>
struct StoredWeight {
  const S* numbers;
  const void* narrow = nullptr;
  Storage storage = Storage::kComputed;
};

/// A weight [G*H, width] that backward multiplies by: its rows are rows of B. For so few rows of A that packing would
/// cost more than it saves, its whole blocks of columns are taken as they are, and only what is left of a block packed.
/// Of 16 bits all blocks are widened, or packed in pairs, a piece at a time.
template <class Cell, class S>
class BackwardWeight {
  using T = Compute<S>;

 public:
  /// `rows`: of A, in all products.
  BackwardWeight(StoredWeight<S> weight, int64_t hidden, int64_t width, bool wanted, int64_t rows)
      : weight_(weight),
        hidden_(hidden),
        width_(width),
        rows_(rows),
        copies_(kPack<S> > 1 || weight.narrow),
        in_pieces_(!wanted || !has_few_rows(rows) ? 0
                   : copies_                      ? blocks_of<T>(width)
                                                  : in_units_of<kLanes<T>>(width)),
        packed_(wanted ? Cell::kGates * elements<S>(hidden) * (blocks_of<T>(width) - in_pieces_) * kLanes<T> : 0) {
    if (packed_.get()) pack(packed_.get());
  }

  /// All of it, if it is wanted for more than a few rows. (Null or a part else, for products over no gates.)
  const Element<S>* packed() const { return packed_.get(); }

  /// Of a product whose B this is, without a bias.
  void multiply(PlainProduct<S> p) const {
    const int64_t last = p.last < 0 ? blocks_of<T>(width_) : p.last;
    Buffer<T*> rest(in_pieces_ > 0 && last > in_pieces_ ? p.rows : 0);
    if constexpr (!kWidens<S>) {
      if (in_pieces_ > 0) {
        p.last = smaller(last, in_pieces_);
        multiply_pieces(p);
        if (last <= in_pieces_) return;
        for (int64_t r = 0; r < p.rows; ++r) rest.get()[r] = p.c[r] + in_pieces_ * kLanes<T>;
        p.c = rest.get();
        p.columns -= in_pieces_ * kLanes<T>;
      }
    }
    p.b = packed_.get();
    p.first = larger(0, p.first - in_pieces_);
    p.last = last - in_pieces_;
    plain_product(p);
  }

 private:
  /// The blocks that are not packed beforehand. A piece of the weight is read for all columns before the next piece is,
  /// as it lies in memory (Xeon, 512 units: three rows 0.35 ms -> 0.28, eight 0.73 -> 0.38).
  void multiply_pieces(PlainProduct<S> p) const {
    constexpr int64_t kPiece = 256 * 1024;
    // A copy that the first-level cache holds, for so few rows that they do not multiply it for longer than they write
    // and read it (Zen 4, 512 units in 16 bits: one row 0.72 to 0.86 of the time; eight rows 1.0 to 1.2).
    constexpr int64_t kCopiedPiece = 16 * 1024, kCopiedRows = 4;
    // Low tiles load a panel's scattered rows too often: for so many rows of A the panel is copied first (measured on a
    // Xeon: 1.1 to 1.35 times as fast from 12 rows on; tiles of 6 rows are slower for it).
    constexpr int64_t kCopied = RNN_EXT_VECTOR_REGISTERS < 32 ? 12 : kFewRows + 1;
    Segments all = p.segments;
    if (kPack<S> > 1) all.part(Cell::kGates);  // of each the last pair may be half of one
    const int64_t padded = blocks_of<T>(width_) * kLanes<T>, bytes = padded * int64_t(sizeof(Element<S>));
    const int64_t most = larger(1, (copies_ && rows_ <= kCopiedRows ? kCopiedPiece : kPiece) / bytes);
    const int64_t length = smaller(most, all.size());
    Buffer<Element<S>> piece(copies_ ? length * padded : 0);
    Buffer<Element<S>> room(p.rows >= kCopied && kPack<S> == 1 ? length * 4 * kLanes<T> : 0);
    p.room = room.get();
    if (!copies_ && all.size() <= most) {
      place(p, 0, 0, nullptr);
      return plain_product<S, true>(p);
    }
    if (p.accumulate) return add_pieces(p);
    const int64_t rows = Cell::kGates * hidden_ / all.count;  // of the weight, in a segment
    p.segments.count = 1;
    for (int s = 0; s < all.count; ++s) {
      for (int64_t k = 0; k < all.length; k += most) {
        p.segments.offset[0] = all.offset[s] + k;
        p.segments.length = smaller(most, all.length - k);
        const int64_t row = k * kPack<S>, count = smaller(p.segments.length * kPack<S>, rows - row);
        place(p, s * rows + row, count, piece.get());
        plain_product<S, true>(p);
        p.accumulate = true;
      }
    }
  }

  /// Makes so many rows of the weight the product's B, from row `first` on, by a copy in `piece` where they are not
  /// taken as they are.
  void place(PlainProduct<S>& p, int64_t first, int64_t count, Element<S>* piece) const {
    const int64_t column = p.first * kLanes<T>, columns = smaller(width_, p.last * kLanes<T>) - column;
    if constexpr (kPack<S> > 1) {
      const S* from = weight_.numbers + first * width_;
      const auto row = [&](int64_t k) { return from + k * width_; };
      pack_rows<S>(piece + p.first * p.segments.length * kLanes<T>, row, count, column, columns);
      p.b = piece;
    } else if (weight_.narrow) {
      const int64_t padded = blocks_of<T>(width_) * kLanes<T>;
      with_storage<T>(weight_.storage, [&]<class N>() {
        const N* from = static_cast<const N*>(weight_.narrow) + first * width_ + column;
        for (int64_t k = 0; k < count; ++k, from += width_) {
          T* to = piece + k * padded + column;
          for (int64_t i = 0; i < columns; i += kLanes<T>) store(to + i, load_part(from + i, columns - i));
        }
      });
      p.b = piece;
      p.b_stride = padded;
    } else {
      p.b = weight_.numbers + first * width_;
      p.b_stride = width_;
    }
  }

  /// The same apart from what C holds, so that a sum of two products does not depend on which of them came first.
  void add_pieces(PlainProduct<S> p) const {
    Buffer<T> sums(p.rows * width_);
    Buffer<T*> rows(p.rows);
    space_rows(rows.get(), sums.get(), width_, p.rows);
    T* const* to = p.c;
    p.c = rows.get();
    p.accumulate = false;
    multiply_pieces(p);
    const int64_t first = p.first * kLanes<T>, columns = smaller(width_, p.last * kLanes<T>) - first;
    for (int64_t r = 0; r < p.rows; ++r) add_row(to[r] + first, rows.get()[r] + first, columns);
  }

  /// Each gate begins with an element of its own. A few blocks at a time: of powers of two, all begin in the same set
  /// of the first-level cache.
  void pack(Element<S>* to) const {
    constexpr int64_t kColumns = 4 * kLanes<T>;
    const int64_t depth = elements<S>(hidden_) * kPack<S>, packed_depth = Cell::kGates * elements<S>(hidden_);
    for (int64_t first = in_pieces_ * kLanes<T>; first < width_; first += kColumns, to += kColumns * packed_depth) {
      const S* next = weight_.numbers;
      int64_t unit = 0;
      const auto row = [&](int64_t) -> const S* {
        const S* at = unit < hidden_ ? next : nullptr;
        if (at) next += width_;
        if (++unit == depth) unit = 0;
        return at;
      };
      pack_rows<S>(to, row, Cell::kGates * depth, first, smaller(kColumns, width_ - first));
    }
  }

  const StoredWeight<S> weight_;
  const int64_t hidden_, width_, rows_;
  const bool copies_;
  const int64_t in_pieces_;    // blocks of columns that are not packed beforehand
  Buffer<Element<S>> packed_;  // [blocks after those][G*H][lanes]
};

/// weight_hh of a direction, which is stored as W.
template <class W, class S>
StoredWeight<W> stored_hh(const BackwardArgs<S>& args, int direction) {
  const void* narrow = args.narrow_hh[direction];
  if constexpr (std::is_same_v<W, S>) {
    return {args.weights[direction].weight_hh, narrow, args.narrow};
  } else {
    return {static_cast<const W*>(narrow)};
  }
}

/// One direction's weights as its scan backward wants them, weight_hh stored as W.
template <class Cell, class S, class W>
struct ScanWeights {
  ScanWeights(const BackwardArgs<S>& args, int direction)
      : hidden(stored_hh<W>(args, direction), args.sizes.hidden, args.sizes.output(),
               args.layout.steps > 1 || args.grad_h_0, args.layout.steps <= 1 ? args.layout.rows : kWhole),
        proj(args.sizes.proj ? elements<S>(args.sizes.proj) * args.sizes.padded() : 0) {
    const Sizes& s = args.sizes;
    const S* weight_hr = args.weights[direction].weight_hr;
    if (s.proj) pack_rows<S>(proj.get(), [&](int64_t k) { return weight_hr + k * s.hidden; }, s.proj, 0, s.hidden);
  }

  const BackwardWeight<Cell, W> hidden;
  Buffer<Element<S>> proj;  // [H / lanes][P][lanes]
};
