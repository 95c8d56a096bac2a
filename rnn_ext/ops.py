"""The layer op from Python: loading it and calling it. What else is written in Python about it stands in
:mod:`rnn_ext.derivatives`, :mod:`rnn_ext.batching` and :mod:`rnn_ext.fakes`.

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
multiplies it (AVX512_BF16) and in calls of up to four rows, or 32 of one timestep, whose weights are read as they lie.
On the CPU subnormal numbers, those below 1.2e-38 (float64: 2.3e-308), count as zero.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from rnn_ext import _loader, _processor, batching, derivatives, fakes, reference

# As of csrc/ops/cuda_layer.cpp.
CUDA_KERNELS = ("step", "pointwise", "persistent", "tensor", "cluster", "grid")
_KNOWN = (
    f"one of {', '.join(_processor.INSTRUCTION_SETS)} that this processor has and the library was built with "
    f"({_processor.VARIABLE}=all compiles every one)"
)
_load_error = _loader.load()
_held = os.environ.get("RNN_EXT_CPU_CAPABILITY")
if _held and not _load_error:
    from rnn_ext import _C

    if not _C.set_cpu_capability(_held):
        _load_error = f"RNN_EXT_CPU_CAPABILITY={_held} cannot be met here: unset it, or name {_KNOWN}"
if _load_error:
    warnings.warn(f"only torch's own kernels can run: {_load_error}", stacklevel=2)


def is_available() -> bool:
    """Whether the compiled ops could be loaded."""
    return _load_error is None


def load_error() -> str | None:
    """Why not: one sentence with its remedy."""
    return _load_error


def cpu_capability(dtype: torch.dtype | None = None) -> str:
    """The instruction set of the CPU kernels in use: "baseline", "avx2", "avx512" or "amx", AVX-512 with tiles for
    bfloat16 and 8 bits. Of a dtype: "avx512" where "amx" does not multiply it by tiles, or Linux grants none."""
    from rnn_ext import _C

    level = _C.cpu_capability()
    if level == "amx" and dtype is not None and not (dtype in (torch.bfloat16, torch.int8) and _C.multiplies_tiles()):
        return "avx512"
    return level


def missing_cpu_capability() -> str | None:
    """The best instruction set of this processor if the library was built without kernels for it, else None."""
    from rnn_ext import _C

    return _C.missing_cpu_capability()


def set_cpu_capability(name: str) -> None:
    """Choose the instruction set of the CPU kernels, for tests and comparisons. Not between a call and its backward:
    which of them keep nothing for it depends on the length of vectors.

    Raises:
        ValueError: this processor or build lacks it. A build compiles the best one of its machine; with
            RNN_EXT_CPU_ISAS=all it compiles every one.
    """
    from rnn_ext import _C

    if not _C.set_cpu_capability(name):
        raise ValueError(f"CPU capability {name!r} is not available: expected {_KNOWN}")


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
    the reason, under torch's present settings for TF32. `variant` as of :func:`rnn_ext.reference.variant_of`.

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


def hidden_size(cell: str, weights: Sequence[Tensor]) -> int:
    """H, which the weight_hh of a projected layer does not tell."""
    return weights[0].shape[0] // reference.CELLS[cell].gates


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
    derivatives.register(_library)
    batching.register(_library)
    fakes.register()
else:

    def _layer(*args: Any) -> Any:
        raise RuntimeError(_load_error)

    _fast_layer = _fast_extended_layer = _fast_stack = _fast_cell = _layer
    _quantized_layer = _fast_quantized_layer = _layer

    def plain_forward(
        attributes: dict[str, Any], input: Any, hx: Any, lengths: Any, resets: Any, return_cell_states: Any
    ) -> None:
        return None  # what it says of every call that is not plain

    quantized_forward = plain_forward

    def plain_step(attributes: dict[str, Any], input: Any, hx: Any) -> None:
        return None

    def plain_cell(attributes: dict[str, Any], mode: str, input: Any, hx: Any) -> None:
        return None
