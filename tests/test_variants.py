"""Layer normalisation, zoneout, recurrent dropout and DropConnect, against loops written here one entry at a time."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import util
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence
from util import (
    CELLS,
    COMBINED,
    NORMS,
    Case,
    Masks,
    Problem,
    build,
    check_gradients,
    check_values,
    cotangents,
    gradients,
    instruction_sets,
    named,
    same_bits,
    sample,
)

import rnn_ext
from rnn_ext import functional, ops

MODULES = {"rnn_tanh": rnn_ext.RNN, "gru": rnn_ext.GRU, "lstm": rnn_ext.LSTM}


def run(problem: Problem, masks: Masks) -> dict[str, Tensor]:
    return util.run(problem, masks=masks)


def cell_by_hand(cell: str, w: dict[str, Tensor], x: Tensor, h_in: Tensor, h: Tensor, c: Tensor | None):
    """One timestep of one entry: h before projection, and c. h_in is what weight_hh multiplies."""
    norm = torch.nn.functional.layer_norm
    xs, hs = w["weight_ih"] @ x, w["weight_hh"] @ h_in
    if "weight_norm_ih" in w:
        xs, hs = norm(xs, xs.shape, w["weight_norm_ih"]), norm(hs, hs.shape, w["weight_norm_hh"])
    if "bias_ih" in w:
        xs, hs = xs + w["bias_ih"], hs + w["bias_hh"]
    if cell == "gru":
        (xr, xz, xn), (hr, hz, hn) = xs.chunk(3), hs.chunk(3)
        z = (xz + hz).sigmoid()
        return (1 - z) * (xn + (xr + hr).sigmoid() * hn).tanh() + z * h, None
    if cell != "lstm":
        return ((xs + hs).tanh() if cell == "rnn_tanh" else (xs + hs).relu()), None
    i, f, g, o = (xs + hs).chunk(4)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    inner = norm(c, c.shape, w["weight_norm_c"], w["bias_norm_c"]) if "weight_norm_c" in w else c
    return o.sigmoid() * inner.tanh(), c


def by_hand(problem: Problem, masks: Masks) -> dict[str, Tensor]:
    """Every entry on its own, every timestep on its own."""
    case = problem.case
    _, batch, _, size = case.size
    hidden_mask, zoneout_h, zoneout_c = masks or (None, None, None)
    if case.layout == "packed":
        sizes = problem.batch_sizes.tolist()
        rows = [[sum(sizes[:t]) + n for t in range(len(sizes)) if n < sizes[t]] for n in range(batch)]
        at = [[(row,) for row in row_of] for row_of in rows]
    else:
        steps = problem.input.shape[case.layout == "batch_first"]
        lengths = [steps] * batch if problem.lengths is None else problem.lengths.tolist()
        at = [[(n, t) if case.layout == "batch_first" else (t, n) for t in range(lengths[n])] for n in range(batch)]
    outputs, cells, h_n, c_n = {}, {}, [], []
    for d, suffix in enumerate(("", "_reverse")[: 1 + case.bidirectional]):
        w = {
            n.removesuffix("_reverse"): t for n, t in problem.weights.items() if n.endswith("_reverse") == bool(suffix)
        }
        features = case.proj or size
        part, c_part = slice(d * features, (d + 1) * features), slice(d * size, (d + 1) * size)
        for n in range(batch):
            h = problem.input.new_zeros(features) if problem.h_0 is None else problem.h_0[d, n]
            c = problem.input.new_zeros(size) if problem.c_0 is None else problem.c_0[d, n]
            places = at[n][::-1] if d else at[n]
            for k, place in enumerate(places):
                # In reverse a sequence begins where the timestep after it (run before it) is the first of another.
                first = place if d == 0 else places[k - 1] if k else None
                if problem.resets is not None and first is not None and problem.resets[first]:
                    h, c = torch.zeros_like(h), torch.zeros_like(c)
                h_in = h if hidden_mask is None else h * hidden_mask[d, n]
                new_h, new_c = cell_by_hand(case.cell, w, problem.input[place], h_in, h, c)
                if case.proj:
                    new_h = w["weight_hr"] @ new_h
                keep = 0 if zoneout_h is None else zoneout_h[place][part]
                h = keep * h + (1 - keep) * new_h
                if new_c is not None:
                    keep = 0 if zoneout_c is None else zoneout_c[place][c_part]
                    c = keep * c + (1 - keep) * new_c
                outputs[(*place, d)], cells[(*place, d)] = h, c
            h_n.append(h)
            c_n.append(c)

    def gather(values: dict[tuple[int, ...], Tensor], features: int) -> Tensor:
        lead = problem.input.shape[:-1]
        zero = problem.input.new_zeros(features)
        whole = [
            torch.cat([values.get((*place, d), zero) for d in range(1 + case.bidirectional)])
            for place in itertools.product(*map(range, lead))
        ]
        return torch.stack(whole).unflatten(0, lead)

    states = [torch.stack(s).unflatten(0, (1 + case.bidirectional, batch)) for s in (h_n, c_n)]
    return named((gather(outputs, case.proj or size), states[0], states[1], gather(cells, size)), case)


SAMPLES = [
    *((Case("lstm", size=(4, 3, 3, 5)), name) for name in COMBINED),
    *((Case("lstm", "batch_first", True, lengths=True, resets=True, size=(5, 4, 3, 7)), n) for n in COMBINED),
    *((Case("lstm", "packed", True, bias=False, size=(4, 3, 3, 17)), n) for n in ("norm", "masks", "norm+masks")),
    *((Case("lstm", lengths=True, proj=3, state=False, size=(4, 3, 3, 5)), n) for n in ("norm", "masks", "norm+masks")),
    *((Case("lstm", "packed", True, proj=2, size=(3, 2, 3, 5)), n) for n in ("norm+masks", "zoneout_h")),
    *((Case("lstm", size=(2, 1, 1, 2)), name) for name in ("norm", "norm+masks")),  # rows so few: weights not packed
    *((Case("lstm", size=(4, 1, 2, 33)), name) for name in ("norm", "masks")),
    *((Case("lstm", size=(6, 1, 2, 33)), name) for name in ("norm", "masks")),
]
SAMPLES += [
    (case, name)
    for cell in ("rnn_tanh", "rnn_relu", "gru")
    for case in (Case(cell, "batch_first", True, lengths=True, resets=True, size=(5, 4, 3, 7)), Case(cell, "packed"))
    for name in ("hidden", "zoneout_h", "masks")
]
IDS = [f"{case}-{name}" for case, name in SAMPLES]


@pytest.mark.parametrize(("case", "name"), SAMPLES, ids=IDS)
def test_equals_the_loop(case, name):
    """Values; gradients of all results together, and of each alone."""
    problem, masks = sample(case, name)
    expected, expected_grads = gradients(lambda p: by_hand(p, masks), problem)
    actual, grads = gradients(lambda p: run(p, masks), problem)
    check_values(actual, expected)
    check_gradients(grads, expected_grads)
    for result, cotangent in cotangents(expected).items():
        only = {result: cotangent}
        _, want = gradients(lambda p: by_hand(p, masks), problem, only, unused=True)
        check_gradients(gradients(lambda p: run(p, masks), problem, only, unused=True)[1], want)


@pytest.mark.parametrize(
    "size",
    [
        *((3, 9, 33, 65), (7, 17, 1, 7), (2, 13, 7, 129), (270, 1, 2, 5), (0, 2, 3, 4)),
        (1, 6, 99, 101),  # more rows whose weights are used as they lie, in one timestep
        *((37, 1, 5, 68), (33, 1, 9, 129)),  # one entry, whose input gates are computed beside its steps
    ],
    ids=str,
)
def test_equals_the_reference_at_odd_sizes(size):
    """By every instruction set, in float32 and float64; the reference is held against the loop here and below."""
    from util import instruction_sets

    from rnn_ext import reference

    for cell, name in (("lstm", "norm+masks"), ("lstm", "masks"), ("gru", "masks"), ("rnn_tanh", "masks")):
        case = Case(cell, bidirectional=True, lengths=size[0] == 7, size=size)
        problem, masks = sample(case, name)

        def oracle(p):
            weights = list(p.weights.values())
            flags = (case.cell, case.bidirectional, False, masks)  # noqa: B023
            return named(reference.layer(p.input, p.h_0, p.c_0, weights, None, p.lengths, None, *flags), case)  # noqa: B023

        expected, expected_grads = gradients(oracle, problem, unused=True)
        for dtype in (torch.float64, torch.float32):
            if dtype == torch.float32 and size[0] > 100:
                continue
            for _ in instruction_sets():
                actual, grads = gradients(lambda p: run(p, masks), problem.to(dtype), unused=True)  # noqa: B023
                check_values(actual, expected, dtype)
                check_gradients(grads, expected_grads, dtype)
                with torch.no_grad():
                    check_values(run(problem.to(dtype), masks), expected, dtype)


def test_padding_is_not_read():
    """NaN past the end of a sequence, in the input, its masks and the gradient, changes nothing."""
    case = Case("lstm", lengths=True, bidirectional=True, size=(5, 4, 3, 7))
    problem, masks = sample(case, "norm+masks")
    past = torch.arange(5).unsqueeze(1) >= problem.lengths
    grad_of = cotangents(run(problem, masks))
    clean = gradients(lambda p: run(p, masks), problem, grad_of)
    problem.input[past] = math.nan
    poisoned = [masks[0], *(m.masked_fill(past.unsqueeze(-1), math.nan) for m in masks[1:])]
    grad_of["output"] = grad_of["output"].masked_fill(past.unsqueeze(-1), math.nan)
    dirty = gradients(lambda p: run(p, poisoned), problem, grad_of)
    same_bits(dirty[0], clean[0])
    same_bits(dirty[1], clean[1])


@pytest.mark.parametrize("options", [{}, {"layer_norm": True}, {"zoneout": 0.2}], ids=["plain", "norm", "zoneout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("hidden", [5, 16, 33])
def test_what_is_not_a_number_stays_in_its_episode(hidden, dtype, options):
    """Also out of the room that a row has past its last unit."""
    layer = rnn_ext.LSTM(2, hidden, bidirectional=True, backend="custom", dtype=dtype, **options)
    first, second = slice(0, 3), slice(3, 7)
    resets, input = torch.arange(7).unsqueeze(1) == 3, torch.randn(7, 1, 2, dtype=dtype)
    for _ in instruction_sets():
        for own, other in ((first, second), (second, first)):
            found = []
            for value in (0.0, math.nan, math.inf):
                x = input.clone()
                x[other] = value
                x.requires_grad_()
                torch.manual_seed(0)
                output = layer(x, resets=resets)[0][own]
                (grad,) = torch.autograd.grad(output.sum(), x)
                found.append({"output": output, "grad": grad[own]})
            same_bits(found[1], found[0])
            same_bits(found[2], found[0])


@pytest.mark.parametrize("cell", CELLS)
def test_several_rows_do_not_depend_on_more(cell):
    """To the bit, whether a step computes its input gates itself or not: weights few or many, a tail or none."""
    for inputs, hidden in ((3, 18), (5, 64), (3, 380)):
        problem, masks = sample(Case(cell, bidirectional=True, size=(4, 11, inputs, hidden)), "masks", torch.float32)
        masks = [None if mask is None else mask.to(torch.float32) for mask in masks]
        for _ in instruction_sets():
            together = run(problem, masks)
            for n in (2, 3, 7):
                some = [None if mask is None else mask[:, :n] for mask in masks]
                same_bits(run(problem.first_entries(n), some), {name: t[:, :n] for name, t in together.items()})


@pytest.mark.parametrize("size", [(12, 67, 61, 130), (40, 1, 61, 257)], ids=["slices", "teams"])
@pytest.mark.parametrize("name", ["norm", "masks", "norm+masks"])
def test_threads_do_not_change_the_bits(name, size):
    case = Case("lstm", bidirectional=True, size=size)
    problem, masks = sample(case, name, torch.float32)
    found = []
    for threads in (1, 4):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found.append(gradients(lambda p: run(p, masks), problem))
        finally:
            torch.set_num_threads(before)
    same_bits(found[1][0], found[0][0])
    same_bits(found[1][1], found[0][1])


def options_of(cell: str) -> list[dict]:
    all_cells = [{"weight_dropout": 0.4}, {"recurrent_dropout": 0.3}, {"zoneout": 0.2}]
    if cell != "lstm":
        return [*all_cells, {k: v for o in all_cells for k, v in o.items()}]
    lstm = [{"layer_norm": True}, {"zoneout": (0.0, 0.5)}]
    return [*all_cells, *lstm, {k: v for o in all_cells + lstm for k, v in o.items()}]


@pytest.mark.parametrize(
    ("cell", "options"),
    [("lstm", {"layer_norm": True}), *((cell, options_of(cell)[-1]) for cell in MODULES)],
    ids=["lstm-layer_norm", *MODULES],
)
def test_gradcheck_with_masks_fixed(cell, options):
    """Backward, forward mode and the second derivative, against differences."""
    torch.manual_seed(0)
    module = MODULES[cell](2, 2, dtype=torch.float64, **options)
    names = [name for name, _ in module.named_parameters()]
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        torch.manual_seed(5)
        of = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, of, (x,), {"lengths": [3, 2]})[0]

    torch.autograd.gradcheck(call, (x, *module.parameters()), check_forward_ad=True, fast_mode=True)
    torch.autograd.gradgradcheck(call, (x, *module.parameters()), fast_mode=True)


@pytest.mark.parametrize("layout", ["lengths", "packed"])
def test_layouts_agree(layout):
    """In eval, where nothing is drawn: a packed batch and one with lengths give each sequence what it gets alone."""
    torch.manual_seed(0)
    module = rnn_ext.LSTM(3, 4, 2, bidirectional=True, layer_norm=True, zoneout=0.2, dtype=torch.float64).eval()
    x = torch.randn(6, 3, 3, dtype=torch.float64)
    lengths = [6, 4, 1]
    if layout == "packed":
        output, _ = torch.nn.utils.rnn.pad_packed_sequence(module(pack_padded_sequence(x, lengths))[0])
    else:
        output, _ = module(x, lengths=lengths)
    for n, length in enumerate(lengths):
        torch.testing.assert_close(output[:length, n], module(x[:length, n])[0], rtol=1e-12, atol=1e-12)
    module.train()
    module.recurrent_dropout = 0.5
    packed = pack_padded_sequence(x, lengths)
    assert module(packed)[0].data.shape == (11, 8)
    assert module(x[:, 0])[0].shape == (6, 8)


def test_recompute_uses_the_same_masks():
    torch.manual_seed(0)
    module = rnn_ext.LSTM(3, 4, 2, layer_norm=True, zoneout=0.2, recurrent_dropout=0.5, weight_dropout=0.5)
    x = torch.randn(6, 3, 3)
    found = []
    for recompute in (False, True):
        module.recompute = recompute
        torch.manual_seed(1)
        found.append(torch.autograd.grad(module(x)[0].sum(), list(module.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


OPCHECK = [
    (Case("lstm", bidirectional=True, proj=2, size=(3, 2, 3, 4)), "norm+masks"),
    (Case("lstm", "packed", size=(3, 2, 3, 4)), "norm"),
    (Case("gru", "batch_first", lengths=True, size=(3, 2, 3, 4)), "masks"),
    (Case("rnn_tanh", size=(3, 2, 3, 4)), "zoneout_h"),
]


@pytest.mark.parametrize(("case", "name"), OPCHECK, ids=[f"{case}-{name}" for case, name in OPCHECK])
def test_opcheck(case, name):
    problem, masks = sample(case, name)
    problem = problem.requiring()
    given = (problem.batch_sizes, problem.lengths, problem.resets, masks)
    flags = (case.cell, case.bidirectional, case.layout == "batch_first", case.has_cell_state)
    args = (problem.input, problem.h_0, problem.c_0, list(problem.weights.values()), *given, *flags)
    torch.library.opcheck(torch.ops.rnn_ext.layer.default, (*args, False))
    with torch.no_grad():
        real = torch.ops.rnn_ext.layer(*args, True)
        mode = torch._subclasses.FakeTensorMode()
        fake_args = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args)
        with mode:
            fake = torch.ops.rnn_ext.layer(*fake_args, True)
    assert [(t.shape, t.stride(), t.dtype) for t in real] == [(t.shape, t.stride(), t.dtype) for t in fake]


def test_func_transforms():
    """Per-sample gradients: with the same masks for all what a loop gives, with different ones the same in the mean."""
    torch.manual_seed(0)
    module = rnn_ext.LSTM(3, 4, layer_norm=True, zoneout=0.3, recurrent_dropout=0.3, dtype=torch.float64)
    x = torch.randn(3, 5, 2, 3, dtype=torch.float64)
    parameters = dict(module.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,))[0].square().sum()

    torch.manual_seed(1)
    together = torch.func.vmap(torch.func.grad(loss), (None, 0), randomness="same")(parameters, x)
    for n in range(3):
        torch.manual_seed(1)
        for name, grad in torch.func.grad(loss)(parameters, x[n]).items():
            torch.testing.assert_close(together[name][n], grad)
    same = x[:1].expand(3, -1, -1, -1)
    apart = torch.func.vmap(torch.func.grad(loss), (None, 0), randomness="different")(parameters, same)
    assert not torch.allclose(apart["bias_ih_l0"][0], apart["bias_ih_l0"][1])

    def hvp(x: Tensor, tangent: Tensor) -> Tensor:
        def gradient(x: Tensor) -> Tensor:
            torch.manual_seed(2)
            return torch.func.grad(loss, 1)(parameters, x)

        return torch.func.jvp(gradient, (x,), (tangent,))[1]

    step, tangent = 1e-5, torch.randn_like(x[0])

    def gradient(x: Tensor) -> Tensor:
        torch.manual_seed(2)
        return torch.func.grad(loss, 1)(parameters, x)

    numeric = (gradient(x[0] + step * tangent) - gradient(x[0] - step * tangent)) / (2 * step)
    torch.testing.assert_close(hvp(x[0], tangent), numeric, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reduced_precision(dtype):
    case = Case("lstm", bidirectional=True, size=(5, 3, 4, 33))
    problem, masks = sample(case, "norm+masks", dtype)
    actual, grads = gradients(lambda p: run(p, masks), problem)
    expected, expected_grads = gradients(lambda p: run(p, masks), problem.to(torch.float64))
    check_values(actual, expected, dtype)
    check_gradients(grads, expected_grads, dtype)
    module = rnn_ext.LSTM(4, 5, layer_norm=True, zoneout=0.1, recurrent_dropout=0.2, weight_dropout=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = module(torch.randn(3, 2, 4))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert module.weight_norm_c_l0.grad.isfinite().all()


def test_bad_arguments_of_the_op():
    problem, masks = sample(Case("lstm", size=(5, 3, 4, 7)), "norm+masks")
    gru = build(Case("gru", size=(5, 3, 4, 7)))

    def call(of: Problem, masks: Masks, weights: list[Tensor] | None = None) -> None:
        weights = list(of.weights.values()) if weights is None else weights
        ops.layer(of.input, None, None, weights, cell=of.case.cell, masks=masks)

    with pytest.raises(ValueError, match="expected no masks or 3, got 2"):
        call(problem, masks[:2])
    with pytest.raises(RuntimeError, match=r"expected hidden_mask of size \[1, 3, 7\], got \[1, 3, 6\]"):
        call(problem, [masks[0][..., 1:], None, None])
    with pytest.raises(RuntimeError, match=r"expected zoneout_c of size \[5, 3, 7\], got \[4, 3, 7\]"):
        call(problem, [None, None, masks[2][1:]])
    with pytest.raises(RuntimeError, match="expected zoneout_h of a floating-point dtype"):
        call(problem, [None, masks[1].bool(), None])
    with pytest.raises(ValueError, match="zoneout_c was given, but gru has no cell state"):
        call(gru, masks)
    with pytest.raises(ValueError, match="only an lstm can have layer normalisation"):
        call(gru, [], [*gru.weights.values(), *(torch.ones(21, dtype=torch.float64),) * 4])
    with pytest.raises(RuntimeError, match=r"expected weight_norm_c of size \[7\], got \[28\]"):
        weights = list(problem.weights.values())
        call(problem, [], [*weights[:6], weights[5], weights[7]])
    with pytest.raises(ValueError, match="Expected 2 to 5 weights"):
        functional.gru(gru.input, None, [*gru.weights.values()] * 2)
    with pytest.raises(ValueError, match="6 to 9 with layer normalisation"):
        functional.lstm(problem.input, None, list(problem.weights.values()) * 2)


@pytest.mark.parametrize("name", ["norm", "masks", "norm+masks"])
def test_threads_do_not_change_the_bits_of_projections(name):
    problem, masks = sample(Case("lstm", bidirectional=True, proj=33, size=(12, 67, 21, 70)), name, torch.float32)
    found = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        found.append(gradients(lambda p: run(p, masks), problem))
    same_bits(found[1][0], found[0][0])
    same_bits(found[1][1], found[0][1])


@pytest.mark.parametrize("which", range(3))
def test_a_mask_changed_before_backward(which):
    problem, masks = sample(Case("lstm"), "masks")
    output = run(problem.requiring(), masks)["output"]
    masks[which].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("suffix", ["", "_reverse"])
def test_sizes_of_norms(name, suffix):
    problem, _ = sample(Case("lstm", bidirectional=True), "norm")
    wrong = problem.weights | {name + suffix: problem.weights[name + suffix][:-1]}
    with pytest.raises(RuntimeError, match=f"expected {name} of size"):
        ops.layer(problem.input, None, None, list(wrong.values()), cell="lstm", bidirectional=True)
