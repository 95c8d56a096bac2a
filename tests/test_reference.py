"""The oracle itself, held against torch.nn and against loops that define lengths and resets in another way."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from util import CELLS, LAYOUTS, Case, build, check_gradients, check_values, gradients, oracle, projected

from rnn_ext import reference

NATIVE = {"rnn_tanh": nn.RNN, "rnn_relu": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
NATIVE_CELL = {"rnn_tanh": nn.RNNCell, "rnn_relu": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}


def native(problem):
    """torch.nn on a problem without lengths and resets; the weights given to it are the leaves themselves."""
    case = problem.case
    options = {"nonlinearity": case.cell[4:]} if case.cell.startswith("rnn") else {}
    if case.proj:
        options["proj_size"] = case.proj
    _, _, inputs, hidden = case.size
    module = NATIVE[case.cell](
        inputs,
        hidden,
        bias=case.bias,
        bidirectional=case.bidirectional,
        batch_first=case.layout == "batch_first",
        dtype=torch.float64,
        **options,
    )
    weights = {(name + "_l0").replace("_reverse_l0", "_l0_reverse"): t for name, t in problem.weights.items()}
    hx = problem.h_0
    if case.has_cell_state and hx is not None:
        hx = (problem.h_0, problem.c_0)
    input = problem.input if problem.batch_sizes is None else PackedSequence(problem.input, problem.batch_sizes)
    output, state = torch.func.functional_call(module, weights, (input, hx))
    output = output.data if problem.batch_sizes is not None else output
    if case.has_cell_state:
        return {"output": output, "h_n": state[0], "c_n": state[1]}
    return {"output": output, "h_n": state}


def oracle_without_cells(problem):
    results = oracle(problem)
    results.pop("cells", None)
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("cell", "proj"), projected(3))
def test_equals_torch_nn(cell, proj, bidirectional, layout):
    for bias in (True, False):
        for state in (True, False):
            problem = build(Case(cell, layout, bidirectional, bias, proj, state=state, size=(7, 5, 3, 6)))
            expected, expected_grads = gradients(native, problem)
            actual, grads = gradients(oracle_without_cells, problem)
            check_values(actual, expected)
            check_gradients(grads, expected_grads)


def cell_loop(problem) -> dict[str, Tensor]:
    """One direction with torch.nn's cells, the state multiplied by a mask before each timestep."""
    case = problem.case
    length, batch, inputs, hidden = case.size
    options = {"nonlinearity": case.cell[4:]} if case.cell.startswith("rnn") else {}
    cell = NATIVE_CELL[case.cell](inputs, hidden, bias=case.bias, dtype=torch.float64, **options)
    h = problem.h_0 if problem.h_0 is not None else torch.zeros(1, batch, hidden, dtype=torch.float64)
    c = problem.c_0 if problem.c_0 is not None else torch.zeros(1, batch, hidden, dtype=torch.float64)
    h, c = h[0], c[0]
    outputs, cells = [], []
    for t in range(length):
        keep = (~problem.resets[t]).unsqueeze(-1).double()
        h, c = h * keep, c * keep
        state = torch.func.functional_call(
            cell, problem.weights, (problem.input[t], (h, c) if case.has_cell_state else h)
        )
        h, c = state if case.has_cell_state else (state, c)
        outputs.append(h)
        cells.append(c)
    results = {"output": torch.stack(outputs), "h_n": h.unsqueeze(0)}
    if case.has_cell_state:
        results |= {"c_n": c.unsqueeze(0), "cells": torch.stack(cells)}
    return results


@pytest.mark.parametrize("cell", CELLS)
def test_resets_equal_the_masked_loop(cell):
    problem = build(Case(cell, resets=True, size=(11, 5, 3, 6)))
    problem.resets[0, 0], problem.resets[0, 1], problem.resets[-1, 2] = True, False, True
    expected, expected_grads = gradients(cell_loop, problem)
    actual, grads = gradients(oracle, problem)
    check_values(actual, expected)
    check_gradients(grads, expected_grads)


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_lengths_and_resets_equal_sequences_on_their_own(cell, bidirectional, resets):
    """Cut every row at its length and its resets, give each piece to torch.nn alone, and put the results together."""
    problem = build(Case(cell, bidirectional=bidirectional, lengths=True, resets=resets, size=(11, 7, 3, 5)))
    case, (length, batch, _, hidden) = problem.case, problem.case.size
    assert {0, length} <= set(problem.lengths.tolist()) and problem.lengths.tolist() != sorted(problem.lengths.tolist())

    def pieces(problem):
        directions = 1 + bidirectional
        states = [s for s in (problem.h_0, problem.c_0) if s is not None]
        outputs, finals = [], []
        for n in range(batch):
            stop = int(problem.lengths[n])
            starts = [t for t in range(stop) if resets and problem.resets[t, n] and t > 0]
            bounds = [0, *starts, stop]
            given = [s[:, n : n + 1] for s in states]
            final = list(given)
            row = []
            for k, (start, end) in enumerate(itertools.pairwise(bounds)):
                if start == end:
                    continue
                # The given state belongs to the first piece forwards (unless that begins with a reset) and to the
                # last piece in reverse; the final states are those of the last piece and of the first.
                first, last = k == 0, k == len(bounds) - 2
                begins = [
                    (s if first and not (resets and problem.resets[0, n]) else torch.zeros_like(s))
                    if d == 0
                    else (s if last else torch.zeros_like(s))
                    for d in range(directions)
                    for s in [torch.stack([g[d] for g in given])]
                ]
                hx = torch.stack(begins, 1)  # (states, directions, 1, H)
                part = build(case.but(lengths=False, resets=False, size=(1, 1, *case.size[2:]))).having(
                    problem.leaves()
                )
                part.input, part.h_0 = problem.input[start:end, n : n + 1], hx[0]
                part.c_0 = hx[1] if case.has_cell_state else None
                result = native(part)
                row.append(result["output"])
                ends = [result["h_n"]] + ([result["c_n"]] if case.has_cell_state else [])
                for s, value in enumerate(ends):
                    taken = [
                        value[d : d + 1] if (last if d == 0 else first) else final[s][d : d + 1]
                        for d in range(directions)
                    ]
                    final[s] = torch.cat(taken)
            row.append(problem.input.new_zeros(length - stop, 1, directions * hidden))
            outputs.append(torch.cat(row))
            finals.append(final)
        results = {"output": torch.cat(outputs, 1), "h_n": torch.cat([f[0] for f in finals], 1)}
        if case.has_cell_state:
            results["c_n"] = torch.cat([f[1] for f in finals], 1)
        return results

    expected, expected_grads = gradients(pieces, problem)
    actual, grads = gradients(oracle_without_cells, problem)
    check_values(actual, expected)
    check_gradients(grads, expected_grads)
    for n in range(batch):
        if problem.lengths[n] == 0:
            assert torch.equal(actual["h_n"][:, n], problem.h_0[:, n])


@pytest.mark.parametrize("cell", CELLS)
def test_padding_may_hold_anything(cell):
    case = Case(cell, bidirectional=True, lengths=True, resets=True, size=(7, 5, 3, 4))
    clean, dirty = build(case), build(case)
    past = torch.arange(7).unsqueeze(1) >= clean.lengths
    dirty.input[past] = float("nan")
    dirty.resets |= past
    expected, expected_grads = gradients(oracle, clean)
    actual, grads = gradients(oracle, dirty)
    check_values(actual, expected)
    check_gradients(grads, expected_grads)
    assert not actual["output"][past].any() and not grads["input"][past].any()


@pytest.mark.parametrize("size", [(0, 3, 2, 4), (5, 0, 2, 4), (0, 0, 2, 4)])
@pytest.mark.parametrize("cell", CELLS)
def test_empty(cell, size):
    for layout in ("dense", "batch_first"):
        problem = build(Case(cell, layout, bidirectional=True, size=size))
        results, grads = gradients(oracle, problem, unused=True)
        length, batch = size[:2]
        assert results["output"].shape == ((batch, length, 8) if layout == "batch_first" else (length, batch, 8))
        if length == 0:
            assert torch.equal(results["h_n"], problem.h_0)
        assert not any(grads[name].any() for name in problem.weights)


@pytest.mark.parametrize("count", [0, 1, 3, 7, 11, 20])
def test_split_weights_refuses_other_counts(count):
    with pytest.raises(ValueError, match=f"got {count} in all"):
        reference.split_weights([torch.zeros(1)] * count, 2)
