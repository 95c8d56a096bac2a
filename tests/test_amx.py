"""Products by AMX's tiles (csrc/cpu/amx_product.inl); numbers are compared in test_reduced_precision.py and, by an
emulation on any processor with AVX512_BF16 and AVX512_VNNI, in test_cpu_sanitize.py."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from util import same_bits

import rnn_ext
from rnn_ext import _C, ops


@pytest.fixture(autouse=True)
def amx() -> None:
    try:
        ops.set_cpu_capability("amx")
    except ValueError:
        pytest.skip("this processor or its Linux has no AMX")
    assert _C.multiplies_tiles()


def results(layer: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output, which is the same in inference and in training, and the gradient of the initial state."""
    h = torch.zeros(1, x.shape[1], layer.hidden_size).bfloat16()
    hx = (h, h) if layer.mode == "LSTM" else h
    with torch.no_grad():
        inferred = layer(x, hx)[0]
    h.requires_grad_()
    output = layer(x, hx)[0]
    same_bits({"output": output.detach()}, {"output": inferred})
    return {"output": inferred, "grad": torch.autograd.grad(output, h, torch.ones_like(output))[0]}


def part(results: dict[str, torch.Tensor], *at: slice | int) -> dict[str, torch.Tensor]:
    return {name: result[at] for name, result in results.items()}


@pytest.mark.parametrize("sizes", [(50, 100), (64, 128), (33, 36), (128, 70), (2048, 48)], ids=str)
@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_sequences_do_not_depend_on_others(cell, sizes):
    """Of every batch: rows of one tile, of several, of one that is not full; some of a packed batch end earlier."""
    layer = getattr(rnn_ext, cell)(*sizes, backend="custom").bfloat16()
    x = torch.randn(6, 70, sizes[0]).bfloat16()
    expected = results(layer, x)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for first, last in ((0, 1), (3, 10), (0, 16), (16, 33), (1, 70)):
            some = slice(None), slice(first, last)
            same_bits(results(layer, x[some].contiguous()), part(expected, *some))
            same_bits(results(layer, x[some]), part(expected, *some))
            wider = torch.nn.functional.pad(x[some], (0, 1))  # rows an odd number of numbers apart
            same_bits(results(layer, wider[..., :-1]), part(expected, *some))
    lengths = torch.randint(1, 7, (70,))
    lengths[0] = 6
    with torch.no_grad():
        output = layer(x, lengths=lengths)[0]
    for i, length in enumerate(lengths):
        same_bits({"output": output[:length, i]}, {"output": expected["output"][:length, i]})


def test_others_use_tiles_too():
    """torch's products of bfloat16 leave tiles of other shapes behind."""
    layer = rnn_ext.LSTM(40, 72, backend="custom").bfloat16()
    x, a = torch.randn(9, 20, 40).bfloat16(), torch.randn(96, 80).bfloat16()
    expected, product = results(layer, x), a @ a.T
    for _ in range(3):
        same_bits({"product": a @ a.T}, {"product": product})
        same_bits(results(layer, x), expected)


def test_threads_have_tiles_of_their_own():
    layers = [rnn_ext.GRU(24 + 8 * i, 40 + 24 * i, backend="custom").bfloat16() for i in range(4)]
    inputs = [torch.randn(8, 17, layer.input_size).bfloat16() for layer in layers]
    expected = [results(layer, x) for layer, x in zip(layers, inputs, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            for found, wanted in zip(pool.map(results, layers, inputs), expected, strict=True):
                same_bits(found, wanted)


@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_integers_of_8_bits(cell):
    """Sums of integers are exact: what vectors compute, to the bit."""
    for inputs, hidden in ((300, 280), (130, 140), (264, 513)):
        layer = rnn_ext.quantize(getattr(rnn_ext, cell)(inputs, hidden, backend="custom"), activations=8)
        for batch in (1, 3, 7, 16, 40):
            x = torch.randn(5, batch, inputs)
            ops.set_cpu_capability("avx512")
            expected = layer(x)[0]
            ops.set_cpu_capability("amx")
            same_bits({"output": layer(x)[0]}, {"output": expected})
