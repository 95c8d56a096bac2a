"""Stacks of layers that run at the same time, each some timesteps behind the one below it (csrc/cpu: stack_forward)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from util import CELLS, check, largest, same_bits

import rnn_ext
from rnn_ext import ops

if ops.is_available():
    from rnn_ext import _C

LENGTH, HIDDEN = 60, 96  # not a multiple of the steps that layers are apart; enough work for a second thread
PER_LAYER = {"rnn_tanh": 5, "rnn_relu": 5, "gru": 2, "lstm": 2}  # layers with enough work together


@pytest.fixture(autouse=True)
def near_threads() -> None:
    """Training with so little work is left to one thread where they are far from each other, see test_threads.py."""
    if ops.is_available():
        _C.assume_thread_distance(0)


def module(cell: str, layers: int, dtype: torch.dtype = torch.float32, **options) -> torch.nn.RNNBase:
    torch.manual_seed(5)
    kind = {"gru": rnn_ext.GRU, "lstm": rnn_ext.LSTM}.get(cell, rnn_ext.RNN)
    if kind is rnn_ext.RNN:
        options["nonlinearity"] = cell.removeprefix("rnn_")
    return kind(HIDDEN + 5, HIDDEN, layers, dtype=dtype, backend="custom", **options)


def layers_seen(fn) -> tuple[object, int]:
    """What fn() returns, and how often the dispatcher saw a single layer meanwhile."""
    with profile() as prof:
        result = fn()
    return result, sum(event.count for event in prof.key_averages() if event.key == "rnn_ext::layer")


def outcome(layer: torch.nn.RNNBase, input: Tensor, hx=None, **options) -> dict[str, Tensor]:
    """Results and gradients by name."""
    layer.zero_grad()
    leaf = input.detach().clone().requires_grad_()
    output, state, *cells = layer(leaf, hx, **options)
    results = [output, *(state if isinstance(state, tuple) else [state]), *cells]
    seed = torch.Generator().manual_seed(3)
    loss = sum((r * torch.randn(r.shape, generator=seed, dtype=torch.float64).to(r.dtype)).sum() for r in results)
    loss.backward()
    named = {f"result {i}": r.detach() for i, r in enumerate(results)}
    grads = {n: p.grad.clone() for n, p in layer.named_parameters()}
    return {**named, "input": leaf.grad, **grads}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("batch", [3, 1])
def test_bits_of_one_layer_after_the_other(batch, cell, dtype):
    """In training and in inference, for as many threads as layers, fewer and more than processors."""
    if dtype == torch.bfloat16 and not _C.computes_bfloat16():
        pytest.skip("bfloat16 is converted layer by layer here")
    layers = PER_LAYER[cell]
    layer = module(cell, layers, dtype)
    input = torch.randn(3 * LENGTH // batch, batch, HIDDEN + 5, dtype=dtype)
    torch.set_num_threads(1)
    expected = outcome(layer, input)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        found, seen = layers_seen(lambda: outcome(layer, input))
        same_bits(found, expected)
        assert seen == 0
        with torch.no_grad():
            for _ in range(2):  # the second time with packed weights kept from the first
                (output, _), seen = layers_seen(lambda: layer(input))
                assert torch.equal(output, expected["result 0"]) and seen == 0


@pytest.mark.parametrize("layout", ["dense", "batch_first", "packed", "lengths", "resets", "unbatched"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_every_way_to_give_a_sequence(cell, layout):
    options = {"proj_size": 31} if cell == "lstm" else {}
    layer = module(cell, 3, torch.float64, batch_first=layout == "batch_first", **options)
    input = torch.randn(LENGTH, 3, HIDDEN + 5, dtype=torch.float64)
    states = [torch.randn(3, 3, 31 if cell == "lstm" else HIDDEN, dtype=torch.float64)]
    states += [torch.randn(3, 3, HIDDEN, dtype=torch.float64)] * (cell == "lstm")
    call = {"return_cell_states": True} if cell == "lstm" else {}
    if layout == "batch_first":
        input = input.transpose(0, 1)
    elif layout == "lengths":
        call["lengths"] = [0, LENGTH, 29]
    elif layout == "resets":
        call["resets"] = torch.rand(LENGTH, 3) < 0.1
    elif layout == "unbatched":
        input, states = input[:, 0], [s[:, 0] for s in states]
    hx = tuple(states) if cell == "lstm" else states[0]

    def run() -> dict[str, Tensor]:
        if layout != "packed":
            return outcome(layer, input, hx, **call)
        packed = pack_padded_sequence(input, torch.tensor([31, LENGTH, 44]), enforce_sorted=False)
        output, state = layer(packed, hx)
        return {"output": output.data.detach(), "state": (state[0] if cell == "lstm" else state).detach()}

    torch.set_num_threads(1)
    expected, one_by_one = layers_seen(run)
    torch.set_num_threads(2)
    found, seen = layers_seen(run)
    same_bits(found, expected)
    assert one_by_one > 0 and seen == 0


def test_left_alone_where_it_would_not_be_faster():
    """Both directions, a batch to cut, a short sequence, layer normalisation, float16: a layer at a time."""
    torch.set_num_threads(2)
    cases = [
        (module("lstm", 2, bidirectional=True), (LENGTH, 1)),
        (module("lstm", 2), (LENGTH, 9)),
        (module("lstm", 2), (6, 1)),
        (module("lstm", 2, layer_norm=True), (LENGTH, 1)),
        (module("lstm", 2, torch.float16), (LENGTH, 1)),
    ]
    for layer, lead in cases:
        input = torch.randn(*lead, HIDDEN + 5).to(layer.weight_hh_l0.dtype)
        _, seen = layers_seen(lambda layer=layer, input=input: layer(input))
        assert seen > 0


def test_graph_is_that_of_layers():
    """Second derivatives, a weight changed in place between forward and backward, and a graph used twice."""
    torch.set_num_threads(2)
    layer = module("gru", 2, torch.float64)
    input = torch.randn(LENGTH, 1, HIDDEN + 5, dtype=torch.float64, requires_grad=True)

    def second(x: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    torch.set_num_threads(1)
    expected = second(input)
    torch.set_num_threads(2)
    check({"": second(input)}, {"": expected}, 1e-12, largest([expected]), "second derivative")

    output, _ = layer(input)
    first = torch.autograd.grad(output.sum(), input, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(output.sum(), input, retain_graph=True)[0], first)
    with torch.no_grad():
        layer.weight_hh_l1.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(output.sum(), input)


@pytest.mark.parametrize("threads", [1, 2])
def test_what_requires_no_gradient_is_not_recorded(threads):
    """A frozen first layer keeps nothing, and its weights may change before backward."""
    torch.set_num_threads(threads)
    layer = module("lstm", 2)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name.endswith("_l1"))
    input = torch.randn(LENGTH, 1, HIDDEN + 5)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output, _ = layer(input)
    assert not any(t is w for t in kept for w in (layer.weight_ih_l0, layer.weight_hh_l0))
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2)
    output.sum().backward()
    assert layer.weight_hh_l0.grad is None and layer.weight_hh_l1.grad.abs().sum() > 0


def test_resets_of_a_subclass():
    """Tensors that only the dispatcher can read."""

    class Wrapped(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        def __init__(self, inner):
            self.inner = inner

        __torch_function__ = torch._C._disabled_torch_function_impl

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            inner = torch.utils._pytree.tree_map_only(Wrapped, lambda t: t.inner, (args, kwargs or {}))
            return func(*inner[0], **inner[1])

    layer = module("lstm", 2)
    input, resets = torch.randn(LENGTH, 1, HIDDEN + 5), torch.rand(LENGTH, 1) < 0.3
    expected, _ = layer(input, resets=resets)
    torch.set_num_threads(2)
    found, _ = layer(input, resets=Wrapped(resets))
    assert torch.equal(found, expected)


def test_what_looks_at_ops_sees_layers():
    """Autocast, vmap, forward mode, dispatch modes and tracing get what they get from one layer after the other."""
    torch.set_num_threads(2)
    layer = module("gru", 2)
    input = torch.randn(LENGTH, 2, HIDDEN + 5)
    plain, _ = layer(input)

    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = layer(input)
    assert cast.dtype == torch.bfloat16
    torch.testing.assert_close(cast.float(), plain, rtol=0, atol=2e-2)

    batches = torch.randn(3, LENGTH, 2, HIDDEN + 5)
    mapped = torch.func.vmap(lambda x: layer(x)[0])(batches)
    torch.testing.assert_close(mapped, torch.stack([layer(x)[0] for x in batches]), rtol=0, atol=2e-6)

    _, tangent = torch.func.jvp(lambda x: layer(x)[0], (input,), (torch.ones_like(input),))
    step = 1e-3
    difference = (layer(input + step)[0] - layer(input - step)[0]) / (2 * step)
    torch.testing.assert_close(tangent, difference, rtol=0, atol=1e-3)

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    with Names(), torch.no_grad():
        seen, _ = layer(input)
    assert torch.equal(seen, plain) and names.count("rnn_ext.layer.default") == 2

    exported = torch.export.export(layer, (input,))
    assert sum(node.target is torch.ops.rnn_ext.layer.default for node in exported.graph.nodes) == 2
    torch.testing.assert_close(exported.module()(input)[0], plain, rtol=0, atol=2e-6)


def test_inference_mode_and_copies():
    torch.set_num_threads(2)
    layer = module("lstm", 2)
    input = torch.randn(LENGTH, 1, HIDDEN + 5)
    expected, _ = layer(input)
    with torch.inference_mode():
        found, _ = copy.deepcopy(layer)(input)
    assert found.is_inference() and torch.equal(found, expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_mistakes(threads):
    torch.set_num_threads(threads)
    layer = module("lstm", 2)
    input = torch.randn(LENGTH, 1, HIDDEN + 5)
    good = torch.zeros(2, 1, HIDDEN)
    for name, hx in (("h_0", (good[:1], good)), ("c_0", (good, good[..., 1:]))):
        with pytest.raises(RuntimeError, match=rf"Expected {name} of size \[2, 1, {HIDDEN}\], got"):
            layer(input, hx)
    with pytest.raises(RuntimeError, match=f"Expected {HIDDEN + 5}, got {HIDDEN}"):
        layer(input[..., :HIDDEN])
    with pytest.raises(RuntimeError, match="batch_sizes of at least one timestep, got none"):
        layer(PackedSequence(input[:0, 0], torch.zeros(0, dtype=torch.int64)))
    for layers, weights in ((0, layer._flat_weights), (3, layer._flat_weights), (2, layer._flat_weights[:2])):
        with pytest.raises(ValueError, match=f"{layers} layers, got {len(weights)} in all"):
            ops.stack(input, None, None, weights, "lstm", layers)
    weights = layer._flat_weights
    wide = rnn_ext.LSTM(HIDDEN, HIDDEN + 1)._flat_weights
    with pytest.raises(RuntimeError, match=rf"weight_hh of size .* as in the first, got \[.*{HIDDEN + 1}\] in layer 1"):
        ops.stack(input, None, None, [*weights[:4], *wide], "lstm", 2)
    with pytest.raises(RuntimeError, match=r"expected input with 3 dimensions, got size \[\d+\]"):
        ops.stack(input[0, 0], None, None, weights, "lstm", 2)
    for wrong in (0, 1):
        flat = [w.flatten() if i == wrong else w for i, w in enumerate(weights)]
        with pytest.raises(RuntimeError, match=r"weight_[ih]h"):
            ops.stack(input, good, good, flat, "lstm", 2)
        with pytest.raises(RuntimeError, match=r"weight_[ih]h"):
            ops.cell(input[0], good[0], good[0], flat[:4], "lstm")
    with pytest.raises(ValueError, match="weights"):
        ops.cell(input[0], good[0], good[0], [], "lstm")
    sizes = torch.tensor([2**62] * 4)  # their sum is 0
    with pytest.raises(RuntimeError, match=f"no more than the 3 rows of packed input, got {2**62}"):
        layer(PackedSequence(input[:3, 0], sizes))
    with pytest.raises(RuntimeError, match="same dtype"):
        layer(input, (good.double(), good.double()))


@pytest.mark.parametrize("kind", [rnn_ext.LSTM, rnn_ext.GRU])
def test_two_directions_without_biases(kind):
    """Which have as many weights as one direction with biases."""
    layer, input = kind(64, HIDDEN, 2, bidirectional=True, bias=False), torch.randn(LENGTH, 1, 64)
    expected = layer(input)[0]
    torch.set_num_threads(2)
    with torch.no_grad():
        assert torch.equal(layer(input)[0], expected)


def test_nothing_to_share():
    torch.set_num_threads(2)
    layer = rnn_ext.LSTM(5, 7, 2)
    assert layer(torch.zeros(4, 0, 5))[0].shape == (4, 0, 7)
    weights = [torch.zeros(28, 0), *rnn_ext.LSTM(7, 7, 2)._flat_weights[1:]]
    found = ops.stack(torch.zeros(4, 3, 0), None, None, weights, "lstm", 2)[0]
    torch.set_num_threads(1)
    assert torch.equal(found, ops.stack(torch.zeros(4, 3, 0), None, None, weights, "lstm", 2)[0])


def test_a_frozen_layer_above():
    """Gradients go through it to the one below."""
    layer, input, found = module("lstm", 2), torch.randn(LENGTH, 1, HIDDEN + 5), []
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name.endswith("_l0"))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        layer.zero_grad()
        layer(input)[0].sum().backward()
        found.append({name: p.grad.clone() for name, p in layer.named_parameters() if p.requires_grad})
    same_bits(*found)


@pytest.mark.parametrize("which", ["input", "h_0", "c_0", "weight_hh_l1"])
def test_tangents(which):
    """Of forward mode without a transform, whose keys would say enough."""
    layer, found = module("lstm", 2), []
    weights = {name: p.detach() for name, p in layer.named_parameters()}
    given = {"input": torch.randn(LENGTH, 1, HIDDEN + 5)}
    given |= {name: torch.randn(2, 1, HIDDEN) for name in ("h_0", "c_0")} | weights
    tangent = torch.randn_like(given[which])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with forward_ad.dual_level():
            dual = given | {which: forward_ad.make_dual(given[which], tangent)}
            flat = [dual[name] for name in weights]
            output = ops.stack(dual["input"], dual["h_0"], dual["c_0"], flat, "lstm", 2)[0]
            found.append(forward_ad.unpack_dual(output).tangent)
    assert found[1] is not None
    torch.testing.assert_close(*found)
