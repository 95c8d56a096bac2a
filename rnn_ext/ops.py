"""The layer op from Python: loading it, calling it, and what must be written in Python about it.

``rnn_ext::layer`` computes all timesteps of one recurrent layer in up to two directions:

=============  ========================================================================================================
input          (L, N, I), (N, L, I) with ``batch_first``, or packed (sum of batch_sizes, I)
h_0            (D, N, P or H), or None for zeros
c_0            (D, N, H), or None for zeros (lstm only)
weights        per direction: weight_ih (G*H, I), weight_hh (G*H, P or H)[, bias_ih (G*H,), bias_hh (G*H,)]
               [, weight_hr (P, H)][, weight_norm_ih (G*H,), weight_norm_hh (G*H,), weight_norm_c (H,), bias_norm_c (H,)
               for layer normalisation (lstm only)], gates in torch's order
batch_sizes    (L,) int64 on the CPU, positive and non-increasing: the input is packed
lengths        (N,) integers from 0 to L, in any order: of a padded input only these first timesteps exist. On CUDA
               the values are not read before the kernels run: those beyond 0 and L count as 0 and L
resets         bool, in the layout of the input without its features: True where an independent sequence begins
masks          [] or [hidden_mask, zoneout_h, zoneout_c], each float or None (all None is []), without gradient:
               (D, N, P or H), by which h is multiplied before the recurrent product; in the layout of the input,
               D * (P or H) and D * H features, the share of h and of c that stays what it was before the timestep
cell           "rnn_tanh", "rnn_relu", "gru" or "lstm"
output         in the layout of the input, D * (P or H) features; zeros where a sequence has ended
h_n, c_n       (D, N, P or H), (D, N, H); c_n is empty for cells without a cell state
cells          the cell state of every timestep, D * H features, where ``cell_states``; else empty
saved          what backward needs, opaque; empty unless ``save``, which autograd sets by itself. Under a vmap with
               ``lengths`` it is of use within this vmap only
recompute      whether autograd keeps neither ``saved`` nor ``output`` and its backward computes them once more
groups         of backward: the batch is so many groups of equally many entries, each with weight gradients of its own,
               stacked; 0: all have the same. For plain layers without projection and `batch_sizes` on the CPU
=============  ========================================================================================================

All floating-point tensors share one dtype out of float32, float64, bfloat16 and float16 and one device. Reduced
precision is storage: sums, gates and cell states are float32, and so is h from one timestep to the next. On CPUs,
without masks and layer normalisation, h goes on rounded, as the output shows it, in bfloat16 where the processor
multiplies it (AVX512_BF16) and in calls of up to four rows, or 24 of one timestep, whose weights are read as they lie.
On the CPU subnormal numbers, those below 1.2e-38 (float64: 2.3e-308), count as zero.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function
from torch.utils.flop_counter import flop_registry, register_flop_formula

from rnn_ext import _loader, batching, reference

# As of csrc/ops/cuda_layer.cpp.
CUDA_KERNELS = ("step", "pointwise", "persistent", "tensor", "cluster", "grid")
_load_error = _loader.load()
_held = os.environ.get("RNN_EXT_CPU_CAPABILITY")
if _held and not _load_error:
    from rnn_ext import _C

    if not _C.set_cpu_capability(_held):
        _load_error = f"RNN_EXT_CPU_CAPABILITY={_held} cannot be met here: unset it, or name baseline, avx2 or avx512"
if _load_error:
    warnings.warn(f"only torch's own kernels can run: {_load_error}", stacklevel=2)


def is_available() -> bool:
    """Whether the compiled ops could be loaded."""
    return _load_error is None


def load_error() -> str | None:
    """Why not: one sentence with its remedy."""
    return _load_error


def cpu_capability() -> str:
    """The instruction set of the CPU kernels in use: "baseline", "avx2" or "avx512"."""
    from rnn_ext import _C

    return _C.cpu_capability()


def set_cpu_capability(name: str) -> None:
    """Choose the instruction set of the CPU kernels, for tests and comparisons.

    Raises:
        ValueError: this processor or build lacks it.
    """
    from rnn_ext import _C

    if not _C.set_cpu_capability(name):
        raise ValueError(f"CPU capability {name!r} is not available here: expected baseline, avx2 or avx512")


def with_cuda() -> bool:
    """Whether the library has CUDA kernels (not whether there is a GPU for them)."""
    if not is_available():
        return False
    from rnn_ext import _C

    return _C.with_cuda


def _cuda_library() -> Any:
    if not with_cuda():
        raise ValueError("this library has been built without CUDA kernels")
    from rnn_ext import _C

    return _C


@functools.cache
def cuda_problem(device: int) -> str | None:
    """Why the library's CUDA kernels cannot run on this device, in one sentence, or None. Asked once per device."""
    from rnn_ext import _C

    return _C.cuda_problem(device)


def cuda_kernel(
    cell: str,
    dtype: torch.dtype,
    length: int,
    batch: int,
    hidden: int,
    *,
    bidirectional: bool = False,
    projected: bool = False,
    variant: int = 0,
    backward: bool = False,
    device: int = 0,
    shared_bytes: int = 0,
    multiprocessors: int = 0,
) -> tuple[str, str]:
    """The CUDA kernel that the dispatch table (csrc/cuda/dispatch.h) has for a layer, one of :data:`CUDA_KERNELS`, and
    the reason, under torch's present settings for TF32. `variant` as of :func:`variant_of`.

    `device` is asked what a launch on it asks, co-resident clusters included. For one that need not be here tell
    instead what it has: `shared_bytes`, the most shared memory of a block, which stands for the architecture, and
    `multiprocessors`; the reason then says what is assumed.

    Raises:
        ValueError: an unknown cell or dtype, or no CUDA kernel at all in this build.
        RuntimeError: there is no such device to ask.
    """
    _C = _cuda_library()
    which = cell, dtype, variant, length, batch, hidden, 1 + bidirectional
    return _C.cuda_kernel(*which, projected, backward, device, shared_bytes, multiprocessors)


def force_cuda_kernel(name: str | None) -> None:
    """Run this CUDA kernel whatever the dispatch table says (None: the table), for tests and comparisons. A layer that
    the kernel cannot run raises.

    Raises:
        ValueError: there is no such kernel, or no CUDA kernel at all in this build.
    """
    if not _cuda_library().force_cuda_kernel(name or ""):
        raise ValueError(f"unknown CUDA kernel {name!r}: expected {', '.join(CUDA_KERNELS)} or None")


def layer(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    cell: str,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    bidirectional: bool = False,
    batch_first: bool = False,
    cell_states: bool = False,
    masks: Sequence[Tensor | None] = (),
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer: output, h_n, c_n, cells. Shapes, dtypes and meanings as in the table at the top of this module.

    Raises:
        ValueError, TypeError, RuntimeError: as torch.nn does, with what was found and what was expected.
    """
    tensors = (input, h_0, c_0, weights, batch_sizes, lengths, resets)
    options = (cell, bidirectional, batch_first, cell_states)
    if _is_traced(input, h_0, c_0, weights):
        # Not an empty list: AOTInductor takes that for None.
        return _layer(*tensors, masks or (None, None, None), *options, False, recompute)[:4]
    if masks or recompute:
        return _fast_extended_layer(*tensors, masks, *options, recompute)[:4]
    return _fast_layer(*tensors, *options)[:4]


def stack(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    cell: str,
    layers: int,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    bidirectional: bool = False,
    batch_first: bool = False,
    cell_states: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Layers on top of each other, `weights` of one after the other, without dropout: output, h_n, c_n and cells of
    :func:`layer`, states (layers * D, N, features).

    On the CPU, with two threads or more, layers of one direction run at the same time where that is faster
    (csrc/cpu/dispatch.cpp). None where Python looks at the call and should see its layers.

    Raises:
        RuntimeError: sizes of the states; else as :func:`layer`.
    """
    if type(input) is not Tensor or _is_traced(input, h_0, c_0, weights):
        return None
    options = (cell, layers, bidirectional, batch_first, cell_states)
    return _fast_stack(input, h_0, c_0, weights, batch_sizes, lengths, resets, *options)


def cell(
    input: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor], name: str
) -> tuple[Tensor, Tensor | None]:
    """One timestep of one direction: :func:`layer` of the cell `name` without these dimensions.

    Args:
        input: (N, I).
        h, c: (N, H), None is zero.

    Returns:
        the next h and, of an LSTM, c.
    """
    if is_cast(input):
        with torch.autocast("cpu", enabled=False):
            input, h, c, *weights = uncast(weights[0], input, h, c, *weights)
            return cell(input, h, c, weights, name)
    if not _is_traced(input, h, c, weights):
        return _fast_cell(input, h, c, weights, name)
    h, c = (None if state is None else state.unsqueeze(0) for state in (h, c))
    _, h, c, _ = layer(input.unsqueeze(0), h, c, weights, cell=name)
    return h.squeeze(0), c.squeeze(0) if reference.CELLS[name].has_cell_state else None


def is_cast(input: Tensor) -> bool:
    """Whether autocast would have one timestep computed in 16 bits on the CPU, and round the states in every call.

    torch.nn.LSTMCell and GRUCell, given float32 states, return float32 there.
    """
    return torch.is_autocast_enabled("cpu") and input.device.type == "cpu"


def uncast(weight: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """What autocast would have cast, in the dtype of `weight`. (It leaves alone what is float64 or no number.)"""

    def same(x: Tensor | None) -> Tensor | None:
        casts = x is not None and x.is_floating_point() and torch.float64 not in (x.dtype, weight.dtype)
        return x.to(weight.dtype) if casts else x

    return [same(x) for x in tensors]


def quantized_layer(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    cell: str,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    bidirectional: bool,
    batch_first: bool,
    cell_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`layer` on the CPU with weights of 8 bits, see :mod:`rnn_ext.quantized`; float32, bfloat16 or float16.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`layer`; backward, as there is none.
    """
    tensors = (input, h_0, c_0, weights, batch_sizes, lengths, resets)
    run = _quantized_layer if _is_traced(input, h_0, c_0, weights) else _fast_quantized_layer
    return run(*tensors, cell, bidirectional, batch_first, cell_states)


def random_mask(shape: Sequence[int], p: float, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of `value` with probability p in [0, 1], else 0, in float32 or float64, drawn with the generator that
    torch has for the device."""
    if device.type == "cpu" and is_available():  # torch.rand would take longer than a small layer
        if not (torch.compiler.is_compiling() or has_torch_function((None,))):  # as in _is_traced
            return _fast_random_mask(shape, p, value, dtype == torch.float64)
        seed = torch.randint(-(2**63), 2**63 - 1, (), device="cpu")
        return torch.ops.rnn_ext.random_mask.default(seed, shape, p, value, dtype)
    uniform = torch.rand(shape, dtype=dtype, device=device)
    return uniform.add_(min(p, 1 - 2**-24)).floor_().mul_(value)  # a larger p could round a sum up to 2


def _is_traced(input: Tensor, h_0: Tensor | None, c_0: Tensor | None, weights: Sequence[Tensor]) -> bool:
    """Whether Python looks at the call: then it must be torch.ops', which costs 3 us more than the binding.

    What happens below Python (autograd, autocast, vmap, dispatch modes) the binding's call of the dispatcher sees too.
    """
    return torch.compiler.is_compiling() or has_torch_function((input, h_0, c_0, *weights))


def _layer_reference(
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
    output, h_n, c_n, cells = reference.layer(
        input, h_0, c_0, weights, batch_sizes, lengths, resets, cell, bidirectional, batch_first, masks
    )
    empty = input.new_empty(0)
    return output, h_n, empty if c_n is None else c_n, cells if cell_states and cells is not None else empty


def _layer_backward_reference(
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
        return _layer_reference(*a[:3], a[3:], *options)

    grads = (grad_output, grad_h_n, grad_c_n, grad_cells)
    results = _gradients(forward, [input, h_0, c_0, *weights], output_mask, grads)
    return results[0], results[1], results[2], results[3:]


def _layer_tangent_reference(
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
            outputs = _layer_reference(input, h_0, c_0, weights, *layout, True)
        grads = [x if x is not None else torch.zeros_like(y) for x, y in zip(tensors[:4], outputs, strict=True)]
        tensors = [x if wanted else y for x, y, wanted in zip(grads, tensors[:4], output_mask[:4], strict=True)]
        tensors += [input, h_0, c_0, *weights]

    def backward(a: Sequence[Tensor | None]) -> Sequence[Tensor]:
        mask = [tangent is not None for tangent in tangents[4:]]
        *grads, dw = _layer_backward_reference(*a[:7], a[7:], *layout, cell_states, mask)
        return *grads, *dw

    results = _gradients(backward, tensors, output_mask, tangents[4:])
    if any(tangent is not None for tangent in tangents[:4]) and any(output_mask[4:]):
        *linear, dw = _layer_backward_reference(
            *tangents[:4], input, h_0, c_0, weights, *layout, cell_states, output_mask[4:]
        )
        sums = zip(results[4:], (*linear, *dw), output_mask[4:], strict=True)
        results[4:] = [x + y if wanted else x for x, y, wanted in sums]
    return results


def _layer_tangent_backward_reference(
    cotangents: Sequence[Tensor | None],
    tangents: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],
    *options: Any,
) -> list[Tensor]:
    """The vector-Jacobian product of the above, whose other arguments are all `options` but the last, in those of
    tangents and tensors that the last one wants."""
    *options, wanted = options

    def tangent(a: Sequence[Tensor | None]) -> Sequence[Tensor]:
        return _layer_tangent_reference(a[: len(tangents)], a[len(tangents) :], *options)

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


def variant_of(weights: int, masked: bool) -> int:
    """Which variant of a cell so many weights a direction and masks make: 0 plain, 1 masked, 2 with layer normalisation
    (csrc/cpu/layer.h, csrc/cuda/launch.h)."""
    return 2 if weights > 5 else 1 if masked else 0


def hidden_size(cell: str, weights: Sequence[Tensor]) -> int:
    """H, which the weight_hh of a projected layer does not tell."""
    return weights[0].shape[0] // reference.CELLS[cell].gates


def _padded(size: int) -> int:
    """As cpu::Sizes::padded; here because the size may be symbolic."""
    return (size + 15) // 16 * 16


def _packed_batch(batch_sizes: Tensor, *of_entries: Tensor | None) -> int:
    """N of a packed input. If none of these, [D, N, ..], is there, it may be a number that only the run will tell."""
    for tensor in of_entries:
        if tensor is not None:
            return tensor.shape[1]
    from torch._subclasses.fake_tensor import FakeTensor

    if isinstance(batch_sizes, FakeTensor):
        return torch.library.get_ctx().new_dynamic_size()
    return int(batch_sizes[0])  # beside meta tensors it has values


def _check_device(input: Tensor, name: str, tensor: Tensor | None) -> None:
    if tensor is not None and tensor.device != input.device:
        raise RuntimeError(f"{name} is on {tensor.device} but input is on {input.device}: expected the same device")


def _check_like_input(input: Tensor, name: str, tensor: Tensor | None, *size: int) -> None:
    if tensor is None:
        return
    _check_device(input, name, tensor)
    if tensor.dim() != len(size) or any(found != expected for found, expected in zip(tensor.shape, size, strict=True)):
        raise RuntimeError(f"expected {name} of size {list(size)}, got {list(tensor.shape)}")


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
    variant = variant_of(len(weights) // directions, any(m is not None for m in masks))
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


def _quantized_layer_flops(
    input_shape, h_0, c_0, weights, batch_sizes, lengths, resets, cell, bidirectional, *args, **kwargs
) -> int:
    """Of the products of a layer, with all units and columns that its weights have room for."""
    count = len(weights) // (2 if bidirectional else 1)
    products = [shape for i, shape in enumerate(weights) if i % count in (0, 1, 3)]
    return 2 * math.prod(input_shape[:-1]) * sum(map(math.prod, products))


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


if is_available():
    from rnn_ext._C import cell as _fast_cell
    from rnn_ext._C import extended_layer as _fast_extended_layer
    from rnn_ext._C import layer as _fast_layer
    from rnn_ext._C import plain_cell, plain_forward, plain_step, quantized_forward
    from rnn_ext._C import quantized_layer as _fast_quantized_layer
    from rnn_ext._C import random_mask as _fast_random_mask
    from rnn_ext._C import stack as _fast_stack

    _layer = torch.ops.rnn_ext.layer.default
    _quantized_layer = torch.ops.rnn_ext.quantized_layer.default
    _library = torch.library.Library("rnn_ext", "IMPL")  # kept: dropping it would unregister what follows
    _library.impl("layer_reference", _layer_reference, "CompositeImplicitAutograd")
    _library.impl("layer_backward_reference", _layer_backward_reference, "CompositeImplicitAutograd")
    _library.impl("layer_tangent_reference", _layer_tangent_reference, "CompositeImplicitAutograd")
    _library.impl("layer_tangent_backward_reference", _layer_tangent_backward_reference, "CompositeImplicitAutograd")
    torch.library.register_fake("rnn_ext::layer", _layer_fake)
    torch.library.register_fake("rnn_ext::layer_backward", _layer_backward_fake)
    torch.library.register_fake("rnn_ext::layer_tangent", _layer_tangent_fake)
    torch.library.register_fake("rnn_ext::random_mask", _random_mask_fake)
    torch.library.register_fake("rnn_ext::quantized_layer", _quantized_layer_fake)
    batching.register(_library)
    for _op, _formula in (
        (torch.ops.rnn_ext.layer, _layer_flops),
        (torch.ops.rnn_ext.layer_backward, _layer_backward_flops),
        (torch.ops.rnn_ext.layer_tangent, _layer_tangent_flops),
        (torch.ops.rnn_ext.quantized_layer, _quantized_layer_flops),
    ):
        if _op not in flop_registry:  # this module is loaded again
            register_flop_formula(_op)(_formula)
else:

    def _layer(*args: Any) -> Any:
        raise RuntimeError(_load_error)

    _fast_layer = _fast_extended_layer = _fast_stack = _fast_cell = _layer
    _quantized_layer = _fast_quantized_layer = _layer

    def plain_forward(attributes: dict[str, Any], input: Any, hx: Any) -> None:
        return None  # what it says of every call that is not plain

    quantized_forward = plain_step = plain_forward

    def plain_cell(attributes: dict[str, Any], mode: str, input: Any, hx: Any) -> None:
        return None
