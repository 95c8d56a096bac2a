// How launch.cu and dispatch.h reach the launchers that cluster_<dtype>.cu instantiate.
#pragma once

#include "cuda/launch.h"
#include "cuda/shim.h"

namespace rnn_ext::cuda {

// What the registers of the largest clusters hold.
constexpr int64_t max_cluster_hidden(RnnExtCell cell, RnnExtDtype dtype) {
  if (dtype == RNN_EXT_FLOAT64) return 0;
  return dtype == RNN_EXT_FLOAT32 && (cell == RNN_EXT_GRU || cell == RNN_EXT_LSTM) ? 384 : 512;
}
// Blocks of a GPU with clusters can have so much shared memory (compute capability 9.0 and 10.0; 12.0 has clusters
// too).
inline constexpr int64_t kSharedBytesWithClusters = 227 * 1024;

// Batch rows of a cluster.
inline constexpr int64_t kClusterRows = 8;

// Blocks of a cluster: more where the weight would not fit the registers of fewer. More than 8 are not portable: a
// device may not have them.
constexpr int cluster_blocks(int gates, int64_t value_bytes, int64_t hidden) {
  if (gates == 1) return hidden <= 256 ? 4 : 8;
  if ((gates == 4 || value_bytes == 4) && hidden <= 128) return 4;
  return hidden <= (value_bytes == 4 ? 256 : 384) ? 8 : 16;
}

// Arguments have been checked; 0 or 1 as in launch.h.
template <class T>
int cluster_forward(const RnnExtForward& args, cudaStream_t stream, RnnExtError* error);
template <class T>
int cluster_backward(const RnnExtBackward& args, cudaStream_t stream, RnnExtError* error);

// Null, or why the current device cannot run the kernel.
template <class T>
const char* cluster_missing(RnnExtCell cell, int64_t hidden, bool backward);

}  // namespace rnn_ext::cuda
