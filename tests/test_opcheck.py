"""``torch.library.opcheck``: schema, autograd registration, fake kernel and AOTDispatch, for every kind of call."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from util import CELLS, Case, build

from rnn_ext import ops

SIZE = (3, 2, 3, 4)
SAMPLES = [
    *(Case(cell, size=SIZE) for cell in CELLS),
    *(Case(cell, "packed", True, size=SIZE) for cell in CELLS),
    *(Case(cell, "batch_first", True, lengths=True, resets=True, size=SIZE) for cell in CELLS),
    Case("lstm", "batch_first", True, proj=2, size=SIZE),
    Case("lstm", "packed", bias=False, proj=2, size=SIZE),
    Case("gru", bias=False, state=False, lengths=True, size=SIZE),
    Case("rnn_tanh", resets=True, state=False, size=SIZE),
    # The batch size is known from batch_sizes' values alone.
    Case("gru", "packed", state=False, size=SIZE),
    Case("lstm", "packed", True, proj=2, state=False, size=SIZE),
]


def arguments(case: Case, dtype=torch.float32, needed=("input", "weight_hh", "h_0")) -> tuple:
    assert ops.is_available(), ops.load_error()
    p = build(case).to(dtype).requiring(needed)
    masks = (p.batch_sizes, p.lengths, p.resets, [])
    flags = (case.cell, case.bidirectional, case.layout == "batch_first", case.has_cell_state, False)
    return (p.input, p.h_0, p.c_0, list(p.weights.values()), *masks, *flags)


@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_opcheck(case):
    args = arguments(case)
    torch.library.opcheck(torch.ops.rnn_ext.layer.default, args)
    # without a gradient, and of the weights alone
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.rnn_ext.layer.default, arguments(case, needed=()), test_utils=tests)
    torch.library.opcheck(
        torch.ops.rnn_ext.layer.default, arguments(case, torch.float64, ("weight_ih",)), test_utils=tests
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_opcheck_reduced_precision(dtype):
    for cell in CELLS:
        args = arguments(Case(cell, "batch_first", True, size=SIZE), dtype)
        torch.library.opcheck(
            torch.ops.rnn_ext.layer.default,
            args,
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


@pytest.mark.parametrize("size", [(0, 2, 3, 4), (3, 0, 3, 4), (1, 1, 1, 1)], ids=str)
def test_opcheck_small(size):
    for cell in CELLS:
        torch.library.opcheck(torch.ops.rnn_ext.layer.default, arguments(Case(cell, bidirectional=True, size=size)))


# (Packed without a state, the batch size is not known before the call.)
@pytest.mark.parametrize("case", [case for case in SAMPLES if case.state or case.layout != "packed"], ids=str)
def test_fake_and_real_agree_on_strides_and_saved(case):
    """The fake kernel promises sizes, strides and dtypes, of what is saved too; compiled code relies on them."""
    with torch.no_grad():
        args = arguments(case)
        for save in (False, True):
            real = torch.ops.rnn_ext.layer(*args[:-1], save)
            mode = torch._subclasses.FakeTensorMode()
            fake_args = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args[:-1])
            with mode:
                fake = torch.ops.rnn_ext.layer(*fake_args, save)
            for name, r, f in zip(("output", "h_n", "c_n", "cells", "saved"), real, fake, strict=True):
                assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype), (name, save)
                assert save or name != "saved" or r.numel() == 0


def test_opcheck_random_mask():
    torch.library.opcheck(torch.ops.rnn_ext.random_mask.default, (torch.tensor(1), (3, 5), 0.5, 2.0, torch.float32))


def test_every_op_of_the_library_is_checked_here():
    """Or in test_quantized_modules.py. Ops added later must be checked too; the ones behind the layer are reached
    through its gradients."""
    names = {
        schema.name.split("::")[1] for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("rnn_ext::")
    }
    checked = {"random_mask", "quantized_layer", "step_down"}  # the last has no tensors
    assert checked | {"layer"} < names
    with pytest.raises(RuntimeError, match="rnn_ext::step_down is for call_each alone"):
        torch.ops.rnn_ext.step_down()
    assert all(name.startswith("layer") for name in names - checked), names


def test_the_fake_kernel_checks_sizes():
    """Of what a real run would refuse."""

    def meta(*size: int) -> torch.Tensor:
        return torch.zeros(size, device="meta")

    weights = list(torch.nn.LSTM(3, 4, device="meta").parameters())
    with pytest.raises(RuntimeError, match="expected c_0 of size"):
        ops.layer(meta(5, 2, 3), None, meta(1, 2, 5), weights, "lstm")
    with pytest.raises(RuntimeError, match="expected input with 3 dimensions"):
        ops.layer(meta(5, 3), None, None, weights, "lstm")
    for i, name in enumerate(("hidden_mask", "zoneout_h", "zoneout_c")):
        masks = [meta(7, 7, 7) if j == i else None for j in range(3)]
        with pytest.raises(RuntimeError, match=f"expected {name} of size"):
            ops.layer(meta(5, 2, 3), None, None, weights, "lstm", masks=masks)


def test_a_stack_of_fake_tensors_goes_layer_by_layer():
    with FakeTensorMode():
        weights = list(torch.nn.GRU(3, 4, 2).parameters())
        assert ops.stack(torch.randn(5, 2, 3), None, None, weights, "gru", 2) is None
