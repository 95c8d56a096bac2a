// The kernels for few units and many sequences.
#define RNN_EXT_FEW_UNITS
#include "cpu/kernels_avx512.cpp"
