// The table of kernels that each instruction set fills, and every library header the kernels use.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/layer.h"

namespace rnn_ext::cpu {

/// Throws, with the number of bytes that could not be had.
[[noreturn]] void out_of_memory(size_t bytes);

struct Kernels {
  void (*forward_float)(const ForwardArgs<float>&, const Executor&);
  void (*forward_double)(const ForwardArgs<double>&, const Executor&);
  void (*backward_float)(const BackwardArgs<float>&, const Executor&);
  void (*backward_double)(const BackwardArgs<double>&, const Executor&);
};

namespace baseline {
extern const Kernels kKernels;
}
#if defined(__x86_64__)
#define RNN_EXT_X86_KERNELS 1
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#endif

}  // namespace rnn_ext::cpu
