"""The ops under vmap: where the weights are shared, mapped entries are more batch, with weight gradients of
their own; elsewhere a call for each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.utils import _pytree as pytree

__all__ = ["register"]


def _loop(name: str, size: int, in_dims: Sequence[Any], args: Sequence[Any], below: bool) -> tuple[Any, Any]:
    """The op the plain way: a call per entry. Where there is none, zeros stand for one: it has the shapes. `below`: at
    the level of torch.func below this one."""
    from rnn_ext import _C

    def one(value: Any, dim: Any) -> Any:
        if isinstance(dim, (list, tuple)):
            return [one(v, d) for v, d in zip(value, dim, strict=True)]
        if dim is None:
            return value
        zeros = value.new_zeros((*value.shape[:dim], 1, *value.shape[dim + 1 :]))
        return torch.cat((value, zeros), dim)  # which knows of the value, that may require a gradient

    if size == 0:
        args = [one(arg, dim) for arg, dim in zip(args, in_dims, strict=True)]
    dims = [list(dim) if isinstance(dim, (list, tuple)) else [dim] for dim in in_dims]
    outputs = _C.call_each(name, max(1, int(size)), dims, below, *args)
    if size == 0:
        outputs = pytree.tree_map(lambda x: x[:0], outputs)
    return outputs, pytree.tree_map(lambda _: 0, outputs)


def _in_parts(rule: Callable, size: int, entries: int, in_dims: Sequence[Any], args: Sequence[Any]) -> tuple[Any, Any]:
    """``rule(size, in_dims, args)`` of no more than so many entries at a time."""

    def part(value: Any, dim: Any, first: int) -> Any:
        if isinstance(value, (list, tuple)) and isinstance(dim, (list, tuple)):
            return [part(v, d, first) for v, d in zip(value, dim, strict=True)]
        if dim is None or value is None:
            return value
        return value.narrow(dim, first, min(entries, size - first))

    if size <= entries:
        return rule(size, in_dims, args)
    parts = [
        rule(min(entries, size - first), in_dims, [part(a, d, first) for a, d in zip(args, in_dims, strict=True)])
        for first in range(0, size, entries)
    ]
    dims = parts[0][1]
    flat_dims = pytree.tree_leaves(dims, is_leaf=lambda dim: dim is None)
    columns = zip(*(pytree.tree_leaves(results) for results, _ in parts), strict=True)
    pairs = zip(columns, flat_dims, strict=True)
    joined = [column[0] if dim is None else torch.cat(column, dim) for column, dim in pairs]
    return pytree.tree_unflatten(joined, pytree.tree_structure(parts[0][0])), dims


def _any_mapped(dims: Sequence[int | None] | None) -> bool:
    return any(dim is not None for dim in dims or ())


class _Folding:
    """`size` mapped entries as more batch, and back."""

    def __init__(self, size: int, batch_first: bool):
        self.size = size
        self.batch = 0 if batch_first else 1  # dimension of the batch in sequences

    def fold(self, x: Tensor | None, dim: int | None, at: int) -> Tensor | None:
        """`x`, mapped in `dim` or the same for all entries, whose batches follow each other in dimension `at`."""
        if x is None:
            return None
        shape = (*x.shape[:at], self.size, *x.shape[at:])
        x = x.unsqueeze(at).expand(shape) if dim is None else x.movedim(dim, at)
        return x.flatten(at, at + 1)

    def fold_all(self, tensors: Sequence[Tensor | None], dims: Sequence | None, at: Sequence[int]) -> list:
        dims = dims or [None] * len(tensors)
        return [self.fold(x, dim, place) for x, dim, place in zip(tensors, dims, at, strict=False)]

    def unfold(self, x: Tensor, at: int) -> tuple[Tensor, int | None]:
        """The result and its mapped dimension. What was not asked for is (0,), and the same for all."""
        if x.dim() == 1:
            return x, None
        return x.unflatten(at, (self.size, x.shape[at] // self.size)), at

    def unfold_all(self, tensors: Sequence[Tensor], at: Sequence[int]) -> tuple[list, list]:
        pairs = [self.unfold(x, place) for x, place in zip(tensors, at, strict=True)]
        return [x for x, _ in pairs], [dim for _, dim in pairs]

    def mask_places(self) -> tuple[int, int, int]:
        return 1, self.batch, self.batch


def _steps_and_batch(x: Tensor, dim: int | None, batch_first: bool) -> tuple[int, int]:
    shape = list(x.shape)
    if dim is not None:
        del shape[dim]
    return (shape[1], shape[0]) if batch_first else (shape[0], shape[1])


def _has_groups(weights: Sequence[Tensor], masks: Sequence[Tensor | None], bidirectional: bool) -> bool:
    """Whether layer_backward has `groups` for such a layer: one without projection, masks and layer normalisation."""
    return len(weights) // (2 if bidirectional else 1) in (2, 4) and not any(mask is not None for mask in masks)


def _layer(size, in_dims, args):
    (input, h_0, c_0, weights, batch_sizes, lengths, resets, masks, cell, bidirectional, batch_first, cell_states, save,
     *recompute) = args  # fmt: skip
    # `saved` has a row for each timestep and sequence in the kernel's order, by falling length. Where all are equally
    # long the entries can be told apart, [D, L, size, N, ..]; else backward must take them together. On CUDA it is
    # bytes in parts.
    apart = save and (input.is_cuda or (lengths is not None and not _has_groups(weights, masks, bidirectional)))
    if _any_mapped(in_dims[3]) or batch_sizes is not None or size == 0 or apart:
        return None
    folding = _Folding(size, batch_first)
    batch = folding.batch
    output, h_n, c_n, cells, saved = torch.ops.rnn_ext.layer(
        *folding.fold_all((input, h_0, c_0), in_dims[:3], (batch, 1, 1)), weights, None,
        *folding.fold_all((lengths, resets), in_dims[5:7], (0, batch)),
        folding.fold_all(masks, in_dims[7], folding.mask_places()), cell, bidirectional, batch_first, cell_states,
        save, *recompute,
    )  # fmt: skip
    results, dims = folding.unfold_all((output, h_n, c_n, cells), (batch, 1, 1, batch))
    if save and saved.dtype == torch.uint8:  # of CUDA's kernels, on the emulator
        return None
    if not save or lengths is not None:
        return (*results, saved), (*dims, None)
    directions = 2 if bidirectional else 1
    steps, entries = _steps_and_batch(results[0], dims[0], batch_first)
    saved = saved.view(directions, steps, size, entries, -1) if saved.numel() else saved.new_empty(1, 1, size, 0, 1)
    return (*results, saved), (*dims, 2)


# Rows, (timestep, entry) pairs, of one call where what they have in common is to be copied for each: as many as stay in
# the caches with all that is computed of them.
ROWS = 4096


def _layer_backward(size, in_dims, args):
    input, weights, batch_sizes, lengths, masks = (args[i] for i in (4, 7, 8, 9, 11))
    apart = _any_mapped(in_dims[7]) or batch_sizes is not None or args[13].dtype == torch.uint8
    if any(args[18][3:]):
        apart = apart or not _has_groups(weights, masks, bidirectional=args[15])
    was_mapped = _any_mapped((*in_dims[4:7], *in_dims[9:11]))  # forward
    if lengths is not None:  # then `saved` is that of all entries, unless it comes from _loop
        apart = apart or in_dims[13] is not None or not was_mapped
    if apart or size == 0:
        return None
    if was_mapped:
        return _layer_backward_folded(size, in_dims, args)
    steps, batch = _steps_and_batch(input, in_dims[4], batch_first=args[16])
    return _in_parts(_layer_backward_folded, size, max(1, ROWS // max(1, steps * batch)), in_dims, args)


def _layer_backward_folded(size, in_dims, args):
    (input, weights, lengths, resets, masks, output, saved) = (args[i] for i in (4, 7, 9, 10, 11, 12, 13))
    bidirectional, batch_first, weights_wanted = args[15], args[16], args[18][3:]
    groups = args[19] if len(args) > 19 else 0
    folding = _Folding(size, batch_first)
    batch = folding.batch
    if saved.numel() == 0:
        saved = saved.new_empty(0)
    elif lengths is None:
        directions = 2 if bidirectional else 1
        steps, entries = _steps_and_batch(input, in_dims[4], batch_first)
        one = 1 if in_dims[13] is None else size
        saved = saved if in_dims[13] is None else saved.movedim(in_dims[13], 0)
        saved = saved.reshape(one, directions, steps, entries, -1).movedim(0, 2)
        saved = saved.expand(-1, -1, size, -1, -1).reshape(-1)
    dx, dh_0, dc_0, dw = torch.ops.rnn_ext.layer_backward(
        *folding.fold_all(args[:7], in_dims[:7], (batch, 1, 1, batch, batch, 1, 1)), weights, None,
        *folding.fold_all((lengths, resets), in_dims[9:11], (0, batch)),
        folding.fold_all(masks, in_dims[11], folding.mask_places()), folding.fold(output, in_dims[12], batch), saved,
        *args[14:19], size * max(1, groups) if any(weights_wanted) else 0,
    )  # fmt: skip
    results, dims = folding.unfold_all((dx, dh_0, dc_0), (batch, 1, 1))
    if groups:
        dw = [x.unflatten(0, (size, groups)) if wanted else x for x, wanted in zip(dw, weights_wanted, strict=True)]
    return (*results, dw), (*dims, [0 if wanted else None for wanted in weights_wanted])


def _layer_tangent(size, in_dims, args):
    tensors, batch_sizes, masks, batch_first, output_mask = (args[i] for i in (1, 2, 5, 8, 10))
    in_dims = [dims or [None] * len(tensors) for dims in in_dims[:2]] + list(in_dims[2:])
    apart = _any_mapped((*in_dims[0][7:], *in_dims[1][7:])) or any(output_mask[7:])
    if apart or any(mask is not None for mask in masks) or batch_sizes is not None or size == 0:
        return None
    steps, batch = _steps_and_batch(tensors[4], in_dims[1][4], batch_first)
    return _in_parts(_layer_tangent_folded, size, max(1, ROWS // max(1, steps * batch)), in_dims, args)


def _layer_tangent_folded(size, in_dims, args):
    tangents, tensors, batch_sizes, lengths, resets, *options = args
    folding = _Folding(size, batch_first=args[8])
    batch = folding.batch
    places = (batch, 1, 1, batch, batch, 1, 1)
    results = torch.ops.rnn_ext.layer_tangent(
        [*folding.fold_all(tangents[:7], in_dims[0], places), *tangents[7:]],
        [*folding.fold_all(tensors[:7], in_dims[1], places), *tensors[7:]], batch_sizes,
        *folding.fold_all((lengths, resets), in_dims[3:5], (0, batch)), *options,
    )  # fmt: skip
    unfolded, dims = folding.unfold_all(results[:7], places)
    # Each entry contiguous, as what it is the tangent of: forward mode would copy another, and not with symbolic sizes.
    entries = [x if dim is None else x.movedim(dim, 0).contiguous() for x, dim in zip(unfolded, dims, strict=True)]
    dims = [None if dim is None else 0 for dim in dims]
    return [*entries, *results[7:]], [*dims, *[None] * (len(results) - 7)]


def _quantized_layer(size, in_dims, args):
    input, h_0, c_0, weights, batch_sizes, lengths, resets, cell, bidirectional, batch_first, cell_states = args
    if _any_mapped(in_dims[3]) or batch_sizes is not None or size == 0:
        return None
    folding = _Folding(size, batch_first)
    batch = folding.batch
    results = torch.ops.rnn_ext.quantized_layer(
        *folding.fold_all((input, h_0, c_0), in_dims[:3], (batch, 1, 1)), weights, None,
        *folding.fold_all((lengths, resets), in_dims[5:7], (0, batch)), cell, bidirectional, batch_first, cell_states,
    )  # fmt: skip
    return tuple(map(tuple, folding.unfold_all(results, (batch, 1, 1, batch))))


_Rule = Callable[[int, Sequence[Any], Sequence[Any]], tuple[Any, Any] | None]
# By op: from the number of entries, the mapped dimension of each argument and the arguments to the results and theirs;
# None where that takes a call for each entry.
RULES: dict[str, _Rule] = {
    "layer": _layer,
    "layer_backward": _layer_backward,
    "layer_tangent": _layer_tangent,
    "quantized_layer": _quantized_layer,
    **dict.fromkeys(
        (
            *("layer_reference", "layer_backward_reference", "layer_tangent_reference"),
            *("layer_tangent_backward_reference", "random_mask"),
        ),
        lambda size, in_dims, args: None,
    ),
}


def register(library: torch.library.Library) -> None:
    """The rules, for torch.func's vmap and for the one that autograd has for `is_grads_batched` and `vectorize`."""
    for name, rule in RULES.items():
        op = getattr(torch.ops.rnn_ext, name).default
        library.impl(name, functools.partial(_functorchs_vmap, name, op, rule), "FuncTorchBatched")
        library.impl(name, functools.partial(_autograds_vmap, name, rule), "Batched")


_NOT_BATCHED = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)


def _functorchs_vmap(name: str, op: Callable, rule: _Rule, *args: Any) -> Any:
    """What torch.library.register_vmap makes of a rule, some 120 us a call faster for so many arguments."""
    interpreter = retrieve_current_functorch_interpreter()
    level = interpreter.level()

    def unwrapped(value: Any) -> tuple[Any, Any]:
        if isinstance(value, Tensor):
            return torch._C._functorch._unwrap_batched(value, level)
        if isinstance(value, (list, tuple)):
            pairs = [unwrapped(x) for x in value]
            return [x for x, _ in pairs], [dim for _, dim in pairs]
        return value, None

    pairs = [unwrapped(arg) for arg in args]
    in_dims = [dim for _, dim in pairs]
    with torch._C._ExcludeDispatchKeyGuard(_NOT_BATCHED):
        if not any(_any_mapped(dim) if isinstance(dim, list) else dim is not None for dim in in_dims):
            return op(*args)
        given = interpreter.batch_size(), in_dims, [x for x, _ in pairs]
        results, dims = rule(*given) or _loop(name, *given, below=True)
    return _wrapped(results, dims, torch._C._functorch._add_batch_dim, level)


def _autograds_vmap(name: str, rule: _Rule, *args: Any) -> Any:
    # (What torch does itself for an op without such a kernel fails at lists of tensors.)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    # Of each tensor the entries in dimension 0, or one of what is not mapped.
    args = pytree.tree_map_only(Tensor, lambda x: torch._remove_batch_dim(x, level, 1, 0), args)
    sizes = [x.shape[0] for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
    size = next((n for n in sizes if n != 1), 1)
    in_dims = pytree.tree_map(lambda x: 0 if isinstance(x, Tensor) and x.shape[0] == size else None, args)
    args = pytree.tree_map_only(Tensor, lambda x: x if x.shape[0] == size else x[0], args)
    torch._C._vmapmode_decrement_nesting()  # an outer vmap is the innermost one now
    try:
        results, dims = rule(size, in_dims, args) or _loop(name, size, in_dims, args, below=False)
    finally:
        torch._C._vmapmode_increment_nesting()
    return _wrapped(results, dims, torch._add_batch_dim, level)


def _wrapped(results: Any, dims: Any, add_dim: Callable, level: int) -> Any:
    """What an op returns at a level, from a rule's results and their mapped dimensions."""
    if isinstance(results, (list, tuple)):
        return type(results)(_wrapped(x, dim, add_dim, level) for x, dim in zip(results, dims, strict=True))
    return results if dims is None else add_dim(results, dims, level)
