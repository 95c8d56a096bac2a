// The layer op over csrc/cuda, without a word on where it is registered: cuda.cpp gives it CUDA tensors,
// tests/cuda_emulator gives it CPU tensors and emulated kernels.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>
#include <torch/library.h>

#include <string>

#include "cuda/launch.h"

namespace rnn_ext::ops {

/// Implements `layer` and `layer_backward` for the library's dispatch key.
void implement_cuda_layer(torch::Library& library);

/// What differs between a GPU and the emulator: makes sure that kernels can run on tensors of this device, and gives
/// the stream that they are queued on. The device is current.
void* kernel_stream(c10::Device device);

/// One of kernel_name()'s names instead of what the dispatch table says, for tests and comparisons; "" is the table.
/// Projected layers and those with layer normalisation are always pointwise. False for another name.
bool force_cuda_kernel(const std::string& name);

const char* kernel_name(RnnExtKernel kernel);

/// ValueError for a dtype that they do not compute.
RnnExtDtype dtype_of(at::ScalarType dtype);

/// Whether torch's settings let its own GEMMs round float32 to TF32. (Context::allowTF32CuBLAS raises where only the
/// newer of the two ways to set it was used.)
bool allows_tf32();

/// RuntimeError with the launcher's words where something failed.
void check_launch(int failed, const RnnExtError& error);

}  // namespace rnn_ext::ops
