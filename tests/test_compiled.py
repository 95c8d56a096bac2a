"""torch.compile, traces and scripts of modules."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch._dynamo.testing
from test_module_tools import flatten_all
from test_modules import OURS, H, I, flatten, initial, ours, randn
from torch import Tensor, nn
from torch.fx.proxy import TraceError
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence
from torch.utils._pytree import tree_map
from util import CELLS, check_gradients, check_values

import rnn_ext


@pytest.mark.parametrize("cell", CELLS)
def test_fx_trace(cell):
    """One node of a traced model, as torch.nn's own."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = ours(cell, batch_first=True)
            self.fc = nn.Linear(H, 2, dtype=torch.float64)

        def forward(self, x):
            output, _ = self.rnn(x)
            return self.fc(output[:, -1])

    model = Model()
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["rnn", "fc"]
    for length in (5, 9):
        assert torch.equal(traced(randn(3, length, I)), model(randn(3, length, I)))

    class Stateful(Model):
        def forward(self, x, hx, lengths, resets):
            return self.rnn(x, hx, lengths=lengths, resets=resets)[0]

    given = (randn(3, 5, I), initial(cell, 1, 3), torch.tensor([2, 5, 0]), torch.eye(3, 5, dtype=torch.bool))
    model = Stateful()
    assert torch.equal(torch.fx.symbolic_trace(model)(*given), model(*given))
    if cell == "lstm":

        class Cells(Model):
            def forward(self, x):
                return self.rnn(x, return_cell_states=True)[2]

        assert torch.equal(torch.fx.symbolic_trace(Cells())(given[0]), Cells()(given[0]))

    class Learned(Model):  # only the state is an input of the graph
        def forward(self, hx):
            return self.rnn(torch.ones(3, 5, I, dtype=torch.float64), hx)[0]

    model = Learned()
    assert torch.equal(torch.fx.symbolic_trace(model)(given[1]), model(given[1]))


@pytest.mark.parametrize("layer", [*OURS.values(), rnn_ext.RNNCell, rnn_ext.GRUCell, rnn_ext.LSTMCell])
def test_fx_trace_leaves_hooks_to_the_node(layer):
    """They run once, when the traced model runs; they may do what a trace could not follow."""

    def double(module, args):
        assert args[0].abs().max() > 0
        return (args[0] * 2,)

    def third(module, args, result):
        return result if result[0].isnan().any() else tree_map(lambda x: x / 3, result)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer(I, H, dtype=torch.float64)

        def forward(self, x):
            return self.layer(x)[0]

    model, input = Model(), randn(4, I) if issubclass(layer, nn.RNNCellBase) else randn(5, 3, I)
    model.layer.register_forward_pre_hook(double)
    model.layer.register_forward_hook(third)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(input), model(input))
    (node,) = (node for node in traced.graph.nodes if node.op == "call_module")
    assert node.meta["nn_module_stack"] == {"layer": ("layer", layer)}


def test_fx_trace_of_what_is_no_call():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = rnn_ext.GRU(I, H)

        def forward(self, x):
            return self.rnn.step(x)[0]

    with pytest.raises(TraceError, match=r"GRU\.step can be no node of a symbolic trace"):
        torch.fx.symbolic_trace(Model())
    with pytest.raises(TraceError, match=r"GRU\.forward can be no node"):
        torch.fx.symbolic_trace(rnn_ext.GRU(I, H))


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm"])
def test_compile(cell):
    """One graph for two lengths and batch sizes, and two more for nothing."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    module = ours(cell, num_layers=2, bidirectional=True)
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    for shape in ((5, 3), (8, 4), (6, 9)):
        module.zero_grad()
        input = randn(*shape, I).requires_grad_()
        expected = module(input)
        check_values(flatten(compiled(input)), flatten(expected))
        grads, expected_grads = (
            torch.autograd.grad(r[0].square().sum(), [input, module.weight_hh_l0]) for r in (compiled(input), expected)
        )
        for got, want in zip(grads, expected_grads, strict=True):
            check_gradients({"": got}, {"": want})
    assert counter.frame_count <= 2


def test_compile_packed():
    """A PackedSequence in and out of one graph, with other lengths and batch sizes each time."""
    torch._dynamo.reset()
    module = ours("lstm", num_layers=2, bidirectional=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for lengths in ([5, 3, 3, 1], [2, 7, 4]):
        given = pack_sequence([randn(n, I, seed=n) for n in lengths], enforce_sorted=False)
        results, expected = compiled(given), module(given)
        check_values(flatten(results), flatten(expected))
        parameters = list(module.parameters())
        grads, expected_grads = (torch.autograd.grad(r[0].data.square().sum(), parameters) for r in (results, expected))
        for got, want in zip(grads, expected_grads, strict=True):
            check_gradients({"": got}, {"": want})


def test_output_changed_in_place_of_a_compiled_layer():
    torch._dynamo.reset()
    module, input = ours("lstm"), randn(5, 3, I)
    compiled = torch.compile(lambda x: module(x)[0].mul_(2), backend="aot_eager", fullgraph=True)
    check_values({"": compiled(input)}, {"": 2 * module(input)[0]})
    grads = [
        torch.autograd.grad(f(input).square().sum(), module.weight_hh_l0)[0]
        for f in (compiled, lambda x: 2 * module(x)[0])
    ]
    check_gradients({"": grads[0]}, {"": grads[1]})


@pytest.mark.parametrize("spelling", [list, tuple])
def test_compile_with_listed_lengths(spelling):
    torch._dynamo.reset()
    module = ours("gru")
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for lengths in ([1, 5], [2, 3], [4, 4], [0, 2]):
        input = randn(5, 2, I)
        check_values(flatten(compiled(input, lengths=spelling(lengths))), flatten(module(input, lengths=lengths)))


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"])
def test_jit_trace(name):
    """A trace can hold torch's own operators only, so these are what runs: by "auto", not by "custom"."""
    module = getattr(rnn_ext, name)(I, H)
    lead = () if name.endswith("Cell") else (5,)
    inputs = torch.randn(*lead, 3, I)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (DeprecationWarning, torch.jit.TracerWarning))
        traced = torch.jit.trace(module, inputs)
        again = torch.randn(*(2 * n for n in lead), 7, I)
        for found, expected in zip(flatten_all(traced(again)), flatten_all(module(again)), strict=True):
            torch.testing.assert_close(found, expected)
        module.backend = "custom"
        with pytest.raises(RuntimeError, match=r"torch.jit.trace records torch's own operators only"):
            torch.jit.trace(module, inputs)


class OfLengths(nn.Module):
    """A model that packs its batch, or leaves that to the layer."""

    def __init__(self, layer: nn.Module, how: str):
        super().__init__()
        self.layer, self.how = layer, how

    def forward(self, input: Tensor, lengths: Tensor) -> list[Tensor]:
        if self.how == "lengths":
            return flatten_all(self.layer(input, lengths=lengths))
        packed = pack_padded_sequence(input, lengths, enforce_sorted=self.how == "sorted")
        output, state = self.layer(packed)
        return flatten_all([output.data, state])


@pytest.mark.parametrize("how", ["sorted", "unsorted", "lengths"])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_jit_trace_of_lengths(name, how):
    """A trace of three sequences takes one, and five."""
    for stack in ({}, {"num_layers": 2, "bidirectional": True}):
        model = OfLengths(getattr(rnn_ext, name)(I, H, **stack), how)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", (DeprecationWarning, torch.jit.TracerWarning))
            traced = torch.jit.trace(model, (torch.randn(5, 3, I), torch.tensor([5, 2, 1])), check_trace=False)
        for lengths in ([5], [5, 4, 4, 1, 1]):
            input = torch.randn(5, len(lengths), I)
            for found, expected in zip(*(m(input, torch.tensor(lengths)) for m in (traced, model)), strict=True):
                torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"])
def test_jit_script(name):
    """torch.jit.script is told to take torch.nn's layers, and leaves the model alone."""
    layer = getattr(rnn_ext, name)(I, H)
    input = torch.randn(3, I) if name.endswith("Cell") else torch.randn(5, 3, I)
    model = nn.Sequential(layer)
    with pytest.raises(RuntimeError, match=rf"rnn_ext\.{name}: script rnn_ext\.to_native\(copy\.deepcopy\(model\)\)"):
        torch.jit.script(model)
    scripted = torch.jit.script(rnn_ext.to_native(copy.deepcopy(model)))
    assert type(model[0]) is getattr(rnn_ext, name)
    torch.testing.assert_close(scripted(input), model(input))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_compiled_autograd(name, recompute):
    """An eager forward whose backward is compiled."""
    layer = getattr(rnn_ext, name)(I, H, bidirectional=True, recompute=recompute, dtype=torch.float64)
    input = randn(5, 3, I).requires_grad_()
    weights = list(layer.parameters())
    leaves = [input, *weights]
    for lengths in (None, [5, 2, 0]):
        expected = torch.autograd.grad(layer(input, lengths=lengths)[0].square().sum(), leaves)
        for leaf in leaves:
            leaf.grad = None
        torch._dynamo.reset()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            layer(input, lengths=lengths)[0].square().sum().backward()
        for leaf, want in zip(leaves, expected, strict=True):
            torch.testing.assert_close(leaf.grad, want)


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_compiled_recurrent_dropout_of_packed_sequences(name):
    """In one graph, without a state that would tell how many there are."""
    layer = getattr(rnn_ext, name)(I, H, recurrent_dropout=0.5)
    packed = nn.utils.rnn.pack_sequence([torch.randn(4, I), torch.randn(2, I)])
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.manual_seed(3)
    expected = layer(packed)[0].data
    torch.manual_seed(3)
    torch.testing.assert_close(compiled(packed)[0].data, expected)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_compiled_autograd_of_a_derivative(name, bidirectional):
    """The backward of what an eager backward has recorded."""
    layer = getattr(rnn_ext, name)(I, H, bidirectional=bidirectional, dtype=torch.float64)
    input = randn(5, 3, I).requires_grad_()
    leaves = [input, *layer.parameters()]

    def penalty(lengths):
        loss = layer(input, lengths=lengths)[0].sin().sum()
        (grad,) = torch.autograd.grad(loss, input, create_graph=True)
        return grad.square().sum()

    for lengths in (None, [5, 2, 0]):
        expected = torch.autograd.grad(penalty(lengths), leaves)
        for leaf in leaves:
            leaf.grad = None
        torch._dynamo.reset()
        loss = penalty(lengths)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()
        for leaf, want in zip(leaves, expected, strict=True):
            torch.testing.assert_close(leaf.grad, want)


def test_symbolic_trace_of_a_keyword():
    class Model(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(input=x)[0]

    class CallsForward(Model):
        def forward(self, x):
            return self.layer.forward(x)

    model, x = Model(rnn_ext.GRU(I, H)), torch.randn(5, 2, I)
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes if node.target == "layer"] == ["call_module"]
    assert torch.equal(traced(x), model(x))
    with pytest.raises(TraceError, match=r"GRUCell\.forward can be no node"):
        torch.fx.symbolic_trace(CallsForward(rnn_ext.GRUCell(I, H)))


def made_of(what: str) -> list[tuple[nn.Module, torch.Tensor]]:
    double = {"dtype": torch.float64}
    layers = {
        "data": [rnn_ext.LSTM(4, 4, **double)] * 2,
        "cell": [rnn_ext.RNN(4, 4, nonlinearity=name, **double) for name in ("tanh", "relu")],
        "batch_first": [rnn_ext.LSTM(4, 4, batch_first=first, **double) for first in (False, True)],
    }
    return [(layer, torch.randn(5, 5, 4, requires_grad=True, **double)) for layer in layers[what]]


@pytest.mark.parametrize("what", ["data", "cell", "batch_first"])
def test_compiled_autograd_tells_calls_apart(what):
    """Without a reset in between: what one graph was compiled for is not taken for another call's."""
    torch._dynamo.reset()
    calls = made_of(what)
    expected = [torch.autograd.grad(m(x)[0].square().sum(), [x, *m.parameters()]) for m, x in calls]
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        for (layer, input), grads in zip(calls, expected, strict=True):
            leaves = [input, *layer.parameters()]
            for leaf in leaves:
                leaf.grad = None
            layer(input)[0].square().sum().backward()
            for leaf, grad in zip(leaves, grads, strict=True):
                torch.testing.assert_close(leaf.grad, grad)


def test_why_a_recorded_call_is_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = rnn_ext.GRU(4, 5)

        def forward(self, input):
            return self.rnn(input, resets=torch.zeros(6, 3, dtype=torch.bool))[0]

    with pytest.raises(ValueError, match=r"resets is an option of the custom .*: torch\.jit\.trace records"):
        torch.jit.trace(Model(), torch.randn(6, 3, 4))
