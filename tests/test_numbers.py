"""Numbers of all magnitudes, those that are none, and the elementary functions of the kernels."""

from __future__ import annotations

import pytest
import torch
import util
from util import CELLS, Case, build, check_values, gradients, instruction_sets, oracle, projected, run

from rnn_ext import _C, ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [(1, 1), (1, 9), (6, 1), (3, 7), (150, 1), (70, 6)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_zeros_before_a_sequence_multiply_nan(cell, rows, dtype):
    """As torch's do: the gradient of a step without a state before it reaches weight_hh if it is not a number."""
    problem = build(Case(cell, bidirectional=True, state=False, size=(*rows, 16, 32))).to(dtype)
    grad = torch.zeros(*rows, 64, dtype=dtype)
    grad[0, 0, 3] = grad[-1, -1, 40] = torch.nan  # of either direction's first step
    _, expected = gradients(oracle, problem.to(torch.float64), {"output": grad.double()})
    for _ in instruction_sets():
        _, grads = gradients(run, problem, {"output": grad})
        for name, want in expected.items():
            assert torch.equal(grads[name].isnan(), want.isnan()), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("cell", "proj"), projected(5))
def test_strange_numbers_propagate(cell, proj, value, dtype):
    """NaN and infinity in one row come out where torch's own operators let them out, and in no other row."""
    _C.widen_always(True)
    for where, hidden in (("input", 9), ("h_0", 9), ("input", 21)):
        problem = build(Case(cell, bidirectional=True, proj=proj, size=(5, 4, 3, hidden))).to(dtype)
        getattr(problem, where).view(-1, *getattr(problem, where).shape[-2:])[-1, 2, 1] = value
        with torch.no_grad():
            expected = oracle(problem.to(torch.float64))
            for _ in instruction_sets():
                check_values(run(problem), expected, dtype)


@pytest.mark.parametrize(
    ("cell", "dtype"),
    [
        (cell, dtype)
        for cell in CELLS
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        if (cell, dtype) != ("rnn_relu", torch.float16)  # which overflows there
    ],
    ids=str,
)
def test_strange_magnitudes(cell, dtype):
    """Huge inputs saturate without NaN (also where a 16-bit pre-activation would overflow)."""
    problem = build(Case(cell, bidirectional=True, size=(5, 3, 33, 17)))
    problem.input.mul_(1e4)
    problem = problem.to(dtype)
    actual, grads = gradients(run, problem)
    expected, expected_grads = gradients(oracle, problem.to(torch.float64))
    assert all(torch.isfinite(t).all() for t in expected.values())
    if cell == "rnn_relu":  # unbounded: relative to its largest entry
        for name, want in expected.items():
            error = (actual[name].double() - want).abs().max() / want.abs().max()
            assert error <= {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
        return
    check_values(actual, expected, dtype)
    assert all(torch.isfinite(t).all() for t in grads.values())
    if dtype == torch.float64:
        # A pre-activation of 1e4 is itself known to 1e-12 only.
        util.check(grads, expected_grads, 1e-10, 0.0, "gradient of")


def every_bfloat16():
    """Those that are no subnormal numbers, infinities and NaN among them."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return torch.cat([x[~(x.abs() < 1.2e-38)], torch.zeros(1, dtype=torch.bfloat16)])


def elementary_functions(x):
    """tanh and sigmoid of x, read off cells whose weights let one number through.

    h of an RNN, and c of an LSTM whose c_0 is 1; to its other gates infinity times 0 is NaN.
    """
    x = x.view(1, -1, 1)
    one, forget = x.new_ones(1, 1), x.new_tensor([[0.0], [1.0], [0.0], [0.0]])
    tanh, *_ = ops.layer(x, None, None, [one, x.new_zeros(1, 1)], cell="rnn_tanh")
    states = [torch.zeros_like(x), torch.ones_like(x)]
    _, _, sigmoid, _ = ops.layer(x, *states, [forget, x.new_zeros(4, 1)], cell="lstm")
    return tanh.flatten(), sigmoid.flatten()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_elementary_functions(dtype):
    """tanh and sigmoid to a few units in the last place everywhere, and relative to their value near zero."""
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.linspace(-1, 1, 997), torch.logspace(-30, 2, 500)])
    x = torch.cat([x, -x, every_bfloat16()]).to(dtype)
    close = {"rtol": 4 * torch.finfo(dtype).eps, "equal_nan": True}
    tiny, wanted, finite = torch.finfo(dtype).tiny, x.double().sigmoid(), ~x.isinf()
    near_zero = finite & (wanted < 1.4 * tiny)  # near the smallest normal number it may be zero
    for _ in instruction_sets():
        tanh, sigmoid = (y.double() for y in elementary_functions(x))
        torch.testing.assert_close(tanh, x.double().tanh(), atol=0, **close)
        others = finite & ~near_zero
        torch.testing.assert_close(sigmoid[others], wanted[others], atol=0, **close)
        torch.testing.assert_close(sigmoid[near_zero], wanted[near_zero], atol=2 * tiny, **close)


def test_elementary_functions_of_bfloat16():
    """To 7e-5, so that few are rounded to the neighbour: where they are curved, 0.5 %."""
    x = every_bfloat16()
    for _ in instruction_sets():
        for actual, function in zip(elementary_functions(x), (torch.tanh, torch.sigmoid), strict=True):
            assert torch.equal(actual.isnan(), x.isnan() | (x.isinf() & (function is torch.sigmoid)))
            # sigmoid is subnormal between these.
            kept = ~actual.isnan() & ((function is torch.tanh) | ~((x > -104) & (x < -87)))
            wanted = function(x[kept].double()).to(torch.bfloat16)
            off = actual[kept].view(torch.int16).int() - wanted.view(torch.int16).int()
            assert off.abs().max() <= 1
            curved = (x[kept].abs() > 0.05) & (x[kept].abs() < 8)
            assert (off[curved] != 0).double().mean() < 0.008


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_subnormal_numbers_are_zeros(dtype, threads):
    """In the kernels, on every thread, as many processors take 100 cycles for one; afterwards all has them again."""
    tiny = torch.finfo(dtype).tiny
    many = torch.full((100_000,), tiny, dtype=dtype)
    problem = build(Case("rnn_relu", bias=False, size=(16, 16, 64, 128))).to(dtype)
    for tensor in (problem.input, *problem.weights.values(), problem.h_0):
        tensor.detach().zero_()
    problem.weights["weight_ih"].detach().fill_diagonal_(0.5)
    torch.set_num_threads(threads)
    for _ in instruction_sets():
        for value, expected in ((tiny / 8, 0), (tiny, 0), (2 * tiny, tiny)):
            problem.input.detach().fill_(value)
            output = run(problem)["output"]
            assert (output[..., :64] == expected).all() and (output[..., 64:] == 0).all()
            assert (many / 2 != 0).all()
        # Backward: the gradient of the input is half of its cotangent.
        problem.input.detach().fill_(1)
        input = problem.input.detach().requires_grad_()
        output = ops.layer(input, None, None, list(problem.weights.values()), cell="rnn_relu")[0]
        for value, expected in ((tiny, 0), (2 * tiny, tiny)):
            (grad,) = torch.autograd.grad(output, input, torch.full_like(output, value), retain_graph=True)
            assert (grad == expected).all()
            assert (many / 2 != 0).all()


def test_subnormal_halves_are_numbers():
    """float16 is computed in float32, where they are normal."""
    input = torch.full((3, 2, 1), 2.0**-20, dtype=torch.float16)
    weights = [torch.ones(4, 1, dtype=torch.float16), torch.zeros(4, 4, dtype=torch.float16)]
    assert (ops.layer(input, None, None, weights, cell="rnn_relu")[0] == 2.0**-20).all()
