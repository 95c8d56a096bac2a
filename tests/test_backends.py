"""Which backend computes a call, what it says about it, and that both compute the same."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import rnn_ext
from rnn_ext import backends, ops

LAYERS = [rnn_ext.RNN, rnn_ext.GRU, rnn_ext.LSTM]


@pytest.fixture
def calls(monkeypatch):
    """Names of the backends that computed something, in order."""
    log: list[str] = []

    def spy(owner, name, label):
        original = getattr(owner, name)

        def logged(*args, **kwargs):
            results = original(*args, **kwargs)
            if results is not None:  # else it was for another to compute
                log.append(label)
            return results

        monkeypatch.setattr(owner, name, logged)

    for name in ("layer", "stack", "plain_forward"):
        spy(ops, name, "custom")
    spy(backends, "native", "native")
    return log


@pytest.fixture
def no_library(monkeypatch):
    """As if the compiled library could not be loaded."""
    reason = "the library has not been built"
    monkeypatch.setattr(ops, "is_available", lambda: False)
    monkeypatch.setattr(ops, "load_error", lambda: reason)
    monkeypatch.setattr(ops, "plain_forward", lambda *_: None)
    return reason


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("backend", "expected"), [("auto", "custom"), ("custom", "custom"), ("native", "native")])
def test_choice_on_the_cpu(layer, backend, expected, calls):
    module, input = layer(3, 4, backend=backend), torch.randn(5, 2, 3)
    explanation = rnn_ext.explain(module, input)
    assert calls == []  # explaining runs nothing
    module(input)
    assert calls == [expected]
    assert explanation.backend == expected


@pytest.mark.parametrize("short", [False, True])
def test_one_call_for_a_stack_and_one_a_layer_with_dropout(calls, short, monkeypatch):
    if not short:
        monkeypatch.setattr(ops, "plain_forward", lambda *_: None)
    module, input = rnn_ext.LSTM(3, 4, num_layers=3, bidirectional=True), torch.randn(5, 2, 3)
    module(input)
    assert calls == ["custom"]
    module.dropout = 0.5
    module(input)
    assert calls == ["custom"] * (2 if short else 4)  # the short way's are one for Python


@pytest.mark.parametrize("layer", LAYERS)
def test_switching_between_training_steps_changes_nothing(layer, calls):
    """A run that alternates backends has the losses of one that is torch.nn's throughout."""
    input, target = torch.randn(6, 3, 5, dtype=torch.float64), torch.randn(6, 3, 4, dtype=torch.float64)
    losses = {}
    for name, plan in {"native": ["native"] * 6, "mixed": ["custom", "native", "auto"] * 2}.items():
        torch.manual_seed(0)
        module = layer(5, 4, num_layers=2, dtype=torch.float64)
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        losses[name] = []
        for backend in plan:
            rnn_ext.set_backend(module, backend)
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(module(input)[0], target)
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert calls == ["native"] * 6 + ["custom", "native", "custom"] * 2
    assert losses["mixed"] == pytest.approx(losses["native"], rel=1e-10)
    assert losses["native"][-1] < losses["native"][0]


def test_set_backend_reaches_every_layer_of_a_model_and_nothing_else():
    native = nn.LSTM(3, 4)
    model = nn.Sequential(rnn_ext.GRU(2, 3), nn.ModuleDict({"a": rnn_ext.RNN(3, 3), "b": native}), nn.Linear(3, 3))
    assert rnn_ext.set_backend(model, "native") is model
    assert model[0].backend == model[1]["a"].backend == "native"
    assert not hasattr(native, "backend")
    assert rnn_ext.set_backend(rnn_ext.LSTM(2, 3), "custom").backend == "custom"
    with pytest.warns(UserWarning, match="no layer of rnn_ext in this LSTM: rnn_ext.convert makes"):
        rnn_ext.set_backend(native, "custom")
    with pytest.warns(UserWarning, match="no layer with a choice in this LSTM: those of 8 bits have none"):
        rnn_ext.set_backend(rnn_ext.quantize(native), "native")


def test_set_backend_of_no_module():
    for wrong, kind in ((None, "NoneType"), (nn.LSTM, "the class LSTM")):
        with pytest.raises(TypeError, match=f"expected a module, got {kind}"):
            rnn_ext.set_backend(wrong, "auto")


def test_options_that_are_off_are_none():
    layer = rnn_ext.GRU(3, 4)
    layer.zoneout = (0.0, 0.0)
    rnn_ext.quantize(copy.deepcopy(layer))
    assert type(rnn_ext.to_native(layer)) is nn.GRU


@pytest.mark.parametrize("bad", ["fast", "", "Custom", None, 1])
def test_unknown_backend(bad):
    """Named with the choices wherever it comes in, before anything is changed."""
    module = rnn_ext.GRU(3, 4)
    message = rf"Unknown backend {bad!r}. Select from 'auto', 'custom', 'native'"
    with pytest.raises(ValueError, match=message):
        rnn_ext.LSTM(3, 4, backend=bad)
    with pytest.raises(ValueError, match=message):
        rnn_ext.set_backend(module, bad)
    with pytest.raises(ValueError, match=message):
        rnn_ext.convert(nn.GRU(3, 4), backend=bad)
    assert module.backend == "auto"
    module.backend = bad
    with pytest.raises(ValueError, match=message):
        module(torch.randn(2, 1, 3))
    with pytest.raises(ValueError, match=message):
        rnn_ext.explain(module, torch.randn(2, 1, 3))
    with pytest.raises(ValueError, match=message):
        rnn_ext.functional.gru(torch.randn(2, 1, 3), None, list(module.parameters()), backend=bad)


@pytest.mark.parametrize("layer", LAYERS)
def test_without_the_library(layer, no_library, calls):
    """auto still works and says why it is not ours, custom repeats the reason."""
    module, input = layer(3, 4), torch.randn(5, 2, 3)
    explanation = rnn_ext.explain(module, input)
    assert (explanation.backend, explanation.reason) == ("native", no_library)
    expected = rnn_ext.set_backend(module, "native")(input)[0]
    assert torch.equal(rnn_ext.set_backend(module, "auto")(input)[0], expected)
    assert calls == ["native", "native"]
    rnn_ext.set_backend(module, "custom")
    for call in (module, lambda input: rnn_ext.explain(module, input)):
        with pytest.raises(RuntimeError, match=f"backend 'custom' cannot run this input: {no_library}"):
            call(input)


def test_can_run_custom():
    """By dtype and device; a reason either way."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert backends.can_run_custom(torch.zeros(1, dtype=dtype))[0]
    assert backends.can_run_custom(torch.zeros(1, device="meta"))[0]
    supported, reason = backends.can_run_custom(torch.zeros(1, dtype=torch.complex64))
    assert not supported and "torch.complex64" in reason
    with pytest.raises(RuntimeError, match="complex64"):
        rnn_ext.RNN(3, 4, dtype=torch.complex64, backend="custom")(torch.zeros(2, 1, 3, dtype=torch.complex64))


def test_auto_gives_what_we_do_not_support_to_torch(calls):
    torch.manual_seed(0)
    module = rnn_ext.RNN(3, 4, dtype=torch.complex64)
    torch.manual_seed(0)
    native = nn.RNN(3, 4, dtype=torch.complex64)
    input = torch.randn(5, 2, 3, dtype=torch.complex64)
    assert torch.equal(module(input)[0], native(input)[0])
    assert calls == ["native"]
    assert "complex64" in rnn_ext.explain(module, input).reason


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("layer", LAYERS)
def test_on_a_gpu(layer):
    module, input = layer(3, 4, device="cuda"), torch.randn(5, 2, 3, device="cuda")
    explanation = rnn_ext.explain(module, input)
    with torch.backends.cudnn.flags(allow_tf32=False):  # which rounds factors to 10 bits
        output, _ = module(input)
    expected, _ = rnn_ext.set_backend(module.cpu(), "native")(input.cpu())
    assert explanation.backend in ("custom", "native") and explanation.reason
    torch.testing.assert_close(output.cpu(), expected, rtol=1e-4, atol=1e-5)


def test_explanation():
    module, input = rnn_ext.LSTM(3, 4), torch.randn(5, 2, 3)
    explanation = rnn_ext.explain(module, input, (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)))
    assert str(explanation) == f"custom ({explanation.kernel}): {explanation.reason}"
    assert explanation.kernel == f"rnn_ext::layer lstm, {ops.cpu_capability(torch.float32)}"
    with pytest.raises(dataclasses.FrozenInstanceError):
        explanation.backend = "native"
    assert rnn_ext.explain(module, pack_sequence([input[:, 0]])) == explanation
    module.backend = "native"
    explanation = rnn_ext.explain(module, input)
    assert (explanation.backend, explanation.kernel) == ("native", "torch.lstm")
    assert explanation.reason == "backend='native' was asked for"
    for other in (nn.LSTM(3, 4), nn.Linear(3, 4), nn.Sequential(module)):
        with pytest.raises(TypeError, match=type(other).__name__):
            rnn_ext.explain(other, input)


def test_explanation_says_what_the_build_left_out(monkeypatch):
    layer, x = rnn_ext.GRU(4, 4), torch.randn(5, 2, 4)
    for module in (layer, rnn_ext.quantize(layer)):
        monkeypatch.setattr("rnn_ext._C.missing_cpu_capability", lambda: None)
        assert "processor" not in rnn_ext.explain(module, x).reason
        monkeypatch.setattr("rnn_ext._C.missing_cpu_capability", lambda: "avx512")
        assert "this processor has avx512, but the library was built without it" in rnn_ext.explain(module, x).reason


@pytest.mark.parametrize("granted", [True, False])
def test_explanation_names_tiles_only_where_they_multiply(monkeypatch, granted):
    monkeypatch.setattr("rnn_ext._C.cpu_capability", lambda: "amx")
    monkeypatch.setattr("rnn_ext._C.multiplies_tiles", lambda: granted)
    layer, x = rnn_ext.GRU(4, 4), torch.randn(5, 2, 4)
    tiles = "amx" if granted else "avx512"
    for dtype, level in ((torch.float32, "avx512"), (torch.float16, "avx512"), (torch.bfloat16, tiles)):
        assert rnn_ext.explain(layer.to(dtype), x.to(dtype)).kernel == f"rnn_ext::layer gru, {level}"
    for activations, level in ((16, "avx512"), (8, tiles)):
        quantized = rnn_ext.quantize(rnn_ext.GRU(4, 4), activations)
        assert rnn_ext.explain(quantized, x).kernel == f"rnn_ext::quantized_layer gru, {level}"


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_native_runs_lengths(layer, batch_first):
    """By packing; rows without a timestep and the padding, NaN included, change nothing: values and gradients."""
    lengths = [3, 0, 5, 1, 0]
    real = torch.tensor(lengths)
    torch.manual_seed(0)
    module = layer(3, 4, 2, bidirectional=True, batch_first=batch_first, dtype=torch.float64, backend="native")
    input = torch.randn(5, 5, 3, dtype=torch.float64)
    padding = torch.arange(5).unsqueeze(1) >= real
    input[padding] = float("nan")
    states = [torch.randn(4, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    hx = tuple(states) if layer is rnn_ext.LSTM else states[0]
    given = input.transpose(0, 1) if batch_first else input
    for form in (lengths, tuple(lengths), real, real.to(torch.uint8), real.to(torch.int32)):
        output, state = module(given, hx, lengths=form)
        output = output.transpose(0, 1) if batch_first else output
        state = state if layer is rnn_ext.LSTM else (state,)
        assert not output[padding].any()
        for n, length in enumerate(lengths):
            given_state = tuple(s[:, n] for s in states[: len(state)])
            if length == 0:
                expected, expected_state = output[:0, n], given_state
            else:
                alone = given_state if layer is rnn_ext.LSTM else given_state[0]
                expected, expected_state = module(input[:length, n], alone)
                expected_state = expected_state if layer is rnn_ext.LSTM else (expected_state,)
            torch.testing.assert_close(output[:length, n], expected, rtol=1e-12, atol=1e-12)
            for s, e in zip(state, expected_state, strict=True):
                torch.testing.assert_close(s[:, n], e, rtol=1e-12, atol=1e-12)
    output.sum().backward(retain_graph=True)
    assert all(p.grad.isfinite().all() and p.grad.any() for p in module.parameters())
    without_state = module(given, lengths=lengths)[1]
    for s in without_state if layer is rnn_ext.LSTM else (without_state,):
        assert not s[:, [1, 4]].any() and s[:, [0, 2, 3]].all()


@pytest.mark.parametrize("backend", ["custom", "native"])
@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([5, 6, 1], ValueError, "between 0 and 5, got 6 for batch entry 1"),
        ([5, -1, 1], ValueError, "between 0 and 5, got -1 for batch entry 1"),
        (torch.tensor([5, 6, 1]), ValueError, "between 0 and 5, got 6 for batch entry 1"),
        (torch.tensor([5, -1, 1]), ValueError, "between 0 and 5, got -1 for batch entry 1"),
        ([5, 1], ValueError, r"\(3,\).*\[2\]"),
        ([], ValueError, r"\(3,\).*\[0\]"),
        (torch.tensor([[5, 1, 1]]), ValueError, r"\(3,\).*\[1, 3\]"),
        (torch.tensor(5), ValueError, r"\(3,\).*\[\]"),
        ([5, 2.5, 1], TypeError, "2.5"),
        ([5, True, 1], TypeError, "True"),
        ([5, None, 1], TypeError, "None"),
        (["5", "1", "1"], TypeError, "'5'"),
        (torch.tensor([5.0, 1.0, 1.0]), TypeError, "float32"),
        (torch.tensor([True, True, True]), TypeError, "bool"),
        (5, TypeError, "int"),
        ({5, 1, 2}, TypeError, "set"),
    ],
)
def test_bad_lengths(backend, lengths, error, message):
    with pytest.raises(error, match=f"lengths.*({message})"):
        rnn_ext.GRU(2, 4, backend=backend)(torch.zeros(5, 3, 2), lengths=lengths)


@pytest.mark.parametrize("backend", ["custom", "native"])
@pytest.mark.parametrize(
    ("resets", "error", "message"),
    [
        (torch.zeros(3, 5, dtype=torch.bool), ValueError, r"\[5, 3\].*\[3, 5\]"),
        (torch.zeros(5, dtype=torch.bool), ValueError, r"\[5, 3\].*\[5\]"),
        (torch.zeros(5, 3), TypeError, "float32"),
        (torch.zeros(5, 3, dtype=torch.uint8), TypeError, "uint8"),
        ([[False] * 3] * 5, TypeError, "list"),
    ],
)
def test_bad_resets(backend, resets, error, message):
    with pytest.raises(error, match=f"resets.*{message}"):
        rnn_ext.GRU(2, 4, backend=backend)(torch.zeros(5, 3, 2), resets=resets)


def test_what_only_custom_can_do(no_library):
    """Asking the native backend for it names the option, whether native was asked for or fallen back to."""
    input, resets = torch.zeros(5, 3, 2), torch.zeros(5, 3, dtype=torch.bool)
    for backend in ("native", "auto"):
        with pytest.raises(ValueError, match="resets is an option of the custom backend"):
            rnn_ext.GRU(2, 4, backend=backend)(input, resets=resets)
        with pytest.raises(ValueError, match="return_cell_states is an option of the custom backend"):
            rnn_ext.LSTM(2, 4, backend=backend)(input, return_cell_states=True)


def test_packed_input_has_its_own_lengths():
    packed = pack_sequence([torch.zeros(4, 2), torch.zeros(2, 2)])
    for extra in ({"lengths": [4, 2]}, {"resets": torch.zeros(4, 2, dtype=torch.bool)}):
        with pytest.raises(ValueError, match="PackedSequence"):
            rnn_ext.GRU(2, 4)(packed, **extra)


def test_native_refuses_a_state_of_another_batch_size():
    """torch's kernels would read it wrongly for a sorted PackedSequence."""
    packed = pack_sequence([torch.zeros(4, 2), torch.zeros(2, 2)])
    for batch in (1, 3):
        with pytest.raises(RuntimeError, match=rf"2 sequences.*\[1, {batch}, 4\]"):
            rnn_ext.GRU(2, 4, backend="native")(packed, torch.zeros(1, batch, 4))


def test_explain_of_what_is_no_tensor():
    with pytest.raises(TypeError, match="explain: expected input as a tensor or a PackedSequence, got NoneType"):
        rnn_ext.explain(rnn_ext.GRU(3, 4), None)


def test_explain_names_what_native_lacks():
    """Whichever runs: native would refuse the call, as it says itself."""
    module, input = rnn_ext.LSTM(3, 4, layer_norm=True, zoneout=(0.0, 0.1), recurrent_dropout=0.2), torch.randn(5, 2, 3)
    explanation = rnn_ext.explain(module, input)
    assert explanation.backend == "custom"
    lacks = "native would refuse it, which has no layer_norm and no zoneout"
    assert explanation.reason.endswith(f"{lacks} and no recurrent_dropout")
    assert rnn_ext.explain(module.eval(), input).reason.endswith(lacks)
    module.backend = "native"
    assert lacks in rnn_ext.explain(module, input).reason
    with pytest.raises(ValueError, match="layer_norm is an option of the custom backend"):
        module(input)
    plain = rnn_ext.LSTM(3, 4, zoneout=(0.0, 0.0), weight_dropout=0.5)
    assert "refuse" not in rnn_ext.explain(plain, input).reason
    assert "refuse" not in rnn_ext.explain(plain, input, lengths=[5, 1]).reason
    reason = rnn_ext.explain(plain, input, resets=torch.zeros(5, 2) > 0, return_cell_states=True).reason
    assert reason.endswith("native would refuse it, which has no resets and no return_cell_states")
    assert "refuse" not in rnn_ext.explain(rnn_ext.LSTMCell(3, 4), input[0]).reason


def test_native_projection_without_biases():
    """Its weights are as many as those of a layer with biases and without projection, less one."""
    layer, plain = rnn_ext.LSTM(3, 4, bias=False, proj_size=2, backend="native"), nn.LSTM(3, 4, bias=False, proj_size=2)
    plain.load_state_dict(layer.state_dict())
    input = torch.randn(5, 2, 3)
    assert torch.equal(layer(input)[0], plain(input)[0])


def test_set_backend_leaves_other_modules_alone():
    class Other(nn.Module):
        backend = "gloo"

    model = nn.Sequential(Other(), rnn_ext.GRU(3, 4))
    rnn_ext.set_backend(model, "native")
    assert (model[0].backend, model[1].backend) == ("gloo", "native")
    with pytest.raises(TypeError, match="got Other"):
        rnn_ext.explain(model[0], torch.zeros(1))


def test_native_breaks_the_graph():
    """torch's kernels would unroll, or fail."""
    torch._dynamo.reset()
    layer = torch.compile(rnn_ext.GRU(3, 4, backend="native"), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        layer(torch.randn(5, 2, 3))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("length", "batch"), [(0, 2), (5, 0)])
def test_native_lengths_of_nothing(length, batch, batch_first):
    layer = rnn_ext.GRU(3, 4, batch_first=batch_first, backend="native")
    input = torch.randn(*((batch, length) if batch_first else (length, batch)), 3)
    h_0 = torch.randn(1, batch, 4)
    output, h_n = layer(input, h_0, lengths=[0] * batch)
    assert output.shape == (*input.shape[:2], 4) and torch.equal(h_n, h_0)
