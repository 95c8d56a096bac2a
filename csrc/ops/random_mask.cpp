// Masks for dropout and zoneout on the CPU, many times faster than torch draws them. The seed is a tensor, so that
// whoever handles torch's generator (vmap, compile, checkpoint) handles these too.
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/randint.h>
#include <torch/library.h>

#include <limits>

#include "cpu/layer.h"
#include "ops/layer.h"

namespace rnn_ext::ops {
namespace {

at::Tensor random_mask_cpu(const at::Tensor& seed, at::IntArrayRef size, double p, double value, at::ScalarType dtype) {
  TORCH_CHECK(seed.dim() == 0 && seed.scalar_type() == at::kLong, "expected seed to be one number of int64, got ",
              seed.scalar_type(), seed.sizes());
  TORCH_CHECK_VALUE(p >= 0 && p <= 1, "expected p to be a probability, got ", p);
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kDouble, "expected dtype to be float32 or float64, got ", dtype);
  at::Tensor mask = at::detail::empty_cpu(size, seed.options().dtype(dtype));
  const auto fill = [&](auto value) {
    using T = decltype(value);
    cpu::random_mask(uint64_t(*seed.const_data_ptr<int64_t>()), p, value, mask.mutable_data_ptr<T>(), mask.numel());
  };
  dtype == at::kFloat ? fill(float(value)) : fill(value);
  return mask;
}

TORCH_LIBRARY_IMPL(rnn_ext, CPU, m) { m.impl("random_mask", &random_mask_cpu); }

}  // namespace

at::Tensor draw_mask(c10::SymIntArrayRef size, double p, double value, bool wide) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("rnn_ext::random_mask", "")
          .typed<at::Tensor(const at::Tensor&, c10::SymIntArrayRef, double, double, at::ScalarType)>();
  constexpr int64_t most = std::numeric_limits<int64_t>::max();
  const at::Tensor seed = at::randint(-most - 1, most, {}, at::TensorOptions(at::kCPU).dtype(at::kLong));
  return op.call(seed, size, p, value, wide ? at::kDouble : at::kFloat);
}

}  // namespace rnn_ext::ops
