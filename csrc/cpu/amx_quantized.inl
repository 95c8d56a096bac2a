// Weights of 8 bits times activations of 8 bits by tiles of AMX.

/// NB blocks of some rows from `row` on: of two tiles or, where `Rows` is 1, of one.
template <int Rows, int NB, int G, class Init, class Finish>
ALWAYS_INLINE void run_quantized_tiles(int64_t row, int64_t rows, int64_t block, const QuantizedRows<4>& a,
                                       const QuantizedWeight& weight, const Init& init, const Finish& finish) {
  using V = Vec<float>;
  constexpr int n = kLanes<float>, kVectors = NB * G;
  static_assert(kQuantizedBlock == n);
  alignas(64) int32_t sums[Rows * kTileRows * kVectors * n];
  const int64_t groups = a.groups(), block_stride = groups * G * n;
  const auto* numbers = reinterpret_cast<const FourInt8*>(weight.numbers) + block * block_stride;
  struct Tile {
    const int8_t* at;
    int64_t stride;
  } tiles[Rows];
  for (int i = 0; i < Rows; ++i) tiles[i] = {a.row(row + i * kTileRows), a.stride()};
  Fetch none = {nullptr, 0};
  multiply_panel<Rows, kVectors>(sums, kVectors * n, tiles, Panel<G, FourInt8>{numbers, block_stride}, groups, none);
  in_rows_of<kMostCells / NB>(0, rows, [&]<int R>(int64_t first) ALWAYS_INLINE_LAMBDA {
    V of_rows[R * NB][G];
#pragma GCC unroll 4
    for (int b = 0; b < NB; ++b) {
      const UnitScales<G> scales(weight, (block + b) * n);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        Int32s exact[G];
        std::memcpy(exact, sums + ((first + r) * kVectors + b * G) * n, sizeof(exact));
        V* sum = of_rows[r * NB + b];
        init(Patch<1, 1>{row + first + r, block + b}, sum);
        scales.add(sum, exact, a.scale(row + first + r));
      }
    }
    finish_tile<R, NB, G>(row + first, block, of_rows, finish);
  });
}

/// Whether they are faster than vectors. (One row of 64 units 0.77 to 0.85 times as fast, of 256 1.1, of 512 1.1
/// to 1.3, eight of an RNN of 64 0.83, of LSTMs of 128 and 256 1.4 and 1.7, 32 and more of 256 and 512 1.7 to 2.2.)
inline bool tiles_pay(int64_t rows, int64_t groups) { return groups >= (rows < 4 ? 64 : 32); }

/// quantized_product().
template <int G, class Init, class Finish>
void multiply_by_tiles(int64_t rows, UnitBlocks blocks, const QuantizedRows<4>& a, const QuantizedWeight& weight,
                       bool backwards, const Init& init, const Finish& finish) {
  if (rows == 0) return;
  const TileScope scope;
  TileScope::shape(int(smaller(rows, kTileRows)), int(a.groups() % kTilePairs));
  int64_t block = blocks.first;
  const int64_t end = smaller(blocks.last, blocks_of<float>(weight.units));
  const auto run = [&]<int NB>() ALWAYS_INLINE_LAMBDA {
    const int64_t count = (end - block) / NB;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = block + NB * (backwards ? count - 1 - i : i);
      in_row_tiles<NB == 1>(rows, [&]<int Tiles>(int64_t row, int64_t height) ALWAYS_INLINE_LAMBDA {
        run_quantized_tiles<Tiles, NB, G>(row, height, at, a, weight, init, finish);
      });
    }
    block += count * NB;
  };
  if constexpr (kIsCellwise<Finish>) {
    if (rows < 4) {
      if constexpr (G == 1) run.template operator()<4>();
      run.template operator()<2>();
    }
  }
  run.template operator()<1>();
}
