// The kernel for weights of 8 bits, for x86-64 processors with AVX-512 (F, BW, DQ, VL, VNNI) and AMX's products of
// tiles of 8 bits.
#include "cpu/kernels.h"

#if defined(RNN_EXT_X86_KERNELS)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")
#endif

#define RNN_EXT_ISA avx512_amx_int8
#define RNN_EXT_QUANTIZED
#define RNN_EXT_AMX
#define RNN_EXT_VNNI
#define RNN_EXT_VECTOR_BYTES 64
#define RNN_EXT_VECTOR_REGISTERS 32

#include "cpu/kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
