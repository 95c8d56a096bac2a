"""The first exercise: three timesteps of a tanh-RNN computed by hand, beside torch.nn.RNN and rnn_ext.RNN."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rnn_ext.modules import RNN


class Comparison(NamedTuple):
    """Outputs of the same three timesteps, each (3, 2), and the largest difference between any two of them."""

    input: Tensor
    by_hand: Tensor
    torch_nn: Tensor
    rnn_ext: Tensor
    difference: float


def unroll(rnn: nn.RNNBase, input: Tensor) -> Tensor:
    """The outputs (L, H) of a one-layer tanh-RNN for one sequence (L, I), a timestep at a time.

    h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh) with h_{-1} = 0, the equation in torch.nn.RNN's documentation.
    """
    h = input.new_zeros(rnn.hidden_size)
    outputs = []
    for x in input:
        h = torch.tanh(rnn.weight_ih_l0 @ x + rnn.bias_ih_l0 + rnn.weight_hh_l0 @ h + rnn.bias_hh_l0)
        outputs.append(h)
    return torch.stack(outputs)


@torch.no_grad()
def compare(backend: str = "auto") -> Comparison:
    """One sequence (3, 5) by hand, by torch.nn.RNN and by rnn_ext.RNN, with the same weights, (2, 5) and (2, 2)."""
    torch.manual_seed(1)
    theirs = nn.RNN(input_size=5, hidden_size=2, num_layers=1, batch_first=True)
    ours = RNN(input_size=5, hidden_size=2, num_layers=1, batch_first=True, backend=backend)
    ours.load_state_dict(theirs.state_dict())

    input = torch.tensor([[1.0] * 5, [2.0] * 5, [3.0] * 5])
    outputs = [unroll(theirs, input), theirs(input.unsqueeze(0))[0][0], ours(input.unsqueeze(0))[0][0]]
    difference = max(float((a - b).abs().max()) for a in outputs for b in outputs)
    return Comparison(input, *outputs, difference)
