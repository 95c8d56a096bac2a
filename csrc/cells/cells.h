// The list of cells. Adding one: its header, an X line here, its oracle in rnn_ext/reference.py, its module.
#pragma once

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "cells/variants.h"

#define RNN_EXT_FOR_EACH_CELL(X) \
  X(RnnTanh)                     \
  X(RnnRelu)                     \
  X(Gru)                         \
  X(Lstm)
