"""Gradients of weights by group of batch entries: `groups` of the op layer_backward, and what vmap makes of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from util import (
    CELLS,
    SIZES,
    Calls,
    Case,
    Problem,
    build,
    check_gradients,
    cotangents,
    instruction_sets,
    run,
    same_bits,
)

import rnn_ext
from rnn_ext import batching

backward = torch.ops.rnn_ext.layer_backward


def arguments(problem: Problem) -> dict[str, Any]:
    """Those of backward, of all results, for everything there is."""
    case = problem.case
    given: dict[str, Any] = {
        "input": problem.input,
        "h_0": problem.h_0,
        "c_0": problem.c_0,
        "weights": list(problem.weights.values()),
        "batch_sizes": problem.batch_sizes,
        "lengths": problem.lengths,
        "resets": problem.resets,
        "masks": [],
        "cell": case.cell,
        "bidirectional": case.bidirectional,
        "batch_first": case.layout == "batch_first",
        "cell_states": case.has_cell_state,
    }
    results = forward(given)
    names = ("output", "h_n", *(("c_n", "cells") if case.has_cell_state else ()))
    grads = dict.fromkeys(("grad_output", "grad_h_n", "grad_c_n", "grad_cells"))
    grads |= {f"grad_{k}": grad for k, grad in cotangents({k: results[k] for k in names}).items()}
    wanted = [True, problem.h_0 is not None, problem.c_0 is not None, *[True] * len(problem.weights)]
    return {**grads, **given, "output": results["output"], "saved": results["saved"], "output_mask": wanted}


def forward(given: dict[str, Any]) -> dict[str, Tensor]:
    names = ("output", "h_n", "c_n", "cells", "saved")
    return dict(zip(names, torch.ops.rnn_ext.layer(**given, save=True), strict=True))


def part(given: dict[str, Any], groups: int, i: int) -> dict[str, Any]:
    """The arguments of one group alone."""
    sequences = 0 if given["batch_first"] else 1
    dims = {"grad_output": sequences, "grad_cells": sequences, "input": sequences, "resets": sequences, "lengths": 0}
    dims |= {"grad_h_n": 1, "grad_c_n": 1, "h_0": 1, "c_0": 1}
    cut = {k: None if given[k] is None else given[k].chunk(groups, dim)[i] for k, dim in dims.items()}
    own = given | cut
    not_forward = ("output", "saved", "output_mask", "grad_output", "grad_h_n", "grad_c_n", "grad_cells")
    results = forward({k: x for k, x in own.items() if k not in not_forward})
    return own | {"output": results["output"], "saved": results["saved"]}


def by_group(given: dict[str, Any], groups: int) -> list[Tensor]:
    """All gradients, by a call for each group."""
    calls = [backward(**part(given, groups, i)) for i in range(groups)]
    dims = [0 if given["batch_first"] else 1, 1, 1]
    results = [torch.cat([call[k] for call in calls], dim) for k, dim in enumerate(dims) if given["output_mask"][k]]
    return [*results, *(torch.stack(parts) for parts in zip(*(call[3] for call in calls), strict=True))]


def in_groups(given: dict[str, Any], groups: int) -> list[Tensor]:
    *results, weights = backward(**given, groups=groups)
    return [*(x for x, wanted in zip(results, given["output_mask"], strict=False) if wanted), *weights]


def agree(given: dict[str, Any], groups: int, dtype: torch.dtype = torch.float64) -> None:
    pairs = zip(in_groups(given, groups), by_group(given, groups), strict=True)
    for i, (actual, expected) in enumerate(pairs):
        assert actual.dtype == dtype
        check_gradients({str(i): actual}, {str(i): expected}, dtype)


@pytest.mark.parametrize(("lengths", "resets"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layout", ["dense", "batch_first"])
@pytest.mark.parametrize("cell", CELLS)
def test_as_a_call_for_each(cell, layout, bidirectional, lengths, resets):
    """By every instruction set; of few rows (up to 128) and many, of all or of a group, which are summed otherwise."""
    for size in ((5, 6, 3, 7), (9, 4, 5, 17), (70, 6, 3, 9), (150, 2, 33, 5), (1, 6, 4, 33), (3, 300, 2, 4)):
        for bias, state in ((True, True), (False, False)):
            case = Case(cell, layout, bidirectional, bias, 0, lengths, resets, state, size)
            problem = build(case)
            for _ in instruction_sets():
                given = arguments(problem)
                for groups in (1, 2, size[1]):
                    agree(given, groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_dtypes(cell, dtype):
    for hidden in SIZES:
        for length in (7, 45):
            problem = build(Case(cell, bidirectional=True, size=(length, 6, 5, hidden))).to(dtype)
            for _ in instruction_sets():
                given = arguments(problem)
                for groups in (3, 6):
                    agree(given, groups, dtype)


@pytest.mark.parametrize("cell", CELLS)
def test_each_gradient_alone(cell):
    """Of results None but one, and of gradients none but one."""
    given = arguments(build(Case(cell, bidirectional=True, resets=True, size=(6, 4, 3, 9))))
    everything = backward(**given, groups=2)
    flat = [*everything[:3], *everything[3]]
    for i, wanted in enumerate(given["output_mask"]):
        if not wanted:
            continue
        mask = [k == i for k in range(len(flat))]
        *found, weights = backward(**given | {"output_mask": mask}, groups=2)
        for k, x in enumerate((*found, *weights)):
            assert torch.equal(x, flat[i]) if k == i else x.shape == (0,)
    names = [name for name in given if name.startswith("grad_") and given[name] is not None]
    for name in names:
        agree(given | {other: None for other in names if other != name}, 2)


@pytest.mark.parametrize("cell", CELLS)
def test_threads_do_not_change_a_bit(cell):
    problem = build(Case(cell, bidirectional=True, size=(40, 32, 40, 97))).to(torch.float32)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        given = arguments(problem)  # fewer groups than threads, which share each, and more
        found.append(dict(enumerate(x for groups in (1, 2, 8) for x in in_groups(given, groups))))
    same_bits(found[1], found[0])
    same_bits(found[2], found[0])


@pytest.mark.parametrize("size", [(0, 4, 3, 5), (3, 0, 3, 5)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_no_rows(cell, size):
    """No timesteps or no entries: zeros for each group."""
    *_, weights = backward(**arguments(build(Case(cell, bidirectional=True, size=size))), groups=2)
    assert [w.shape[0] for w in weights] == [2] * 8
    assert not any(w.any() for w in weights)


@pytest.mark.parametrize("lengths", [[2, 4, 1, 3], [0, 0, 0, 4], [3, 3, 0, 0], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_no_sequence_is_full(cell, lengths):
    """All end before the last timestep, groups that have none among them."""
    problem = build(Case(cell, bidirectional=True, lengths=True, size=(9, 4, 3, 5)))
    problem.lengths = torch.tensor(lengths)
    for _ in instruction_sets():
        for groups in (1, 2, 4):
            agree(arguments(problem), groups)


@pytest.mark.parametrize("cell", CELLS)
def test_derivatives(cell):
    """Of gradients by group there are gradients and tangents: those of a call for each."""
    given = arguments(build(Case(cell, "batch_first", True, size=(3, 4, 2, 3))))
    weights = given.pop("weights")

    def total(call, input: Tensor, grad_output: Tensor, *weights: Tensor) -> Tensor:
        # What it saved is a function of these, whose derivative the op has in it.
        results = call(given | {"input": input, "grad_output": grad_output, "weights": list(weights)}, 2)
        return sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in results)

    leaves = [given["input"], given["grad_output"], *weights]
    places = tuple(range(len(leaves)))
    found, expected = (
        torch.func.grad(lambda *x, call=call: total(call, *x), places)(*leaves) for call in (in_groups, by_group)
    )
    torch.testing.assert_close(found, expected)
    along = tuple(torch.randn_like(x) for x in leaves)
    found, expected = (
        torch.func.jvp(lambda *x, call=call: total(call, *x), tuple(leaves), along)[1] for call in (in_groups, by_group)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("groups", [3, -1, 8])
def test_uneven_groups(groups, recorded):
    given = arguments(build(Case("rnn_tanh", size=(5, 4, 3, 7))).to(torch.float32))
    given["input"].requires_grad_(recorded)
    with pytest.raises(RuntimeError, match=f"equally many batch entries, got {groups} groups of 4 entries"):
        backward(**given, groups=groups)


@pytest.mark.parametrize("case", [Case(proj=2), Case(layout="packed")], ids=str)
def test_what_has_no_groups(case):
    given = arguments(build(case))
    with pytest.raises(NotImplementedError, match="groups are of plain layers without projection, not packed"):
        backward(**given, groups=1)


def test_opcheck():
    given = arguments(build(Case("lstm", size=(5, 4, 3, 7))))
    torch.library.opcheck(backward, (), given | {"groups": 2})
    meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in given.items()}
    meta["weights"] = [w.to("meta") for w in given["weights"]]
    *_, found = backward(**meta, groups=2)
    assert [x.shape for x in found] == [(2, *w.shape) for w in given["weights"]]


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("kind", [rnn_ext.RNN, rnn_ext.GRU, rnn_ext.LSTM])
def test_per_sample_gradients_are_one_call(kind, options):
    """A call for each layer, and what a loop over the samples gives."""
    layer = kind(3, 5, dtype=torch.float64, batch_first=True, **options)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(6, 2, 4, 3, dtype=torch.float64)

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, p, (x,))[0].pow(2).sum()

    expected = [torch.func.grad(loss)(parameters, sample) for sample in x]
    expected = {name: torch.stack([grad[name] for grad in expected]) for name in parameters}
    for given in (parameters, dict(layer.named_parameters())):  # autograd records it, or not
        with Calls() as seen:
            found = torch.vmap(torch.func.grad(loss), (None, 0))(given, x)
        assert seen.names.count("layer_backward") == seen.names.count("layer") == layer.num_layers
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("resets", [None, 0], ids=["resets", "resets of each"])
@pytest.mark.parametrize("lengths", [None, 0], ids=["lengths", "lengths of each"])
@pytest.mark.parametrize("cell", CELLS)
def test_ragged_per_sample_gradients_are_one_call(cell, lengths, resets):
    """Lengths and resets of each entry's own, or the same for all."""
    problem = build(Case(cell, "batch_first", True, lengths=True, resets=True))
    leaves = problem.leaves()
    inputs = torch.randn(5, *problem.input.shape, dtype=torch.float64)
    own_lengths = torch.randint(0, 5, (5, *problem.lengths.shape))  # none is full
    own_resets = torch.rand(5, *problem.resets.shape) < 0.3
    given = (leaves, inputs, own_lengths[0] if lengths is None else own_lengths)
    given += (own_resets[0] if resets is None else own_resets,)
    dims = (None, 0, lengths, resets)
    samples = [[x if dim is None else x[i] for x, dim in zip(given, dims, strict=True)] for i in range(5)]

    def results(leaves: dict[str, Tensor], input: Tensor, lengths: Tensor, resets: Tensor) -> dict[str, Tensor]:
        return run(dataclasses.replace(problem.having(leaves | {"input": input}), lengths=lengths, resets=resets))

    def loss(*given) -> Tensor:
        return sum(t.pow(2).sum() for t in results(*given).values())

    with Calls() as seen:
        found = torch.vmap(torch.func.grad(loss), dims)(*given)
    assert seen.names.count("layer_backward") == seen.names.count("layer") == 1
    expected = [torch.func.grad(loss)(*sample) for sample in samples]
    torch.testing.assert_close(found, {k: torch.stack([e[k] for e in expected]) for k in leaves})
    # A Jacobian for each sample: cotangents are mapped within, and what forward saved is of all samples.
    jacobian = torch.func.jacrev(lambda w, *rest: results(leaves | {"weight_hh": w}, *rest))
    found = torch.vmap(jacobian, dims)(leaves["weight_hh"], *given[1:])
    expected = [jacobian(leaves["weight_hh"], *sample[1:]) for sample in samples]
    torch.testing.assert_close(found, {k: torch.stack([e[k] for e in expected]) for k in found})


def test_tangents_of_cotangents_are_two_calls():
    """Backward is linear in the gradients of the results."""
    layer = rnn_ext.GRU(3, 5, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    inputs, scales = torch.randn(6, 4, 2, 3, dtype=torch.float64), torch.rand(6, dtype=torch.float64)

    def per_sample(scales: Tensor) -> dict[str, Tensor]:
        def loss(p: dict[str, Tensor], x: Tensor, scale: Tensor) -> Tensor:
            return torch.func.functional_call(layer, p, (x,))[0].sum() * scale

        return torch.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, inputs, scales)

    with Calls() as seen:
        _, found = torch.func.jvp(per_sample, (scales,), (torch.ones_like(scales),))
    assert seen.names.count("layer_backward") == 2
    torch.testing.assert_close(found, per_sample(torch.ones_like(scales)))


@pytest.mark.parametrize("kind", [rnn_ext.RNN, rnn_ext.GRU, rnn_ext.LSTM])
def test_jacobians_by_the_weights_are_few_calls(kind, monkeypatch):
    """One, unless there are too many rows."""
    layer = kind(3, 5, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(4, 2, 3, dtype=torch.float64)

    def output(p: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, p, (x,))[0]

    for rows, calls in ((4096, 1), (64, 5)):  # 8 for each of 40 entries
        monkeypatch.setattr(batching, "ROWS", rows)
        with Calls() as seen:
            found = torch.func.jacrev(output)(parameters)
        assert seen.names.count("layer_backward") == calls
        torch.testing.assert_close(found, torch.func.jacfwd(output)(parameters))
    monkeypatch.undo()
    # Gradients of a batch of cotangents for each sample: groups of groups.
    samples = torch.randn(3, 4, 2, 3, dtype=torch.float64)

    def jacobian(x: Tensor) -> dict[str, Tensor]:
        return torch.func.jacrev(lambda p: torch.func.functional_call(layer, p, (x,))[0])(parameters)

    with Calls() as seen:
        found = torch.vmap(jacobian)(samples)
    assert seen.names.count("layer_backward") == 1
    expected = [jacobian(x) for x in samples]
    torch.testing.assert_close(found, {name: torch.stack([e[name] for e in expected]) for name in parameters})


@pytest.mark.parametrize("kind", [rnn_ext.RNN, rnn_ext.GRU, rnn_ext.LSTM])
def test_second_derivatives_of_per_sample_gradients(kind):
    """A penalty of their norms, and autograd's own vmap with a graph."""
    layer = kind(2, 3, dtype=torch.float64, batch_first=True)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(3, 1, 4, 2, dtype=torch.float64)

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, p, (x,))[0].pow(2).sum()

    def norms(p: dict[str, Tensor], each) -> Tensor:
        return sum(g.pow(2).sum() for g in each(p).values())

    def looped(p: dict[str, Tensor]) -> dict[str, Tensor]:
        grads = [torch.func.grad(loss)(p, sample) for sample in x]
        return {name: torch.stack([g[name] for g in grads]) for name in p}

    found = torch.func.grad(norms)(parameters, lambda p: torch.vmap(torch.func.grad(loss), (None, 0))(p, x))
    torch.testing.assert_close(found, torch.func.grad(norms)(parameters, looped))

    weights = list(layer.parameters())
    cotangents_of = torch.randn(5, 3, 4, 3, dtype=torch.float64)
    grads = {}
    for batched in (True, False):
        output = layer(x[:, 0])[0]
        if batched:
            many = torch.autograd.grad(output, weights, cotangents_of, create_graph=True, is_grads_batched=True)
        else:
            calls = [torch.autograd.grad(output, weights, c, create_graph=True) for c in cotangents_of]
            many = [torch.stack(parts) for parts in zip(*calls, strict=True)]
        grads[batched] = torch.autograd.grad(sum(g.pow(2).sum() for g in many), weights)
    torch.testing.assert_close(grads[True], grads[False])


def test_compiled_per_sample_gradients():
    layer = rnn_ext.GRU(3, 5, batch_first=True)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, p, (x[None],))[0].pow(2).sum()

    per_sample = torch.vmap(torch.func.grad(loss), (None, 0))
    compiled = torch.compile(per_sample, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (4, 7):
        x = torch.randn(n, 6, 3)
        torch.testing.assert_close(compiled(parameters, x), per_sample(parameters, x))
