"""A layer and its derivatives written in PyTorch, which autograd (csrc/ops/autograd.cpp) calls for what the kernels do
not differentiate. All of it is differentiable any number of times, in forward mode and under ``torch.func`` too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rnn_ext import reference


def register(library: torch.library.Library) -> None:
    """The ops that end in ``_reference``, made of torch's own ops."""
    for name, kernel in (
        ("layer_reference", _layer),
        ("layer_backward_reference", _layer_backward),
        ("layer_tangent_reference", _layer_tangent),
        ("layer_tangent_backward_reference", _layer_tangent_backward),
    ):
        library.impl(name, kernel, "CompositeImplicitAutograd")


def _layer(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    masks: Sequence[Tensor | None],
    cell: str,
    bidirectional: bool,
    batch_first: bool,
    cell_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # As in the kernels 16 bits are storage: of what is in between, the reciprocal of a small deviation exceeds float16.
    wide = torch.promote_types(input.dtype, torch.float32)
    x, h, c, *weights = [None if t is None else t.to(wide) for t in (input, h_0, c_0, *weights)]
    results = reference.layer(x, h, c, weights, batch_sizes, lengths, resets, cell, bidirectional, batch_first, masks)
    output, h_n, c_n, cells = [None if t is None else t.to(input.dtype).contiguous() for t in results]
    empty = input.new_empty(0)
    return output, h_n, empty if c_n is None else c_n, cells if cell_states and cells is not None else empty


def _layer_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_cells: Tensor | None,
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    masks: Sequence[Tensor | None],
    cell: str,
    bidirectional: bool,
    batch_first: bool,
    cell_states: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The vector-Jacobian product of the reference."""
    options = (batch_sizes, lengths, resets, masks, cell, bidirectional, batch_first, cell_states)

    def forward(a: Sequence[Tensor | None]) -> Sequence[Tensor]:
        return _layer(*a[:3], a[3:], *options)

    grads = (grad_output, grad_h_n, grad_c_n, grad_cells)
    results = _gradients(forward, [input, h_0, c_0, *weights], output_mask, grads)
    return results[0], results[1], results[2], results[3:]


def _layer_tangent(
    tangents: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    masks: Sequence[Tensor | None],
    cell: str,
    bidirectional: bool,
    batch_first: bool,
    cell_states: bool,
    output_mask: Sequence[bool],
) -> list[Tensor]:
    """What the op layer_tangent returns: for the tangents of the inputs the above's vector-Jacobian product, which is
    symmetric in them, and of those of the gradients the above itself, which is linear in these."""
    input, h_0, c_0, *weights = tensors[4:]
    layout = (batch_sizes, lengths, resets, masks, cell, bidirectional, batch_first)
    if any(x is None and wanted for x, wanted in zip(tensors[:4], output_mask[:4], strict=True)):
        with torch.no_grad():
            outputs = _layer(input, h_0, c_0, weights, *layout, True)
        grads = [x if x is not None else torch.zeros_like(y) for x, y in zip(tensors[:4], outputs, strict=True)]
        tensors = [x if wanted else y for x, y, wanted in zip(grads, tensors[:4], output_mask[:4], strict=True)]
        tensors += [input, h_0, c_0, *weights]

    def backward(a: Sequence[Tensor | None]) -> Sequence[Tensor]:
        mask = [tangent is not None for tangent in tangents[4:]]
        *grads, dw = _layer_backward(*a[:7], a[7:], *layout, cell_states, mask)
        return *grads, *dw

    results = _gradients(backward, tensors, output_mask, tangents[4:])
    if any(tangent is not None for tangent in tangents[:4]) and any(output_mask[4:]):
        *linear, dw = _layer_backward(*tangents[:4], input, h_0, c_0, weights, *layout, cell_states, output_mask[4:])
        sums = zip(results[4:], (*linear, *dw), output_mask[4:], strict=True)
        results[4:] = [x + y if wanted else x for x, y, wanted in sums]
    return results


def _layer_tangent_backward(
    cotangents: Sequence[Tensor | None],
    tangents: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],
    *options: Any,
) -> list[Tensor]:
    """The vector-Jacobian product of the above, whose other arguments are all `options` but the last, in those of
    tangents and tensors that the last one wants."""
    *options, wanted = options

    def tangent(a: Sequence[Tensor | None]) -> Sequence[Tensor]:
        return _layer_tangent(a[: len(tangents)], a[len(tangents) :], *options)

    return _gradients(tangent, [*tangents, *tensors], wanted, cotangents)


def _gradients(
    function: Callable[[Sequence[Tensor | None]], Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor]:
    """``torch.func.vjp`` of a function of the whole list, in those of the inputs that are there and wanted, with empty
    tensors for the others. For code that runs inside an autograd kernel, where no new transform can begin.

    The result is differentiable, forward and backward, in whatever the inputs and cotangents depend on.
    """
    from rnn_ext import _C

    places = [i for i, x in enumerate(inputs) if x is not None and wanted[i]]
    chosen = [inputs[i] for i in places]
    # Not of what nothing depends on, whose results would require gradients for the sake of the aliases alone.
    keep_graph = torch.is_grad_enabled() and any(x is not None and _is_followed(x) for x in (*inputs, *cotangents))
    with torch.enable_grad():
        # Aliases end the inner graph here. detach() would lose the tangent of forward mode.
        aliases = [x.view_as(x) if x.requires_grad else x + _C.require_grad(x.new_zeros(())) for x in chosen]
        pairs = [
            (output, cotangent)
            for output, cotangent in zip(function(_replaced(inputs, places, aliases)), cotangents, strict=True)
            if cotangent is not None and output.requires_grad
        ]
        found: Sequence[Tensor | None] = [None] * len(aliases)
        if pairs and aliases:
            outputs, given = zip(*pairs, strict=True)
            found = torch.autograd.grad(outputs, aliases, given, create_graph=keep_graph, allow_unused=True)
    found = [torch.zeros_like(x) if g is None else g for x, g in zip(chosen, found, strict=True)]
    empty = next(x for x in inputs if x is not None).new_empty(0)
    return _replaced([empty] * len(inputs), places, found)


def _is_followed(x: Tensor) -> bool:
    """Whether a derivative by `x`, or along it, may be asked for, be it by a transform of torch.func further out."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)
    return x.requires_grad or wrapped or forward_ad.unpack_dual(x).tangent is not None


def _replaced(items: Sequence[Any], places: Sequence[int], new: Sequence[Any]) -> list[Any]:
    items = list(items)
    for i, x in zip(places, new, strict=True):
        items[i] = x
    return items
