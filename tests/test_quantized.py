"""Layers with weights of 8 bits: what is rounded, and that nothing else is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import util
from torch import Tensor
from util import CELLS, SIZES, Case, Problem, build, check, matrix, named, oracle, projected, same_bits

from rnn_ext import ops, quantized, reference

# Beside the oracle with the rounded weights. Inputs, normal, are rounded to steps of 1e-4, so by 3e-5 in the mean: 33
# of them with weights up to 1 (one unit) make 1e-4. Rounding a weight does 250 times as much.
TOLERANCE = 3e-4
BITS = (16, 8)  # of what is multiplied by weights
bits = pytest.mark.parametrize("activations", BITS)
KINDS = [("RNN", {}), ("RNN", {"nonlinearity": "relu"}), ("GRU", {}), ("LSTM", {}), ("LSTM", {"proj_size": 5})]
kinds = pytest.mark.parametrize(("kind", "options"), KINDS, ids=["tanh", "relu", "gru", "lstm", "projected"])


def rounded(problem: Problem, activations: int = 16) -> tuple[Problem, list[Tensor]]:
    """The problem with rounded weights, and the same weights as the op takes them."""
    gates = reference.CELLS[problem.case.cell].gates
    weights, parts, leaves = problem.weights, [], {}
    for suffix in ("", "_reverse")[: 1 + problem.case.bidirectional]:
        packed, scales = {}, {}
        for name in ("weight_ih", "weight_hh", "weight_hr"):
            weight = weights.get(name + suffix)
            if weight is not None:
                parts_of = 1 if name == "weight_hr" else gates
                packed[name], scales[name] = quantized.pack(weight.float(), parts_of, activations)
                restored = quantized.unpack(packed[name], scales[name], parts_of, weight.shape[1])
                leaves[name + suffix] = restored.to(weight.dtype)
        none = torch.zeros_like(scales["weight_ih"])
        biases = [weights.get(name + suffix, none).float() for name in ("bias_ih", "bias_hh")]
        factors = torch.stack([scales["weight_ih"], scales["weight_hh"], *biases]).unflatten(1, (gates, -1))
        parts += [packed["weight_ih"], packed["weight_hh"], factors]
        if "weight_hr" in packed:
            parts += [packed["weight_hr"], scales["weight_hr"]]
    return problem.having(leaves), parts


def run(problem: Problem, weights: list[Tensor]) -> dict[str, Tensor]:
    case = problem.case
    layout = (problem.batch_sizes, problem.lengths, problem.resets, case.bidirectional, case.layout == "batch_first")
    results = ops.quantized_layer(
        problem.input, problem.h_0, problem.c_0, weights, case.cell, *layout, case.has_cell_state
    )
    return named(results, case)


def instruction_sets() -> Iterator[str]:
    """Those of util, and where the processor has instructions for products of integers with and without them."""
    from rnn_ext import _C

    for name in util.instruction_sets():
        for multiplies in (False, True):
            _C.multiply_integers(multiplies)
            yield name


def in_steps(rows: Tensor, activations: int) -> Tensor:
    """Rows of float32 as the kernel rounds them, in float64."""
    # (As a tensor: a number by a tensor would be its inverse, times the number.)
    most = torch.tensor(float(min(2 ** (activations - 1) - 1, (2**31 - 1) // (127 * max(rows.shape[-1], 1)))))
    largest = rows.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest < 1e-30, 0, most / largest)
    return (rows * inverse).round().double() * torch.where(largest < 1e-30, 0, largest / most).double()


def one_step(problem: Problem, activations: int) -> dict[str, Tensor]:
    """The results of a problem of one timestep and direction, in float64 but for what the kernel rounds."""
    cell = reference.CELLS[problem.case.cell]
    w = {name: weight.double() for name, weight in problem.weights.items()}
    x, h = (in_steps(rows, activations) for rows in (problem.input[0], problem.h_0[0]))
    igates, hgates = x @ w["weight_ih"].T + w["bias_ih"], h @ w["weight_hh"].T + w["bias_hh"]
    states = [problem.h_0[0].double()] + ([] if problem.c_0 is None else [problem.c_0[0].double()])
    h, *c = cell.step(igates, hgates, states)
    if problem.case.proj:
        h = in_steps(h.float(), activations) @ w["weight_hr"].T
    results = (h[None], h[None], *[state[None] for state in c], *[state[None] for state in c])
    return named(results if c else (*results, None, None), problem.case)


def agrees(case: Case) -> None:
    problem, weights = rounded(build(case, torch.float32))
    expected = oracle(problem.to(torch.float64))
    for _ in instruction_sets():
        check(run(problem, weights), expected, TOLERANCE, 1.0, "value of")


@bits
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("cell", "proj"), projected(3))
def test_one_timestep_is_rounded_as_it_is_said(cell, proj, size, activations):
    """And nothing else is, but to float32. (The h that is projected may be rounded to another step.)"""
    for case in (
        Case(cell, size=(1, 9, size, 33), proj=proj),
        Case(cell, size=(1, 2, 33, max(size, proj + 1)), proj=proj),
        Case(cell, size=(1, size, 600, 17), proj=proj),
    ):
        problem, weights = rounded(build(case, torch.float32), activations)
        expected = one_step(problem, activations)
        for _ in instruction_sets():
            tolerance = 3e-6 if not proj else 2 / 2**activations
            check(run(problem, weights), expected, tolerance, 1.0, "value of")


@pytest.mark.parametrize("case", matrix(), ids=str)
def test_everything_in_the_matrix(case):
    agrees(case)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("cell", "proj"), projected(3))
def test_all_sizes(cell, proj, size):
    """Of units, inputs and rows: those of one timestep, and of many that are projected at once."""
    if size > proj:
        agrees(Case(cell, size=(3, 5, size, 33), proj=proj))
        agrees(Case(cell, size=(3, 2, 33, size), proj=proj))
        agrees(Case(cell, size=(3, size, 7, 17), proj=proj))
        agrees(Case(cell, size=(size, 1, 7, 17), proj=proj))
        agrees(Case(cell, size=(size, 5, 4, 6), proj=proj, bidirectional=True, lengths=True))


@pytest.mark.parametrize("cell", CELLS)
def test_empty_calls(cell):
    for size in ((0, 3, 4, 7), (5, 0, 4, 7), (5, 3, 0, 7)):
        agrees(Case(cell, size=size))


@bits
@pytest.mark.parametrize(("cell", "proj"), projected(9))
@pytest.mark.parametrize("layout", ["dense", "lengths", "resets"])
def test_the_same_bits_whatever_the_batch_and_the_threads(cell, proj, layout, activations):
    given = {} if layout == "dense" else {layout: True}
    case = Case(cell, size=(9, 21, 40, 70), proj=proj, bidirectional=True, **given)
    problem, weights = rounded(build(case, torch.float32), activations)
    by_set: dict[str, dict[str, Tensor]] = {}
    for name in instruction_sets():
        expected = run(problem, weights)
        same_bits(expected, by_set.setdefault(name, expected))
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            same_bits(run(problem, weights), expected)
        torch.set_num_threads(1)
        if layout == "dense":
            for count in (1, 2, 7):
                part = run(problem.first_entries(count), weights)
                same_bits(part, {key: value[:, :count] for key, value in expected.items()})


@bits
@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_threads_that_share_the_units(cell, threads, activations):
    """Layers large enough for it: one sequence, and a few."""
    for bidirectional in (False, True):
        for batch in (1, 3):
            case = Case(cell, size=(4, batch, 50, 260), bidirectional=bidirectional, resets=batch == 3)
            problem, weights = rounded(build(case, torch.float32), activations)
            expected = run(problem, weights)
            torch.set_num_threads(threads)
            same_bits(run(problem, weights), expected)
            torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sequences_of_16_bits(dtype):
    problem, weights = rounded(build(Case("lstm", resets=True), dtype))
    expected = run(problem.to(torch.float32), weights)
    actual = run(problem, weights)
    same_bits(actual, {name: value.to(dtype) for name, value in expected.items()})


@bits
def test_weights_are_rounded_to_the_nearest_step_of_their_row(activations):
    weight = torch.randn(3 * 37, 11) * torch.logspace(-8, 8, 111).unsqueeze(1)
    weight[5] = 0
    numbers, scale = quantized.pack(weight, 3, activations)
    assert numbers.shape == ((3, 6, 96) if activations == 16 else (3, 3, 192))
    assert numbers.dtype == torch.int8 and numbers.is_contiguous()
    restored = quantized.unpack(numbers, scale, 3, 11)
    assert torch.equal(scale, weight.abs().amax(1) / 127)
    assert ((restored - weight).abs() <= scale.unsqueeze(1) * 0.5001).all() and not restored[5].any()
    assert numbers.min() == -127 and numbers.max() == 127
    again, same = quantized.pack(restored, 3, activations)
    assert torch.equal(again, numbers)
    torch.testing.assert_close(same, scale)


@bits
@pytest.mark.parametrize("depth", [1, 500, 516, 517, 1000, 5000, 70000, 140000])
def test_the_largest_sums_do_not_overflow(depth, activations):
    """All weights and inputs as large as they get, of one sign."""
    weights = rounded(build(Case("rnn_relu", size=(1, 1, depth, 1), bias=False), torch.float32), activations)[1]
    weights[0] = quantized.pack(torch.ones(1, depth), 1, activations)[0]
    for sign in (1, -1):
        factors = torch.tensor([1.0 * sign, 1, 0, 0]).view(4, 1, 1)
        input = torch.full((1, 1, depth), 3.0 * sign)
        for _ in instruction_sets():
            output = ops.quantized_layer(
                input, None, None, [weights[0], weights[1], factors], "rnn_relu", None, None, None, False, False, False
            )[0]
            torch.testing.assert_close(output.item(), 3.0 * 127 * depth, rtol=1e-5, atol=0)


@bits
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("cell", CELLS)
def test_what_is_not_finite_stays_in_its_sequence(cell, value, activations):
    problem, weights = rounded(build(Case(cell, size=(4, 9, 20, 33)), torch.float32), activations)
    for _ in instruction_sets():
        expected = run(problem, weights)
        input = problem.input.clone()
        input[2, 3, 11] = value
        actual = run(problem.having({"input": input}), weights)
        for name in ("output", "h_n"):
            assert actual[name][-1, 3].isnan().all()
            assert torch.equal(actual[name][:, [0, 1, 2, 4, 5, 6, 7, 8]], expected[name][:, [0, 1, 2, 4, 5, 6, 7, 8]])
        assert torch.equal(actual["output"][:2], expected["output"][:2])


def test_numbers_of_all_magnitudes():
    """Zeros, and what is too small or too large for the inverse of its scale, do not make NaN of others."""
    problem, weights = rounded(build(Case("lstm", size=(3, 4, 20, 33)), torch.float32))
    expected = run(problem.having({"input": torch.zeros_like(problem.input)}), weights)
    for factor in (0.0, 1e-45, 1e-38, 1e-31):
        same_bits(run(problem.having({"input": problem.input * factor}), weights), expected)
    assert all(t.isfinite().all() for t in run(problem.having({"input": problem.input * 1e37}), weights).values())


def test_padding_is_not_read():
    problem, weights = rounded(build(Case("gru", "batch_first", lengths=True, size=(6, 5, 4, 7)), torch.float32))
    past = torch.arange(6) >= problem.lengths.unsqueeze(1)
    same_bits(
        run(problem.having({"input": problem.input.masked_fill(past.unsqueeze(2), float("nan"))}), weights),
        run(problem, weights),
    )
