// Numbers of sequences that lie in rows, a row for each sequence, and in columns, where sequences fill vectors.

/// Vectors that go through a cell side by side.
constexpr int kAbreast = 2;

template <class T>
using Abreast = Wide<T, kAbreast>;
template <class T>
constexpr int64_t kAbreastLanes = kAbreast * kLanes<T>;
template <class T>
constexpr int64_t whole_abreast(int64_t count) {
  return (count + kAbreastLanes<T> - 1) / kAbreastLanes<T> * kAbreastLanes<T>;
}

/// The first `count` numbers, of which some vectors may have none.
template <class T>
ALWAYS_INLINE Abreast<T> load_abreast(const T* p, int64_t count = kWhole) {
  Abreast<T> v;
  for (int i = 0; i < kAbreast; ++i) v.part[i] = load_part(p + i * kLanes<T>, larger(0, count - i * kLanes<T>));
  return v;
}
template <class T>
ALWAYS_INLINE void store_abreast(T* p, const Abreast<T>& v, int64_t count = kWhole) {
  for (int i = 0; i < kAbreast; ++i) store_part(p + i * kLanes<T>, v.part[i], larger(0, count - i * kLanes<T>));
}
template <class T>
ALWAYS_INLINE Abreast<T> broadcast_abreast(T x) {
  Abreast<T> v;
  for (auto& part : v.part) part = broadcast(x);
  return v;
}

/// Numbers of some sequences, a row for each.
template <class T>
struct Rows {
  T* data;
  int64_t distance;      // of two rows
  const int64_t* order;  // row j is number order[j]; null: j

  T* operator[](int64_t j) const { return data + (order ? order[j] : j) * distance; }
  bool is_column() const { return !order && distance == 1; }
};

/// Those of step t from row `first` on, `offset` numbers into them.
template <class T>
Rows<T> rows_of(const Sequence<T>& sequence, const Layout& layout, int64_t t, int64_t first, int64_t offset) {
  if (layout.order && !layout.packed)
    return {sequence.data + t * sequence.step + offset, sequence.row, layout.order + first};
  return {sequence.at(layout, t, first) + offset, sequence.row, nullptr};
}

/// The same of states, [D, N, width].
template <class T>
Rows<T> rows_of(T* states, int64_t width, const Layout& layout, int direction, int64_t first) {
  T* data = states + direction * layout.batch * width;
  if (layout.order) return {data, width, layout.order + first};
  return {data + first * width, width, nullptr};
}

/// Asks for the first `width` numbers of so many rows, to write them if they are not constant.
template <class T>
void fetch_rows(const Rows<T>& rows, int64_t width, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const auto fetch = [](const T* from, int64_t numbers) {
    for (int64_t i = 0; i < numbers; i += kLine) __builtin_prefetch(from + i, std::is_const_v<T> ? 0 : 1);
  };
  if (!rows.order && rows.distance <= kLine) return fetch(rows.data, count * rows.distance);
  for (int64_t j = 0; j < count; ++j) fetch(rows[j], width);
}

/// Rows of up to `most` sequences as columns: the numbers of one feature follow each other.
template <class T>
class Columns {
 public:
  Columns(int64_t width, int64_t most) : width_(width), length_(whole_abreast<T>(most)), data_(width * length_, true) {}

  T* operator[](int64_t k) const { return data_.get() + k * length_; }
  int64_t width() const { return width_; }
  int64_t length() const { return length_; }
  void clear() { std::memset(data_.get(), 0, size_t(width_ * length_) * sizeof(T)); }
  void clear(int64_t j) {
    for (int64_t k = 0; k < width_; ++k) (*this)[k][j] = 0;
  }

  void read(const Rows<const T>& rows, int64_t count) {
    if (width_ < kSquared) {
      for (int64_t k = 0; k < width_; ++k) {
        T* to = (*this)[k];
        if (rows.is_column()) {
          copy_row(to, rows.data + k, count);
        } else {
          each_row(rows, count, [&](int64_t j, const T* row) { to[j] = row[k]; });
        }
      }
      return;
    }
    each_square(count, [&](int64_t k, int64_t j, int64_t left) ALWAYS_INLINE_LAMBDA {
      Vec<T> square[kLanes<T>];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes<T>; ++i) square[i] = i < left ? load_part(rows[j + i] + k, width_ - k) : Vec<T>{};
      transpose<T>(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes<T>; ++i) {
        if (k + i < width_) store_part((*this)[k + i] + j, square[i], left);
      }
    });
  }

  /// `adds`: to what the rows hold.
  void write(const Rows<T>& rows, int64_t count, bool adds = false) const {
    if (width_ < kSquared) {
      for (int64_t k = 0; k < width_; ++k) {
        const T* from = (*this)[k];
        if (adds) {
          each_row(rows, count, [&](int64_t j, T* row) { row[k] += from[j]; });
        } else if (rows.is_column()) {
          copy_row(rows.data + k, from, count);
        } else {
          each_row(rows, count, [&](int64_t j, T* row) { row[k] = from[j]; });
        }
      }
      return;
    }
    each_square(count, [&](int64_t k, int64_t j, int64_t left) ALWAYS_INLINE_LAMBDA {
      Vec<T> square[kLanes<T>];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes<T>; ++i) square[i] = k + i < width_ ? load((*this)[k + i] + j) : Vec<T>{};
      transpose<T>(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes<T>; ++i) {
        if (i >= left) break;
        T* to = rows[j + i] + k;
        store_part(to, adds ? load_part(to, width_ - k) + square[i] : square[i], width_ - k);
      }
    });
  }

 private:
  static constexpr int64_t kSquared = 4;  // columns from which squares of lanes x lanes are transposed

  /// fn(j, row), in a loop of its own where rows are evenly spaced.
  template <class Row>
  ALWAYS_INLINE static void each_row(const Rows<Row>& rows, int64_t count, const auto& fn) {
    if (rows.order) {
      for (int64_t j = 0; j < count; ++j) fn(j, rows.data + rows.order[j] * rows.distance);
    } else {
      for (int64_t j = 0; j < count; ++j) fn(j, rows.data + j * rows.distance);
    }
  }
  /// fn(column, sequence, sequences of the square that are there)
  ALWAYS_INLINE void each_square(int64_t count, const auto& fn) const {
    int64_t j = 0;
    for (; j + kLanes<T> <= count; j += kLanes<T>) {
      for (int64_t k = 0; k < width_; k += kLanes<T>) fn(k, j, int64_t(kLanes<T>));
    }
    for (int64_t k = 0; k < width_ && j < count; k += kLanes<T>) fn(k, j, count - j);
  }

  const int64_t width_, length_;
  Buffer<T> data_;
};
