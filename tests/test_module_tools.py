"""A module among other things: copies, exchanged and computed parameters, hooks, ensembles, odd tensors."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import warnings
from typing import ClassVar

import pytest
import torch
import torch._dynamo.testing
from test_modules import OURS, H, I, flatten, native, options, ours, pair, randn, same
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.flop_counter import FlopCounterMode
from util import CELLS, check_gradients, check_values, same_bits

import rnn_ext
from rnn_ext import backends, ops


def save_and_load(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), save_and_load], ids=["deepcopy", "pickle", "save"]
)
@pytest.mark.parametrize("cell", CELLS)
def test_copies(cell, how):
    """A copy has the same results and parameters of its own; training it leaves the original as it was."""
    module = ours(cell, num_layers=2, bidirectional=True)
    module(randn(5, 3, I))
    twin = how(module)
    assert type(twin) is type(module) and twin.backend == "custom" and repr(twin) == repr(module)
    same(twin, module, randn(5, 3, I))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for p in twin.parameters():
        p.data.mul_(0.5)
    assert not torch.equal(twin(randn(5, 3, I))[0], module(randn(5, 3, I))[0])
    same_bits(dict(module.named_parameters()), before)
    second = native(cell, num_layers=2, bidirectional=True)
    second.load_state_dict(twin.state_dict())
    same(twin, second, randn(5, 3, I))


@pytest.mark.parametrize("cell", CELLS)
def test_parameters_exchanged_behind_its_back(cell):
    """Assigned, moved, converted, tied, called functionally: always the parameters of this moment are used."""
    module, second = pair(cell, num_layers=2)
    fresh = nn.Parameter(randn(*module.weight_hh_l1.shape, seed=9))
    module.weight_hh_l1 = fresh
    second.weight_hh_l1 = nn.Parameter(fresh.detach().clone())
    same(module, second, randn(5, 3, I))
    module.weight_hh_l0 = module.weight_hh_l1
    second.weight_hh_l0 = second.weight_hh_l1
    same(module, second, randn(5, 3, I))
    module.float().double(), second.float().double()
    same(module, second, randn(5, 3, I))
    module.flatten_parameters()
    same(module, second, randn(5, 3, I))
    module.share_memory()
    same(module, second, randn(5, 3, I))
    module.weight_ih_l0.data = module.weight_ih_l0.data * 2
    second.weight_ih_l0.data = second.weight_ih_l0.data * 2
    same(module, second, randn(5, 3, I))
    module = ours(cell)
    others = {name: randn(*p.shape, seed=4).requires_grad_() for name, p in module.named_parameters()}
    result = torch.func.functional_call(module, others, (randn(5, 3, I),))
    expected = torch.func.functional_call(native(cell), others, (randn(5, 3, I),))
    check_values(flatten(result), flatten(expected))
    grads, expected_grads = (
        torch.autograd.grad(r[0].square().sum(), list(others.values())) for r in (result, expected)
    )
    check_gradients(dict(zip(others, grads, strict=True)), dict(zip(others, expected_grads, strict=True)))
    same(module, native(cell), randn(5, 3, I))  # its own are back


def test_on_the_meta_device_then_materialized():
    module = rnn_ext.LSTM(I, H, device="meta", dtype=torch.float64)
    assert module(torch.zeros(5, 3, I, device="meta", dtype=torch.float64))[0].shape == (5, 3, H)
    module.to_empty(device="cpu")
    module.load_state_dict(native("lstm").state_dict())
    same(module, native("lstm"), randn(5, 3, I))
    with torch.device("meta"):
        assert rnn_ext.GRU(I, H).weight_ih_l0.is_meta
    torch.set_default_dtype(torch.float64)
    assert rnn_ext.GRU(I, H).weight_ih_l0.dtype == torch.float64


def hard_norm(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module, "weight_hh_l0")


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


REPARAMETRIZED = {
    "weight_norm": lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m, "weight_hh_l0"),
    "orthogonal": lambda m: parametrizations.orthogonal(m, "weight_ih_l0"),
    "own": lambda m: parametrize.register_parametrization(m, "bias_hh_l0", Double()),
    "old weight_norm": hard_norm,
    "prune": lambda m: prune.l1_unstructured(m, "weight_hh_l0", amount=0.5),
}


@pytest.mark.parametrize("how", REPARAMETRIZED)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm"])
def test_reparametrized(cell, how):
    """Weights that are computed from others: results of the weights as they are now, gradients to the originals."""
    module = ours(cell)
    torch.manual_seed(0)
    changed = REPARAMETRIZED[how](module)
    changed = module if changed is None else changed
    changed.train()
    names = [name for name, _ in native(cell).named_parameters()]
    for _ in range(2):  # the second time after a step, with other weights
        module.zero_grad()
        with parametrize.cached():
            output, _ = changed(randn(5, 3, I))
            effective = {name: getattr(changed, name).detach().clone() for name in names}
            output.square().sum().backward()
        plain = native(cell)
        plain.load_state_dict(effective)
        expected, _ = plain(randn(5, 3, I))
        check_values({"output": output}, {"output": expected})
        assert len(list(changed.parameters())) >= len(names)
        assert all(p.grad is not None and p.grad.any() for p in changed.parameters())
        with torch.no_grad():
            for p in changed.parameters():
                p.sub_(0.1 * p.grad)


def test_hooks_and_apply():
    module, seen = ours("gru"), []
    module.register_forward_pre_hook(lambda m, args: seen.append("before"))
    module.register_forward_hook(lambda m, args, result: seen.append("after"))
    module.register_full_backward_hook(lambda m, grad_input, grad_output: seen.append("backward"))
    module(randn(5, 3, I).requires_grad_())[0].sum().backward()
    assert seen == ["before", "after", "backward"]
    module.apply(lambda m: seen.append(type(m).__name__))
    assert seen[-1] == "GRU"


def test_ensemble():
    """stack_module_state and vmap: an ensemble in one call."""
    for cell in CELLS:
        modules = [OURS[cell](I, H, **options(cell, bidirectional=True), backend="custom") for _ in range(3)]
        params, buffers = torch.func.stack_module_state(modules)
        base = copy.deepcopy(modules[0]).to("meta")

        def call(p, b, x, base=base):
            return torch.func.functional_call(base, (p, b), (x,))[0]

        outputs = torch.vmap(call, in_dims=(0, 0, None))(params, buffers, randn(5, 3, I))
        for module, output in zip(modules, outputs, strict=True):
            check_values({"output": output}, {"output": module(randn(5, 3, I))[0]})


ASIDE = {
    "all weights": lambda m: m.to("meta"),
    "one bias": lambda m: setattr(m, "bias_hh_l0", nn.Parameter(m.bias_hh_l0.to("meta"))),
}


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("what", ASIDE)
@pytest.mark.parametrize("cell", CELLS)
def test_weights_left_on_the_meta_device(cell, what, layers):
    """A checkpoint that was loaded by half must not give results of uninitialised memory."""
    module = ours(cell, num_layers=layers)
    ASIDE[what](module)
    for call in (lambda: module(randn(5, 3, I)), lambda: module.step(randn(3, I))):
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"meta.*cpu|cpu.*meta"):
                call()


def test_states_and_resets_left_on_the_meta_device():
    module = ours("gru")
    with pytest.raises(RuntimeError, match=r"h_0 is on meta but input is on cpu"):
        module(randn(5, 3, I), torch.zeros(1, 3, H, device="meta", dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"resets is on meta but input is on cpu"):
        module(randn(5, 3, I), resets=torch.zeros(5, 3, device="meta", dtype=torch.bool))
    with pytest.raises(RuntimeError, match="meta"):
        module(torch.zeros(5, 3, I, device="meta", dtype=torch.float64))


def test_arguments_of_the_op_left_on_the_meta_device():
    """Any of them brings the fake kernel, whose results beside a CPU input would be memory that nobody has written."""
    module, input, h_0 = ours("gru"), randn(5, 3, I), randn(1, 3, H)
    weights = [*module.parameters()]
    integers = functools.partial(torch.full, fill_value=3, dtype=torch.int64, device="meta")
    with pytest.raises(RuntimeError, match="lengths is on meta but input is on cpu"):
        ops.layer(input, h_0, None, weights, cell="gru", lengths=integers((3,)))
    with pytest.raises(RuntimeError, match="expected batch_sizes on the CPU, got meta"):
        ops.layer(input.flatten(0, 1), h_0, None, weights, cell="gru", batch_sizes=integers((5,)))
    meta = input.to("meta")
    assert ops.layer(meta, None, None, [w.to("meta") for w in weights], cell="gru", lengths=integers((3,)))[0].is_meta

    output, _, _, _, saved = torch.ops.rnn_ext.layer(
        input, h_0, None, weights, None, None, None, [], "gru", False, False, False, True, False
    )
    given = {
        "grad_output": torch.ones_like(output), "grad_h_n": None, "grad_c_n": None, "grad_cells": None, "input": input,
        "h_0": h_0, "c_0": None, "weights": weights, "batch_sizes": None, "lengths": None, "resets": None, "masks": [],
        "output": output, "saved": saved, "cell": "gru", "bidirectional": False, "batch_first": False,
        "cell_states": False, "output_mask": [True] * (3 + len(weights)),
    }  # fmt: skip
    given["output_mask"][2] = False
    torch.ops.rnn_ext.layer_backward(*given.values())
    for name in ("grad_output", "h_0", "output", "saved"):
        with pytest.raises(RuntimeError, match=f"{name} is on meta but input is on cpu"):
            torch.ops.rnn_ext.layer_backward(*(given | {name: given[name].to("meta")}).values())
    with pytest.raises(RuntimeError, match="a weight is on meta but input is on cpu"):
        torch.ops.rnn_ext.layer_backward(*(given | {"weights": [*weights[:-1], weights[-1].to("meta")]}).values())


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_mistakes_on_the_meta_device(cell):
    """Where shapes are all there is, they are checked as where there are numbers."""
    module = ours(cell).to("meta")
    zeros = functools.partial(torch.zeros, device="meta", dtype=torch.float64)
    states = (lambda *size: (zeros(size), zeros(size))) if cell == "lstm" else (lambda *size: zeros(size))
    for input, hx, match in (
        (zeros(5, 3, I + 2), None, rf"input_size. Expected {I}, got {I + 2}"),
        (zeros(5, 3, I), states(1, 9, H), r"h_0 of size \[1, 3, \d+\], got \[1, 9"),
        (zeros(5, 3, I), states(1, 3, H + 1), "h_0"),
        (zeros(5, I), states(1, H + 1), "h_0"),
    ):
        with pytest.raises(RuntimeError, match=match):
            module(input, hx)
    with pytest.raises(ValueError, match="float32"):
        module(zeros(5, 3, I).float())
    with pytest.raises(RuntimeError, match="input_size"):
        torch.export.export(ours(cell), (randn(5, 3, I + 2),))
    batch_sizes = torch.tensor([3, 2])
    output, h_n = module(PackedSequence(zeros(5, I), batch_sizes))
    assert output.data.shape == (5, H) and (h_n[0] if cell == "lstm" else h_n).shape == (1, 3, H)


@pytest.mark.parametrize("base", ["RNNCell", "GRUCell", "LSTMCell"])
def test_subclass_of_a_cell(base):
    """Of whatever name."""
    for name in ("Mine", "GRUCell", "LSTMCell"):
        module = type(name, (getattr(rnn_ext, base),), {})(I, H)
        torch.manual_seed(1)
        module.reset_parameters()
        torch.manual_seed(1)
        plain = getattr(nn, base)(I, H)
        same_bits(dict(module.named_parameters()), dict(plain.named_parameters()))
        found, expected = module(torch.ones(2, I)), plain(torch.ones(2, I))
        for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (found, expected)), strict=True):
            check_values({"": a}, {"": b}, torch.float32)


class Negated:
    @property
    def _flat_weights(self):
        return [-w for w in rnn_ext.modules._Layer._flat_weights.fget(self)]

    @_flat_weights.setter
    def _flat_weights(self, weights):
        pass


class First:
    batch_first = property(lambda self: True, lambda self, value: None)


@pytest.mark.parametrize("bases", [lambda b: (Negated, b), lambda b: (First, b), lambda b: (b, First)])
def test_mixins_override(bases):
    """What a layer inherits beside ours counts in every kind of call."""
    module = type("Mixed", bases(rnn_ext.GRU), {})(I, H).double()
    mixed = type("Derived", (type(module),), {})(I, H).double()
    mixed.load_state_dict(module.state_dict())
    plain = native("gru", batch_first=isinstance(module, First))
    plain.load_state_dict(module.state_dict())
    if isinstance(module, Negated):
        plain.load_state_dict({name: -w for name, w in plain.state_dict().items()})
    for layer in (module, mixed):
        check_values(flatten(layer(randn(5, 3, I))), flatten(plain(randn(5, 3, I))))


IN_PLACE = {
    "relu": lambda o: nn.functional.relu(o, inplace=True),
    "scaled": lambda o: o.mul_(2),
    "masked": lambda o: o.masked_fill_(o > 0.1, 0),
    "one timestep": lambda o: o.index_fill_(0, torch.tensor([1]), 0.0),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("how", IN_PLACE)
@pytest.mark.parametrize("cell", CELLS)
def test_output_changed_in_place(cell, how, packed):
    """An inplace relu or dropout after a layer is common, and torch.nn's layers take it."""
    module, second = pair(cell, num_layers=2, bidirectional=True)
    given = pack_sequence([randn(n, I, seed=n) for n in (5, 3, 3)]) if packed else randn(5, 3, I)
    found = []
    for layer in (module, second):
        output = layer(given)[0]
        changed = IN_PLACE[how](output.data if packed else output)
        found.append(torch.autograd.grad(changed.square().sum(), list(layer.parameters())))
    for got, want in zip(*found, strict=True):
        check_gradients({"": got}, {"": want})


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"])
def test_pickles_of_torchs_classes_and_of_earlier_versions(name, monkeypatch):
    """The class under that name is what loads them; attributes that it has more than they knew are as torch.nn's."""
    theirs = getattr(nn, name)(I, H)
    input = torch.randn(3, I) if name.endswith("Cell") else torch.randn(5, 3, I)
    pickled = pickle.dumps(theirs)
    monkeypatch.setattr(torch.nn.modules.rnn, name, getattr(rnn_ext, name))
    loaded = pickle.loads(pickled)
    assert type(loaded) is getattr(rnn_ext, name) and loaded.backend == "auto"
    for found, expected in zip(flatten_all(loaded(input)), flatten_all(theirs(input)), strict=True):
        torch.testing.assert_close(found, expected)
    assert set(vars(loaded)) == set(vars(getattr(rnn_ext, name)(I, H)))
    set_before = getattr(rnn_ext, name)(I, H, backend="native")
    assert pickle.loads(pickle.dumps(set_before)).backend == "native"


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch does not multiply by sparse matrices")
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_weights_and_inputs_that_are_not_strided(name):
    """What only torch's kernels take runs on them, or says that it cannot."""
    layer = getattr(rnn_ext, name)(I, H).requires_grad_(False)
    input = torch.randn(5, 3, I)
    expected = flatten_all(layer(input))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # CSR is in beta
        layer.weight_ih_l0 = nn.Parameter(layer.weight_ih_l0.to_sparse_csr(), requires_grad=False)
    for found, wanted in zip(flatten_all(layer(input)), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    explanation = rnn_ext.explain(layer, input)
    reason = "weights of layout torch.sparse_csr have no custom kernel"
    assert (explanation.backend, explanation.reason) == ("native", reason)
    layer.backend = "custom"
    with pytest.raises(RuntimeError, match=r"backend 'custom' cannot run weights of layout torch\.sparse_csr"):
        layer(input)
    nested = torch.nested.nested_tensor([torch.randn(3, I), torch.randn(2, I)])
    for strange, what in (
        (input.to_sparse(), r"layout torch\.sparse_coo"),
        (input[0].to_sparse_csr(), r"layout torch\.sparse_csr"),
        (nested, r"a nested tensor \(pad it, and pass lengths=\)"),
    ):
        for backend in backends.BACKENDS:
            layer = getattr(rnn_ext, name)(I, H, backend=backend)
            for call in (layer, functools.partial(rnn_ext.explain, layer)):
                with pytest.raises(RuntimeError, match=f"expected input as a dense tensor, got {what}"):
                    call(strange)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_sparse_inputs_of_cells(name):
    """Torch's cells, as they multiply, take them."""
    cell, input = getattr(rnn_ext, name)(I, H), torch.randn(3, I)
    state = torch.randn(3, H)
    for hx in (None, (state, state) if name == "LSTMCell" else state):
        expected = flatten_all(cell(input, hx))
        for sparse in (input.to_sparse(), input.to_sparse_csr()):
            for found, wanted in zip(flatten_all(cell(sparse, hx)), expected, strict=True):
                torch.testing.assert_close(found, wanted)
    expected = flatten_all(cell(input, (state, state) if name == "LSTMCell" else state))
    for sparse in (state.to_sparse(), state.to_sparse_csr()):
        found = flatten_all(cell(input, (sparse, sparse) if name == "LSTMCell" else sparse))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(RuntimeError, match=f"{name}: expected input as a dense tensor, got a nested tensor"):
        cell(torch.nested.nested_tensor([torch.randn(2, I)]))


def flatten_all(results) -> list[torch.Tensor]:
    return [results] if isinstance(results, torch.Tensor) else [t for r in results for t in flatten_all(r)]


@pytest.mark.parametrize("projected", [False, True])
def test_methods_that_subclasses_of_torchs_lstm_call(projected):
    options = {"proj_size": 2} if projected else {}
    theirs, mine = nn.LSTM(I, H, bidirectional=True, **options), rnn_ext.LSTM(I, H, bidirectional=True, **options)
    input, states = torch.randn(5, 3, I), (torch.randn(2, 3, 2 if projected else H), torch.randn(2, 3, H))
    order = torch.tensor([2, 0, 1])
    for layer in (theirs, mine):
        layer.check_forward_args(input, states, None)
        with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size"):
            layer.check_forward_args(input, (states[0], states[1][:1]), None)
    assert mine.get_expected_cell_size(input, None) == theirs.get_expected_cell_size(input, None)
    for found, expected in zip(mine.permute_hidden(states, order), theirs.permute_hidden(states, order), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["RNN", "GRU"])
def test_flops_are_counted(name):
    """As many as of torch.nn's layer, but for the products with an initial state that needs no gradient."""
    counts = []
    for library in (nn, rnn_ext):
        layer = getattr(library, name)(64, 32, bidirectional=True)
        input = torch.randn(50, 8, 64, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            layer(input)[0].sum().backward()
        counts.append(counter.get_total_flops())
    theirs, mine = counts
    assert 0 <= mine - theirs < 0.02 * theirs


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_hooks_on_saved_tensors_see_no_empty_one(name):
    """Which they may reduce, to compress it say."""
    layer = getattr(rnn_ext, name)(I, H)
    input = torch.randn(5, 3, I, requires_grad=True)
    expected = torch.autograd.grad(layer(input)[0].sum(), [input, *layer.parameters()])

    def pack(tensor):
        return tensor, tensor.max()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[0]):
        output = layer(input)[0]
    for found, want in zip(torch.autograd.grad(output.sum(), [input, *layer.parameters()]), expected, strict=True):
        assert torch.equal(found, want)


def test_a_property_below_a_plain_subclass():
    """Which the short way through C++ would not ask."""

    class Plain(rnn_ext.GRU):
        pass

    class BatchFirst(Plain):
        batch_first = property(lambda self: True, lambda self, value: None)

    assert Plain._plain and not BatchFirst._plain
    assert BatchFirst(I, H)(torch.randn(4, 3, I))[1].shape == (1, 4, H)


class Seen(torch.Tensor):
    """A subclass that notes what is called with it."""

    functions: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.functions.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("which", range(4))
def test_a_subclass_sees_the_op(which):
    """As input, either state, or a weight."""
    weights = [p.detach() for p in rnn_ext.LSTM(I, H).parameters()]
    given = [torch.randn(5, 2, I), torch.randn(1, 2, H), torch.randn(1, 2, H), weights[0]]
    given[which] = given[which].as_subclass(Seen)
    Seen.functions.clear()
    rnn_ext.functional.lstm(given[0], tuple(given[1:3]), [given[3], *weights[1:]])
    assert torch.ops.rnn_ext.layer.default in Seen.functions


@pytest.mark.parametrize("wanted", [False, True])
def test_flops_of_two_directions(wanted):
    """Products with both weights, and in backward their gradients, the states' and, if wanted, the input's."""
    input = torch.randn(7, 2, 3, requires_grad=wanted)
    with FlopCounterMode(display=False) as counter:
        rnn_ext.GRU(3, 5, bidirectional=True)(input)[0].sum().backward()
    rows, of_input, of_hidden = 7 * 2, 15 * 3, 15 * 5
    assert counter.get_total_flops() == 2 * 2 * rows * (of_input * (2 + wanted) + of_hidden * 3)


def test_stack_in_eval_is_one_call(monkeypatch):
    """Dropout between the layers is for training."""
    calls, stack = [], ops.stack
    monkeypatch.setattr(ops, "stack", lambda *args: calls.append(args) or stack(*args))
    weights = list(nn.GRU(I, H, 2).parameters())
    rnn_ext.functional.gru(torch.randn(5, 2, I), None, weights, num_layers=2, dropout=0.5)
    assert len(calls) == 1


def test_per_sample_gradients_of_torch():
    """By a subclass of tensors that knows torch's operators only."""
    native = nn.GRU(4, 5, batch_first=True)
    layer = rnn_ext.convert(copy.deepcopy(native))
    input = torch.randn(3, 2, 4)
    for module in (native, layer):
        call_for_per_sample_grads(module)(input)[0].sum().backward()
    for expected, found in zip(native.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(found.grad_sample, expected.grad_sample)
    with pytest.raises(RuntimeError, match="'custom' cannot run weights of type ExpandedWeight"):
        call_for_per_sample_grads(rnn_ext.GRU(4, 5, batch_first=True, backend="custom"))(input)
