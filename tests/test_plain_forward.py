"""The short way from a module to its op (csrc/ops/plain_forward.h): taken where nothing is special, and only there."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode

import rnn_ext
from rnn_ext import functional, ops

FUNCTIONS = {
    "RNN_TANH": functional.rnn_tanh,
    "RNN_RELU": functional.rnn_relu,
    "GRU": functional.gru,
    "LSTM": functional.lstm,
}


def make(mode="LSTM", **options):
    torch.manual_seed(0)
    if mode.startswith("RNN"):
        return rnn_ext.RNN(5, 7, nonlinearity=mode[4:].lower(), **options)
    return getattr(rnn_ext, mode)(5, 7, **options)


def flat(results):
    output, state, *cells = results
    return [output, *(state if isinstance(state, tuple) else [state]), *cells]


def short(module, input, hx=None, resets=None, return_cell_states=False):
    return ops.plain_forward(vars(module), input, hx, resets, return_cell_states)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"bias": False, "bidirectional": True}, {"num_layers": 3, "batch_first": True}]
)
@pytest.mark.parametrize("mode", FUNCTIONS)
def test_plain_calls_take_it(mode, options, given):
    """With the bits, and the gradients, of the long way."""
    module, input = make(mode, **options), torch.randn(4, 3, 5)
    batch = 4 if module.batch_first else 3
    hx = None
    if given:
        states = module.num_layers * (2 if module.bidirectional else 1)
        hx = torch.randn(2, states, batch, 7, requires_grad=True)
        hx = tuple(hx) if mode == "LSTM" else hx[0]
    arguments = {k: v for k, v in options.items() if k != "bias"}
    expected = flat(FUNCTIONS[mode](input, hx, list(module.parameters()), **arguments))
    found = short(module, input, hx)
    assert found is not None and (len(found[1]) == 2 if mode == "LSTM" else torch.is_tensor(found[1]))
    for a, b in zip(flat(found), expected, strict=True):
        assert torch.equal(a, b)
    for results in (flat(found), flat(module(input, hx))):
        grads = torch.autograd.grad(results[0].sum(), list(module.parameters()))
        wanted = torch.autograd.grad(expected[0].sum(), list(module.parameters()), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))


@pytest.mark.parametrize(
    "options", [{}, {"bias": False, "bidirectional": True}, {"num_layers": 3, "batch_first": True}], ids=str
)
@pytest.mark.parametrize(("mode", "return_cell_states"), [*((mode, False) for mode in FUNCTIONS), ("LSTM", True)])
def test_so_do_resets_and_cell_states(mode, return_cell_states, options):
    module, input = make(mode, **options), torch.randn(4, 3, 5, requires_grad=True)
    resets = torch.tensor([[0, 0, 1], [0, 1, 0], [0, 1, 0], [1, 0, 0]]).bool()
    arguments = {k: v for k, v in options.items() if k != "bias"}
    extra = {"return_cell_states": True} if return_cell_states else {}
    parameters = list(module.parameters())
    for given in (resets, None) if return_cell_states else (resets,):
        expected = FUNCTIONS[mode](input, None, parameters, resets=given, **extra, **arguments)
        found = short(module, input, None, given, return_cell_states)
        assert found is not None
        for results in (found, module(input, resets=given, **extra)):
            assert len(results) == 2 + return_cell_states
            for a, b in zip(flat(results), flat(expected), strict=True):
                assert torch.equal(a, b)
            for i in {0, -return_cell_states}:
                a, b = results[i], expected[i]
                grads, wanted = (torch.autograd.grad(t.sum(), [input, *parameters], retain_graph=True) for t in (a, b))
                assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str)
@pytest.mark.parametrize("mode", FUNCTIONS)
def test_so_do_layers_of_8_bits(mode, options):
    module, input = rnn_ext.quantize(make(mode, **options)), torch.randn(4, 3, 5)
    resets = torch.rand(4, 3) < 0.4
    for given in (None, resets):
        for cells in (False, True) if mode == "LSTM" else (False,):
            expected = [t for t in module._run(input, None, None, None, given, cells) if t is not None]
            found = ops.quantized_forward(vars(module), input, None, given, cells)
            assert found is not None
            for a, b in zip(flat(found), expected, strict=True):
                assert torch.equal(a, b)
    assert ops.quantized_forward(vars(module), input, None, resets.int(), False) is None
    assert ops.quantized_forward(vars(module), input, None, None, 1) is None


def test_other_resets_take_the_long_way():
    module, input, resets = make(), torch.randn(4, 3, 5), torch.zeros(4, 3, dtype=torch.bool)
    assert short(module, input, None, resets) is not None
    for other in (
        resets.int(),
        resets.tolist(),
        resets[:3],
        resets.T,
        resets[..., None],
        resets.to_sparse(),
        resets.to("meta"),
        resets.as_subclass(Subclass),
        False,
    ):
        assert short(module, input, None, other) is None, other
    assert short(module, input, None, resets, 1) is None
    assert short(make("GRU"), input, None, None, True) is None
    for other, error, message in (
        (resets.int(), TypeError, "bool"),
        (resets.tolist(), TypeError, "list"),
        (resets.T, ValueError, r"\[4, 3\].*\[3, 4\]"),
    ):
        with pytest.raises(error, match=message):
            module(input, resets=other)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": False, "batch_first": True}, {"num_layers": 3}], ids=str)
@pytest.mark.parametrize("mode", FUNCTIONS)
def test_so_do_plain_steps(mode, options, given):
    """Of a batch without a dimension of time; with the bits, and the gradients, of a sequence of one timestep."""
    module, input = make(mode, **options), torch.randn(3, 5, requires_grad=True)
    hx = None
    if given:
        hx = torch.randn(2, module.num_layers, 3, 7, requires_grad=True)
        hx = tuple(hx) if mode == "LSTM" else hx[0]
    arguments = {k: v for k, v in options.items() if k == "num_layers"}
    output, state = FUNCTIONS[mode](input.unsqueeze(0), hx, list(module.parameters()), **arguments)
    expected = flat((output.squeeze(0), state))
    wanted = torch.autograd.grad(expected[0].sum(), [input, *module.parameters()])
    direct = ops.plain_step(vars(module), input, hx)
    assert direct is not None
    for results in (direct, module.step(input, hx)):
        for a, b in zip(flat(results), expected, strict=True):
            assert torch.equal(a, b)
        grads = torch.autograd.grad(results[0].sum(), [input, *module.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))


def test_other_steps_take_the_long_way():
    module, input = make(), torch.randn(3, 5)

    def step(module, input, hx=None):
        return ops.plain_step(vars(module), input, hx)

    assert step(module, input) is not None
    assert step(module, input[0]) is None and step(module, input[None]) is None
    assert step(make(bidirectional=True), input) is None and step(make(layer_norm=True), input) is None
    assert step(make(num_layers=2, dropout=0.5), input) is None
    assert step(module, input.as_subclass(Subclass)) is None
    with torch.autocast("cpu"):
        assert step(module, input) is None
        assert module.step(input)[0].dtype == torch.float32
    for wrong in ((input[:, :4], None), (input, (torch.zeros(1, 2, 7), torch.zeros(1, 3, 7)))):
        with pytest.raises(RuntimeError) as found:
            module.step(*wrong)
        with pytest.raises(RuntimeError) as expected:
            functional.step("lstm", wrong[0], *(wrong[1] or (None, None)), module._flat_weights, 1, 0.0, True, "auto")
        assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", FUNCTIONS)
def test_so_do_cells(mode, bias, given):
    torch.manual_seed(0)
    kind = "RNNCell" if mode.startswith("RNN") else f"{mode}Cell"
    options = {"nonlinearity": mode[4:].lower()} if kind == "RNNCell" else {}
    cell, input = getattr(rnn_ext, kind)(5, 7, bias, **options), torch.randn(3, 5, requires_grad=True)
    hx = torch.randn(2, 3, 7, requires_grad=True).unbind() if given else (None, None)
    results = ops.cell(input, hx[0], hx[1] if mode == "LSTM" else None, list(cell.parameters()), mode.lower())
    expected = [state for state in results if state is not None]
    wanted = torch.autograd.grad(expected[0].sum(), [input, *cell.parameters()])
    state = None if not given else hx if mode == "LSTM" else hx[0]
    direct = ops.plain_cell(vars(cell), mode, input, state)
    assert direct is not None
    for found in (direct, cell(input, state)):
        found = list(found) if mode == "LSTM" else [found]
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
        grads = torch.autograd.grad(found[0].sum(), [input, *cell.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))


def test_other_calls_of_cells_take_the_long_way():
    cell, input, state = rnn_ext.LSTMCell(5, 7), torch.randn(3, 5), torch.zeros(3, 7)

    def short_cell(cell, input, hx=None):
        return ops.plain_cell(vars(cell), cell.mode, input, hx)

    assert short_cell(cell, input, (state, state)) is not None
    for other in (input[0], input[None], input.to("meta"), input.double(), input.as_subclass(Subclass), None, [1.0]):
        assert short_cell(cell, other) is None, other
    for hx in (state, [state, state], (state,), (state[0], state[0]), (state, None)):
        assert short_cell(cell, input, hx) is None, hx
    with torch.autocast("cpu"):
        assert short_cell(cell, input) is None
        assert cell(input)[0].dtype == torch.float32
    with Mode():
        assert short_cell(cell, input) is None
    assert short_cell(rnn_ext.LSTMCell(5, 7, backend="native"), input) is None
    assert short_cell(parametrizations.weight_norm(rnn_ext.LSTMCell(5, 7), "weight_hh"), input) is None
    assert ops.plain_cell(vars(cell), "RNN_SIGMOID", input, None) is None
    with pytest.raises(RuntimeError, match=r"h_0.*\[3, 7\].*\[2, 7\]"):
        cell(input, (state[:2], state[:2]))

    class Halved(rnn_ext.GRUCell):
        @property
        def weight_hh(self):
            return self.half

        @weight_hh.setter
        def weight_hh(self, value):
            self.half = nn.Parameter(value.detach() / 2)

    class Plain(rnn_ext.GRUCell):
        pass

    assert Plain._plain and rnn_ext.GRUCell._plain and not Halved._plain


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_of_any_dtype(dtype):
    assert short(make().to(dtype), torch.randn(4, 3, 5, dtype=dtype)) is not None


class Subclass(torch.Tensor):
    pass


class Mode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "change",
    [
        {"backend": "native"},
        {"backend": "cuda"},
        {"recompute": True},
        {"zoneout": 0.1},
        {"zoneout": (0.1, 0.2)},
        {"recurrent_dropout": 0.1},
        {"weight_dropout": 0.1},
    ],
    ids=str,
)
def test_options_take_the_long_way(change):
    module, input = make(), torch.randn(4, 3, 5)
    for name, value in change.items():
        setattr(module, name, value)
    assert short(module, input) is None


def test_as_do_layers_with_more():
    input = torch.randn(4, 3, 5)
    assert short(make(layer_norm=True), input) is None
    dropped = make(num_layers=2, dropout=0.5)
    assert short(dropped, input) is None
    assert short(dropped.eval(), input) is not None
    assert short(parametrizations.weight_norm(make(), "weight_hh_l0"), input) is None
    assert short(nn.LSTM(5, 7), input) is None


def test_as_do_other_arguments():
    module, input = make(), torch.randn(4, 3, 5)
    state = torch.randn(1, 3, 7)
    packed = nn.utils.rnn.pack_padded_sequence(input, [4, 3, 1])
    for other in (input[0], packed, input.double(), input.to("meta"), input.as_subclass(Subclass), None, [1.0]):
        assert short(module, other) is None, other
    for hx in (
        state,
        [state, state],
        (state,),
        (state[0], state[0]),
        (state, None),
        (state, state.as_subclass(Subclass)),
    ):
        assert short(module, input, hx) is None, hx
    assert short(module, input, (state, state)) is not None
    with Mode():
        assert short(module, input) is None


def test_mistakes_are_those_of_the_long_way():
    module, input = make(), torch.randn(4, 3, 5)
    for wrong in ((input[..., :4], None), (input, (torch.zeros(1, 2, 7), torch.zeros(1, 3, 7)))):
        with pytest.raises(RuntimeError) as found:
            module(*wrong)
        with pytest.raises(RuntimeError) as expected:
            functional.lstm(*wrong, list(module.parameters()))
        assert str(found.value) == str(expected.value)


def test_weights_are_looked_up_anew():
    module, input = make("GRU"), torch.randn(4, 3, 5)
    before = module(input)[0]
    module.weight_hh_l0 = nn.Parameter(2 * module.weight_hh_l0.detach())
    after = module(input)[0]
    assert not torch.equal(before, after)
    other = {name: torch.zeros_like(value) for name, value in module.named_parameters()}
    assert (torch.func.functional_call(module, other, (input,))[0] == 0).all()
    assert torch.equal(module(input)[0], after)


def test_subclasses_that_mean_something_else_take_the_long_way():
    class Zeros(rnn_ext.GRU):
        @property
        def _flat_weights(self):
            return [torch.zeros_like(parameter) for parameter in self.parameters()]

        @_flat_weights.setter
        def _flat_weights(self, weights):
            pass

    class BatchFirst(rnn_ext.GRU):
        @property
        def batch_first(self):
            return True

        @batch_first.setter
        def batch_first(self, value):
            pass

    class Heir(BatchFirst):
        pass

    class Plain(rnn_ext.GRU):
        pass

    input = torch.randn(4, 3, 5)
    assert (Zeros(5, 7)(input)[0] == 0).all()
    for kind in (BatchFirst, Heir):
        module = kind(5, 7)
        assert module(input)[1].shape == (1, 4, 7)
        assert short(module, input) is None
    assert Plain._plain and not Zeros._plain and not Heir._plain and rnn_ext.GRU._plain


class Odd:
    """An attribute that cannot say whether it is true."""

    def __bool__(self):
        raise ValueError("neither")

    def __gt__(self, other):
        return False


@pytest.mark.parametrize("name", ["dropout", "zoneout", "bidirectional", "batch_first", "recompute"])
def test_odd_attributes_take_the_long_way(name):
    module, input = make(num_layers=2), torch.randn(4, 3, 5)
    vars(module)[name] = Odd()
    assert short(module, input) is None
    del vars(module)[name]
    assert short(module, input) is None


def test_odd_values_take_the_long_way():
    module, input = rnn_ext.LSTM(5, 7, dtype=torch.complex64), torch.randn(4, 3, 5, dtype=torch.complex64)
    assert short(module, input) is None
    module, input = make(), torch.randn(4, 3, 5)
    vars(module)["num_layers"] = 2**70
    assert short(module, input) is None
    module = make(num_layers=2, dropout=0.5)
    vars(module)["training"] = 1
    assert short(module, input) is None
