"""Configurations that Hypothesis makes up, values and gradients against the oracle in float64, and laws they obey."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import given, note
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from util import CELLS, LAYOUTS, Case, build, check_gradients, check_values, gradients, oracle, run, same_bits

import rnn_ext


@st.composite
def cases(draw, layouts=LAYOUTS, smallest: int = 1) -> Case:
    cell = draw(st.sampled_from(CELLS))
    layout = draw(st.sampled_from(layouts))
    hidden = draw(st.integers(1, 40))
    padded = layout != "packed"
    return Case(
        cell,
        layout,
        bidirectional=draw(st.booleans()),
        bias=draw(st.booleans()),
        # nn.LSTM has them below the hidden size; the functions, as torch's own, take any
        proj=draw(st.integers(1, 60)) if cell == "lstm" and draw(st.booleans()) else 0,
        lengths=padded and draw(st.booleans()),
        resets=padded and draw(st.booleans()),
        state=draw(st.booleans()),
        size=(draw(st.integers(smallest, 12)), draw(st.integers(1, 18)), draw(st.integers(1, 20)), hidden),
    )


@given(case=cases(), mask=st.integers(1, 15))
def test_equals_the_oracle(case, mask):
    """Any subset of the results may have a gradient."""
    problem = build(case)
    expected = oracle(problem)
    grad_of = {
        name: torch.ones_like(t) for k, (name, t) in enumerate(expected.items()) if mask >> k & 1 or k == mask % 2
    }
    note(f"{case} gradient of {list(grad_of)}")
    expected, expected_grads = gradients(oracle, problem, grad_of, unused=True)
    actual, grads = gradients(run, problem, grad_of)
    check_values(actual, expected)
    check_gradients(grads, expected_grads)


@given(case=cases(("dense", "batch_first")), data=st.data())
def test_any_lengths_and_resets(case, data):
    """Lengths and resets as Hypothesis likes them: all zero, all full, every timestep reset."""
    length, batch = case.size[:2]
    problem = build(case.but(lengths=True, resets=True))
    lengths = data.draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch))
    bits = data.draw(st.lists(st.booleans(), min_size=length * batch, max_size=length * batch))
    problem.lengths = torch.tensor(lengths)
    problem.resets = torch.tensor(bits).view(problem.resets.shape)
    expected, expected_grads = gradients(oracle, problem, unused=True)
    actual, grads = gradients(run, problem)
    check_values(actual, expected)
    check_gradients(grads, expected_grads)


@given(case=cases(("dense",)), data=st.data())
def test_lengths_equal_packing(case, data):
    """The two descriptions of the same sequences give the same numbers."""
    length, batch = case.size[:2]
    lengths = data.draw(
        st.lists(st.integers(1, length), min_size=batch, max_size=batch).map(lambda n: sorted(n, reverse=True))
    )
    padded = build(case.but(lengths=True, resets=False))
    padded.lengths = torch.tensor(lengths)
    rows = pack_padded_sequence(padded.input, lengths)
    packed = dataclasses.replace(
        padded, case=case.but(layout="packed"), input=rows.data, batch_sizes=rows.batch_sizes, lengths=None
    )
    first, second = run(padded), run(packed)
    for name in first:
        if name in ("output", "cells"):
            first[name] = pack_padded_sequence(first[name], lengths).data
    check_values(first, second)


@given(case=cases(("dense",), smallest=2), data=st.data())
def test_a_sequence_may_be_cut_anywhere(case, data):
    """Running the first part and then the rest from its state is running the whole (one direction)."""
    problem = build(case.but(bidirectional=False, lengths=False))
    cut = data.draw(st.integers(1, case.size[0] - 1))
    whole = run(problem)
    parts = [dataclasses.replace(problem, input=half) for half in (problem.input[:cut], problem.input[cut:])]
    if problem.resets is not None:
        parts[0].resets, parts[1].resets = problem.resets[:cut], problem.resets[cut:]
    first = run(parts[0])
    parts[1].h_0, parts[1].c_0 = first["h_n"], first.get("c_n")
    second = run(parts[1])
    joined = {name: torch.cat([first[name], t]) if name in ("output", "cells") else t for name, t in second.items()}
    check_values(joined, whole)


@given(case=cases(("dense",)), seed=st.integers(0, 99))
def test_order_of_the_batch_and_time_reversal(case, seed):
    """Rows permuted in are rows permuted out; the reverse direction is the forward one on the mirrored sequence."""
    problem = build(case.but(resets=False))
    order = torch.randperm(case.size[1], generator=torch.Generator().manual_seed(seed))
    mixed = dataclasses.replace(problem, input=problem.input[:, order])
    mixed.h_0, mixed.c_0 = (t if t is None else t[:, order] for t in (problem.h_0, problem.c_0))
    mixed.lengths = None if problem.lengths is None else problem.lengths[order]
    expected = {name: t[:, order] for name, t in run(problem).items()}
    check_values(run(mixed), expected)
    if case.bidirectional and problem.lengths is None:
        half = {name.removesuffix("_reverse"): t for name, t in problem.weights.items() if name.endswith("_reverse")}
        mirrored = dataclasses.replace(
            problem, case=case.but(bidirectional=False), input=problem.input.flip(0), weights=half
        )
        mirrored.h_0, mirrored.c_0 = (t if t is None else t[1:] for t in (problem.h_0, problem.c_0))
        alone, both = run(mirrored), run(problem)
        features = case.proj or case.size[3]
        check_values({"output": alone["output"].flip(0)}, {"output": both["output"][..., features:]})
        check_values({"h_n": alone["h_n"]}, {"h_n": both["h_n"][1:]})


@given(case=cases())
def test_the_same_bits_again(case):
    problem = build(case).to(torch.float32)
    same_bits(run(problem), run(problem))
    _, first = gradients(run, problem)
    _, second = gradients(run, problem)
    same_bits(first, second)


@given(
    case=cases(), layers=st.integers(1, 3), batch_first=st.booleans(), given_state=st.booleans(), seed=st.integers(0, 9)
)
def test_module_equals_torch_nn(case, layers, batch_first, given_state, seed):
    """Any stack, padded, unbatched or packed unsorted."""
    length, batch, inputs, hidden = case.size
    case = case.but(proj=min(case.proj, hidden - 1))
    kind = "RNN" if case.cell.startswith("rnn") else case.cell.upper()
    options = {"nonlinearity": case.cell[4:]} if kind == "RNN" else {"proj_size": case.proj} if case.proj else {}
    options |= {
        "bias": case.bias,
        "bidirectional": case.bidirectional,
        "batch_first": batch_first,
        "dtype": torch.float64,
    }
    torch.manual_seed(seed)
    second = getattr(nn, kind)(inputs, hidden, layers, **options)
    torch.manual_seed(seed)
    first = getattr(rnn_ext, kind)(inputs, hidden, layers, **options, backend="custom")
    unbatched = case.layout == "dense" and batch == 1
    lead = (length,) if unbatched else (batch, length) if batch_first else (length, batch)
    input = torch.randn(*lead, inputs, dtype=torch.float64)
    if case.layout == "packed":
        lengths = torch.randint(1, length + 1, (batch,))
        lengths[seed % batch] = length
        input = pack_padded_sequence(input, lengths, batch_first, enforce_sorted=False)
    hx = None
    if given_state:
        states = (layers * (1 + case.bidirectional), *(() if unbatched else (batch,)))
        hx = torch.randn(*states, case.proj or hidden, dtype=torch.float64)
        hx = (hx, torch.randn(*states, hidden, dtype=torch.float64)) if kind == "LSTM" else hx

    def flat(module):
        output, state = module(input, hx)
        output = output if isinstance(output, torch.Tensor) else output.data
        results = dict(enumerate([output, *(state if isinstance(state, tuple) else (state,))]))
        grads = torch.autograd.grad(sum(t.sin().sum() for t in results.values()), list(module.parameters()))
        return {str(k): t for k, t in results.items()}, {str(k): t for k, t in enumerate(grads)}

    (values, grads), (expected, expected_grads) = flat(first), flat(second)
    check_values(values, expected)
    check_gradients(grads, expected_grads)
