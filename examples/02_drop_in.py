"""How do I switch an existing model over, and back? Change an import, or convert the model that you have."""

import copy

import torch
from torch import nn

import rnn_ext

torch.manual_seed(0)
x = torch.randn(4, 10, 8)  # (N, L, I)

# 1. A new model: rnn_ext.LSTM where it said nn.LSTM. Same arguments, same parameters, same state_dict.
theirs = nn.LSTM(8, 16, num_layers=2, batch_first=True, bidirectional=True)
ours = rnn_ext.LSTM(8, 16, num_layers=2, batch_first=True, bidirectional=True)
ours.load_state_dict(theirs.state_dict())
torch.testing.assert_close(ours(x), theirs(x))


# 2. A model that exists, with layers somewhere inside: it keeps its Parameters, so optimizers go on working.
class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(8, 16, batch_first=True)
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(self.rnn(x)[0])


model = Tagger()
expected = model(x)
weight = model.rnn.weight_ih_l0
rnn_ext.convert(model)
assert isinstance(model.rnn, rnn_ext.GRU) and model.rnn.weight_ih_l0 is weight
torch.testing.assert_close(model(x), expected)
print("who runs it:", rnn_ext.explain(model.rnn, x))

# 3. Back, for what insists on torch.nn's classes (quantization, TorchScript), or only to torch's kernels.
rnn_ext.set_backend(model, "native")
assert rnn_ext.explain(model.rnn, x).backend == "native"
plain = rnn_ext.to_native(copy.deepcopy(model))
assert type(plain.rnn) is nn.GRU
torch.testing.assert_close(plain(x), expected)
print("the same outputs all along")
