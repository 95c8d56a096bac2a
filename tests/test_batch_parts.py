"""Backward of a batch part by part, see csrc/cpu/batch_parts.inl: the parts follow from sizes and lengths alone."""

from __future__ import annotations

import pytest
import torch
from util import CELLS, Case, build, check_gradients, cotangents, gradients, instruction_sets, oracle, run, same_bits

from rnn_ext import _C

# L, N, I, H. Parts are worth having of 12 sequences in a step, 400 rows and 1.5e6 multiply-adds.
SIZES = [
    (36, 25, 64, 33),  # two, one of them with a row more; units and inputs that are no whole vectors
    (33, 51, 32, 64),  # four, whose inputs and outputs lie in groups of aligned rows
    (5, 2100, 16, 32),  # four of more rows than are multiplied at a time
]
# The same of sequences of all lengths, of which half are there in a step; and of 8 in steps of much to multiply.
RAGGED_SIZES = [(36, 60, 64, 33), (33, 120, 32, 64), (60, 42, 64, 104)]


def bits_of_threads(problem, grads) -> None:
    """As many threads as parts, fewer and more, near each other and far: the same gradients."""
    for threads, distance in ((2, 0), (2, 1000), (3, 0), (4, 0), (5, 0), (8, 0)):
        torch.set_num_threads(threads)
        _C.assume_thread_distance(distance)
        same_bits(gradients(run, problem)[1], grads)


def cases(cell):
    for size in SIZES:
        yield Case(cell, size=size)
        yield Case(cell, "batch_first", resets=True, size=size)
    for size in RAGGED_SIZES:
        yield Case(cell, "packed", size=size)
        yield Case(cell, lengths=True, resets=True, size=size)
        yield Case(cell, "batch_first", lengths=True, state=False, size=size)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_and_bits(cell):
    for case in cases(cell):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            problem = build(case).to(dtype)
            # Of bfloat16 the bits alone: it may be on the other side of a relu's corner.
            expected = None if dtype == torch.bfloat16 else gradients(oracle, problem.to(torch.float64))[1]
            for _ in instruction_sets():
                torch.set_num_threads(1)
                grads = gradients(run, problem)[1]
                if expected:
                    check_gradients(grads, expected, dtype)
                bits_of_threads(problem, grads)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_what_is_wanted_and_what_is_given(layout, cell):
    """Each gradient alone, and from each result alone, none of which is the sum of all."""
    size = SIZES[0] if layout == "dense" else RAGGED_SIZES[0]
    problem = build(Case(cell, layout, size=size)).to(torch.float32)
    whole = gradients(run, problem)[1]
    for name in whole:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            same_bits(gradients(run, problem, wrt=[name])[1], {name: whole[name]})
    exact = problem.to(torch.float64)
    for name, grad in cotangents(run(problem)).items():
        torch.set_num_threads(1)
        grads = gradients(run, problem, {name: grad})[1]
        check_gradients(grads, gradients(oracle, exact, {name: grad.to(torch.float64)})[1], torch.float32)
        torch.set_num_threads(2)
        same_bits(gradients(run, problem, {name: grad})[1], grads)


def test_infinite_and_missing_numbers_stay_in_their_sequences():
    """What a part's zeros are multiplied by."""
    problem = build(Case("lstm", size=SIZES[1], state=False)).to(torch.float32)
    input = problem.input.clone()
    input[3, 40] = float("nan")
    grads = gradients(run, problem.having({"input": input}))[1]
    sound = torch.arange(input.shape[1]) != 40
    assert grads["input"][:, ~sound].isnan().any() and grads["weight_hh"].isnan().all()
    same_bits({"input": grads["input"][:, sound]}, {"input": gradients(run, problem)[1]["input"][:, sound]})
