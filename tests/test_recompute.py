"""``recompute=True``: the same numbers from less memory."""

from __future__ import annotations

import copy

import pytest
import torch
import util
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from util import CELLS, Case, build, gradients, same_bits

import rnn_ext

MODULES = {"rnn_tanh": rnn_ext.RNN, "gru": rnn_ext.GRU, "lstm": rnn_ext.LSTM}
CASES = [
    *(Case(cell, bidirectional=True) for cell in CELLS),
    Case("lstm", "batch_first", lengths=True, resets=True),
    Case("gru", "packed", True),
    Case("lstm", proj=3, state=False),
    Case("lstm", size=(0, 2, 3, 4)),
]


def run(problem, recompute: bool) -> dict[str, Tensor]:
    return util.run(problem, recompute=recompute)


def kept_bytes(module: torch.nn.Module, input) -> int:
    """Of the memory that autograd keeps alive, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = module(input)
    assert results[0] is not None  # alive until here, so that no address was counted twice
    return sum(found.values())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_are_the_same(case):
    for dtype in (torch.float32, torch.bfloat16):
        problem = build(case).to(dtype)
        plain, plain_grads = gradients(lambda p: run(p, False), problem)
        again, again_grads = gradients(lambda p: run(p, True), problem)
        same_bits(again, plain)
        same_bits(again_grads, plain_grads)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_half_the_memory(cell, num_layers):
    torch.manual_seed(0)
    module = MODULES[cell](32, 32, num_layers)
    x = torch.randn(20, 4, 32, requires_grad=True)
    plain = kept_bytes(module, x)
    module.recompute = True
    assert 0 < kept_bytes(module, x) <= plain / 2


def test_backward_twice_and_through_a_change():
    """A graph that is kept can be walked again; what was changed in place meanwhile is noticed."""
    module = rnn_ext.LSTM(3, 4, recompute=True)
    x = torch.randn(5, 2, 3, requires_grad=True)
    reset = torch.zeros(5, 2, dtype=torch.bool)
    output, _ = module(x, resets=reset)
    first = torch.autograd.grad(output.sum(), x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(output.sum(), x, retain_graph=True)[0])
    reset[2] = True
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("case", [Case("lstm", size=(3, 2, 2, 3)), Case("gru", "packed", size=(3, 2, 2, 3))], ids=str)
def test_second_derivatives(case):
    problem = build(case)

    def penalty(recompute: bool) -> dict[str, Tensor]:
        p = problem.requiring()
        loss = sum(t.square().sum() for t in run(p, recompute).values())
        grads = torch.autograd.grad(loss, list(p.leaves().values()), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), list(p.leaves().values()))
        return dict(zip(p.leaves(), second, strict=True))

    same_bits(penalty(True), penalty(False))


def test_func_transforms():
    torch.manual_seed(0)
    plain = rnn_ext.LSTM(3, 4, bidirectional=True, dtype=torch.float64)
    module = copy.deepcopy(plain)
    module.recompute = True
    x = torch.randn(6, 5, 2, 3, dtype=torch.float64)
    tangent = torch.randn_like(x[0])

    def results(m):
        def loss(parameters, x):
            return torch.func.functional_call(m, parameters, (x,))[0].square().sum()

        parameters = dict(m.named_parameters())
        per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        hvp = torch.func.jvp(lambda x: torch.func.grad(loss, 1)(parameters, x), (x[0],), (tangent,))[1]
        nested = torch.func.grad(lambda x: torch.func.grad(loss, 1)(parameters, x).square().sum())(x[0])
        return {**per_sample, "hvp": hvp, "nested": nested}

    for name, want in results(plain).items():
        torch.testing.assert_close(results(module)[name], want, rtol=1e-12, atol=1e-12)


def test_compiled():
    """One graph, the same gradients; and the compiler does not move the second forward into the first."""
    module = rnn_ext.LSTM(3, 64, 2, recompute=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(20, 4, 3, requires_grad=True)
    want = torch.autograd.grad(module(x)[0].square().sum(), (x, *module.parameters()))
    got = torch.autograd.grad(compiled(x)[0].square().sum(), (x, *module.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    small = kept_bytes(compiled, x)
    module.recompute = False
    assert small <= kept_bytes(torch.compile(module, backend="aot_eager", fullgraph=True), x) / 2


def test_module_option():
    x = torch.randn(5, 2, 3)
    for cell, kind in MODULES.items():
        module = kind(3, 4, recompute=True)
        assert "recompute=True" in repr(module) and "recompute" not in repr(kind(3, 4)), cell
        packed = pack_sequence([x[:, 0], x[:3, 1]])
        with torch.no_grad():
            assert torch.equal(module(x)[0], module(x)[0]) and module(packed)[0].data.shape == (8, 4)
        native = copy.deepcopy(module)  # the native backend has nothing to recompute: the same results
        native.backend = "native"
        torch.testing.assert_close(native(x)[0], module(x)[0])
        assert "recompute" not in vars(rnn_ext.to_native(module))
        assert rnn_ext.convert(module).recompute is False
        with pytest.raises(TypeError, match="recompute must be a bool, got 1"):
            kind(3, 4, recompute=1)
    weights = [p.detach().requires_grad_() for p in rnn_ext.GRU(3, 4).parameters()]
    output, _ = rnn_ext.functional.gru(x, None, weights, recompute=True)
    output.sum().backward()
    assert weights[0].grad is not None


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_autocast_around_backward_alone(cell, changed):
    """What is computed again is what forward computed, which was not cast."""
    torch.manual_seed(0)
    layer = {"rnn_tanh": rnn_ext.RNN, "rnn_relu": rnn_ext.RNN, "gru": rnn_ext.GRU, "lstm": rnn_ext.LSTM}[cell](5, 7)
    input = torch.randn(9, 3, 5, requires_grad=True)
    leaves = [input, *layer.parameters()]
    expected = torch.autograd.grad(layer(input)[0].square().sum(), leaves)
    layer.recompute = not changed
    output = layer(input)[0]
    loss = output.square().sum()
    if changed:
        output.mul_(2)
    context = torch.autocast("cpu", torch.bfloat16)
    if changed:  # the square, too, keeps what has been changed
        with context:
            found = torch.autograd.grad(output, leaves, torch.ones_like(output))
        fresh = layer(input)[0]
        expected = torch.autograd.grad(fresh * 2, leaves, torch.ones_like(fresh))
    else:
        with context:
            found = torch.autograd.grad(loss, leaves)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_second_backward_is_refused(recompute):
    problem = build(Case()).requiring()
    output = run(problem, recompute)["output"]
    output.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        output.sum().backward()
