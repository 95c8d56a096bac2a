"""The short way from a module to its op (csrc/ops/plain_forward.h): taken where nothing is special, and only there."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.overrides import TorchFunctionMode

import rnn_ext
from rnn_ext import functional, ops

LAYERS = [{}, {"bias": False, "bidirectional": True}, {"num_layers": 3, "batch_first": True}]
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


def short(module, input, hx=None, resets=None, return_cell_states=False, lengths=None):
    return ops.plain_forward(vars(module), input, hx, lengths, resets, return_cell_states)


def same(found, expected, wrt=()):
    """The results, of which packed ones have their order, and the gradients of each, bit for bit."""
    for a, b in zip(flat(found), flat(expected), strict=True):
        assert type(a) is type(b)
        if isinstance(a, PackedSequence):
            assert a.batch_sizes is b.batch_sizes and a.sorted_indices is b.sorted_indices
            assert a.unsorted_indices is b.unsorted_indices
            a, b = a.data, b.data
        assert torch.equal(a, b)
        if wrt:
            pair = (torch.autograd.grad(t.sum(), wrt, retain_graph=True, allow_unused=True) for t in (a, b))
            assert all(x is y or torch.equal(x, y) for x, y in zip(*pair, strict=True))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("options", LAYERS, ids=str)
@pytest.mark.parametrize("mode", FUNCTIONS)
def test_plain_calls_take_it(mode, options, given):
    """With the bits, and the gradients, of the long way."""
    module, input = make(mode, **options), torch.randn(4, 3, 5)
    batch = 4 if module.batch_first else 3
    hx = states_of(mode, module, batch) if given else None
    arguments = {k: v for k, v in options.items() if k != "bias"}
    expected = FUNCTIONS[mode](input, hx, list(module.parameters()), **arguments)
    found = short(module, input, hx)
    assert found is not None and (len(found[1]) == 2 if mode == "LSTM" else torch.is_tensor(found[1]))
    for results in (found, module(input, hx)):
        same(results, expected, list(module.parameters()))


@pytest.mark.parametrize("options", LAYERS, ids=str)
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
            same(results, expected, [input, *parameters])


def states_of(mode, module, *batch):
    states = module.num_layers * (2 if module.bidirectional else 1)
    hx = torch.randn(2, states, *batch, 7, requires_grad=True).unbind()
    return hx if mode == "LSTM" else hx[0]


@pytest.mark.parametrize("enforce_sorted", [False, True])
@pytest.mark.parametrize("options", LAYERS, ids=str)
@pytest.mark.parametrize(("mode", "return_cell_states"), [*((mode, False) for mode in FUNCTIONS), ("LSTM", True)])
def test_so_do_packed_sequences(mode, return_cell_states, options, enforce_sorted):
    module, input = make(mode, **options), torch.randn(4, 3, 5, requires_grad=True)
    packed = pack_padded_sequence(input, [4, 3, 1] if enforce_sorted else [1, 4, 3], enforce_sorted=enforce_sorted)
    arguments = {k: v for k, v in options.items() if k != "bias"}
    extra = {"return_cell_states": True} if return_cell_states else {}
    for hx in (None, states_of(mode, module, 3)):
        expected = FUNCTIONS[mode](packed, hx, list(module.parameters()), **extra, **arguments)
        direct = short(module, packed, hx, None, return_cell_states)
        assert direct is not None
        for results in (direct, module(packed, hx, **extra)):
            same(results, expected, [input, *module.parameters(), *(() if hx is None else flat((input, hx))[1:])])


@pytest.mark.parametrize("options", LAYERS, ids=str)
@pytest.mark.parametrize("mode", FUNCTIONS)
def test_so_do_lengths(mode, options):
    module, input = make(mode, **options), torch.randn(4, 3, 5, requires_grad=True)
    values = [0, 3, 1, 2] if module.batch_first else [0, 4, 1]
    arguments = {k: v for k, v in options.items() if k != "bias"}
    lengths = torch.tensor(values)
    expected = FUNCTIONS[mode](input, None, list(module.parameters()), lengths=lengths, **arguments)
    for given in (lengths, lengths.int(), lengths.to(torch.uint8), lengths.repeat(2, 1).T[:, 0], values, tuple(values)):
        direct = short(module, input, lengths=given)
        assert direct is not None, given
        for results in (direct, module(input, lengths=given)):
            same(results, expected, [input, *module.parameters()])


def test_a_list_of_lengths_may_change_before_backward():
    module, input, lengths = make("GRU"), torch.randn(4, 2, 5, requires_grad=True), [4, 2]
    output, _ = short(module, input, lengths=lengths)
    lengths[:] = [1, 1]
    output.sum().backward()
    assert (input.grad.abs().sum(2) > 0).tolist() == [[True, True], [True, True], [True, False], [True, False]]


def test_other_lengths_take_the_long_way():
    module, input = make(), torch.randn(4, 3, 5)
    lengths = torch.tensor([4, 0, 1])
    assert short(module, input, lengths=lengths) is not None
    for other in (
        lengths[:2],
        lengths[:, None],
        lengths.float(),
        lengths.bool(),
        lengths.to("meta"),
        lengths.to_sparse(),
        lengths.as_subclass(Subclass),
        lengths.numpy(),
        list(lengths),
        range(3),
        [4, 0],
        [4, 0, -1],
        [4, 0, 5],
        [4, 0, 2**70],
        [4, 0, True],
        [4, 0, 1.0],
        4,
    ):
        assert short(module, input, lengths=other) is None, other
    for other, error, message in (
        (lengths[:2], ValueError, r"\(3,\).*\[2\]"),
        ([4, 0, 5], ValueError, "between 0 and 4, got 5 for batch entry 2"),
        (lengths + 1, ValueError, "between 0 and 4, got 5 for batch entry 0"),
        ([4, 0, 1.0], TypeError, "integers, got 1.0"),
    ):
        with pytest.raises(error, match=message):
            module(input, lengths=other)


def test_other_packed_sequences_take_the_long_way():
    class Packed(PackedSequence):
        pass

    module, state = make(), torch.zeros(1, 3, 7)
    packed = pack_padded_sequence(torch.randn(4, 3, 5), [1, 4, 3], enforce_sorted=False)
    data, sizes, order, inverse = packed
    assert short(module, packed) is not None and short(module, packed, (state, state)) is not None
    for other in (
        (data, sizes, order, inverse),
        Packed(data, sizes, order, inverse),
        PackedSequence(data.as_subclass(Subclass), sizes),
        PackedSequence(data.to("meta"), sizes),
        PackedSequence(data[None], sizes),
        PackedSequence(data, sizes[None]),
        PackedSequence(data, sizes, order[None], inverse),
        PackedSequence(data, sizes, None, inverse),
        tuple.__new__(PackedSequence, (data, sizes)),
    ):
        assert short(module, other) is None, other
    assert short(module, packed, (state[:, :2], state)) is None
    assert short(module, packed, lengths=[1, 4, 3]) is None
    assert short(module, packed, None, torch.zeros(4, 3, dtype=torch.bool)) is None
    with pytest.raises(ValueError, match="PackedSequence, which has its own lengths"):
        module(packed, lengths=[1, 4, 3])
    with pytest.raises(RuntimeError, match=r"3 sequences in dim 1, got \[1, 2, 7\]"):
        module(packed, (state[:, :2], state))


@pytest.mark.parametrize("options", LAYERS, ids=str)
@pytest.mark.parametrize("mode", FUNCTIONS)
def test_so_does_one_sequence(mode, options):
    module, input = make(mode, **options), torch.randn(4, 5, requires_grad=True)
    arguments = {k: v for k, v in options.items() if k != "bias"}
    more = {"resets": torch.tensor([0, 0, 1, 0]).bool(), "lengths": [3]}
    for hx in (None, states_of(mode, module)):
        for given in ({}, more):
            expected = FUNCTIONS[mode](input, hx, list(module.parameters()), **given, **arguments)
            direct = short(module, input, hx, **given)
            assert direct is not None
            for results in (direct, module(input, hx, **given)):
                same(results, expected, [input, *module.parameters()])
    assert short(module, input, lengths=[3, 3]) is None and short(module, input, lengths=[5]) is None
    for resets in (torch.zeros(4, 1), torch.zeros(3)):
        assert short(module, input, resets=resets.bool()) is None
    assert short(module, input, states_of(mode, module, 1)) is None


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str)
@pytest.mark.parametrize("mode", FUNCTIONS)
def test_so_do_layers_of_8_bits(mode, options):
    module, input = rnn_ext.quantize(make(mode, **options)), torch.randn(4, 3, 5)
    resets = torch.rand(4, 3) < 0.4
    packed = pack_padded_sequence(input, [1, 4, 3], enforce_sorted=False)
    lengths = [1, 4, 3] if not options else [3, 0, 1, 3]
    for given in (
        (input, None, None),
        (input, None, resets),
        (input, lengths, None),
        (input, lengths, resets),
        (packed, None, None),
        (input[0], [2], resets[:3, 0]),
    ):
        for cells in (False, True) if mode == "LSTM" else (False,):
            output, h_n, c_n, cell_states = module._run(given[0], None, None, *given[1:], cells)
            expected = (output, h_n if c_n is None else (h_n, c_n), *([cell_states] if cells else []))
            found = ops.quantized_forward(vars(module), given[0], None, *given[1:], cells)
            assert found is not None
            same(found, expected)
            keywords = {"return_cell_states": True} if cells else {}
            same(module(given[0], lengths=given[1], resets=given[2], **keywords), expected)
    assert ops.quantized_forward(vars(module), input, None, None, resets.int(), False) is None
    assert ops.quantized_forward(vars(module), input, None, None, None, 1) is None
    assert ops.quantized_forward(vars(module), packed, None, lengths, None, False) is None


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


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": False, "batch_first": True}, {"num_layers": 3}], ids=str)
@pytest.mark.parametrize("mode", FUNCTIONS)
def test_so_do_plain_steps(mode, options, given, batch):
    """Of input without a dimension of time; with the bits, and the gradients, of a sequence of one timestep."""
    module, input = make(mode, **options), torch.randn(*batch, 5, requires_grad=True)
    hx = states_of(mode, module, *batch) if given else None
    arguments = {k: v for k, v in options.items() if k == "num_layers"}
    output, state = FUNCTIONS[mode](input.unsqueeze(0), hx, list(module.parameters()), **arguments)
    expected = (output.squeeze(0), state)
    direct = ops.plain_step(vars(module), input, hx)
    assert direct is not None
    for results in (direct, module.step(input, hx)):
        same(results, expected, [input, *module.parameters()])


def test_other_steps_take_the_long_way():
    module, input = make(), torch.randn(3, 5)

    def step(module, input, hx=None):
        return ops.plain_step(vars(module), input, hx)

    assert step(module, input) is not None and step(module, input[0]) is not None
    assert step(module, input[0, 0]) is None and step(module, input[None]) is None
    assert step(module, pack_padded_sequence(input[None], [1, 1, 1])) is None
    assert step(make(bidirectional=True), input) is None and step(make(recurrent_dropout=0.1), input) is None
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


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", FUNCTIONS)
def test_so_do_cells(mode, bias, given, batch):
    torch.manual_seed(0)
    kind = "RNNCell" if mode.startswith("RNN") else f"{mode}Cell"
    options = {"nonlinearity": mode[4:].lower()} if kind == "RNNCell" else {}
    cell, input = getattr(rnn_ext, kind)(5, 7, bias, **options), torch.randn(*batch, 5, requires_grad=True)
    hx = torch.randn(2, *batch, 7, requires_grad=True).unbind() if given else (None, None)
    h, c = (None if state is None else state.view(-1, 7) for state in (hx[0], hx[1] if mode == "LSTM" else None))
    results = ops.cell(input.view(-1, 5), h, c, list(cell.parameters()), mode.lower())
    expected = [state.view(*batch, 7) for state in results if state is not None]
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
    assert short_cell(cell, input[0], (state[0], state[0])) is not None
    for other in (input[0, 0], input[None], input.to("meta"), input.double(), input.as_subclass(Subclass), None, [1.0]):
        assert short_cell(cell, other) is None, other
    for hx in (state, [state, state], (state,), (state[0], state[0]), (state, None)):
        assert short_cell(cell, input, hx) is None, hx
    assert short_cell(cell, input[0], (state, state)) is None
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


@pytest.fixture
def by_the_long_way(monkeypatch):
    """Calls a function without the short way."""

    def call(function, *args, **kwargs):
        with monkeypatch.context() as patch:
            for name in ("plain_forward", "plain_step"):
                patch.setattr(ops, name, lambda *_: None)
            return function(*args, **kwargs)

    return call


OPTIONS = [
    {},
    {"recompute": True},
    {"zoneout": 0.3},
    {"zoneout": (0.3, 0.1)},
    {"zoneout": (0, 0.3)},
    {"recurrent_dropout": 0.3},
    {"weight_dropout": 0.3},
    {"recompute": True, "zoneout": 0.2, "recurrent_dropout": 0.3, "weight_dropout": 0.4},
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "layers",
    [{}, {"num_layers": 3, "dropout": 0.4}]
    + [{"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": p} for p in (0, 0.4, 1)],
    ids=str,
)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("mode", FUNCTIONS)
def test_so_do_options(mode, options, layers, training, by_the_long_way):
    """With the masks that the long way draws of the same seed."""
    if mode != "LSTM" and isinstance(options.get("zoneout"), tuple):
        options = {"zoneout": 0.25}
    projected = [{}, {"proj_size": 3}, {"layer_norm": True}] if mode == "LSTM" else [{}]
    for more in projected:
        module, input = make(mode, **options, **layers, **more).train(training), torch.randn(4, 3, 5)
        batch = 4 if module.batch_first else 3
        hx = states_of(mode, module, batch)
        if "proj_size" in more:
            hx = (hx[0][..., :3].contiguous(), hx[1])
        packed = pack_padded_sequence(input, [1, 4, 3], enforce_sorted=False)
        calls = [(input, None, {}), (input, hx, {"lengths": [3, 0, 1, 2][:batch]}), (input[0], None, {})]
        if not (training and "recurrent_dropout" in options):
            calls.append((packed, None, {}))
        for given, state, arguments in calls:
            torch.manual_seed(1)
            found = short(module, given, state, **arguments)
            assert found is not None
            torch.manual_seed(1)
            expected = by_the_long_way(module, given, state, **arguments)
            wrt = [*module.parameters(), *(flat((given, state))[1:] if state is not None else ())]
            same(found, expected, wrt)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{"dropout": 0.4}, *OPTIONS], ids=str)
def test_steps_with_options(options, training, by_the_long_way):
    module, input = make(num_layers=2, **options).train(training), torch.randn(3, 5)
    if training and ("recurrent_dropout" in options or "weight_dropout" in options):
        assert ops.plain_step(vars(module), input, None) is None
        with pytest.raises(ValueError, match="one mask for a whole sequence"):
            module.step(input)
        return
    for given in (input, input[0]):
        torch.manual_seed(1)
        found = ops.plain_step(vars(module), given, None)
        torch.manual_seed(1)
        same(found, by_the_long_way(module.step, given), list(module.parameters()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_masks_are_as_wide_as_the_input(dtype, by_the_long_way):
    module, input = make(zoneout=0.3, recurrent_dropout=0.3, weight_dropout=0.3).to(dtype), torch.randn(4, 3, 5)
    torch.manual_seed(1)
    found = short(module, input.to(dtype))
    torch.manual_seed(1)
    same(found, by_the_long_way(module, input.to(dtype)), list(module.parameters()))


@pytest.mark.parametrize(
    "change",
    [
        {"backend": "native"},
        {"backend": "cuda"},
        {"recompute": 1},
        {"recompute": None},
        {"zoneout": True},
        {"zoneout": 1.0},
        {"zoneout": [0.1, 0.2]},
        {"zoneout": (0.1, 0.2, 0.3)},
        {"zoneout": (0.1, -0.2)},
        {"zoneout": float("nan")},
        {"recurrent_dropout": "0.1"},
        {"weight_dropout": 10**400},
    ],
    ids=lambda change: str(change)[:40],
)
def test_other_options_take_the_long_way(change):
    module, input = make(), torch.randn(4, 3, 5)
    for name, value in change.items():
        setattr(module, name, value)
    assert short(module, input) is None


def test_options_that_need_more_take_the_long_way():
    input, lengths = torch.randn(4, 3, 5), torch.tensor([4, 3, 1])
    packed = pack_padded_sequence(input, lengths)
    assert short(make(recurrent_dropout=0.1), input) is not None
    assert short(make(recurrent_dropout=0.1), packed) is None
    assert short(make("GRU", zoneout=0.1), input) is not None
    pair = make("GRU")
    pair.zoneout = (0.1, 0.2)
    assert short(pair, input) is None
    assert short(make(num_layers=2, recompute=True), input) is not None
    dropped = make(num_layers=2, dropout=1)
    assert short(dropped, input) is not None
    for wrong in (1.5, -0.1, "0.5", None, True):
        dropped.dropout = wrong
        assert short(dropped, input) is None
    wrong = (torch.zeros(2, 2, 7), torch.zeros(2, 2, 7))
    assert short(make(num_layers=2, recompute=True), input, wrong) is None
    with pytest.raises(RuntimeError, match=r"h_0 of size \[2, 3, 7\], got \[2, 2, 7\]"):
        make(num_layers=2, recompute=True)(input, wrong)


@pytest.mark.parametrize(
    "change", [{"recurrent_dropout": 0.1}, {"weight_dropout": 0.1}, {"weight_dropout": 0.0}], ids=str
)
def test_but_not_those_for_training_in_eval(change):
    module, input = make(**change).eval(), torch.randn(4, 3, 5)
    same(short(module, input), make().eval()(input))
    (name,) = change
    for wrong in (1.0, -0.5, 2, 10**400, "0.1", Odd()):
        setattr(module, name, wrong)
        assert short(module, input) is None, wrong
    setattr(module, name, 1.5)
    with pytest.raises(ValueError, match=rf"{name}.*1.5"):
        module(input)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_layer_normalisation_takes_it(options):
    module, input = make(layer_norm=True, **options), torch.randn(4, 3, 5)
    expected = functional.lstm(input, None, list(module._flat_weights), **options)
    for results in (short(module, input), module(input)):
        same(results, expected, list(module.parameters()))
    module.backend = "native"
    with pytest.raises(ValueError, match="layer_norm is an option of the custom backend"):
        module(input)


def test_as_do_layers_with_more():
    input = torch.randn(4, 3, 5)
    assert short(parametrizations.weight_norm(make(), "weight_hh_l0"), input) is None
    assert short(nn.LSTM(5, 7), input) is None


def test_as_do_other_arguments():
    module, input = make(), torch.randn(4, 3, 5)
    state = torch.randn(1, 3, 7)
    for other in (input[0, 0], input[None], input.double(), input.to("meta"), input.as_subclass(Subclass), None, [1.0]):
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
    assert short(module, input[:, 0], (state, state)) is None
    with Mode():
        assert short(module, input) is None


def test_symbolic_sizes_take_the_long_way():
    """Which a tensor has that torch.func has wrapped around a fake one."""
    module, input = make(), torch.randn(2, 4, 3, 5)
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True) as mode:
        dynamic = [DimDynamic.DYNAMIC] * 4
        fake = mode.from_tensor(
            input, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic, constraint_sizes=[None] * 4)
        )

        def call(input):
            assert type(input) is torch.Tensor and short(module, input) is None
            assert short(module, input, lengths=[4, 0, 1]) is None
            return module(input)[0]

        assert torch.func.vmap(call)(fake).shape == (2, 4, 3, 7)


@pytest.mark.parametrize("lengths", [[4, 2, 1], (4, 2, 1), torch.tensor([4, 2, 1])], ids=str)
def test_dispatch_modes_see_lengths(lengths):
    """A tensor that the short way made of a list would be none of the mode's."""
    module, input = make(), torch.randn(4, 3, 5)
    expected = module(input, lengths=lengths)[0].shape

    def loss(weights, input):
        output = torch.func.functional_call(module, weights, (input,), {"lengths": given})[0]
        assert output.shape == expected
        return output.sum()

    with FakeTensorMode() as mode:
        given = mode.from_tensor(lengths) if isinstance(lengths, torch.Tensor) else lengths
        weights = {name: mode.from_tensor(value) for name, value in module.named_parameters()}
        fake = mode.from_tensor(input)
        of_weights, of_input = torch.func.grad(loss, (0, 1))(weights, fake)
    assert of_input.shape == input.shape
    assert {name: grad.shape for name, grad in of_weights.items()} == {
        name: value.shape for name, value in module.named_parameters()
    }


def test_mistakes_are_those_of_the_long_way():
    module, input = make(), torch.randn(4, 3, 5)
    for wrong in ((input[..., :4], None), (input, (torch.zeros(1, 2, 7), torch.zeros(1, 3, 7)))):
        with pytest.raises(RuntimeError) as found:
            module(*wrong)
        with pytest.raises(RuntimeError) as expected:
            functional.lstm(*wrong, list(module.parameters()))
        assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("layers", [1, 2])
def test_as_are_those_of_8_bits(layers, monkeypatch):
    module = rnn_ext.quantize(make(num_layers=layers, bidirectional=True, proj_size=3))
    input = torch.randn(4, 2, 5)

    def states(*sizes, dtype=torch.float32):
        return tuple(torch.zeros(size, dtype=dtype) for size in sizes)

    h, c = (2 * layers, 2, 3), (2 * layers, 2, 7)
    wrong = [(input.double(), None), (input.int(), None), (input[..., :4], None)]
    wrong += [(input, states(h, h)), (input, states(c, c)), (input, states(h, (2 * layers, 3, 7)))]
    wrong += [(input, states((2 * layers + 1, 2, 3), c)), (input, states(h, c, dtype=torch.int32))]
    for arguments in wrong:
        with pytest.raises(RuntimeError) as found:
            module(*arguments)
        with monkeypatch.context() as patch, pytest.raises(RuntimeError) as expected:
            patch.setattr(ops, "quantized_forward", lambda *given: None)
            module(*arguments)
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
    for training in (1, Odd()):
        vars(module)["training"] = training
        assert short(module, input) is None


def test_what_torch_would_read_of_freed_memory_is_refused():
    module, input = make(weight_dropout=0.5), torch.randn(4, 3, 5)
    packed = pack_padded_sequence(input, [1, 4, 3], enforce_sorted=False)
    freed = torch.zeros(1, 3, 7)
    freed.untyped_storage().resize_(0)
    lengths = torch.tensor([1, 4, 3], dtype=torch.int32)
    lengths.untyped_storage().resize_(0)
    for name, arguments in (
        ("h_0", {"hx": (freed, torch.zeros(1, 3, 7))}),
        ("c_0", {"hx": (torch.zeros(1, 3, 7), freed)}),
    ):
        with pytest.raises(RuntimeError, match=rf"{name} of size .* has no memory"):
            module(packed, **arguments)
    with pytest.raises(RuntimeError, match=r"lengths of size .* has no memory"):
        module(input, lengths=lengths)
    module.weight_hh_l0.data.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"weight_hh of size .* has no memory"):
        module(input)
