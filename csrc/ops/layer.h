// The layer op: what its kernels for every dispatch key are given, and the checks.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/FunctionRef.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "cpu/layer.h"

namespace rnn_ext::ops {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalTensors = c10::List<OptionalTensor>;

inline bool any_mask(const OptionalTensors& masks) {
  for (size_t i = 0; i < masks.size(); ++i)
    if (masks.get(i).has_value()) return true;
  return false;
}

/// What selects the computation besides the tensors.
struct LayerOptions {
  std::string_view cell;
  bool bidirectional;
  bool batch_first;
  bool cell_states;
};

using LayerResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using LayerGrads = std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>>;

/// The `tensors` of layer_tangent, the first eight arguments of layer_backward; RuntimeError unless input and weights
/// are there.
struct TangentTensors {
  enum { kInput = 4, kFirstWeight = 7 };
  explicit TangentTensors(const OptionalTensors& tensors);

  OptionalTensor grad_output, grad_h_n, grad_c_n, grad_cells;
  at::Tensor input;
  OptionalTensor h_0, c_0;
  std::vector<at::Tensor> weights;
};

/// What a call of the op is given, forward and, besides the gradients, backward: for the time of the call.
struct LayerInputs {
  const at::Tensor& input;
  const OptionalTensor &h_0, &c_0;
  at::TensorList weights;
  const OptionalTensor &batch_sizes, &lengths, &resets;
  const OptionalTensors& masks;
  LayerOptions options;
};

/// The gradients that backward is given, and the results of forward.
struct LayerCotangents {
  const OptionalTensor &output, &h_n, &c_n, &cells;
};

/// Autograd's record of a forward call whose results compute() gives, `saved` among them unless `recompute`. Some
/// of the tensors require a gradient; tangents are not its business.
LayerResult record_layer(const LayerInputs& in, bool save, bool recompute, c10::function_ref<LayerResult()> compute);

/// A cell's facts by its name in the schema; ValueError for any other name.
struct CellInfo {
  cpu::CellKind kind;
  int gates;
  bool has_cell;
};
CellInfo cell_info(std::string_view name);

/// RuntimeError unless it has this size.
void check_sizes(const at::Tensor& tensor, at::IntArrayRef expected, const char* name);

/// RuntimeError if its storage has been resized to less than it takes, as is done to free memory between uses.
void check_memory(const at::Tensor& tensor, const char* name);

/// The checked shape of a call. Raises what torch.nn raises, with the shape found and the shape expected.
struct LayerShape {
  enum Mask { kHiddenMask, kZoneoutH, kZoneoutC, kMasks };
  explicit LayerShape(const LayerInputs& in);
  /// Of weights that somebody else has read and checked.
  LayerShape(const LayerInputs& in, const cpu::Sizes& sizes);

  CellInfo cell;
  cpu::Sizes sizes;
  int weights_per_direction = 0;
  bool bias = false;
  cpu::Variant variant = cpu::Variant::kPlain;
  bool is_basic() const { return variant == cpu::Variant::kPlain && sizes.proj == 0; }
  int64_t length = 0;  // L
  int64_t batch = 0;   // N
  int64_t rows = 0;    // (timestep, entry) pairs that exist; all of them where the lengths' values are not known

  std::vector<int64_t> batch_sizes;  // [L]
  std::vector<int64_t> offsets;      // [L]
  std::vector<int64_t> order;        // [N], or empty
  bool packed = false;
  bool batch_first = false;

  /// Checks what backward is given besides: gradients like the results they belong to; output and saved (so many values
  /// of a dtype) as forward returns them; which gradients of the input, the states and the weights it is asked for; and
  /// the groups of batch entries that have weight gradients of their own, 0: none.
  void check_backward(const LayerCotangents& grads, const LayerInputs& in, const at::Tensor& output,
                      const at::Tensor& saved, at::ScalarType saved_dtype, int64_t saved_numel,
                      const c10::List<bool>& output_mask, int64_t groups) const;

  /// The same of what layer_tangent is given.
  void check_tangents(const OptionalTensors& tangents, const OptionalTensors& tensors, const TangentTensors& given,
                      const c10::List<bool>& output_mask) const;

  cpu::Layout layout() const;
  /// Sizes of a sequence of `features` in the caller's layout.
  std::vector<int64_t> sequence_sizes(int64_t features) const;
  enum Weight {
    kWeightIh,
    kWeightHh,
    kBiasIh,
    kBiasHh,
    kWeightHr,
    kWeightNormIh,
    kWeightNormHh,
    kWeightNormC,
    kBiasNormC,
    kWeights
  };
  static const char* name_of(Weight weight);
  /// Position of a direction's weight in the flat list; -1: it has none.
  int index(int direction, Weight weight) const;

 private:
  void read_weights(const LayerInputs& in);
  void read_sequences(const LayerInputs& in);
  void check_cotangents(const LayerCotangents& grads, const at::Tensor& input) const;
  void order_by(const at::Tensor& lengths);
};

/// rnn_ext::random_mask, in float64 or float32, with a seed from torch's generator on the CPU.
at::Tensor draw_mask(c10::SymIntArrayRef size, double p, double value, bool wide);

}  // namespace rnn_ext::ops
