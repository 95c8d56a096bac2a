"""What the tests share: problems for the layer op built from a short description, its oracle, and tolerances.

A :class:`Case` says what to build, :func:`build` fills it with numbers (the same for the same case), :func:`run` gives
it to the op and :func:`oracle` to ``rnn_ext.reference``. Results and gradients are dicts from a name to a tensor.
"""

from __future__ import annotations

import dataclasses
import itertools
import platform
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rnn_ext import ops, reference

CELLS = tuple(reference.CELLS)
LAYOUTS = ("dense", "batch_first", "packed")
# Below, at and above multiples of every vector and tile width (1 to 128), and primes.
SIZES = (1, 7, 33, 65, 129)
PRIMES = (2, 3, 5, 11, 13)
NORMS = ("weight_norm_ih", "weight_norm_hh", "weight_norm_c", "bias_norm_c")
Masks = list[Tensor | None]  # as the op has them
H100 = {"shared_bytes": 227 * 1024, "multiprocessors": 132}  # for ops.cuda_kernel, of a GPU that need not be here

# Largest |actual - expected|, relative to the larger of 1 and the largest expected value.
#   float64   rounding of sums of some hundred products, carried over some ten timesteps: about 1e-14
#   float32   the promise is 2e-6 after 500 timesteps (outputs are bounded by 1; one ulp is 6e-8)
#   bfloat16, float16   the promise is 2e-2 and 4e-3 (one rounding of the output is 4e-3 and 5e-4)
VALUE_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# The same for gradients, relative to the largest entry of that gradient: sums over N * L products.
GRAD_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, gpu: dict[str, int]) -> None:
    """For `explain`: there is such a GPU, and the dispatch table is asked about one like it."""
    choose = ops.cuda_kernel
    monkeypatch.setattr(ops, "cuda_problem", lambda device: None)
    monkeypatch.setattr(ops, "cuda_kernel", lambda *args, device, **options: choose(*args, **options, **gpu))


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem in words. ``lengths``, ``resets`` and ``state`` say whether that argument is given."""

    cell: str = "lstm"
    layout: str = "dense"
    bidirectional: bool = False
    bias: bool = True
    proj: int = 0
    lengths: bool = False
    resets: bool = False
    state: bool = True
    size: tuple[int, int, int, int] = (5, 3, 4, 7)  # L, N, I, H

    def __str__(self) -> str:
        words = [self.cell, self.layout]
        words += ["bi"] * self.bidirectional + ["nobias"] * (not self.bias) + [f"proj{self.proj}"] * bool(self.proj)
        words += ["lengths"] * self.lengths + ["resets"] * self.resets + ["nostate"] * (not self.state)
        return "-".join([*words, "x".join(map(str, self.size))])

    def but(self, **changes) -> Case:
        return dataclasses.replace(self, **changes)

    @property
    def has_cell_state(self) -> bool:
        return reference.CELLS[self.cell].has_cell_state


@dataclasses.dataclass
class Problem:
    """The arguments of the op, with the weights by name (``weight_hh``, ``weight_hh_reverse``, ...)."""

    case: Case
    input: Tensor
    h_0: Tensor | None
    c_0: Tensor | None
    weights: dict[str, Tensor]
    batch_sizes: Tensor | None
    lengths: Tensor | None
    resets: Tensor | None

    def leaves(self) -> dict[str, Tensor]:
        """Everything a gradient can be asked of."""
        states = {name: t for name, t in (("h_0", self.h_0), ("c_0", self.c_0)) if t is not None}
        return {"input": self.input, **states, **self.weights}

    def having(self, leaves: dict[str, Tensor]) -> Problem:
        """The same problem with some of its leaves exchanged."""
        states = {name: leaves[name] for name in ("input", "h_0", "c_0") if name in leaves}
        weights = {name: leaves.get(name, t) for name, t in self.weights.items()}
        return dataclasses.replace(self, **states, weights=weights)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Problem:
        return self.having({name: fn(t) for name, t in self.leaves().items()})

    def to(self, dtype: torch.dtype) -> Problem:
        return self.map(lambda t: t.detach().to(dtype))

    def first_entries(self, count: int) -> Problem:
        """The same with the first entries of the batch only, of a dense problem without lengths and resets."""
        states = {name: None if t is None else t[:, :count] for name, t in (("h_0", self.h_0), ("c_0", self.c_0))}
        return dataclasses.replace(self, input=self.input[:, :count], **states)

    def requiring(self, names: Iterable[str] | None = None) -> Problem:
        """Fresh leaves that require gradients: all, or those named."""
        chosen = set(self.leaves() if names is None else names)
        fresh = {name: t.detach().clone() for name, t in self.leaves().items()}
        return self.having({name: t.requires_grad_(name in chosen) for name, t in fresh.items()})


def decreasing_sizes(lengths: Sequence[int]) -> Tensor:
    """Batch sizes of sequences of these lengths, as ``pack_padded_sequence`` gives them."""
    return torch.tensor([sum(n > t for n in lengths) for t in range(max(lengths))], dtype=torch.int64)


def build(case: Case, dtype: torch.dtype = torch.float64) -> Problem:
    """Numbers for a case: standard normal input and states, weights as ``torch.nn`` draws them.

    Lengths are unsorted, with a zero and a full one where the batch has room; resets include first timesteps and,
    with lengths, timesteps past the end.
    """
    length, batch, inputs, hidden = case.size
    cell, directions = reference.CELLS[case.cell], 1 + case.bidirectional
    seed = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=seed, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=seed, dtype=torch.float64) * 2 - 1) / hidden**0.5

    features = case.proj or hidden
    weights: dict[str, Tensor] = {}
    for suffix in ("", "_reverse")[:directions]:
        weights["weight_ih" + suffix] = uniform(cell.gates * hidden, inputs)
        weights["weight_hh" + suffix] = uniform(cell.gates * hidden, features)
        if case.bias:
            weights["bias_ih" + suffix] = uniform(cell.gates * hidden)
            weights["bias_hh" + suffix] = uniform(cell.gates * hidden)
        if case.proj:
            weights["weight_hr" + suffix] = uniform(case.proj, hidden)
    batch_sizes = lengths = resets = None
    if case.layout == "packed":
        drawn = torch.randint(1, length + 1, (batch,), generator=seed).tolist()
        batch_sizes = decreasing_sizes([length, *drawn[1:]])
        input = normal(int(batch_sizes.sum()), inputs)
    else:
        lead = (batch, length) if case.layout == "batch_first" else (length, batch)
        input = normal(*lead, inputs)
        if case.resets:
            resets = torch.rand(lead, generator=seed) < 0.3
    if case.lengths:
        lengths = torch.randint(0, length + 1, (batch,), generator=seed)
        if batch > 1:
            lengths[-1] = length
        if batch > 2:
            lengths[batch // 2] = 0
    h_0 = normal(directions, batch, features) if case.state else None
    c_0 = normal(directions, batch, hidden) if case.state and cell.has_cell_state else None
    return Problem(case, input, h_0, c_0, weights, batch_sizes, lengths, resets).to(dtype)


# What variants are made of: norm, hidden mask, zoneout of h and of c.
COMBINED = {
    "norm": (1, 0, 0, 0),
    "hidden": (0, 1, 0, 0),
    "zoneout_h": (0, 0, 1, 0),
    "zoneout_c": (0, 0, 0, 1),
    "masks": (0, 1, 1, 1),
    "norm+masks": (1, 1, 1, 1),
    "norm+zoneout_h": (1, 0, 1, 0),
}


def combined(cell: str) -> list[str]:
    """Those that the cell has."""
    return [name for name in COMBINED if cell == "lstm" or not ("norm" in name or name == "zoneout_c")]


def vary(problem: Problem, norm: bool, hidden: bool, zoneout_h: bool, zoneout_c: bool) -> tuple[Problem, Masks]:
    """The same problem with weights for layer normalisation, and masks: those asked for."""
    case = problem.case
    _, batch, _, size = case.size
    seed = torch.Generator().manual_seed(7)
    suffixes = ("", "_reverse")[: 1 + case.bidirectional]
    weights = {}
    for suffix in suffixes:
        weights |= {n: w for n, w in problem.weights.items() if n.endswith("_reverse") == bool(suffix)}
        if norm:
            sizes = dict(zip(NORMS, (4 * size, 4 * size, size, size), strict=True))
            new = {n + suffix: torch.randn(k, generator=seed, dtype=torch.float64) for n, k in sizes.items()}
            weights |= {n: w.to(problem.input.dtype) for n, w in new.items()}
    problem.weights = weights
    features = case.proj or size
    lead = problem.input.shape[:-1]

    def zoneout(k: int) -> Tensor:
        return (torch.rand(*lead, len(suffixes) * k, generator=seed) < 0.3).to(torch.float64)

    masks = [
        torch.rand(len(suffixes), batch, features, generator=seed, dtype=torch.float64) if hidden else None,
        zoneout(features) if zoneout_h else None,
        zoneout(size) if zoneout_c else None,
    ]
    return problem, masks if hidden or zoneout_h or zoneout_c else []


def sample(case: Case, name: str, dtype: torch.dtype = torch.float64) -> tuple[Problem, Masks]:
    """The problem of a case with the options that `name` combines."""
    norm, hidden, zoneout_h, zoneout_c = COMBINED[name]
    return vary(build(case, dtype), norm, hidden, zoneout_h, zoneout_c and case.has_cell_state)


def named(results: Sequence[Tensor | None], case: Case, cell_states: bool = True) -> dict[str, Tensor]:
    """The four results of the op by name, without those that this cell does not have."""
    names = ["output", "h_n"]
    if case.has_cell_state:
        names += ["c_n"] + ["cells"] * cell_states
    return {name: t for name, t in zip(("output", "h_n", "c_n", "cells"), results, strict=True) if name in names}


def run(problem: Problem, cell_states: bool | None = None, **options) -> dict[str, Tensor]:
    """The op on this problem. ``cell_states`` (default: where the cell has them) asks for the fourth result."""
    case = problem.case
    cell_states = case.has_cell_state if cell_states is None else cell_states
    results = ops.layer(
        problem.input,
        problem.h_0,
        problem.c_0,
        list(problem.weights.values()),
        cell=case.cell,
        batch_sizes=problem.batch_sizes,
        lengths=problem.lengths,
        resets=problem.resets,
        bidirectional=case.bidirectional,
        batch_first=case.layout == "batch_first",
        cell_states=cell_states,
        **options,
    )
    return named(results, case, cell_states)


class Calls(TorchDispatchMode):
    """Which operators reach the kernels."""

    def __enter__(self):
        self.names: list[str] = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._overloadpacket.__name__)
        return func(*args, **kwargs or {})


def instruction_sets() -> Iterator[str]:
    """Switch the kernels to each instruction set that this processor has, in turn, and back."""
    best = ops.cpu_capability()
    for name in ("baseline", "avx2", "avx512", "amx"):
        try:
            ops.set_cpu_capability(name)
        except ValueError:
            continue
        yield name
    ops.set_cpu_capability(best)  # after a failed test conftest.py does it


def widens(dtype: torch.dtype) -> bool:
    """Whether the instruction set in use turns numbers of 16 bits into float32 as it reads them: SSE2 no float16."""
    sse2 = ops.cpu_capability() == "baseline" and platform.machine() in ("x86_64", "AMD64")
    return not (sse2 and dtype == torch.float16)


def forward_agrees(problem: Problem, dtype: torch.dtype) -> None:
    """Values of the op, by every instruction set, are the oracle's, and in training they have the same bits."""
    expected = oracle(problem.to(torch.float64))
    for _ in instruction_sets():
        with torch.no_grad():
            actual = run(problem)
        check_values(actual, expected, dtype)
        assert all(t.dtype == dtype for t in actual.values())
        same_bits(actual, run(problem.requiring()))


def agree(problem: Problem, dtype: torch.dtype = torch.float64) -> None:
    """Values and gradients of the op, by every instruction set, are the oracle's in float64 on the same numbers."""
    expected, expected_grads = gradients(oracle, problem.to(torch.float64))
    for _ in instruction_sets():
        actual, grads = gradients(run, problem)
        assert all(t.dtype == dtype for t in (*actual.values(), *grads.values()))
        check_values(actual, expected, dtype)
        check_gradients(grads, expected_grads, dtype)


def oracle(problem: Problem, masks: Masks = ()) -> dict[str, Tensor]:
    """The reference on this problem."""
    case = problem.case
    weights = list(problem.weights.values())
    flags = (case.cell, case.bidirectional, case.layout == "batch_first")
    rows = (problem.batch_sizes, problem.lengths, problem.resets)
    return named(reference.layer(problem.input, problem.h_0, problem.c_0, weights, *rows, *flags, masks), case)


def cotangents(results: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for name, t in results.items()
    }


def gradients(
    fn: Callable[[Problem], dict[str, Tensor]],
    problem: Problem,
    grad_of: dict[str, Tensor] | None = None,
    wrt: Iterable[str] | None = None,
    unused: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Results and gradients of ``fn``. ``grad_of`` has the gradients of its results (default: normal, of all).

    ``unused``: results that depend on no leaf, and leaves that no result depends on, are no error.
    """
    problem = problem.requiring(wrt)
    results = fn(problem)
    grad_of = cotangents(results) if grad_of is None else grad_of
    leaves = {name: t for name, t in problem.leaves().items() if t.requires_grad}
    if unused:
        grad_of = {name: g for name, g in grad_of.items() if results[name].requires_grad}
    grads = torch.autograd.grad(
        [results[name] for name in grad_of],
        list(leaves.values()),
        list(grad_of.values()),
        allow_unused=unused,
        materialize_grads=unused,
    )
    return {name: t.detach() for name, t in results.items()}, dict(zip(leaves, grads, strict=True))


def largest(tensors: Iterable[Tensor]) -> float:
    return max((t.abs().max().item() for t in tensors if t.numel()), default=0.0)


def check(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, floor: float, what: str) -> None:
    """Each tensor within ``tolerance`` of the expected one, relative to its largest entry (or ``floor`` if larger).

    NaN and infinity are equal to themselves only.
    """
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got = actual[name]
        assert got.shape == want.shape, f"{what} {name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        got, want = got.detach().double(), want.detach().double()
        odd = ~torch.isfinite(want)
        torch.testing.assert_close(
            got[odd], want[odd], rtol=0, atol=0, equal_nan=True, msg=f"{what} {name}: NaN or inf"
        )
        got, want = got[~odd], want[~odd]
        error = largest([got - want]) if bool(torch.isfinite(got).all()) else float("inf")
        allowed = tolerance * max(largest([want]), floor)
        assert error <= allowed, f"{what} {name}: off by {error:.3g}, allowed {allowed:.3g}"


def check_values(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> None:
    check(actual, expected, VALUE_TOLERANCE[dtype], 1.0, "value of")


def check_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> None:
    # A gradient that all but vanishes beside the others is held to their scale: it is rounding there too.
    check(actual, expected, GRAD_TOLERANCE[dtype], 1e-3 * largest(expected.values()), "gradient of")


def same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got, bits = actual[name], {2: torch.int16, 4: torch.int32, 8: torch.int64}[want.element_size()]  # -0 is not 0
        same = got.dtype == want.dtype and torch.equal(got.contiguous().view(bits), want.contiguous().view(bits))
        assert same, f"{name}: differs by {largest([got - want]):.3g}"


def projected(*sizes: int) -> list[tuple[str, int]]:
    """Every cell as it is, and the one that can be projected, to these sizes."""
    return [*((cell, 0) for cell in CELLS), *(("lstm", size) for size in sizes)]


def matrix() -> list[Case]:
    """Every cell x direction x layout x bias x projection x lengths x resets, each at its own small odd size."""
    cases = []
    for cell, proj in projected(1):
        for bidirectional in (False, True):
            for bias in (True, False):
                for layout in LAYOUTS:
                    given = (False,) if layout == "packed" else (False, True)
                    for lengths, resets in itertools.product(given, given):
                        cases.append(Case(cell, layout, bidirectional, bias, proj, lengths, resets))
    sized = []
    for case in cases:
        pick = random.Random(str(case)).choice  # the same for the same case
        length, batch, inputs, hidden = (
            pick(PRIMES),
            pick((1, 2, 3, 5, 7, 13)),
            pick((1, 3, 8, 13)),
            pick((5, 7, 17, 33)),
        )
        proj = pick((1, (hidden + 1) // 2, hidden - 1)) if case.proj else 0
        sized.append(case.but(size=(length, batch, inputs, hidden), proj=proj, state=pick((True, True, False))))
    return sized


# What layer_backward must not be given, and what it says.
BACKWARD_MISTAKES = [
    ({"saved": torch.zeros(3)}, r"expected saved as \d+ values of (Float|Byte), .* got 3 of Float"),
    ({"output": torch.zeros(3, 2, 4)}, r"expected output of size \[3, 2, 5\], got \[3, 2, 4\]"),
    ({"output": torch.zeros(3, 2, 5, dtype=torch.float64)}, "output is Double but input is Float"),
    ({"grad_output": torch.zeros(1, 2, 5)}, r"expected grad_output of size \[3, 2, 5\], got \[1, 2, 5\]"),
    ({"grad_h_n": torch.zeros(1, 2, 5, dtype=torch.float64)}, "grad_h_n is Double but input is Float"),
    ({"grad_c_n": torch.zeros(1, 2, 4)}, r"expected grad_c_n of size \[1, 2, 5\], got \[1, 2, 4\]"),
    ({"grad_cells": torch.zeros(3, 2, 4)}, r"expected grad_cells of size \[3, 2, 5\], got \[3, 2, 4\]"),
    ({"output_mask": [True]}, "expected output_mask of 5 values, got 1"),
    ({"output_mask": [True] * 2 + [False] * 3}, "output_mask asks for the gradient of h_0, which was not given"),
    (
        {"output_mask": [False] * 2 + [True] + [False] * 2},
        "output_mask asks for the gradient of c_0, which was not given",
    ),
]


def check_backward_mistake(change: dict[str, Any], message: str) -> None:
    """layer_backward runs with what belongs to a forward call, and raises RuntimeError when this is changed."""
    weights = [torch.randn(20, 4), torch.randn(20, 5)]
    input = torch.randn(3, 2, 4)
    output, *_, saved = torch.ops.rnn_ext.layer(
        input, None, None, weights, None, None, None, [], "lstm", False, False, False, True
    )
    arguments = {
        "grad_output": torch.ones_like(output), "grad_h_n": None, "grad_c_n": None, "grad_cells": None,
        "input": input, "h_0": None, "c_0": None, "weights": weights, "batch_sizes": None, "lengths": None,
        "resets": None, "masks": [], "output": output, "saved": saved, "cell": "lstm", "bidirectional": False,
        "batch_first": False, "cell_states": False, "output_mask": [True, False, False, True, True],
    }  # fmt: skip
    torch.ops.rnn_ext.layer_backward(**arguments)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.rnn_ext.layer_backward(**arguments | change)


def refused(main: Callable[[list[str]], int], arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence on stderr with which a command refuses its arguments."""
    try:
        status = main(arguments)
    except SystemExit as exit:  # argparse
        status = exit.code
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    return error
