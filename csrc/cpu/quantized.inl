// Inference with weights of 8 bits; their layout and scales are QuantizedWeights of quantized.h.
//
// What is multiplied by them, a row of inputs or of h, is rounded to integers of 16 or 8 bits with a scale of its own.
// So all sums are of integers: exact in any order, whence the same with any number of rows and threads and on every
// processor.

/// Integers of 16 bits that fill a vector.
typedef int16_t Int16s __attribute__((vector_size(RNN_EXT_VECTOR_BYTES)));

/// acc + the sums of the products of pairs.
ALWAYS_INLINE Int32s add_pairs(Int32s acc, Int16s a, Int16s b) {
#if defined(RNN_EXT_VNNI) && RNN_EXT_VECTOR_BYTES == 64
  return (Int32s)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif defined(RNN_EXT_VNNI)
  return (Int32s)_mm256_dpwssd_avx_epi32((__m256i)acc, (__m256i)a, (__m256i)b);
#elif RNN_EXT_VECTOR_BYTES == 64
  return acc + (Int32s)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif RNN_EXT_VECTOR_BYTES == 32
  return acc + (Int32s)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return acc + (Int32s)_mm_madd_epi16((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
  const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
  return acc + (Int32s)vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
#else
  for (int i = 0; i < kLanes<float>; ++i) acc[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return acc;
#endif
}

/// The weights of a vector's units and Pack columns, and what they are multiplied by: `Number`s, the same for all
/// units, which `spread` is given as the bits of an integer. Weights are those stored plus kOffset.
template <int Pack>
struct Int8Weights;

template <>
struct Int8Weights<2> {
  using Number = int16_t;
  static constexpr int kOffset = 0;
  Int16s pairs;

  ALWAYS_INLINE static Int8Weights load(const int8_t* p) {
#if RNN_EXT_VECTOR_BYTES == 64
    return {(Int16s)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
#elif RNN_EXT_VECTOR_BYTES == 32
    return {(Int16s)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
#elif defined(__x86_64__)
    const __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return {(Int16s)_mm_srai_epi16(_mm_unpacklo_epi8(v, v), 8)};
#else
    typedef int8_t Int8s __attribute__((vector_size(RNN_EXT_VECTOR_BYTES / 2)));
    Int8s v;
    __builtin_memcpy(&v, p, sizeof(v));
    return {__builtin_convertvector(v, Int16s)};
#endif
  }
  ALWAYS_INLINE static Int16s spread(int32_t bits) { return (Int16s)(bits - Int32s{}); }
  ALWAYS_INLINE Int32s add(Int32s acc, Int16s x) const { return add_pairs(acc, pairs, x); }
};

#if defined(RNN_EXT_VNNI)
template <>
struct Int8Weights<4> {
  using Number = int8_t;
  static constexpr int kOffset = 128;  // the instruction takes one factor without a sign
  Int32s fours;

  ALWAYS_INLINE static Int8Weights load(const int8_t* p) {
    Int32s v;
    __builtin_memcpy(&v, p, sizeof(v));
    return {v ^ int32_t(0x80808080u)};
  }
  ALWAYS_INLINE static Int32s spread(int32_t bits) { return bits - Int32s{}; }
  ALWAYS_INLINE Int32s add(Int32s acc, Int32s x) const {
#if RNN_EXT_VECTOR_BYTES == 64
    return (Int32s)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)fours, (__m512i)x);
#else
    return (Int32s)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)fours, (__m256i)x);
#endif
  }
};
#elif defined(RNN_EXT_DOT_PRODUCT)
template <>
struct Int8Weights<4> {
  using Number = int8_t;
  static constexpr int kOffset = 0;
  int8x16_t fours;

  ALWAYS_INLINE static Int8Weights load(const int8_t* p) { return {vld1q_s8(p)}; }
  ALWAYS_INLINE static int8x16_t spread(int32_t bits) { return vreinterpretq_s8_s32(vdupq_n_s32(bits)); }
  ALWAYS_INLINE Int32s add(Int32s acc, int8x16_t x) const { return (Int32s)vdotq_s32((int32x4_t)acc, fours, x); }
};
#else
template <>
struct Int8Weights<4> {
  using Number = int8_t;
  static constexpr int kOffset = 0;
  Int16s even, odd;

  ALWAYS_INLINE static Int8Weights part(Int16s v) { return {(v << 8) >> 8, v >> 8}; }
  ALWAYS_INLINE static Int8Weights load(const int8_t* p) {
    Int16s v;
    __builtin_memcpy(&v, p, sizeof(v));
    return part(v);
  }
  ALWAYS_INLINE static Int8Weights spread(int32_t bits) { return part((Int16s)(bits - Int32s{})); }
  ALWAYS_INLINE Int32s add(Int32s acc, const Int8Weights& x) const {
    return add_pairs(add_pairs(acc, even, x.even), odd, x.odd);
  }
};
#endif

/// Rows [rows, depth] of integers, each with its scale.
template <int Pack>
class QuantizedRows {
  using Number = typename Int8Weights<Pack>::Number;
  typedef Number Numbers __attribute__((vector_size(kLanes<float> * sizeof(Number))));

 public:
  QuantizedRows(int64_t rows, int64_t depth)
      : depth_(depth),
        stride_(Sizes::padded(depth)),
        // The largest that a sum of so many products with weights of 8 bits can hold.
        most_(float(smaller(Pack == 2 ? INT16_MAX : INT8_MAX, INT32_MAX / (INT8_MAX * larger(depth, 1))))),
        numbers_((rows + kRowsAtOnce - 1) / kRowsAtOnce * kRowsAtOnce * stride_),
        scales_(rows),
        offsets_(rows) {}

  void set(int64_t row, const float* from) {
    // The largest one's bits are those of the largest integer, a NaN's larger still.
    Int32s bits = {};
    for (int64_t k = 0; k < depth_; k += kLanes<float>) {
      const Int32s x = (Int32s)load_part(from + k, depth_ - k) & INT32_MAX;
      bits = x > bits ? x : bits;
    }
    int32_t largest_bits = bits[0];
    for (int i = 1; i < kLanes<float>; ++i) largest_bits = largest_bits > bits[i] ? largest_bits : bits[i];
    float largest;
    std::memcpy(&largest, &largest_bits, sizeof(largest));
    constexpr float kNothing = 1e-30f;  // of which the inverse is still a number
    const bool is_finite = largest_bits < 0x7f800000, is_zero = largest < kNothing;
    const float inverse = is_zero || !is_finite ? 0 : most_ / largest;
    scales_.get()[row] = is_zero ? 0 : is_finite ? largest / most_ : __builtin_nanf("");
    // Rounds to the nearest integer, whose bits are then the lowest.
    const Vec<float> shift = broadcast(12582912.f), factor = broadcast(inverse);
    Number* to = numbers_.get() + row * stride_;
    Bits32 sum = {};  // without a sign: it may overflow, as the sums that it is taken off do
    for (int64_t k = 0; k < depth_; k += kLanes<float>) {
      const Int32s rounded = (Int32s)(load_part(from + k, depth_ - k) * factor + shift) - (Int32s)shift;
      sum += (Bits32)rounded;
      const Numbers numbers = __builtin_convertvector(rounded, Numbers);
      __builtin_memcpy(to + k, &numbers, sizeof(numbers));
    }
    uint32_t offset = 0;
    if constexpr (Int8Weights<Pack>::kOffset != 0) {
      for (int i = 0; i < kLanes<float>; ++i) offset += sum[i];
    }
    offsets_.get()[row] = offset * Int8Weights<Pack>::kOffset;
  }

  int64_t groups() const { return in_units_of<Pack>(depth_ + Pack - 1); }
  int64_t stride() const { return stride_; }
  const Number* row(int64_t r) const { return numbers_.get() + r * stride_; }
  float scale(int64_t r) const { return scales_.get()[r]; }
  /// How much larger a row's sums are with weights that have an offset.
  uint32_t offset(int64_t r) const { return offsets_.get()[r]; }

 private:
  static constexpr int kRowsAtOnce = kHasAmx ? 16 : 1;  // whole tiles are read

  const int64_t depth_, stride_;
  const float most_;
  Buffer<Number> numbers_;
  Buffer<float> scales_;
  Buffer<uint32_t> offsets_;
};

/// A weight [G, units, depth] and the scales [G, units] of its rows.
struct QuantizedWeight {
  const int8_t* numbers;
  const float* scales;
  int64_t units;
};

/// The scales of a vector's units in each gate of a weight.
template <int G>
struct UnitScales {
  ALWAYS_INLINE UnitScales(const QuantizedWeight& weight, int64_t unit) {
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) of_gates[g] = load_part(weight.scales + g * weight.units + unit, weight.units - unit);
  }

  /// What exact sums of a row with this scale come to.
  ALWAYS_INLINE void add(Vec<float>* sums, const Int32s (&exact)[G], float of_row) const {
    const Vec<float> scale = broadcast(of_row);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g)
      sums[g] = fma(__builtin_convertvector(exact[g], Vec<float>), scale * of_gates[g], sums[g]);
  }

  Vec<float> of_gates[G];
};

/// The most rows of a tile.
template <int G>
constexpr int kQuantizedRows = RNN_EXT_VECTOR_REGISTERS >= 32 ? (G == 1 ? 8 : 24 / G) : (G == 1 ? 8 : 12 / G);

/// R rows by the units of a vector.
template <int R, int G, int Pack>
ALWAYS_INLINE void quantized_tile(const QuantizedRows<Pack>& a, int64_t row, const int8_t* weight,
                                  Int32s (&acc)[R][G]) {
  using W = Int8Weights<Pack>;
  constexpr int kGate = kQuantizedBlock * Pack, kStep = G * kGate;
  constexpr int kChains = R * G >= 8 ? 1 : 8 / (R * G);  // as many sums as fill the latency of a multiply-add
  const typename W::Number* rows[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) rows[r] = a.row(row + r);
  const auto add = [&](int64_t k, Int32s(&to)[R][G]) ALWAYS_INLINE_LAMBDA {
    decltype(W::spread(0)) x[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t bits;
      __builtin_memcpy(&bits, rows[r] + Pack * k, sizeof(bits));
      x[r] = W::spread(bits);
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      const W w = W::load(weight + k * kStep + g * kGate);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) to[r][g] = w.add(to[r][g], x[r]);
    }
  };
  const int64_t groups = a.groups();
  Int32s chains[kChains][R][G] = {};
  int64_t k = 0;
  for (; k + kChains <= groups; k += kChains) {
#pragma GCC unroll 8
    for (int c = 0; c < kChains; ++c) add(k + c, chains[c]);
  }
  for (; k < groups; ++k) add(k, chains[0]);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      Bits32 sum = (Bits32)chains[0][r][g] - a.offset(row + r);
#pragma GCC unroll 8
      for (int c = 1; c < kChains; ++c) sum += (Bits32)chains[c][r][g];
      acc[r][g] = (Int32s)sum;
    }
  }
}

/// Calls fn.operator()<count>(), 1 <= count <= Most.
template <int Most, class Fn>
ALWAYS_INLINE void with_count(int64_t count, const Fn& fn) {
  if constexpr (Most > 1) {
    if (count < Most) return with_count<Most - 1>(count, fn);
  }
  fn.template operator()<Most>();
}

/// R rows by the units of B vectors, one of these after the other, before a cell is run for all of them. (A function of
/// its own: inlined, GCC finds worse code for all of them, measured by up to a tenth.)
template <int R, int B, int G, int Pack, class Init, class Finish>
NO_INLINE void run_quantized_tile(const QuantizedRows<Pack>& a, int64_t row, const QuantizedWeight& weight,
                                  int64_t first, bool backwards, const Init& init, const Finish& finish) {
  using V = Vec<float>;
  constexpr int n = kLanes<float>, kParts = kQuantizedBlock / n;
  V sums[R * B][G];
#pragma GCC unroll 1
  for (int i = 0; i < B; ++i) {
    const int b = backwards ? B - 1 - i : i;
    const int64_t at = first + b, unit = at * n, block = at / kParts * kQuantizedBlock;
    Int32s acc[R][G];
    quantized_tile(a, row, weight.numbers + (block * G * a.groups() + unit - block) * Pack, acc);
    const UnitScales<G> scales(weight, unit);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      V* sum = sums[r * B + b];
      init(Patch<1, 1>{row + r, at}, sum);
      scales.add(sum, acc[r], a.scale(row + r));
    }
  }
  finish_tile<R, B, G>(row, first, sums, finish);
}

#if defined(RNN_EXT_AMX)
#include "cpu/amx_quantized.inl"
#endif

/// The first `rows` of A times the blocks of a weight; init and finish as those of product(). Backwards as in Order.
template <int G, int Pack, class Init, class Finish>
void quantized_product(int64_t rows, UnitBlocks blocks, const QuantizedRows<Pack>& a, const QuantizedWeight& weight,
                       bool backwards, const Init& init, const Finish& finish) {
#if defined(RNN_EXT_AMX)
  if constexpr (Pack == 4) {
    if (tiles_pay(rows, a.groups())) return multiply_by_tiles<G>(rows, blocks, a, weight, backwards, init, finish);
  }
#endif
  constexpr int kParts = kQuantizedBlock / kLanes<float>, kMost = kQuantizedRows<G>;
  // Vectors of one row alone, for which a cell is run at once (measured on Zen 4, 40 to 128 units: with a function for
  // each tile 4 to 12 % faster than one at a time; GRUs and LSTMs by fours are slower).
  constexpr int kTogether = !kIsCellwise<Finish> ? 1 : G == 1 ? 4 : 2;
  const int64_t first = blocks.first * kParts, last = smaller(blocks.last * kParts, blocks_of<float>(weight.units));
  const int64_t width = rows == 1 ? kTogether : 1, columns = (last - first + width - 1) / width;
  const int64_t tiles = (rows + kMost - 1) / kMost;
  for (int64_t i = 0; i < columns; ++i) {
    const int64_t at = first + width * (backwards ? columns - 1 - i : i);
    if (rows == 1) {
      with_count<kTogether>(
          last - at, [&]<int B>()
                         ALWAYS_INLINE_LAMBDA { run_quantized_tile<1, B, G>(a, 0, weight, at, backwards, init, finish); });
      continue;
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t row = rows * tile / tiles;
      with_count<kMost>(rows * (tile + 1) / tiles - row, [&]<int R>() ALWAYS_INLINE_LAMBDA {
        run_quantized_tile<R, 1, G>(a, row, weight, at, backwards, init, finish);
      });
    }
  }
}

/// The scan of one direction for a slice of the batch and, where a team shares it, a part of the hidden units.
template <class Cell, int Pack>
class QuantizedScan {
  static constexpr int G = Cell::kGates;
  static_assert(Cell::kSplit <= 1);  // as csrc/cells/cell.h has it
  using V = Vec<float>;

 public:
  QuantizedScan(const QuantizedArgs& args, int direction, Slice slice, ForwardStates<float>& states, Team& team,
                int member, int members)
      : args_(args.call),
        layout_(args.call.layout),
        weights_(args.weights[direction]),
        direction_(direction),
        reverse_(direction == 1),
        slice_(slice),
        states_(states),
        team_(team),
        member_(member),
        members_(members),
        hidden_(args_.sizes.hidden),
        padded_(args_.sizes.padded()),
        out_(args_.sizes.output()),
        out_padded_(Sizes::padded(out_)),
        part_{blocks() * member / members, blocks() * (member + 1) / members},
        chunk_rows_(larger(kChunkRows, slice.size())),
        inputs_(chunk_rows_, args_.sizes.input),
        hiddens_(slice.size(), out_),
        unprojected_rows_(args_.sizes.proj ? slice.size() : 0, hidden_),
        gates_(chunk_rows_ * G * padded_),
        c_(Cell::kHasCell ? slice.size() * padded_ : 0, true),
        unprojected_(args_.sizes.proj ? slice.size() * padded_ : 0),
        input_rows_(chunk_rows_),
        output_rows_(slice.size()),
        cell_rows_(slice.size()) {}

  void run() {
    const TileScope scope;
    const int64_t steps = layout_.steps, first_state = layout_.batch * direction_;
    if (Cell::kHasCell && args_.c_0)
      read_states(c_.get(), padded_, args_.c_0 + first_state * hidden_, hidden_, layout_, slice_);
    float *now = states_.h[0].get(), *next = states_.h[1].get();
    const auto write_h_n = [&](const float* h, int64_t from, int64_t to) {
      if (member_ == 0)
        write_states(args_.h_n + first_state * out_, out_, h, out_padded_, layout_, slice_, from, to, 0, out_);
    };
    write_h_n(now, steps ? layout_.batch_sizes[0] : 0, layout_.batch);
    int64_t chunk_end = 0, row_of_chunk = 0;
    for (int64_t s = 0; s < steps; ++s) {
      if (s == chunk_end) {
        chunk_end = project_inputs(s);
        row_of_chunk = 0;
      }
      const int64_t t = time(s), rows = slice_.active(layout_, t);
      if (rows == 0) continue;
      if (args_.resets.data) {
        reset_states(args_.resets, layout_, reverse_, t, slice_, member_ == 0 ? now : nullptr, out_, c_.get(), hidden_);
        team_.meet(member_, members_);
      }
      step(t, rows, gates_.get() + row_of_chunk * G * padded_, now, next);
      team_.meet(member_, members_);
      row_of_chunk += rows;
      write_h_n(next, first_ending(layout_, reverse_, t), layout_.batch_sizes[t]);
      std::swap(now, next);
    }
    if constexpr (Cell::kHasCell)
      write_states(args_.c_n + first_state * hidden_, hidden_, c_.get(), padded_, layout_, slice_, 0, layout_.batch,
                   part_.first * kQuantizedBlock, smaller(part_.last * kQuantizedBlock, hidden_));
  }

 private:
  static constexpr int64_t kChunkRows = kHasAmx ? 32 : 24;  // some tiles of them

  int64_t time(int64_t s) const { return time_of(layout_, reverse_, s); }
  int64_t blocks() const { return in_units_of<kQuantizedBlock>(padded_); }

  /// The input gates of the steps from s on, as many as there is room for; returns the first that it has not come to.
  int64_t project_inputs(int64_t s) {
    int64_t count = 0;
    for (; s < layout_.steps; ++s) {
      const int64_t t = time(s), rows = slice_.active(layout_, t);
      if (count + rows > chunk_rows_) break;
      find_rows(input_rows_.get(), args_.input, layout_, t, slice_.first, rows, 0);
      for (int64_t r = 0; r < rows; ++r) inputs_.set(count + r, input_rows_.get()[r]);
      count += rows;
    }
    const float *bias_ih = weights_.factors + 2 * G * hidden_, *bias_hh = bias_ih + G * hidden_;
    const auto init = [&](Patch<1, 1> of, V* sums) ALWAYS_INLINE_LAMBDA {
      const int64_t unit = of.block * kLanes<float>, rest = hidden_ - unit;
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        sums[g] = load_part(bias_ih + g * hidden_ + unit, rest);
        if (g < G - Cell::kSplit) sums[g] += load_part(bias_hh + g * hidden_ + unit, rest);
      }
    };
    const auto finish = [&](Patch<1, 1> of, const Wide<float, 1>* sums) ALWAYS_INLINE_LAMBDA {
      float* to = gates_.get() + of.row * G * padded_ + of.block * kLanes<float>;
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) store(to + g * padded_, sums[g].part[0]);
    };
    quantized_product<G>(count, part_, inputs_, {weights_.weight_ih, weights_.factors, hidden_}, false, init, finish);
    return s;
  }

  void step(int64_t t, int64_t rows, const float* gates, const float* now, float* next) {
    float *const *outputs = output_rows_.get(), *const *cells = args_.cells.data ? cell_rows_.get() : nullptr;
    find_rows(output_rows_.get(), args_.output, layout_, t, slice_.first, rows, direction_ * out_);
    if (cells) find_rows(cell_rows_.get(), args_.cells, layout_, t, slice_.first, rows, direction_ * hidden_);
    for (int64_t r = 0; r < rows; ++r) hiddens_.set(r, now + r * out_padded_);
    const int64_t hidden = hidden_, padded = padded_;
    const float* split_bias = weights_.factors + (4 * G - 1) * hidden;
    const auto init = [=](Patch<1, 1> of, V* sums) ALWAYS_INLINE_LAMBDA {
      const int64_t unit = of.block * kLanes<float>;
      const float* from = gates + of.row * G * padded + unit;
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g)
        sums[g] = g < G - Cell::kSplit ? load(from + g * padded) : load_part(split_bias + unit, hidden - unit);
    };
    const auto finish = Cellwise{[&]<int R, int B>(Patch<R, B> patch, const Wide<float, R * B>* sums) ALWAYS_INLINE_LAMBDA {
      using Vs = Wide<float, R * B>;
      Vs split[1] = {}, h_prev = {}, state = {}, saved[Cell::kSaved + 1];
      const int64_t unit = patch.block * kLanes<float>, rest = hidden_ - unit;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const int64_t row = patch.row + r;
        const int i = r * B;
        if constexpr (Cell::kSplit > 0)
          load_vectors<B>(split[0].part + i, gates + row * G * padded_ + (G - 1) * padded_ + unit, kWhole);
        if constexpr (Cell::kDirectCarry) load_vectors<B>(h_prev.part + i, now + row * out_padded_ + unit, kWhole);
        if constexpr (Cell::kHasCell) load_vectors<B>(state.part + i, c_.get() + row * padded_ + unit, kWhole);
      }
      const Vs h = with_exact<Cell>(args_.cell, [&]<class Exact>() ALWAYS_INLINE_LAMBDA {
        return Exact::template forward<Math<float, Vs>>(sums, split, h_prev, state, saved);
      });
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const int64_t row = patch.row + r;
        const V* h_row = h.part + r * B;
        if constexpr (Cell::kHasCell) {
          const V* c_row = state.part + r * B;
          store_padded<B>(c_.get() + row * padded_ + unit, c_row, rest);
          if (cells) store_vectors<B>(cells[row] + unit, c_row, rest);
        }
        if (args_.sizes.proj) {
          store_padded<B>(unprojected_.get() + row * padded_ + unit, h_row, rest);
        } else {
          store_padded<B>(next + row * out_padded_ + unit, h_row, rest);
          store_vectors<B>(outputs[row] + unit, h_row, rest);
        }
      }
    }};
    const float* scales = weights_.factors + G * hidden_;
    // Measured on Zen 4, weights of 1 to 4 MiB: one or two rows are up to 6 % faster, eight and more 1 to 2 % slower.
    constexpr int64_t kFew = 4;
    const bool backwards = rows <= kFew && is_backwards(t);
    quantized_product<G>(rows, part_, hiddens_, {weights_.weight_hh, scales, hidden_}, backwards, init, finish);
    if (args_.sizes.proj) project(rows, next);
  }

  void project(int64_t rows, float* next) {
    for (int64_t r = 0; r < rows; ++r) unprojected_rows_.set(r, unprojected_.get() + r * padded_);
    const auto init = [](Patch<1, 1>, V* sums) ALWAYS_INLINE_LAMBDA { sums[0] = V{}; };
    const auto finish = [&](Patch<1, 1> of, const Wide<float, 1>* sums) ALWAYS_INLINE_LAMBDA {
      const int64_t unit = of.block * kLanes<float>;
      store(next + of.row * out_padded_ + unit, sums->part[0]);
      store_part(output_rows_.get()[of.row] + unit, sums->part[0], out_ - unit);
    };
    quantized_product<1>(rows, {0, in_units_of<kQuantizedBlock>(out_padded_)}, unprojected_rows_,
                         {weights_.weight_hr, weights_.scale_hr, out_}, false, init, finish);
  }

  const ForwardArgs<float>& args_;
  const Layout& layout_;
  const QuantizedWeights& weights_;
  const int direction_;
  const bool reverse_;
  const Slice slice_;
  ForwardStates<float>& states_;
  Team& team_;
  const int member_, members_;
  const int64_t hidden_, padded_, out_, out_padded_;
  const UnitBlocks part_;  // of kQuantizedBlock units
  const int64_t chunk_rows_;
  QuantizedRows<Pack> inputs_, hiddens_, unprojected_rows_;
  Buffer<float> gates_;              // [chunk rows, G, padded H]
  Buffer<float> c_;                  // [slice, padded H]
  Buffer<float> unprojected_;        // [slice, padded H]
  Buffer<const float*> input_rows_;  // [chunk rows]
  Buffer<float*> output_rows_;       // [slice]
  Buffer<float*> cell_rows_;         // [slice]
};

template <class Cell, int Pack>
void quantized_forward(const QuantizedArgs& args, const Executor& executor) {
  const ForwardArgs<float>& call = args.call;
  const Shares shares = share_out(call.layout, call.sizes, Cell::kGates, sizeof(int8_t), executor,
                                  /*shares_units=*/true, /*packed=*/true);
  run_shares(call, shares, executor,
             [&](int d, Slice slice, ForwardStates<float>& states, Team& team, int member, int members) {
               QuantizedScan<Cell, Pack>(args, d, slice, states, team, member, members).run();
             });
}
