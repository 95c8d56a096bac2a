// What run.h runs csrc/cpu on: a layer's sizes and options, memory of exactly the promised extent, and what a run
// leaves there.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/with_cell.h"

namespace cpu_sanitize {

using namespace rnn_ext::cpu;

constexpr int kWeights = 9;  // of one direction, in the order of struct Weights

struct Config {
  CellKind cell;
  int64_t steps, batch, input, hidden, proj;
  int directions;
  enum Form { kTimeMajor, kBatchMajor, kPacked } form;
  bool bias, lengths, resets, states, cells;
  unsigned wanted;  // bits: which gradients come in and go out
  Variant variant = Variant::kPlain;
  unsigned masks = 0;         // bits: hidden, zoneout_h, zoneout_c
  bool with_bfloat16 = true;  // the type of 16 bits that floats are compared with, else float16
  bool widens = true;         // its weights in every step, however few they are

  std::string name() const {
#define CELL_NAME(Cell, NAME) rnn_ext::cells::Cell::kName,
    static const char* const cell_names[] = {RNN_EXT_FOR_EACH_CELL(CELL_NAME)};
#undef CELL_NAME
    static const char* const form_names[] = {"time-major", "batch-major", "packed"};
    char text[240];
    std::snprintf(text, sizeof text,
                  "%s L=%d N=%d I=%d H=%d P=%d D=%d %s bias=%d lengths=%d resets=%d states=%d mask=%x "
                  "variant=%d masks=%x",
                  cell_names[int(cell)], int(steps), int(batch), int(input), int(hidden), int(proj), directions,
                  form_names[form], bias, lengths, resets, states, wanted, int(variant), masks);
    return text;
  }
  int gates() const { return rnn_ext::cells::kGatesOf[int(cell)]; }
  bool has_cell() const {
    return with_cell(cell, []<class Cell>() { return Cell::kHasCell; });
  }
};

[[noreturn]] inline void fail(const Config& config, const std::string& what) {
  std::fprintf(stderr, "%s: %s (%s)\n", config.name().c_str(), what.c_str(), capability());
  std::exit(1);
}

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2654435761u + 12345) {}
  uint64_t next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return state_ >> 33;
  }
  double uniform() { return double(next()) / double(1ull << 30) - 1; }  // [-1, 1)
  int64_t below(int64_t n) { return int64_t(next() % uint64_t(n)); }

 private:
  uint64_t state_;
};

template <class T>
double number(T x) {
  return double(x);
}
inline double number(BFloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline double number(Float16 x) {
  const int exponent = x.bits >> 10 & 31, digits = x.bits & 1023;
  if (exponent == 31) return std::numeric_limits<double>::quiet_NaN();  // or infinite: neither is expected
  const double size = exponent ? std::ldexp(1024 + digits, exponent - 25) : std::ldexp(digits, -24);
  return x.bits >> 15 ? -size : size;
}
template <class T>
T stored(double x) {
  return T(x);
}
template <>
inline BFloat16 stored(double x) {
  return {uint16_t(std::bit_cast<uint32_t>(float(x)) >> 16)};
}
template <>
inline Float16 stored(double x) {  // of less than 2^16; what is too small for all digits is 0
  if (std::isnan(x)) return {0x7e00};
  const uint32_t bits = std::bit_cast<uint32_t>(float(x));
  const int exponent = int(bits >> 23 & 255) - 112;
  const unsigned sign = bits >> 31 << 15;
  return {uint16_t(exponent > 0 ? sign | unsigned(exponent) << 10 | (bits >> 13 & 1023) : sign)};
}

/// Memory that ends where it should and starts one element past what the allocator aligned. NaN until written.
template <class T>
class Array {
 public:
  explicit Array(int64_t size = 0) : memory_(new T[size + 1]), size_(size) {
    std::fill(begin(), end(), stored<T>(std::numeric_limits<double>::quiet_NaN()));
  }
  Array(int64_t size, Random& random, double scale) : Array(size) {
    for (T& x : *this) x = stored<T>(random.uniform() * scale);
  }
  T* begin() const { return memory_.get() + 1; }
  T* end() const { return begin() + size_; }
  int64_t size() const { return size_; }

 private:
  std::unique_ptr<T[]> memory_;
  int64_t size_;
};

template <class T>
Sequence<T> sequence(const Array<std::remove_const_t<T>>& array, const Config& config, int64_t features) {
  if (config.form == Config::kPacked) return {array.begin(), 0, features};
  if (config.form == Config::kBatchMajor) return {array.begin(), features, config.steps * features};
  return {array.begin(), config.batch * features, features};
}

struct Steps {
  explicit Steps(const Config& config, Random& random) {
    std::vector<int64_t> lengths(size_t(config.batch), config.steps);
    if (config.lengths || config.form == Config::kPacked) {
      const int64_t least = config.form == Config::kPacked ? 1 : 0;
      // (A packed sequence is as long as the longest; padded ones may all be shorter.)
      for (int64_t n = least; n < config.batch && config.steps > 0; ++n)
        lengths[size_t(n)] = least + random.below(config.steps + 1 - least);
    }
    order.resize(lengths.size());
    for (size_t n = 0; n < order.size(); ++n) order[n] = int64_t(n);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return lengths[size_t(a)] > lengths[size_t(b)]; });
    for (int64_t t = 0; t < config.steps; ++t) {
      sizes.push_back(std::count_if(lengths.begin(), lengths.end(), [&](int64_t n) { return n > t; }));
      offsets.push_back(rows);
      rows += sizes.back();
    }
    layout.steps = config.steps;
    layout.batch = config.batch;
    layout.rows = rows;
    layout.batch_sizes = sizes.data();
    layout.offsets = offsets.data();
    layout.order = config.lengths ? order.data() : nullptr;
    layout.packed = config.form == Config::kPacked;
  }
  std::vector<int64_t> sizes, offsets, order;
  int64_t rows = 0;
  Layout layout;
};

/// What a run leaves: written values in order, for comparison with another run.
struct Results {
  std::vector<double> values;
  std::string problem;

  template <class T>
  void add(const Array<T>& array, const char* name) {
    for (T x : array) {
      if (std::isnan(number(x)))
        problem = std::string(name) + " was not written everywhere, or depends on unwritten memory";
      values.push_back(number(x));
    }
  }
  /// Of a sequence, rows that exist must be written and the others must not be touched.
  template <class T>
  void add(const Array<T>& array, const char* name, const Config& config, const Layout& layout, int64_t features) {
    const Sequence<T> rows = sequence<T>(array, config, features);
    std::vector<bool> exists(size_t(array.size()), false);
    for (int64_t t = 0; t < layout.steps; ++t) {
      for (int64_t j = 0; j < layout.batch_sizes[t]; ++j) {
        const T* row = rows.at(layout, t, j);
        for (int64_t k = 0; k < features; ++k) exists[size_t(row + k - array.begin())] = true;
      }
    }
    for (int64_t i = 0; i < array.size(); ++i) {
      const double x = number(array.begin()[i]);
      if (std::isnan(x) == exists[size_t(i)])
        problem = std::string(name) + (exists[size_t(i)] ? " lacks a row" : " has a row too many");
      if (exists[size_t(i)]) values.push_back(x);
    }
  }
};

/// The weights of one direction, or their gradients, in the order of struct Weights.
template <class T>
constexpr T* Weights<T>::* kMembers[kWeights] = {
    &Weights<T>::weight_ih,      &Weights<T>::weight_hh,     &Weights<T>::bias_ih,
    &Weights<T>::bias_hh,        &Weights<T>::weight_hr,     &Weights<T>::weight_norm_ih,
    &Weights<T>::weight_norm_hh, &Weights<T>::weight_norm_c, &Weights<T>::bias_norm_c};

constexpr const char* kGradNames[kWeights] = {"grad_weight_ih",      "grad_weight_hh",     "grad_bias_ih",
                                              "grad_bias_hh",        "grad_weight_hr",     "grad_weight_norm_ih",
                                              "grad_weight_norm_hh", "grad_weight_norm_c", "grad_bias_norm_c"};

/// Their sizes, in the same order.
inline std::vector<int64_t> weight_sizes(const Config& config) {
  const int64_t H = config.hidden, G = config.gates(), out = config.proj ? config.proj : H;
  return {G * H * config.input, G * H * out, G * H, G * H, config.proj * H, G * H, G * H, H, H};
}

/// As a share of the largest value.
inline double difference(const Config& config, const Results& a, const Results& b) {
  if (a.values.size() != b.values.size()) fail(config, "different numbers of results");
  double error = 0, largest = 1;
  for (size_t i = 0; i < a.values.size(); ++i) {
    error = std::max(error, std::abs(a.values[i] - b.values[i]));
    largest = std::max(largest, std::abs(a.values[i]));
  }
  return error / largest;
}

}  // namespace cpu_sanitize
