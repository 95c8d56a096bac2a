// csrc/ops/cuda_layer.cpp over the emulated kernels, for CPU tensors: while it is switched on, `rnn_ext::layer` and its
// backward run it instead of the CPU kernels.
#include <c10/core/DispatchKey.h>
#include <torch/library.h>

#include <memory>

#include "ops/cuda_layer.h"

namespace rnn_ext::ops {

void* kernel_stream(c10::Device device) {
  TORCH_CHECK(device.is_cpu(), "expected tensors on the CPU, which the emulator takes for its GPU, got ", device);
  RnnExtError error{};
  check_launch(rnn_ext_cuda_set_device(0, &error), error);
  return nullptr;
}

}  // namespace rnn_ext::ops

extern "C" void rnn_ext_emulate(int on) {
  static std::unique_ptr<torch::Library> library;  // as long as it lives, its kernels are in front of the CPU's
  library.reset();
  if (!on) return;
  library =
      std::make_unique<torch::Library>(torch::Library::IMPL, "rnn_ext", c10::DispatchKey::CPU, __FILE__, __LINE__);
  rnn_ext::ops::implement_cuda_layer(*library);
}

extern "C" int rnn_ext_emulate_kernel(const char* name) { return rnn_ext::ops::force_cuda_kernel(name) ? 1 : 0; }
