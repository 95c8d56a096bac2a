// What every cell header shares: the host/device marker, and the contract a cell fulfils.
//
// A cell is a struct of constants and two static functions, generic in the value type V (float, double, a SIMD vector
// of either, several vectors, or a value with a tangent), which has + - *, 1 - V and V{} for zero, and in M, the set of
// elementary functions for that type:
//
//   M::sigmoid(V), M::tanh(V), M::relu(V), M::relu_backward(V dh, V h)     the last: 0 where h <= 0, else dh
//
//   kName         the name used in schemas, tests and `explain()`
//   kGates        G, gates that have a recurrent product
//   kSplit        1 where the last gate needs the input part kept apart from the recurrent part (GRU's n), else 0
//   kSaved        S, values per unit and timestep kept for backward besides the output
//   kGradGates    how many gate gradients backward gives per unit: G, or more where input and hidden parts differ
//   kHasCell      whether there is a cell state c beside h
//   kSavedCell    if so, which saved value is c
//   kDirectCarry  whether dh reaches the previous timestep by a way that is not the recurrent product
//   ih_slot(g), hh_slot(g)   which gate gradient belongs to row block g of weight_ih and of weight_hh
//
//   forward:  gates[g] = igates[g] + hgates[g] for the first G - kSplit gates, hgates[g] (with bias_hh) for the rest;
//             split[j] = igates[G - kSplit + j] (with bias_ih).  Returns h, updates c, fills saved.
//   backward: dh, dc are the whole gradients of this timestep's h and c.  Fills dgates, turns dc into the gradient of
//             c_prev, returns the direct part of the gradient of h_prev (zero unless kDirectCarry).
//
// Equations: the documentation of torch.nn.RNN, LSTM and GRU; gate order is torch's.
#pragma once

#if defined(__CUDACC__)
#define RNN_EXT_HD __host__ __device__ __forceinline__
#else
#define RNN_EXT_HD inline __attribute__((always_inline))
#endif
