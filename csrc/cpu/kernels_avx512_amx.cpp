// Kernels for x86-64 processors with AVX-512 (F, BW, DQ, VL) and AMX's products of tiles of bfloat16.
#include "cpu/kernels.h"

#if defined(RNN_EXT_X86_KERNELS)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#endif

#define RNN_EXT_ISA avx512_amx
#define RNN_EXT_BFLOAT16
#define RNN_EXT_AMX
#define RNN_EXT_VECTOR_BYTES 64
#define RNN_EXT_VECTOR_REGISTERS 32

#include "cpu/kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
