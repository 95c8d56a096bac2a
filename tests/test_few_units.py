"""Layers of few units and many sequences, whose kernels have sequences in the lanes of vectors (few_units.inl)."""

from __future__ import annotations

import pytest
import torch
from test_groups import agree as agree_in_groups
from test_groups import arguments
from util import (
    CELLS,
    Case,
    agree,
    build,
    check_gradients,
    check_values,
    cotangents,
    forward_agrees,
    gradients,
    instruction_sets,
    oracle,
    run,
    same_bits,
)

import rnn_ext
from rnn_ext import _C

DTYPES = {"float32": torch.float32, "float64": torch.float64}
# L, N, I, H: sequences that end inside and on the edge of vectors, of pairs of these and of parts of 128; inputs that
# are columns one by one, squares of lanes and rows; the last are too few sequences and too many units.
SIZES = [
    (3, 16, 1, 1),
    (5, 33, 2, 2),
    (2, 129, 3, 3),
    (1, 128, 8, 4),
    (3, 31, 30, 1),
    (2, 131, 16, 2),
    (4, 67, 4, 1),
    (1, 300, 1, 2),
    (3, 31, 19, 3),
    (3, 31, 35, 3),
    (3, 33, 2, 7),
    (3, 15, 2, 2),
    (3, 17, 2, 9),
]


def sizes(given):
    return pytest.mark.parametrize("size", given, ids=lambda size: "x".join(map(str, size)))


@pytest.mark.parametrize("cell", CELLS)
def test_what_is_few(cell):
    """Whom the other tests are about: half a vector of units, of an RNN a quarter."""
    gated = cell in ("gru", "lstm")
    for name in instruction_sets():
        most = {"baseline": 4, "avx2": 8}.get(name, 16) // (2 if gated else 4)
        batch, inputs = max(16, 4 * most), (128 if gated else 32) // most
        assert _C.has_few_units(cell, inputs, most, batch)
        assert not _C.has_few_units(cell, inputs + 1, most, batch)
        assert not _C.has_few_units(cell, 1, most + 1, 100)
        assert not _C.has_few_units(cell, inputs, most, batch - 1)


@sizes(SIZES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_sizes(cell, size, dtype):
    """In both layouts, with both directions and all options between the two."""
    agree(build(Case(cell, "dense", size=size)).to(dtype), dtype)
    agree(build(Case(cell, "batch_first", True, bias=False, resets=True, size=size)).to(dtype), dtype)
    agree(build(Case(cell, "dense", True, state=False, resets=True, size=size)).to(dtype), dtype)


@pytest.mark.parametrize("inputs", [1, 16])
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu"])
def test_many_sequences(cell, inputs):
    """More of which go through a step together."""
    agree(build(Case(cell, "dense", size=(2, 8192 + 5, inputs, 1))), torch.float64)
    agree(build(Case(cell, "batch_first", True, lengths=True, size=(3, 8192 + 600, inputs, 1))), torch.float64)


@pytest.mark.parametrize("cell", CELLS)
def test_each_result_alone(cell):
    """Gradients of one result, and of some parameters."""
    problem = build(Case(cell, "batch_first", True, resets=True, size=(4, 37, 5, 1)))
    for name, cotangent in cotangents(run(problem)).items():
        expected = gradients(oracle, problem, {name: cotangent}, unused=True)[1]
        check_gradients(gradients(run, problem, {name: cotangent}, unused=True)[1], expected)
    expected = gradients(oracle, problem)[1]
    for leaf in problem.leaves():
        check_gradients(gradients(run, problem, wrt=[leaf])[1], {leaf: expected[leaf]})


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@sizes([(6, 77, 1, 1), (5, 61, 2, 2), (4, 290, 5, 3), (7, 150, 16, 4)])
@pytest.mark.parametrize("cell", CELLS)
def test_ragged(cell, size, dtype):
    """Sequences that end, or in the other direction begin, at any step: in one of the parts, or in all."""
    agree(build(Case(cell, "packed", True, size=size)).to(dtype), dtype)
    agree(build(Case(cell, "packed", True, state=False, size=size)).to(dtype), dtype)
    agree(build(Case(cell, "batch_first", True, lengths=True, resets=True, size=size)).to(dtype), dtype)
    agree(build(Case(cell, "dense", lengths=True, state=False, size=size)).to(dtype), dtype)


@sizes([(5, 48, 2, 2), (2, 300, 3, 1), (3, 70, 5, 4)])
@pytest.mark.parametrize("cell", CELLS)
def test_groups(cell, size):
    """Gradients of weights by groups of sequences, many or few of which lie together: those of each group alone."""
    for lengths in (False, True):
        problem = build(Case(cell, "batch_first", True, lengths=lengths, resets=lengths, size=size))
        for _ in instruction_sets():
            given = arguments(problem)
            for groups in (1, 2, size[1] // 2, size[1]):
                agree_in_groups(given, groups)


@pytest.mark.parametrize("inputs", [2, 3, 5])
@pytest.mark.parametrize("cell", CELLS)
def test_overlapping_inputs(cell, inputs):
    """Of a sliding window rows are one number apart, and columns, too."""
    problem = build(Case(cell, size=(1, 50, inputs, 1))).requiring()
    line = torch.arange(49.0 + inputs, dtype=torch.float64).sin().requires_grad_()
    windows = line.unfold(0, inputs, 1)[None]
    for _ in instruction_sets():
        found = []
        for problem.input in (windows, windows.contiguous()):
            results = run(problem)
            loss = sum((results[name] * g).sum() for name, g in cotangents(results).items())
            grads = torch.autograd.grad(loss, [line, *problem.weights.values()], retain_graph=True)
            found.append(results | dict(zip(["line", *problem.weights], grads, strict=True)))
        same_bits(found[0], found[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("cell", CELLS)
def test_16_bits(cell, dtype):
    problem = build(Case(cell, "batch_first", True, size=(5, 33, 3, 2))).to(dtype)
    forward_agrees(problem, dtype)
    agree(problem, dtype)


@pytest.mark.parametrize("inputs", [2, 16])
@pytest.mark.parametrize("cell", CELLS)
def test_nan_stays_in_its_sequence(cell, inputs):
    """And so does infinity, forward and in the gradient of the input; sums over sequences have it."""
    problem = build(Case(cell, "dense", True, size=(3, 35, inputs, 2)))
    problem.input[1, 33, 0] = float("nan")
    problem.input[2, 4, 1] = float("inf")
    expected, expected_grads = gradients(oracle, problem)
    for _ in instruction_sets():
        results, grads = gradients(run, problem)
        for name, result in results.items():
            others = [j for j in range(35) if j not in (4, 33)]
            check_values({name: result[:, others]}, {name: expected[name][:, others]})
        assert results["output"][1:, 33, :2].isnan().all() and grads["weight_ih"].isnan().any()
        assert grads["input"][:, others].isfinite().all()
        check_gradients({"input": grads["input"][:, others]}, {"input": expected_grads["input"][:, others]})


@pytest.mark.parametrize("cell", CELLS)
def test_sequences_without_timesteps(cell):
    """What comes in as the gradient of their states goes to the initial ones, and nowhere else."""
    problem = build(Case(cell, bidirectional=True, lengths=True, size=(4, 90, 2, 2)))
    none = problem.lengths == 0
    grad_of = cotangents(run(problem))
    for name in ("h_n", "c_n"):
        if name in grad_of:
            grad_of[name][:, none] = float("nan")
    expected = gradients(oracle, problem, grad_of)[1]
    assert none.any() and expected["weight_hh"].isfinite().all()
    for _ in instruction_sets():
        check_gradients(gradients(run, problem, grad_of)[1], expected)


@pytest.mark.parametrize("cell", CELLS)
def test_weights_that_are_infinite(cell):
    """Lanes without a sequence add nothing to sums over sequences."""
    problem = build(Case(cell, size=(2, 17, 1, 2)))
    problem.weights["weight_hh"][0, 0] = float("inf")
    problem.h_0.abs_().add_(1)
    if cell in ("rnn_relu", "rnn_tanh"):
        problem.h_0.neg_()
    _, expected = gradients(oracle, problem)
    _, grads = gradients(run, problem)
    for name, grad in grads.items():
        torch.testing.assert_close(grad.isnan(), expected[name].isnan(), msg=name)


@pytest.mark.parametrize("size", [(100, 700, 2, 2), (3, 700, 16, 2)], ids=["columns", "rows"])
@pytest.mark.parametrize("cell", CELLS)
def test_threads(cell, size):
    """The same bits by any number of them, of sequences of one length and of others."""
    for lengths in (False, True):
        problem = build(Case(cell, "batch_first", True, lengths=lengths, size=size)).to(torch.float32)
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(gradients(run, problem))
        for more in found[1:]:
            for one, other in zip(more, found[0], strict=True):
                same_bits(one, other)


@pytest.mark.parametrize("cell", CELLS)
def test_second_derivatives(cell):
    """Which are computed elsewhere, from the same arguments."""
    problem = build(Case(cell, size=(3, 18, 2, 2)))
    names = [name for name in problem.leaves() if name != "c_0"]

    def second(fn):
        leaves = problem.requiring()
        results = fn(leaves)
        first = torch.autograd.grad(
            [t for t in results.values()],
            [leaves.leaves()[n] for n in names],
            list(cotangents(results).values()),
            create_graph=True,
        )
        total = sum((g * g).sum() for g in first)
        grads = torch.autograd.grad(total, [leaves.leaves()[n] for n in names])
        return dict(zip(names, grads, strict=True))

    check_gradients(second(run), second(oracle))


@pytest.mark.parametrize("inputs", [1, 16])
def test_many_rows(inputs):
    """A sum of tenths in one chain would be off by 1e-4."""
    rnn = rnn_ext.RNN(inputs, 1, nonlinearity="relu")
    with torch.no_grad():
        for name, p in rnn.named_parameters():
            p.fill_(name != "weight_hh_l0")
    output, _ = rnn(torch.ones(100_000, 16, inputs))
    output.backward(torch.full_like(output, 0.1))
    for p in (rnn.weight_ih_l0, rnn.bias_ih_l0):
        torch.testing.assert_close(p.grad, torch.full_like(p, 160_000), rtol=1e-6, atol=0)


def test_recompute():
    torch.manual_seed(0)
    x = torch.randn(6, 40, 3)
    gru = rnn_ext.GRU(3, 2, num_layers=2)
    again = rnn_ext.GRU(3, 2, num_layers=2, recompute=True)
    again.load_state_dict(gru.state_dict())
    for layer in (gru, again):
        layer(x)[0].square().sum().backward()
    for (name, p), q in zip(gru.named_parameters(), again.parameters(), strict=True):
        same_bits({name: q.grad}, {name: p.grad})
