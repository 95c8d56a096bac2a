"""torch.compile with inductor, torch.export, AOTInductor and ONNX: one program for all lengths and batch sizes."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.export import Dim
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from util import CELLS

import rnn_ext

KINDS = {"rnn_tanh": rnn_ext.RNN, "rnn_relu": rnn_ext.RNN, "gru": rnn_ext.GRU, "lstm": rnn_ext.LSTM}
SHAPES = ((3, 5), (4, 9), (1, 6), (7, 1), (2, 12))  # N, L
I, H = 4, 6  # noqa: E741


class Model(nn.Module):
    """Something before and after the layer, so that it must live in a graph with other code."""

    def __init__(self, cell: str = "lstm", num_layers: int = 2):
        super().__init__()
        options = {"nonlinearity": "relu"} if cell == "rnn_relu" else {}
        self.rnn = KINDS[cell](I, H, num_layers, batch_first=True, bidirectional=True, **options)
        self.fc = nn.Linear(2 * H, 2)

    def forward(self, input, hx=None, lengths=None, resets=None):
        if isinstance(input, PackedSequence):
            output, state = self.rnn(input)
            output = output.data
        elif lengths is None and resets is None:  # all that torch.nn's layers know
            output, state = self.rnn(2 * input, hx)
        else:
            output, state = self.rnn(2 * input, hx, lengths=lengths, resets=resets)
        return self.fc(output).relu(), state


def inputs(kind: str, batch: int, length: int) -> dict:
    if kind == "packed":
        lengths = [length, *torch.randint(1, length + 1, (batch - 1,)).tolist()]
        return {"input": pack_sequence([torch.randn(n, I) for n in lengths], enforce_sorted=False)}
    given = {"input": torch.randn(batch, length, I)}
    if kind in ("lengths", "all"):
        given["lengths"] = torch.randint(0, length + 1, (batch,))
    if kind in ("resets", "all"):
        given["resets"] = torch.rand(batch, length) < 0.3
    if kind == "all":
        given["hx"] = (torch.randn(4, batch, H), torch.randn(4, batch, H))
    return given


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow  # the C++ compiler, where nothing is cached
@pytest.mark.parametrize("kind", ["padded", "all", "packed"])
def test_compile_with_inductor(kind):
    """No graph break, forward and backward, two compilations at most.

    Sizes of 1, and sizes equal to each other at the first call, are constants to torch.compile, whatever is compiled;
    and inductor compiles sums over more than 4096 again.
    """
    torch._dynamo.reset()
    counters.clear()
    torch.set_default_dtype(torch.float64)
    model = Model()
    compiled = torch.compile(model, backend="inductor", fullgraph=True, dynamic=True)
    for batch, length in ((3, 5), (7, 9), (5, 6), (9, 3), (2, 12), (40, 300)):
        given = inputs(kind, batch, length)
        results = []
        for call in (compiled, model):
            output, state = call(**given)
            loss = output.square().mean() + state[0].sum() + state[1].cos().sum()
            results.append((output, state, torch.autograd.grad(loss, list(model.parameters()))))
        close(*results)
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_export(cell, strict):
    """A dynamic length and batch; our op stands in the graph as one node for each layer; saved and loaded."""
    model = Model(cell).eval()
    N, L = Dim("N"), Dim("L")  # equal where both occur, from 1 up
    dynamic = {"input": {0: N, 1: L}, "lengths": {0: N}, "resets": {0: N, 1: L}}
    for kind in ("padded", "lengths", "resets"):
        given = inputs(kind, 3, 5)
        program = torch.export.export(model, (), given, dynamic_shapes={n: dynamic[n] for n in given}, strict=strict)
        nodes = [node for node in program.graph.nodes if node.target is torch.ops.rnn_ext.layer.default]
        assert len(nodes) == 2
        file = io.BytesIO()
        torch.export.save(program, file)
        loaded = torch.export.load(io.BytesIO(file.getvalue())).module()
        for batch, length in SHAPES:
            given = inputs(kind, batch, length)
            for call in (program.module(), loaded):
                close(call(**given), model(**given))


@pytest.mark.slow  # half a minute of the C++ compiler
def test_aot_inductor_package(tmp_path):
    """It runs where nobody has the model: another process, which only imports rnn_ext for the op."""
    model = Model(num_layers=1).eval()
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(3, 5, I),), dynamic_shapes=[{0: Dim.DYNAMIC, 1: Dim.DYNAMIC}])
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        pairs = [(given, model(given)) for given in (torch.randn(*shape, I) for shape in SHAPES)]
    torch.save(pairs, tmp_path / "pairs.pt")
    script = (
        "import torch, rnn_ext\n"
        "model = torch._inductor.aoti_load_package('model.pt2')\n"
        "for given, expected in torch.load('pairs.pt'):\n"
        "    torch.testing.assert_close(model(given), expected, rtol=1e-5, atol=1e-6)\n"
        "print('the same')\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "the same\n", done.stderr


@pytest.mark.parametrize(("cell", "exporter"), [*((cell, "torchscript") for cell in CELLS), ("lstm", "dynamo")])
def test_onnx_through_to_native(cell, exporter):
    """torch.nn's layer has an ONNX operator of its own. (The dynamo exporter cannot trace a native nn.RNN.)"""
    import onnxruntime  # here: it takes a while to load

    model = Model(cell).eval()
    plain = rnn_ext.to_native(copy.deepcopy(model))
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: deprecations, and one of its layers' attributes
        if exporter == "dynamo":
            shapes = {"input": {0: "N", 1: "L"}}
            program = torch.onnx.export(
                plain, (torch.randn(3, 5, I),), dynamic_shapes=shapes, dynamo=True, verbose=False
            )
            program.save(file)
        else:
            axes = {"input": {0: "N", 1: "L"}}
            torch.onnx.export(
                plain, (torch.randn(3, 5, I),), file, dynamo=False, input_names=["input"], dynamic_axes=axes
            )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # the dynamo exporter notes the traced length as the output's
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    for batch, length in SHAPES:
        input = torch.randn(batch, length, I)
        output, state = model(input)
        found = [torch.from_numpy(array) for array in session.run(None, {"input": input.numpy()})]
        close(found, [output, *(state if isinstance(state, tuple) else (state,))])


def test_onnx_of_a_layer_that_was_not_converted():
    """By "auto", which takes torch's kernels then. (L stays: the exporter can make it dynamic only once a process.)"""
    import onnxruntime

    layer, file = rnn_ext.LSTM(I, H, 2, batch_first=True).eval(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            layer, (torch.randn(3, 5, I),), dynamic_shapes={"input": {0: "N"}}, input_names=["input"],
            dynamo=True, verbose=False,
        )  # fmt: skip
    program.save(file)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    for batch in (2, 3, 7):
        input = torch.randn(batch, 5, I)
        output, state = layer(input)
        assert rnn_ext.explain(layer, input).backend == "custom"
        found = [torch.from_numpy(array) for array in session.run(None, {"input": input.numpy()})]
        close(found, [output, *state])


class Ragged(nn.Module):
    """Lengths that follow from the input's size."""

    def __init__(self):
        super().__init__()
        self.gru = rnn_ext.GRU(I, H)

    def forward(self, input):
        return self.gru(input, lengths=[input.shape[0], 1])[0]


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_listed_lengths(strict):
    model = Ragged()
    shapes = {"input": {0: Dim("L", min=2, max=100)}}
    program = torch.export.export(model, (torch.randn(6, 2, I),), dynamic_shapes=shapes, strict=strict).module()
    for length in (6, 9):
        input = torch.randn(length, 2, I)
        close([program(input)], [model(input)])


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = rnn_ext.LSTM(I, H, batch_first=True, bidirectional=True)

    def forward(self, input, lengths):
        return self.lstm(input, lengths=lengths)[0]


def test_onnx_with_lengths():
    import onnxruntime

    model, file = Tagger().eval(), io.BytesIO()
    axes = {"input": {0: "N", 1: "L"}, "lengths": {0: "N"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (torch.randn(3, 5, I), torch.tensor([5, 2, 4])), file, dynamo=False, input_names=[*axes],
            dynamic_axes=axes,
        )  # fmt: skip
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for length, lengths in ((5, [5, 2, 4]), (9, [3, 9]), (6, [0, 6, 1, 2])):
        input, lengths = torch.randn(len(lengths), length, I), torch.tensor(lengths)
        (found,) = session.run(None, {"input": input.numpy(), "lengths": lengths.numpy()})
        close([torch.from_numpy(found)], [model(input, lengths)])
