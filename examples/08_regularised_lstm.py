"""Must I write the loop over timesteps for layer normalisation, zoneout, recurrent dropout or DropConnect?"""

import torch
from torch.nn.functional import layer_norm

import rnn_ext

torch.manual_seed(0)
x = torch.randn(20, 4, 8)  # (L, N, I)
lstm = rnn_ext.LSTM(8, 16, layer_norm=True)

# What one writes by hand, a timestep at a time.
w = dict(lstm.named_parameters())
h, c = torch.zeros(4, 16), torch.zeros(4, 16)
output, _ = lstm(x)
for t in range(len(x)):
    gates = layer_norm(x[t] @ w["weight_ih_l0"].T, [64], w["weight_norm_ih_l0"]) + w["bias_ih_l0"]
    gates = gates + layer_norm(h @ w["weight_hh_l0"].T, [64], w["weight_norm_hh_l0"]) + w["bias_hh_l0"]
    i, f, g, o = gates.chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * layer_norm(c, [16], w["weight_norm_c_l0"], w["bias_norm_c_l0"]).tanh()
    torch.testing.assert_close(output[t], h)
print("layer_norm=True agrees with the loop by hand")

# The rest are options too, in any combination, and can be changed while training.
lstm = rnn_ext.LSTM(8, 16, 2, layer_norm=True, zoneout=(0.05, 0.1), recurrent_dropout=0.2, weight_dropout=0.3)
before = lstm.weight_hh_l0.clone()
first, _ = lstm(x)
second, _ = lstm(x)
assert not torch.equal(first, second)  # masks are drawn anew at each call ...
for _ in range(2):
    torch.manual_seed(1)
    first, second = second, lstm(x)[0]
assert torch.equal(first, second)  # ... from torch's generator
second.sum().backward()
assert torch.equal(lstm.weight_hh_l0, before)  # DropConnect leaves the parameter alone
lstm.eval()
assert torch.equal(lstm(x)[0], lstm(x)[0])  # in eval nothing is drawn
print(lstm)
