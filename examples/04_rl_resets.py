"""Reinforcement learning: a rollout holds the ends and beginnings of several episodes. Must I loop over timesteps?

No: `resets` says where an episode begins, and the state before it is zero, forward and backward, in one call.
"""

import torch

import rnn_ext

torch.manual_seed(0)
L, N, H = 20, 6, 16  # timesteps, environments, features
x = torch.randn(L, N, 8)
resets = torch.rand(L, N) < 0.15  # True: this observation is the first of an episode
state = (torch.randn(1, N, H), torch.randn(1, N, H))  # from the rollout before
lstm = rnn_ext.LSTM(8, H)


def masked_loop():
    """What one writes with torch.nn: a call per timestep, the state multiplied by zero where an episode begins."""
    h, c = state
    outputs = []
    for t in range(L):
        keep = (~resets[t]).float().view(1, N, 1)
        output, (h, c) = lstm(x[t : t + 1], (keep * h, keep * c))
        outputs.append(output)
    return torch.cat(outputs), (h, c)


expected, expected_state = masked_loop()
output, final_state = lstm(x, state, resets=resets)
torch.testing.assert_close(output, expected)
torch.testing.assert_close(final_state, expected_state)

# The gradients agree too: nothing leaks from one episode into the one before.
expected_grads = torch.autograd.grad(expected.square().sum(), list(lstm.parameters()))
grads = torch.autograd.grad(output.square().sum(), list(lstm.parameters()))
torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-4)
print(f"{int(resets.sum())} episodes begin within {L} timesteps of {N} environments: one call, the loop's results")
