// The kernels of 16 bits that are widened: a file of its own, so that both compile at the same time.
#define RNN_EXT_WIDENED
#include "cpu/kernels_avx2.cpp"
