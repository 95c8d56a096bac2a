"""Gradients of ``ops.layer``: against the oracle and finite differences, any order, in part, under ``torch.func``."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import itertools
import weakref

import pytest
import torch
import torch._dynamo.testing
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from util import (
    CELLS,
    LAYOUTS,
    Case,
    Problem,
    agree,
    build,
    check_gradients,
    check_values,
    cotangents,
    gradients,
    instruction_sets,
    matrix,
    oracle,
    run,
    same_bits,
)

import rnn_ext
from rnn_ext import ops

TINY = (3, 2, 2, 3)
# Every cell and every way of describing a batch; biases and projection where they matter to the derivative.
VARIANTS = [
    Case(cell, layout, bidirectional, bias, proj, lengths, resets, size=TINY)
    for (cell, proj), (layout, lengths, resets), bidirectional in itertools.product(
        [*((cell, 0) for cell in CELLS), ("lstm", 2)],
        [("dense", False, False), ("batch_first", True, False), ("dense", True, True), ("packed", False, False)],
        [False, True],
    )
    for bias in [layout != "batch_first"]
]


def flat(fn, problem: Problem):
    """``fn`` as a function of its leaves, one argument each, and those leaves."""
    names = list(problem.leaves())
    leaves = list(problem.requiring().leaves().values())
    return lambda *args: tuple(fn(problem.having(dict(zip(names, args, strict=True)))).values()), leaves


@pytest.mark.parametrize("case", matrix(), ids=str)
def test_matrix(case):
    agree(build(case))


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_gradcheck(case):
    fn, leaves = flat(run, build(case))
    assert gradcheck(fn, leaves, fast_mode=False)
    assert gradgradcheck(fn, leaves, fast_mode=True)


@pytest.mark.parametrize("cell", CELLS)
def test_gradgradcheck_in_full(cell):
    fn, leaves = flat(run, build(Case(cell, bidirectional=True, size=(2, 2, 1, 2))))
    assert gradgradcheck(fn, leaves, fast_mode=False)


def derivatives(fn, problem: Problem, orders: int) -> list[dict[str, torch.Tensor]]:
    """Gradients of the squared gradients of ... of all results, by leaf and by cotangent, up to that order."""
    problem = problem.requiring()
    results = fn(problem)
    grad_of = {name: t.requires_grad_() for name, t in cotangents(results).items()}
    arguments = problem.leaves() | {"grad_" + name: t for name, t in grad_of.items()}
    total = sum((results[name] * t).sum() for name, t in grad_of.items())
    found = []
    for _ in range(orders):
        grads = torch.autograd.grad(total, list(arguments.values()), create_graph=True, materialize_grads=True)
        found.append(dict(zip(arguments, (t.detach() for t in grads), strict=True)))
        total = sum((t * t).sum() for t in grads)
    return found


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_second_and_third_order(case):
    """A gradient penalty and its gradient, the cotangents' own gradients included."""
    problem = build(case.but(size=(5, 3, 2, 5)))
    for actual, expected in zip(derivatives(run, problem, 3), derivatives(oracle, problem, 3), strict=True):
        check_gradients(actual, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("cell", "proj"), [*((cell, 0) for cell in CELLS), ("lstm", 3)])
def test_each_output_alone(cell, proj, layout):
    """A result that no loss uses has no gradient (None, not zeros): every subset of the results."""
    flags = {"lengths": True, "resets": True} if layout != "packed" else {}
    problem = build(Case(cell, layout, True, proj=proj, size=(5, 4, 3, 6), **flags))
    expected_of = cotangents(oracle(problem))
    for count in range(1, len(expected_of)):
        for names in itertools.combinations(expected_of, count):
            grad_of = {name: expected_of[name] for name in names}
            _, expected = gradients(oracle, problem, grad_of, unused=True)
            _, grads = gradients(run, problem, grad_of)
            check_gradients(grads, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_projection_to_more_than_there_is(layout, dtype):
    """nn.LSTM refuses P >= H, but the functions, as torch's own, do not."""
    flags = {"lengths": True, "resets": True} if layout == "dense" else {}
    for proj in (16, 17, 33, 100):
        agree(build(Case("lstm", layout, True, proj=proj, size=(5, 4, 3, 8), **flags)).to(dtype), dtype)


@pytest.mark.parametrize("cell", CELLS)
def test_without_cell_states(cell):
    problem = build(Case(cell, bidirectional=True, lengths=True))
    grad_of = cotangents(oracle(problem))
    grad_of.pop("cells", None)
    _, expected = gradients(oracle, problem, grad_of)
    _, grads = gradients(lambda p: run(p, cell_states=False), problem, grad_of)
    check_gradients(grads, expected)


@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize(("cell", "proj"), [*((cell, 0) for cell in CELLS), ("lstm", 3)])
def test_each_leaf_alone(cell, proj, layout):
    """Gradients asked of some leaves only (frozen weights, only h_0, ...) are those asked of all."""
    problem = build(Case(cell, layout, True, proj=proj))
    _, expected = gradients(oracle, problem)
    names = list(expected)
    weights = [name for name in names if "_" in name and name not in ("h_0", "c_0")]
    biases = [name for name in names if name.startswith("bias")]
    states = [name for name in names if name in ("h_0", "c_0")]
    subsets = [*([name] for name in names), weights, biases, states, ["input", *states], ["input", weights[0]]]
    for wrt in subsets:
        _, grads = gradients(run, problem, wrt=wrt)
        check_gradients(grads, {name: expected[name] for name in names if name in wrt})
        asked = problem.requiring(wrt)
        torch.autograd.backward(list(run(asked).values()), list(cotangents(oracle(problem)).values()))
        assert {name for name, t in asked.leaves().items() if t.grad is not None} == set(wrt)


@pytest.mark.parametrize("cell", CELLS)
def test_no_graph_where_none_is_asked_for(cell):
    problem = build(Case(cell))
    assert not any(t.requires_grad for t in run(problem).values())
    with torch.no_grad():
        assert not any(t.requires_grad for t in run(problem.requiring()).values())
    results = run(problem.requiring())
    assert all(t.requires_grad for t in results.values())
    assert len({t.grad_fn for t in results.values()}) == 1  # one autograd node


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_second_backward_through_the_same_graph(cell, layout):
    problem = build(Case(cell, layout, True, proj=3 if cell == "lstm" else 0)).requiring()
    results = run(problem)
    outputs, leaves, grad_of = list(results.values()), problem.leaves(), list(cotangents(results).values())
    first = torch.autograd.grad(outputs, list(leaves.values()), grad_of, retain_graph=True)
    second = torch.autograd.grad(outputs, list(leaves.values()), grad_of, retain_graph=True)
    same_bits(dict(zip(leaves, first, strict=True)), dict(zip(leaves, second, strict=True)))
    # and the gradient with create_graph, which may take another way, is the same
    third = torch.autograd.grad(outputs, list(leaves.values()), grad_of, create_graph=True)
    check_gradients(dict(zip(leaves, third, strict=True)), dict(zip(leaves, first, strict=True)))
    torch.autograd.grad(outputs, list(leaves.values()), grad_of)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(outputs, list(leaves.values()), grad_of)


@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_changes_in_place_are_never_silent(cell, layout):
    """What backward needs and the user overwrites is refused, as torch's operators do, or (the output) computed again.

    Writes that torch does not count, through `.data` or numpy, go unseen, as those to an nn.LSTM's output do."""
    flags = {"lengths": True, "resets": True} if layout == "dense" else {}
    case = Case(cell, layout, True, proj=3 if cell == "lstm" else 0, **flags)
    sound = build(case)
    _, expected = gradients(run, sound)
    grad_of = cotangents(oracle(sound))
    masks = [name for name in ("lengths", "resets", "batch_sizes") if getattr(sound, name) is not None]
    results_too = ["output", "h_n"] + ["c_n", "cells"] * case.has_cell_state
    for name in (*sound.leaves(), *results_too, *masks):
        problem = build(case).requiring()
        results = run(problem)
        before = {key: t for key, t in results.items()}
        target = problem.leaves().get(name)
        if target is None:
            target = results[name] if name in results else getattr(problem, name)
        with torch.no_grad():
            target.logical_not_() if target.dtype == torch.bool else target.zero_()
        leaves = problem.leaves()
        try:
            grads = torch.autograd.grad([before[key] for key in grad_of], list(leaves.values()), list(grad_of.values()))
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error), name
        else:
            check_gradients(dict(zip(leaves, grads, strict=True)), expected)


@pytest.mark.parametrize("layout", ["dense", "batch_first"])
@pytest.mark.parametrize("cell", CELLS)
def test_padding_may_hold_anything(cell, layout):
    """NaN past the lengths reaches neither values nor gradients, also NaN in the gradient of the padding itself."""
    case = Case(cell, layout, True, lengths=True, resets=True, size=(7, 5, 3, 9))
    clean, dirty = build(case), build(case)
    past = torch.arange(7).unsqueeze(1) >= clean.lengths
    past = past.t() if layout == "batch_first" else past
    dirty.input[past] = float("nan")
    dirty.resets |= past
    grad_of = cotangents(oracle(clean))
    dirty_grad_of = {name: t.clone() for name, t in grad_of.items()}
    for name in grad_of.keys() & {"output", "cells"}:
        grad_of[name][past] = 0
        dirty_grad_of[name][past] = float("nan")
    expected, expected_grads = gradients(oracle, clean, grad_of)
    actual, grads = gradients(run, dirty, dirty_grad_of)
    check_values(actual, expected)
    check_gradients(grads, expected_grads)
    assert not grads["input"][past].any()
    # second order, through the same padding
    penalties = []
    for fn, problem in ((run, dirty), (oracle, clean)):
        problem = problem.requiring()
        leaves = problem.leaves()
        total = sum((t * t).sum() for t in fn(problem).values())
        inner = torch.autograd.grad(total, list(leaves.values()), create_graph=True)
        penalty = sum((t * t).sum() for t in inner)
        grads = torch.autograd.grad(penalty, list(leaves.values()), materialize_grads=True)
        penalties.append(dict(zip(leaves, grads, strict=True)))
    check_gradients(*penalties)


@pytest.mark.parametrize("cell", CELLS)
def test_nan_reaches_the_gradients_of_its_own_row_only(cell):
    problem = build(Case(cell, bidirectional=True, size=(5, 4, 3, 9)))
    problem.input[2, 1] = float("nan")
    _, expected = gradients(oracle, problem)
    _, grads = gradients(run, problem)
    others = [0, 2, 3]
    check_gradients(
        {name: grads[name][:, others] for name in ("input", "h_0")},
        {name: expected[name][:, others] for name in ("input", "h_0")},
    )
    # Weights sum over all rows: the NaN must not be lost.
    assert torch.isnan(grads["weight_ih"]).any() and torch.isnan(grads["weight_ih_reverse"]).any()
    # A NaN in a cotangent stays in its row as well.
    problem = build(Case(cell, bidirectional=True, size=(5, 4, 3, 9)))
    grad_of = cotangents(oracle(problem))
    clean, _ = gradients(oracle, problem, grad_of)[1], None
    grad_of["output"] = grad_of["output"].clone()
    grad_of["output"][2, 1] = float("nan")
    _, grads = gradients(run, problem, grad_of)
    check_gradients(
        {name: grads[name][:, others] for name in ("input", "h_0")},
        {name: clean[name][:, others] for name in ("input", "h_0")},
    )
    assert torch.isnan(grads["input"][:, 1]).any()


# L, N, I, H: weights in whole vectors, with a rest, and less than one; more rows than are taken to be few.
@pytest.mark.parametrize(
    "size", [(1, 1, 64, 32), (1, 2, 70, 69), (1, 1, 3, 5), (3, 1, 33, 16), (1, 6, 20, 17)], ids=str
)
@pytest.mark.parametrize(("cell", "proj"), [*((cell, 0) for cell in CELLS), ("lstm", 19), ("lstm", 32)])
def test_few_rows(cell, proj, size):
    """Backward packs no weight that it multiplies few rows by, or none: by what is asked for, with each kernel."""
    if proj >= size[3]:
        proj = 0
    for state, bidirectional in itertools.product((True, False), repeat=2):
        problem = build(Case(cell, "dense", bidirectional, proj=proj, state=state, size=size))
        names = list(problem.leaves())
        for wrt in (names, names[1:], [*problem.weights], ["input"], ["h_0"] if state else names):
            expected, expected_grads = gradients(oracle, problem, wrt=wrt)
            for _ in instruction_sets():
                actual, grads = gradients(run, problem, wrt=wrt)
                check_values(actual, expected)
                check_gradients(grads, expected_grads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_accumulates_into_grad_and_shares_weights(dtype):
    """The same weights in two layers and twice in one: gradients add up, dtypes are the leaves'."""
    problem = build(Case("gru", size=(4, 3, 6, 6))).to(dtype).requiring()
    weights = list(problem.weights.values())
    once, _, _, _ = ops.layer(problem.input, None, None, weights, cell="gru")
    twice, _, _, _ = ops.layer(once, None, None, weights, cell="gru")
    twice.float().sum().backward()
    total = {name: t.grad.clone() for name, t in problem.weights.items()}
    assert all(t.dtype == dtype for t in total.values())

    def by_oracle(p: Problem):
        first = oracle(dataclasses.replace(p, h_0=None))["output"]
        return {"output": oracle(dataclasses.replace(p, input=first, h_0=None))["output"]}

    exact = problem.to(torch.float64)
    ones = {"output": torch.ones(4, 3, 6, dtype=torch.float64)}
    _, expected = gradients(by_oracle, exact, ones, wrt=problem.weights)
    check_gradients({name: t for name, t in total.items()}, expected, dtype)
    both = ops.layer(problem.input.detach(), None, None, weights * 2, cell="gru", bidirectional=True)
    grads = torch.autograd.grad(both[0].float().sum(), weights)
    assert all(torch.isfinite(t).all() and t.any() for t in grads)


def test_hooks_and_checkpoint_and_saved_tensor_hooks():
    """Saved tensors go through the user's pack and unpack hooks, as offloading and checkpointing need."""
    problem = build(Case(bidirectional=True))
    _, expected = gradients(run, problem)
    packed = []

    def pack(t):
        packed.append(t.numel())
        return t.clone()

    def hooked(p):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.clone()):
            return run(p)

    _, grads = gradients(hooked, problem)
    check_gradients(grads, expected)
    assert sum(packed) > problem.input.numel()

    def offloaded(p):
        with torch.autograd.graph.save_on_cpu():
            return run(p)

    check_gradients(gradients(offloaded, problem)[1], expected)
    names = list(problem.leaves())

    def checkpointed(p):
        def fn(*args):
            return tuple(run(problem.having(dict(zip(names, args, strict=True)))).values())

        results = torch.utils.checkpoint.checkpoint(fn, *p.leaves().values(), use_reentrant=False)
        return dict(zip(oracle(problem), results, strict=True))

    check_gradients(gradients(checkpointed, problem)[1], expected)
    # hooks on leaves, on results and on the node
    asked = problem.requiring()
    seen = []
    asked.input.register_hook(lambda g: seen.append("leaf"))
    results = run(asked)
    results["output"].register_hook(lambda g: g * 2)
    results["output"].grad_fn.register_hook(lambda *_: seen.append("node"))
    results["output"].sum().backward()
    _, doubled = gradients(run, problem, {"output": torch.full_like(results["output"], 2.0)})
    check_gradients({name: t.grad for name, t in asked.leaves().items()}, doubled)
    assert sorted(seen) == ["leaf", "node"]


class Upstream(torch.autograd.Function):
    """A node that Python can watch: alive as long as a graph holds it."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


@pytest.mark.parametrize("cell", CELLS)
def test_graphs_die_with_their_results(cell):
    """No cycle keeps a graph alive, used for no backward, one or a double one; backward frees what was saved."""
    for orders in range(3):
        problem = build(Case(cell, bidirectional=True)).requiring()
        input = Upstream.apply(problem.input)
        node, saved = weakref.ref(input.grad_fn), weakref.ref(input)
        results = run(problem.having({"input": input}))
        del input
        total = sum(t.sum() for t in results.values())
        if orders == 1:
            total.backward()
            gc.collect()
            assert saved() is None, "the input is still saved after backward"
        if orders == 2:
            (grad,) = torch.autograd.grad(total, problem.input, create_graph=True)
            total = grad.sum()
        del results, total
        grad = None
        gc.collect()
        assert node() is None and saved() is None, orders


# --- torch.func -------------------------------------------------------------------------------------------------

FUNC_CASES = [
    Case(
        cell,
        layout,
        bidirectional,
        True,
        2 if cell == "lstm" and bidirectional else 0,
        lengths,
        resets,
        size=(4, 3, 2, 3),
    )
    for cell in CELLS
    for layout, bidirectional, lengths, resets in (
        ("dense", False, False, False),
        ("batch_first", True, True, True),
        ("packed", True, False, False),
    )
]


def mapped(fn, problem: Problem, names: list[str], randomness: int = 3):
    """``fn`` vmapped over a new dimension of the named leaves (each at another place), and its result without vmap."""
    leaves = problem.leaves()
    dims = {name: index % (leaves[name].dim() + 1) for index, name in enumerate(names)}
    generator = torch.Generator().manual_seed(5)
    stacked = {}
    for name, dim in dims.items():
        shape = (randomness, *leaves[name].shape)
        stacked[name] = (leaves[name] + 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)).movedim(
            0, dim
        )

    def call(*args):
        return tuple(fn(problem.having(dict(zip(names, args, strict=True)))).values())

    return torch.func.vmap(call, in_dims=tuple(dims.values())), list(stacked.values()), call, dims


@pytest.mark.parametrize("case", FUNC_CASES, ids=str)
def test_vmap(case):
    """Over inputs, over states, over all weights (an ensemble), over one weight, over everything: equal to a loop."""
    problem = build(case)
    weights = list(problem.weights)
    states = [name for name in problem.leaves() if name in ("h_0", "c_0")]
    for names in (["input"], states[:1], weights, ["weight_hh"], ["input", *states, *weights]):
        vmapped, stacked, call, dims = mapped(run, problem, names)
        slices = [[t.select(dim, i) for t, dim in zip(stacked, dims.values(), strict=True)] for i in range(3)]
        looped = [torch.stack(results) for results in zip(*(call(*args) for args in slices), strict=True)]
        keys = list(oracle(problem))
        check_values(dict(zip(keys, vmapped(*stacked), strict=True)), dict(zip(keys, looped, strict=True)))


@pytest.mark.parametrize("kind", [rnn_ext.GRU, functools.partial(rnn_ext.LSTM, zoneout=0.1)], ids=["gru", "lstm"])
def test_vmap_over_nothing(kind):
    """What torch's own operators return there, to the shapes."""
    module = kind(2, 3, backend="custom")
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def output(p: dict, x: Tensor) -> Tensor:
        return torch.func.functional_call(module, p, (x,))[0]

    none, one = torch.randn(0, 4, 5, 2), torch.randn(4, 5, 2)
    vmap = functools.partial(torch.func.vmap, randomness="different")
    assert vmap(output, (None, 0))(parameters, none).shape == (0, 4, 5, 3)
    sets = {name: p.expand(0, *p.shape) for name, p in parameters.items()}
    assert vmap(output, (0, None))(sets, one).shape == (0, 4, 5, 3)
    per_sample = vmap(torch.func.grad(lambda p, x: output(p, x).sum()), (None, 0))(parameters, none)
    assert {name: grad.shape for name, grad in per_sample.items()} == {name: p.shape for name, p in sets.items()}
    for empty in (one[:0], one[:, :0]):
        shape = (*empty.shape[:2], 3, *empty.shape)
        assert torch.func.jacrev(lambda x: output(parameters, x))(empty).shape == shape


def test_vmap_over_masks_and_twice():
    """Lengths and resets of their own for each entry; vmap inside vmap."""
    for cell in CELLS:
        problem = build(Case(cell, "batch_first", True, lengths=True, resets=True, size=(4, 3, 2, 3)))
        generator = torch.Generator().manual_seed(4)
        resets = torch.rand(2, 3, 4, generator=generator) < 0.4
        lengths = torch.randint(0, 5, (2, 3), generator=generator)

        def masked(fn, problem=problem):
            return lambda r, n: tuple(fn(dataclasses.replace(problem, resets=r, lengths=n)).values())

        for dims in ((0, None), (None, 0), (0, 0)):
            given = (resets if dims[0] == 0 else resets[0], lengths if dims[1] == 0 else lengths[0])
            actual, expected = (torch.func.vmap(masked(fn), in_dims=dims)(*given) for fn in (run, oracle))
            keys = list(oracle(problem))
            check_values(dict(zip(keys, actual, strict=True)), dict(zip(keys, expected, strict=True)))

        def output(fn, problem=problem):
            return lambda input: fn(problem.having({"input": input}))["output"]

        inputs = torch.randn(2, 3, *problem.input.shape, generator=generator, dtype=torch.float64)
        actual, expected = (torch.vmap(torch.vmap(output(fn)))(inputs) for fn in (run, oracle))
        check_values({"output": actual}, {"output": expected})


@pytest.mark.parametrize("case", FUNC_CASES, ids=str)
def test_gradients_of_an_ensemble(case):
    """vmap(grad) over weights, inputs and states together."""
    problem = build(case)
    names = list(problem.leaves())
    generator = torch.Generator().manual_seed(6)
    stacked = [
        t + 0.5 * torch.randn(3, *t.shape, generator=generator, dtype=t.dtype) for t in problem.leaves().values()
    ]

    def grads(fn):
        def loss(*leaves):
            results = fn(problem.having(dict(zip(names, leaves, strict=True))))
            return sum((t * t).sum() for t in results.values())

        return torch.func.vmap(torch.func.grad(loss, argnums=tuple(range(len(names)))))(*stacked)

    check_gradients(dict(zip(names, grads(run), strict=True)), dict(zip(names, grads(oracle), strict=True)))


@pytest.mark.parametrize("case", FUNC_CASES, ids=str)
def test_per_sample_gradients(case):
    """vmap(grad): gradients of shared weights, one set per sample."""
    problem = build(case)
    names = list(problem.weights)
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(4, *problem.input.shape, generator=generator, dtype=torch.float64)

    def loss(fn):
        def of(weights, input):
            leaves = dict(zip(names, weights, strict=True))
            return sum((t * t).sum() for t in fn(problem.having({**leaves, "input": input})).values())

        return torch.func.vmap(torch.func.grad(of), in_dims=(None, 0))(list(problem.weights.values()), inputs)

    check_gradients(dict(zip(names, loss(run), strict=True)), dict(zip(names, loss(oracle), strict=True)))


@pytest.mark.parametrize("case", FUNC_CASES, ids=str)
def test_jacobians_and_forward_mode(case):
    problem = build(case)
    names = ["input", "weight_hh", "bias_ih", "h_0"]
    leaves = [problem.leaves()[name] for name in names]
    tangents = [torch.randn(t.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64) for t in leaves]

    def of(fn):
        return lambda *args: fn(problem.having(dict(zip(names, args, strict=True))))

    actual = torch.func.jacrev(of(run), argnums=(0, 1))(*leaves)
    expected = torch.func.jacrev(of(oracle), argnums=(0, 1))(*leaves)
    for key in expected:
        for name, got, want in zip(names, actual[key], expected[key], strict=False):
            check_gradients({name: got}, {name: want})
    values, actual = torch.func.jvp(of(run), tuple(leaves), tuple(tangents))
    expected_values, expected = torch.func.jvp(of(oracle), tuple(leaves), tuple(tangents))
    check_values(values, expected_values)
    check_gradients(actual, expected)


@pytest.mark.parametrize("case", [case for case in FUNC_CASES if case.layout != "dense"], ids=str)
def test_forward_mode_of_each_leaf_alone(case):
    """A tangent of one argument only, of the results and of the gradients, cotangents included."""
    problem = build(case)
    grad_of = cotangents(oracle(problem))
    leaves = problem.leaves()
    given = leaves | {"grad_" + name: t for name, t in grad_of.items()}
    for name, t in given.items():
        tangent = torch.randn(t.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

        def results(fn, name=name):
            return lambda x: fn(problem.having({name: x}))

        def grads(fn, name=name):
            def of(x):
                arguments = given | {name: x}
                inner = {key: arguments[key] for key in leaves}
                _, vjp = torch.func.vjp(lambda p: fn(problem.having(p)), inner)
                return vjp({key: arguments["grad_" + key] for key in grad_of})[0]

            return of

        for transform in [results] * (name in leaves) + [grads]:
            (_, actual), (_, expected) = (torch.func.jvp(transform(fn), (t,), (tangent,)) for fn in (run, oracle))
            check_gradients(actual, expected)


def test_forward_over_reverse():
    """A Hessian-vector product both ways: jvp of grad, and grad of grad."""
    for cell in CELLS:
        problem = build(Case(cell, size=(3, 2, 2, 3)))
        v = torch.randn(problem.input.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

        def loss(fn, problem=problem):
            return lambda input: sum((t * t).sum() for t in fn(problem.having({"input": input})).values())

        expected = torch.func.jvp(torch.func.grad(loss(oracle)), (problem.input,), (v,))[1]
        actual = torch.func.jvp(torch.func.grad(loss(run)), (problem.input,), (v,))[1]
        check_gradients({"input": actual}, {"input": expected})
        hessian = torch.func.hessian(loss(run))(problem.input)
        check_gradients({"input": torch.einsum("abcdef,def->abc", hessian, v)}, {"input": expected})


# --- torch.compile ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_compile(cell):
    """One graph without a break for two lengths and batch sizes, forward and backward."""
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def fn(input, h_0, c_0, weights):
        output, h_n, c_n, _ = ops.layer(input, h_0, c_0, weights, cell=cell, bidirectional=True)
        return output.tanh(), h_n, c_n

    compiled = torch.compile(fn, backend=graphs, fullgraph=True, dynamic=True)
    for length, batch in ((5, 3), (9, 4), (6, 7)):
        problem = build(Case(cell, bidirectional=True, size=(length, batch, 4, 7))).requiring()
        leaves = list(problem.leaves().values())
        arguments = (problem.input, problem.h_0, problem.c_0, list(problem.weights.values()))
        found = []
        for call in (fn, compiled):
            outputs = [t for t in call(*arguments) if t.numel()]
            grads = torch.autograd.grad(sum((t * t).sum() for t in outputs), leaves)
            found.append({str(index): t for index, t in enumerate((*outputs, *grads))})
        check_gradients(*found)
    assert graphs.frame_count <= 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_batched_gradients(cell, layout):
    """Many cotangents in one call of autograd: of all, of some, once and twice."""
    case = Case(cell, layout, True, lengths=layout == "dense", proj=3 if cell == "lstm" else 0, size=(3, 2, 3, 4))
    problem = build(case).requiring()
    results, leaves = run(problem), list(problem.leaves().values())
    for names in (list(results), ["output"]):
        outputs = [results[name] for name in names]
        grad_of = [torch.randn(5, *t.shape, dtype=t.dtype) for t in outputs]
        found = torch.autograd.grad(
            outputs, leaves, grad_of, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        for i in range(5):
            one = [g[i] for g in grad_of]
            expected = torch.autograd.grad(outputs, leaves, one, retain_graph=True, allow_unused=True)
            for got, want in zip(found, expected, strict=True):
                assert (got is None) == (want is None)
                if want is not None:
                    check_gradients({"": got[i]}, {"": want})


@pytest.mark.parametrize("cell", CELLS)
def test_vectorized_derivatives(cell):
    """torch.autograd.functional's vectorize=True, which has a vmap of its own, and gradcheck's batched gradients."""
    problem = build(Case(cell, size=(2, 2, 2, 3)))

    def output(x: Tensor) -> Tensor:
        return run(problem.having({"input": x}))["output"]

    def loss(x: Tensor) -> Tensor:
        return output(x).pow(3).sum()

    functional = torch.autograd.functional
    for function, of in ((functional.jacobian, output), (functional.hessian, loss)):
        found, expected = (function(of, problem.input, vectorize=v) for v in (True, False))
        check_gradients({"": found}, {"": expected})
    assert torch.autograd.gradcheck(output, problem.input.clone().requires_grad_(), check_batched_grad=True)


def test_vmap_computes_once():
    """vmap(grad) of ragged batches: a call for each entry, and none before."""
    problem = build(Case("gru", lengths=True))
    inputs = torch.randn(6, *problem.input.shape, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return run(problem.having({"input": x}))["output"].sum()

    with Calls("layer") as calls:
        torch.func.vmap(torch.func.grad(loss))(inputs)
    assert calls.rows == [problem.input.shape[1]] * 6


class Calls(TorchDispatchMode):
    """The batch sizes of the calls of an op."""

    def __init__(self, name: str):
        super().__init__()
        self.name, self.rows = name, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is getattr(torch.ops.rnn_ext, self.name).default:
            self.rows.append(args[0].shape[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"layer_norm": True}], ids=str)
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_biases_of_many_rows(name, options):
    """A sum of a million rows in one chain of float32 would have lost three digits."""
    if options and name != "LSTM":
        return
    rows, hidden = (500_000, 16) if options else (1_000_000, 2)  # two units have next to no variance
    torch.manual_seed(0)
    layer = getattr(rnn_ext, name)(2, hidden, **options)
    double = copy.deepcopy(layer).double()
    input = torch.randn(10, rows // 10, 2)
    for parameter, exact in zip(layer.parameters(), double.parameters(), strict=True):
        if parameter.dim() > 1:
            continue
        found, expected = (
            torch.autograd.grad(module(x)[0].sum(), p)[0]
            for module, x, p in ((layer, input, parameter), (double, input.double(), exact))
        )
        apart = (found.double() - expected).abs().max() / expected.abs().max()
        assert apart < 2e-6, (name, parameter.shape, float(apart))


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_reverse_over_reverse_mode_of_vmap(name):
    """The second derivatives by two vmaps of backward, as by forward mode over it."""
    layer = getattr(rnn_ext, name)(2, 3, dtype=torch.float64)
    input = torch.randn(3, 1, 2, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return layer(x)[0].pow(3).sum()

    found = torch.func.jacrev(torch.func.jacrev(loss))(input)
    torch.testing.assert_close(found, torch.func.hessian(loss)(input))


@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_tangent_of_a_cotangent(name, create_graph):
    """Forward mode over backward, of which the graph is not kept, inside autocast or not."""
    layer = getattr(rnn_ext, name)(2, 3)
    input = torch.randn(4, 2, 2, requires_grad=True)
    output = layer(input)[0]
    doubled = torch.autograd.grad(output, input, 2 * torch.ones_like(output), retain_graph=True)[0]
    for enabled in (False, True):
        with forward_ad.dual_level(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            cotangent = forward_ad.make_dual(torch.ones_like(output), 2 * torch.ones_like(output))
            (grad,) = torch.autograd.grad(output, input, cotangent, retain_graph=True, create_graph=create_graph)
            primal, tangent = forward_ad.unpack_dual(grad)
        torch.testing.assert_close(tangent, doubled, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(2 * primal, doubled, rtol=1e-4, atol=1e-6)
