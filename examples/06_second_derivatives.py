"""Can I differentiate twice (gradient penalty, MAML, Hessian products)? Yes, on every device, in train and eval mode.

Here: a penalty on the gradient of the output with respect to the input, as in WGAN-GP.
"""

import torch

import rnn_ext

torch.manual_seed(0)
critic = rnn_ext.GRU(4, 8, batch_first=True).double()
x = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)


def penalty(x):
    output, _ = critic(x)
    (grad,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    return (grad.flatten(1).norm(dim=1) - 1).square().mean()


loss = penalty(x)
loss.backward()

# The penalty's own gradient, against finite differences in one direction.
direction = torch.randn_like(x)
step = 1e-6
numeric = (penalty(x + step * direction) - penalty(x - step * direction)) / (2 * step)
torch.testing.assert_close((x.grad * direction).sum(), numeric.detach(), rtol=1e-6, atol=1e-8)
assert all(p.grad is not None for p in critic.parameters())
print(f"penalty {loss.item():.4f}, directional derivative {numeric.item():+.6f} by both ways")
