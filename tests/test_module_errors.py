"""Mistakes: the exception torch.nn raises for the same one, in words that name what was given and what was expected."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import rnn_ext

I, H, L, N = 4, 6, 5, 3  # noqa: E741
NATIVE = {"RNN": nn.RNN, "GRU": nn.GRU, "LSTM": nn.LSTM}
OURS = {"RNN": rnn_ext.RNN, "GRU": rnn_ext.GRU, "LSTM": rnn_ext.LSTM}


def caught(fn) -> Exception:
    with pytest.raises(Exception) as info:
        fn()
    return info.value


def complain_alike(first, second, *words: str) -> None:
    """Both raise, ours an exception that whoever catches torch.nn's catches too, with these words in it."""
    error, expected = caught(first), caught(second)
    assert isinstance(error, type(expected)), f"{error!r} instead of {expected!r}"
    message = str(error)
    assert "INTERNAL ASSERT" not in message
    for word in words:
        assert re.search(word, message), f"no {word!r} in: {message}"


CONSTRUCTION = {
    "input_size 0": ((0, H), {}, ["input_size"]),
    "input_size negative": ((-2, H), {}, ["input_size"]),
    "input_size float": ((4.0, H), {}, ["input_size", "int", "float"]),
    "hidden_size 0": ((I, 0), {}, ["hidden_size"]),
    "hidden_size string": ((I, "6"), {}, ["hidden_size", "int", "str"]),
    "num_layers 0": ((I, H, 0), {}, ["num_layers"]),
    "bias": ((I, H), {"bias": 1}, ["bias", "bool", "int"]),
    "batch_first": ((I, H), {"batch_first": "yes"}, ["batch_first", "bool", "str"]),
    "dropout 1.5": ((I, H, 2), {"dropout": 1.5}, ["dropout", "0", "1"]),
    "dropout negative": ((I, H, 2), {"dropout": -0.1}, ["dropout"]),
    "dropout bool": ((I, H, 2), {"dropout": True}, ["dropout"]),
    "dropout string": ((I, H, 2), {"dropout": "half"}, []),
    "unknown keyword": ((I, H), {"hidden": 3}, ["hidden"]),
    "no hidden_size": ((I,), {}, ["hidden_size"]),
    "integer dtype": ((I, H), {"dtype": torch.int64}, []),
}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("mistake", CONSTRUCTION)
def test_construction(mistake, name):
    args, kwargs, words = CONSTRUCTION[mistake]
    complain_alike(lambda: OURS[name](*args, **kwargs), lambda: NATIVE[name](*args, **kwargs), *words)


def test_construction_of_one_kind():
    complain_alike(
        lambda: rnn_ext.RNN(I, H, nonlinearity="sigmoid"),
        lambda: nn.RNN(I, H, nonlinearity="sigmoid"),
        "sigmoid",
        "relu",
    )
    complain_alike(lambda: rnn_ext.RNN(I, H, 1, "gelu"), lambda: nn.RNN(I, H, 1, "gelu"), "gelu", "tanh")
    for size in (H, H + 1, -1):
        complain_alike(
            lambda s=size: rnn_ext.LSTM(I, H, proj_size=s), lambda s=size: nn.LSTM(I, H, proj_size=s), "proj_size"
        )
    for name in ("RNN", "GRU"):
        complain_alike(
            lambda n=name: OURS[n](I, H, proj_size=2), lambda n=name: NATIVE[n](I, H, proj_size=2), "proj_size"
        )
    with pytest.raises(TypeError, match="nonlinearity"):
        rnn_ext.LSTM(I, H, nonlinearity="tanh")
    with pytest.warns(UserWarning, match=r"dropout.*num_layers=1"):
        rnn_ext.LSTM(I, H, dropout=0.5)


@pytest.mark.parametrize("name", OURS)
def test_unknown_backend(name):
    with pytest.raises(ValueError, match=r"cudnn.*auto.*custom.*native"):
        OURS[name](I, H, backend="cudnn")
    with pytest.raises(ValueError, match="None"):
        OURS[name](I, H, backend=None)
    module = OURS[name](I, H)
    module.backend = "fast"
    with pytest.raises(ValueError, match="fast"):
        module(torch.zeros(L, N, I))
    with pytest.raises(TypeError):
        OURS[name](I, H, 1, *([True] if name != "RNN" else ["tanh"]), False, 0.0, False, 0, "cpu", None, "custom", 1)


def states(name: str, *shape: int, **kwargs):
    """An hx of this shape (for an LSTM both states)."""
    state = torch.zeros(*shape, **kwargs)
    return (state, state) if name == "LSTM" else state


def packed(features: int = I, dtype=torch.float32) -> PackedSequence:
    return pack_sequence([torch.zeros(5, features, dtype=dtype), torch.zeros(2, features, dtype=dtype)])


CALLS = {
    "input 1-D": (lambda m, n: m(torch.zeros(I)), ["1"]),
    "input 4-D": (lambda m, n: m(torch.zeros(2, L, N, I)), ["4"]),
    "input features": (lambda m, n: m(torch.zeros(L, N, 9)), ["9", "4"]),
    "unbatched features": (lambda m, n: m(torch.zeros(L, 9)), ["9", "4"]),
    "packed features": (lambda m, n: m(packed(9)), ["9", "4"]),
    "input float64": (lambda m, n: m(torch.zeros(L, N, I).double()), ["float64", "float32"]),
    "input int64": (lambda m, n: m(torch.zeros(L, N, I, dtype=torch.int64)), ["int64", "float32"]),
    "input float16": (lambda m, n: m(torch.zeros(L, N, I).half()), ["float16", "float32"]),
    "packed float64": (lambda m, n: m(packed(dtype=torch.float64)), ["float64", "float32"]),
    "input None": (lambda m, n: m(None), []),
    "input list": (lambda m, n: m([[0.0] * I]), []),
    "no input": (lambda m, n: m(), ["input"]),
    "hx batch": (lambda m, n: m(torch.zeros(L, N, I), states(n, 2, 8, H)), ["8", "3"]),
    "hx layers": (lambda m, n: m(torch.zeros(L, N, I), states(n, 1, N, H)), [r"1, 3, 6", r"2, 3, 6"]),
    "hx features": (lambda m, n: m(torch.zeros(L, N, I), states(n, 2, N, 7)), ["7", "6"]),
    "hx 2-D for a batch": (lambda m, n: m(torch.zeros(L, N, I), states(n, 2, H)), ["2"]),
    "hx 3-D for no batch": (lambda m, n: m(torch.zeros(L, I), states(n, 2, 1, H)), ["3|2, 1, 6"]),
    "hx features unbatched": (lambda m, n: m(torch.zeros(L, I), states(n, 2, 7)), ["7", "6"]),
    "hx batch packed": (lambda m, n: m(packed(), states(n, 2, 8, H)), ["8", "2"]),
    "hx float64": (lambda m, n: m(torch.zeros(L, N, I), states(n, 2, N, H, dtype=torch.float64)), []),
}


@pytest.mark.parametrize("backend", ["custom", "native"])
@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("mistake", CALLS)
def test_calls(mistake, name, backend):
    call, words = CALLS[mistake]
    ours, native = OURS[name](I, H, 2, backend=backend), NATIVE[name](I, H, 2)
    error = caught(lambda: call(ours, name))
    expected = caught(lambda: call(native, name))
    if isinstance(expected, AttributeError):  # torch.nn stumbles over these rather than checking them
        assert isinstance(error, (AttributeError, TypeError, ValueError)), repr(error)
    elif mistake in ("hx float64", "packed float64"):  # of these torch.nn checks some cells, by other exceptions
        assert isinstance(error, (ValueError, TypeError, RuntimeError)) and all(w in str(error) for w in words), repr(
            error
        )
    else:
        complain_alike(lambda: call(ours, name), lambda: call(native, name), *words)
    # and the module is none the worse for it
    assert ours(torch.zeros(L, N, I))[0].shape == (L, N, H)


@pytest.mark.parametrize("backend", ["custom", "native"])
def test_states_of_an_lstm(backend):
    ours, native = rnn_ext.LSTM(I, H, proj_size=2, backend=backend), nn.LSTM(I, H, proj_size=2)
    input = torch.zeros(L, N, I)
    good_h, good_c = torch.zeros(1, N, 2), torch.zeros(1, N, H)
    for hx, words in (
        ((good_c, good_c), ["6", "2"]),
        ((good_h, good_h), ["2", "6"]),
        ((good_h, torch.zeros(1, N + 1, H)), ["4", "3"]),
        ((good_h, torch.zeros(N, H)), []),
        ((good_h,), []),
        ((good_h, good_c, good_c), []),
    ):
        error = caught(lambda hx=hx: ours(input, hx))
        assert isinstance(error, (RuntimeError, ValueError, TypeError, IndexError)), repr(error)
        if len(hx) == 2:
            complain_alike(lambda hx=hx: ours(input, hx), lambda hx=hx: native(input, hx), *words)
    caught(lambda: ours(input, good_h))
    for name in ("RNN", "GRU"):
        error = caught(lambda n=name: OURS[n](I, H, backend=backend)(input, (good_c, good_c)))
        assert isinstance(error, (RuntimeError, ValueError, TypeError, AttributeError)), repr(error)


@pytest.mark.parametrize("name", OURS)
def test_what_is_no_tensor(name):
    module, input, state = OURS[name](I, H), torch.zeros(L, N, I), torch.zeros(1, N, H)
    two = name == "LSTM"
    for given, found in (([0.0], "list"), (input.numpy(), "ndarray")):
        with pytest.raises(TypeError, match=f"expected input as a tensor or a PackedSequence, got {found}"):
            module(given)
    with pytest.raises(TypeError, match=f"expected h_0 as a tensor, got {'list' if two else 'tuple'}"):
        module(input, ([state], state) if two else (state, state))
    for wrong in ([state[0]], state.numpy(), (state[0], state[0], state[0])):
        with pytest.raises((TypeError, RuntimeError), match=f"got {type(wrong).__name__}"):
            module.step(input[0], wrong)
    if not two:
        with pytest.raises(TypeError, match="expected h_0 as a tensor, got tuple"):
            module.step(input[0], (state[0], state[0]))
    with pytest.raises(TypeError, match=r"resets must be a tensor of torch\.bool, got ndarray"):
        module(input, resets=torch.zeros(L, N, dtype=torch.bool).numpy())


@pytest.mark.parametrize("name", OURS)
def test_lengths(name):
    module = OURS[name](I, H, backend="custom")
    input = torch.zeros(L, N, I)
    for lengths, kind, words in (
        ([1, 2], ValueError, ["lengths", "2", "3"]),
        ([1, 2, 3, 4], ValueError, ["lengths", "4", "3"]),
        ([1, 2, 6], ValueError, ["lengths", "6", "5"]),
        ([1, -2, 3], ValueError, ["lengths", "-2", "5"]),
        (torch.tensor([1, 2, 6]), (ValueError, RuntimeError), ["lengths", "6", "5"]),
        (torch.tensor([1, -2, 3]), (ValueError, RuntimeError), ["lengths", "-2", "5"]),
        (torch.tensor([[1, 2, 3]]), ValueError, ["lengths", "3"]),
        (torch.tensor(3), ValueError, ["lengths", "3"]),
        ([1.0, 2.0, 3.0], TypeError, ["lengths", "integer", "1.0"]),
        (["a", "b", "c"], TypeError, ["lengths", "a"]),
        ([True, False, True], TypeError, ["lengths", "True"]),
        ([None, 1, 2], TypeError, ["lengths", "None"]),
        (torch.tensor([1.0, 2.0, 3.0]), TypeError, ["lengths", "float32"]),
        (torch.tensor([True, False, True]), TypeError, ["lengths", "bool"]),
        (3, TypeError, ["lengths", "int"]),
        ("123", TypeError, ["lengths", "str"]),
        ([2**70, 1, 1], ValueError, ["lengths", str(2**70), "5"]),
    ):
        with pytest.raises(kind) as info:
            module(input, lengths=lengths)
        for word in words:
            assert word in str(info.value), f"no {word!r} in: {info.value}"
    with pytest.raises(ValueError, match="lengths"):
        module(packed(), lengths=[5, 2])


def test_lengths_that_stand_for_integers():
    class Length:
        def __index__(self):
            return 2

    module, input = rnn_ext.GRU(I, H), torch.randn(L, N, I)
    assert torch.equal(module(input, lengths=[3, Length(), torch.tensor(1)])[0], module(input, lengths=[3, 2, 1])[0])
    with pytest.raises(ValueError, match=r"expected lengths between 0 and 1, got 2 for batch entry 1"):
        module(input[:1], lengths=[1, Length(), 1])


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", OURS)
def test_sparse_and_nested_arguments(name, layers):
    """States are few numbers: sparse ones are made dense."""
    module, input, state = OURS[name](I, H, layers), torch.randn(L, N, I), torch.randn(layers, N, H)
    two, nested = name == "LSTM", torch.nested.nested_tensor([torch.randn(2, H), torch.randn(1, H)])
    sparse = state.to_sparse()
    for call, x in ((module, input), (module.step, input[0])):
        expected = call(x, (state, state) if two else state)[0]
        assert torch.equal(call(x, (sparse, sparse) if two else sparse)[0], expected)
        with pytest.raises(RuntimeError, match=r"expected h_0 as a dense tensor, got a nested tensor"):
            call(x, (nested, nested) if two else nested)
    leaf = sparse.detach().requires_grad_()
    module(input, (leaf, leaf) if two else leaf)[0].sum().backward()
    assert leaf.grad.shape == state.shape
    resets, lengths = torch.ones(L, N, dtype=torch.bool), torch.tensor([1, 2, 3])
    several = torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([3])])
    for arguments, what in (
        ({"lengths": lengths.to_sparse()}, r"lengths: .* dense tensor, got layout torch\.sparse_coo"),
        ({"lengths": several}, "lengths: .* dense tensor, got a nested tensor"),
        ({"resets": resets.to_sparse()}, r"resets: .* dense tensor, got layout torch\.sparse_coo"),
        ({"resets": several.to(torch.bool)}, "resets: .* dense tensor, got a nested tensor"),
    ):
        with pytest.raises(RuntimeError, match=what):
            module(input, **arguments)


def test_lengths_as_a_range_or_an_array():
    numpy = pytest.importorskip("numpy")
    module, input = rnn_ext.GRU(I, H), torch.randn(L, N, I)
    expected = module(input, lengths=[3, 2, 1])[0]
    for lengths in (range(3, 0, -1), numpy.array([3, 2, 1]), numpy.array([3, 2, 1], dtype=numpy.uint8)):
        assert torch.equal(module(input, lengths=lengths)[0], expected)
    fixed = numpy.array([1, 2, 3])
    fixed.flags.writeable = False
    assert torch.equal(module(input, lengths=fixed[::-1])[0], expected)
    lengths = numpy.array([3, 2, 1])
    output = module(input, lengths=lengths)[0]
    lengths[:] = 1  # before backward
    found, wanted = (torch.autograd.grad(t.sum(), module.weight_hh_l0)[0] for t in (output, expected))
    assert torch.equal(found, wanted)
    with pytest.raises(TypeError, match=r"lengths must be integers, got a tensor of torch\.float64"):
        module(input, lengths=numpy.array([3.0, 2, 1]))
    with pytest.raises(TypeError, match=r"lengths must be integers, got an array of object"):
        module(input, lengths=numpy.array([3, 2, 1], dtype=object))
    with pytest.raises(TypeError, match=r"lengths must be integers, got tensor\(1\.5000\)"):
        module(input, lengths=[torch.tensor(1.5), 2, 3])
    with pytest.raises(ValueError, match=r"expected lengths between 0 and 5, got 6 for batch entry 2"):
        module(input, lengths=range(4, 7))
    with pytest.raises(ValueError, match=r"shape \(3,\), one for each sequence, got \[1, 3\]"):
        module(input, lengths=numpy.array([[3, 2, 1]]))


@pytest.mark.parametrize("name", OURS)
def test_resets(name):
    module = OURS[name](I, H, backend="custom")
    input = torch.zeros(L, N, I)
    for resets, kind, words in (
        (torch.zeros(N, L, dtype=torch.bool), ValueError, ["resets", "3, 5", "5, 3"]),
        (torch.zeros(L, dtype=torch.bool), ValueError, ["resets", "5"]),
        (torch.zeros(L, N, 1, dtype=torch.bool), ValueError, ["resets", "5, 3, 1"]),
        (torch.zeros(L, N), TypeError, ["resets", "bool", "float32"]),
        (torch.zeros(L, N, dtype=torch.uint8), TypeError, ["resets", "bool", "uint8"]),
        ([[True] * N] * L, TypeError, ["resets", "bool", "list"]),
    ):
        with pytest.raises(kind) as info:
            module(input, resets=resets)
        for word in words:
            assert word in str(info.value), f"no {word!r} in: {info.value}"
    with pytest.raises(ValueError, match="resets"):
        module(packed(), resets=torch.zeros(7, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"resets.*native|native.*resets"):
        OURS[name](I, H, backend="native")(input, resets=torch.zeros(L, N, dtype=torch.bool))


def test_options_by_position_or_of_another_cell():
    with pytest.raises(TypeError):
        rnn_ext.LSTM(I, H)(torch.zeros(L, N, I), None, [5, 5, 5])
    for name in ("RNN", "GRU"):
        with pytest.raises(TypeError, match="return_cell_states"):
            OURS[name](I, H)(torch.zeros(L, N, I), return_cell_states=True)
    for wrong in ("a", 1, None):
        for layer in (rnn_ext.LSTM(I, H), rnn_ext.LSTM(I, H, 2), rnn_ext.quantize(rnn_ext.LSTM(I, H, 2))):
            with pytest.raises(TypeError, match=f"return_cell_states must be a bool, got {wrong!r}"):
                layer(torch.zeros(L, N, I), return_cell_states=wrong)
    with pytest.raises(ValueError, match=r"return_cell_states.*native|native.*return_cell_states"):
        rnn_ext.LSTM(I, H, backend="native")(torch.zeros(L, N, I), return_cell_states=True)


@pytest.mark.parametrize("weights", [None, torch.zeros(3), iter(())], ids=["None", "tensor", "iterator"])
def test_weights_that_are_no_list(weights):
    with pytest.raises(TypeError, match=f"lstm: expected weights as a list of tensors, got {type(weights).__name__}"):
        rnn_ext.functional.lstm(torch.zeros(L, N, I), None, weights)


@pytest.mark.parametrize("name", OURS)
def test_state_dicts_that_do_not_fit(name):
    ours = OURS[name](I, H)
    for other in (
        OURS[name](I, H, bidirectional=True),
        OURS[name](I, H, bias=False),
        OURS[name](I, H + 1),
        OURS[name](I, H, 2),
    ):
        with pytest.raises(RuntimeError, match="state_dict"):
            ours.load_state_dict(other.state_dict())


@pytest.mark.parametrize("name", OURS)
def test_parameters_that_do_not_fit(name):
    """A parameter exchanged for one of another shape or dtype is found at the call, not read out of bounds."""
    for attribute, tensor in (
        ("weight_hh_l0", torch.zeros(1, 1)),
        ("weight_ih_l0", torch.zeros(2, I)),
        ("bias_ih_l0", torch.zeros(1)),
        ("bias_hh_l0", torch.zeros(0)),
        ("weight_hh_l0", torch.zeros(H * {"RNN": 1, "GRU": 3, "LSTM": 4}[name], H, dtype=torch.float64)),
        ("weight_ih_l0", torch.zeros(())),
    ):
        module = OURS[name](I, H, backend="custom")
        setattr(module, attribute, nn.Parameter(tensor))
        error = caught(lambda m=module: m(torch.zeros(L, N, I)))
        assert isinstance(error, (RuntimeError, ValueError, IndexError)), repr(error)
        assert "INTERNAL ASSERT" not in str(error)


@pytest.mark.parametrize("name", OURS)
def test_packed_sequences_made_by_hand(name):
    """torch checks nothing when a PackedSequence is built: sizes that do not fit must not reach the kernel."""
    data = torch.zeros(5, I)
    module = OURS[name](I, H, backend="custom")
    for sizes in ([3, 3], [2, 3], [5, 0], [6, -1], [3], [], [2**62, 2**62, 5]):
        batch = PackedSequence(data, torch.tensor(sizes, dtype=torch.int64))
        error = caught(lambda b=batch: module(b))
        assert isinstance(error, (RuntimeError, ValueError, IndexError)), repr(error)
        assert "INTERNAL ASSERT" not in str(error)
    batch = PackedSequence(data, torch.tensor([3, 2]), torch.tensor([0, 1, 7]), torch.tensor([0, 1, 7]))
    error = caught(lambda: module(batch, states(name, 1, 3, H)))
    assert isinstance(error, (RuntimeError, ValueError, IndexError))


def test_options_of_a_stack():
    weights = list(rnn_ext.GRU(I, H, 2).parameters())
    for dropout in (-1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"dropout must be a probability in \[0, 1\], got"):
            rnn_ext.functional.gru(torch.zeros(L, N, I), None, weights, num_layers=2, dropout=dropout, training=True)
        module = rnn_ext.GRU(I, H, 2)
        module.dropout = dropout
        with pytest.raises(ValueError, match="dropout"):
            module(torch.zeros(L, N, I))
    with pytest.raises(ValueError, match="num_layers must be greater than zero, got 0"):
        rnn_ext.functional.gru(torch.zeros(L, N, I), None, weights, num_layers=0)


@pytest.mark.parametrize("backend", ["custom", "native"])
@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("dropout", "a", "a number"), ("dropout", None, "a number"), ("dropout", True, "a number"),
        ("recompute", "", "a bool"), ("recompute", 0, "a bool"), ("zoneout", None, "a number"),
        ("zoneout", (), "a number"), ("recurrent_dropout", "", "a number"), ("weight_dropout", None, "a number"),
    ],
)  # fmt: skip
def test_options_of_a_wrong_type(option, value, expected, backend):
    """Also those that are as good as off."""
    layer = rnn_ext.GRU(I, H, 2)
    with pytest.raises(TypeError, match=f"{option} must be {expected}, got {re.escape(repr(value))}"):
        rnn_ext.functional.gru(
            torch.zeros(L, N, I), None, list(layer.parameters()), num_layers=2, backend=backend, **{option: value}
        )
    layer.backend = backend
    setattr(layer, option, value)
    with pytest.raises(TypeError, match=f"{option} must be {expected}"):
        layer(torch.zeros(L, N, I), lengths=[1] * N)


@pytest.mark.parametrize("backend", ["custom", "native"])
def test_what_are_no_weights(backend):
    good = list(rnn_ext.RNN(I, H).parameters())
    for given, kind, message in (
        (["a", *good[1:]], ValueError, "Expected a tensor for each weight, got str for number 0 of 4"),
        (
            [good[0], good[2]],
            RuntimeError,
            r"Expected two-dimensional weight_ih and weight_hh, got sizes .6, 4. and .6.",
        ),
    ):
        with pytest.raises(kind, match=message):
            rnn_ext.functional.rnn_tanh(torch.zeros(L, N, I), None, given, backend=backend)


@pytest.mark.parametrize("name", OURS)
def test_a_weight_is_missing(name):
    module = OURS[name](I, H)
    module.bias_hh_l0 = None
    for call in (lambda: module(torch.zeros(L, N, I)), lambda: module(packed()), lambda: module(torch.zeros(L, I))):
        with pytest.raises(ValueError, match="got None for number 3 of 4"):
            call()


@pytest.mark.parametrize("make", [rnn_ext.LSTM, rnn_ext.LSTMCell])
def test_a_tensor_for_the_two_states(make):
    module = make(I, H)
    input = torch.zeros(2, I) if make is rnn_ext.LSTMCell else torch.zeros(L, 2, I)
    with pytest.raises(RuntimeError, match=r"the two states \(h_0, c_0\), got a tensor of size \[2, 1, 2, 6\]"):
        module(input, torch.zeros(2, 1, 2, H))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", OURS)
def test_lengths_of_nothing(name, batch_first):
    """No sequence, or none of any timestep: of both backends the same."""
    module, first = OURS[name](I, H, 2, bidirectional=True, batch_first=batch_first), 0 if batch_first else 1
    hx = states(name, 4, 3, H)
    for batch, length, given in ((0, 5, None), (0, 0, None), (3, 0, None), (3, 0, hx)):
        input = torch.zeros((batch, length, I) if first == 0 else (length, batch, I))
        found = []
        for backend in ("custom", "native"):
            module.backend = backend
            output, state = module(input, given, lengths=[0] * batch)
            found.append([output, *(state if isinstance(state, tuple) else [state])])
            output.sum().backward()
        assert all(map(torch.equal, *found))


def test_what_only_one_kind_of_call_has():
    """Unbatched, packed and stacked calls say what is wrong, not what fails for it."""
    gru, lstm = rnn_ext.GRU(I, H), rnn_ext.LSTM(I, H)
    for call, kind, message in (
        (
            lambda: lstm(torch.randn(L, I), (torch.zeros(1, H), torch.zeros(1, 1, H))),
            RuntimeError,
            "should also be 2-D",
        ),
        (
            lambda: gru(torch.randn(L, I), resets=[True] * L),
            TypeError,
            r"resets must be a tensor of torch\.bool, got list",
        ),
        (lambda: gru(torch.randn(L, I), resets=torch.zeros(4) > 0), ValueError, r"Expected resets of shape \[5\]"),
        (
            lambda: gru(PackedSequence(torch.zeros(5, 1, I), torch.tensor([3, 2]))),
            RuntimeError,
            "input must have 2 dimensions, got 3",
        ),
        (lambda: gru(torch.randn(L, N, I), torch.zeros(N, H)), RuntimeError, "should also be 3-D"),
        (
            lambda: gru(torch.randn(L, N, I), lengths=torch.ones(N, dtype=torch.complex64)),
            TypeError,
            "integers, got a tensor of torch.complex64",
        ),
    ):
        with pytest.raises(kind, match=message):
            call()


@pytest.mark.parametrize("backend", ["custom", "native"])
def test_states_of_more_sequences_than_are_packed(backend):
    """Which would be taken in another order."""
    sequences = pack_sequence([torch.randn(n, I) for n in (2, 5, 3)], enforce_sorted=False)
    for which in (0, 1):
        hx = [torch.zeros(1, 3 + (i == which), H) for i in range(2)]
        with pytest.raises(RuntimeError, match="3 sequences"):
            rnn_ext.LSTM(I, H, backend=backend)(sequences, tuple(hx))


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"zoneout": 0.1}, {"recompute": True}], ids=str)
@pytest.mark.parametrize("name", OURS)
def test_states_of_more_layers_than_there_are(name, options):
    """Of a stack whose layers are called one after the other, each with its part of the states."""
    module = OURS[name](I, H, 2, **options)
    for layers in (1, 3):
        with pytest.raises(RuntimeError, match=rf"Expected h_0 of size \[2, {N}, {H}\], got \[{layers}, {N}, {H}\]"):
            module(torch.zeros(L, N, I), states(name, layers, N, H))


def test_too_many_weights_and_too_few():
    weights = list(rnn_ext.RNN(I, I, 2).parameters())
    for given, layers, count in (([*weights, weights[0]], 2, 9), (weights[:1], 1, 1)):
        with pytest.raises(ValueError, match=f"got {count} in all"):
            rnn_ext.functional.rnn_tanh(torch.randn(L, N, I), None, given, num_layers=layers)


@pytest.mark.parametrize("make", [rnn_ext.LSTM, rnn_ext.LSTMCell])
def test_what_is_no_pair_of_states(make):
    module, state = make(I, H), torch.zeros(N, H)
    input = torch.zeros(N, I) if make is rnn_ext.LSTMCell else torch.zeros(L, N, I)
    for given, found in ((5, "int"), ("ab", "str"), ((state,) * 3, "tuple of 3"), ([], "list of 0")):
        with pytest.raises(RuntimeError, match=rf"expected hx to be the two states \(h_0, c_0\), got {found}"):
            module(input, given)


@pytest.mark.parametrize("make", [rnn_ext.RNNCell, rnn_ext.GRUCell, rnn_ext.LSTMCell])
def test_what_is_no_tensor_for_a_cell(make):
    cell, state = make(I, H), torch.zeros(N, H)
    kind = make.__name__
    with pytest.raises(TypeError, match=f"{kind}: expected input as a tensor, got list"):
        cell([1.0, 2.0])
    with pytest.raises(TypeError, match=f"{kind}: expected input as a tensor, got NoneType"):
        cell(None)
    with pytest.raises(TypeError, match=f"{kind}: expected hx as a tensor, got list"):
        cell(torch.zeros(N, I), (state, [0.0]) if make is rnn_ext.LSTMCell else [0.0])


def test_states_of_cells():
    cell, input, h = rnn_ext.LSTMCell(I, H), torch.zeros(N, I), torch.zeros(N, H)
    with pytest.raises(ValueError, match="Expected hx to be 1D or 2D, got 3D"):
        cell(input, (h, h[None]))
    with pytest.raises(RuntimeError, match="For 2-D input, hx should also be 2-D"):
        cell(input, (h, h[0]))


@pytest.mark.parametrize("name", ["RNN", "GRU"])
def test_options_of_an_lstm(name):
    with pytest.raises(TypeError, match="layer_norm is an option of LSTM, not of RNN or GRU"):
        OURS[name](I, H, layer_norm=True)


def test_why_an_option_is_refused(monkeypatch):
    """Where our kernels cannot run at all, and "auto" takes torch's."""
    monkeypatch.setattr(rnn_ext.ops, "is_available", lambda: False)
    monkeypatch.setattr(rnn_ext.ops, "load_error", lambda: "it was built for another torch; run: make it")
    monkeypatch.setattr(rnn_ext.ops, "plain_forward", lambda *_: None)
    layer = rnn_ext.GRU(I, H, zoneout=0.5)
    with pytest.raises(ValueError, match=r"zoneout is an option of the custom .*: it was built for another torch; run"):
        layer(torch.zeros(L, N, I), lengths=[1] * N)
