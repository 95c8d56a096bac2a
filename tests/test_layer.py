"""Values of ``ops.layer`` against the oracle: every option, odd sizes, dtypes, instruction sets, threads."""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
import sys

import pytest
import torch
from util import (
    CELLS,
    LAYOUTS,
    SIZES,
    Case,
    Problem,
    agree,
    build,
    check_gradients,
    check_values,
    cotangents,
    gradients,
    instruction_sets,
    matrix,
    oracle,
    projected,
    run,
    same_bits,
)

from rnn_ext import _C, _processor, ops
from rnn_ext._processor import cpu_features

# L, N, I, H: each in turn through sizes that end inside and on the edge of vectors and tiles, then together.
SWEEP = [
    *((3, 2, 5, size) for size in SIZES),
    *((3, size, 5, 11) for size in SIZES),
    *((2, 3, size, 5) for size in SIZES),
    # Few enough rows that weights are used as they lie.
    (1, 1, 1, 1),
    (1, 1, 129, 65),
    (1, 3, 33, 16),
    (2, 2, 31, 33),
    (4, 1, 16, 37),
    # So few units past the last whole vector that their gates share one, alone and with a batch.
    *((length, size, 5, hidden) for hidden in (10, 18, 20, 35) for length, size in ((7, 1), (3, 6))),
    # One entry, and many.
    (9, 1, 17, 33),
    (67, 2, 3, 5),
    # One entry with so many steps and units that the input gates of some steps are computed beside the steps before.
    (35, 1, 5, 65),
    (33, 1, 129, 68),
    (17, 1, 1, 129),
    (2, 33, 65, 31),
    (2, 17, 3, 129),
]


@pytest.mark.parametrize("case", matrix(), ids=str)
def test_matrix(case):
    problem = build(case)
    with torch.no_grad():
        results = run(problem)
    check_values(results, oracle(problem))
    if problem.lengths is not None:
        past = torch.arange(case.size[0]).unsqueeze(1) >= problem.lengths
        past = past.t() if case.layout == "batch_first" else past
        assert not any(results[name][past].any() for name in results if name in ("output", "cells"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("size", SWEEP, ids=lambda size: "x".join(map(str, size)))
def test_sizes(size, dtype):
    """Values and gradients by every instruction set. Bidirectional, so that the second direction's offsets are odd."""
    for cell, layout in zip(CELLS, ("packed", "dense", "batch_first", "packed"), strict=True):
        proj = (size[3] + 1) // 2 if cell == "lstm" and size[3] > 1 and size[0] == 3 else 0
        for lengths in (False,) if layout == "packed" else (False, True):
            agree(build(Case(cell, layout, True, proj=proj, lengths=lengths, size=size)).to(dtype), dtype)


@pytest.mark.parametrize("cell", CELLS)
def test_long_float32(cell):
    """Rounding must not pile up: 500 timesteps of unit-scale input, outputs to 2e-6 and gradients to 1e-5."""
    for layout in ("dense", "packed"):
        agree(build(Case(cell, layout, True, size=(500, 3, 8, 24))).to(torch.float32), torch.float32)


@pytest.mark.parametrize("cell", CELLS)
def test_many_units(cell):
    """Nor in long sums, which are cut: to the same bounds, by one row, by a few rows and by more than a tile has."""
    for batch, steps in ((1, 40), (2, 20), (9, 20), (70, 1)):
        agree(build(Case(cell, size=(steps, batch, 700, 1000))).to(torch.float32), torch.float32)


def test_instruction_sets_are_those_built_for_this_processor():
    """The other tests here run on each of them in turn."""
    features = cpu_features()[1]
    built = importlib.import_module("rnn_ext._build_info").CPU_KERNELS
    needed = {name: next(iter(parts.items())) for name, parts in _processor.INSTRUCTION_SETS.items()}
    usable = [name for name, (part, needs) in needed.items() if part in built and needs <= features]
    assert list(instruction_sets()) == usable
    assert usable[0] == "baseline"
    best = _processor.best_set(features)
    assert ops.missing_cpu_capability() == (None if best in usable else best)
    with pytest.raises(ValueError, match=r"sse9.*baseline.*RNN_EXT_CPU_ISAS=all"):
        ops.set_cpu_capability("sse9")


def test_instruction_set_from_the_environment():
    """One that is not there is why our kernels cannot run; an empty variable is none."""
    unmet = "RNN_EXT_CPU_CAPABILITY=sse9 cannot be met here: unset it, or name one of baseline, avx2, avx512, amx"
    probe = [sys.executable, "-c", "from rnn_ext import ops; print(ops.load_error() or ops.cpu_capability())"]

    def found(**held: str) -> subprocess.CompletedProcess:
        env = {name: value for name, value in os.environ.items() if name != "RNN_EXT_CPU_CAPABILITY"} | held
        return subprocess.run(probe, env=env, capture_output=True, text=True, check=True)

    assert found(RNN_EXT_CPU_CAPABILITY="baseline").stdout == "baseline\n"
    assert found(RNN_EXT_CPU_CAPABILITY="").stdout == found().stdout
    mistaken = found(RNN_EXT_CPU_CAPABILITY="sse9")
    assert mistaken.stdout.startswith(unmet) and unmet in mistaken.stderr  # a warning


def strided(t: torch.Tensor) -> torch.Tensor:
    """The same values, every other element of a larger storage, at an odd offset."""
    wide = t.new_full((*t.shape[:-1], t.shape[-1] * 2 + 1), float("nan"))
    wide[..., 1::2] = t
    return wide[..., 1::2]


def transposed(t: torch.Tensor) -> torch.Tensor:
    """The same values, last dimension slowest."""
    return t.movedim(-1, 0).contiguous().movedim(0, -1)


def expanded(t: torch.Tensor) -> torch.Tensor:
    """One slice seen everywhere, with stride zero."""
    return t[:1].expand_as(t)


@pytest.mark.parametrize("how", [strided, transposed, expanded])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_any_strides(cell, layout, how):
    flags = {"lengths": True, "resets": True} if layout != "packed" else {}
    problem = build(Case(cell, layout, True, proj=4 if cell == "lstm" else 0, size=(5, 4, 3, 6), **flags))
    bent = problem.map(how)
    if problem.resets is not None:
        bent = dataclasses.replace(
            bent, lengths=torch.stack([bent.lengths] * 2, -1)[:, 0], resets=transposed(bent.resets)
        )
    assert not all(t.is_contiguous() for t in bent.leaves().values())
    expected = oracle(problem.map(lambda t: how(t).contiguous()))
    with torch.no_grad():
        check_values(run(bent), expected)
    # requiring() makes contiguous copies, so bend inside the differentiated function; cotangents are bent as well.
    grad_of = {name: how(t) for name, t in cotangents(expected).items()}
    straight = {name: t.contiguous() for name, t in grad_of.items()}
    _, expected_grads = gradients(lambda p: oracle(p.map(how)), problem, straight)
    actual, grads = gradients(lambda p: run(p.map(how)), problem, grad_of)
    check_values(actual, expected)
    check_gradients(grads, expected_grads)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_lengths_of_any_integer_dtype(dtype):
    problem = build(Case(lengths=True))
    expected = oracle(problem)
    problem.lengths = problem.lengths.to(dtype)
    check_values(run(problem), expected)


@pytest.mark.parametrize("case", [c for c in matrix() if c.bias and not c.state][:12], ids=str)
def test_absent_states_are_zeros(case):
    problem = build(case)
    given = build(case.but(state=True))
    given = given.having({**problem.leaves(), "h_0": torch.zeros_like(given.h_0)})
    given = dataclasses.replace(given, batch_sizes=problem.batch_sizes, lengths=problem.lengths, resets=problem.resets)
    if case.has_cell_state:
        given.c_0 = torch.zeros_like(given.c_0)
        # one of the two alone
        check_values(run(dataclasses.replace(given, h_0=None)), oracle(problem))
        check_values(run(dataclasses.replace(given, c_0=None)), oracle(problem))
    check_values(run(given), run(problem))


@pytest.mark.parametrize("cell", CELLS)
def test_what_was_not_asked_for_is_empty(cell):
    problem = build(Case(cell))
    flags = {"cell": cell, "bidirectional": False, "batch_first": False}
    weights = list(problem.weights.values())
    output, h_n, c_n, cells = ops.layer(problem.input, problem.h_0, problem.c_0, weights, cell_states=False, **flags)
    assert output.shape == (5, 3, 7) and h_n.shape == (1, 3, 7) and cells.shape == (0,)
    assert c_n.shape == ((1, 3, 7) if cell == "lstm" else (0,))


@pytest.mark.parametrize("cell", CELLS)
def test_arguments_are_left_alone_and_results_are_new(cell):
    problem = build(Case(cell, bidirectional=True, lengths=True, resets=True)).requiring()
    arguments = [*problem.leaves().values(), problem.lengths, problem.resets]
    before = [t.detach().clone() for t in arguments]
    results = run(problem)
    grad_of = cotangents(results)
    kept = {name: t.clone() for name, t in grad_of.items()}
    torch.autograd.backward(list(results.values()), list(grad_of.values()))
    assert all(torch.equal(a, b) for a, b in zip(before, arguments, strict=True))
    same_bits(grad_of, kept)
    places = [t.untyped_storage().data_ptr() for t in (*results.values(), *arguments, *grad_of.values())]
    assert len(set(places)) == len(places)


def test_rows_do_not_depend_on_their_neighbours():
    """A row alone and in company differ by rounding at most, in 16 bits too: who else is in the batch is no matter."""
    for dtype, allowed in (
        (torch.float64, 1e-14),
        (torch.float32, 1e-6),
        (torch.bfloat16, 2e-2),
        (torch.float16, 2e-3),
    ):
        for cell in CELLS:
            problem = build(Case(cell, bidirectional=True, size=(9, 13, 5, 17))).to(dtype)
            together = run(problem)
            for n in (0, 5, 12):
                alone = dataclasses.replace(problem, input=problem.input[:, n : n + 1], h_0=problem.h_0[:, n : n + 1])
                alone.c_0 = problem.c_0[:, n : n + 1] if problem.c_0 is not None else None
                for name, t in run(alone).items():
                    torch.testing.assert_close(t, together[name][:, n : n + 1], rtol=0, atol=allowed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_several_rows_do_not_depend_on_more(cell, dtype):
    """To the bit, in inference and in training, whatever a step does about its input gates.

    With enough rows for the size of its weights it computes them itself, else they are there before it begins.
    """
    # Rows of an odd number of inputs; a tail; whole panels; so many weights of every cell in every dtype that few rows
    # do and more do not, with a tail and without.
    for inputs, hidden in ((3, 18), (40, 64), (67, 130), (3, 380)):
        problem = build(Case(cell, bidirectional=True, size=(4, 11, inputs, hidden))).to(dtype)
        for _ in instruction_sets():
            together = run(problem)
            with torch.no_grad():
                same_bits(run(problem), together)
            for n in (2, 3, 7):
                same_bits(run(problem.first_entries(n)), {name: t[:, :n] for name, t in together.items()})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_rows_of_one_timestep_do_not_depend_on_more(cell, dtype):
    """To the bit, by weights as they lie: the lines of a row of these several at a time, in pairs, and what is left."""
    for inputs, hidden in ((127, 65), (136, 33), (300, 256), (1100, 300)):
        problem = build(Case(cell, size=(1, 4, inputs, hidden))).to(dtype)
        for _ in instruction_sets():
            together = run(problem)
            for n in (1, 2, 3):
                same_bits(run(problem.first_entries(n)), {name: t[:, :n] for name, t in together.items()})


def one_by_one(more: Problem, resets: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The results of all entries but the last, by steps that find their rows anew each time.

    A sequence without a timestep, which the last one is made, has them do that: it is missing in every step.
    """
    length, count = more.input.shape[:2]
    if resets is not None:
        resets = torch.cat([resets, resets[:, :1]], 1)
    lengths = torch.tensor([length] * (count - 1) + [0])
    return {name: t[:, :-1] for name, t in run(dataclasses.replace(more, lengths=lengths, resets=resets)).items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_steps_in_one_go_and_one_by_one(cell, dtype):
    """To the bit: those whose rows all move on by the same distance, and those that find their rows anew each time.

    Rows of one batch lie differently in the three layouts.
    """
    for size in ((9, 3, 5, 18), (9, 8, 40, 64), (4, 13, 64, 130), (70, 2, 16, 32), (40, 1, 20, 32)):
        length, batch, inputs, hidden = size
        more = build(Case(cell, bidirectional=True, size=(length, batch + 1, inputs, hidden))).to(dtype)
        problem = more.first_entries(batch)
        transposed = dataclasses.replace(
            problem, case=problem.case.but(layout="batch_first"), input=problem.input.transpose(0, 1).contiguous()
        )
        packed = dataclasses.replace(
            problem,
            case=problem.case.but(layout="packed"),
            input=problem.input.reshape(length * batch, inputs),
            batch_sizes=torch.full((length,), batch),
        )
        for _ in instruction_sets():
            expected = one_by_one(more)
            for other, time_first in ((problem, lambda t: t), (transposed, lambda t: t.transpose(0, 1))):
                with torch.no_grad():
                    inferred = run(other)
                for results in (inferred, run(other.requiring())):
                    sequences = ("output", "cells")
                    same_bits({k: time_first(t) if k in sequences else t for k, t in results.items()}, expected)
            same_bits({k: t.view_as(expected[k]) for k, t in run(packed).items()}, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_resets_between_steps_in_one_go(cell, dtype):
    """The bits of steps that run one by one, and resets that reset nothing change none."""
    for size in ((9, 3, 5, 18), (30, 8, 40, 64), (70, 2, 16, 32), (40, 1, 20, 32), (150, 1, 64, 64), (90, 1, 33, 129)):
        length, batch, inputs, hidden = size
        more = build(Case(cell, bidirectional=True, size=(length, batch + 1, inputs, hidden))).to(dtype)
        problem = more.first_entries(batch)
        rare = torch.rand(length, batch, generator=torch.Generator().manual_seed(0)) < 0.1
        rare[[0, 5, 6, -1]] = True
        nowhere = torch.zeros_like(rare)
        for _ in instruction_sets():
            for resets, expected in ((rare, one_by_one(more, rare)), (nowhere, run(problem))):
                given = dataclasses.replace(problem, resets=resets)
                with torch.no_grad():
                    same_bits(run(given), expected)
                same_bits(run(given.requiring()), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_of_one_sequence_with_few_resets(cell, dtype):
    """Steps at resets and right before them, in backward's order, among many that are plain; side by side, too."""
    for size in ((70, 1, 5, 18), (150, 1, 64, 64), (60, 1, 20, 130)):
        problem = build(Case(cell, bidirectional=True, size=size))
        resets = torch.zeros(size[:2], dtype=torch.bool)
        resets[[0, 7, 8, 11, 40, -2, -1]] = True
        agree(dataclasses.replace(problem, resets=resets).to(dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_of_weights_from_rows_as_they_lie(cell, layout, dtype):
    """Rows of whole vectors need not be packed: few and many of them, after initial states or after none."""
    for size in ((5, 1, 32, 16), (40, 1, 16, 32), (9, 5, 64, 16), (140, 3, 16, 48), (700, 1, 96, 16), (1, 150, 16, 16)):
        for state in (True, False):
            problem = build(Case(cell, layout, bidirectional=True, state=state, size=size))
            agree(problem.to(dtype), dtype)
            if layout != "packed":  # rows that do not follow each other at one distance
                lying = problem.input.transpose(0, 1).contiguous().transpose(0, 1)
                agree(dataclasses.replace(problem, input=lying).to(dtype), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_steps_of_many_rows_and_of_few(cell, layout):
    """In one call: some compute their own input gates, those of the longest sequences alone do not."""
    flags = {"lengths": True, "resets": True} if layout != "packed" else {}
    for inputs, hidden in ((3, 18), (66, 132)):
        agree(build(Case(cell, layout, bidirectional=True, size=(23, 12, inputs, hidden), **flags)))
    problem = build(Case(cell, layout, bidirectional=True, size=(23, 12, 3, 380), **flags)).to(torch.bfloat16)
    with torch.no_grad():
        expected = oracle(problem.to(torch.float64))
        for _ in instruction_sets():
            check_values(run(problem), expected, torch.bfloat16)


def agree_for_any_threads(problem, counts):
    """One thread's results are right to float32's rounding, and those of so many threads are the same bits."""
    values, grads = gradients(run, problem)
    expected, expected_grads = gradients(oracle, problem.to(torch.float64))
    check_values(values, expected, torch.float32)
    check_gradients(grads, expected_grads, torch.float32)
    for threads in counts:
        torch.set_num_threads(threads)
        again, again_grads = gradients(run, problem)
        same_bits(again, values)
        same_bits(again_grads, grads)


@pytest.mark.parametrize(("cell", "hidden"), [("rnn_tanh", 210), ("rnn_relu", 210), ("gru", 114), ("lstm", 98)])
def test_threads_share_the_units_of_a_few_rows(cell, hidden):
    """Too few to be cut into slices, enough for a step to compute its input gates itself; gru and lstm with a tail."""
    torch.manual_seed(0)
    problem = build(Case(cell, "dense", resets=True, size=(45, 3, 8, hidden))).to(torch.float32)
    agree_for_any_threads(problem, (2, 4))


@pytest.mark.parametrize(("cell", "hidden"), [("rnn_tanh", 610), ("rnn_relu", 610), ("gru", 355), ("lstm", 305)])
def test_threads_share_the_units_of_large_weights(cell, hidden):
    """Of more rows than are cut into slices where weights are small; the last step has one, which sums differently."""
    case = Case(cell, bidirectional=cell == "gru", lengths=True, resets=True, size=(5, 13, 8, hidden))
    problem = build(case).to(torch.float32)
    problem.lengths.clamp_(max=4)[3] = 5
    agree_for_any_threads(problem, (2, 4, 5))


@pytest.mark.parametrize(("cell", "proj"), projected(201))
def test_one_timestep(cell, proj):
    """Of more rows than use weights as they lie in longer sequences, up to the most that do and past it.

    Forward by AVX-512: an eighth of the units or inputs past 32. Backward: 128. Past it, with gradients, weights are
    packed a panel at a time, unless they have a tail. The same bits with gradients and without.
    """
    for (batch, inputs, hidden), layout in (
        ((6, 83, 81), "packed"),
        ((7, 83, 81), "dense"),
        ((9, 75, 86), "batch_first"),
        ((20, 193, 209), "batch_first"),
        ((64, 550, 560), "dense"),
        ((90, 75, 86), "batch_first"),
        ((131, 131, 157), "packed"),
    ):
        flags = {} if layout == "packed" else {"resets": True, "lengths": batch == 90}
        problem = build(Case(cell, layout, True, proj=min(proj, hidden - 1), size=(1, batch, inputs, hidden), **flags))
        agree(problem)
        for _ in instruction_sets():
            with torch.no_grad():
                without = run(problem)
            same_bits(run(problem.requiring(None)), without)


@pytest.mark.parametrize(
    ("cell", "hidden", "proj"),
    [("rnn_tanh", 730, 0), ("rnn_relu", 730, 0), ("gru", 470, 0), ("lstm", 400, 0), ("lstm", 400, 350)],
)
def test_threads_share_one_timestep(cell, hidden, proj):
    """Weights that take longer to be read than a thread to be woken: by units, or by rows if projected."""
    for batch, bidirectional in ((1, False), (3, True), (7, False), (70, True)):
        case = Case(cell, bidirectional=bidirectional, proj=proj, size=(1, batch, hidden + 10, hidden))
        torch.set_num_threads(1)
        agree_for_any_threads(build(case).to(torch.float32), (2, 3, 5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("cell", "proj"), projected(65))
def test_steps_do_not_depend_on_those_after_them(cell, proj, dtype):
    """The first timesteps of a sequence, to the bit, wherever it ends and whatever comes later: here NaN.

    A sequence alone is worked through in pieces, and the input gates of one are computed beside the piece before.
    """
    _C.widen_always(True)
    # Sums of more than 256 are cut, wherever they are computed.
    sizes = (("dense", 7, 100), ("batch_first", 64, 130), ("packed", 1, 97), ("dense", 300, 130), ("packed", 531, 97))
    for layout, inputs, hidden in sizes:
        problem = build(Case(cell, layout, proj=proj, size=(50, 1, inputs, hidden))).to(dtype)
        time = 1 if layout == "batch_first" else 0
        with torch.no_grad():
            for _ in instruction_sets():
                whole = run(problem)
                check_values(whole, oracle(problem.to(torch.float64)), dtype)
                for steps in (9, 15, 16, 17, 31, 32, 33, 49):
                    spoilt = problem.input.clone()
                    spoilt.narrow(time, steps, 50 - steps).fill_(float("nan"))
                    ended = problem.input.narrow(time, 0, steps)
                    sizes = None if problem.batch_sizes is None else problem.batch_sizes[:steps]
                    for other in (
                        dataclasses.replace(problem, input=spoilt),
                        dataclasses.replace(problem, input=ended, batch_sizes=sizes),
                    ):
                        output = run(other)["output"].narrow(time, 0, steps)
                        assert torch.equal(output, whole["output"].narrow(time, 0, steps)), (layout, steps)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_one_long_sequence(cell, layout):
    """Its steps take a shorter way, backward from the second of a chunk to the one before the first of all."""
    for state, hidden, threads in ((True, 17, 1), (False, 260, 4)):  # alone; two for each direction
        torch.set_num_threads(threads)
        problem = build(Case(cell, layout, bidirectional=True, state=state, size=(300, 1, 3, hidden)))
        expected, expected_grads = gradients(oracle, problem)
        for _ in instruction_sets():
            actual, grads = gradients(run, problem)
            check_values(actual, expected, torch.float64)
            check_gradients(grads, expected_grads, torch.float64)


@pytest.mark.parametrize("cell", CELLS)
def test_same_bits_each_time(cell):
    problem = build(Case(cell, bidirectional=True, lengths=True, size=(5, 7, 3, 9))).to(torch.float32)
    values, grads = gradients(run, problem)
    for _ in range(100):
        again, again_grads = gradients(run, problem)
        same_bits(again, values)
        same_bits(again_grads, grads)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_shared_out_among_threads(cell, layout, bidirectional):
    """Large enough to be shared out, by direction, by rows and by columns of weights: the same bits for any number.

    The one thread's are right to float32's rounding.
    """
    flags = {"lengths": True, "resets": True} if layout == "batch_first" else {}
    proj = 41 if cell == "lstm" and layout == "dense" else 0
    problem = build(Case(cell, layout, bidirectional, proj=proj, size=(12, 67, 65, 147), **flags)).to(torch.float32)
    agree_for_any_threads(problem, (2, 3, 8))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("cell", "proj"), projected(4))
def test_more_rows_than_one_pass_takes(cell, proj, layout):
    """Kernels work through long input in pieces of some hundred rows: what crosses from one to the next is right."""
    flags = {"lengths": True, "resets": True} if layout != "packed" else {}
    for size in ((310, 3, 2, 7), (23, 29, 3, 5), (3, 280, 2, 5), (700, 1, 2, 3), (2, 1101, 37, 18)):
        problem = build(Case(cell, layout, True, proj=min(proj, size[3] - 1), size=size, **flags))
        agree(problem)
        if cell != "rnn_relu":  # where rounding decides whether a unit passes a gradient or none
            agree(problem.to(torch.bfloat16), torch.bfloat16)


@pytest.mark.parametrize("size", [(0, 3, 4, 7), (5, 0, 4, 7), (0, 0, 4, 7)], ids=str)
@pytest.mark.parametrize("layout", ["dense", "batch_first"])
@pytest.mark.parametrize("cell", CELLS)
def test_empty(cell, layout, size):
    for extras in ({}, {"lengths": True, "resets": True}, {"state": False}, {"bias": False}):
        problem = build(Case(cell, layout, True, size=size, **extras))
        expected, expected_grads = gradients(oracle, problem, unused=True)
        actual, grads = gradients(run, problem)  # exist: no allow_unused here
        check_values(actual, expected)
        check_gradients(grads, expected_grads)
        if size[0] == 0 and problem.h_0 is not None:
            assert torch.equal(actual["h_n"], problem.h_0)


@pytest.mark.parametrize("cell", CELLS)
def test_no_input_features(cell):
    """I=0: the input says nothing but its lengths, and the biases and the state drive the cell."""
    agree(build(Case(cell, bidirectional=True, lengths=True, size=(3, 4, 0, 7))))
    agree(build(Case(cell, bidirectional=True, size=(40, 1, 0, 67))))


@pytest.mark.parametrize("cell", CELLS)
def test_no_hidden_units(cell):
    """H=0 and P=0 are refused, as torch.nn refuses to construct them."""
    weights = [torch.zeros(0, 3), torch.zeros(0, 0), torch.zeros(0), torch.zeros(0)]
    with pytest.raises(ValueError, match=r"expected at least one hidden unit, got weight_ih of size \[0, 3\]"):
        ops.layer(torch.zeros(5, 2, 3), None, None, weights, cell=cell)
    if cell == "lstm":
        weights = [torch.zeros(28, 3), torch.zeros(28, 0), torch.zeros(0, 7)]
        expected = r"expected a projection to at least one feature, got weight_hh of size \[28, 0\]"
        with pytest.raises(ValueError, match=expected):
            ops.layer(torch.zeros(5, 2, 3), None, None, weights, cell=cell)


def test_inference_mode():
    problem = build(Case())
    expected = run(problem)
    with torch.inference_mode():
        same_bits(run(problem), expected)


def test_meta_device_gives_shapes():
    for cell in CELLS:
        problem = build(Case(cell, bidirectional=True))
        shapes = {name: t.shape for name, t in run(problem.map(lambda t: t.to("meta"))).items()}
        assert shapes == {name: t.shape for name, t in run(problem).items()}


@pytest.mark.parametrize("layout", ["dense", "batch_first"])
@pytest.mark.parametrize("cell", CELLS)
def test_lengths_that_fall_need_no_order(cell, layout):
    """All equal, they have the bits of none; and where one sequence is left its rows are evenly spaced."""
    for size in ((20, 32, 64, 128), (5, 3, 4, 7)):
        problem = build(Case(cell, layout, bidirectional=True, size=size)).to(torch.float32)
        equal = dataclasses.replace(problem, lengths=torch.full((size[1],), size[0]))
        for _ in instruction_sets():
            for found, expected in zip(gradients(run, equal), gradients(run, problem), strict=True):
                same_bits(found, expected)
    problem = build(Case(cell, layout, size=(300, 2, 64, 128)))
    for lengths in ([300, 3], [3, 300], [300, 1]):
        case = dataclasses.replace(problem, lengths=torch.tensor(lengths))
        expected = gradients(oracle, case)
        for dtype in (torch.float64, torch.float32):
            for _ in instruction_sets():
                values, grads = gradients(run, case.to(dtype))
                check_values(values, expected[0], dtype)
                check_gradients(grads, expected[1], dtype)
