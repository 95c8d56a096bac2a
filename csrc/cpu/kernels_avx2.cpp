// Kernels for x86-64 processors with AVX2, FMA and F16C.
#include "cpu/kernels.h"

#if defined(RNN_EXT_X86_KERNELS)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define RNN_EXT_ISA avx2
#define RNN_EXT_VECTOR_BYTES 32
#define RNN_EXT_VECTOR_REGISTERS 16
#define RNN_EXT_WIDENS_FLOAT16

#include "cpu/kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
