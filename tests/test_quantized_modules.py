"""Modules with weights of 8 bits: what they compute, checkpoints, other tools, mistakes."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from test_quantized import TOLERANCE, bits, kinds, rounded, run
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence
from util import Case, build

import rnn_ext
from rnn_ext import ops, quantized


def layer_of(kind: str, options: dict, **more: object) -> nn.Module:
    return getattr(rnn_ext, kind)(12, 20, **options, **more).eval()


def state_of(layer: nn.Module, batch: int, seed: int = 3) -> object:
    generator = torch.Generator().manual_seed(seed)
    states = layer.num_layers * (2 if layer.bidirectional else 1)
    h_0 = torch.randn(states, batch, layer.proj_size or layer.hidden_size, generator=generator)
    c_0 = torch.randn(states, batch, layer.hidden_size, generator=generator)
    return (h_0, c_0) if layer.mode == "LSTM" else h_0


def flat(results: object) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(results) if isinstance(x, Tensor) and x.is_floating_point()]


def assert_same(actual: object, expected: object) -> None:
    for got, want in zip(flat(actual), flat(expected), strict=True):
        assert torch.equal(got, want)


@kinds
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_stack_computes_what_its_rounded_weights_do(kind, options, batch_first, bidirectional, bias):
    layer = layer_of(
        kind, options, num_layers=2, batch_first=batch_first, bidirectional=bidirectional, bias=bias, dropout=0.5
    )
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    ours = rnn_ext.quantize(copy.deepcopy(layer))
    assert type(ours) is getattr(quantized, kind) and not list(ours.parameters())
    floats = ours.dequantized()
    for name, value in floats.state_dict().items():
        largest = before[name].abs().amax(-1, keepdim=True)
        assert ((value - before[name]).abs() <= (largest * 0.5001 / 127 if name.startswith("weight") else 0)).all()
        assert name.startswith("bias") or not torch.equal(value, before[name])
    exact = floats.double()
    x = torch.randn(4, 9, 12)
    batch = 4 if batch_first else 9
    lengths = torch.arange(batch) % 5
    resets = torch.rand(4, 9) < 0.3
    hx = state_of(layer, batch)
    wide = torch.utils._pytree.tree_map(lambda t: t.double(), hx)
    for more in ({}, {"lengths": lengths}, {"resets": resets}):
        for state, wide_state in ((None, None), (hx, wide)):
            actual, expected = ours(x, state, **more), exact(x.double(), wide_state, **more)
            for got, want in zip(flat(actual), flat(expected), strict=True):
                torch.testing.assert_close(got.double(), want, atol=TOLERANCE, rtol=0)
    assert_same(ours.train()(x), ours.eval()(x))  # there is no dropout


@bits
@kinds
def test_packed_and_unbatched_input(kind, options, activations):
    layer = rnn_ext.quantize(layer_of(kind, options, bidirectional=True), activations)
    sequences = [torch.randn(n, 12) for n in (3, 7, 1)]
    hx = state_of(layer, 3)
    one = [torch.utils._pytree.tree_map(lambda t, n=n: t[:, n], hx) for n in range(3)]
    output, h_n = layer(pack_sequence(sequences, enforce_sorted=False), hx)
    padded, _ = nn.utils.rnn.pad_packed_sequence(output)
    for n, sequence in enumerate(sequences):
        alone, last = layer(sequence, one[n])
        assert torch.equal(padded[: len(sequence), n], alone)
        assert_same(last, torch.utils._pytree.tree_map(lambda t, n=n: t[:, n], h_n))


@bits
@kinds
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_steps_are_the_whole_sequence(kind, options, batch_first, layers, activations):
    layer = rnn_ext.quantize(layer_of(kind, options, num_layers=layers, batch_first=batch_first), activations)
    x = torch.randn(3, 5, 12)
    for input, along in ((x, 1 if batch_first else 0), (x[0], 0)):
        expected, last = layer(input)
        state, outputs = None, []
        for step in input.unbind(along):
            output, state = layer.step(step, state)
            outputs.append(output)
        assert torch.equal(torch.stack(outputs, along), expected)
        assert_same(state, last)


def test_all_cell_states():
    layer = rnn_ext.quantize(layer_of("LSTM", {"proj_size": 5}, bidirectional=True))
    x = torch.randn(4, 3, 12)
    output, (h_n, c_n), cells = layer(x, return_cell_states=True)
    assert torch.equal(cells[-1, :, :20], c_n[0]) and torch.equal(cells[0, :, 20:], c_n[1])
    assert_same(layer(x), (output, (h_n, c_n)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 12)
        self.encoder = nn.ModuleList([nn.GRU(12, 8, batch_first=True), rnn_ext.RNN(8, 8, 2, "relu", batch_first=True)])
        self.decoder = nn.ModuleDict({"a": nn.LSTM(8, 8, bidirectional=True, proj_size=4, batch_first=True)})
        self.tied = self.decoder["a"]
        self.cell = nn.GRUCell(8, 8)
        self.fc = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for layer in (*self.encoder, self.decoder["a"], self.tied):
            x, _ = layer(x)
        return self.fc(self.cell(x[:, -1]))


@pytest.mark.filterwarnings("ignore:.*oneDNN.*")
def test_a_model_in_place():
    model = Model().eval()
    x = torch.randint(0, 30, (3, 6))
    expected = model(x)
    modules = dict(model.named_modules(remove_duplicate=False))
    seen = []
    model.tied.register_forward_hook(lambda *args: seen.append(args))
    assert rnn_ext.quantize(model) is model
    assert dict(model.named_modules(remove_duplicate=False)) == modules
    kinds = [type(module) for module in (*model.encoder, model.tied)]
    assert kinds == [quantized.GRU, quantized.RNN, quantized.LSTM]
    assert type(model.cell) is nn.GRUCell
    with torch.no_grad():
        actual = model(x)
    assert len(seen) == 2
    error = (actual - expected).abs().max()
    assert 0 < error < 0.02, error
    assert rnn_ext.quantize(model) is model  # again: nothing is left to do
    with pytest.raises(ValueError, match=r"encoder\.0 is quantized with activations=16 already, got 8"):
        rnn_ext.quantize(model, 8)


@kinds
def test_checkpoints_copies_and_devices(kind, options):
    layer = layer_of(kind, options, num_layers=2, bidirectional=True)
    expected = rnn_ext.quantize(copy.deepcopy(layer))
    x = torch.randn(4, 3, 12)
    file = io.BytesIO()
    torch.save(expected.state_dict(), file)
    floats = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    assert sum(b.numel() for b in expected.buffers() if b.dtype == torch.int8) < 2 * floats  # padded to 16 units
    file.seek(0)
    other = rnn_ext.quantize(layer_of(kind, options, num_layers=2, bidirectional=True))
    assert not torch.equal(other(x)[0], expected(x)[0])
    other.load_state_dict(torch.load(file, weights_only=True))
    for copied in (other, copy.deepcopy(expected), pickle.loads(pickle.dumps(expected))):
        assert_same(copied(x), expected(x))
        assert repr(copied) == repr(expected)
    hint = rf"checkpoint has weights of 8 bits, {kind} has not: rnn_ext.quantize\(model, activations=16\) before you"
    with pytest.raises(RuntimeError, match=hint):
        layer.load_state_dict(expected.state_dict())
    with pytest.raises(RuntimeError, match="has weights of 8 bits, the checkpoint has not: load it before"):
        expected.load_state_dict(layer.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_size": 63}, "with activations=16, input_size=63, .* expected activations=16, input_size=64"),
        ({"bias": False}, "with .* bias=0; expected .* bias=1"),
        ({"hidden_size": 31}, "with .* hidden_size=31, .* expected .* hidden_size=32"),
        ({"activations": 8}, "with activations=8, .* expected activations=16"),
    ],
)
def test_a_checkpoint_of_another_layer(change, message):
    """Also where padding makes all tensors as large."""

    def made(activations: int = 16, **sizes: object) -> nn.Module:
        own = {"input_size": 64, "hidden_size": 32, "bias": True} | sizes
        return rnn_ext.quantize(nn.Sequential(nn.GRU(**own)), activations)

    with pytest.raises(RuntimeError, match=f"0: the checkpoint is of a layer {message}"):
        made().load_state_dict(made(**change).state_dict())


def test_quantized_on_meta_and_loaded():
    expected = rnn_ext.quantize(nn.Sequential(nn.LSTM(12, 20, num_layers=2)))
    with torch.device("meta"):
        model = nn.Sequential(nn.LSTM(12, 20, num_layers=2))
    rnn_ext.quantize(model).load_state_dict(expected.state_dict(), assign=True)
    x = torch.randn(4, 3, 12)
    assert_same(model(x), expected(x))
    model.to("meta").to_empty(device="cpu").load_state_dict(expected.state_dict())
    assert_same(model(x), expected(x))


def test_quantized_in_inference_mode():
    model = nn.Sequential(nn.LSTM(12, 20))
    with torch.inference_mode():
        rnn_ext.quantize(model)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert not any(buffer.is_inference() for buffer in model.buffers())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_16_bits_keeps_its_scales(dtype):
    layer = rnn_ext.quantize(layer_of("LSTM", {}))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(4, 3, 12).to(dtype)
    expected = layer(x.float())
    model = nn.Sequential(layer).to(dtype)
    assert_same(model[0].state_dict(), before)
    assert_same(model(x), [t.to(dtype) for t in flat(expected)])


def test_autocast_takes_states_of_either_type():
    layer = rnn_ext.quantize(layer_of("LSTM", {}))
    x = torch.randn(4, 3, 12).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        output, (h_n, _) = layer(x, state_of(layer, 3))
    assert output.dtype == h_n.dtype == torch.bfloat16


@kinds
def test_compiled_and_exported(kind, options):
    layer = rnn_ext.quantize(layer_of(kind, options, num_layers=2, bidirectional=True, batch_first=True))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for n, steps in ((3, 5), (4, 7)):
            x = torch.randn(n, steps, 12)
            assert_same(compiled(x, lengths=torch.arange(n)), layer(x, lengths=torch.arange(n)))
    x = torch.randn(3, 5, 12)
    assert_same(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.parametrize("case", [Case("lstm", proj=3, lengths=True), Case("gru", "packed"), Case("rnn_tanh")], ids=str)
def test_opcheck(case):
    problem, weights = rounded(build(case, torch.float32))
    layout = (problem.batch_sizes, problem.lengths, problem.resets, case.cell, case.bidirectional, False, False)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    args = (problem.input, problem.h_0, problem.c_0, weights, *layout)
    torch.library.opcheck(torch.ops.rnn_ext.quantized_layer.default, args, test_utils=tests)


@pytest.mark.parametrize("given", [(), ("lengths",), ("resets",)])
def test_vmap(given):
    layer = rnn_ext.quantize(layer_of("LSTM", {}, batch_first=True, bidirectional=True))
    x = torch.randn(5, 3, 4, 12)
    extra = {"lengths": torch.arange(15).view(5, 3) % 5, "resets": torch.rand(5, 3, 4) < 0.3}
    more = {name: extra[name] for name in given}

    def call(x: Tensor, more: dict[str, Tensor]) -> object:
        return layer(x, **more)

    actual = torch.vmap(call)(x, more)
    for i in range(5):
        expected = call(x[i], {name: value[i] for name, value in more.items()})
        assert_same([t[i] for t in flat(actual)], expected)


def test_explain():
    layer = rnn_ext.quantize(layer_of("GRU", {}))
    explanation = rnn_ext.explain(layer, torch.randn(4, 3, 12))
    assert explanation.backend == "custom" and "8 bits" in explanation.reason
    assert explanation.kernel == f"rnn_ext::quantized_layer gru, {ops.cpu_capability(torch.int16)}"
    with pytest.raises(TypeError, match="expected input as a tensor"):
        rnn_ext.explain(layer, 3)
    with pytest.raises(RuntimeError, match=r"expected float32, bfloat16 or float16, got torch\.float64"):
        rnn_ext.explain(layer, torch.randn(4, 3, 12).double())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_other_tools_say_what_to_do():
    layer = rnn_ext.quantize(layer_of("GRU", {}))
    with pytest.raises(ValueError, match=r"0 has weights of 8 bits, torch\.nn has not: rnn_ext\.dequantize first"):
        rnn_ext.to_native(nn.Sequential(layer, rnn_ext.GRU(3, 4)))
    with pytest.raises(RuntimeError, match=r"script to_native\(dequantize\(model\)\)"):
        torch.jit.script(layer)
    x = torch.randn(4, 3, 12)
    torch.testing.assert_close(rnn_ext.to_native(layer.dequantized())(x)[0], layer(x)[0], rtol=0, atol=TOLERANCE)
    with pytest.raises(RuntimeError, match=r"export rnn_ext\.dequantize\(model\)"):
        torch.onnx.export(nn.Sequential(layer), (x,), io.BytesIO(), dynamo=False)
    assert torch.equal(torch.jit.trace(layer, (x,), check_trace=False)(x)[0], layer(x)[0])
    assert rnn_ext.convert(layer) is layer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rnn_ext.set_backend(nn.Sequential(layer, rnn_ext.GRU(3, 4)), "native")[0] is layer


@bits
@kinds
def test_a_model_there_and_back(kind, options, activations):
    more = {"num_layers": 2, "bidirectional": True, "dropout": 0.5}
    model = nn.Sequential(layer_of(kind, options, **more), nn.Identity())
    seen = []
    model[0].register_forward_hook(lambda *args: seen.append(args))
    model[0].note = "kept"
    before, keys = model[0], list(model.state_dict())
    rnn_ext.quantize(model, activations)
    x = torch.randn(4, 3, 12)
    expected = model(x)[0]
    assert rnn_ext.dequantize(model) is model and rnn_ext.dequantize(model) is model
    assert model[0] is before and type(before) is getattr(rnn_ext, kind) and before.note == "kept"
    assert list(model.state_dict()) == keys and repr(before) == repr(layer_of(kind, options, **more))
    output = model(x)[0]
    assert len(seen) == 2
    torch.testing.assert_close(output, expected, rtol=0, atol=TOLERANCE if activations == 16 else 0.05)
    output.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    again = rnn_ext.quantize(copy.deepcopy(model), activations)
    torch.testing.assert_close(again(x)[0], expected, rtol=0, atol=TOLERANCE if activations == 16 else 0.05)
    native = rnn_ext.to_native(copy.deepcopy(model))
    torch.testing.assert_close(native(x)[0], output, rtol=0, atol=1e-5)
    with pytest.raises(TypeError, match="expected a module"):
        rnn_ext.dequantize(None)


def test_a_dequantized_layer_is_float32_on_the_cpu():
    layer = rnn_ext.quantize(layer_of("LSTM", {"proj_size": 5}, dropout=0.5, num_layers=2))
    torch.set_default_dtype(torch.float64)
    with torch.device("meta"):
        floats = layer.dequantized()
    assert all(p.dtype == torch.float32 and p.is_cpu for p in floats.parameters()) and floats.dropout == 0.5


def test_there_are_no_derivatives():
    layer = rnn_ext.quantize(layer_of("GRU", {}))
    x = torch.randn(4, 3, 12, requires_grad=True)
    missing = r"has no derivative: call quantized layers under torch.no_grad\(\)"
    output, _ = layer(x)
    with pytest.raises(RuntimeError, match=missing):
        output.sum().backward()
    with pytest.raises(NotImplementedError, match=missing):
        torch.func.jvp(lambda x: layer(x)[0], (x.detach(),), (x.detach(),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match=missing):
        layer(torch.autograd.forward_ad.make_dual(x.detach(), x.detach()))
    layer.factors_l0.requires_grad_()
    with pytest.raises(RuntimeError, match=missing):
        layer(x.detach())[0].sum().backward()


def test_compiled_in_a_model_that_trains():
    """Without gradients, which torch.compile looks for as soon as it compiles."""
    model = nn.Sequential(nn.Linear(12, 12), rnn_ext.quantize(layer_of("GRU", {}))).eval()
    x = torch.randn(4, 3, 12)
    with torch.no_grad():
        assert_same(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@kinds
def test_meta(kind, options):
    """Shapes, and no results of weights that have been left there."""
    layer = rnn_ext.quantize(layer_of(kind, options, bidirectional=True))
    x = torch.randn(4, 3, 12)
    expected = layer(x)
    layer.to("meta")
    for got, want in zip(flat(layer(x.to("meta"))), flat(expected), strict=True):
        assert got.is_meta and got.shape == want.shape
    for more in ({}, {"lengths": [1, 2, 3]}):
        with pytest.raises(RuntimeError, match="a weight is on meta but input is on cpu"):
            layer(x, **more)


def test_a_model_with_images():
    """channels_last is for tensors of four and five dimensions, as which torch takes them for images."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), rnn_ext.quantize(layer_of("LSTM", {})))
    model.to(memory_format=torch.channels_last)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_flops():
    layer = rnn_ext.quantize(rnn_ext.LSTM(12, 32, proj_size=16, bidirectional=True))
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        layer(torch.randn(4, 3, 12))
    assert counter.get_total_flops() == 2 * 2 * 4 * 3 * (4 * 32 * (12 + 16) + 16 * 32)


def test_what_users_add_to_a_layer_stays():
    layer = layer_of("GRU", {})
    layer.register_parameter("own", nn.Parameter(torch.zeros(3)))
    layer.register_buffer("mine", torch.zeros(3))
    layer.register_buffer("none", None)
    layer.note = "kept"
    x = torch.randn(4, 3, 12)
    rnn_ext.quantize(layer)
    expected = layer(x)
    layer.half()
    assert layer.own.dtype == layer.mine.dtype == torch.float16 and layer.none is None and layer.note == "kept"
    assert_same(layer(x), expected)


NESTED = r"a nested tensor \(pad it, and pass lengths=\) has no custom"


MISTAKES: list[tuple[Callable[[nn.Module], object], type[Exception], str]] = [
    (lambda m: m(torch.randn(4, 3, 13)), RuntimeError, "Expected 12, got 13"),
    (lambda m: m(torch.randn(4, 3, 11)), RuntimeError, "Expected 12, got 11"),
    (
        lambda m: m(torch.randn(4, 3, 12).double()),
        RuntimeError,
        "expected float32, bfloat16 or float16, got torch.float64",
    ),
    (lambda m: m(torch.zeros(4, 3, 12, dtype=torch.int64)), RuntimeError, "expected float32, .* got torch.int64"),
    (lambda m: m(torch.randn(12)), ValueError, "Expected input to be 2D or 3D, got 1D"),
    (lambda m: m([1, 2]), TypeError, "expected input as a tensor or a PackedSequence, got list"),
    (lambda m: m(torch.randn(4, 3, 12), torch.zeros(1, 3, 20)), RuntimeError, "hx to be the two states"),
    (
        lambda m: m(torch.randn(4, 3, 12), (torch.zeros(2, 3, 20), torch.zeros(1, 3, 20))),
        RuntimeError,
        r"[Ee]xpected h_0 of size \[1, 3, 20\], got \[2, 3, 20\]",
    ),
    (
        lambda m: m(torch.randn(4, 3, 12), (torch.zeros(1, 3, 20), torch.zeros(1, 3, 20).double())),
        RuntimeError,
        "c_0 is Double but input is Float",
    ),
    (lambda m: m(torch.randn(4, 3, 12), lengths=[1, 2]), ValueError, r"lengths of shape \(3,\)"),
    (lambda m: m(torch.randn(4, 3, 12), lengths=[1, 2, 5]), ValueError, "between 0 and 4, got 5"),
    (lambda m: m(torch.randn(4, 3, 12), resets=torch.zeros(4, 3)), TypeError, "torch.bool"),
    (lambda m: m.step(torch.randn(4, 3, 12)), ValueError, "1D or 2D, got 3D"),
    (lambda m: m.step(3), TypeError, "input as a tensor, got int"),
    (lambda m: m(torch.randn(4, 3, 12).to_sparse_csr()), RuntimeError, "layout torch.sparse_csr has no custom kernel"),
    (lambda m: m(torch.nested.nested_tensor([torch.randn(3, 12)])), RuntimeError, NESTED),
    (lambda m: type(m)(12, 20), TypeError, "made of an rnn_ext.LSTM by rnn_ext.quantize"),
]


@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|nested tensors).*")
@pytest.mark.parametrize(("call", "error", "message"), MISTAKES)
def test_mistakes(call, error, message):
    with pytest.raises(error, match=message):
        call(rnn_ext.quantize(layer_of("LSTM", {})))


def test_a_second_direction_has_no_steps():
    with pytest.raises(ValueError, match="a bidirectional layer needs the whole sequence"):
        rnn_ext.quantize(layer_of("GRU", {}, bidirectional=True)).step(torch.randn(3, 12))


OP_MISTAKES = [
    (0, lambda t: t[:, :-1], r"expected weight_ih of size \[2, 3, 128\], got \[2, 2, 128\]"),
    (0, lambda t: t.float(), "expected weight_ih of dtype Char, got Float"),
    (1, lambda t: t[:1], r"expected weight_hh of size \[2, 9, 128\]"),
    (0, lambda t: t.to("meta"), "a weight is on meta but input is on cpu"),
    (2, lambda t: t.double(), "expected factors of dtype Float, got Double"),
    (2, lambda t: t[:3], r"expected factors of size \[4, 4, 17\], got \[3, 4, 17\]"),
    (2, lambda t: t[0], "expected factors with 3 dimensions"),
    (2, lambda t: t[:, :, :0], "at least one hidden unit"),
    (None, lambda ts: ts[:2], "expected 3 quantized weights .* got 2 in all"),
    (None, lambda ts: ts + ts[:1], "expected 3 quantized weights .* got 4 in all"),
]


@pytest.mark.parametrize(("which", "change", "message"), OP_MISTAKES)
def test_mistakes_of_the_op(which, change, message):
    problem, weights = rounded(build(Case("lstm", size=(3, 2, 5, 17)), torch.float32))
    if which is None:
        weights = change(weights)
    else:
        weights[which] = change(weights[which])
    kind = ValueError if message.startswith(("at least one hidden unit", "expected 3 quantized")) else RuntimeError
    with pytest.raises(kind, match=message):
        run(problem, weights)


def test_layers_without_end():
    depth = 2**20 + 1
    layer = rnn_ext.quantize(rnn_ext.RNN(depth, 1))
    with pytest.raises(ValueError, match="at most 1048576 features and units of a quantized layer"):
        layer(torch.zeros(1, 1, depth))


def changed(layer: nn.Module, name: str, value: float) -> nn.Module:
    with torch.no_grad():
        getattr(layer, name)[0, 0] = value
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rnn_ext.LSTM(3, 4, layer_norm=True), "1 has layer_norm=True, which quantized layers have not"),
        (lambda: rnn_ext.GRU(3, 4, zoneout=0.1), "1 has zoneout=0.1"),
        (lambda: changed(nn.GRU(3, 4), "weight_hh_l0", float("nan")), "1.weight_hh_l0 cannot be quantized: .* NaN"),
        (lambda: changed(nn.GRU(3, 4), "weight_ih_l0", float("inf")), "1.weight_ih_l0 cannot be quantized: .* inf"),
        (lambda: changed(nn.GRU(3, 4).double(), "weight_ih_l0", 1e300), "1.weight_ih_l0 cannot .* such in float32"),
        (lambda: nn.RNN(3, 4, dtype=torch.complex64), r"1.weight_ih_l0 cannot be quantized: .* of torch\.complex64"),
        (lambda: nn.utils.weight_norm(nn.GRU(3, 4), "weight_hh_l0"), "1.weight_hh_l0 is no parameter: remove"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_what_cannot_be_quantized_leaves_the_model_as_it_is(make, message):
    model = nn.Sequential(nn.LSTM(3, 4), make(), rnn_ext.LSTM(3, 4))
    types = [type(module) for module in model]
    with pytest.raises(ValueError, match=message):
        rnn_ext.quantize(model)
    assert [type(module) for module in model] == types
    assert len(list(model[0].parameters())) == 4


def test_options_that_only_act_in_training_go():
    layer = rnn_ext.quantize(rnn_ext.LSTM(3, 4, recurrent_dropout=0.5, weight_dropout=0.5, recompute=True))
    x = torch.randn(2, 3, 3)
    assert_same(layer(x), layer(x))
    assert repr(layer) == "LSTM(3, 4, activations=16)"


def test_subclasses_are_left_with_a_warning():
    class Own(nn.GRU):
        pass

    model = nn.Sequential(Own(3, 4), parametrizations.weight_norm(nn.GRU(3, 4), "weight_hh_l0"), nn.GRU(3, 4))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rnn_ext.quantize(model)
    assert [str(w.message) for w in caught] == [
        "0 is left as it is: test_subclasses_are_left_with_a_warning.<locals>.Own is a subclass",
        "1 is left as it is: remove its parametrizations first",
    ]
    assert all(w.filename == __file__ for w in caught)
    assert type(model[2]) is quantized.GRU and isinstance(model[0], Own)
    with pytest.raises(TypeError, match="expected a module, got the class GRU"):
        rnn_ext.quantize(nn.GRU)
    for wrong in (4, "8", None, 8.0):
        with pytest.raises(ValueError, match=f"activations must be 16 or 8 bits, got {wrong!r}"):
            rnn_ext.quantize(nn.GRU(3, 4), wrong)


def test_a_model_with_nothing_to_quantize():
    with pytest.warns(UserWarning, match="no RNN, LSTM or GRU in this Linear: nothing is quantized"):
        rnn_ext.quantize(nn.Linear(3, 4))


def test_subclasses_of_torch_nn_s_are_quantized():
    model = rnn_ext.convert(nn.Sequential(nn.LSTM(3, 4)), as_subclass=True)
    assert type(rnn_ext.quantize(model)[0]) is quantized.LSTM
