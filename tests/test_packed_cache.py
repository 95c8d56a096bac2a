"""Packed weights are kept between calls that do not train: whatever changes a weight must be noticed."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from test_modules import ours, randn
from util import widens

import rnn_ext
from rnn_ext import _C, ops

L, N, INPUTS, H = 6, 2, 5, 17


@pytest.fixture(autouse=True)
def empty_cache():
    _C.clear_cached_weights()
    yield
    _C.clear_cached_weights()


def kept(module, input):
    """Calls until the packed weights are in use; the result."""
    with torch.no_grad():
        for _ in range(3):
            output = module(input)[0]
    return output


def zero_bit(module):
    """The last bit of the last number."""
    weight = module.weight_hh_l0.detach()
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.itemsize]
    weight.view(bits).numpy()[-1, -1] ^= 1 << (5 * weight.itemsize)


def swap(module):
    """Two rows change places: the sums of all numbers stay the same."""
    weight = module.weight_ih_l0.data
    weight[[0, 1]] = weight[[1, 0]]


def other(module):
    return {name: p + 0.1 for name, p in module.state_dict().items()}


def train(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(randn(L, N, INPUTS, dtype=module.weight_ih_l0.dtype))[0].sum().backward()
    optimizer.step()
    optimizer.zero_grad()


CHANGES = {
    "in place": lambda m: m.weight_hh_l0.add_(0.1),
    "one number": lambda m: m.weight_ih_l0[0, 0].add_(0.1),
    "a bias": lambda m: m.bias_hh_l0[0].add_(0.1),
    "data": lambda m: m.weight_hh_l0.data.mul_(1.1),
    "new data": lambda m: setattr(m.weight_hh_l0, "data", m.weight_hh_l0.data * 1.1),
    "numpy": zero_bit,
    "swapped rows": swap,
    "load_state_dict": lambda m: m.load_state_dict(other(m)),
    "assigned": lambda m: m.load_state_dict(other(m), assign=True),
    "another dtype": lambda m: m.to(torch.float32 if m.weight_ih_l0.dtype == torch.float64 else torch.float64),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_no_change_goes_unnoticed(change, dtype):
    module, input = ours("lstm", INPUTS, H, bidirectional=True, dtype=dtype), randn(L, N, INPUTS, dtype=dtype)
    before = kept(module, input)
    assert _C.cached_weights_count() == 2  # both directions
    with torch.no_grad():
        CHANGES[change](module)
    input = input.to(module.weight_ih_l0.dtype)
    after = kept(module, input)
    with torch.enable_grad():  # a call that trains packs anew
        want = module(input)[0].detach()
    assert torch.equal(after, want)
    assert not torch.equal(before.to(after.dtype), after)


def test_an_optimizer_is_noticed():
    module, input = ours("gru", INPUTS, H), randn(L, N, INPUTS)
    for _ in range(3):
        kept(module, input)
        train(module)
        assert torch.equal(kept(module, input), module(input)[0])


@pytest.mark.parametrize(
    ("cell", "options"),
    [("rnn_tanh", {}), ("gru", {}), ("lstm", {}), ("gru", {"zoneout": 0.2}), ("lstm", {"layer_norm": True})],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kept_weights_compute_the_same(dtype, cell, options, widening):
    module, input = ours(cell, INPUTS, H, dtype=dtype, **options).eval(), randn(L, N, INPUTS, dtype=dtype)
    with torch.no_grad():
        first, *others = [module(input)[0] for _ in range(4)]
    assert _C.cached_weights_count() == 1
    for output in others:
        assert torch.equal(first, output)


def test_nothing_is_kept_for_one_call_or_in_training():
    module, input = ours("lstm", INPUTS, H), randn(L, N, INPUTS)
    for _ in range(3):
        module(input)
    with torch.no_grad():
        module(input)
    assert _C.cached_weights_count() == 0


def test_they_go_with_the_weights_and_are_bounded():
    input = randn(L, N, INPUTS)
    other = ours("rnn_tanh", INPUTS, 3)
    kept(other, input)
    for hidden in range(1, 600):
        kept(ours("rnn_tanh", INPUTS, hidden % 40 + 1), input)
    gc.collect()
    with torch.no_grad():
        other(input)  # finds its own, and none of theirs stay
    assert _C.cached_weights_count() == 1
    del other
    modules = [ours("rnn_tanh", INPUTS, 3) for _ in range(1100)]
    for module in modules[:1000]:
        kept(module, input)
    assert _C.cached_weights_count() == 1000
    for module in modules:
        kept(module, input)
    assert _C.cached_weights_count() == 1024


def test_threads_share_them():
    module, input = rnn_ext.LSTM(INPUTS, H), torch.randn(L, N, INPUTS)
    want, wrong = kept(module, input), []

    def call():
        with torch.inference_mode():
            for _ in range(50):
                if not torch.equal(module(input)[0], want):
                    wrong.append(1)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("batch", "hidden", "widened"), [(N, H, False), (1, 390, True), (33, 390, False)])
def test_a_dtype_that_is_converted_is_converted_once(batch, hidden, widened, dtype):
    """And what is packed of it for a variant, which may be of another dtype, is not taken for its own.

    So they are two where the plain layer's weights are not converted: where the processor multiplies them, or widens
    those of a large layer for few rows.
    """
    plain = ours("gru", INPUTS, hidden, dtype=dtype)
    zoneout = ours("gru", INPUTS, hidden, dtype=dtype, zoneout=0.2).eval()
    for name, parameter in plain.named_parameters():
        setattr(zoneout, name, parameter)
    input = randn(L, batch, INPUTS, dtype=dtype)
    want = plain(input)[0].detach(), zoneout(input)[0].detach()
    for _ in range(2):
        assert torch.equal(kept(plain, input), want[0])
        assert torch.equal(kept(zoneout, input), want[1])
    multiplied = dtype == torch.bfloat16 and _C.computes_bfloat16()
    assert _C.cached_weights_count() == (2 if multiplied or (widened and widens(dtype)) else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_that_are_no_single_piece_are_not_kept(dtype):
    """They are copied for each call."""
    module, input = ours("lstm", INPUTS, H, dtype=dtype), randn(L, N, INPUTS, dtype=dtype)
    weights = [w.detach() for w in module._flat_weights]
    weights[1] = weights[1].t().contiguous().t()
    with torch.no_grad():
        results = [ops.layer(input, None, None, weights, cell="lstm")[0] for _ in range(3)]
    assert all(torch.equal(r, module(input)[0]) for r in results)
    assert _C.cached_weights_count() == 0


def test_capabilities_do_not_share_them():
    module, input = ours("lstm", INPUTS, H), randn(L, N, INPUTS)
    best = ops.cpu_capability()
    want = kept(module, input)
    try:
        ops.set_cpu_capability("baseline")
        torch.testing.assert_close(kept(module, input), want)
    finally:
        ops.set_cpu_capability(best)


def test_rows_that_lie_whole_vectors_apart():
    """Swapped, each number stays in its lane of the digest."""
    module, input = ours("lstm", 16, H), randn(L, N, 16)
    before = kept(module, input)
    weight = module.weight_ih_l0.data
    weight[[0, 1]] = weight[[1, 0]]
    after = kept(module, input)
    assert not torch.equal(after, before)
    assert torch.equal(after, module(input)[0])


def test_what_was_used_last_stays():
    input, first = randn(L, N, INPUTS), ours("rnn_tanh", INPUTS, 3)
    kept(first, input)
    modules = [ours("rnn_tanh", INPUTS, 3) for _ in range(1200)]
    for i, module in enumerate(modules):
        kept(module, input)
        if i == 700:
            kept(first, input)
    recent = modules[1150]
    del modules, module
    gc.collect()
    with torch.no_grad():
        first(input), recent(input)
    assert _C.cached_weights_count() == 2
