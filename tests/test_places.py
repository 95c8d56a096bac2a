"""The same numbers elsewhere in memory give the same bits: shapes say where sums are cut, see weight_gradient.inl."""

from __future__ import annotations

import pytest
import torch
from util import CELLS, Case, build, cotangents, run, same_bits

# L, N, I, H, of whole vectors, which are multiplied as they lie if they are aligned and evenly spaced.
SIZES = [
    (2, 20, 16, 16),  # few rows
    (5, 1, 16, 16),
    (700, 1, 32, 16),  # a chunk is more than one piece
    (40, 32, 64, 32),
    (6, 190, 32, 32),  # a piece is not a whole number of steps
    (3, 700, 16, 16),  # a step is more than a piece
    (33, 51, 32, 64),  # parts of a batch, see test_batch_parts.py
    (5, 2100, 16, 32),
    (36, 25, 64, 33),  # not all of them whole
]


def shifted(tensor):
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)


def apart(tensor):
    """Rows that are pages apart."""
    return torch.full((*tensor.shape[:2], 3000), float("nan"), dtype=tensor.dtype)[..., : tensor.shape[2]].copy_(tensor)


def by_entry(tensor):
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def gradients(problem, grad_of):
    """Of all leaves, where they lie."""
    leaves = {name: t.detach().requires_grad_() for name, t in problem.leaves().items()}
    results = run(problem.having(leaves))
    found = torch.autograd.grad(list(results.values()), list(leaves.values()), list(grad_of.values()))
    return dict(zip(leaves, found, strict=True))


CASES = [{}, {"bidirectional": True}, {"layout": "packed"}, {"lengths": True}, {"resets": True}]
CASES += [{"state": False}, {"bias": False}]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case) or "plain")
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("cell", CELLS)
def test_gradients(cell, size, case):
    problem = build(Case(cell, size=size, **case)).to(torch.float32)
    grad_of = cotangents(run(problem))
    expected = gradients(problem, grad_of)
    for place in [shifted] if problem.input.dim() == 2 else [shifted, apart, by_entry]:
        same_bits(gradients(problem.having({"input": place(problem.input)}), grad_of), expected)
    states = {name: shifted(t) for name, t in problem.leaves().items() if name in ("h_0", "c_0")}
    same_bits(gradients(problem.having(states), grad_of), expected)
    same_bits(gradients(problem, {name: shifted(t) for name, t in grad_of.items()}), expected)
