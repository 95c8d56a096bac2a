// The list of cells, whose order is that of every enumeration of cells: the type, and what torch.nn's modules call it.
#pragma once

#define RNN_EXT_FOR_EACH_CELL(X) \
  X(RnnTanh, RNN_TANH)           \
  X(RnnRelu, RNN_RELU)           \
  X(Gru, GRU)                    \
  X(Lstm, LSTM)
