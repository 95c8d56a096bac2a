"""Gradients of ``ops.layer``: against the oracle and finite differences, any order, in part, compiled."""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import weakref

import pytest
import torch
import torch._dynamo.testing
import torch.utils.checkpoint
from torch.autograd import gradcheck, gradgradcheck
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
    projected,
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
        projected(2),
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
@pytest.mark.parametrize(("cell", "proj"), projected(3))
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
@pytest.mark.parametrize(("cell", "proj"), projected(3))
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
@pytest.mark.parametrize(("cell", "proj"), projected(19, 32))
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


@pytest.mark.parametrize(
    ("name", "options"), [("RNN", {}), ("GRU", {}), ("LSTM", {}), ("LSTM", {"layer_norm": True})], ids=str
)
def test_biases_of_many_rows(name, options):
    """A sum of a million rows in one chain of float32 would have lost three digits."""
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


def test_autocast_around_second_derivatives():
    problem = build(Case(), torch.float32).requiring()
    weights = list(problem.weights.values())
    output = ops.layer(problem.input, None, None, weights, cell="lstm")[0]
    (grad,) = torch.autograd.grad(output.square().sum(), problem.input, create_graph=True)
    loss = grad.square().sum()
    expected = torch.autograd.grad(loss, weights, retain_graph=True)
    with torch.autocast("cpu"):
        found = torch.autograd.grad(loss, weights)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gradients_pass_a_relu_of_nan():
    """As in torch."""
    native, layer = torch.nn.RNN(3, 5, nonlinearity="relu"), rnn_ext.RNN(3, 5, nonlinearity="relu", backend="custom")
    layer.load_state_dict(native.state_dict())
    grads = []
    for module in (native, layer):
        input = torch.ones(4, 2, 3)
        input[1, 0] = torch.nan
        input.requires_grad_()
        module(input)[0].sum().backward()
        grads.append(input.grad)
    assert grads[0][1:, 0].isfinite().all() and (grads[0][1:, 0] != 0).any()
    torch.testing.assert_close(*grads, equal_nan=True)


def test_only_gradients_that_were_asked_for_have_a_history():
    weights, input = [torch.randn(20, 4), torch.randn(20, 5)], torch.randn(3, 2, 4, requires_grad=True)
    h_0 = torch.zeros(1, 2, 5)
    call = (input, h_0, None, weights, None, None, None, [])
    options = ("lstm", False, False, False)
    output, *_, saved = torch.ops.rnn_ext.layer(*call, *options, True)
    cotangents, asked = (torch.ones_like(output), None, None, None), [True, False, False, True, False]
    dx, dh_0, _, dw = torch.ops.rnn_ext.layer_backward(
        *cotangents, *call, output.detach(), saved.detach(), *options, asked
    )
    assert [grad.requires_grad for grad in (dx, dh_0, *dw)] == [True, False, True, False]
