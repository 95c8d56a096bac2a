"""Large memory goes from one call to the next (csrc/cpu/memory.h)."""

from __future__ import annotations

import gc
import multiprocessing
import pickle
import resource

import pytest
import torch

import rnn_ext
from rnn_ext import ops

if ops.is_available():
    from rnn_ext import _C

LIMIT = 128 * 2**20
SAVED = 5 * 4  # bytes that an LSTM keeps of each unit and row for backward


def layer_and_input(length=60, batch=16, hidden=64):
    torch.manual_seed(0)
    return rnn_ext.LSTM(hidden, hidden, backend="custom"), torch.randn(length, batch, hidden)


def gradients(layer, input):
    output = layer(input)[0]
    return torch.autograd.grad(output, list(layer.parameters()), torch.ones(()).expand_as(output))


@pytest.fixture(autouse=True)
def nothing_idle():
    gc.collect()
    _C.drop_idle_memory()
    yield
    _C.drop_idle_memory()


def test_memory_is_handed_on():
    layer, input = layer_and_input()
    first = layer(input)
    address = first[0].data_ptr()
    waiting = _C.idle_memory()
    del first
    assert _C.idle_memory() >= waiting + 60 * 16 * 64 * (SAVED + 4)
    second = layer(input)
    assert second[0].data_ptr() == address
    assert _C.idle_memory() == waiting


def test_steps_take_no_fresh_memory():
    """In a loop like that of a training, the system maps no pages."""
    layer, input = layer_and_input(length=1000, batch=4)
    for _ in range(3):
        gradients(layer, input)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(10):
        gradients(layer, input)
    pages = 1000 * 4 * 64 * SAVED // 4096
    assert resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before < pages  # of ten steps


def test_memory_in_use_is_nobody_elses():
    layer, input = layer_and_input()
    expected = gradients(layer, input)
    first = layer(input)[0]
    second = layer(2 * input)[0]  # while the first is still needed
    torch.autograd.backward(second.sum())
    found = torch.autograd.grad(first, list(layer.parameters()), torch.ones(()).expand_as(first))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("length", [60, 55])
def test_what_is_left_in_it_does_not_matter(length):
    layer, input = layer_and_input()
    expected = gradients(layer, input[:length])
    gradients(layer, torch.full_like(input, float("nan")))
    assert all(torch.equal(a, b) for a, b in zip(gradients(layer, input[:length]), expected, strict=True))


def test_what_waits_is_bounded():
    layer, _ = layer_and_input()
    held = [layer(torch.zeros(length, 16, 64))[0] for length in range(220, 1220, 50)]
    assert len(held) * 700 * 16 * 64 * SAVED > LIMIT
    del held
    assert LIMIT / 2 < _C.idle_memory() <= LIMIT


def test_so_are_its_pieces():
    layer, _ = layer_and_input()
    held = [layer(torch.zeros(40, 16, 64))[0] for _ in range(200)]
    del held
    piece = 40 * 16 * 64 * 4
    assert 0 < _C.idle_memory() <= 64 * piece * SAVED // 4


def test_small_and_oversized_memory_does_not_wait():
    layer, input = layer_and_input()
    layer(input[:4])
    assert _C.idle_memory() == 0
    layer(input.repeat(150, 1, 1))  # more than may wait in all
    assert _C.idle_memory() <= LIMIT


def test_outputs_are_tensors_like_others():
    """Resized, looked at by numpy, pickled and shared."""
    layer, input = layer_and_input()
    with torch.no_grad():
        expected = layer(input)[0].clone()
        output = layer(input)[0]
        assert output.data_ptr() % 64 == 0
        output.resize_(70, 16, 64)  # more than there is
        assert torch.equal(output[:60], expected)
        assert (layer(input)[0].numpy() == expected.numpy()).all()
        assert torch.equal(pickle.loads(pickle.dumps(layer(input)[0])), expected)
        shared = layer(input)[0].share_memory_()
        assert shared.is_shared() and torch.equal(shared, expected)


def child(queue):
    layer, input = layer_and_input()
    queue.put(float(gradients(layer, input)[0].sum()))


def test_a_fork_has_its_own():
    layer, input = layer_and_input()
    expected = float(gradients(layer, input)[0].sum())
    assert _C.idle_memory() > 0
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert queue.get() == pytest.approx(expected, rel=1e-5)
    assert float(gradients(layer, input)[0].sum()) == pytest.approx(expected, rel=1e-5)


def test_more_than_there_is_is_refused_by_name():
    layer = rnn_ext.LSTM(1, 512, backend="custom")
    with pytest.raises(RuntimeError, match=r"not enough memory: \d{15,} bytes"):
        layer(torch.zeros(1, 1, 1).expand(10**6, 10**6, 1))
