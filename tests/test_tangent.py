"""The op layer_tangent, and what autograd makes of it: forward mode, second derivatives and third ones."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck
from torch.utils.flop_counter import FlopCounterMode
from util import (
    CELLS,
    LAYOUTS,
    PRIMES,
    SIZES,
    Calls,
    Case,
    Problem,
    build,
    check,
    check_gradients,
    cotangents,
    instruction_sets,
    oracle,
    same_bits,
)

import rnn_ext
from rnn_ext import batching

RESULTS = ("output", "h_n", "c_n", "cells")
# Relative to the largest entry of that tangent: sums over as many products as in a gradient, of tangents of size one,
# which grow from step to step with what they are multiplied by.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def plain_cases() -> list[Case]:
    """Every cell x direction x layout x bias x lengths x resets, each at its own small odd size."""
    cases = []
    for cell, bidirectional, bias, layout in itertools.product(CELLS, (False, True), (True, False), LAYOUTS):
        given = (False,) if layout == "packed" else (False, True)
        for lengths, resets in itertools.product(given, given):
            case = Case(cell, layout, bidirectional, bias, 0, lengths, resets)
            pick = random.Random(str(case)).choice
            size = pick(PRIMES), pick((1, 2, 3, 5, 7, 13)), pick((1, 3, 8, 13)), pick((5, 7, 17, 33))
            cases.append(case.but(size=size, state=pick((True, True, False))))
    return cases


class Arguments:
    """Those of the op for a problem: the numbers in `tensors` and the direction in `tangents`, both by name."""

    def __init__(self, problem: Problem):
        self.problem = problem
        case = problem.case
        results = oracle(problem.to(torch.float64))
        grads = {name: t.to(problem.input.dtype) for name, t in cotangents(results).items()}
        self.tensors: dict[str, Tensor | None] = {"grad_" + name: grads.get(name) for name in RESULTS}
        self.tensors |= {"input": problem.input, "h_0": problem.h_0, "c_0": problem.c_0} | problem.weights
        present = {name: t for name, t in self.tensors.items() if t is not None}
        self.tangents: dict[str, Tensor | None] = dict.fromkeys(self.tensors) | cotangents(present, seed=2)
        self.options = (case.cell, case.bidirectional, case.layout == "batch_first", case.has_cell_state)
        self.rows = (problem.batch_sizes, problem.lengths, problem.resets)
        # What the op returns, by name.
        self.names = [*RESULTS, *(f"grad_{name}" for name in list(self.tensors)[4:])]
        there = [name in results for name in RESULTS] + [t is not None for t in list(self.tensors.values())[4:]]
        self.mask = there

    def call(self, op=None, mask=None, tensors=None, tangents=None) -> dict[str, Tensor]:
        op = op or torch.ops.rnn_ext.layer_tangent
        mask = self.mask if mask is None else mask
        tensors = list((tensors or self.tensors).values())
        tangents = list((tangents or self.tangents).values())
        found = op(tangents, tensors, *self.rows, [], *self.options, mask)
        assert all(t.shape == (0,) for t, wanted in zip(found, mask, strict=True) if not wanted)
        return {name: t for name, t, wanted in zip(self.names, found, mask, strict=True) if wanted}

    def only(self, *names: str) -> dict[str, Tensor | None]:
        return {name: t if name in names else None for name, t in self.tangents.items()}


def expected_tangents(arguments: Arguments) -> dict[str, Tensor]:
    """By forward mode through the reference, in float64."""
    problem = arguments.problem.to(torch.float64)
    names = [name for name, t in arguments.tangents.items() if t is not None]

    def everything(*values: Tensor) -> dict[str, Tensor]:
        given = dict(zip(names, values, strict=True))
        results = oracle(problem.having(given))
        leaves = list(problem.having(given).leaves().values())
        grads = torch.func.vjp(lambda *x: oracle(problem.having(dict(zip(problem.leaves(), x, strict=True)))), *leaves)[
            1
        ]({name: given["grad_" + name] for name in results})
        return results | {f"grad_{name}": g for name, g in zip(problem.leaves(), grads, strict=True)}

    values = [arguments.tensors[name].double() for name in names]
    return torch.func.jvp(everything, tuple(values), tuple(arguments.tangents[name].double() for name in names))[1]


def check_tangents(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> None:
    # One that all but vanishes beside the others is held to their scale.
    scale = max((t.abs().max().item() for t in expected.values() if t.numel()), default=0.0)
    check(actual, expected, TOLERANCE[dtype], 1e-3 * scale, "tangent of")


@pytest.mark.parametrize("case", plain_cases(), ids=str)
def test_matrix(case):
    """All tangents by every instruction set, against forward over reverse mode of the reference."""
    arguments = Arguments(build(case))
    expected = expected_tangents(arguments)
    for _ in instruction_sets():
        check_tangents(arguments.call(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_dtypes(cell, dtype):
    """16 bits are computed in float32 and rounded once."""
    for hidden in SIZES:
        case = Case(cell, "dense", True, lengths=True, resets=True, size=(5, 7, 9, hidden))
        arguments = Arguments(build(case).to(dtype))
        expected = expected_tangents(arguments)
        for _ in instruction_sets():
            actual = arguments.call()
            assert all(t.dtype == dtype for t in actual.values())
            # Where rounding decides on which side of relu's kink a sum is, one of them has no derivative.
            check_tangents(actual, expected, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_each_direction_and_each_result_alone(cell, layout):
    """The derivative is linear in the direction: in that of one argument, others None, it is what is left of the
    reference's; and results do not depend on which others are wanted."""
    given = {"lengths": True, "resets": True} if layout != "packed" else {}
    arguments = Arguments(build(Case(cell, layout, True, size=(5, 4, 3, 6), **given)))
    total: dict[str, Tensor] = {}
    for name in [name for name, t in arguments.tangents.items() if t is not None]:
        tangents = arguments.only(name)
        actual = arguments.call(tangents=tangents)
        check_tangents(actual, arguments.call(torch.ops.rnn_ext.layer_tangent_reference, tangents=tangents))
        total = {key: total.get(key, 0) + t for key, t in actual.items()}
    everything = arguments.call()
    check_tangents(total, everything)
    for i, wanted in enumerate(arguments.mask):
        if wanted:
            alone = arguments.call(mask=[k == i for k in range(len(arguments.mask))])
            same_bits(alone, {name: t for name, t in everything.items() if name in alone})
    nothing = arguments.call(tangents=dict.fromkeys(arguments.tangents))
    assert not any(t.any() for t in nothing.values())


@pytest.mark.parametrize("cell", CELLS)
def test_without_gradients(cell):
    """Forward mode: results alone, of no gradients to begin with."""
    arguments = Arguments(build(Case(cell, bidirectional=True, size=(5, 4, 3, 6))))
    forward = [wanted and i < 4 for i, wanted in enumerate(arguments.mask)]
    expected = {name: t for name, t in arguments.call().items() if name in RESULTS}
    no_grads = {name: None if name.startswith("grad_") else t for name, t in arguments.tensors.items()}
    no_tangents = {name: None if name.startswith("grad_") else t for name, t in arguments.tangents.items()}
    same_bits(arguments.call(mask=forward, tensors=no_grads, tangents=no_tangents), expected)
    reference = torch.ops.rnn_ext.layer_tangent_reference
    check_tangents(arguments.call(reference, mask=forward, tensors=no_grads, tangents=no_tangents), expected)


@pytest.mark.parametrize("size", [(1, 1, 3, 33), (9, 1, 5, 17), (70, 2, 9, 19), (3, 150, 5, 40), (0, 3, 2, 3)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_few_and_many_rows(cell, size):
    """Sums of weights' gradients are taken by other ways for few rows, and cut in pieces for many."""
    arguments = Arguments(build(Case(cell, bidirectional=True, size=size)))
    check_tangents(arguments.call(), expected_tangents(arguments))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_threads_do_not_change_a_bit(cell, layout):
    given = {"lengths": True, "resets": True} if layout != "packed" else {}
    for size in ((40, 33, 40, 97), (700, 1, 64, 129)):
        arguments = Arguments(build(Case(cell, layout, size[1] > 1, size=size, **given)).to(torch.float32))
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(arguments.call())
        same_bits(found[1], found[0])
        same_bits(found[2], found[0])


@pytest.mark.parametrize("layout", ["dense", "batch_first"])
@pytest.mark.parametrize("cell", CELLS)
def test_padding_may_hold_anything(cell, layout):
    """NaN past the ends, in numbers and directions, goes nowhere, and tangents are zero there."""
    arguments = Arguments(build(Case(cell, layout, True, lengths=True, size=(6, 5, 3, 9))))
    expected = arguments.call()
    ended = torch.arange(6)[:, None] >= arguments.problem.lengths
    ended = ended.T if layout == "batch_first" else ended

    def poisoned(tensors):
        sequences = ("grad_output", "grad_cells", "input")
        at = ended[..., None]
        return {n: t.masked_fill(at, torch.nan) if n in sequences and t is not None else t for n, t in tensors.items()}

    actual = arguments.call(tensors=poisoned(arguments.tensors), tangents=poisoned(arguments.tangents))
    same_bits(actual, expected)
    for name in ("output", "cells", "grad_input"):
        assert name not in actual or not actual[name][ended].any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(cell, layout):
    """Its own derivatives, in tensors and direction: third ones of the layer."""
    given = {"lengths": True, "resets": True} if layout == "batch_first" else {}
    arguments = Arguments(build(Case(cell, layout, True, size=(3, 2, 2, 2), **given)))
    names = [name for name, t in arguments.tensors.items() if t is not None]

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        tensors, tangents = ({**arguments.tensors, **dict(zip(names, v, strict=True))} for v in (
            values[: len(names)], values[len(names) :]))  # fmt: skip
        return tuple(arguments.call(tensors=tensors, tangents=tangents).values())

    values = [kind[name].clone().requires_grad_() for kind in (arguments.tensors, arguments.tangents) for name in names]
    assert gradcheck(call, values, fast_mode=True)
    assert gradcheck(call, values, fast_mode=True, check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("kind", [rnn_ext.RNN, rnn_ext.GRU, rnn_ext.LSTM])
def test_no_loop_over_timesteps(kind):
    """Gradient penalties, Hessians' products and forward mode are calls of kernels, as many for every L."""
    layer = kind(3, 5)

    def penalty(x, direction):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(layer(leaf)[0].sum(), leaf, create_graph=True)
        torch.autograd.grad((grad * direction).sum(), [leaf, *layer.parameters()], allow_unused=True)

    def forward_mode(x, direction):
        torch.func.jvp(lambda x: layer(x)[0], (x,), (direction,))

    def forward_over_reverse(x, direction):
        torch.func.jvp(torch.func.grad(lambda x: layer(x)[0].square().sum()), (x,), (direction,))

    for call, tangents in ((penalty, 1), (forward_mode, 1), (forward_over_reverse, 2)):
        found = []
        for steps in (2, 50):
            with Calls() as calls:
                call(*torch.randn(2, steps, 2, 3))
            found.append(calls.names)
        assert found[0] == found[1]
        assert found[0].count("layer_tangent") == tangents, found[0]


@pytest.mark.parametrize("kind", [rnn_ext.RNN, rnn_ext.GRU, rnn_ext.LSTM])
def test_forward_mode_of_what_requires_gradients(kind):
    """A tangent depends on the parameters, which require gradients: reverse over forward mode."""
    torch.manual_seed(0)
    layer = kind(3, 5, bidirectional=True, dtype=torch.float64)
    x, direction = torch.randn(2, 4, 2, 3, dtype=torch.float64)
    parameters = list(layer.parameters())

    def gradients(output):
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(output(forward_ad.make_dual(x, direction))).tangent
            return torch.autograd.grad(tangent.square().sum(), parameters, allow_unused=True, materialize_grads=True)

    case = Case(kind.__name__.lower().replace("rnn", "rnn_tanh"), bidirectional=True)
    names = [f"{i}" for i in range(len(parameters))]
    problem = Problem(case, x, None, None, dict(zip(names, parameters, strict=True)), None, None, None)
    expected = gradients(lambda x: oracle(problem.having({"input": x}))["output"])
    actual = gradients(lambda x: layer(x)[0])
    check_gradients(dict(zip(names, actual, strict=True)), dict(zip(names, expected, strict=True)))


@pytest.mark.parametrize("rows", [1, 30, 4096])
@pytest.mark.parametrize("layout", ["dense", "batch_first"])
@pytest.mark.parametrize("cell", CELLS)
def test_vmap(cell, layout, rows, monkeypatch):
    """Mapped entries as more batch, in one part or several, or one after the other: as a loop over them."""
    monkeypatch.setattr(batching, "ROWS", rows)
    arguments = Arguments(build(Case(cell, layout, True, resets=True, size=(4, 3, 2, 5))))
    generator = torch.Generator().manual_seed(3)
    inputs_only = [wanted and i < 7 for i, wanted in enumerate(arguments.mask)]
    names = [name for name, t in arguments.tensors.items() if t is not None]
    weights = [name for name in names if name.startswith(("weight", "bias"))]
    for mask in (inputs_only, arguments.mask):
        for mapped, mapped_tangents in (
            ((), ("input",)),
            ((), tuple(name for name in names if name not in weights)),
            (("input", "grad_output"), ("input",)),
            ((), ("weight_hh",)),
            (("weight_ih_reverse",), ()),
        ):
            count = 5
            stacks = []
            for kind, chosen in ((arguments.tensors, mapped), (arguments.tangents, mapped_tangents)):
                for i, name in enumerate(chosen):
                    dim = i % (kind[name].dim() + 1)
                    shape = (count, *kind[name].shape)
                    stacks.append((torch.randn(shape, generator=generator, dtype=torch.float64).movedim(0, dim), dim))

            def call(*values, mask=mask, mapped=mapped, mapped_tangents=mapped_tangents):
                tensors = {**arguments.tensors, **dict(zip(mapped, values, strict=False))}
                along = {**arguments.tangents, **dict(zip(mapped_tangents, values[len(mapped) :], strict=True))}
                return tuple(arguments.call(mask=mask, tensors=tensors, tangents=along).values())

            dims = tuple(dim for _, dim in stacks)
            found = torch.func.vmap(call, dims)(*(stack for stack, _ in stacks))
            looped = [call(*(stack.select(dim, i) for stack, dim in stacks)) for i in range(count)]
            expected = [torch.stack(parts) for parts in zip(*looped, strict=True)]
            keys = [name for name, wanted in zip(arguments.names, mask, strict=True) if wanted]
            check_tangents(dict(zip(keys, found, strict=True)), dict(zip(keys, expected, strict=True)))


@pytest.mark.parametrize("rows", [1, 4096])
@pytest.mark.parametrize("kind", [rnn_ext.RNN, rnn_ext.GRU, rnn_ext.LSTM])
def test_jacobians_are_few_calls(kind, rows, monkeypatch):
    """All entries of a Jacobian, forward or backward, of inputs and states, are one call, if they are not too many."""
    monkeypatch.setattr(batching, "ROWS", rows)
    torch.manual_seed(0)
    layer = kind(3, 5, dtype=torch.float64, batch_first=True)
    native = rnn_ext.to_native(kind(3, 5, dtype=torch.float64, batch_first=True))
    native.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    calls = 24 if rows == 1 else 1
    with Calls() as forward:
        actual = torch.func.jacfwd(lambda x: layer(x)[0])(x)
    assert forward.names.count("layer_tangent") == calls
    torch.testing.assert_close(actual, torch.func.jacrev(lambda x: native(x)[0])(x))
    with Calls() as backward:
        actual = torch.func.jacrev(lambda x: layer(x)[0])(x)
    assert backward.names.count("layer_backward") == (40 if rows == 1 else 1)
    torch.testing.assert_close(actual, torch.func.jacrev(lambda x: native(x)[0])(x))


@pytest.mark.parametrize("kind", [rnn_ext.RNN, rnn_ext.GRU, rnn_ext.LSTM])
def test_vectorized_hessians_are_few_calls(kind):
    """The vmap of torch.autograd.functional, which is not torch.func's, makes more batch of its entries as well."""
    torch.manual_seed(0)
    layer = kind(3, 5, dtype=torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64)

    def loss(x):
        return layer(x)[0].square().sum()

    expected = torch.autograd.functional.hessian(loss, x)
    with Calls() as calls:
        actual = torch.autograd.functional.hessian(loss, x, vectorize=True)
    assert calls.names.count("layer_tangent") == 1
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("kind", [rnn_ext.RNN, rnn_ext.GRU, rnn_ext.LSTM])
def test_jacobians_of_third_derivatives(kind):
    """Batched cotangents of layer_tangent: of inputs and of weights."""
    torch.manual_seed(0)
    layer = kind(2, 3, dtype=torch.float64, bidirectional=True)
    x = torch.randn(3, 2, 2, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(x, bias=parameters["bias_hh_l0"]):
        return torch.func.functional_call(layer, parameters | {"bias_hh_l0": bias}, (x,))[0].square().sum()

    hessian = torch.autograd.functional.hessian(loss, x)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacfwd(loss))(x), hessian)
    torch.testing.assert_close(torch.func.jacfwd(torch.func.jacfwd(loss))(x), hessian)
    third = torch.func.jacrev(torch.func.hessian(loss, 1), 1)(x, parameters["bias_hh_l0"])
    torch.testing.assert_close(torch.func.jacfwd(torch.func.hessian(loss, 1), 1)(x, parameters["bias_hh_l0"]), third)


@pytest.mark.parametrize("features", [1, 3])
def test_negative_bit(features):
    """Numbers whose sign is a bit of the tensor, as imaginary parts of conjugates are."""
    arguments = Arguments(build(Case("gru", size=(4, 2, features, 3))))

    def noted(tensors):
        negative = {name: None if t is None else torch.complex(t, -t).conj().imag for name, t in tensors.items()}
        assert all(t is None or t.is_neg() for t in negative.values())
        return negative

    actual = arguments.call(tensors=noted(arguments.tensors), tangents=noted(arguments.tangents))
    same_bits(actual, arguments.call())


@pytest.mark.parametrize("name", ["jacfwd", "hessian"])
def test_compiled_with_symbolic_sizes(name):
    layer = rnn_ext.GRU(2, 3, dtype=torch.float64)

    def jacobian(x):
        return torch.func.jacfwd(lambda x: layer(x)[0].square().sum((1, 2)))(x)

    def hessian(x):
        return torch.func.hessian(lambda x: layer(x)[0].square().sum())(x)

    derivative = jacobian if name == "jacfwd" else hessian
    compiled = torch.compile(derivative, backend="aot_eager", fullgraph=True, dynamic=True)
    for steps in (4, 5):
        x = torch.randn(steps, 2, 2, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), derivative(x))


def test_flops():
    """Of forward mode and of a gradient penalty, as torch.utils.flop_counter counts what torch.nn's layer computes."""
    L, N, I, H = 5, 2, 3, 7  # noqa: E741
    x, direction = torch.randn(2, L, N, I)
    counts = []
    for layer in (rnn_ext.GRU(I, H), rnn_ext.to_native(rnn_ext.GRU(I, H))):
        parameters = list(layer.parameters())

        def penalty(layer=layer, parameters=parameters):
            leaf = x.clone().requires_grad_()
            layer(leaf)[0].sum().backward(inputs=[leaf], create_graph=True)
            (leaf.grad * direction).sum().backward(inputs=parameters)

        def forward_mode(layer=layer):
            torch.func.jvp(lambda x: layer(x)[0], (x,), (direction,))

        for call in (forward_mode, penalty):
            with FlopCounterMode(display=False) as counter:
                call()
            counts.append(counter.get_total_flops())
    for ours, theirs in zip(counts[:2], counts[2:], strict=True):
        assert 0.5 * theirs < ours < 2 * theirs, counts
    of_input, of_hidden = (2 * L * N * 3 * H * width for width in (I, H))  # a product by W_ih, and one by W_hh
    assert counts[0] == (of_input + of_hidden) * (1 + 2)  # the layer; its values once more, and how they move
    # The layer, and the gradient that is the penalty's input; then values and how they move, how the gradients of gates
    # do and of both weights, twice as much each.
    once = (of_input + of_hidden) * (1 + 1)
    assert counts[1] == once + of_input * (2 + 2) + of_hidden * (2 + 2 + 2)


MISTAKES = [
    (lambda a: a["tangents"].pop(), "expected 11 tangents and values of output_mask, got 10 and 11"),
    (lambda a: a["mask"].pop(), "expected 11 tangents and values of output_mask, got 11 and 10"),
    (lambda a: a["tensors"].__setitem__(4, None), "expected an input as tensor 4, got None"),
    (lambda a: a["tensors"].__setitem__(8, None), "expected all weights, got None for one"),
    (
        lambda a: a["tangents"].__setitem__(4, torch.zeros(3).double()),
        r"expected a tangent of size \[5, 3, 4\], got \[3\]",
    ),
    (lambda a: a["tangents"].__setitem__(7, torch.zeros(21, 4)), "a tangent is Float but input is Double"),
    (lambda a: a["tensors"].__setitem__(5, None), "a tangent was given of argument 5 of layer_backward, which was not"),
    (lambda a: a["tensors"].__setitem__(0, torch.zeros(1).double()), r"expected grad_output of size \[5, 3, 7\]"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES)
def test_mistakes(change, message):
    """Nobody calls it by hand, but what is wrong must not reach the kernels."""
    arguments = Arguments(build(Case("gru")))
    given = {
        "tangents": list(arguments.tangents.values()),
        "tensors": list(arguments.tensors.values()),
        "mask": list(arguments.mask),
    }
    change(given)
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):
        torch.ops.rnn_ext.layer_tangent(
            given["tangents"], given["tensors"], *arguments.rows, [], *arguments.options, given["mask"]
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell, layout):
    arguments = Arguments(build(Case(cell, layout, True, size=(3, 2, 2, 3))))
    tangents, tensors = (list(kind.values()) for kind in (arguments.tangents, arguments.tensors))
    args = (tangents, tensors, *arguments.rows, [], *arguments.options, arguments.mask)
    torch.library.opcheck(torch.ops.rnn_ext.layer_tangent.default, args)


def test_what_has_no_kernel_is_differentiated_all_the_same():
    """Projected layers and variants: by the reference."""
    torch.manual_seed(0)
    for options in ({"proj_size": 2}, {"layer_norm": True}, {"zoneout": 0.3}):
        layer = rnn_ext.LSTM(3, 5, dtype=torch.float64, **options).eval()
        x, direction = torch.randn(2, 4, 2, 3, dtype=torch.float64)

        def output(x, layer=layer):
            return layer(x)[0]

        tangent = torch.func.jvp(output, (x,), (direction,))[1]
        step = 1e-6
        with torch.no_grad():
            expected = (output(x + step * direction) - output(x - step * direction)) / (2 * step)
        torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{"layer_norm": True}, {"proj_size": 3}, {"zoneout": 0.2}], ids=str)
def test_options_in_16_bits_are_differentiated_in_float32(options, dtype):
    """Inputs whose variance is 1e-3: to the power of -3/2 it would be infinite in float16. Results are contiguous."""
    layer = rnn_ext.LSTM(4, 8, batch_first=True, **options).eval().to(dtype)
    oracle = copy.deepcopy(layer).double()
    x, direction = (torch.randn(3, 5, 4) * 0.03).to(dtype), torch.randn(3, 5, 4).to(dtype)

    def derivatives(layer, x, direction):
        output, tangent = torch.func.jvp(lambda x: layer(x)[0], (x,), (direction,))
        assert output.is_contiguous() and tangent.is_contiguous()
        x = x.clone().requires_grad_()
        grad = torch.autograd.grad(layer(x)[0], x, torch.ones_like(output), create_graph=True)[0]
        second = torch.autograd.grad(grad, x, direction)[0]
        return {"output": output, "tangent": tangent, "grad": grad.detach(), "second": second}

    expected = derivatives(oracle, x.double(), direction.double())
    # Each is rounded once more than what it is made of, by half of eps.
    for name, found in derivatives(layer, x, direction).items():
        error = (found.double() - expected[name]).abs().max() / expected[name].abs().max()
        assert error < (2 if name == "second" else 1) * torch.finfo(dtype).eps, name


def test_options_are_differentiated_on_meta_and_under_autocast():
    layer, x, direction = rnn_ext.LSTM(4, 8, layer_norm=True), torch.randn(5, 3, 4), torch.randn(5, 3, 4)

    def derivatives(layer, x):
        x = x.requires_grad_()
        grad = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)[0]
        tangent = torch.func.jvp(lambda x: layer(x)[0], (x.detach(),), (direction.to(x.device),))[1]
        return tangent, torch.autograd.grad(grad.square().sum(), x)[0]

    expected = derivatives(layer, x)
    with torch.autocast("cpu"):
        found = derivatives(layer, x.detach())
    assert [t.dtype for t in found] == [torch.bfloat16, torch.float32]
    for t in found:
        assert t.isfinite().all()
    on_meta = derivatives(layer.to("meta"), x.detach().to("meta"))
    assert [t.shape for t in on_meta] == [t.shape for t in found] == [t.shape for t in expected]
