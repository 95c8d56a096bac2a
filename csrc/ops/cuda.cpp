// The layer op for the CUDA dispatch key. No header of CUDA or of torch's CUDA build: the same library loads beside a
// torch with or without CUDA, and reaches the current stream through c10's device-independent interface.
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "ops/cuda_layer.h"

namespace rnn_ext::ops {

void* kernel_stream(c10::Device device) {
  TORCH_CHECK(device.is_cuda(), "expected tensors on a CUDA device, got ", device);
  RnnExtError error{};
  // The kernels' CUDA runtime is linked statically and has an idea of its own of the current device.
  check_launch(rnn_ext_cuda_set_device(device.index(), &error), error);
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

namespace {

TORCH_LIBRARY_IMPL(rnn_ext, CUDA, m) { implement_cuda_layer(m); }

}  // namespace
}  // namespace rnn_ext::ops
