"""``Tuning`` (csrc/cpu/layer.h) changes no result: both choices of each on every processor, to the bit."""

from __future__ import annotations

import pytest
import torch
from util import CELLS, Case, build, check_gradients, check_values, gradients, instruction_sets, oracle, run, same_bits

import rnn_ext
from rnn_ext import ops

if ops.is_available():
    from rnn_ext import _C


@pytest.fixture
def set_tuning():
    chosen = _C.tuning()
    yield _C.set_tuning
    _C.set_tuning(*chosen)


@pytest.mark.parametrize(
    "size",
    [
        # blocks: even, odd, with a tail, partly filled; several of the longer chunks
        *((71, 1, 130, 64), (71, 1, 130, 80), (71, 1, 130, 100), (71, 1, 130, 113), (150, 1, 530, 529)),
        # tiles that go on from one step to the next, after every other k; of several pieces, the last of one k
        *((71, 1, 31, 130), (71, 1, 64, 64), (71, 1, 257, 80), (71, 1, 513, 200), (71, 1, 512, 528)),
    ],
    ids=str,
)
@pytest.mark.parametrize("cell", CELLS)
def test_side_products_of_any_width(cell, size, set_tuning):
    """The input gates of one sequence, beside its steps, by tiles and in chunks as they suit another processor too."""
    torch.manual_seed(0)
    _C.widen_always(True)
    for threads, dtype in ((1, torch.float32), (2, torch.float64), (1, torch.bfloat16), (2, torch.float16)):
        torch.set_num_threads(threads)
        problem = build(Case(cell, size=size, state=False)).to(dtype)
        with torch.no_grad():
            expected = oracle(problem.to(torch.float64))
            set_tuning(vectors_a_cycle=1, far_bytes=1 << 40)
            narrow = run(problem)
            set_tuning(vectors_a_cycle=2, far_bytes=0)
            wide = run(problem)
            set_tuning(takes_along=False)
            chunks = run(problem)
        check_values(narrow, expected, dtype)
        same_bits(wide, narrow)
        same_bits(chunks, narrow)


@pytest.mark.parametrize("size", [(71, 130, 100), (71, 64, 64), (71, 31, 257), (71, 513, 70)], ids=str)  # L, I, H
@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_side_products_are_those_of_a_chunk(cell, size, set_tuning):
    """A sequence has the bits of its pieces, which are so short that no step takes input gates of others along."""
    set_tuning(vectors_a_cycle=_C.tuning()[0])  # where this processor takes none along, too
    steps, inputs, hidden = size
    for dtype in (torch.float32, torch.float64):
        layer = getattr(rnn_ext, cell)(inputs, hidden, dtype=dtype)
        sequence = torch.randn(steps, 1, inputs, dtype=dtype)
        for _ in instruction_sets():
            with torch.no_grad():
                whole, _ = layer(sequence)
                pieces, state = [], None
                for piece in sequence.split(12):
                    output, state = layer(piece, state)
                    pieces.append(output)
            same_bits({"output": torch.cat(pieces)}, {"output": whole})


@pytest.mark.parametrize(
    ("size", "directions", "layout"),
    [  # L, I, H: backward in one chunk and in several; gates with a gap between them; a gap at a piece's end
        ((71, 31, 100), 1, "dense"),
        ((40, 130, 64), 2, "dense"),
        ((400, 16, 96), 1, "packed"),
        ((777, 33, 129), 2, "batch_first"),
        ((32, 257, 130), 1, "dense"),
        ((500, 90, 80), 1, "dense"),  # which another thread follows, be it asleep or not
    ],
    ids=str,
)
@pytest.mark.parametrize("cell", CELLS)
def test_input_gradients_beside_the_scan(cell, size, directions, layout, set_tuning):
    """Of one sequence, by one thread, by tiles as they suit another processor too, and by one that follows another."""
    length, inputs, hidden = size
    case = Case(cell, layout, bidirectional=directions == 2, size=(length, 1, inputs, hidden))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        problem = build(case).to(dtype)
        # Of bfloat16 the bits alone: it may be on the other side of a relu's corner.
        expected = None if dtype == torch.bfloat16 else gradients(oracle, problem.to(torch.float64))[1]
        for _ in instruction_sets():
            set_tuning(vectors_a_cycle=1)
            torch.set_num_threads(1)
            _, grads = gradients(run, problem)
            if expected:
                check_gradients(grads, expected, dtype)
            for other in ({"takes_along": False}, {"vectors_a_cycle": 2}):
                set_tuning(**other)
                same_bits(gradients(run, problem)[1], grads)
            for threads, distance in ((2, 1000), (2, 0), (4, 0)):  # far from each other, little is left to one
                torch.set_num_threads(threads)
                _C.assume_thread_distance(distance)
                same_bits(gradients(run, problem)[1], grads)


@pytest.mark.parametrize(("cell", "hidden"), [("GRU", 100), ("RNN", 257)])
def test_input_gradients_that_vanish(cell, hidden):
    """What ends among subnormal numbers, backward from the last state, becomes a zero of the same sign."""
    layer, sequence = getattr(rnn_ext, cell)(30, hidden), torch.randn(900, 1, 30, requires_grad=True)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append({"input": torch.autograd.grad(layer(sequence)[1].sum(), sequence)[0]})
    assert (found[0]["input"] == 0).any()
    same_bits(*found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_steps_of_two_and_three_rows(cell, dtype, set_tuning):
    """With their input gates or after them, as suits the processor: the same bits. Blocks by twos, one left, a tail."""
    for hidden in (33, 64, 98):
        for batch in (2, 3):
            problem = build(Case(cell, bidirectional=True, size=(12, batch, 40, hidden))).to(dtype)
            for _ in instruction_sets():
                set_tuning(vectors_a_cycle=1)
                values, grads = gradients(run, problem)
                check_values(values, oracle(problem.to(torch.float64)), dtype)
                set_tuning(vectors_a_cycle=2)
                again, again_grads = gradients(run, problem)
                same_bits(again, values)
                same_bits(again_grads, grads)


@pytest.mark.parametrize("hidden", [512, 459, 386])  # a whole number of panels; some blocks beyond them; a tail
@pytest.mark.parametrize("batch", [2, 7, 31])  # tiles too low to fetch; fewer than a panel takes; more: steps join
@pytest.mark.parametrize("cell", CELLS)
def test_weights_beyond_the_second_level_cache(cell, batch, hidden, set_tuning):
    """Fetched ahead or not, and a step's input gates computed with it or before, as suits the processor."""
    torch.manual_seed(0)
    problem = build(Case(cell, lengths=True, size=(3, batch, hidden + 1, hidden))).to(torch.float32)
    set_tuning()
    values, grads = gradients(run, problem)
    expected, expected_grads = gradients(oracle, problem.to(torch.float64))
    check_values(values, expected, torch.float32)
    check_gradients(grads, expected_grads, torch.float32)
    fetches, joins = {"fetched_bytes": 400 << 10}, {"joins_far": True}
    for other in (fetches, joins, {**fetches, **joins}, {**fetches, **joins, "vectors_a_cycle": 2}):
        set_tuning(**other)
        again, again_grads = gradients(run, problem)
        same_bits(again, values)
        same_bits(again_grads, grads)


@pytest.mark.parametrize("cell", CELLS)
def test_steps_of_up_to_24_rows(cell, set_tuning):
    """With their input gates or after them, by the size of the weights; some steps of a call this way, some that."""
    problem = build(Case(cell, lengths=True, size=(9, 24, 203, 200))).to(torch.float32)
    set_tuning(near_bytes=0)
    values, grads = gradients(run, problem)
    check_values(values, oracle(problem.to(torch.float64)), torch.float32)
    set_tuning(near_bytes=1 << 40)
    again, again_grads = gradients(run, problem)
    same_bits(again, values)
    same_bits(again_grads, grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_weights_of_one_timestep_are_packed_as_they_are_read(dtype, set_tuning):
    """Where they come slowly, no call looks for those of the call before: the same bits, and nothing kept."""
    fetches = {"fetched_bytes": 400 << 10}
    for hidden, length, tuning, kept in (
        (320, 1, fetches, 0),
        (320, 1, {}, 1),
        (320, 2, fetches, 1),
        (321, 1, fetches, 1),
        (327, 1, fetches, 0),
    ):
        layer, input = rnn_ext.LSTM(330, hidden, dtype=dtype), torch.randn(length, 75, 330, dtype=dtype)
        _C.clear_cached_weights()
        set_tuning(**tuning)
        with torch.no_grad():
            results = [layer(input)[0] for _ in range(3)]
        assert _C.cached_weights_count() == kept
        trained = layer(input)[0].detach()
        assert all(torch.equal(result, trained) for result in results)
    _C.clear_cached_weights()
