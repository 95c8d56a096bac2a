// All timesteps of one recurrent layer, both directions, on the CPU: the interface between csrc/ops and the kernels.
// Nothing here knows torch. S is what tensors are stored in: float, double or, as far as computes_forward() and
// computes_bfloat16() say so, 16 bits; sums, cell states and gradients are of type Compute<S>. Every array is dense in
// its last dimension.
//
// L timesteps, N batch entries, I input size, H hidden size, P size of the output (H without projection), G gates,
// D directions, T = rows: how many (timestep, entry) pairs exist.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "cells/list.h"

namespace rnn_ext::cpu {

/// The upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

/// IEEE 754's binary16.
struct Float16 {
  uint16_t bits;
};

template <class S>
struct ComputeOf {
  using type = S;
};
template <>
struct ComputeOf<BFloat16> {
  using type = float;
};
template <>
struct ComputeOf<Float16> {
  using type = float;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

#define RNN_EXT_KIND(Cell, NAME) k##Cell,
enum class CellKind { RNN_EXT_FOR_EACH_CELL(RNN_EXT_KIND) };
#undef RNN_EXT_KIND

/// What is done around the cell: nothing, zoneout and recurrent dropout, or (lstm) layer normalisation with both.
enum class Variant { kPlain, kMasked, kLayerNorm };

/// What numbers are stored as: what they are computed in, or 16 bits.
enum class Storage { kComputed, kBFloat16, kFloat16 };

/// Which pairs (timestep, entry) exist. Kernel rows are ordered by falling length, so that the rows alive at step t are
/// the first batch_sizes[t]; row (t, j) is number offsets[t] + j in every internal array, but for `stored`.
struct Layout {
  int64_t steps = 0;                     // L
  int64_t batch = 0;                     // N, also of the states
  int64_t rows = 0;                      // T
  const int64_t* batch_sizes = nullptr;  // [L] non-increasing, not negative
  const int64_t* offsets = nullptr;      // [L] sums of the batch sizes before
  const int64_t* order = nullptr;        // [N] row j belongs to batch entry order[j]; null: to entry j
  bool packed = false;                   // sequences are stored row by row instead of as (timestep, entry)
  // [L] Of a part of a batch, the offsets of the whole, which packed sequences and what is kept for backward have;
  // null: the same. Of several sequences, and of one direction of a plain layer without projection.
  const int64_t* stored = nullptr;

  int64_t entry(int64_t j) const { return order ? order[j] : j; }
  const int64_t* stored_offsets() const { return stored ? stored : offsets; }
  /// Whether every step has the whole batch.
  bool has_all_rows() const { return rows == steps * batch; }
  /// Calls fn(j, steps that row j has) for all of the batch.
  template <class Fn>
  void each_length(const Fn& fn) const {
    int64_t length = steps;
    for (int64_t j = 0; j < batch; ++j) {
      while (length > 0 && batch_sizes[length - 1] <= j) --length;
      fn(j, length);
    }
  }
};

/// A sequence in the caller's layout: element (t, entry) starts at data + t * step + entry * row, a packed one's row
/// (t, j) at data + (stored_offsets()[t] + j) * row.
template <class T>
struct Sequence {
  T* data = nullptr;
  int64_t step = 0;
  int64_t row = 0;

  T* at(const Layout& layout, int64_t t, int64_t j) const {
    return data + (layout.packed ? (layout.stored_offsets()[t] + j) * row : t * step + layout.entry(j) * row);
  }
  /// The distance between two timesteps, all of which have the whole batch, backwards in time if `reverse`.
  int64_t to_next(const Layout& layout, bool reverse) const {
    return (reverse ? -1 : 1) * (layout.packed ? layout.batch * row : step);
  }
  /// Of untyped memory.
  template <class To>
  Sequence<To> of() const {
    return {static_cast<To*>(data), step, row};
  }
};

/// The weights of one direction, or their gradients (null where not wanted), as torch.nn lays them out.
template <class T>
struct Weights {
  T* weight_ih = nullptr;  // [G*H, I]
  T* weight_hh = nullptr;  // [G*H, P]
  T* bias_ih = nullptr;    // [G*H] or null
  T* bias_hh = nullptr;    // [G*H] or null
  T* weight_hr = nullptr;  // [P, H] or null
  // Of layer normalisation, all or none:
  T* weight_norm_ih = nullptr;  // [G*H]
  T* weight_norm_hh = nullptr;  // [G*H]
  T* weight_norm_c = nullptr;   // [H]
  T* bias_norm_c = nullptr;     // [H]
};

/// What a thread of a team throws when it cannot go on, because another one has thrown something.
struct Stopped {};

/// Runs fn(context, 0) .. fn(context, tasks - 1), on whatever threads there are. What one of them throws is thrown
/// here, once all have ended.
struct Executor {
  int threads = 1;
  void (*run)(int64_t tasks, void (*fn)(void*, int64_t), void* context) = nullptr;
  /// Runs fn(context, i, n) for i = 0 .. n - 1 on n threads at the same time, which may wait for each other; n is what
  /// could be had of the `threads` wished for. Of what they throw, Stopped is not thrown on. Null: cannot.
  void (*run_team)(int threads, void (*fn)(void*, int, int), void* context) = nullptr;
  /// Whether the threads that have run something wait for more without falling asleep, for some milliseconds.
  bool waits_actively = false;
  /// Whether what one thread has written takes long to come to another. Asks threads, so that they had better be awake.
  /// Null: unknown.
  bool (*are_far)() = nullptr;
};

struct Sizes {
  int64_t input = 0;   // I
  int64_t hidden = 0;  // H
  int64_t proj = 0;    // P where projected, else 0
  int directions = 1;  // D

  int64_t output() const { return proj ? proj : hidden; }
  /// Numbers of weight_hh.
  int64_t recurrent(int gates) const { return gates * hidden * output(); }
  /// Hidden units are stored in padded rows, so that every gate starts at a vector boundary.
  int64_t padded() const { return padded(hidden); }
  static int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }
};

/// Values of each row kept for backward, per hidden unit.
int saved_values(CellKind cell, bool projected, Variant variant);

/// Of a variant; all may be null, nothing is differentiated with respect to them.
template <class T>
struct Masks {
  const T* hidden = nullptr;    // [D, N, P]: factors of h before the recurrent product
  Sequence<const T> zoneout_h;  // (.., D*P): the share of h and c that stays what it was before the timestep
  Sequence<const T> zoneout_c;  // (.., D*H)
};

/// One direction's weights rearranged for the forward pass, by and for the instruction set in use.
struct PackedWeights {
  virtual ~PackedWeights() = default;
};

/// How many timesteps of a layer's output are there, for the layer above it that runs at the same time.
struct alignas(64) Progress {
  int64_t steps = 0;
};

template <class S>
struct ForwardArgs {
  CellKind cell;
  Sizes sizes;
  Layout layout;
  Sequence<const S> input;      // (.., I)
  Sequence<const bool> resets;  // (..): a sequence of its own begins here; data may be null
  const S* h_0 = nullptr;       // [D, N, P], null: zeros
  const S* c_0 = nullptr;       // [D, N, H], null: zeros
  Weights<const S> weights[2];
  const PackedWeights* packed[2] = {};  // of these very weights; null: the call sees to that, if it pays
  Sequence<S> output;                   // (.., D*P)
  Sequence<S> cells;                    // (.., D*H), data may be null
  S* h_n = nullptr;                     // [D, N, P]
  S* c_n = nullptr;                     // [D, N, H], of a cell with a cell state
  // [D, T, saved_values, padded H], null: nothing is kept. Of few units nothing is written there.
  Compute<S>* saved = nullptr;
  bool trains = false;  // backward will read what the call writes, even if nothing is kept
  Variant variant = Variant::kPlain;
  Masks<S> masks;
  const Progress* below = nullptr;  // of the layer whose output is the input; null: all of it is there
  Progress* progress = nullptr;     // of this layer, null: nobody asks
};

template <class S>
struct BackwardArgs {
  CellKind cell;
  Sizes sizes;
  Layout layout;
  Sequence<const S> input;
  Sequence<const bool> resets;
  const S* h_0 = nullptr;
  const S* c_0 = nullptr;
  Weights<const S> weights[2];
  Sequence<const S> output;
  const Compute<S>* saved = nullptr;
  Sequence<const S> grad_output;  // data may be null: zeros, as in the following three
  Sequence<const S> grad_cells;
  const S* grad_h_n = nullptr;
  const S* grad_c_n = nullptr;
  Sequence<void> grad_input;  // of Compute<S>, but see below; data may be null: not wanted, as in all that follow
  Compute<S>* grad_h_0 = nullptr;
  Compute<S>* grad_c_0 = nullptr;
  Weights<void> grad_weights[2];  // of Compute<S>, but see below
  // The batch is so many groups of equally many entries, each with weight gradients of its own, one group's after the
  // other's; 0: all have the same. Of plain layers without projection that are not packed.
  int64_t groups = 0;
  Variant variant = Variant::kPlain;
  Masks<S> masks;
  // Of a layer of 16 bits, what narrow_backward() says:
  Storage narrow = Storage::kComputed;                // which they are
  const void *narrow_ih[2] = {}, *narrow_hh[2] = {};  // weights as they are stored, in the place of those above
  bool narrow_grads = false;                          // gradients of weights are stored so as well
  bool narrow_grad_input = false;                     // and that of the input

  Storage grad_storage() const { return narrow_grads ? narrow : Storage::kComputed; }
  Storage grad_input_storage() const { return narrow_grad_input ? narrow : Storage::kComputed; }
};

/// Where a plain layer without projection is differentiated, in which direction, and what comes of it.
template <class T>
struct TangentArgs {
  BackwardArgs<T> values;    // but for `output` and `saved`, and without anything that is wanted
  BackwardArgs<T> tangents;  // of these, null: zeros; and which gradients' tangents are wanted
  Sequence<T> output;        // what follows are tangents of results; data may be null: not wanted, as in all of them
  Sequence<T> cells;
  T* h_n = nullptr;
  T* c_n = nullptr;
  bool backward = false;  // whether a gradient's tangent is wanted
};

/// The instruction set whose kernels run: "baseline", "avx2", "avx512" or "amx", which is avx512 with tiles for
/// bfloat16 and 8 bits; the best the processor has.
const char* capability();

/// The best one for this processor if the build left its kernels out, else null.
const char* missing_capability();

/// Whether those are "amx" and Linux grants this process the tiles, which it is asked for the first time.
bool multiplies_tiles();

/// Choose another; false where the processor or the build lacks it.
bool set_capability(const char* name);

/// What processors that run the same kernels do better one way or the other. Results do not depend on it.
struct Tuning {
  // 1 or 2 multiply-adds that begin in a cycle: how wide tiles of side.inl are, which steps join, which take gradients
  // of inputs along
  int vectors_a_cycle;
  bool takes_along;       // steps of one sequence compute tiles of other products meanwhile, see row.inl
  int64_t fetched_bytes;  // of a product's weights, beyond which it asks for each panel before it needs it
  bool joins_far;         // steps of an LSTM or GRU with weights of more than 2 MiB may join, see inputs.inl
  int64_t far_bytes;   // of weights, from which the input gates of one sequence are computed for more steps at a time
  int64_t near_bytes;  // of weights, up to which steps of 8 rows compute their input gates themselves
};

/// As measured on processors of its kind.
const Tuning& tuning();

/// Choose otherwise, for tests; while nothing computes.
void set_tuning(const Tuning& tuning);

/// Whether the instruction set in use multiplies BFloat16.
bool computes_bfloat16();

/// Whether layer_forward takes such a layer as it is stored: all but 16 bits, and these where the instruction set
/// multiplies them, or where it widens them and each weight is used for few rows only. Else, and for layer_backward
/// of 16 bits that it does not multiply, they must be converted to float, but see narrow_backward().
template <class S>
bool computes_forward(CellKind cell, const Sizes& sizes, const Layout& layout);

/// What layer_backward of a layer of 16 bits takes and gives as it is stored, as that is faster; see BackwardArgs.
struct Narrow {
  bool weight_ih = false, weight_hh = false;  // though all else has been converted to float
  bool grads = false;                         // of weights and biases
  bool grad_input = false;
};
template <class S>
Narrow narrow_backward(CellKind cell, Variant variant, const Sizes& sizes, const Layout& layout);

/// Whether a layer has so few units and so many sequences that vectors of sequences are faster than vectors of units.
/// 16 bits of such are converted; they use no packed weights and no pipeline, write nothing for backward, and read all
/// weights and biases there.
template <class S>
bool has_few_units(CellKind cell, Variant variant, const Sizes& sizes, const Layout& layout);

/// Let layer_forward and layer_backward take all layers of 16 bits that they can widen, for tests; else those that are
/// faster so.
void widen_always(bool always);

/// Whether a layer's forward call uses packed weights.
template <class S>
bool uses_packed_weights(const Sizes& sizes, const Layout& layout);

/// Whether it is faster with those that a call before it has packed, if they must be read once more to see whether they
/// have changed. (float and double)
template <class S>
bool reuses_packed_weights(CellKind cell, const Sizes& sizes, const Layout& layout);

template <class S>
std::unique_ptr<PackedWeights> pack_weights(CellKind cell, const Sizes& sizes, const Weights<const S>& weights);

/// A digest of memory, to notice that weights have changed. Any change of a single number changes it.
struct Digest {
  uint64_t sums[16] = {};
  bool operator==(const Digest&) const = default;
};
void add_to_digest(Digest* digest, const void* data, size_t bytes);

/// Fills out [size] with `value` with probability p, else 0, a function of the seed alone. T is float or double.
template <class T>
void random_mask(uint64_t seed, double p, T value, T* out, int64_t size);

template <class S>
void layer_forward(const ForwardArgs<S>& args, const Executor& executor);

/// Whether the layers of a stack, each like this one, should run at the same time, each some timesteps behind the one
/// below it. `trains`: backward may follow.
template <class S>
bool pipelines(CellKind cell, const Sizes& sizes, const Layout& layout, int64_t layers, bool trains,
               const Executor& executor);

/// A stack of layers of one direction, the bits of layer_forward for one after the other: the input of each is the
/// output of the one before it. Sets their `below` and `progress`.
template <class S>
void stack_forward(ForwardArgs<S>* layers, int count, const Executor& executor);
template <class S>
void layer_backward(const BackwardArgs<S>& args, const Executor& executor);

/// The derivative of all results, and of the gradients that layer_backward gives, in the direction of the tangents.
template <class T>
void layer_tangent(const TangentArgs<T>& args, const Executor& executor);

}  // namespace rnn_ext::cpu
