"""Where are the LSTM's cell states of every timestep? torch.nn returns the last one only; ask for all of them."""

import torch
from torch import nn

import rnn_ext

torch.manual_seed(0)
x = torch.randn(6, 2, 3)  # (L, N, I)
lstm = rnn_ext.LSTM(3, 5)
output, (h_n, c_n), cells = lstm(x, return_cell_states=True)

cell = nn.LSTMCell(3, 5)  # a timestep at a time
cell.load_state_dict({name.removesuffix("_l0"): value for name, value in lstm.state_dict().items()})
h, c = torch.zeros(2, 5), torch.zeros(2, 5)
for t in range(len(x)):
    h, c = cell(x[t], (h, c))
    torch.testing.assert_close(output[t], h)
    torch.testing.assert_close(cells[t], c)
torch.testing.assert_close(cells[-1], c_n[0])
print("cell states", tuple(cells.shape), "agree with nn.LSTMCell at every timestep")
