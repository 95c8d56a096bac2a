"""Memory that forward keeps for backward is handed from one call to the next."""

from __future__ import annotations

import gc

import pytest
import torch

import rnn_ext
from rnn_ext import ops

if ops.is_available():
    from rnn_ext import _C

LIMIT = 128 * 2**20


def layer_and_input(length=220, batch=16, hidden=64):
    torch.manual_seed(0)
    # 5 values a unit: 20 bytes * length * batch * hidden, here just over 4 MiB and so worth keeping
    return rnn_ext.LSTM(hidden, hidden, backend="custom"), torch.randn(length, batch, hidden)


def gradients(layer, input):
    output = layer(input)[0]
    return torch.autograd.grad(output.square().sum(), list(layer.parameters()))


@pytest.fixture(autouse=True)
def nothing_idle():
    gc.collect()
    _C.drop_idle_workspaces()


def test_memory_is_handed_on():
    layer, input = layer_and_input()
    output = layer(input)[0]
    assert _C.idle_workspace_bytes() == 0
    del output
    waiting = _C.idle_workspace_bytes()
    assert waiting >= 220 * 16 * 64 * 20
    output = layer(input)[0]
    assert _C.idle_workspace_bytes() == 0
    output.sum().backward()
    del output
    assert _C.idle_workspace_bytes() == waiting


def test_memory_in_use_is_nobody_elses():
    layer, input = layer_and_input()
    expected = gradients(layer, input)
    first = layer(input)[0]
    second = layer(2 * input)[0]  # while the first is still needed
    torch.autograd.backward(second.sum())
    found = torch.autograd.grad(first.square().sum(), list(layer.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_is_left_in_it_does_not_matter():
    layer, input = layer_and_input()
    expected = gradients(layer, input)
    gradients(layer, torch.full_like(input, float("nan")))
    assert all(torch.equal(a, b) for a, b in zip(gradients(layer, input), expected, strict=True))


def test_what_waits_is_bounded():
    layer, _ = layer_and_input()
    held = [layer(torch.zeros(length, 16, 64))[0] for length in range(220, 1220, 50)]
    assert len(held) * 700 * 16 * 64 * 20 > LIMIT
    del held
    assert 0 < _C.idle_workspace_bytes() <= LIMIT


def test_small_and_oversized_memory_does_not_wait():
    layer, input = layer_and_input()
    layer(input[:8])
    assert _C.idle_workspace_bytes() == 0
    layer(input.repeat(40, 1, 1))  # more than may wait in all
    assert _C.idle_workspace_bytes() == 0
