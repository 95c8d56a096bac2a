"""Products of so many inputs, units or gates that these are multiplied piece by piece, see run_deep_panel()."""

from __future__ import annotations

import copy

import pytest
import torch
from util import check_gradients, instruction_sets, same_bits

import rnn_ext

# Of 8 sequences no product is multiplied so, of 64 those are that are named.
L, N, FEW = 2, 64, 8
# Inputs and units. With AVX2 products are as deep from twice as many numbers on: the inputs and the LSTM's gates.
SIZES = {
    "inputs": (rnn_ext.RNN, 4200, 160),  # more than join a step, but on processors that say so (inputs.inl)
    "units": (rnn_ext.RNN, 20, 2100),
    "gates": (rnn_ext.LSTM, 100, 1024),
    "gates apart": (rnn_ext.GRU, 100, 768),  # whose slots do not follow each other
    "gates of no whole chains": (rnn_ext.GRU, 64, 700),
}


def results(layer, x, grads):
    """Of each sequence its own: output, gradients of the input and of the initial state."""
    x = x.clone().requires_grad_()
    hx = torch.linspace(-1, 1, layer.hidden_size, dtype=x.dtype).repeat(1, x.shape[1], 1).requires_grad_()
    is_lstm = isinstance(layer, rnn_ext.LSTM)
    output, _ = layer(x, (hx, hx) if is_lstm else hx)
    return {"output": output, **dict(zip(("x", "hx"), torch.autograd.grad(output, (x, hx), grads), strict=True))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_as_few_sequences(size, dtype):
    """Their bits are those of a sequence among few, but of the input's gradient: a product over all timesteps."""
    kind, inputs, units = SIZES[size]
    layer = kind(inputs, units, dtype=dtype, backend="custom")
    x, grads = torch.randn(L, N, inputs, dtype=dtype), torch.randn(L, N, units, dtype=dtype)
    oracle = rnn_ext.set_backend(copy.deepcopy(layer).double(), "native")
    expected = results(oracle, x.double(), grads.double())
    for _ in instruction_sets():
        found = results(layer, x, grads)
        parts = [results(layer, *few) for few in zip(x.split(FEW, 1), grads.split(FEW, 1), strict=True)]
        same_bits(
            {name: found[name] for name in ("output", "hx")},
            {name: torch.cat([part[name] for part in parts], 1) for name in ("output", "hx")},
        )
        check_gradients(found, expected, dtype)
