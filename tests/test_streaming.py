"""One timestep at a time: the cells beside torch.nn's, ``step``, and chunked calls beside one call."""

from __future__ import annotations

import copy
import functools
import random
import re
import sys

import pytest
import torch
import torch._dynamo.testing
from test_module_errors import caught, complain_alike
from test_modules import flatten, initial, ours, randn
from torch import nn
from torch.nn.utils import parametrizations
from util import CELLS, VALUE_TOLERANCE, check, check_gradients, check_values, projected

import rnn_ext
from rnn_ext import ops

NATIVE = {"rnn_tanh": nn.RNNCell, "rnn_relu": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}
OURS = {"rnn_tanh": rnn_ext.RNNCell, "rnn_relu": rnn_ext.RNNCell, "gru": rnn_ext.GRUCell, "lstm": rnn_ext.LSTMCell}
I, H, N = 4, 6, 3  # noqa: E741


def cells(cell: str, *sizes: int, backend: str = "custom", **extra) -> tuple[nn.Module, nn.Module]:
    options = {"dtype": torch.float64, **({"nonlinearity": "relu"} if cell == "rnn_relu" else {}), **extra}
    torch.manual_seed(3)
    first = OURS[cell](*(sizes or (I, H)), **options, backend=backend)
    torch.manual_seed(3)
    return first, NATIVE[cell](*(sizes or (I, H)), **options)


def given(cell: str, batch: int | None = N, sizes=(I, H), dtype=torch.float64):
    """input and hx."""
    lead = () if batch is None else (batch,)
    h, c = randn(*lead, sizes[1], seed=1, dtype=dtype), randn(*lead, sizes[1], seed=2, dtype=dtype)
    return randn(*lead, sizes[0], dtype=dtype), (h, c) if cell == "lstm" else h


def tensors(state) -> dict[str, torch.Tensor]:
    return dict(zip("hc", state if isinstance(state, tuple) else (state,), strict=False))


# --- cells --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["custom", "native"])
@pytest.mark.parametrize("cell", CELLS)
def test_cells_are_torch_nns(cell, backend):
    """Values, and gradients of each result alone; batched, unbatched, empty, without biases, without state."""
    variants = [(True, N, True), (False, N, True), (True, None, True), (True, 0, True), (True, 7, False)]
    for bias, batch, with_state in (*variants, (False, None, False)):
        modules = cells(cell, 7, 33, bias=bias, backend=backend)
        input, hx = given(cell, batch, (7, 33))
        found = []
        for module in modules:
            leaves = {"input": input.clone(), **tensors(hx)} if with_state else {"input": input.clone()}
            leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
            state = (leaves["h"], leaves["c"]) if "c" in leaves else leaves.get("h")
            results = tensors(module(leaves["input"], state))
            assert isinstance(module(leaves["input"], state), tuple) == (cell == "lstm")
            leaves |= dict(module.named_parameters())
            grads = {}
            for name, result in results.items():
                asked = torch.autograd.grad((result * randn(*result.shape, seed=9)).sum(), list(leaves.values()),
                                            retain_graph=True, allow_unused=True, materialize_grads=True)  # fmt: skip
                grads |= {f"{leaf} of {name}": g for leaf, g in zip(leaves, asked, strict=True)}
            found.append((results, grads))
        (results, grads), (expected, expected_grads) = found
        check_values(results, expected)
        check_gradients(grads, expected_grads)


@pytest.mark.parametrize("backend", ["auto", "native"])
@pytest.mark.parametrize("cell", CELLS)
def test_cells_without_units(cell, backend):
    """torch.nn's layers refuse them, its cells do not."""
    for sizes in ((5, 0), (0, 0)):
        for batch in (N, None, 0):
            input, hx = given(cell, batch, sizes)
            for module in cells(cell, *sizes, backend=backend):
                leaf = input.clone().requires_grad_()
                for state in (hx, None):
                    for result in tensors(module(leaf, state)).values():
                        assert result.shape == (*input.shape[:-1], 0)
                with torch.no_grad():
                    assert next(iter(tensors(module(input)).values())).shape == (*input.shape[:-1], 0)
                (grad,) = torch.autograd.grad(sum(t.sum() for t in tensors(module(leaf)).values()), leaf,
                                              allow_unused=True, materialize_grads=True)  # fmt: skip
                assert torch.equal(grad, torch.zeros_like(input))
    module = cells(cell, 5, 0, backend=backend)[0]
    input, hx = given(cell, N, (5, 0))
    assert rnn_ext.explain(module, input).backend == "native"
    module.backend = "custom"
    for call in (module, functools.partial(rnn_ext.explain, module)):
        with pytest.raises(RuntimeError, match=r"backend 'custom' cannot run weights of size \[0, 5\]"):
            call(input, hx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_cells_in_other_dtypes(cell, dtype):
    first, second = cells(cell, dtype=dtype)
    assert list(first.state_dict()) == list(second.state_dict())
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name  # the same initial values for the same seed
    input, hx = given(cell, dtype=dtype)
    double = tuple(t.double() for t in hx) if cell == "lstm" else hx.double()
    expected = tensors(copy.deepcopy(second).double()(input.double(), double))
    actual = tensors(first(input, hx))
    assert all(t.dtype == dtype for t in actual.values())
    check_values(actual, expected, dtype)


@pytest.mark.parametrize("cell", CELLS)
def test_cells_of_any_order(cell):
    module, _ = cells(cell, 2, 3)
    input, hx = given(cell, 2, (2, 3))
    leaves = [t.clone().requires_grad_() for t in (input, *tensors(hx).values())]
    parameters = list(module.parameters())

    def call(*values):
        input, *state = values[: len(leaves)]
        names = [name for name, _ in module.named_parameters()]
        params = dict(zip(names, values[len(leaves) :], strict=True))
        return torch.func.functional_call(module, params, (input, tuple(state) if cell == "lstm" else state[0]))

    assert torch.autograd.gradcheck(call, (*leaves, *parameters))
    assert torch.autograd.gradgradcheck(call, (*leaves, *parameters))


@pytest.mark.parametrize("cell", CELLS)
def test_cells_in_their_surroundings(cell):
    """repr, positional arguments, convert and back, explain, set_backend, autocast, fx, parametrizations, vmap."""
    first, second = cells(cell)
    first.backend = "auto"
    assert repr(first) == repr(second)
    input, hx = given(cell)
    expected = tensors(second(input, hx))

    model = nn.Sequential(second)
    rnn_ext.convert(model)
    assert type(model[0]) is OURS[cell] and repr(model) == repr(nn.Sequential(first))
    assert vars(model[0]).keys() == vars(first).keys()
    check_values(tensors(model[0](input, hx)), expected)
    assert rnn_ext.explain(model[0], input).backend == "custom"
    rnn_ext.set_backend(model, "native")
    assert "backend='native'" in repr(model)
    assert rnn_ext.explain(model[0], input).kernel == f"torch.{cell}_cell"
    assert type(rnn_ext.to_native(model)[0]) is NATIVE[cell] and not hasattr(model[0], "backend")

    class Model(nn.Module):
        def __init__(self, cell):
            super().__init__()
            self.cell = cell

        def forward(self, input, hx):
            return self.cell(input, hx)

    traced = torch.fx.symbolic_trace(Model(first))
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["cell"]
    check_values(tensors(traced(input, hx)), expected)
    mapped = torch.vmap(lambda x, *state: first(x, state if cell == "lstm" else state[0]))
    check_values(tensors(mapped(input, *tensors(hx).values())), expected)

    normed = parametrizations.weight_norm(copy.deepcopy(first), "weight_hh")
    check_values(tensors(normed(input, hx)), expected)
    normed.parametrizations.weight_hh.original0.data.mul_(2)
    assert not torch.allclose(tensors(normed(input, hx))["h"], expected["h"])
    positional = (True, "relu", "cpu", torch.float64) if "rnn" in cell else (False, "cpu", torch.float64)
    assert repr(OURS[cell](I, H, *positional)) == repr(NATIVE[cell](I, H, *positional))


@pytest.mark.parametrize("cell", CELLS)
def test_compiled_cells_and_steps(cell):
    for module, args in ((cells(cell)[0], given(cell)), (ours(cell), (randn(N, I), initial(cell, 1, N)))):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        call = module if isinstance(module, nn.RNNCellBase) else module.step
        compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
        for batch in (N, 5):
            input = randn(batch, I).requires_grad_()
            state = tuple(t.expand(batch, *t.shape[1:]) if t.dim() == 2 else t.expand(-1, batch, -1) for t in
                          (t[:1] if t.dim() == 2 else t[:, :1] for t in tensors(args[1]).values()))  # fmt: skip
            state = state if cell == "lstm" else state[0]
            results = [torch.utils._pytree.tree_leaves(f(input, state)) for f in (compiled, call)]
            grads = [
                torch.autograd.grad(sum(t.square().sum() for t in r), [input, *module.parameters()]) for r in results
            ]
            for got, want in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
                check_gradients({"": got}, {"": want})
        assert counter.frame_count <= 2


MISTAKES = {
    "input 3-D": (lambda m, hx: m(torch.zeros(1, N, I)), ["3", "1D or 2D"]),
    "input 0-D": (lambda m, hx: m(torch.zeros(())), ["0"]),
    "input features": (lambda m, hx: m(torch.zeros(N, 9)), ["9", "4"]),
    "input int64": (lambda m, hx: m(torch.zeros(N, I, dtype=torch.int64)), []),
    "input float64": (lambda m, hx: m(torch.zeros(N, I).double()), []),
    "hx batch": (lambda m, hx: m(torch.zeros(N, I), hx(8, H)), ["8", "3"]),
    "hx features": (lambda m, hx: m(torch.zeros(N, I), hx(N, 7)), ["7", "6"]),
    "hx 3-D": (lambda m, hx: m(torch.zeros(N, I), hx(1, N, H)), ["3", "1D or 2D"]),
    "hx 2-D for no batch": (lambda m, hx: m(torch.zeros(I), hx(N, H)), ["1-D", "3, 6"]),
    "hx 1-D for a batch": (lambda m, hx: m(torch.zeros(N, I), hx(H)), ["2-D", "6"]),
    "hx float64": (lambda m, hx: m(torch.zeros(N, I), hx(N, H, dtype=torch.float64)), []),
}


@pytest.mark.parametrize("backend", ["custom", "native"])
@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_with_cells(mistake, name, backend):
    call, words = MISTAKES[mistake]

    def hx(*shape, **kwargs):
        state = torch.zeros(*shape, **kwargs)
        return (state, state) if name == "LSTMCell" else state

    first, second = getattr(rnn_ext, name)(I, H, backend=backend), getattr(nn, name)(I, H)
    complain_alike(lambda: call(first, hx), lambda: call(second, hx), *words)


def test_mistakes_of_one_kind():
    with pytest.raises(ValueError, match=r"cudnn.*auto.*custom.*native"):
        rnn_ext.LSTMCell(I, H, backend="cudnn")
    with pytest.raises(TypeError):
        rnn_ext.GRUCell(I, H, True, "cpu", None, "custom")
    module = rnn_ext.RNNCell(I, H, nonlinearity="sigmoid")  # torch.nn, too, says so at the call only
    complain_alike(
        lambda: module(torch.zeros(N, I)),
        lambda: nn.RNNCell(I, H, nonlinearity="sigmoid")(torch.zeros(N, I)),
        "sigmoid",
    )
    assert isinstance(caught(lambda: rnn_ext.LSTMCell(I, H)(torch.zeros(N, I), (torch.zeros(N, H),))), RuntimeError)


# --- step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["custom", "native"])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize(("cell", "proj"), projected(3))
def test_step_is_forward(cell, proj, num_layers, backend):
    module = ours(cell, num_layers=num_layers, batch_first=num_layers == 3, **({"proj_size": proj} if proj else {}))
    module.backend = backend
    for batch in (N, None):
        input = randn(*(() if batch is None else (batch,)), 9, I)  # batch_first
        whole = input if module.batch_first or batch is None else input.transpose(0, 1)
        expected, expected_state = module(whole, initial(cell, num_layers, batch, proj))
        if not module.batch_first and batch is not None:
            expected = expected.transpose(0, 1)
        state, outputs = initial(cell, num_layers, batch, proj), []
        for x in input.unbind(-2):
            output, state = module.step(x, state)
            outputs.append(output)
        results = flatten((torch.stack(outputs, -2), state)), flatten((expected, expected_state))
        check_values(*results)
        grads = [
            torch.autograd.grad(sum(t.cos().sum() for t in r.values()), list(module.parameters())) for r in results
        ]
        check_gradients(*[dict(zip(module.state_dict(), g, strict=True)) for g in grads])
        zero = tuple(torch.zeros_like(t) for t in flatten((output, state)).values())[1:]
        without, given = (
            module.step(input[..., 0, :]),
            module.step(input[..., 0, :], zero if cell == "lstm" else zero[0]),
        )
        check_values(flatten(without), flatten(given))


def test_step_draws_dropout_as_forward_does():
    module = ours("gru", num_layers=3, dropout=0.5)
    torch.manual_seed(1)
    expected = module(randn(1, N, I))
    torch.manual_seed(1)
    output, state = module.step(randn(1, N, I)[0])
    check_values(flatten((output.unsqueeze(0), state)), flatten(expected))


def test_mistakes_with_step():
    with pytest.raises(ValueError, match=r"step.*bidirectional=True"):
        rnn_ext.GRU(I, H, bidirectional=True).step(torch.zeros(N, I))
    module = rnn_ext.LSTM(I, H)
    for wrong, kind in ((None, "NoneType"), ([1.0], "list")):
        with pytest.raises(TypeError, match=f"step: expected input as a tensor, got {kind}"):
            module.step(wrong)
    with pytest.raises(ValueError, match=r"step.*1D or 2D.*3D.*\[1, 3, 4\]"):
        module.step(torch.zeros(1, N, I))
    with pytest.raises(ValueError, match=r"float64.*float32"):
        module.step(torch.zeros(N, I).double())
    with pytest.raises(RuntimeError, match=rf"must be equal to input_size. Expected {I}, got 9"):
        module.step(torch.zeros(N, 9))
    state = torch.zeros(1, N, H)
    for bad, message in (
        ((state,), r"the two states \(h_0, c_0\), got tuple of 1"),
        ((state[0], state[0]), rf"expected h_0 of size \[1, {N}, {H}\], got \[{N}, {H}\]"),
        ((state, state[:, :2]), rf"expected c_0 of size \[1, {N}, {H}\], got \[1, 2, {H}\]"),
        ((state.double(), state), r"h_0 is Double but input is Float"),
    ):
        with pytest.raises(RuntimeError, match=message):
            module.step(torch.zeros(N, I), bad)
    module.backend = "fast"
    with pytest.raises(ValueError, match="fast"):
        module.step(torch.zeros(N, I))


@pytest.mark.parametrize("name", ["weight_ih", "weight_hh", "bias_hh"])
def test_a_weight_that_is_missing(name):
    layer, cell = rnn_ext.GRU(I, H), rnn_ext.GRUCell(I, H)
    setattr(layer, f"{name}_l0", None)
    setattr(cell, name, None)
    for call in (layer, layer.step):
        with pytest.raises(ValueError, match=r"Expected a tensor for each weight, got None for number [0-3] of 4"):
            call(torch.zeros(N, I))
    with pytest.raises(ValueError, match=f"GRUCell: expected a tensor as {name}, got None"):
        cell(torch.zeros(N, I))


def test_sparse_weights():
    """Which torch's kernels take, in one timestep as in many."""
    layer, x = rnn_ext.GRU(I, H), torch.randn(N, I)
    expected = layer.step(x)[0]
    layer.weight_ih_l0 = torch.nn.Parameter(layer.weight_ih_l0.detach().to_sparse())
    with torch.no_grad():
        torch.testing.assert_close(layer.step(x)[0], expected)


def test_zoneout_in_training():
    """A step draws, as forward does: some units keep their state, others do not."""
    layer, state = rnn_ext.GRU(I, 50, zoneout=0.5), torch.randn(1, N, 50)
    kept = layer.step(torch.randn(N, I), state)[0] == state[0]
    assert kept.any() and not kept.all()


def test_the_binding_and_the_op_are_one():
    """What Python must see goes through torch.ops, everything else through the binding, with the same result."""
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    class Dispatched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    class Mine(torch.Tensor):
        pass

    module, state = ours("lstm"), initial("lstm", 1, N)
    expected = flatten(module.step(randn(N, I), state))
    for mode in (Watch, Dispatched):
        seen.clear()
        with mode():
            check_values(flatten(module.step(randn(N, I), state)), expected)
        assert "rnn_ext.layer.default" in seen
    output, _ = module.step(randn(N, I).as_subclass(Mine), state)
    assert type(output) is Mine
    weights = module._flat_weights
    options = ("lstm", False, False, True)
    got = ops._fast_layer(randn(2, N, I), *state, weights, None, None, None, *options)
    want = torch.ops.rnn_ext.layer(randn(2, N, I), *state, weights, None, None, None, [], *options, False)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# --- chunks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("cell", "proj"), projected(17))
def test_any_chunking_is_one_call(cell, proj, dtype):
    """To 1e-6 of the call over everything; in reduced precision, where the carried state is rounded, to its promise."""
    draw = random.Random(0)
    length, batch, inputs, hidden = 40, 5, 7, 33
    module = ours(cell, inputs, hidden, 2, dtype=dtype, **({"proj_size": proj} if proj else {}))
    input = randn(length, batch, inputs, dtype=dtype)
    with torch.no_grad():
        whole = flatten(module(input))
        for _ in range(12):
            cuts = sorted(draw.choices(range(length + 1), k=draw.randrange(12)))  # empty chunks too
            outputs, state = [], None
            for begin, end in zip([0, *cuts], [*cuts, length], strict=True):
                output, state = module(input[begin:end], state)
                outputs.append(output)
            tolerance = min(VALUE_TOLERANCE[dtype], 1e-6) if dtype.itemsize >= 4 else VALUE_TOLERANCE[dtype]
            check(flatten((torch.cat(outputs), state)), whole, tolerance, 1.0, f"cut at {cuts}:")


@pytest.mark.parametrize("num_layers", [1, 3])
def test_a_step_is_one_call_of_the_binding(num_layers):
    """That it takes a fraction of nn.LSTM's time is for benchmarks/features.py to say, since a busy machine can fail no
    test. What a step must not do on the way to the kernel can be counted."""
    layer, input, state = rnn_ext.LSTM(64, 64, num_layers), torch.randn(1, 64), (torch.zeros(num_layers, 1, 64),) * 2
    called = []

    def note(frame, event, arg):
        if event in ("call", "c_call"):
            called.append(frame.f_code.co_name if event == "call" else arg)

    with torch.inference_mode():
        sys.setprofile(note)
        try:
            layer.step(input, state)
        finally:
            sys.setprofile(None)
    assert called.count(ops.plain_step) == 1
    assert {getattr(one, "__name__", one) for one in called}.isdisjoint(("layer", "recurrent", "unsqueeze", "squeeze"))
    assert len(called) < 10, called


def test_steps_of_a_regularised_layer():
    """Zoneout and layer normalisation step as forward does; masks for a whole sequence cannot be stepped through."""
    layer = rnn_ext.LSTM(I, H, 2, layer_norm=True, zoneout=0.3, recurrent_dropout=0.2).double()
    input = randn(5, N, I)
    with pytest.raises(ValueError, match=r"recurrent_dropout=0\.2.*eval"):
        layer.step(input[0])
    layer.eval()
    want, want_state = layer(input)
    state, outputs = None, []
    for x in input:
        output, state = layer.step(x, state)
        outputs.append(output)
    check_values({"output": torch.stack(outputs), "h": state[0], "c": state[1]},
                 {"output": want, "h": want_state[0], "c": want_state[1]})  # fmt: skip


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_states_are_not_rounded_under_autocast(cell, compiled):
    """A cell, and a step of a stack, keep float32 states on the CPU from call to call, as torch.nn's cells do: 16 bits
    would lose what is small against the state."""
    layer = ours(cell, num_layers=2, dtype=torch.float32)
    one = cells(cell)[0].float()
    for call, size in ((one, ()), (layer.step, (2,))):
        if compiled:
            torch._dynamo.reset()
            call = torch.compile(call, backend="eager", fullgraph=True)
        for dtype in (torch.float32, torch.bfloat16):  # of the input: what comes from a linear layer has 16 bits
            input = randn(N, I).to(dtype)
            state = torch.randn(*size, N, H)
            state = (state, torch.randn(*size, N, H)) if cell == "lstm" else state
            expected = torch.utils._pytree.tree_leaves(call(input.float(), state))
            with torch.autocast("cpu", torch.bfloat16):
                found = torch.utils._pytree.tree_leaves(call(input, state))
            for a, b in zip(found, expected, strict=True):
                assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("cell", CELLS)
def test_a_cells_states_of_other_sizes(cell):
    one = cells(cell)[0]
    wrong = randn(1, H)
    states = (randn(N, H), randn(N, H + 1)) if cell == "lstm" else wrong
    name, found = ("c_0", [N, H + 1]) if cell == "lstm" else ("h_0", [1, H])
    size = re.escape(f"expected {name} of size {[N, H]}, got {found}")
    with pytest.raises(RuntimeError, match=size):
        one(randn(N, I), states)


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {"zoneout": 0.3}) for name in ("RNN", "GRU", "LSTM")), ("LSTM", {"layer_norm": True})],
    ids=str,
)
def test_steps_of_one_regularised_layer(name, options):
    """In eval, as forward has it; gradients too."""
    module, input = getattr(rnn_ext, name)(I, H, **options).eval(), torch.randn(5, N, I)
    state, outputs = None, []
    for x in input:
        output, state = module.step(x, state)
        outputs.append(output)
    found, expected = torch.stack(outputs), module(input)[0]
    torch.testing.assert_close(found, expected)
    parameters = list(module.parameters())
    torch.testing.assert_close(*(torch.autograd.grad(t.sum(), parameters) for t in (found, expected)))


def test_step_refuses_masks_of_a_whole_sequence():
    for name in ("recurrent_dropout", "weight_dropout"):
        module = rnn_ext.GRU(I, H, **{name: 0.5})
        with pytest.raises(ValueError, match=f"step: {name}=0.5 draws one mask"):
            module.step(torch.randn(N, I))
        assert module.eval().step(torch.randn(N, I))[0].shape == (N, H)


def test_native_step_under_autocast():
    """As forward of the same layer."""
    module, input = rnn_ext.LSTM(I, H, 2, backend="native"), torch.randn(1, N, I)
    with torch.autocast("cpu"):
        assert module.step(input[0])[0].dtype == module(input)[0].dtype


def test_autocast_casts_no_float64():
    for make, call, kind, message in (
        (rnn_ext.GRUCell, lambda m, x: m(x), RuntimeError, "expected the same dtype"),
        (rnn_ext.GRU, lambda m, x: m.step(x), ValueError, "does not match weight dtype"),
    ):
        for module, input in ((make(I, H).double(), torch.randn(N, I)), (make(I, H), torch.randn(N, I).double())):
            with torch.autocast("cpu"), pytest.raises(kind, match=message):
                call(module, input)
