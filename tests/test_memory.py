"""Memory goes from one call to the next (csrc/cpu/memory.h)."""

from __future__ import annotations

import gc
import pickle
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.profiler import profile

import rnn_ext
from rnn_ext import ops

if ops.is_available():
    from rnn_ext import _C

LIMIT = 128 * 2**20
SMALL_LIMIT = 256 * 2**10  # of a thread
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


def small_layer(hidden=16):
    return rnn_ext.GRU(1, hidden, backend="custom"), torch.zeros(2, 1, 1)


def in_a_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_small_memory_waits_with_its_thread():
    layer, input = small_layer()
    layer(input)
    waiting = _C.idle_memory()
    assert 0 < waiting < SMALL_LIMIT
    layer(input)
    assert _C.idle_memory() == waiting

    def elsewhere():
        before = _C.idle_memory()
        layer(input)
        return before, _C.idle_memory()

    assert in_a_thread(elsewhere) == (0, waiting)
    assert _C.idle_memory() == waiting


def test_small_memory_that_waits_is_bounded():
    most = 0
    for hidden in range(8, 500, 4):  # each with sizes of its own, 2 MiB together
        layer, input = small_layer(hidden)
        with torch.no_grad():
            layer(input)
        most = max(most, _C.idle_memory())
    assert SMALL_LIMIT / 2 < most <= SMALL_LIMIT


def test_threads_leave_none_behind():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def work():
        for _ in range(2):
            layer(input)
        return _C.idle_memory()

    layer, input = small_layer(200)
    with torch.inference_mode():
        left = in_a_thread(work)
        threads = 32 * 2**20 // left
        for _ in range(20):
            in_a_thread(work)
        before = resident()
        for _ in range(threads):
            in_a_thread(work)
    assert resident() - before < 8 * 2**20


def test_memory_between_small_and_large_and_oversized_memory_does_not_wait():
    layer, input = layer_and_input()
    layer(input[:4])
    assert _C.idle_memory() < SMALL_LIMIT
    held = [layer(torch.zeros(length, 16, 64))[0] for length in range(60, 300, 20)]
    del held
    waiting = _C.idle_memory()
    with torch.no_grad():
        output = layer(torch.zeros(1, 1, 1).expand(33_000, 16, 64))[0]
    assert output.nbytes > LIMIT
    before = _C.idle_memory()
    del output  # more than may wait in all
    assert _C.idle_memory() == before > waiting / 2  # and nothing had to go for it


@pytest.mark.parametrize("batch", [16_300, 16_380, 16_384])  # pointers to so many rows: around 128 KiB
def test_what_waits_does_not_grow(batch):
    layer, input = rnn_ext.GRU(1, 1, backend="custom"), torch.zeros(1, batch, 1)
    with torch.no_grad():
        for _ in range(2):  # from the second on the packed weights are kept
            layer(input)
        waiting = _C.idle_memory()
        for _ in range(5):
            layer(input)
    assert _C.idle_memory() == waiting


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


FORKING = """
import os, signal, threading, torch
import rnn_ext
torch.set_num_threads(1)
layer, input = rnn_ext.GRU(1, 1, backend="custom"), torch.randn(1, 16_384, 1)
with torch.inference_mode():
    expected = layer(input)[0]
    done = False
    def take_and_give():
        with torch.inference_mode():
            while not done:
                layer(input)
    threads = [threading.Thread(target=take_and_give) for _ in range(3)]
    for thread in threads: thread.start()
    for _ in range(20):
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            os._exit(0 if torch.equal(layer(input)[0], expected) else 3)
        status = os.waitpid(child, 0)[1]
        if status:
            break
    done = True
    for thread in threads: thread.join()
print(status)
"""


def test_a_fork_has_its_own():
    """Children of a process whose threads compute. (That one holds a lock just then is too rare to be seen here.)"""
    result = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=300)
    assert result.stdout == "0\n", result.stderr[-2000:]


def test_more_than_there_is_is_refused_by_name():
    layer = rnn_ext.LSTM(1, 512, backend="custom")
    with pytest.raises(RuntimeError, match=r"not enough memory: \d{15,} bytes"):
        layer(torch.zeros(1, 1, 1).expand(10**6, 10**6, 1))


MANY_STEPS = """
import resource, torch, rnn_ext
layer = rnn_ext.GRU(4, 6, backend="custom")
layer(torch.zeros(1, 1, 4))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30),) * 2)
try:
    layer(torch.zeros(1, 1, 4).expand(2**33, 1, 4))
except RuntimeError as error:
    print(str(error).splitlines()[0])
"""


def test_more_timesteps_than_there_is_memory_for():
    result = subprocess.run([sys.executable, "-c", MANY_STEPS], capture_output=True, text=True, timeout=300)
    wanted = "rnn_ext: not enough memory: 137438953472 bytes are needed for the rows of 8589934592 timesteps\n"
    assert result.stdout == wanted, result.stdout + result.stderr[-2000:]


def test_a_long_chain_of_calls_is_freed_one_by_one():
    """Each node of the graph holds the one before it: freed within each other, they would overflow the stack."""
    cell = rnn_ext.GRU(1, 1)
    input, state = torch.zeros(1, 1, 1), None
    for _ in range(50_000):
        _, state = cell(input, state)
    del state


def test_small_memory_is_dropped_too():
    rnn_ext.GRU(5, 7)(torch.randn(4, 3, 5))
    assert _C.idle_memory() > 0
    _C.drop_idle_memory()
    assert _C.idle_memory() == 0


def test_the_profiler_sees_it_come_and_go():
    input, weights = torch.randn(64, 32, 8), [torch.randn(256, 8), torch.randn(256, 64)]
    with profile(profile_memory=True) as events:
        output = ops.layer(input, None, None, weights, cell="lstm")
        size = output[0].nbytes
        del output
    used = next(event for event in events.key_averages() if event.key == "rnn_ext::layer").cpu_memory_usage
    assert used >= size
    assert sum(event.cpu_memory_usage for event in events.events() if event.name == "[memory]") <= -size


@torch.no_grad()
def test_a_block_is_never_too_short():
    """One that lacks a line stays where it is."""
    layer = rnn_ext.GRU(1, 16)
    size = layer(torch.zeros(4096, 1, 1))[0].nbytes
    for length, taken in ((4096, 1), (4097, 0), (4095, 1)):
        before = _C.idle_memory()
        output = layer(torch.zeros(length, 1, 1))[0]
        assert round((before - _C.idle_memory()) / size) == taken, length  # small memory aside
        del output
        _C.drop_idle_memory()
        assert layer(torch.zeros(4096, 1, 1))[0].nbytes == size  # and back to the others
