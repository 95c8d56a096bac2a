"""Layers with options: what they draw, what they refuse, torch's tools."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from test_variants import MODULES, options_of
from torch import Tensor
from util import NORMS

import rnn_ext
from rnn_ext import backends, functional, ops


def test_weight_dropout_is_drawn_once_for_torchs_kernels(monkeypatch):
    """Though what runs sequences of lengths on them packs these and begins anew."""
    layer = rnn_ext.GRU(3, 64, weight_dropout=0.5, backend="native")
    seen, native = [], backends.native
    monkeypatch.setattr(backends, "native", lambda *args, **kw: seen.append(args[5][1]) or native(*args, **kw))
    layer(torch.randn(5, 2, 3), lengths=[5, 2])
    assert [0.45 < float((weight == 0).float().mean()) < 0.55 for weight in seen] == [True]


def test_two_probabilities_of_zoneout():
    layer = rnn_ext.LSTM(3, 400, zoneout=(0.1, 0.6))
    state = torch.randn(2, 1, 4, 400)
    _, found = layer(torch.randn(1, 4, 3), tuple(state))
    kept = [float((new == old).float().mean()) for new, old in zip(found, state, strict=True)]
    assert 0.05 < kept[0] < 0.15 and 0.55 < kept[1] < 0.65


EVERY = [(cell, options) for cell in MODULES for options in options_of(cell)]


EVERY_ID = [f"{cell}-{'+'.join(options)}-{i}" for i, (cell, options) in enumerate(EVERY)]


@pytest.mark.parametrize(("cell", "options"), EVERY, ids=EVERY_ID)
def test_module_draws_what_it_says(cell, options, monkeypatch):
    """The masks that reach the op: of the right values and sizes, one for each layer; parameters are left alone."""
    torch.manual_seed(0)
    module = MODULES[cell](3, 40, 2, bidirectional=True, batch_first=True, **options)
    before = copy.deepcopy(module.state_dict())
    x = torch.randn(5, 30, 3)
    calls = []
    layer = ops.layer
    monkeypatch.setattr(ops, "layer", lambda *args: (calls.append(args), layer(*args))[1])
    monkeypatch.setattr(ops, "stack", lambda *args: None)  # a layer at a time
    monkeypatch.setattr(ops, "plain_forward", lambda *args: None)
    module(x)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    assert len(calls) == 2
    masks_of = [args[11] if len(args) > 11 else () for args in calls]
    p = options.get("weight_dropout", 0)
    count = len(module._flat_weights) // 2
    for k, args in enumerate(calls):
        for i, (used, own) in enumerate(zip(args[3], module._flat_weights[k * count : (k + 1) * count], strict=True)):
            if p and i % (count // 2) == 1:
                dropped = used == 0
                assert abs(dropped.float().mean() - p) < 0.05
                torch.testing.assert_close(used, (own / (1 - p)).masked_fill(dropped, 0))
            else:
                assert used is own
    wanted = (
        options.get("recurrent_dropout", 0),
        *(functional.check_extras(cell, False, options.get("zoneout", 0), 0, 0)[1]),
    )
    for masks, p, shape, scaled in zip(
        zip(*(m or (None,) * 3 for m in masks_of), strict=True),
        wanted,
        ((2, 5, 40), (5, 30, 80), (5, 30, 80)),
        (True, False, False),
        strict=True,
    ):
        if not p:
            assert masks == (None, None)
            continue
        assert not torch.equal(*masks)
        for mask in masks:
            assert mask.shape == shape
            hit = mask == 0 if scaled else mask == 1
            torch.testing.assert_close(mask[~hit], torch.full_like(mask[~hit], 1 / (1 - p) if scaled else 0))
            assert abs(hit.float().mean() - p) < 4 * math.sqrt(p * (1 - p) / mask.numel())


@pytest.mark.parametrize(("cell", "options"), EVERY, ids=EVERY_ID)
def test_module_in_eval_and_from_a_seed(cell, options):
    torch.manual_seed(0)
    module = MODULES[cell](3, 4, 2, dtype=torch.float64, **options)
    x = torch.randn(6, 2, 3, dtype=torch.float64)

    def seeded(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return module(x)[0]

    assert torch.equal(seeded(1), seeded(1))
    assert torch.equal(seeded(1), seeded(2)) == (options == {"layer_norm": True})
    module.eval()
    assert torch.equal(seeded(1), seeded(2))
    plain = MODULES[cell](3, 4, 2, dtype=torch.float64, layer_norm=True) if options.get("layer_norm") else None
    plain = plain or MODULES[cell](3, 4, 2, dtype=torch.float64)
    plain.load_state_dict(module.state_dict())
    if "zoneout" not in options:
        assert torch.equal(module(x)[0], plain(x)[0])
    else:
        # The expectation, layer by layer.
        p_h, p_c = functional.check_extras(cell, False, options["zoneout"], 0, 0).zoneout
        want = x
        count = len(module._flat_weights) // 2
        for k in range(2):
            masks = [None, torch.full((6, 2, 4), p_h), torch.full((6, 2, 4), p_c) if cell == "lstm" else None]
            weights = module._flat_weights[k * count : (k + 1) * count]
            want = ops.layer(want, None, None, weights, module.mode.lower(), masks=masks)[0]
        torch.testing.assert_close(module(x)[0], want, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(module(x)[0], plain(x)[0])


@pytest.mark.parametrize("training", [True, False])
def test_compiled(training):
    torch.manual_seed(0)
    module = rnn_ext.LSTM(
        3, 4, 2, bidirectional=True, layer_norm=True, zoneout=(0.1, 0.2), recurrent_dropout=0.3, weight_dropout=0.4
    ).train(training)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for length in (5, 7):
        x = torch.randn(length, 2, 3, requires_grad=True)
        found = []
        for call in (module, compiled):
            torch.manual_seed(1)
            output, _ = call(x)
            found.append((output, *torch.autograd.grad(output.square().sum(), (x, *module.parameters()))))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want)


def test_layer_norm_parameters():
    torch.manual_seed(0)
    module = rnn_ext.LSTM(3, 4, 2, bidirectional=True, proj_size=2, layer_norm=True, dtype=torch.float64)
    torch.manual_seed(0)
    plain = torch.nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2, dtype=torch.float64)
    for name, parameter in plain.named_parameters():
        assert torch.equal(module.get_parameter(name), parameter)
    suffixes = ["_l0", "_l0_reverse", "_l1", "_l1_reverse"]
    new = set(dict(module.named_parameters())) - set(dict(plain.named_parameters()))
    assert new == {name + suffix for name in NORMS for suffix in suffixes}
    for suffix in suffixes:
        assert [module.get_parameter(name + suffix).numel() for name in NORMS] == [16, 16, 4, 4]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7)
    module.reset_parameters()
    for name, parameter in module.named_parameters():
        if "_norm_" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.startswith("weight")))), name
        else:
            assert 0 < parameter.abs().max() <= 0.5, name
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    want = module(x)[0]
    other = rnn_ext.LSTM(3, 4, 2, bidirectional=True, proj_size=2, layer_norm=True, dtype=torch.float64)
    other.load_state_dict(module.state_dict())
    for same in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(same(x)[0], want) and same.layer_norm
    assert len(module.all_weights) == 4 and len(module.all_weights[0]) == 9
    assert rnn_ext.LSTM(3, 4, layer_norm=True, device="meta").weight_norm_c_l0.is_meta


@pytest.mark.parametrize("layer_norm", [False, True])
def test_layer_norm_is_fixed(layer_norm):
    """The weights are there or not: a switch would say what the layer does not do."""
    module = rnn_ext.LSTM(3, 4, layer_norm=layer_norm)
    module.layer_norm = layer_norm
    for layer in (module, rnn_ext.GRU(3, 4)):
        with pytest.raises(AttributeError, match=f"fixed .* expected {layer.layer_norm}, got {not layer.layer_norm}"):
            layer.layer_norm = not layer.layer_norm
    assert module.layer_norm is layer_norm and ("layer_norm" in repr(module)) is layer_norm
    state = module.step(torch.randn(2, 3))[1]
    assert torch.equal(module(torch.ones(1, 2, 3), state)[0][0], module.step(torch.ones(2, 3), state)[0])


def test_module_options_are_seen():
    module = rnn_ext.LSTM(3, 4, layer_norm=True, zoneout=(0.1, 0.2), recurrent_dropout=0.3, weight_dropout=0.4)
    assert "layer_norm=True, zoneout=(0.1, 0.2), recurrent_dropout=0.3, weight_dropout=0.4" in repr(module)
    assert "zoneout" not in repr(rnn_ext.LSTM(3, 4))
    same = pickle.loads(pickle.dumps(module))
    assert (same.zoneout, same.recurrent_dropout, same.weight_dropout) == ((0.1, 0.2), 0.3, 0.4)


def test_functional():
    torch.manual_seed(0)
    module = rnn_ext.LSTM(3, 4, 2, layer_norm=True, zoneout=0.1, recurrent_dropout=0.2, weight_dropout=0.3)
    x = torch.randn(5, 2, 3)
    torch.manual_seed(1)
    want = module(x)[0]
    torch.manual_seed(1)
    options = {"zoneout": 0.1, "recurrent_dropout": 0.2, "weight_dropout": 0.3, "training": True, "num_layers": 2}
    assert torch.equal(functional.lstm(x, None, module._flat_weights, **options)[0], want)


@pytest.mark.parametrize(
    ("options", "training", "named_option"),
    [
        ({"layer_norm": True}, False, "layer_norm"),
        ({"zoneout": 0.1}, False, "zoneout"),
        ({"recurrent_dropout": 0.1}, True, "recurrent_dropout"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else str(value),
)
def test_native_backend_refuses(options, training, named_option):
    model = torch.nn.Sequential(torch.nn.Identity(), rnn_ext.LSTM(3, 4, **options)).train(training)
    rnn_ext.set_backend(model, "native")
    with pytest.raises(ValueError, match=f"{named_option} is an option of the custom backend"):
        model(torch.randn(5, 2, 3))
    with pytest.raises(ValueError, match=f"1 has {named_option}=.*torch.nn"):
        rnn_ext.to_native(model)
    assert type(model[1]) is rnn_ext.LSTM and model[1].backend == "native"


def test_native_backend_can_do_the_rest():
    """Weight dropout happens before the kernel; recurrent dropout does nothing in eval."""
    torch.manual_seed(0)
    module = rnn_ext.GRU(3, 4, 2, weight_dropout=0.5, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    found = []
    for backend in ("custom", "native"):
        module.backend = backend
        torch.manual_seed(1)
        found.append(module(x)[0])
    torch.testing.assert_close(*found)
    module.weight_dropout, module.recurrent_dropout = 0.0, 0.5
    module.eval()(x)


@pytest.mark.parametrize("option", ["zoneout", "recurrent_dropout", "weight_dropout"])
def test_bad_probabilities(option):
    for bad in (-0.1, 1.0, 1.5, math.nan):
        with pytest.raises(ValueError, match=rf"{option} must be a probability in \[0, 1\), got {bad}"):
            rnn_ext.LSTM(3, 4, **{option: bad})
        module = rnn_ext.LSTM(3, 4)
        setattr(module, option, bad)
        with pytest.raises(ValueError, match=f"{option} must be"):
            module(torch.randn(5, 2, 3))
    for bad in ("0.1", None, True, [0.1]):
        with pytest.raises(TypeError, match=f"{option} must be a"):
            rnn_ext.LSTM(3, 4, **{option: bad})


def test_numbers_of_numpy_and_pairs_of_nothing():
    numpy = pytest.importorskip("numpy")
    layer = rnn_ext.LSTM(3, 4, zoneout=numpy.float32(0.25), recurrent_dropout=numpy.float16(0.5))
    assert (layer.zoneout, layer.recurrent_dropout) == (0.25, 0.5)
    assert type(layer.zoneout) is type(layer.recurrent_dropout) is float
    for pair in ((0, 0), [0.0, 0.0]):
        assert repr(rnn_ext.LSTM(3, 4, zoneout=pair)) == "LSTM(3, 4)"
        assert type(rnn_ext.to_native(rnn_ext.LSTM(3, 4, zoneout=pair))) is torch.nn.LSTM
    assert rnn_ext.LSTM(3, 4, zoneout=(0, 0.1)).zoneout == (0, 0.1)
    layer = rnn_ext.LSTM(3, 4)
    for kind in (numpy.float64, numpy.float32):  # as a schedule may set them later
        layer.zoneout = kind(0.25)
        assert "zoneout=" in repr(layer)
        for refuses in (rnn_ext.to_native, rnn_ext.quantize):
            with pytest.raises(ValueError, match=r"zoneout=.*0\.25"):
                refuses(layer)
    layer.zoneout = [numpy.float64(0), 0.0]
    assert repr(layer) == "LSTM(3, 4)" and type(rnn_ext.to_native(layer)) is torch.nn.LSTM


def test_bad_options():
    with pytest.raises(TypeError, match=r"zoneout must be a number, got \(0.1, 0.2\)"):
        rnn_ext.GRU(3, 4, zoneout=(0.1, 0.2))
    with pytest.raises(TypeError, match="zoneout must be a number or a pair"):
        rnn_ext.LSTM(3, 4, zoneout=(0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match=r"zoneout must be a probability in \[0, 1\), got 2"):
        rnn_ext.LSTM(3, 4, zoneout=(0.1, 2))
    with pytest.raises(TypeError, match="layer_norm must be a bool, got 1"):
        rnn_ext.LSTM(3, 4, layer_norm=1)
    with pytest.raises(TypeError, match="layer_norm"):
        rnn_ext.GRU(3, 4, layer_norm=True)


def test_zoneout_of_h_and_of_c():
    """Two probabilities, of which each counts; with a projection too."""
    input = torch.randn(5, 2, 3)
    torch.manual_seed(0)
    layer = rnn_ext.LSTM(3, 4, zoneout=(0.1, 0.6)).eval()
    for other in ((0.1, 0.1), (0.6, 0.6)):
        torch.manual_seed(0)
        assert not torch.allclose(layer(input)[0], rnn_ext.LSTM(3, 4, zoneout=other).eval()(input)[0])
    projected = rnn_ext.LSTM(3, 4, proj_size=2, zoneout=0.2)
    for training in (True, False):
        assert projected.train(training)(input)[0].shape == (5, 2, 2)
    assert functional.check_extras("lstm", False, [0.1, 0.2], 0, 0).zoneout == (0.1, 0.2)
    with pytest.raises(ValueError, match="zoneout is an option of the custom backend"):
        rnn_ext.LSTM(3, 4, zoneout=(0.0, 0.1), backend="native")(input)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_options_in_16_bits(dtype):
    """A probability is not rounded to 1, nor a mask to another dtype than the weight's."""
    input = torch.randn(5, 2, 3, dtype=dtype)
    assert (rnn_ext.GRU(3, 4, zoneout=0.999, dtype=dtype).eval()(input)[0] != 0).any()
    for backend in ("custom", "native"):
        layer = rnn_ext.GRU(3, 4, weight_dropout=0.5, dtype=dtype, backend=backend)
        assert layer(input)[0].dtype == dtype


def test_normalisation_begins_as_none():
    for name, parameter in rnn_ext.LSTM(3, 4, 2, layer_norm=True).named_parameters():
        if "_norm_" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.startswith("weight")))), name
