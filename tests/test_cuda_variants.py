"""Layer normalisation, zoneout and recurrent dropout by the CUDA kernels, emulated: values, gradients, modules."""

from __future__ import annotations

import itertools
import math
import shutil

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_sequence

import rnn_ext
from rnn_ext import backends, ops
from tests import util
from tests.cuda_emulator.torch_layer import emulated
from tests.test_cuda_torch import GRADIENTS, VALUES, with_cuda
from tests.util import CELLS, Case

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="the emulator is built with g++"),
    pytest.mark.skipif(not ops.is_available(), reason="the library has not been built"),
]

MODULES = {"rnn_tanh": rnn_ext.RNN, "gru": rnn_ext.GRU, "lstm": rnn_ext.LSTM}
LAYERS = [
    Case(size=(4, 3, 3, 5)),
    Case(layout="batch_first", bidirectional=True, lengths=True, resets=True, size=(5, 4, 3, 7)),
    Case(layout="packed", bidirectional=True, bias=False, size=(4, 3, 3, 17)),
    Case(bidirectional=True, state=False, lengths=True, size=(3, 10, 2, 33)),
]
PROJECTED = [
    Case(proj=3, state=False, size=(4, 3, 3, 5)),
    Case(layout="batch_first", bidirectional=True, lengths=True, resets=True, proj=3, size=(5, 4, 3, 7)),
    Case(layout="packed", bidirectional=True, proj=2, size=(4, 3, 3, 5)),
]


def kernel_runs(kernel: str | None, case: Case, name: str) -> bool:
    """Layer normalisation and projections are pointwise, whatever is asked for."""
    return kernel != "step" or not (case.proj or "norm" in name)


def agree(case: Case, name: str, kernel: str | None = None, dtype: torch.dtype = torch.float64, **options) -> None:
    """Values and gradients are the reference's in float64 on the same numbers."""
    problem, masks = util.sample(case, name, dtype)
    wide = problem.to(torch.float64)
    expected, expected_grads = util.gradients(lambda p: util.oracle(p, masks), wide, unused=True, **options)
    with emulated(kernel):
        actual, grads = util.gradients(lambda p: util.run(p, masks=masks), problem, unused=True, **options)
    assert all(t.dtype == dtype for t in (*actual.values(), *grads.values()))
    util.check(actual, expected, VALUES[dtype], 1.0, "value of")
    if case.cell == "rnn_relu" and dtype.itemsize == 2:
        return  # a rounding takes some unit across the kink, and its gradient with it
    util.check(grads, expected_grads, GRADIENTS[dtype], 1e-3 * util.largest(expected_grads.values()), "gradient of")


@pytest.mark.parametrize("kernel", ["step", "pointwise"])
@pytest.mark.parametrize("cell", CELLS)
def test_layouts(cell, kernel):
    for case in LAYERS + PROJECTED * (cell == "lstm"):
        for name in util.combined(cell):
            if kernel_runs(kernel, case, name):
                agree(case.but(cell=cell), name, kernel)


@pytest.mark.parametrize("name", ["masks", "norm", "norm+masks"])
def test_workspaces_may_hold_anything(name):
    """torch fills what is only allocated with NaN, and what is kept for backward with bytes that are NaN too."""
    torch.use_deterministic_algorithms(True)
    try:
        for case in LAYERS + PROJECTED:
            agree(case, name)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_dtypes(cell, dtype):
    lengths = Case(cell, bidirectional=True, lengths=True, resets=True, size=(5, 4, 7, 33))
    agree(lengths, "masks", "step", dtype)
    agree(lengths, "masks", "pointwise", dtype)
    if cell == "lstm":
        agree(lengths, "norm+masks", None, dtype)
        # Rows long enough that a rounding of the numbers themselves does not move their means.
        agree(Case(cell, "packed", bidirectional=True, proj=17, size=(5, 9, 3, 33)), "norm+masks", None, dtype)


@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 3, 0, 2), (2, 9, 3, 65), (1, 1, 2, 129), (2, 2, 2, 300)], ids=str)
def test_sizes(size):
    """One warp to eight, and rows longer than a block has threads."""
    case = Case("lstm", bidirectional=True, size=size)
    agree(case, "norm+masks")
    if size[-1] < 300:
        agree(case, "masks", "step")


@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("proj", [0, 3])
@pytest.mark.parametrize("name", ["masks", "norm", "norm+masks"])
def test_each_cotangent_alone(name, proj, layout):
    ragged = layout == "dense"
    case = Case("lstm", layout, True, proj=proj, lengths=ragged, resets=ragged, size=(4, 3, 2, 5))
    for result, cotangent in util.cotangents(util.oracle(*util.sample(case, name))).items():
        agree(case, name, grad_of={result: cotangent})


@pytest.mark.parametrize("proj", [0, 3])
@pytest.mark.parametrize("name", ["norm", "norm+masks"])
def test_each_gradient_alone(name, proj):
    problem, masks = util.sample(Case("lstm", bidirectional=True, proj=proj, size=(4, 3, 2, 5)), name)
    with emulated():
        _, every = util.gradients(lambda p: util.run(p, masks=masks), problem)
        for leaf in problem.leaves():
            _, alone = util.gradients(lambda p: util.run(p, masks=masks), problem, wrt=[leaf])
            util.same_bits(alone, {leaf: every[leaf]})
    # A gradient that is changed in place, by clipping for instance, must not be another parameter's too.
    assert len({grad.untyped_storage().data_ptr() for grad in every.values()}) == len(every)


@pytest.mark.parametrize(
    ("name", "proj", "kernel"),
    [
        (name, proj, kernel)
        for name, proj, kernel in itertools.product(["masks", "norm+masks"], [0, 3], ["step", "pointwise"])
        if kernel_runs(kernel, Case("lstm", proj=proj), name)
    ],
)
def test_padding_is_not_looked_at(name, proj, kernel):
    """NaN there, in input, masks and what flows back, reaches nothing; the same again gives the same bits."""
    case = Case("lstm", bidirectional=True, proj=proj, lengths=True, size=(5, 4, 3, 6))
    problem, masks = util.sample(case, name, torch.float32)
    past = torch.arange(5).unsqueeze(1) >= problem.lengths
    with emulated(kernel):
        grad_of = util.cotangents(util.run(problem, masks=masks))
        clean = util.gradients(lambda p: util.run(p, masks=masks), problem, grad_of)
        problem.input[past] = math.nan
        poisoned = [masks[0], *(m.masked_fill(past.unsqueeze(-1), math.nan) for m in masks[1:])]
        for result in ("output", "cells"):
            grad_of[result] = grad_of[result].masked_fill(past.unsqueeze(-1), math.nan)
        dirty = util.gradients(lambda p: util.run(p, masks=poisoned), problem, grad_of)
    util.same_bits(dirty[0], clean[0])
    util.same_bits(dirty[1], clean[1])


@pytest.mark.parametrize("proj", [0, 3])
@pytest.mark.parametrize("name", ["masks", "norm+masks"])
def test_inference(name, proj):
    """Without gradients nothing is kept; values are the same bits. Cell states can be had all the same."""
    for layout in ("dense", "packed"):
        problem, masks = util.sample(Case("lstm", layout, True, proj=proj, size=(4, 3, 2, 9)), name, torch.float32)
        with emulated():
            trained, _ = util.gradients(lambda p: util.run(p, masks=masks), problem)  # noqa: B023
            for cell_states in (False, True):
                inferred = util.run(problem, cell_states, masks=masks)
                util.same_bits(inferred, {result: trained[result] for result in inferred})


@pytest.mark.parametrize("name", ["masks", "norm+masks"])
def test_gradcheck_and_double_backward(name):
    problem, masks = util.sample(Case("lstm", resets=True, size=(3, 2, 2, 3)), name)
    leaves = {leaf: t.requires_grad_() for leaf, t in problem.leaves().items()}

    def layer(*tensors):
        return tuple(util.run(problem.having(dict(zip(leaves, tensors, strict=True))), masks=masks).values())

    with emulated():
        assert torch.autograd.gradcheck(layer, tuple(leaves.values()))
        assert torch.autograd.gradgradcheck(layer, tuple(leaves.values()), fast_mode=True)


def options_of(cell: str) -> dict:
    options = {"zoneout": 0.2, "recurrent_dropout": 0.3, "weight_dropout": 0.4}
    return options | {"layer_norm": True, "zoneout": (0.2, 0.1)} if cell == "lstm" else options


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cell", MODULES)
def test_modules(cell, training):
    """Two layers, all options together: from one seed what the CPU's kernels give, gradients included."""
    torch.manual_seed(0)
    module = MODULES[cell](5, 7, 2, bidirectional=True, dtype=torch.float64, **options_of(cell)).train(training)
    rows = [torch.randn(n, 5, dtype=torch.float64) for n in (4, 1, 3)]
    padded = torch.nn.utils.rnn.pad_sequence(rows)
    calls = {
        "padded": lambda: module(padded)[0],
        "packed": lambda: module(pack_sequence(rows, enforce_sorted=False))[0].data,
        "lengths": lambda: module(padded, lengths=torch.tensor([4, 1, 3]))[0],
    }

    def result(call) -> list[torch.Tensor]:
        torch.manual_seed(1)
        output = call()
        return [output.detach(), *torch.autograd.grad(output.square().sum(), list(module.parameters()))]

    for call in calls.values():
        expected = result(call)
        with emulated():
            plain = result(call)
            module.recompute = True
            again = result(call)
            module.recompute = False
        for actual, twice, want in zip(plain, again, expected, strict=True):
            torch.testing.assert_close(actual, want, rtol=1e-9, atol=1e-10)
            assert torch.equal(actual, twice)


def test_step_of_a_stack():
    module = rnn_ext.LSTM(3, 4, 2, layer_norm=True, zoneout=0.2, dtype=torch.float64).eval()
    x = torch.randn(2, 3, dtype=torch.float64)
    expected = module.step(x)[1]
    with emulated():
        actual = module.step(x)[1]
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_empty():
    for size in ((0, 3, 4, 7), (4, 0, 4, 7)):
        problem, masks = util.sample(Case("lstm", bidirectional=True, size=size), "norm+masks")
        expected = util.gradients(lambda p: util.run(p, masks=masks), problem)  # noqa: B023
        with emulated():
            actual = util.gradients(lambda p: util.run(p, masks=masks), problem)  # noqa: B023
        util.same_bits(actual[0], expected[0])
        util.same_bits(actual[1], expected[1])


def test_what_cannot_run_says_why():
    problem, masks = util.sample(Case("gru", size=(2, 1, 2, 3)), "masks", torch.float32)
    with emulated("persistent"), pytest.raises(RuntimeError, match="persistent kernels have no variants"):
        util.run(problem, masks=masks)


@pytest.mark.parametrize(
    ("cell", "proj", "name"),
    [*((cell, 0, "masks") for cell in CELLS), ("lstm", 3, "masks"), ("lstm", 0, "norm"), ("lstm", 3, "norm")],
)
def test_fake_kernel_keeps_as_much_as_the_real_one(cell, proj, name):
    for dtype in backends.CUSTOM_DTYPES:
        problem, masks = util.sample(Case(cell, bidirectional=True, proj=proj, size=(3, 2, 4, 5)), name, dtype)
        rest = (cell, True, False, False, True)
        weights = list(problem.weights.values())
        with emulated():
            real = torch.ops.rnn_ext.layer(problem.input, problem.h_0, None, weights, None, None, None, masks, *rest)
        with FakeTensorMode():
            fakes = problem.map(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"))
            masks = [m if m is None else torch.empty(m.shape, device="cuda") for m in masks]
            weights = list(fakes.weights.values())
            fake = torch.ops.rnn_ext.layer(fakes.input, fakes.h_0, None, weights, None, None, None, masks, *rest)
        assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in real]


@with_cuda
def test_choices_are_those_of_the_table():
    few = util.H100 | {"variant": 1}
    assert ops.cuda_kernel("lstm", torch.bfloat16, 100, 8, 64, **few)[0] == "step"
    assert ops.cuda_kernel("lstm", torch.float32, 100, 64, 512, **few)[0] == "pointwise"
    kernel, reason = ops.cuda_kernel("lstm", torch.float32, 100, 8, 64, **few | {"variant": 2})
    assert kernel == "pointwise" and "layer normalisation" in reason


@with_cuda
def test_explain_on_a_gpu(monkeypatch):
    """auto runs on ours what torch lacks, on a GPU too. With a GPU that is only said to be there."""
    util.pretend_gpu(monkeypatch, util.H100)
    with FakeTensorMode():
        input = torch.empty(3, 8, 4, device="cuda")
    module = rnn_ext.LSTM(4, 64, recurrent_dropout=0.1)
    assert rnn_ext.explain(module, input).kernel == "rnn_ext::layer lstm, cuda step"
    assert rnn_ext.explain(module.eval(), input).backend == "native"
    explanation = rnn_ext.explain(rnn_ext.LSTM(4, 64, layer_norm=True), input)
    assert explanation.kernel == "rnn_ext::layer lstm, cuda pointwise"
    assert "native would refuse it, which has no layer_norm" in explanation.reason
