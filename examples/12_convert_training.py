"""I have a model, a training loop and a checkpoint. What must I change? One line: rnn_ext.convert.

It is the same with Lightning: convert the LightningModule before (or in the midst of) Trainer.fit.
"""

import copy

import torch
from torch import nn

import rnn_ext

torch.manual_seed(0)
x = torch.randn(64, 20, 4)
y = x.cumsum(1).tanh()


class Model(nn.Module):  # somebody else's code, which knows nothing of rnn_ext
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(4, 32, num_layers=2, batch_first=True)
        self.fc = nn.Linear(32, 4)

    def forward(self, x):
        return self.fc(self.rnn(x)[0])


def train(model, optimizer):  # and this neither
    losses = []
    for _ in range(20):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


theirs = Model()
ours = copy.deepcopy(theirs)
optimizer = torch.optim.Adam(ours.parameters(), lr=1e-2)

rnn_ext.convert(ours)  # the one line: the optimizer's parameters are still the model's

expected = train(theirs, torch.optim.Adam(theirs.parameters(), lr=1e-2))
losses = train(ours, optimizer)
torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-5)
theirs.load_state_dict(ours.state_dict())  # checkpoints fit both
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, with torch.nn's layers {expected[0]:.3f} -> {expected[-1]:.3f}")
