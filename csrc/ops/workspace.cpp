#include "ops/workspace.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#include "cpu/memory.h"

namespace rnn_ext::ops {
namespace {

void give_back(void* data) {
  c10::profiledCPUMemoryReporter().Delete(data);
  cpu::give_memory(data);
}

class Allocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* data = cpu::take_memory(bytes);
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, data, &give_back, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

// Never destroyed: tensors may be resized while the process ends.
Allocator& allocator = *new Allocator;

}  // namespace

at::Tensor empty(at::IntArrayRef size, const at::TensorOptions& options) {
  size_t bytes = options.dtype().itemsize();
  for (const int64_t n : size) bytes *= size_t(n);
  if (bytes < cpu::kPooled) return at::detail::empty_cpu(size, options);
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   c10::typeMetaToScalarType(options.dtype()), std::nullopt);
}

}  // namespace rnn_ext::ops
