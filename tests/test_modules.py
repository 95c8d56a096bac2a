"""``rnn_ext.RNN``, ``LSTM`` and ``GRU`` beside torch.nn's: same arguments, parameters, results and gradients."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from util import CELLS, Case, Problem, check_gradients, check_values, oracle, projected, same_bits

import rnn_ext
from rnn_ext import reference

NATIVE = {"rnn_tanh": nn.RNN, "rnn_relu": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
OURS = {"rnn_tanh": rnn_ext.RNN, "rnn_relu": rnn_ext.RNN, "gru": rnn_ext.GRU, "lstm": rnn_ext.LSTM}
I, H = 4, 6  # noqa: E741


def options(cell: str, **extra):
    return {"dtype": torch.float64, **({"nonlinearity": "relu"} if cell == "rnn_relu" else {}), **extra}


def ours(cell: str, *sizes, **extra) -> nn.Module:
    """Held to our kernels: where they are missing, "auto" would take torch's, and the tests would test nothing."""
    torch.manual_seed(3)
    return OURS[cell](*(sizes or (I, H)), **options(cell, **extra), backend="custom")


def native(cell: str, *sizes, **extra) -> nn.Module:
    torch.manual_seed(3)
    return NATIVE[cell](*(sizes or (I, H)), **options(cell, **extra))


def pair(cell: str, *sizes, **extra) -> tuple[nn.Module, nn.Module]:
    return ours(cell, *sizes, **extra), native(cell, *sizes, **extra)


def randn(*shape: int, seed: int = 0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def flatten(result) -> dict[str, torch.Tensor]:
    output, state = result
    found = {"output": output.data if isinstance(output, PackedSequence) else output}
    states = state if isinstance(state, tuple) else (state,)
    return found | dict(zip(("h_n", "c_n"), states, strict=False))


def everything(module: nn.Module, input, hx=None, **extra):
    """Results, and gradients of a loss of all of them with regard to parameters, input and hx."""
    asked = {}

    def leaf(name, t):
        asked[name] = t.detach().clone().requires_grad_()
        return asked[name]

    if isinstance(input, PackedSequence):
        input = PackedSequence(leaf("input", input.data), *input[1:])
    else:
        input = leaf("input", input)
    if isinstance(hx, tuple):
        hx = (leaf("h_0", hx[0]), leaf("c_0", hx[1]))
    elif hx is not None:
        hx = leaf("h_0", hx)
    module.zero_grad()
    results = flatten(module(input, hx, **extra))
    loss = sum((t.double() * randn(*t.shape, seed=7)).sum() for t in results.values())
    loss.backward()
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {name: t.detach() for name, t in results.items()}, grads | {name: t.grad for name, t in asked.items()}


def same(first: nn.Module, second: nn.Module, input, hx=None, dtype=torch.float64) -> None:
    results, grads = everything(first, input, hx)
    expected, expected_grads = everything(second, input, hx)
    check_values(results, expected, dtype)
    check_gradients(grads, expected_grads, dtype)


def initial(cell: str, states: int, batch: int | None, proj: int = 0, dtype=torch.float64):
    lead = (states,) if batch is None else (states, batch)
    h_0 = randn(*lead, proj or H, seed=1, dtype=dtype)
    return (h_0, randn(*lead, H, seed=2, dtype=dtype)) if cell == "lstm" else h_0


# --- the same results ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize(("cell", "proj"), projected(3))
def test_parity(cell, proj, num_layers, bidirectional):
    """Padded, unbatched, packed sorted and unsorted; with and without hx, bias, batch_first; values and gradients."""
    states = num_layers * (1 + bidirectional)
    sequences = [randn(n, I, seed=n) for n in (5, 2, 5, 1)]
    for bias, batch_first in itertools.product((True, False), (False, True)):
        extra = {"num_layers": num_layers, "bidirectional": bidirectional, "bias": bias, "batch_first": batch_first}
        extra |= {"proj_size": proj} if proj else {}
        first, second = pair(cell, **extra)
        inputs = [
            (randn(3, 5, I), 3 if batch_first else 5),
            (randn(5, I), None),
            (pack_sequence(sorted(sequences, key=len, reverse=True)), 4),
            (pack_sequence(sequences, enforce_sorted=False), 4),
        ]
        for input, batch in inputs:
            for hx in (None, initial(cell, states, batch, proj)):
                same(first, second, input, hx)
                got, want = first(input, hx)[0], second(input, hx)[0]
                if isinstance(want, PackedSequence):
                    assert isinstance(got, PackedSequence)
                    for a, b in zip(got[1:], want[1:], strict=True):
                        assert (a is None and b is None) or torch.equal(a, b)
                    torch.testing.assert_close(pad_packed_sequence(got), pad_packed_sequence(want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_parity_in_other_dtypes(cell, dtype):
    """float32 and 16-bit modules against torch.nn in float64 on the same numbers."""
    first = ours(cell, num_layers=2, bidirectional=True, dtype=dtype)
    second = native(cell, num_layers=2, bidirectional=True)
    second.load_state_dict(first.state_dict())
    input, hx = randn(7, 3, I, dtype=dtype), initial(cell, 4, 3, dtype=dtype)
    results, grads = everything(first, input, hx)
    assert all(t.dtype == dtype for t in (*results.values(), *grads.values()))
    as_double = tuple(t.double() for t in hx) if cell == "lstm" else hx.double()
    expected, expected_grads = everything(second, input.double(), as_double)
    check_values(results, expected, dtype)
    if cell != "rnn_relu" or dtype == torch.float32:  # see test_layer: a kink at zero is not for 16 bits
        check_gradients(grads, expected_grads, dtype)


@pytest.mark.parametrize(
    ("cell", "arguments"),
    [
        ("rnn_tanh", (I, H, 2, "tanh", False, True, 0.0, True)),
        ("rnn_relu", (I, H, 1, "relu", True, False, 0.0, False)),
        ("gru", (I, H, 2, False, True, 0.0, True)),
        ("lstm", (I, H, 2, False, True, 0.0, True, 3)),
        ("lstm", (I, H, 1, True, False, 0.0, False, 0, "cpu", torch.float64)),
    ],
)
def test_positional_arguments(cell, arguments):
    torch.manual_seed(0)
    second = NATIVE[cell](*arguments)
    torch.manual_seed(0)
    first = OURS[cell](*arguments)
    same_bits(first.state_dict(), second.state_dict())
    assert [*first.state_dict()] == [*second.state_dict()]
    dtype = first.weight_ih_l0.dtype
    same(first, second, randn(3, 5, I, dtype=dtype), dtype=dtype)
    for name in (
        "mode",
        "input_size",
        "hidden_size",
        "num_layers",
        "bias",
        "batch_first",
        "dropout",
        "bidirectional",
        "proj_size",
    ):
        assert getattr(first, name) == getattr(second, name)
    if cell.startswith("rnn"):
        assert first.nonlinearity == second.nonlinearity


@pytest.mark.parametrize("cell", CELLS)
def test_same_seed_gives_same_parameters_in_both_directions(cell):
    extra = {"num_layers": 2, "bidirectional": True} | ({"proj_size": 2} if cell == "lstm" else {})
    first, second = pair(cell, **extra)
    assert [name for name, _ in first.named_parameters()] == [name for name, _ in second.named_parameters()]
    same_bits(dict(first.named_parameters()), dict(second.named_parameters()))
    torch.manual_seed(8)
    first.reset_parameters()
    torch.manual_seed(8)
    second.reset_parameters()
    same_bits(dict(first.named_parameters()), dict(second.named_parameters()))
    assert [[*names] for names in first._all_weights] == [[*names] for names in second._all_weights]
    # strictly, there and back, also by assignment
    other = OURS[cell](I, H, **options(cell, **extra), backend="custom")
    assert str(other.load_state_dict(second.state_dict(), strict=True)) == "<All keys matched successfully>"
    same(other, second, randn(5, 3, I))
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    second.load_state_dict(other.state_dict(), strict=True)
    same(other, second, randn(5, 3, I))
    first.load_state_dict(second.state_dict(), strict=True, assign=True)
    same(first, second, randn(5, 3, I))


def test_they_are_no_instances_of_torch_nns_but_of_its_base():
    """torch.compile breaks the graph at instances of nn.RNN, nn.LSTM and nn.GRU."""
    for cell in CELLS:
        module = ours(cell)
        assert isinstance(module, nn.RNNBase) and not isinstance(module, (nn.RNN, nn.LSTM, nn.GRU))


@pytest.mark.parametrize("cell", CELLS)
def test_repr(cell):
    for extra in ({}, {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False, "dropout": 0.25}):
        first, second = OURS[cell](I, H, **extra), NATIVE[cell](I, H, **extra)
        assert repr(first) == repr(second)
    assert "backend='native'" in repr(OURS[cell](I, H, backend="native"))


@pytest.mark.parametrize("cell", CELLS)
def test_native_backend_is_torch_nn_to_the_bit(cell):
    second = native(cell, num_layers=2, bidirectional=True)
    first = ours(cell, num_layers=2, bidirectional=True)
    first.backend = "native"
    for input in (randn(5, 3, I), pack_sequence([randn(2, I), randn(4, I)], enforce_sorted=False)):
        results, grads = everything(first, input)
        expected, expected_grads = everything(second, input)
        same_bits(results, expected)
        same_bits(grads, expected_grads)


# --- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_dropout(cell):
    """Off in eval and for one layer; in training the mask of the same seed is torch.nn's own, p=1 leaves nothing."""
    sequences = [randn(n, I, seed=n) for n in (3, 5, 1)]
    for p, batch_first in ((0.5, False), (0.5, True), (1.0, False)):
        first, second = pair(cell, num_layers=3, dropout=p, bidirectional=True, batch_first=batch_first)
        for input in (randn(5, 7, I), pack_sequence(sequences, enforce_sorted=False), randn(5, I)):
            for training in (True, False):
                first.train(training), second.train(training)
                torch.manual_seed(5)
                results, grads = everything(first, input)
                torch.manual_seed(5)
                expected, expected_grads = everything(second, input)
                check_values(results, expected)
                check_gradients(grads, expected_grads)
        first.train()
        if p == 0.5:
            assert not torch.equal(first(randn(5, 7, I))[0], first(randn(5, 7, I))[0])
        first.eval()
        assert torch.equal(first(randn(5, 7, I))[0], first(randn(5, 7, I))[0])


@pytest.mark.parametrize("cell", CELLS)
def test_ten_steps_of_training(cell):
    """The losses of ten steps of SGD with momentum are torch.nn's."""
    losses = []
    for make in (ours, native):
        torch.manual_seed(1)
        model = nn.ModuleList([make(cell, num_layers=2, bidirectional=True), nn.Linear(2 * H, 1, dtype=torch.float64)])
        with torch.no_grad():
            for p in model[1].parameters():
                p.fill_(0.1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
        found = []
        for step in range(10):
            optimizer.zero_grad()
            prediction = (
                model[1](model[0](randn(7, 5, I, seed=step))[1][0][-1].repeat(1, 2))
                if cell == "lstm"
                else (model[1](model[0](randn(7, 5, I, seed=step))[0][-1]))
            )
            loss = (prediction - 1.5).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            found.append(loss.detach())
        losses.append(torch.stack(found))
    assert losses[0][-1] < losses[0][0] / 2
    torch.testing.assert_close(*losses, rtol=1e-10, atol=0)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_in_eval_mode_of_any_order(cell):
    """A gradient penalty through a stack in eval mode, where cuDNN and many others refuse."""
    grads = []
    for module in pair(cell, num_layers=2, bidirectional=True):
        module.eval()
        input = randn(4, 3, I).requires_grad_()
        (inner,) = torch.autograd.grad(module(input)[0].square().sum(), input, create_graph=True)
        inner.square().sum().backward()
        grads.append({name: p.grad for name, p in module.named_parameters()} | {"input": input.grad})
    check_gradients(*grads)


@pytest.mark.parametrize("cell", CELLS)
def test_frozen_parameters(cell):
    for frozen in ("weight_hh", "bias", "l0", "weight", "l1_reverse"):
        modules = pair(cell, num_layers=2, bidirectional=True)
        for module in modules:
            for name, p in module.named_parameters():
                p.requires_grad_(frozen not in name)
        (results, grads), (expected, expected_grads) = (everything(module, randn(5, 3, I)) for module in modules)
        assert not any(frozen in name for name in grads)
        check_values(results, expected)
        check_gradients(grads, expected_grads)


def test_autocast():
    """Under CPU autocast: 16-bit results, float32 gradients; regions without it are float32.

    torch.nn's RNN and LSTM return bfloat16 as well; its GRU returns float32 where the promotion of types has it so.
    """
    for cell in CELLS:
        first, second = pair(cell, num_layers=2, dtype=torch.float32)
        input = randn(7, 3, I, dtype=torch.float32)
        expected, expected_grads = everything(second, input)
        packed = pack_sequence([randn(2, I), randn(4, I)], enforce_sorted=False).to(torch.float32)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype=dtype):
                results, grads = everything(first, input)
                for given in (input, packed, input.to(dtype)):
                    assert all(t.dtype == dtype for t in flatten(first(given)).values())
                with torch.autocast("cpu", enabled=False):
                    assert first(input)[0].dtype == torch.float32
            check_values(results, expected, dtype)
            assert all(t.dtype == torch.float32 for t in grads.values())
            if cell != "rnn_relu":
                check_gradients(grads, expected_grads, dtype)


# --- inputs of every kind -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_strides_of_input_and_state(cell):
    """Transposed and strided input, one learned initial state expanded over the batch: gradients included."""
    for batch_first in (False, True):
        modules = pair(cell, batch_first=batch_first, bidirectional=True)
        grads = []
        for module in modules:
            wide = randn(I, 5, 7, 2).requires_grad_()
            learned = randn(2, 1, H).requires_grad_()
            input = wide[..., 1].permute(2, 1, 0)  # (7, 5, I)
            hx = learned.expand(2, 7 if batch_first else 5, H)
            output, _ = module(input, (hx, hx) if cell == "lstm" else hx)
            output.transpose(0, 1).cumsum(0).square().sum().backward()
            grads.append({"wide": wide.grad, "learned": learned.grad, "output": output.detach()})
        check_gradients(*grads)


@pytest.mark.parametrize("cell", CELLS)
def test_chunks_equal_one_call(cell):
    """Streaming: the state carries over, forwards, through a stack."""
    module = ours(cell, num_layers=2)
    input = randn(12, 3, I)
    whole, state = module(input)
    for sizes in ((1,) * 12, (5, 7), (1, 4, 7)):
        parts, hx = [], None
        for chunk in input.split(sizes):
            output, hx = module(chunk, hx)
            parts.append(output)
        check_values(flatten((torch.cat(parts), hx)), flatten((whole, state)))


@pytest.mark.parametrize("cell", CELLS)
def test_empty(cell):
    """L=0 gives an empty output and the initial state, N=0 empty everything; gradients exist. Through a stack."""
    module = ours(cell, num_layers=2, bidirectional=True)
    for shape in ((0, 3, I), (5, 0, I), (0, 0, I), (0, I)):
        batch = None if len(shape) == 2 else shape[1]
        hx = initial(cell, 4, batch)
        results, grads = everything(module, torch.zeros(shape, dtype=torch.float64), hx)
        assert results["output"].shape == (*shape[:-1], 2 * H)
        if shape[0] == 0:
            assert torch.equal(results["h_n"], hx[0] if cell == "lstm" else hx)
        assert not any(grads[name].any() for name, _ in module.named_parameters())
        assert grads["input"].shape == shape
        assert module(torch.zeros(shape, dtype=torch.float64))[0].shape == (*shape[:-1], 2 * H)


def packed_by_hand(module, input, lengths, hx):
    """torch.nn on the rows that have a length, packed; zeros and the given state for the others."""
    states, batch = module.num_layers * (1 + module.bidirectional), len(lengths)
    if hx is None:
        zeros = torch.zeros(states, batch, H, dtype=torch.float64)
        hx = (zeros, zeros) if module.mode == "LSTM" else zeros
    kept = [n for n, length in enumerate(lengths) if length]
    parts = hx if isinstance(hx, tuple) else (hx,)
    rows = pack_padded_sequence(input[:, kept], [lengths[n] for n in kept], enforce_sorted=False)
    chosen = tuple(t[:, kept] for t in parts)
    packed, state = module(rows, chosen if module.mode == "LSTM" else chosen[0])
    padded, _ = pad_packed_sequence(packed, total_length=input.shape[0])
    output = padded.new_zeros(*input.shape[:2], padded.shape[2]).index_copy(1, torch.tensor(kept), padded)
    finals = state if isinstance(state, tuple) else (state,)
    finals = tuple(t.index_copy(1, torch.tensor(kept), f) for t, f in zip(parts, finals, strict=True))
    return output, finals if module.mode == "LSTM" else finals[0]


@pytest.mark.parametrize("cell", CELLS)
def test_lengths(cell):
    """As list, tuple and tensor of any integer dtype: equal to packing, with NaN in the padding."""
    lengths = [3, 0, 6, 1, 6]
    input, hx = randn(6, 5, I), initial(cell, 4, 5)
    first, second = pair(cell, num_layers=2, bidirectional=True)
    expected = flatten(packed_by_hand(second, input, lengths, hx))
    dirty = input.clone()
    dirty[torch.arange(6).unsqueeze(1) >= torch.tensor(lengths)] = float("nan")
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    for given in (lengths, tuple(lengths), *(torch.tensor(lengths, dtype=dtype) for dtype in integers)):
        check_values(flatten(first(dirty, hx, lengths=given)), expected)
    with torch.device("meta"):
        check_values(flatten(first(dirty, hx, lengths=lengths)), expected)
    by_batch = ours(cell, num_layers=2, bidirectional=True, batch_first=True)
    result = flatten(by_batch(dirty.transpose(0, 1), hx, lengths=lengths))
    check_values(result | {"output": result["output"].transpose(0, 1)}, expected)
    first.backend = "native"  # which knows no lengths: they are packed for it
    check_values(flatten(first(dirty, hx, lengths=lengths)), expected)
    check_values(flatten(first(dirty, lengths=lengths)), flatten(packed_by_hand(second, input, lengths, None)))
    first.backend = "custom"
    check_values(flatten(first(dirty, lengths=lengths)), flatten(packed_by_hand(second, input, lengths, None)))
    # gradients, of every parameter, the input and the state
    second.zero_grad()
    leaf = input.clone().requires_grad_()
    results = flatten(packed_by_hand(second, leaf, lengths, hx))
    sum((t * randn(*t.shape, seed=7)).sum() for t in results.values()).backward()
    expected_grads = {name: p.grad for name, p in second.named_parameters()} | {"input": leaf.grad}
    for first.backend in ("native", "custom"):
        _, grads = everything(first, dirty, hx, lengths=lengths)
        check_gradients({name: grads[name] for name in expected_grads}, expected_grads)
    # unbatched: one length
    check_values(
        flatten(first(input[:, 0], lengths=[3])),
        flatten((lambda r: (torch.cat([r[0], torch.zeros(3, 2 * H).double()]), r[1]))(second(input[:3, 0]))),
    )


def stacked_oracle(module, cell, input, hx, lengths, resets):
    """The reference, layer upon layer, for padded time-major input."""
    count = 2 if module.bidirectional else 1
    states = hx if isinstance(hx, tuple) else (hx,)
    finals = []
    for k in range(module.num_layers):
        names = [name for name, _ in module.named_parameters() if f"_l{k}" in name]
        weights = {name.replace(f"_l{k}", ""): getattr(module, name) for name in names}
        case = Case(cell, bidirectional=module.bidirectional)
        h_0, c_0 = states[0][k * count : (k + 1) * count], None
        if cell == "lstm":
            c_0 = states[1][k * count : (k + 1) * count]
        results = oracle(Problem(case, input, h_0, c_0, weights, None, lengths, resets))
        input = results["output"]
        finals.append(results)
    stacked = {name: torch.cat([r[name] for r in finals]) for name in finals[0] if name in ("h_n", "c_n")}
    cells = {"cells": finals[-1]["cells"]} if cell == "lstm" else {}
    return {"output": input, **stacked, **cells}


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_resets(cell, with_lengths):
    """Resets reach every layer and both directions; in (N, L) with batch_first and (L,) unbatched."""
    input, hx = randn(9, 5, I), initial(cell, 4, 5)
    resets = torch.rand(9, 5, generator=torch.Generator().manual_seed(0)) < 0.3
    lengths = torch.tensor([3, 0, 9, 1, 6]) if with_lengths else None
    module = ours(cell, num_layers=2, bidirectional=True)
    expected = stacked_oracle(module, cell, input, hx, lengths, resets)
    expected.pop("cells", None)
    check_values(flatten(module(input, hx, resets=resets, lengths=lengths)), expected)
    by_batch = ours(cell, num_layers=2, bidirectional=True, batch_first=True)
    result = flatten(by_batch(input.transpose(0, 1), hx, resets=resets.t(), lengths=lengths))
    check_values(result | {"output": result["output"].transpose(0, 1)}, expected)
    one = stacked_oracle(module, cell, input[:, :1], initial(cell, 4, 1), None, resets[:, :1])
    alone = initial(cell, 4, 1)
    alone = tuple(t[:, 0] for t in alone) if cell == "lstm" else alone[:, 0]
    result = flatten(module(input[:, 0], alone, resets=resets[:, 0]))
    check_values(result, {name: one[name].squeeze(1) for name in result})


def test_cell_states():
    """(LSTM) the last layer's c at every timestep: padded, unbatched and packed, with gradients."""
    module = ours("lstm", num_layers=2, bidirectional=True, proj_size=3)
    input, hx = randn(7, 3, I), initial("lstm", 4, 3, 3)
    lengths = torch.tensor([4, 0, 7])
    for given in (None, lengths):
        expected = stacked_oracle(module, "lstm", input, hx, given, None)
        output, state, cells = module(input, hx, lengths=given, return_cell_states=True)
        assert cells.shape == (7, 3, 2 * H)
        check_values({**flatten((output, state)), "cells": cells}, expected)
        parameters = list(module.parameters())
        grads, expected_grads = (
            torch.autograd.grad(c.square().sum(), parameters, materialize_grads=True, allow_unused=True)
            for c in (cells, expected["cells"])
        )
        for got, want in zip(grads, expected_grads, strict=True):
            check_gradients({"": got}, {"": want})
    output, state, cells = module(input[:, 0], return_cell_states=True)
    whole = module(input, return_cell_states=True)
    check_values({"cells": cells}, {"cells": whole[2][:, 0]})
    packed = pack_padded_sequence(input[:, [0, 2]], lengths[[0, 2]], enforce_sorted=False)
    cells = module(packed, tuple(t[:, [0, 2]] for t in hx), return_cell_states=True)[2]
    assert isinstance(cells, PackedSequence)
    expected = stacked_oracle(module, "lstm", input, hx, lengths, None)["cells"][:, [0, 2]]
    check_values({"cells": pad_packed_sequence(cells)[0]}, {"cells": expected})


@pytest.mark.parametrize("cell", CELLS)
def test_functional(cell):
    """The same without a module."""
    module = ours(cell, num_layers=2, bidirectional=True)
    call = getattr(rnn_ext.functional, cell)
    stack = {"num_layers": 2, "bidirectional": True, "backend": "custom"}
    for input in (randn(5, 3, I), randn(5, I), pack_sequence([randn(2, I), randn(4, I)], enforce_sorted=False)):
        result = call(input, None, list(module.parameters()), **stack)
        check_values(flatten(result), flatten(module(input)))


def test_the_reference_names_every_cell_of_the_package():
    assert set(reference.CELLS) == set(CELLS) == set(OURS)


# --- memory -------------------------------------------------------------------------------------------------------


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_no_leak():
    """2,000 calls at many shapes, with and without backward, packed and padded, and calls that fail: memory stays."""
    modules = [ours(cell, bidirectional=True, dtype=torch.float32) for cell in CELLS]

    def one(index: int) -> None:
        module = modules[index % 4]
        length, batch = index * 7 % 13 + 1, index * 5 % 11 + 1
        input = torch.zeros(length, batch, I)
        if index % 3 == 0:
            module(input)[0].sum().backward()
            module.zero_grad()
        elif index % 3 == 1:
            lengths = [index * n % (length + 1) for n in range(batch)]
            module(input, lengths=lengths)
        elif index % 9 == 2:
            with pytest.raises(RuntimeError):
                module(input[..., 1:])
        else:
            packed = pack_padded_sequence(input, [length] * batch)
            module(packed)[0].data.sum().backward()

    for index in range(300):  # allocator and caches settle
        one(index)
    gc.collect()
    before = resident()
    for index in range(2000):
        one(index)
    gc.collect()
    assert resident() - before < 24 << 20
