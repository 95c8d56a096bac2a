// The kernel for weights of 8 bits: a file of its own, so that both compile at the same time.
#define RNN_EXT_QUANTIZED
#include "cpu/kernels_avx512.cpp"
