// The shortest way from a module to its op.
#pragma once

#include <Python.h>

namespace rnn_ext::ops {

/// plain_forward(vars(module), input, hx, lengths, resets, return_cell_states), a method for PyModule_AddFunctions:
/// what forward of rnn_ext.RNN, LSTM or GRU returns on the CPU, for a padded batch, a PackedSequence or one sequence;
/// None for what has to be refused, and what Python wants to see: subclasses of Tensor, and function modes
/// (torch.device as a context is one). A call of one timestep takes a third to a half as long as through
/// rnn_ext/functional.py. plain_step(vars(module), input, state), the same of step, and plain_cell(vars(cell), mode,
/// input, hx) of a cell. And quantized_forward, plain_forward of a module of rnn_ext.quantized.
extern PyMethodDef plain_forward[];

}  // namespace rnn_ext::ops
