"""rnn_ext.convert and to_native: any model, the same parameters, the same numbers."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_leaves

import rnn_ext
from rnn_ext import subclasses

PAIRS = [(nn.RNN, rnn_ext.RNN), (nn.GRU, rnn_ext.GRU), (nn.LSTM, rnn_ext.LSTM)]


class Model(nn.Module):
    """Every kind of layer, at several depths, one of them tied."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([nn.GRU(5, 4, batch_first=True), nn.RNN(4, 4, 2, "relu", batch_first=True)])
        self.decoder = nn.ModuleDict({"a": nn.LSTM(4, 4, bidirectional=True, proj_size=2, batch_first=True)})
        self.tied = self.decoder["a"]
        self.fc = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.encoder, self.decoder["a"], self.tied):
            x, _ = layer(x)
        return self.fc(x)


def layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.RNNBase)]


def test_a_model_there_and_back():
    model, input = Model().double(), torch.randn(3, 6, 5, dtype=torch.float64)
    model.eval()
    model.encoder[0].train()
    expected = model(input)
    before = dict(model.named_parameters(remove_duplicate=False))
    keys, modules = list(model.state_dict()), dict(model.named_modules(remove_duplicate=False))

    assert rnn_ext.convert(model) is model
    assert [type(layer) for layer in layers(model)] == [rnn_ext.GRU, rnn_ext.RNN, rnn_ext.LSTM]
    assert [layer.backend for layer in layers(model)] == ["auto"] * 3
    torch.testing.assert_close(model(input), expected, rtol=1e-12, atol=1e-12)
    for state in ("converted", "back"):
        after = dict(model.named_parameters(remove_duplicate=False))
        assert after.keys() == before.keys() and all(after[name] is before[name] for name in before), state
        assert dict(model.named_modules(remove_duplicate=False)) == modules  # tied layers stay tied
        assert list(model.state_dict()) == keys
        assert [layer.training for layer in layers(model)] == [True, False, False]
        if state == "converted":
            assert rnn_ext.to_native(model) is model
    assert [type(layer) for layer in layers(model)] == [nn.GRU, nn.RNN, nn.LSTM]
    assert not any(hasattr(layer, "backend") for layer in layers(model))
    assert torch.equal(model(input), expected)


@pytest.mark.parametrize("backend", ["auto", "custom", "native"])
@pytest.mark.parametrize(("native", "ours"), PAIRS)
def test_the_module_itself(native, ours, backend):
    module, input = native(5, 4, num_layers=2, bidirectional=True, dropout=0.5), torch.randn(6, 3, 5)
    torch.manual_seed(1)
    expected = module(input)[0]
    converted = rnn_ext.convert(module, backend=backend)
    assert type(converted) is ours and converted.backend == backend
    torch.manual_seed(1)
    torch.testing.assert_close(converted(input)[0], expected, rtol=1e-5, atol=1e-6)  # dropout's mask included
    assert repr(rnn_ext.to_native(converted)) == repr(native(5, 4, num_layers=2, bidirectional=True, dropout=0.5))


@pytest.mark.parametrize(("native", "ours"), PAIRS)
def test_a_converted_layer_is_like_one_made_directly(native, ours):
    torch.manual_seed(0)
    made = ours(5, 4, 2)
    torch.manual_seed(0)
    converted = rnn_ext.convert(native(5, 4, 2))
    assert repr(converted) == repr(made)
    assert vars(converted).keys() == vars(made).keys()
    packed = pack_sequence([torch.randn(3, 5), torch.randn(6, 5)], enforce_sorted=False)
    assert torch.equal(converted(packed)[0].data, made(packed)[0].data)


@pytest.mark.parametrize("native", [nn.RNN, nn.GRU, nn.LSTM])
def test_parameters_exchanged_after_the_round_trip_are_used(native):
    """No stale list of weights on either side."""
    module, input = rnn_ext.convert(native(5, 4)), torch.randn(6, 3, 5)
    for step in (lambda m: m, rnn_ext.to_native, rnn_ext.convert):
        step(module)
        module.weight_hh_l0 = nn.Parameter(torch.randn_like(module.weight_hh_l0))
        fresh = native(5, 4)
        fresh.load_state_dict(module.state_dict())
        torch.testing.assert_close(module(input)[0], fresh(input)[0])
        torch.testing.assert_close(copy.deepcopy(module).double()(input.double())[0].float(), fresh(input)[0])


def test_hooks_and_optimizer_go_on():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    handle = model.encoder[0].register_forward_hook(lambda module, args, result: seen.append(type(module)))
    model.tied.register_load_state_dict_pre_hook(lambda module, *args: seen.append(module))
    rnn_ext.convert(model)
    gc.collect()
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(3, 6, 5)).sum().backward()
    optimizer.step()
    assert seen == [rnn_ext.GRU]
    assert not any(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    seen.clear()
    model.load_state_dict(before)
    assert seen == [model.tied, model.tied]  # once for each of its two names
    handle.remove()
    model(torch.randn(3, 6, 5))
    assert seen == [model.tied, model.tied]


def test_old_weight_norm_survives():
    """It keeps the weight as a plain attribute that a hook sets anew before each forward."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        module = nn.utils.weight_norm(nn.LSTM(5, 4), "weight_hh_l0")
    input = torch.randn(6, 3, 5)
    rnn_ext.convert(module)
    for _ in range(2):
        with torch.no_grad():
            module.weight_hh_l0_g.mul_(0.5)
        converted = module(input)[0]
        torch.testing.assert_close(rnn_ext.to_native(module)(input)[0], converted)
        rnn_ext.convert(module)


def test_subclasses_are_left_alone_with_a_warning():
    class Mine(nn.LSTM):
        pass

    model = nn.Sequential()
    model.add_module("mine", Mine(5, 4))
    model.add_module("normed", parametrizations.weight_norm(nn.GRU(5, 4), "weight_hh_l0"))
    model.add_module("plain", nn.RNN(5, 4))
    with pytest.warns(UserWarning) as caught:
        rnn_ext.convert(model)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2 and "mine" in messages[0] and "Mine" in messages[0] and "normed" in messages[1]
    assert all(warning.filename == __file__ for warning in caught)
    assert type(model.mine) is Mine and type(model.plain) is rnn_ext.RNN


@pytest.mark.parametrize("function", [rnn_ext.convert, rnn_ext.to_native, rnn_ext.dequantize])
def test_a_model_without_layers_gets_a_warning(function):
    done = {rnn_ext.convert: "converted", rnn_ext.to_native: "changed", rnn_ext.dequantize: "dequantized"}[function]
    scripted = torch.jit.script(nn.Sequential(nn.LSTM(3, 4)))
    for model in (nn.Linear(3, 4), scripted):
        with pytest.warns(UserWarning, match=f"^no .* in this {type(model).__name__}: nothing is {done}") as caught:
            assert function(model) is model
        assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("kind", [nn.GRU, nn.GRUCell, rnn_ext.LSTM, rnn_ext.LSTMCell])
def test_a_model_with_layers_gets_none(kind):
    model = nn.Sequential(kind(3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rnn_ext.to_native(rnn_ext.convert(rnn_ext.convert(model))) is rnn_ext.to_native(model) is model
        if kind is nn.GRU:
            rnn_ext.convert(rnn_ext.quantize(model))
            rnn_ext.dequantize(model)


def test_what_is_no_layer_of_torchs_is_not_touched():
    model = nn.Sequential(nn.Linear(5, 4), nn.Conv1d(4, 4, 1), rnn_ext.GRU(4, 4, backend="native"))
    kinds = [type(module) for module in model]
    rnn_ext.convert(model, backend="custom")
    assert [type(module) for module in model] == kinds
    assert model[2].backend == "native"
    assert type(rnn_ext.to_native(nn.Linear(5, 4))) is nn.Linear


def test_unknown_backend_converts_nothing():
    model = nn.Sequential(nn.GRU(5, 4))
    with pytest.raises(ValueError, match="Unknown backend 'fast'"):
        rnn_ext.convert(model, backend="fast")
    assert type(model[0]) is nn.GRU


class Mine(nn.GRU):
    pass


def test_a_model_that_is_a_layer_has_a_name():
    with pytest.raises(ValueError, match=r"^model has zoneout=0\.1, torch\.nn has not"):
        rnn_ext.to_native(rnn_ext.GRU(3, 4, zoneout=0.1))
    with pytest.warns(UserWarning, match="^model is left as it is"):
        rnn_ext.convert(Mine(3, 4))


def test_a_converted_cell_is_one_of_ours():
    assert vars(rnn_ext.convert(nn.GRUCell(3, 4))).keys() == vars(rnn_ext.GRUCell(3, 4)).keys()


KINDS = ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"]


@pytest.mark.parametrize("kind", KINDS)
def test_as_subclass(kind):
    """What asks for torch's class finds it, and all else is as of our layers."""
    native = getattr(nn, kind)(5, 4)
    input = torch.randn(3, 5) if "Cell" in kind else torch.randn(6, 3, 5)
    expected = tree_leaves(native(input))
    layer = rnn_ext.convert(copy.deepcopy(native), "custom", as_subclass=True)
    assert type(layer) is getattr(subclasses, kind)
    assert isinstance(layer, getattr(nn, kind)) and isinstance(layer, getattr(rnn_ext, kind))
    copies = [layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    for each in copies:
        assert each.backend == "custom" and type(each) is type(layer)
        for found, want in zip(tree_leaves(each(input)), expected, strict=True):
            torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    assert rnn_ext.explain(layer, input).backend == "custom"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rnn_ext.convert(layer) is layer and type(layer) is getattr(subclasses, kind)  # is one of ours already
        assert rnn_ext.set_backend(layer, "native").backend == "native"
        assert type(rnn_ext.to_native(layer)) is getattr(nn, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_subclasses_made_directly(kind):
    """With every argument: the same parameters as torch's class from the same seed; also a class of the user's own."""
    arguments, options = (5, 4), {"bias": False, "dtype": torch.float64}
    if "Cell" not in kind:
        options |= {"num_layers": 2, "batch_first": True, "bidirectional": True}
    mine = type("Mine", (getattr(rnn_ext, kind), getattr(nn, kind)), {})
    made = []
    for make in (getattr(nn, kind), getattr(subclasses, kind), mine):
        torch.manual_seed(3)
        made.append(make(*arguments, **options))
    native, *ours = made
    for layer in ours:
        assert str(layer).partition("(")[2] == str(native).partition("(")[2]
        for (name, got), (expected_name, want) in zip(layer.named_parameters(), native.named_parameters(), strict=True):
            assert name == expected_name and torch.equal(got, want)


def test_subclasses_compile_where_torch_lets_them():
    layer, input = subclasses.GRU(5, 4), torch.randn(6, 3, 5)
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(input), layer(input))
    torch._dynamo.reset()


@pytest.mark.parametrize("change", [rnn_ext.convert, rnn_ext.to_native])
def test_what_is_no_module(change):
    for given, found in (("abc", "str"), (nn.LSTM, "the class LSTM"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"expected a module, got {found}"):
            change(given)


@pytest.mark.parametrize("base", [nn.LSTM, rnn_ext.LSTM, rnn_ext.subclasses.LSTM], ids=["torch", "ours", "both"])
def test_one_warning_for_each_subclass(base):
    kind = type("Mine", (base,), {})
    model = nn.Sequential(kind(5, 4), nn.GRU(4, 4))
    with pytest.warns(UserWarning) as caught:
        rnn_ext.convert(model, as_subclass=True)
    assert [str(warning.message) for warning in caught] == ["0 is left as it is: Mine is a subclass"]
    assert type(model[0]) is kind and type(model[1]) is rnn_ext.subclasses.GRU


def test_our_layers_as_subclasses():
    """With the options they have."""
    layer = rnn_ext.LSTM(5, 4, backend="custom", recompute=True, zoneout=0.5)
    assert rnn_ext.convert(layer, as_subclass=True) is layer
    assert type(layer) is subclasses.LSTM
    assert (layer.backend, layer.recompute, layer.zoneout) == ("custom", True, 0.5)
