// The kernel for weights of 8 bits, for aarch64 processors that multiply integers of 8 bits and add their products.
#include "cpu/kernels.h"

#if defined(__aarch64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#define RNN_EXT_ISA neon_dot
#define RNN_EXT_QUANTIZED
#define RNN_EXT_DOT_PRODUCT
#define RNN_EXT_VECTOR_BYTES 16
#define RNN_EXT_VECTOR_REGISTERS 32

#include "cpu/kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
