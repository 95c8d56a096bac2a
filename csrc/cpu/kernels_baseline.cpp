// Kernels for any processor of the architecture: SSE2 on x86-64, NEON on aarch64.
#include "cpu/kernels.h"

#define RNN_EXT_ISA baseline
#define RNN_EXT_VECTOR_BYTES 16
#if defined(__aarch64__)
#define RNN_EXT_VECTOR_REGISTERS 32
#define RNN_EXT_WIDENS_FLOAT16
#else
#define RNN_EXT_VECTOR_REGISTERS 15  // of 16: a product needs one before it is added
#endif

#include "cpu/kernels.inl"
