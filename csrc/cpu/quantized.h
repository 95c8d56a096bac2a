// Inference with weights of 8 bits: the interface between csrc/ops and the kernel.
#pragma once

#include "cpu/layer.h"

namespace rnn_ext::cpu {

/// Units that lie side by side in a weight of 8 bits.
constexpr int kQuantizedBlock = 16;

/// Inputs, units and projected features of a layer at most: of so many the largest sums leave an activation 16 steps.
constexpr int64_t kMostQuantized = int64_t(1) << 20;

/// The weights of one direction in 8 bits, -127 to 127, each row with a scale. A weight [G, units, depth] lies as
/// [units / kQuantizedBlock, depth / pack, G, kQuantizedBlock, pack], rounded up, with zeros where there is nothing: so
/// every instruction set reads it, and nothing is packed.
struct QuantizedWeights {
  const int8_t* weight_ih = nullptr;
  const int8_t* weight_hh = nullptr;
  const float* factors = nullptr;     // [4, G, H]: scales of weight_ih and of weight_hh, bias_ih, bias_hh
  const int8_t* weight_hr = nullptr;  // with G = 1; or null
  const float* scale_hr = nullptr;    // [P]
};

/// A call of a plain layer, whose `weights` nobody looks at, with these instead.
struct QuantizedArgs {
  ForwardArgs<float> call;
  QuantizedWeights weights[2];
  int pack = 2;  // 2: inputs and h are rounded to 16 bits; 4: to 8 bits
};

/// Let it use instructions that multiply integers and add their products, where the processor has them (the default),
/// or not, for tests. Results are the same.
void multiply_integers(bool allowed);

/// The forward pass. Its sums are of integers; see quantized.inl for what is rounded.
void quantized_forward(const QuantizedArgs& args, const Executor& executor);

}  // namespace rnn_ext::cpu
