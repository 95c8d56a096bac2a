"""Gradients of weights by group of batch entries: `groups` of the op layer_backward, and what vmap makes of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from util import CELLS, SIZES, Case, Problem, build, check_gradients, cotangents, instruction_sets, run, same_bits

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
        found.append(dict(enumerate(in_groups(arguments(problem), 8))))
    same_bits(found[1], found[0])
    same_bits(found[2], found[0])


def test_no_rows():
    """No timesteps: zeros for each group."""
    *_, weights = backward(**arguments(build(Case("gru", size=(0, 4, 3, 5)))), groups=2)
    assert [w.shape[0] for w in weights] == [2] * 4
    assert not any(w.any() for w in weights)


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


@pytest.mark.parametrize("groups", [3, -1, 8])
def test_uneven_groups(groups):
    given = arguments(build(Case("rnn_tanh", size=(5, 4, 3, 7))).to(torch.float32))
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


class Calls(TorchDispatchMode):
    """How many calls of backward there are."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is backward.default
        return func(*args, **(kwargs or {}))


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
    with Calls() as seen:
        found = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    assert seen.count == layer.num_layers
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("which", ["lengths", "resets", "both"])
@pytest.mark.parametrize("cell", CELLS)
def test_ragged_per_sample_gradients_are_one_call(cell, which):
    """Lengths and resets of each entry's own, or the same for all."""
    problem = build(Case(cell, "batch_first", True, lengths=which != "resets", resets=which != "lengths"))
    inputs = torch.randn(5, *problem.input.shape, dtype=torch.float64)
    leaves = problem.leaves()

    def loss(leaves: dict[str, Tensor], input: Tensor, lengths: Tensor | None) -> Tensor:
        results = run(dataclasses.replace(problem.having(leaves | {"input": input}), lengths=lengths))
        return sum(t.pow(2).sum() for t in results.values())

    lengths = None if problem.lengths is None else torch.stack([problem.lengths.roll(k) for k in range(5)])
    for mapped in (False, True):
        given = lengths if mapped or lengths is None else problem.lengths
        dims = (None, 0, 0 if mapped and lengths is not None else None)
        with Calls() as seen:
            found = torch.vmap(torch.func.grad(loss), dims)(leaves, inputs, given)
        assert seen.count == 1
        own = [given if dims[2] is None else given[i] for i in range(5)]
        expected = [torch.func.grad(loss)(leaves, x, n) for x, n in zip(inputs, own, strict=True)]
        torch.testing.assert_close(found, {k: torch.stack([e[k] for e in expected]) for k in leaves})
    # A Jacobian for each sample: cotangents mapped within, and what forward saved is of all samples.
    jacobian = torch.func.jacrev(lambda p, x, n: run(dataclasses.replace(problem.having(p | {"input": x}), lengths=n)))
    found = torch.vmap(jacobian, dims)(
        {"weight_hh": leaves["weight_hh"]}, inputs[:2], lengths if dims[2] is None else lengths[:2]
    )
    one = jacobian({"weight_hh": leaves["weight_hh"]}, inputs[1], own[1])
    torch.testing.assert_close(
        {k: v["weight_hh"][1] for k, v in found.items()}, {k: v["weight_hh"] for k, v in one.items()}
    )


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
        assert seen.count == calls
        torch.testing.assert_close(found, torch.func.jacfwd(output)(parameters))
    monkeypatch.undo()
    # Gradients of a batch of cotangents for each sample: groups of groups.
    samples = torch.randn(3, 4, 2, 3, dtype=torch.float64)

    def jacobian(x: Tensor) -> dict[str, Tensor]:
        return torch.func.jacrev(lambda p: torch.func.functional_call(layer, p, (x,))[0])(parameters)

    with Calls() as seen:
        found = torch.vmap(jacobian)(samples)
    assert seen.count == 1
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
