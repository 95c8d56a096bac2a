"""What torch wants to know of the ops without running them: the shapes of their results, for torch.compile,
torch.export and meta tensors, and their floating-point operations, for torch.utils.flop_counter."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from rnn_ext import reference


def register() -> None:
    for name, kernel in (
        ("layer", _layer_fake),
        ("layer_backward", _layer_backward_fake),
        ("layer_tangent", _layer_tangent_fake),
        ("random_mask", _random_mask_fake),
        ("quantized_layer", _quantized_layer_fake),
    ):
        torch.library.register_fake(f"rnn_ext::{name}", kernel)
    for op, formula in (
        (torch.ops.rnn_ext.layer, _layer_flops),
        (torch.ops.rnn_ext.layer_backward, _layer_backward_flops),
        (torch.ops.rnn_ext.layer_tangent, _layer_tangent_flops),
        (torch.ops.rnn_ext.quantized_layer, _quantized_layer_flops),
    ):
        if op not in flop_registry:  # rnn_ext.ops is loaded again
            register_flop_formula(op)(formula)


def _layer_fake(
    input, h_0, c_0, weights, batch_sizes, lengths, resets, masks, cell, bidirectional, batch_first, cell_states, save,
    recompute=False,
):  # fmt: skip
    """Shapes of the results. What sizes and devices tell is checked as by the kernels (csrc/ops/layer.cpp): a tensor
    that was left on the meta device by mistake brings the others here."""
    from rnn_ext import _C

    directions = 2 if bidirectional else 1
    named = reference.split_weights(weights, directions)
    gates = reference.CELLS[cell].gates
    (rows_of_gates, features), out = named[0].weight_ih.shape, named[0].weight_hh.shape[1]
    hidden = rows_of_gates // gates
    expected = reference.LayerWeights(
        *((rows_of_gates, features), (rows_of_gates, out), (rows_of_gates,), (rows_of_gates,), (out, hidden)),
        *((rows_of_gates,), (rows_of_gates,), (hidden,), (hidden,)),
    )
    for part in named:
        for name, weight, size in zip(part._fields, part, expected, strict=True):
            _check_like_input(input, name, weight, *size)
    mask = masks[0] if masks else None
    batch, results = _sequences_fake(
        input, h_0, c_0, batch_sizes, lengths, resets, cell, directions, features, hidden, out, batch_first,
        cell_states, mask,
    )  # fmt: skip
    lead = tuple(input.shape[:-1])
    if masks:
        for name, mask, size in (
            ("hidden_mask", masks[0], (directions, batch, out)),
            ("zoneout_h", masks[1], (*lead, directions * out)),
            ("zoneout_c", masks[2], (*lead, directions * hidden)),
        ):
            _check_like_input(input, name, mask, *size)

    projected = named[0].weight_hr is not None
    variant = reference.variant_of(len(weights) // directions, any(m is not None for m in masks))
    if input.device.type == "cuda":
        dtype = torch.uint8
        per_unit, per_row = _C.cuda_saved_bytes(cell, projected, variant, input.dtype.itemsize)
        values = hidden * per_unit + per_row
    else:
        dtype = torch.float32 if input.dtype in (torch.bfloat16, torch.float16) else input.dtype
        values = _C.saved_values(cell, projected, variant) * _padded(hidden)
    rows = lead[0] if batch_sizes is not None else lead[0] * lead[1]
    return (*results, input.new_empty(directions * rows * values if save else 0, dtype=dtype))


def _sequences_fake(
    input, h_0, c_0, batch_sizes, lengths, resets, cell, directions, features, hidden, out, batch_first, cell_states,
    hidden_mask=None,
):  # fmt: skip
    """Of a layer whose weights say so: N, and the shapes of output, h_n, c_n and cells."""
    packed = batch_sizes is not None
    if input.dim() != (2 if packed else 3):
        raise RuntimeError(f"expected input with {2 if packed else 3} dimensions, got size {list(input.shape)}")
    if input.shape[-1] != features:
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {features}, got {input.shape[-1]}")
    lead = tuple(input.shape[:-1])
    if packed and batch_sizes.device.type != "cpu":
        raise RuntimeError(f"expected batch_sizes on the CPU, got {batch_sizes.device}")
    batch = _packed_batch(batch_sizes, h_0, c_0, hidden_mask) if packed else lead[0 if batch_first else 1]
    _check_like_input(input, "h_0", h_0, directions, batch, out)
    _check_like_input(input, "c_0", c_0, directions, batch, hidden)
    if lengths is not None and lengths.device.type != "cpu":  # where they may also be
        _check_like_input(input, "lengths", lengths, batch)
    _check_like_input(input, "resets", resets, *lead)
    return batch, (
        input.new_empty(*lead, directions * out),
        input.new_empty(directions, batch, out),
        input.new_empty(directions, batch, hidden) if reference.CELLS[cell].has_cell_state else input.new_empty(0),
        input.new_empty(*lead, directions * hidden) if cell_states else input.new_empty(0),
    )


def _layer_backward_fake(
    grad_output, grad_h_n, grad_c_n, grad_cells, input, h_0, c_0, weights, batch_sizes, lengths, resets, masks, output,
    saved, cell, bidirectional, batch_first, cell_states, output_mask, groups=0,
):  # fmt: skip
    for name, tensor in (
        ("grad_output", grad_output), ("grad_h_n", grad_h_n), ("grad_c_n", grad_c_n), ("grad_cells", grad_cells),
        ("h_0", h_0), ("c_0", c_0), *(("a weight", weight) for weight in weights), ("resets", resets),
        *(("a mask", mask) for mask in masks), ("output", output), ("saved", saved),
    ):  # fmt: skip
        _check_device(input, name, tensor)
    # A gradient is wanted only of states that are there, and the size of a packed batch is known from them alone.
    states = [() if state is None else state.shape for state in (h_0, c_0)]
    own = (groups,) if groups else ()
    sizes = [input.shape, *states, *((*own, *w.shape) for w in weights)]
    grads = [input.new_empty(size if mask else 0) for size, mask in zip(sizes, output_mask, strict=True)]
    return grads[0], grads[1], grads[2], grads[3:]


def _layer_tangent_fake(
    tangents, tensors, batch_sizes, lengths, resets, masks, cell, bidirectional, batch_first, cell_states, output_mask
):  # fmt: skip
    input, h_0, c_0, *weights = tensors[4:]
    results = _layer_fake(
        input, h_0, c_0, weights, batch_sizes, lengths, resets, masks, cell, bidirectional, batch_first, True, False
    )  # fmt: skip
    return [
        input.new_empty(x.shape if wanted and x is not None else 0)
        for x, wanted in zip((*results[:4], *tensors[4:]), output_mask, strict=True)
    ]


def _quantized_layer_fake(
    input, h_0, c_0, weights, batch_sizes, lengths, resets, cell, bidirectional, batch_first, cell_states
):  # fmt: skip
    for weight in weights:
        _check_device(input, "a weight", weight)
    directions = 2 if bidirectional else 1
    hidden = weights[2].shape[2]
    out = weights[4].shape[0] if len(weights) // directions == 5 else hidden
    features = input.shape[-1]  # which the weights, filled up, do not tell
    _, results = _sequences_fake(
        input, h_0, c_0, batch_sizes, lengths, resets, cell, directions, features, hidden, out, batch_first, cell_states
    )
    return results


def _random_mask_fake(seed, size, p, value, dtype):
    return seed.new_empty(size, dtype=dtype)


def _check_like_input(input: Tensor, name: str, tensor: Tensor | None, *size: int) -> None:
    if tensor is None:
        return
    _check_device(input, name, tensor)
    if tensor.dim() != len(size) or any(found != expected for found, expected in zip(tensor.shape, size, strict=True)):
        raise RuntimeError(f"expected {name} of size {list(size)}, got {list(tensor.shape)}")


def _check_device(input: Tensor, name: str, tensor: Tensor | None) -> None:
    if tensor is not None and tensor.device != input.device:
        raise RuntimeError(f"{name} is on {tensor.device} but input is on {input.device}: expected the same device")


def _packed_batch(batch_sizes: Tensor, *of_entries: Tensor | None) -> int:
    """N of a packed input. If none of these, [D, N, ..], is there, it may be a number that only the run will tell."""
    for tensor in of_entries:
        if tensor is not None:
            return tensor.shape[1]
    from torch._subclasses.fake_tensor import FakeTensor

    if isinstance(batch_sizes, FakeTensor):
        return torch.library.get_ctx().new_dynamic_size()
    return int(batch_sizes[0])  # beside meta tensors it has values


def _padded(size: int) -> int:
    """As cpu::Sizes::padded; here because the size may be symbolic."""
    return (size + 15) // 16 * 16


def _layer_flops(input_shape, h_0, c_0, weights, batch_sizes, lengths, *args, **kwargs) -> int:
    """Flops of the products of a layer over all of its rows, for torch.utils.flop_counter; shapes for tensors."""
    rows = math.prod(input_shape[:-1])
    return 2 * rows * sum(math.prod(shape) for shape in weights if len(shape) == 2)


def _layer_backward_flops(
    grad_output, grad_h_n, grad_c_n, grad_cells, input_shape, h_0, c_0, weights, batch_sizes, lengths, resets, masks,
    output, saved, cell, bidirectional, batch_first, cell_states, output_mask, **kwargs
) -> int:  # fmt: skip
    """For each product of the layer one by its weight (by W_ih if the input's gradient is wanted) and one for it."""
    rows, count = math.prod(input_shape[:-1]), len(weights) // (2 if bidirectional else 1)
    flops = 0
    for i, shape in enumerate(weights):
        if len(shape) == 2:
            products = output_mask[3 + i] + (output_mask[0] if i % count == 0 else 1)
            flops += 2 * rows * math.prod(shape) * products
    return flops


def _layer_tangent_flops(
    tangents, tensors, batch_sizes, lengths, resets, masks, cell, bidirectional, batch_first, cell_states, output_mask,
    **kwargs
) -> int:  # fmt: skip
    """The derivative of a product is two, of which those without a tangent are not computed; and values are again."""
    input_shape, weights, along = tensors[4], tensors[7:], tangents[7:]
    rows, count = math.prod(input_shape[:-1]), len(weights) // (2 if bidirectional else 1)
    flops = 0
    for i, shape in enumerate(weights):
        if len(shape) != 2:
            continue
        moves, is_input = along[i] is not None, i % count == 0
        products = 1 + moves + (not is_input or tangents[4] is not None)
        if any(output_mask[4:]):
            moved = 1 if is_input and tangents[4] is None else 2
            products += output_mask[7 + i] * moved
            products += output_mask[4] * (1 + moves) if is_input else 2 + moves
        flops += 2 * rows * math.prod(shape) * products
    return flops


def _quantized_layer_flops(
    input_shape, h_0, c_0, weights, batch_sizes, lengths, resets, cell, bidirectional, *args, **kwargs
) -> int:
    """Of the products of a layer, with all units and columns that its weights have room for."""
    count = len(weights) // (2 if bidirectional else 1)
    products = [shape for i, shape in enumerate(weights) if i % count in (0, 1, 3)]
    return 2 * math.prod(input_shape[:-1]) * sum(map(math.prod, products))
