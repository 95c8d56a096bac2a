"""The layer op over the CUDA kernels, on CPU tensors: csrc/ops/cuda_layer.cpp itself, with the kernels emulated.

What a GPU would run but its own arithmetic: autograd, layouts, masks, projections, modules, errors.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import shutil

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_sequence

import rnn_ext
from rnn_ext import backends, ops
from tests import util
from tests.cuda_emulator.case import TF32_KERNELS, TF32_TOLERANCE
from tests.cuda_emulator.torch_layer import emulated
from tests.util import CELLS, Case

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="the emulator is built with g++"),
    pytest.mark.skipif(not ops.is_available(), reason="the library has not been built"),
]
with_cuda = pytest.mark.skipif(not ops.with_cuda(), reason="the library has been built without CUDA kernels")

KERNELS = ("step", "pointwise", "persistent", "grid")
ALL_KERNELS = (*KERNELS, "tensor")
# Of a projected LSTM only the one.
RUN = [*((cell, kernel, 0) for cell in CELLS for kernel in ALL_KERNELS), ("lstm", "pointwise", 3)]
# Of kernels that have no float64.
DTYPE = {"persistent": torch.float32, "grid": torch.float32, "tensor": torch.float16}
LAYERS = {"rnn_tanh": rnn_ext.RNN, "gru": rnn_ext.GRU, "lstm": rnn_ext.LSTM}
# A GEMM's result is rounded to the storage type before the cell takes it up: one rounding more than on the CPU.
VALUES = {**util.VALUE_TOLERANCE, torch.bfloat16: 3e-2}
GRADIENTS = {**util.GRAD_TOLERANCE, torch.bfloat16: 6e-2, torch.float16: 1e-2}


def agree(case: Case, kernel: str | None, dtype: torch.dtype | None = None, **options) -> None:
    """Values and gradients are the reference's in float64 on the same numbers."""
    dtype = dtype or DTYPE.get(kernel, torch.float64)
    problem = util.build(case, dtype)
    expected, expected_grads = util.gradients(util.oracle, problem.to(torch.float64), **options)
    with emulated(kernel):
        actual, grads = util.gradients(util.run, problem, **options)
    assert all(t.dtype == dtype for t in (*actual.values(), *grads.values()))
    tf32 = kernel in TF32_KERNELS and dtype == torch.float32
    util.check(actual, expected, TF32_TOLERANCE if tf32 else VALUES[dtype], 1.0, "value of")
    if case.cell == "rnn_relu" and dtype.itemsize == 2:
        return  # a rounding takes some unit across the kink, and its gradient with it
    floor = 1e-3 * util.largest(expected_grads.values())
    util.check(grads, expected_grads, 4 * TF32_TOLERANCE if tf32 else GRADIENTS[dtype], floor, "gradient of")


def small(case: Case) -> Case:
    """The emulator runs every thread of a block in turn: fewer timesteps and units."""
    length, batch, inputs, hidden = case.size
    return case.but(size=(min(length, 4), min(batch, 5), min(inputs, 8), min(hidden, 17)), proj=min(case.proj, 4))


MATRIX = [small(case) for case in util.matrix()]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("cell", CELLS)
def test_matrix(cell, kernel):
    """Every direction x layout x bias x lengths x resets, and the projections."""
    cases = [case for case in MATRIX if case.cell == cell and (not case.proj or kernel == "pointwise")]
    assert len(cases) >= 36
    for case in cases:
        agree(case, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("cell", CELLS)
def test_packed_resets(cell, kernel):
    """Which modules do not offer, but the op does: one reset for each row of the packed input."""
    for proj in (0, 3) if cell == "lstm" and kernel == "pointwise" else (0,):
        dtype = DTYPE.get(kernel, torch.float64)
        problem = util.build(Case(cell, "packed", True, proj=proj, size=(6, 5, 2, 5)), dtype)
        generator = torch.Generator().manual_seed(1)
        problem.resets = torch.rand(problem.input.shape[0], generator=generator) < 0.4
        problem.resets[:2] = True  # at first timesteps too
        expected, expected_grads = util.gradients(util.oracle, problem.to(torch.float64))
        with emulated(kernel):
            actual, grads = util.gradients(util.run, problem)
        util.check_values(actual, expected, dtype)
        util.check_gradients(grads, expected_grads, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", [*ALL_KERNELS, "cluster"])
@pytest.mark.parametrize("cell", CELLS)
def test_dtypes(cell, kernel, dtype):
    length = 2 if kernel == "cluster" else 5  # thousands of emulated threads
    agree(Case(cell, bidirectional=True, lengths=True, resets=True, size=(length, 4, 7, 33)), kernel, dtype)
    agree(Case(cell, "packed", bidirectional=True, size=(length, 9, 3, 7)), kernel, dtype)


@pytest.mark.parametrize(
    ("size", "strict_kernel", "tf32_kernel"),
    [((5, 3, 7, 33), "persistent", "tensor"), ((2, 3, 7, 129), "step", "cluster")],
)
@pytest.mark.parametrize("cell", CELLS)
def test_tf32_where_torch_allows_it(cell, size, strict_kernel, tf32_kernel):
    """Strict float32 otherwise, by the same call; either of torch's two ways to allow it counts."""
    problem = util.build(Case(cell, size=size), torch.float32)

    def run(kernel=None):
        with emulated(kernel):
            return torch.cat([t.flatten() for results in util.gradients(util.run, problem) for t in results.values()])

    strict, rounded = run(strict_kernel), run(tf32_kernel)
    assert torch.equal(run(), strict) and not torch.equal(strict, rounded)
    matmul = torch.backends.cuda.matmul
    for name, allowed in (("allow_tf32", True), ("fp32_precision", "tf32")):
        before = getattr(matmul, name)
        try:
            setattr(matmul, name, allowed)
            assert torch.equal(run(), rounded), name
        finally:
            setattr(matmul, name, before)
    assert torch.equal(run(), strict)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_projection_dtypes(dtype):
    for layout in util.LAYOUTS:
        for proj in (3, 20):
            agree(Case("lstm", layout, True, proj=proj, lengths=layout != "packed", size=(5, 4, 7, 9)), None, dtype)


@pytest.mark.parametrize("size", [(1, 1, 1, 1), (1, 3, 2, 5), (3, 1, 0, 2), (2, 9, 3, 65)], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("cell", CELLS)
def test_sizes(cell, kernel, size):
    agree(Case(cell, bidirectional=True, size=size), kernel)


@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize(("cell", "kernel", "proj"), RUN)
def test_each_cotangent_alone(cell, layout, kernel, proj):
    case = Case(cell, layout, True, proj=proj, lengths=layout == "dense", resets=layout == "dense", size=(4, 3, 2, 5))
    dtype = DTYPE.get(kernel, torch.float64)
    results = util.oracle(util.build(case, dtype))
    for name, cotangent in util.cotangents(results).items():
        agree(case, kernel, grad_of={name: cotangent.to(dtype)}, unused=True)


@pytest.mark.parametrize("cell", CELLS)
def test_any_backward_follows_any_forward(cell):
    """What is kept is laid out the same: after each forward, every backward gives the gradients of `step`."""
    for layout in ("dense", "packed"):
        problem = util.build(Case(cell, layout, True, size=(4, 3, 2, 17)), torch.float16).requiring()
        leaves = list(problem.leaves().values())
        for forward in ALL_KERNELS:
            with emulated(forward):
                results = util.run(problem)
            cotangents = util.cotangents(results)
            grads = {}
            for backward in ALL_KERNELS:
                with emulated(backward):
                    grads[backward] = torch.autograd.grad(
                        list(results.values()), leaves, list(cotangents.values()), retain_graph=True
                    )
            for backward in ALL_KERNELS[1:]:
                for actual, expected in zip(grads[backward], grads["step"], strict=True):
                    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("cell", CELLS)
def test_each_gradient_alone(cell):
    """What is not wanted is not computed, and what is does not depend on it."""
    problem = util.build(Case(cell, bidirectional=True, proj=3 if cell == "lstm" else 0, size=(4, 3, 2, 5)))
    with emulated():
        _, every = util.gradients(util.run, problem)
        for name in problem.leaves():
            _, alone = util.gradients(util.run, problem, wrt=[name])
            util.same_bits(alone, {name: every[name]})


@pytest.mark.parametrize(("cell", "kernel", "proj"), RUN)
def test_padding_is_not_looked_at(cell, kernel, proj):
    """NaN there, in the input and in what flows back, reaches no value and no gradient."""
    for layout in ("dense", "batch_first"):
        case = Case(cell, layout, True, proj=proj, lengths=True, size=(5, 4, 3, 6))
        problem = util.build(case, DTYPE.get(kernel, torch.float32))
        padding = torch.arange(5).unsqueeze(1) >= problem.lengths
        padding = padding.t() if layout == "batch_first" else padding
        with emulated(kernel):
            expected, _ = util.gradients(util.run, problem)
            grad_of = util.cotangents(expected)
            _, expected_grads = util.gradients(util.run, problem, grad_of)
            problem.input[padding] = float("nan")
            for name in ("output", "cells"):
                if name in grad_of:
                    grad_of[name][padding] = float("nan")
            actual, grads = util.gradients(util.run, problem, grad_of)
        assert not actual["output"][padding].any()
        util.same_bits(actual, expected)
        util.same_bits(grads, expected_grads)


@pytest.mark.parametrize("kernel", ALL_KERNELS)
@pytest.mark.parametrize("cell", CELLS)
def test_inference(cell, kernel):
    """Without gradients nothing is kept; values are the same bits. Cell states can be had all the same."""
    for case in (Case(cell, bidirectional=True, size=(4, 3, 2, 9)), Case(cell, "packed", size=(4, 3, 2, 9))):
        problem = util.build(case, DTYPE.get(kernel, torch.float32))
        with emulated(kernel):
            trained, _ = util.gradients(util.run, problem)
            for cell_states in (False, case.has_cell_state):
                inferred = util.run(problem, cell_states)
                util.same_bits(inferred, {name: trained[name] for name in inferred})


@pytest.mark.parametrize("proj", [0, 2])
def test_inference_with_projection_and_lengths(proj):
    case = Case("lstm", "batch_first", True, proj=proj, lengths=True, size=(4, 3, 2, 5))
    problem = util.build(case)
    with emulated():
        util.check_values(util.run(problem), util.oracle(problem))


@pytest.mark.parametrize("sizes", [(0, 3, 4, 7), (4, 0, 4, 7), (0, 0, 4, 7)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_empty(cell, sizes):
    for layout in ("dense", "batch_first"):
        case = Case(cell, layout, True, size=sizes)
        problem = util.build(case)
        with emulated():
            actual, grads = util.gradients(util.run, problem)
        expected, expected_grads = util.gradients(util.run, problem)  # the CPU's own
        util.same_bits(actual, expected)
        util.same_bits(grads, expected_grads)


@pytest.mark.parametrize("kernel", KERNELS)
def test_memory_of_any_shape(kernel):
    """Transposed, expanded and sliced tensors are read as what they are."""
    problem = util.build(Case("gru", bidirectional=True, size=(4, 3, 5, 6)), torch.float32)
    other = problem.map(lambda t: t.clone())
    other.input = problem.input.transpose(0, 1).contiguous().transpose(0, 1)
    other.h_0 = torch.stack([problem.h_0, problem.h_0], -1)[..., 0]
    other.weights = {name: t.t().contiguous().t() if t.dim() == 2 else t for name, t in other.weights.items()}
    with emulated(kernel):
        util.same_bits(util.run(other), util.run(problem))
        one = problem.input[:1].expand(4, 3, 5)
        leaf = problem.weights["weight_hh"].requires_grad_()
        results = [
            ops.layer(x, None, None, list(problem.weights.values()), cell="gru", bidirectional=True)[0]
            for x in (one, one.contiguous())
        ]
        grads = [torch.autograd.grad(output.sum(), leaf)[0] for output in results]  # an expanded gradient
    assert torch.equal(*results) and torch.equal(*grads)


@pytest.mark.parametrize("kernel", ALL_KERNELS)
def test_same_bits_every_time(kernel):
    dtype = DTYPE.get(kernel, torch.float32)
    problem = util.build(Case("lstm", bidirectional=True, lengths=True, size=(5, 4, 3, 17)), dtype)
    with emulated(kernel):
        first, grads = util.gradients(util.run, problem)
        for _ in range(3):
            again, grads_again = util.gradients(util.run, problem)
            util.same_bits(again, first)
            util.same_bits(grads_again, grads)


@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck_and_double_backward(cell):
    problem = util.build(Case(cell, bidirectional=True, resets=True, size=(3, 2, 2, 3)))
    leaves = {name: t.requires_grad_() for name, t in problem.leaves().items()}

    def layer(*tensors):
        return tuple(util.run(problem.having(dict(zip(leaves, tensors, strict=True)))).values())

    with emulated():
        assert torch.autograd.gradcheck(layer, tuple(leaves.values()))
        assert torch.autograd.gradgradcheck(layer, tuple(leaves.values()))


@pytest.mark.parametrize("lengths", [None, [2]], ids=["", "lengths"])
@pytest.mark.parametrize("layout", ["dense", "batch_first"])
def test_vmap_of_gradients(layout, lengths):
    """Per-sample gradients: what is kept for backward is not cut along the batch."""
    problem = util.build(Case("lstm", layout, state=False, size=(3, 4, 2, 5)), torch.float64)
    batch = 0 if layout == "batch_first" else 1

    def loss(weights, x):
        output = ops.layer(x.unsqueeze(batch), None, None, list(weights.values()), cell="lstm",
                           lengths=None if lengths is None else torch.tensor(lengths),
                           batch_first=layout == "batch_first")[0]  # fmt: skip
        return output.square().sum()

    with emulated():
        per_sample = torch.func.vmap(torch.func.grad(loss), (None, batch))(problem.weights, problem.input)
    for n, x in enumerate(problem.input.unbind(batch)):
        expected = torch.func.grad(loss)(problem.weights, x)
        util.check_gradients({name: g[n] for name, g in per_sample.items()}, expected)


def test_backward_inside_autocast_is_not_cast():
    problem = util.build(Case("lstm", proj=3, size=(3, 2, 4, 5)), torch.float32).requiring()
    with emulated():
        output = util.run(problem)["output"]
        leaves = list(problem.leaves().values())
        expected = torch.autograd.grad(output.sum(), leaves, retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            actual = torch.autograd.grad(output.sum(), leaves)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", LAYERS)
def test_modules(name, kernel):
    """Two layers, both directions, padded, packed and with lengths: as torch.nn, gradients included."""
    torch.manual_seed(0)
    ours = LAYERS[name](5, 7, 2, bidirectional=True, backend="custom")
    lengths = [4, 1, 3]
    rows = [torch.randn(n, 5) for n in lengths]
    padded = nn.utils.rnn.pad_sequence(rows)
    calls = {
        "padded": lambda: ours(padded)[0],
        "packed": lambda: ours(pack_sequence(rows, enforce_sorted=False))[0].data,
        "lengths": lambda: ours(padded, lengths=torch.tensor(lengths, dtype=torch.int32))[0],
    }
    for what, call in calls.items():
        results = []
        for backend in ("custom", "native"):
            rnn_ext.set_backend(ours, backend)
            with emulated(kernel):
                output = call()
                grads = torch.autograd.grad(output.square().sum(), list(ours.parameters()))
            results.append([output.detach(), *grads])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5, msg=lambda text: f"{what}: {text}")  # noqa: B023


@pytest.mark.parametrize("name", LAYERS)
def test_cells_and_step(name):
    """One timestep, of a cell and of a stack of layers: as torch.nn, gradients included."""
    torch.manual_seed(0)
    cell = getattr(rnn_ext, {"rnn_tanh": "RNN"}.get(name, name.upper()) + "Cell")(5, 7, backend="custom")
    layer, stack = (LAYERS[name](5, 7, layers, backend="custom") for layers in (1, 2))
    input = torch.randn(3, 5)
    hx, h_0 = torch.randn(2, 3, 7).unbind(), torch.randn(2, 2, 3, 7).unbind()
    hx, h_0 = (hx, h_0) if name == "lstm" else (hx[0], h_0[0])
    calls = {
        "cell": (cell, lambda: cell(input, hx)),
        "unbatched cell": (cell, lambda: cell(input[0])),
        "step": (layer, lambda: layer.step(input)[1]),
        "step of two layers": (stack, lambda: stack.step(input, h_0)[1]),
    }
    for what, (module, call) in calls.items():
        results = []
        for backend in ("custom", "native"):
            rnn_ext.set_backend(module, backend)
            with emulated():
                states = call()
                states = states if name == "lstm" else (states,)
                grads = torch.autograd.grad(sum(s.square().sum() for s in states), list(module.parameters()))
            results.append([*(s.detach() for s in states), *grads])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5, msg=lambda text: f"{what}: {text}")  # noqa: B023


def test_training():
    """A few steps of Adam end where torch.nn's do."""
    torch.manual_seed(0)
    module = rnn_ext.LSTM(3, 8, batch_first=True, proj_size=4, backend="custom", dtype=torch.float64)
    twin = nn.LSTM(3, 8, batch_first=True, proj_size=4, dtype=torch.float64)
    twin.load_state_dict(module.state_dict())
    input, target = torch.randn(4, 5, 3, dtype=torch.float64), torch.randn(4, 5, 4, dtype=torch.float64)
    losses = []
    for model in (module, twin):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(4):
            optimizer.zero_grad()
            with emulated():
                loss = nn.functional.mse_loss(model(input)[0], target)
                loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_the_emulated_op_is_another_one():
    """Or all of the above would test the CPU kernels."""
    weights = [torch.randn(20, 4), torch.randn(20, 5)]
    arguments = (torch.randn(3, 2, 4), None, None, weights, None, None, None, [], "lstm", False, False, False, True)
    with emulated():
        assert torch.ops.rnn_ext.layer(*arguments)[4].dtype == torch.uint8
    assert torch.ops.rnn_ext.layer(*arguments)[4].dtype == torch.float32


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_a_kernel_that_cannot_run_says_why():
    problem = util.build(Case("gru", size=(2, 1, 2, 129)), torch.float32)
    with (
        emulated("persistent"),
        pytest.raises(RuntimeError, match=r"persistent kernels .* end at hidden size 128, got 129"),
    ):
        util.run(problem)
    double = util.build(Case("gru", size=(2, 1, 2, 3)))
    with emulated("persistent"), pytest.raises(RuntimeError, match="do not take float64"):
        util.run(double)
    with emulated("tensor"), pytest.raises(RuntimeError, match="end at hidden size 96, got 97"):
        util.run(util.build(Case("gru", size=(2, 1, 2, 97)), torch.float32))
    with emulated("cluster"), pytest.raises(RuntimeError, match=r"cluster .* end at hidden size 384, got 385"):
        util.run(util.build(Case("gru", size=(2, 1, 2, 385)), torch.float32))
    with emulated("grid"), pytest.raises(RuntimeError, match="grid kernels do not take float64"):
        util.run(double)
    with emulated():  # nothing is left behind
        util.check_values(util.run(problem), util.oracle(problem.to(torch.float64)), torch.float32)


def test_small_shared_memory_goes_to_step(monkeypatch):
    """The same call on a smaller GPU: the table answers for the device at hand."""
    monkeypatch.setenv("EMU_ARCH", "80")
    problem = util.build(Case("lstm", size=(1, 1, 2, 112)), torch.float32)
    with (
        emulated("persistent"),
        pytest.raises(RuntimeError, match=r"needs \d+ bytes of shared memory; a block has \d+"),
    ):
        util.run(problem)
    with emulated():
        util.check_values(util.run(problem), util.oracle(problem.to(torch.float64)), torch.float32)


@pytest.mark.parametrize("variable", ["EMU_ARCH", "EMU_CLUSTER"])
def test_no_such_cluster_goes_to_another_kernel(monkeypatch, variable):
    """Clusters of more than 8 blocks are not for every GPU, and none at all for those before compute capability 9.0."""
    problem = util.build(Case("gru", bidirectional=True, size=(1, 1, 2, 400)), torch.float16)
    with emulated("cluster"):
        results = [util.run(problem)]
    monkeypatch.setenv(variable, "80" if variable == "EMU_ARCH" else "8")
    with emulated("cluster"), pytest.raises(RuntimeError, match="clusters of 16 blocks: this GPU"):
        util.run(problem)
    with emulated():
        results.append(util.run(problem))
    for values in results:
        util.check_values(values, util.oracle(problem.to(torch.float64)), torch.float16)


@pytest.mark.parametrize("cell", CELLS)
def test_modules_over_clusters(cell):
    """The table's own choice for sizes that one block cannot hold: stacked, both ways, packed, trained."""
    torch.manual_seed(0)
    layer = LAYERS.get(cell, functools.partial(rnn_ext.RNN, nonlinearity="relu"))
    twin = {"gru": nn.GRU, "lstm": nn.LSTM}.get(cell, functools.partial(nn.RNN, nonlinearity=cell.removeprefix("rnn_")))
    options = {"num_layers": 2, "bidirectional": True}
    ours = layer(5, 136, backend="custom", **options).bfloat16()
    theirs = twin(5, 136, **options).double()
    theirs.load_state_dict(ours.double().state_dict())
    ours = ours.bfloat16()
    sequences = [torch.randn(length, 5).bfloat16() for length in (5, 3, 1)]
    with emulated():
        output = ours(pack_sequence(sequences))[0].data
        grads = torch.autograd.grad(output.float().square().mean(), list(ours.parameters()))
    expected = theirs(pack_sequence([s.double() for s in sequences]))[0].data
    expected_grads = torch.autograd.grad(expected.square().mean(), list(theirs.parameters()))
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=3e-2)
    if cell == "rnn_relu":
        return  # a rounding takes some unit across the kink, and its gradient with it
    floor = max(grad.abs().max() for grad in expected_grads)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert (grad.double() - wanted).abs().max() < 6e-2 * floor


@pytest.mark.parametrize("packed", [False, True])
def test_few_multiprocessors_go_to_step(monkeypatch, packed):
    """Where the blocks of `grid` could not all be resident, the table has another kernel, and who insists is told."""
    problem = util.build(Case("rnn_tanh", "packed" if packed else "dense", True, size=(4, 2, 2, 129)), torch.float32)
    expected, grads = util.gradients(util.oracle, problem.to(torch.float64))
    for multiprocessors, kernel in ((132, "grid"), (132, None), (1, None)):
        monkeypatch.setenv("EMU_MULTIPROCESSORS", str(multiprocessors))
        with emulated(kernel):
            actual, actual_grads = util.gradients(util.run, problem)
        util.check_values(actual, expected, torch.float32)
        util.check_gradients(actual_grads, grads, torch.float32)
    with (
        emulated("grid"),
        pytest.raises(RuntimeError, match=r"\d+ blocks of \d+ bytes .* holds \d at once \(1 multipr"),
    ):
        util.run(problem)


@pytest.mark.parametrize("kernel", ALL_KERNELS)
def test_gradients_pass_a_relu_of_nan(kernel):
    """As on the CPU and in torch: only what is not above zero stops them."""
    layer = rnn_ext.RNN(4, 16, nonlinearity="relu").to(DTYPE.get(kernel, torch.float64))
    input = torch.randn(3, 2, 4, dtype=layer.weight_ih_l0.dtype)
    input[1, 0, 2] = torch.nan
    input.requires_grad_()
    grads = []
    for context in (contextlib.nullcontext(), emulated(kernel)):
        with context:
            output, _ = layer(input)
            grads += torch.autograd.grad(output, input, torch.ones_like(output))
    expected, found = grads
    assert expected[1:, 0].isfinite().all() and (expected[1:, 0] != 0).all()
    torch.testing.assert_close(found[1:, 0], expected[1:, 0], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(("change", "message"), util.BACKWARD_MISTAKES)
def test_backward_checks_its_arguments(change, message):
    with emulated():
        util.check_backward_mistake(change, message)


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
def test_recompute(cell):
    torch.manual_seed(0)
    plain = getattr(rnn_ext, cell)(4, 5).double()
    again = copy.deepcopy(plain)
    again.recompute = True
    input = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    with emulated():
        grads = [torch.autograd.grad(m(input)[0].sum(), [input, *m.parameters()]) for m in (plain, again)]
    for got, want in zip(*grads, strict=True):
        assert torch.equal(got, want)


# ---- the library itself, on a machine without a GPU ------------------------------------------------------------------

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@with_cuda
def test_cpu_calls_beside_the_cuda_kernels():
    problem = util.build(Case("lstm", bidirectional=True))
    util.check_values(util.run(problem), util.oracle(problem))


@with_cuda
@NO_GPU
def test_a_device_that_is_not_there():
    """One sentence each, from the driver's or torch's own words; no crash."""
    assert "cuda:0: " in ops.cuda_problem(0)
    with FakeTensorMode():
        input = torch.empty(3, 2, 4, device="cuda")
    supported, reason = backends.can_run_custom(input)
    assert not supported and "cuda:0: " in reason
    weights = [torch.randn(20, 4), torch.randn(20, 5)]
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(RuntimeError, match="expected tensors on a CUDA device, got cpu"):
        torch.ops.rnn_ext.layer.default.redispatch(
            key, torch.randn(3, 2, 4), None, None, weights, None, None, None, [], "lstm", False, False, False, False
        )


@pytest.mark.parametrize("dtype", sorted(backends.CUSTOM_DTYPES, key=str), ids=str)
@pytest.mark.parametrize(("cell", "proj"), util.projected(3))
def test_fake_kernel_keeps_as_much_as_the_real_one(cell, proj, dtype):
    for layout in util.LAYOUTS:
        problem = util.build(Case(cell, layout, True, proj=proj, size=(3, 2, 4, 5)), dtype)
        rest = (problem.batch_sizes, None, None, [], cell, True, layout == "batch_first", False, True)
        with emulated():
            real = torch.ops.rnn_ext.layer(problem.input, problem.h_0, None, list(problem.weights.values()), *rest)
        with FakeTensorMode() as mode:
            fakes = problem.map(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"))
            sizes = None if problem.batch_sizes is None else mode.from_tensor(problem.batch_sizes)
            fake = torch.ops.rnn_ext.layer(fakes.input, fakes.h_0, None, list(fakes.weights.values()), sizes, *rest[1:])
        for actual, expected in zip(fake, real, strict=True):
            assert actual.shape == expected.shape and actual.dtype == expected.dtype
            assert actual.device.type == "cuda"


@with_cuda
def test_choices_are_those_of_the_table():
    h100 = util.H100
    assert ops.cuda_kernel("lstm", torch.float32, 50, 8, 64, **h100)[0] == "persistent"
    assert ops.cuda_kernel("gru", torch.float32, 1, 8, 300, **h100)[0] == "step"
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        kernel, reason = ops.cuda_kernel("lstm", torch.float32, 50, 8, 64, **h100)
        assert kernel == "tensor" and "TF32" in reason
        kernel, reason = ops.cuda_kernel("lstm", torch.float32, 50, 8, 256, **h100)
        assert kernel == "cluster" and "TF32" in reason
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    kernel, reason = ops.cuda_kernel("gru", torch.float32, 50, 8, 300, **h100)
    assert kernel == "grid" and "exchange" in reason
    kernel, reason = ops.cuda_kernel("gru", torch.float16, 50, 400, 512, bidirectional=True, **h100)
    assert kernel == "pointwise" and "GEMM" in reason
    kernel, reason = ops.cuda_kernel("gru", torch.float16, 50, 64, 512, bidirectional=True, **h100)
    assert kernel == "cluster" and "is assumed, since none is here to be asked" in reason
    assert ops.cuda_kernel("lstm", torch.float32, 50, 8, 64, projected=True, **h100)[0] == "pointwise"
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError):  # nothing to ask, and nothing is assumed unasked
            ops.cuda_kernel("lstm", torch.float32, 50, 8, 64)
    names = "step, pointwise, persistent, tensor, cluster, grid or None"
    with pytest.raises(ValueError, match=f"unknown CUDA kernel 'fast': expected {names}"):
        ops.force_cuda_kernel("fast")


@with_cuda
def test_explain_on_a_gpu(monkeypatch):
    """With a GPU that is only said to be there."""
    gpu = dict(util.H100)
    util.pretend_gpu(monkeypatch, gpu)
    module = rnn_ext.GRU(4, 300, bidirectional=True, batch_first=True, backend="custom")
    with FakeTensorMode():
        few, many, long = (torch.empty(*size, 4, device="cuda") for size in ((8, 3), (64, 3), (8, 50)))
    explanation = rnn_ext.explain(module, few)
    assert (explanation.backend, explanation.kernel) == ("custom", "rnn_ext::layer gru, cuda step")
    assert "few rows" in explanation.reason
    assert rnn_ext.explain(module, many).kernel == "rnn_ext::layer gru, cuda pointwise"
    explanation = rnn_ext.explain(module, long)
    assert explanation.kernel == "rnn_ext::layer gru, cuda grid" and "one launch" in explanation.reason
    packed = nn.utils.rnn.pack_padded_sequence(torch.empty(8, 50, 4), [50] * 8, batch_first=True)
    with FakeTensorMode():
        packed = packed._replace(data=torch.empty(400, 4, device="cuda"), batch_sizes=packed.batch_sizes)
    assert rnn_ext.explain(module, packed).kernel == "rnn_ext::layer gru, cuda grid"
    module.backend = "auto"  # what nobody has timed is no default, but better than what torch cannot do
    explanation = rnn_ext.explain(module, few)
    assert (explanation.backend, explanation.reason) == ("native", backends.UNMEASURED)
    plain, masks = rnn_ext.LSTM(4, 300), {"lengths": [3] * 3, "resets": torch.zeros(8, 3), "return_cell_states": True}
    assert rnn_ext.explain(plain, few).backend == "native"
    for name, value in masks.items():
        assert rnn_ext.explain(plain, few, **{name: value}).backend == "custom", name
    cell = rnn_ext.GRUCell(4, 300, backend="custom")
    for size, kernel in (((4,), "step"), ((8, 4), "step"), ((500, 4), "pointwise")):
        with FakeTensorMode():
            input = torch.empty(size, device="cuda")
        assert rnn_ext.explain(cell, input).kernel == f"rnn_ext::layer gru, cuda {kernel}"
    gpu["shared_bytes"] = 163 * 1024  # backward needs more than forward
    explanation = rnn_ext.explain(rnn_ext.GRU(4, 112, backend="custom"), few)
    assert explanation.kernel == "rnn_ext::layer gru, cuda persistent" and "; backward by grid: " in explanation.reason


def test_without_cuda_kernels(monkeypatch):
    monkeypatch.setattr(ops, "with_cuda", lambda: False)
    with FakeTensorMode():
        input = torch.empty(3, 2, 4, device="cuda")
    supported, reason = backends.can_run_custom(input)
    assert not supported and "built without CUDA kernels; run" in reason
    with pytest.raises(ValueError, match="built without CUDA kernels"):
        ops.force_cuda_kernel("step")


@pytest.mark.parametrize("kernel", ["step", "pointwise"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layer", ["gru", "zoneout", "projected"])
def test_small_changes_of_a_16_bit_state_add_up(kernel, dtype, layer):
    """A state that changes by less than its last bit in each timestep: h goes on in float32."""
    length = 400
    if layer == "gru":
        module = rnn_ext.GRU(1, 5, backend="custom")
        with torch.no_grad():
            module.bias_ih_l0[5:10] = 6  # z: a change of 1/400 in each timestep
    else:
        options = {"proj_size": 3} if layer == "projected" else {}
        module = rnn_ext.LSTM(1, 5, zoneout=(0.996, 0), backend="custom", **options)
    module = module.to(dtype).eval()
    input = torch.randn(length, 2, 1).to(dtype)
    with torch.no_grad():
        expected = copy.deepcopy(module).double()(input.double())[0]
        with emulated(kernel):
            found = module(input)[0]
    largest = (found.double() - expected).abs().max() / expected.abs().max()
    assert largest < (0.02 if dtype == torch.bfloat16 else 0.003)
