"""Mistakes in the arguments of ``ops.layer``: each is told, with the value and what was expected."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import util
from torch import Tensor
from util import Case, build, run

from rnn_ext import ops

# What is changed on a sound LSTM problem of L=5, N=3, I=4, H=7, and the complaint.
MISTAKES = {
    "input 2-D": (lambda p: {"input": p.input[0]}, RuntimeError, "expected input with 3 dimensions, got size [3, 4]"),
    "input 4-D": (
        lambda p: {"input": p.input[None]},
        RuntimeError,
        "expected input with 3 dimensions, got size [1, 5, 3, 4]",
    ),
    "input features": (
        lambda p: {"input": torch.zeros(5, 3, 6).double()},
        RuntimeError,
        "input.size(-1) must be equal to input_size. Expected 4, got 6",
    ),
    "input integer": (
        lambda p: {"input": p.input.long()},
        RuntimeError,
        "expected input of a floating-point dtype, got Long",
    ),
    "all complex": (
        lambda p: {name: t.to(torch.complex64) for name, t in p.leaves().items()},
        RuntimeError,
        "expected input of a floating-point dtype, got ComplexFloat",
    ),
    "h_0 batch": (
        lambda p: {"h_0": torch.zeros(1, 2, 7).double()},
        RuntimeError,
        "expected h_0 of size [1, 3, 7], got [1, 2, 7]",
    ),
    "h_0 directions": (
        lambda p: {"h_0": torch.zeros(2, 3, 7).double()},
        RuntimeError,
        "expected h_0 of size [1, 3, 7], got [2, 3, 7]",
    ),
    "h_0 features": (
        lambda p: {"h_0": torch.zeros(1, 3, 8).double()},
        RuntimeError,
        "expected h_0 of size [1, 3, 7], got [1, 3, 8]",
    ),
    "h_0 2-D": (
        lambda p: {"h_0": torch.zeros(3, 7).double()},
        RuntimeError,
        "expected h_0 of size [1, 3, 7], got [3, 7]",
    ),
    "h_0 dtype": (
        lambda p: {"h_0": p.h_0.float()},
        RuntimeError,
        "h_0 is Float but input is Double: expected the same dtype",
    ),
    "c_0 features": (
        lambda p: {"c_0": torch.zeros(1, 3, 8).double()},
        RuntimeError,
        "expected c_0 of size [1, 3, 7], got [1, 3, 8]",
    ),
    "c_0 dtype": (
        lambda p: {"c_0": p.c_0.float()},
        RuntimeError,
        "c_0 is Float but input is Double: expected the same dtype",
    ),
    "weight_ih features": (
        lambda p: {"weight_ih": torch.zeros(28, 5).double()},
        RuntimeError,
        "input.size(-1) must be equal to input_size. Expected 5, got 4",
    ),
    "weight_ih rows": (
        lambda p: {"weight_ih": torch.zeros(27, 4).double()},
        RuntimeError,
        "expected weight_ih of size [24, 4], got [27, 4]",
    ),
    "weight_ih 1-D": (
        lambda p: {"weight_ih": torch.zeros(28).double()},
        RuntimeError,
        "expected two-dimensional weight_ih and weight_hh, got sizes [28] and [28, 7]",
    ),
    "weight_hh rows": (
        lambda p: {"weight_hh": torch.zeros(26, 7).double()},
        RuntimeError,
        "expected weight_hh of size [28, 7], got [26, 7]",
    ),
    "weight_hh features": (
        lambda p: {"weight_hh": torch.zeros(28, 6).double()},
        RuntimeError,
        "expected weight_hh of size [28, 7], got [28, 6]",
    ),
    "weight_hh dtype": (
        lambda p: {"weight_hh": p.weights["weight_hh"].float()},
        RuntimeError,
        "weight_hh is Float but input is Double: expected the same dtype",
    ),
    "bias_ih": (
        lambda p: {"bias_ih": torch.zeros(29).double()},
        RuntimeError,
        "expected bias_ih of size [28], got [29]",
    ),
    "bias_hh": (
        lambda p: {"bias_hh": torch.zeros(28, 1).double()},
        RuntimeError,
        "expected bias_hh of size [28], got [28, 1]",
    ),
    "bias_hh dtype": (
        lambda p: {"bias_hh": torch.zeros(28)},
        RuntimeError,
        "bias_hh is Float but input is Double: expected the same dtype",
    ),
    "batch sizes rising": (
        lambda p: {"batch_sizes": torch.tensor([2, 3])},
        RuntimeError,
        "expected positive, non-increasing batch_sizes, got 3 at timestep 1 after 2",
    ),
    "batch sizes zero": (
        lambda p: {"batch_sizes": torch.tensor([5, 0])},
        RuntimeError,
        "expected positive, non-increasing batch_sizes, got 0 at timestep 1 after 5",
    ),
    "batch sizes negative": (
        lambda p: {"batch_sizes": torch.tensor([7, -2])},
        RuntimeError,
        "expected positive, non-increasing batch_sizes, got -2 at timestep 1 after 7",
    ),
    "batch sizes sum": (
        lambda p: {"batch_sizes": torch.tensor([3, 1])},
        RuntimeError,
        "expected 4 rows of packed input, the sum of batch_sizes, got 5",
    ),
    "batch sizes none": (
        lambda p: {"batch_sizes": torch.tensor([], dtype=torch.int64)},
        RuntimeError,
        "expected batch_sizes of at least one timestep, got none",
    ),
    "batch sizes dtype": (
        lambda p: {"batch_sizes": torch.tensor([3, 2], dtype=torch.int32)},
        RuntimeError,
        "expected batch_sizes as a one-dimensional int64 tensor on the CPU, got Int of size [2] on cpu",
    ),
    "batch sizes 2-D": (
        lambda p: {"batch_sizes": torch.tensor([[3, 2]])},
        RuntimeError,
        "expected batch_sizes as a one-dimensional int64 tensor on the CPU, got Long of size [1, 2] on cpu",
    ),
    "batch sizes huge": (
        lambda p: {"batch_sizes": torch.tensor([2**62, 2**62])},
        RuntimeError,
        "expected batch_sizes of no more than the 5 rows of packed input, got 4611686018427387904",
    ),
    "lengths count": (
        lambda p: {"lengths": torch.tensor([1, 2])},
        RuntimeError,
        "expected lengths of size [3], got [2]",
    ),
    "lengths negative": (
        lambda p: {"lengths": torch.tensor([1, -1, 2])},
        ValueError,
        "expected lengths between 0 and 5, got -1 for batch entry 1",
    ),
    "lengths long": (
        lambda p: {"lengths": torch.tensor([1, 6, 2])},
        ValueError,
        "expected lengths between 0 and 5, got 6 for batch entry 1",
    ),
    "lengths floating": (
        lambda p: {"lengths": torch.tensor([1.0, 2.0, 3.0])},
        TypeError,
        "expected lengths of an integer dtype, got Float",
    ),
    "lengths boolean": (
        lambda p: {"lengths": torch.tensor([True, False, True])},
        TypeError,
        "expected lengths of an integer dtype, got Bool",
    ),
    "lengths 2-D": (
        lambda p: {"lengths": torch.tensor([[1, 2, 3]])},
        RuntimeError,
        "expected lengths of size [3], got [1, 3]",
    ),
    "resets shape": (
        lambda p: {"resets": torch.zeros(3, 5, dtype=torch.bool)},
        RuntimeError,
        "expected resets of size [5, 3], got [3, 5]",
    ),
    "resets 1-D": (
        lambda p: {"resets": torch.zeros(5, dtype=torch.bool)},
        RuntimeError,
        "expected resets of size [5, 3], got [5]",
    ),
    "resets dtype": (lambda p: {"resets": torch.zeros(5, 3)}, TypeError, "expected resets of dtype Bool, got Float"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    change, kind, expected = MISTAKES[mistake]
    problem = build(Case())
    changes = change(problem)
    if mistake.startswith("batch sizes"):
        problem = build(Case(layout="packed"))
        problem.input = torch.zeros(5, 4).double()
        problem.h_0, problem.c_0 = None, None
    others = {name: changes.pop(name) for name in ("batch_sizes", "lengths", "resets") if name in changes}
    problem = dataclasses.replace(problem.having(changes), **others)
    with pytest.raises(kind) as error:
        run(problem)
    assert type(error.value) is kind and str(error.value) == expected


@pytest.mark.parametrize(("change", "message"), util.BACKWARD_MISTAKES)
def test_backward_checks_its_arguments(change, message):
    util.check_backward_mistake(change, message)


@pytest.mark.parametrize("cell", ["lstmm", "", "LSTM", "RNN_TANH"])
def test_unknown_cell(cell):
    problem = build(Case())
    with pytest.raises(ValueError, match=f"unknown cell '{cell}': expected one of rnn_tanh rnn_relu gru lstm"):
        ops.layer(problem.input, None, None, list(problem.weights.values()), cell=cell)


@pytest.mark.parametrize(
    ("cell", "count"), [("lstm", 0), ("lstm", 1), ("lstm", 10), ("gru", 3), ("gru", 5), ("rnn_tanh", 3)]
)
def test_wrong_number_of_weights(cell, count):
    problem = build(Case(cell))
    weights = (list(problem.weights.values()) * 3)[:count]
    expected = (
        rf"expected 2 to 5 weights \(6 to 9 with layer normalisation\) for each of 1 directions, got {count} in all"
    )
    if cell != "lstm":
        expected = f"only an lstm can be projected, got {count} weights a direction for {cell}"
    with pytest.raises(ValueError, match=expected):
        ops.layer(problem.input, None, None, weights, cell=cell)


def test_odd_number_of_weights_for_two_directions():
    problem = build(Case(bidirectional=True))
    with pytest.raises(ValueError, match="for each of 2 directions, got 7 in all"):
        ops.layer(problem.input, None, None, list(problem.weights.values())[:7], cell="lstm", bidirectional=True)


def test_cell_state_for_a_cell_without_one():
    problem = build(Case("gru"))
    with pytest.raises(ValueError, match="c_0 was given, but gru has no cell state"):
        ops.layer(problem.input, problem.h_0, problem.h_0, list(problem.weights.values()), cell="gru")


def test_cell_states_of_a_cell_without_them():
    problem = build(Case("gru"))
    with pytest.raises(ValueError, match="cell states were asked for, but gru has none"):
        ops.layer(problem.input, None, None, list(problem.weights.values()), cell="gru", cell_states=True)


def test_packed_input_with_lengths():
    problem = build(Case(layout="packed"))
    problem.lengths = torch.tensor([1, 2, 3])
    with pytest.raises(ValueError, match="lengths cannot be given for a packed input, which has its own"):
        run(problem)


def test_projection_shape():
    problem = build(Case(proj=3))
    problem.weights["weight_hr"] = torch.zeros(3, 6).double()
    with pytest.raises(RuntimeError, match=r"expected weight_hr of size \[3, 7\], got \[3, 6\]"):
        run(problem)


NO_MEMORY = "{} of size .* has no memory: expected a storage of at least .* bytes, got one of {}"


@pytest.mark.parametrize("left", [0, 8])
@pytest.mark.parametrize("name", ["input", "h_0", "c_0", "weight_ih", "weight_hh", "bias_ih", "lengths", "resets"])
def test_freed_memory(name, left):
    """As what saves memory leaves tensors between uses."""
    problem = build(Case(lengths=True, resets=True))
    {**vars(problem), **problem.weights}[name].untyped_storage().resize_(left)
    with pytest.raises(RuntimeError, match=NO_MEMORY.format(name, left)):
        run(problem)


def test_freed_memory_of_packed_input():
    problem = build(Case(layout="packed"))
    problem.batch_sizes.untyped_storage().resize_(8)
    with pytest.raises(RuntimeError, match=NO_MEMORY.format("batch_sizes", 8)):
        run(problem)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("name", ["weight_ih", "bias_hh"])
def test_freed_memory_of_weights_that_may_be_kept_packed(name, kept):
    problem = build(Case())
    with torch.no_grad():
        for _ in range(3 * kept):
            run(problem)
        problem.weights[name].untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=NO_MEMORY.format(name, 0)):
            run(problem)


@pytest.mark.parametrize("left", [0, 8])
@pytest.mark.parametrize("name", ["input", "h_0", "c_0", "weight_ih", "weight_hh"])
def test_memory_freed_before_backward(name, left):
    problem = build(Case())
    given = {**vars(problem), **problem.weights}[name]
    problem.map(Tensor.requires_grad_)
    output = run(problem)["output"]
    given.untyped_storage().resize_(left)
    with pytest.raises(RuntimeError, match=NO_MEMORY.format(name, left)):
        output.sum().backward()


def test_backward_does_not_need_the_memory_of_biases():
    problem = build(Case())
    problem.map(Tensor.requires_grad_)
    run(problem)["output"].sum().backward()
    expected = problem.weights["bias_ih"].grad.clone()
    problem.weights["bias_ih"].grad = None
    output = run(problem)["output"]
    problem.weights["bias_ih"].untyped_storage().resize_(0)
    output.sum().backward()
    assert torch.equal(problem.weights["bias_ih"].grad, expected)


def test_sizes_no_memory_can_hold():
    """More bytes than a process can address: refused, without a crash and without wrapping round 32 or 64 bits."""
    weights = [torch.zeros(4, 1), torch.zeros(4, 1)]
    for lead in ((1, 2**46), (2**46, 1), (2**23, 2**23)):
        with pytest.raises(RuntimeError, match=r"not enough memory|would not fit any memory"):
            ops.layer(torch.zeros(1, 1, 1).expand(*lead, 1), None, None, weights, cell="lstm")


def test_weights_of_two_directions():
    problem = build(Case(bidirectional=True))
    weights = list(problem.weights.values())
    with pytest.raises(ValueError, match="for each of 2 directions, got 9 in all"):
        ops.layer(problem.input, None, None, [*weights, torch.zeros(3)], cell="lstm", bidirectional=True)
    for i, weight in enumerate(weights):
        wrong = [*weights[:i], weight[:-1], *weights[i + 1 :]]
        with pytest.raises(RuntimeError):
            ops.layer(problem.input, None, None, wrong, cell="lstm", bidirectional=True)


def test_a_projection_of_what_has_none():
    """With weights that fit each other."""
    weights = [torch.randn(21, 4), torch.randn(21, 3), torch.randn(21), torch.randn(21), torch.randn(3, 7)]
    with pytest.raises(ValueError, match="only an lstm can be projected, got 5 weights a direction for gru"):
        ops.layer(torch.randn(5, 3, 4), None, None, weights, cell="gru")


def test_a_step_with_a_state_of_three_dimensions():
    weights = [torch.zeros(15, 4), torch.zeros(15, 5), torch.zeros(15), torch.zeros(15)]
    with pytest.raises(RuntimeError, match=r"expected h_0 of size \[3, 5\], got \[3, 5, 1\]"):
        ops.cell(torch.zeros(3, 4), torch.zeros(3, 5, 1), None, weights, "gru")
