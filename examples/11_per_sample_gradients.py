"""Differentially private training, as Opacus does it: a gradient for each sample, clipped, summed, and noise added.

torch.func gives the gradients in one call, through the layer as through any other.
"""

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import rnn_ext

torch.manual_seed(0)
CLIP, NOISE, RATE = 1.0, 0.5, 1.0

x = torch.randn(256, 8, 3)  # (N, L, I)
y = (x[..., 0].sum(1) > 0).long()  # is the first feature's sum positive?


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = rnn_ext.GRU(3, 12, batch_first=True)
        self.fc = nn.Linear(12, 2)

    def forward(self, x):
        return self.fc(self.rnn(x)[1][-1])


model = Classifier()
parameters = {name: p.detach() for name, p in model.named_parameters()}


def loss(parameters, x, y):
    return nn.functional.cross_entropy(functional_call(model, parameters, (x[None],)), y[None])


per_sample = vmap(grad(loss), in_dims=(None, 0, 0))

# The same as a loop over the samples.
fast = per_sample(parameters, x[:8], y[:8])
for n in range(8):
    torch.testing.assert_close({k: g[n] for k, g in fast.items()}, grad(loss)(parameters, x[n], y[n]))

for _epoch in range(15):
    for batch in torch.randperm(len(x)).split(64):
        grads = per_sample(parameters, x[batch], y[batch])
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)
        factor = (CLIP / norms).clamp(max=1)  # no sample moves the parameters by more than CLIP
        for name, g in grads.items():
            clipped = torch.einsum("n,n...->...", factor, g)
            noise = NOISE * CLIP * torch.randn_like(clipped)
            parameters[name] = parameters[name] - RATE * (clipped + noise) / len(batch)

correct = (functional_call(model, parameters, (x,)).argmax(1) == y).float().mean().item()
print(f"gradients as a loop gives them; {correct:.0%} correct after private training")
assert correct > 0.8
