"""Tensors of 16 bits on the CPU: computed in float32, from weights that are converted to it for the call, widened in
every timestep or, of a few rows, read as they lie."""

from __future__ import annotations

import pytest
import torch
from util import (
    CELLS,
    COMBINED,
    LAYOUTS,
    Case,
    Problem,
    agree,
    build,
    check_gradients,
    check_values,
    cotangents,
    forward_agrees,
    gradients,
    instruction_sets,
    oracle,
    projected,
    run,
    same_bits,
    sample,
    widens,
)

from rnn_ext import _C, ops

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("cell", "proj"), projected(8))
def test_every_layout(cell, proj, layout, dtype, widening):
    """Storage in 16 bits, accumulation and cell state in 32: close to exact arithmetic on the same 16-bit numbers."""
    flags = {"lengths": True, "resets": True} if layout != "packed" else {}
    problem = build(Case(cell, layout, True, proj=proj, size=(31, 5, 9, 17), **flags)).to(dtype)
    agree(off_zero(problem), dtype)


def off_zero(problem: Problem) -> Problem:
    """The pre-activations of a relu, where rounding would decide whether a unit passes a gradient or none."""
    if problem.case.cell == "rnn_relu":
        for name, weight in problem.weights.items():
            if name.startswith("bias_ih"):
                weight.copy_(torch.where(torch.arange(len(weight)) % 2 == 0, 4.0, -4.0))
            if name.startswith("weight"):
                weight.mul_(0.25)
    return problem


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "size",
    [(2, 1, 3, 1), (6, 1, 33, 31), (9, 1, 64, 64), (5, 1, 7, 65), (40, 1, 5, 129), (7, 1, 9, 250), (800, 1, 3, 17)],
    ids=lambda size: "x".join(map(str, size)),
)
@pytest.mark.parametrize("cell", CELLS)
def test_widened_backward(cell, size, dtype):
    """One sequence: the gradients of weights that are converted, but for the order of sums of pairs."""
    for layout, flags in (("dense", {"lengths": True, "resets": True}), ("batch_first", {}), ("packed", {})):
        problem = off_zero(build(Case(cell, layout, True, size=size, **flags)).to(dtype)).requiring()
        leaves = problem.leaves()
        for _ in instruction_sets():
            results = run(problem)
            given = list(cotangents(results).values())
            found = []
            for always in (False, True):
                _C.widen_always(always)
                grads = torch.autograd.grad(list(results.values()), list(leaves.values()), given, retain_graph=True)
                found.append(dict(zip(leaves, grads, strict=True)))
            _C.widen_always(False)
            if dtype == torch.float16:
                same_bits(*found)
            for name, converted in found[0].items():
                # pairs summed in another order: an ulp of float32 may decide how a number is rounded
                torch.testing.assert_close(found[1][name], converted, rtol=2**-7, atol=1e-5, msg=name)
    if size[0] < 100:
        _C.widen_always(True)
        agree(off_zero(build(Case(cell, "dense", True, size=size)).to(dtype)), dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "size",
    [(3, 2, 1, 1), (6, 1, 33, 31), (9, 1, 64, 64), (5, 3, 7, 65), (40, 1, 5, 129), (3, 8, 130, 70), (2, 9, 40, 33)],
    ids=lambda size: "x".join(map(str, size)),
)
def test_widened_in_every_step(size, dtype):
    """Sizes with and without a rest; forward as in training."""
    _C.widen_always(True)
    for cell in CELLS:
        for bidirectional, proj in ((False, 0), (True, (size[3] + 1) // 2 if cell == "lstm" and size[3] > 1 else 0)):
            forward_agrees(build(Case(cell, "dense", bidirectional, proj=proj, size=size)).to(dtype), dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_widened_or_converted_are_the_same_bits(cell, dtype):
    """But for one row of bfloat16, which sums pairs in another order."""
    sizes = [(5, 5, 33), (5, 40, 64), (5, 300, 18), (5, 7, 299), (5, 9, 600), (1, 300, 64), (1, 7, 299)]
    for batch, inputs, hidden in sizes[:5] if dtype == torch.bfloat16 else sizes:
        if hidden == 600 and cell != "rnn_tanh":
            continue  # sums of so many units are cut, of every cell in the same way
        problem = build(Case(cell, "dense", hidden < 100, resets=True, size=(23, batch, inputs, hidden))).to(dtype)
        for _ in instruction_sets():
            _C.widen_always(False)
            with torch.no_grad():
                converted = run(problem)
                _C.widen_always(True)
                same_bits(run(problem), converted)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_no_input_of_another_call(cell, dtype):
    """Rows of an odd number of inputs are filled up: not with what is left there of a call before."""
    _C.widen_always(True)
    problem, other = (build(Case(cell, size=(6, 2, inputs, 9))).to(dtype) for inputs in (3, 4))
    other.input.fill_(torch.nan)
    expected = oracle(problem.to(torch.float64))
    with torch.no_grad():
        for _ in instruction_sets():
            run(other)
            check_values(run(problem), expected, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru"])
def test_few_rows_one_by_one(cell, dtype):
    """Timesteps of one call of up to four rows are those of a call each, to the bit."""
    problem = build(Case(cell, size=(4, 1, 7, 33))).to(dtype)
    weights = list(problem.weights.values())
    for _ in instruction_sets():
        whole, state = ops.layer(problem.input, problem.h_0, None, weights, cell=cell)[:2]
        h, outputs = problem.h_0, []
        for x in problem.input.split(1):
            output, h = ops.layer(x, h, None, weights, cell=cell)[:2]
            outputs.append(output)
        if widens(dtype):
            assert torch.equal(torch.cat(outputs), whole) and torch.equal(h, state)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rows_of_a_step_one_by_one(dtype):
    """A timestep of up to 32 rows of a large layer, or with AVX2 some fewer, is that of each row alone: h before the
    projection is rounded, which it would not be of weights that are converted."""
    for name in instruction_sets():
        if not widens(dtype) or (dtype == torch.bfloat16 and _C.computes_bfloat16()):
            continue
        rows = 32 if name in ("avx512", "amx") else 11
        problem = build(Case("lstm", size=(1, rows, 350, 350), proj=340)).to(dtype)
        weights = list(problem.weights.values())
        outputs = ops.layer(problem.input, problem.h_0, problem.c_0, weights, cell="lstm")[0].split(1, 1)
        for i in range(rows):
            row = [t[:, i : i + 1] for t in (problem.input, problem.h_0, problem.c_0)]
            assert torch.equal(ops.layer(*row, weights, cell="lstm")[0], outputs[i])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("cell", CELLS)
def test_large_layers(cell, batch, dtype):
    """Which are widened without being told to, as test_packed_cache.py sees; units shared by threads."""
    hidden = {1: {"lstm": 337, "gru": 387}, 4: {"lstm": 497, "gru": 575}}[batch].get(cell, 1000)
    problem = off_zero(build(Case(cell, "dense", size=(12, batch, 9, hidden))).to(dtype))
    expected, expected_grads = gradients(oracle, problem.to(torch.float64))
    for _ in instruction_sets():
        with torch.no_grad():
            values = run(problem)
            check_values(values, expected, dtype)
            torch.set_num_threads(2)
            same_bits(run(problem), values)
            torch.set_num_threads(1)
        _, grads = gradients(run, problem)
        check_gradients(grads, expected_grads, dtype)
        torch.set_num_threads(2)
        same_bits(gradients(run, problem)[1], grads)
        torch.set_num_threads(1)


@pytest.mark.parametrize("cell", CELLS)
def test_sums_are_of_float32(cell, widening):
    """A sum of 4,096 products of 0.01 comes out wrong if it is accumulated in 16 bits; input and hidden part alike."""
    for steps, inputs, hidden in ((1, 4096, 1), (1, 1, 4096), (5, 4096, 1), (5, 1, 4096)):
        if hidden == 4096 and cell != "rnn_tanh":
            continue  # one cell is enough for the larger product
        problem = build(Case(cell, size=(steps, 1, inputs, hidden)))
        problem = problem.map(lambda t: torch.full_like(t, 0.01)).to(torch.bfloat16)
        with torch.no_grad():
            # h may go on rounded: about half of what that adds to one timestep is still there after the next.
            check(run(problem), oracle(problem.to(torch.float64)), roundings=min(steps, 2))


def check(actual, expected, roundings=1):
    # So many roundings of a result to bfloat16 (4e-3 each), no more: values here are around 0.4 to 1.
    for name, want in expected.items():
        torch.testing.assert_close(actual[name].double(), want.double(), rtol=roundings * 4e-3, atol=1e-4)


# L, N, I, H of at most four rows: 1, less and more than one vector or two of every width, with and without a rest. Of
# one timestep up to 32, where units are many, and one row more.
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "size",
    [
        *((1, 1, 1, 1), (1, 1, 129, 65), (1, 3, 33, 16), (2, 2, 31, 33), (4, 1, 64, 40), (1, 4, 7, 130), (3, 1, 9, 7)),
        *((1, 7, 130, 129), (1, 32, 290, 289), (1, 33, 290, 289)),
    ],
    ids=lambda size: "x".join(map(str, size)),
)
def test_few_rows(size, dtype):
    """Forward, with and without what backward needs; h goes on rounded, as the output shows it."""
    for cell, layout in zip(CELLS, ("packed", "dense", "batch_first", "dense"), strict=True):
        for proj in (0, (size[3] + 1) // 2) if cell == "lstm" and size[3] > 1 else (0,):
            flags = {} if layout == "packed" else {"lengths": True, "resets": True}
            forward_agrees(build(Case(cell, layout, True, proj=proj, size=size, **flags)).to(dtype), dtype)


# L, N, I, H of one to 129 rows: gradients are written row by row, in strips, or (129) summed up in float32; of one step
# weights are widened or packed a piece at a time, of which 300 units take several.
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "size",
    [
        (1, 1, 1, 1),
        (1, 1, 33, 65),
        (2, 2, 31, 33),
        (4, 1, 64, 40),
        (1, 5, 129, 66),
        (1, 5, 65, 31),
        (1, 2, 7, 63),
        (1, 33, 250, 129),
        (1, 2, 250, 300),
        (1, 6, 250, 300),
        (3, 40, 7, 33),
        (3, 43, 7, 33),
    ],
    ids=lambda size: "x".join(map(str, size)),
)
def test_gradients_of_few_rows(size, dtype):
    for cell, proj in (("rnn_tanh", 0), ("gru", 0), ("lstm", 0), ("lstm", (size[3] + 1) // 2)):
        if proj < size[3]:
            agree(build(Case(cell, "dense", True, proj=proj, size=size)).to(dtype), dtype)
    ragged = build(Case("lstm", "batch_first", True, lengths=True, resets=True, size=size))
    agree(ragged.to(dtype), dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", [1, 4, 5, 33, 128, 129, 1000])
def test_gradients_are_rounded_once(rows, dtype):
    """To the nearest, the even one of two; sums of whole numbers that float32 holds and 16 bits do not."""
    generator = torch.Generator().manual_seed(rows)
    whole = lambda *size: torch.randint(-60, 60, size, generator=generator).to(dtype)  # noqa: E731
    input, grad = whole(1, rows, 65), whole(1, rows, 33)
    weights = [torch.zeros(33, 65, dtype=dtype), torch.zeros(33, 33, dtype=dtype), torch.ones(33, dtype=dtype)]
    weights = [weight.requires_grad_() for weight in (*weights, torch.ones(33, dtype=dtype))]
    exact = (grad[0].double().T @ input[0].double()).to(dtype)
    assert not torch.equal(exact.double(), grad[0].double().T @ input[0].double())
    for _ in instruction_sets():
        output = ops.layer(input, None, None, weights, cell="rnn_relu")[0]
        weight_ih, weight_hh, *biases = torch.autograd.grad(output, weights, grad)
        assert torch.equal(weight_ih, exact)
        assert torch.equal(weight_hh, torch.zeros_like(weight_hh))
        for bias in biases:
            assert torch.equal(bias, grad[0].double().sum(0).to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", [(1, 1), (5, 1), (40, 3), (150, 1), (70, 6)], ids=str)
def test_gradients_of_the_input_are_rounded_once(rows, dtype):
    generator = torch.Generator().manual_seed(sum(rows))
    whole = lambda most, *size: torch.randint(-most, most, size, generator=generator).to(dtype)  # noqa: E731
    input, grad = torch.zeros(*rows, 20, dtype=dtype, requires_grad=True), whole(60, *rows, 33)
    weights = [whole(30, 33, 20), torch.zeros(33, 33, dtype=dtype), *torch.ones(2, 33, dtype=dtype)]
    exact = grad.double() @ weights[0].double()
    assert not torch.equal(exact, exact.to(dtype).double())
    lengths = torch.tensor([(7 * n) % rows[0] + 1 for n in range(rows[1])])
    over = torch.arange(rows[0])[:, None] >= lengths
    for _ in instruction_sets():
        output = ops.layer(input, None, None, weights, cell="rnn_relu")[0]
        assert torch.equal(torch.autograd.grad(output, input, grad)[0], exact.to(dtype))
        output = ops.layer(input, None, None, weights, cell="rnn_relu", lengths=lengths)[0]
        of_some = torch.where(over[..., None], 0, exact).to(dtype)
        assert torch.equal(torch.autograd.grad(output, input, grad)[0], of_some)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", [(10, 200, 32, 16), (10, 129, 3, 33), (10, 384, 16, 5), (600, 1, 16, 16)], ids=str)
def test_sequences_that_are_all_shorter(size, dtype):
    """The last rows of a chunk may be the last there are, though steps are left."""
    _, batch, inputs, hidden = size
    problem = build(Case("gru", "dense", True, lengths=True, size=size)).to(dtype)
    problem.lengths = torch.full((batch,), {200: 2, 129: 3, 384: 1, 1: 384}[batch])
    expected, expected_grads = gradients(oracle, problem.to(torch.float64))
    for _ in instruction_sets():
        left_behind = [torch.full((3 * hidden * width,), torch.nan) for width in (inputs, hidden) for _ in range(9)]
        del left_behind
        actual, grads = gradients(run, problem)
        check_values(actual, expected, dtype)
        check_gradients(grads, expected_grads, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", COMBINED)
@pytest.mark.parametrize("size", [(1, 3, 7, 17), (3, 50, 7, 17)], ids=str)
def test_gradients_of_variants(name, size, dtype):
    """Few rows and many: weights, biases and what layer normalisation has."""
    problem, masks = sample(Case("lstm", bidirectional=True, size=size), name)
    problem, masks = problem.to(dtype), [None if mask is None else mask.to(dtype) for mask in masks]
    exact = [None if mask is None else mask.double() for mask in masks]
    _, expected = gradients(lambda p: oracle(p, exact), problem.to(torch.float64))
    for _ in instruction_sets():
        _, grads = gradients(lambda p: run(p, masks=masks), problem)
        assert all(grad.dtype == dtype for grad in grads.values())
        check_gradients(grads, expected, dtype)


def of_one_step(rows: torch.Tensor) -> torch.Tensor:
    """relu(sum of each row), four rows a call: as many as weights are used as they lie for."""
    weights = [torch.ones(1, rows.shape[1], dtype=rows.dtype), torch.zeros(1, 1, dtype=rows.dtype)]
    parts = [ops.layer(part.unsqueeze(0), None, None, weights, cell="rnn_relu")[0].flatten() for part in rows.split(4)]
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_number_is_read_and_written(dtype):
    """All that are not negative, the smallest and the largest among them, infinity and NaN."""
    numbers = torch.arange(0, 1 << 15, dtype=torch.int16).view(dtype)
    if dtype == torch.bfloat16:  # float32 has no room below its own smallest normal number: taken for 0
        numbers = numbers[(numbers == 0) | ~(numbers < torch.finfo(torch.float32).tiny)]
    for _ in instruction_sets():
        found = of_one_step(numbers.unsqueeze(1)[::3])
        torch.testing.assert_close(found, numbers[::3], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_results_are_rounded_to_the_nearest(dtype):
    """To the even one of two; what is too large for float16 is infinite."""
    generator = torch.Generator().manual_seed(3)
    large, small = (torch.rand(600, generator=generator) * 4).to(dtype), torch.rand(600, generator=generator)
    ulp = torch.finfo(dtype).eps * 2.0 ** torch.floor(torch.log2(large.double()))
    small[:300] = 0.5  # of a unit in the last place: ties
    rows = torch.stack([large, (small * ulp).to(dtype)], 1)
    rows[-1] = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).max])
    expected = (rows[:, 0].float() + rows[:, 1].float()).to(dtype)
    assert torch.isinf(expected[-1])
    for _ in instruction_sets():
        assert torch.equal(of_one_step(rows), expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("value", [20.0, 100.0])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_nothing_passes_saturated_gates(cell, value, dtype, widening):
    """Backward, where an activation that is not quite 1 would let 1e-4 of everything through, times the input."""
    problem = build(Case(cell, size=(5, 4, 1, 16)))
    for name, weight in problem.weights.items():
        weight.detach().copy_(torch.where(weight >= 0, 1.0, -1.0) if name == "weight_ih" else weight / 8)
    problem.input.detach().fill_(value)
    problem = problem.to(dtype)
    _, expected = gradients(oracle, problem.to(torch.float64))
    assert expected["weight_ih"].abs().max() < 1e-5
    for _ in instruction_sets():
        _, grads = gradients(run, problem)
        off = (grads["weight_ih"].double() - expected["weight_ih"]).abs().max()
        assert off < 1e-5, off  # of float32, whose sigmoid(20) is 1


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", COMBINED)
def test_few_rows_of_variants(name, dtype):
    """Masks and layer normalisation count, too."""
    problem, masks = sample(Case("lstm", bidirectional=True, size=(2, 2, 7, 17)), name)
    problem, masks = problem.to(dtype), [None if mask is None else mask.to(dtype) for mask in masks]
    exact = problem.to(torch.float64)
    expected = oracle(exact, [None if mask is None else mask.double() for mask in masks])
    for _ in instruction_sets():
        with torch.no_grad():
            check_values(run(problem, masks=masks), expected, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "size", [(0, 3, 2, 5), (3, 0, 2, 5), (0, 0, 2, 5), (2, 1, 0, 5), (7, 1, 0, 5), (3, 2, 0, 5)], ids=str
)
@pytest.mark.parametrize("cell", CELLS)
def test_nothing_to_read(cell, size, dtype, widening):
    """No timestep, no entry, no input feature."""
    problem = build(Case(cell, bidirectional=True, size=size)).to(dtype)
    expected = oracle(problem.to(torch.float64))
    for _ in instruction_sets():
        with torch.no_grad():
            check_values(run(problem), expected, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_few_rows_are_not_converted(dtype):
    """Seen by h, which then goes on as it is written: 1 + 3/4 of a unit in the last place is rounded up."""
    eps = torch.finfo(dtype).eps
    input = torch.tensor([[[1, 0.75 * eps]], [[-1, 0]]], dtype=dtype)
    weights = [torch.ones(1, 2, dtype=dtype), torch.ones(1, 1, dtype=dtype)]
    for _ in instruction_sets():
        output = ops.layer(input, None, None, weights, cell="rnn_relu")[0].flatten().tolist()
        assert output == [1 + eps, eps if widens(dtype) else 0.75 * eps]


@pytest.mark.parametrize("size", [(5, 1, 9, 33), (150, 1, 9, 33), (150, 1, 9, 330)])
def test_gradients_of_masked_cells_of_one_sequence(size):
    """Whose weights backward does not read as they are stored."""
    grads = []
    for always in (False, True):
        _C.widen_always(always)
        problem, masks = sample(Case("gru", size=size), "masks", torch.float16)
        grads.append(gradients(lambda p, masks=masks: run(p, masks=masks), problem)[1])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-2, atol=1e-2)
