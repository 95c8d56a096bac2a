// The kernels for double: a file of its own, as is that of 16 bits.
#define RNN_EXT_FLOAT64
#include "cpu/kernels_avx2.cpp"
