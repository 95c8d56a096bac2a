"""``ops.layer`` and the layers under ``torch.func``, forward mode and batched gradients."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from util import (
    CELLS,
    LAYOUTS,
    Calls,
    Case,
    Problem,
    build,
    check_gradients,
    check_values,
    cotangents,
    oracle,
    run,
)

import rnn_ext
from rnn_ext import ops

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
    per_sample = vmap(torch.func.grad(lambda p, x: output(p, x).sum()), (None, 0))
    found = per_sample(parameters, none)
    assert {name: grad.shape for name, grad in found.items()} == {name: p.shape for name, p in sets.items()}
    for empty in (torch.randn(3, 0, 5, 2), torch.randn(3, 4, 0, 2)):  # of sequences without timesteps, of no sequences
        for name, grad in per_sample(parameters, empty).items():
            assert grad.shape == (3, *parameters[name].shape) and not grad.any()
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


def ensemble(entries: int) -> tuple[rnn_ext.GRU, dict[str, Tensor]]:
    layers = [rnn_ext.GRU(3, 4) for _ in range(entries)]
    weights, _ = torch.func.stack_module_state(layers)
    return layers[0], {name: weight.detach() for name, weight in weights.items()}


def test_the_calls_of_an_ensemble_are_seen():
    """By modes of Python and by autograd, as if each were a call of the user's."""
    layer, weights = ensemble(5)
    x = torch.randn(6, 2, 3)

    def output(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, weights, (x,))[0]

    with Calls() as calls:
        torch.vmap(output)(weights)
    assert calls.names.count("layer") == 5
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        torch.vmap(output)(weights)
    assert counter.get_total_flops() == 5 * 2 * 6 * 2 * 12 * (3 + 4)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.vmap(output)(weights).square().sum()

    expected = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for i in range(5):
        own = {name: weight[i].clone().requires_grad_() for name, weight in weights.items()}
        output(own).square().sum().backward()
        for name, weight in own.items():
            expected[name][i] = weight.grad
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    loss(leaves).backward()
    for found in (torch.func.grad(loss)(weights), {name: leaf.grad for name, leaf in leaves.items()}):
        torch.testing.assert_close(found, expected)
    _, tangent = torch.func.jvp(loss, (weights,), (expected,))
    torch.testing.assert_close(tangent, sum(g.square().sum() for g in expected.values()))


def test_gradients_through_an_ensemble_are_put_together_once():
    """Not as a gradient of all entries for each of them."""
    layer, weights = ensemble(7)
    x = torch.randn(6, 2, 3)
    leaves = {name: weight.requires_grad_() for name, weight in weights.items()}
    output = torch.vmap(lambda weights: torch.func.functional_call(layer, weights, (x,))[0])(leaves)
    with Calls() as calls:
        output.sum().backward()
    assert calls.names.count("layer_backward") == 7
    assert calls.names.count("stack") <= 4 + 1 and "select_backward" not in calls.names


def test_an_ensemble_of_none_keeps_its_graph():
    layer, weights = ensemble(2)
    leaves = {name: weight[:0].requires_grad_() for name, weight in weights.items()}
    output = torch.vmap(lambda weights, x: torch.func.functional_call(layer, weights, (x,))[0])(
        leaves, torch.randn(0, 6, 2, 3)
    )
    assert output.shape == (0, 6, 2, 4)
    output.sum().backward()
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves.values())


def test_weights_of_an_ensemble_that_change_before_backward():
    layer, weights = ensemble(3)
    x = torch.randn(6, 2, 3, requires_grad=True)
    output = torch.vmap(lambda weights: torch.func.functional_call(layer, weights, (x,))[0])(weights)
    weights["weight_hh_l0"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


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


class BatchSizes(TorchDispatchMode):
    """The batch sizes of the calls of an op."""

    def __init__(self, name: str):
        super().__init__()
        self.name, self.rows = name, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is getattr(torch.ops.rnn_ext, self.name).default:
            self.rows.append(args[0].shape[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layers", [1, 2])
def test_packed_within_a_transform(layers):
    """Where batch_sizes, too, is a tensor of the transform."""
    layer, x = rnn_ext.GRU(4, 6, layers), torch.randn(5, 3, 4)
    parameters = {name: weight.detach() for name, weight in layer.named_parameters()}

    def loss(parameters):
        packed = pack_padded_sequence(x, torch.tensor([3, 2, 5]), enforce_sorted=False)
        return torch.func.functional_call(layer, parameters, (packed,))[0].data.square().sum()

    found = torch.func.grad(loss)(parameters)
    loss(dict(layer.named_parameters())).backward()
    for name, weight in layer.named_parameters():
        torch.testing.assert_close(found[name], weight.grad)


def test_vmap_computes_once():
    """vmap(grad) of ragged batches: a call for all entries, and none before."""
    problem = build(Case("gru", lengths=True))
    inputs = torch.randn(6, *problem.input.shape, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return run(problem.having({"input": x}))["output"].sum()

    with BatchSizes("layer") as calls:
        torch.func.vmap(torch.func.grad(loss))(inputs)
    assert calls.rows == [problem.input.shape[1] * 6]


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


@pytest.mark.parametrize("which", [0, 1, 2])
def test_tangent_of_each_cotangent(which):
    """The derivative of a vjp, which is linear in the cotangent of output, h_n and c_n."""
    problem = build(Case())

    def call(input):
        return ops.layer(input, problem.h_0, problem.c_0, list(problem.weights.values()), cell="lstm")[:3]

    results, vjp = torch.func.vjp(call, problem.input)

    def of_one(cotangent):
        return vjp(tuple(cotangent if i == which else torch.zeros_like(r) for i, r in enumerate(results)))[0]

    cotangent, direction = torch.randn_like(results[which]), torch.randn_like(results[which])
    tangent = torch.func.jvp(of_one, (cotangent,), (direction,))[1]
    assert tangent.abs().max() > 0
    torch.testing.assert_close(tangent, of_one(direction))


@pytest.mark.parametrize("options", [{}, {"proj_size": 2}, {"layer_norm": True}], ids=str)
def test_what_depends_on_nothing_requires_no_gradient(options):
    """Of what transforms return, as torch.nn's: where only they differentiate, and weights are frozen or not."""
    layer, x = rnn_ext.LSTM(3, 4, dtype=torch.float64, **options), torch.randn(5, 2, 3, dtype=torch.float64)
    transforms = (torch.func.jacrev, torch.func.jacfwd)
    for frozen in (True, False):
        layer.requires_grad_(not frozen)
        for outer, inner in itertools.product(transforms, repeat=2):
            assert outer(inner(lambda x: layer(x)[0].sum()))(x).requires_grad is not frozen
