// Large memory for one call after the other.
#pragma once

#include <ATen/core/Tensor.h>

namespace rnn_ext::ops {

/// at::empty on the CPU for what forward keeps for backward. Large memory comes fresh from the system at each call, and
/// faulting it in takes up to a tenth of a training step: when the tensor dies, its memory waits for the next one, up
/// to 128 MiB in all.
at::Tensor workspace(at::IntArrayRef size, const at::TensorOptions& options);

/// Asks for huge pages where there is enough to fill some: faulting in pages of 4 KiB can take a third of the time.
void prefer_huge_pages(void* data, size_t bytes);

/// Bytes that wait.
int64_t idle_workspace_bytes();
void drop_idle_workspaces();

}  // namespace rnn_ext::ops
