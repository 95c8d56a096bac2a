"""Who computes a layer: ``"custom"`` (our op), ``"native"`` (torch's own kernels) or ``"auto"`` (decided at each call).

Both read the same parameters in the same layout, so a model can be switched between two training steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnn_ext import _loader, ops

BACKENDS = ("auto", "custom", "native")
UNMEASURED = "the custom CUDA kernels have not been timed against torch's on a GPU; backend='custom' runs them"
CUSTOM_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
QUANTIZED_DTYPES = CUSTOM_DTYPES - {torch.float64}

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def check_backend(backend: str) -> str:
    """Return `backend`, or raise ValueError if it is none of :data:`BACKENDS`."""
    if backend not in BACKENDS:
        raise ValueError(f"Unknown backend {backend!r}. Select from {', '.join(map(repr, BACKENDS))}.")
    return backend


def check_module(model: object) -> None:
    """TypeError unless it is a module."""
    if not isinstance(model, nn.Module):
        found = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"expected a module, got {found}")


def warn_without(model: nn.Module, kinds: tuple[type, ...], names: str, done: str) -> None:
    """A warning to who called the caller, where no module in `model` is of these kinds."""
    if not any(isinstance(module, kinds) for module in model.modules()):
        warnings.warn(f"no {names} in this {type(model).__name__}: nothing is {done}", stacklevel=3)


def strange_layout(tensor: Tensor) -> str | None:
    """What else than a dense tensor it is. Only torch's cells take such inputs: its layers fail for their shapes."""
    if tensor.is_nested:
        return "a nested tensor (pad it, and pass lengths=)"
    return None if tensor.layout is torch.strided else f"layout {tensor.layout}"


def check_layout(cell: str, tensor: Tensor, name: str = "input") -> None:
    """RuntimeError unless a layer can take the tensor, by whichever backend."""
    layout = strange_layout(tensor)
    if layout is not None:
        raise RuntimeError(f"{cell}: expected {name} as a dense tensor, got {layout}")


def can_run_custom(input: Tensor) -> tuple[bool, str]:
    """Whether our op can compute a layer of this input, and why (not).

    Meta tensors count as supported: the op has a fake kernel.
    """
    if not ops.is_available():
        return False, str(ops.load_error())
    if input.dtype not in CUSTOM_DTYPES:
        return False, f"dtype {input.dtype} has no custom kernel (float32, float64, bfloat16 and float16 have)"
    layout = strange_layout(input)
    if layout is not None:
        return False, f"{layout} has no custom kernel"
    if input.is_cuda:
        if not ops.with_cuda():
            return False, f"the C++ library of rnn_ext was built without CUDA kernels; {_loader.remedy()}"
        problem = ops.cuda_problem(input.device.index or 0)
        if problem is not None:
            return False, problem
    elif not (input.is_cpu or input.is_meta):
        return False, f"device {input.device.type!r} has no custom kernel (cpu and cuda have)"
    # By its name, so that torch.distributed.tensor need not be imported to ask.
    if type(input) is not Tensor and type(input).__name__ == "DTensor":
        return False, "the op has no sharding strategy for a DTensor"
    return True, "the input's device and dtype have a custom kernel"


def check_quantized(input: Tensor) -> None:
    """RuntimeError unless layers of :mod:`rnn_ext.quantized` can compute this input."""
    supported, reason = can_run_custom(input)
    if supported and not (input.is_cpu or input.is_meta):
        supported, reason = False, f"expected it on the CPU, got {input.device}"
    if input.dtype not in QUANTIZED_DTYPES:
        supported, reason = False, f"expected float32, bfloat16 or float16, got {input.dtype}"
    if not supported:
        raise RuntimeError(f"quantized layers cannot compute this input: {reason}")


def can_run_custom_here(input: Tensor) -> tuple[bool, str]:
    """The same of a call at this moment, which may be one that is recorded."""
    supported, reason = can_run_custom(input)
    if supported and torch.jit.is_tracing():
        return False, "torch.jit.trace records torch's own operators only; 'auto' and 'native' use these"
    if supported and torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export():
        return False, "torch.onnx.export knows torch's own operators only; 'auto' and 'native' use these"
    return supported, reason


def use_custom(backend: str, input: Tensor, only_custom: bool = False) -> bool:
    """The rule of ``auto``: ours wherever it can run and has been measured to be worth it.

    On CUDA it has not been measured on any GPU: there torch's kernels run, unless `only_custom`: the call has options
    that they lack, or cannot do without waiting for the device (lengths). They also run under torch.jit.trace
    and torch.onnx.export, which know no op of ours.

    Raises:
        ValueError: unknown backend.
        RuntimeError: ``"custom"`` was asked for and cannot run this input.
    """
    if backend == "native":
        return False
    supported, reason = can_run_custom_here(input)
    if supported and (backend == "custom" or (backend == "auto" and (only_custom or not input.is_cuda))):
        return True
    if check_backend(backend) == "custom":
        raise RuntimeError(f"backend 'custom' cannot run this input: {reason}")
    return False


def strange_weights(weights: Iterable[Tensor]) -> str | None:
    """What those weights are of that only torch's kernels can take: sparse ones, those of per-sample gradients by
    torch.nn.utils, and those of a cell of no units, which torch.nn's may be."""
    for weight in weights:
        # By its name, as it has no attributes: of torch.nn.utils' per-sample gradients, which know torch's operators.
        if type(weight).__name__ == "ExpandedWeight":
            return "type ExpandedWeight"
        if weight.layout is not torch.strided:
            return f"layout {weight.layout}"
        if weight.shape[:1] == (0,):
            return f"size {list(weight.shape)}"
    return None


def backend_for(backend: str, weights: Iterable[Tensor]) -> str:
    """`backend`, or "native" where "auto" meets :func:`strange_weights`.

    Raises:
        RuntimeError: "custom" meets them.
    """
    if backend == "native":
        return backend
    strange = strange_weights(weights)
    if strange is not None and check_backend(backend) == "custom":
        raise RuntimeError(f"backend 'custom' cannot run weights of {strange}")
    return backend if strange is None else "native"


@dataclass(frozen=True)
class Explanation:
    """What a layer would run for an input, and why."""

    backend: str
    kernel: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend} ({self.kernel}): {self.reason}"


def explain(
    module: nn.Module,
    input: Tensor | PackedSequence,
    hx: object = None,
    *,
    lengths: Sequence[int] | Tensor | None = None,
    resets: Tensor | None = None,
    return_cell_states: bool = False,
) -> Explanation:
    """Say which backend and kernel the module would use if it were called so, without running it.

    Whether the shapes and dtypes of the arguments fit, only the call says.

    Raises:
        TypeError: `module` is not a layer of this package, or `input` neither a tensor nor a PackedSequence.
        ValueError, RuntimeError: its backend is unknown, or is ``"custom"`` and cannot run, as the call itself would.
    """
    quantized = getattr(module, "_has_8_bits", False)  # a layer of rnn_ext.quantized
    if not (quantized or _has_backend(module)):
        raise TypeError(f"explain expects an rnn_ext.RNN, LSTM, GRU or cell of these, got {type(module).__name__}")
    data = input.data if isinstance(input, PackedSequence) else input
    if not isinstance(data, Tensor):
        raise TypeError(f"explain: expected input as a tensor or a PackedSequence, got {type(input).__name__}")
    cell = module.mode.lower()
    if quantized:
        check_quantized(data)
        numbers = torch.int8 if module.activations == 8 else torch.int16
        kernel = f"rnn_ext::quantized_layer {cell}, {ops.cpu_capability(numbers)}"
        return Explanation("custom", kernel, "its weights have 8 bits, which native has no kernels for" + _lacks())
    if isinstance(module, nn.RNNBase):
        check_layout(cell, data)
    lacking = _options_native_lacks(module, resets=resets is not None, return_cell_states=return_cell_states)
    backend = backend_for(module.backend, module.parameters())
    custom = use_custom(backend, data, only_custom=bool(lacking) or lengths is not None)
    if backend != module.backend:
        reason = f"weights of {strange_weights(module.parameters())} have no custom kernel"
    elif module.backend != "auto":
        reason = f"backend={module.backend!r} was asked for"
    else:
        supported, reason = can_run_custom(data)
        if supported and not custom:
            reason = UNMEASURED
    if lacking:
        reason = f"{reason}; native would refuse it, which has no {' and no '.join(lacking)}"
    if custom and data.is_cuda:
        kernel, why = _cuda_kernel(module, cell, input)
        return Explanation("custom", f"rnn_ext::layer {cell}, cuda {kernel}", f"{reason}; {why}")
    if custom:
        return Explanation("custom", f"rnn_ext::layer {cell}, {ops.cpu_capability(data.dtype)}", reason + _lacks())
    return Explanation("native", f"torch.{cell}{'_cell' if isinstance(module, nn.RNNCellBase) else ''}", reason)


def _lacks() -> str:
    """What to say of a library that has no kernels for this processor's best instruction set."""
    missing = ops.missing_cpu_capability()
    return f"; this processor has {missing}, but the library was built without it (see doctor)" if missing else ""


def what_native_lacks(
    layer_norm: bool,
    zoneout: float | Sequence[float],
    recurrent_dropout: float,
    resets: bool = False,
    return_cell_states: bool = False,
) -> list[str]:
    """Names of those options that torch's kernels do not have, as far as they act."""
    acts = {
        "layer_norm": layer_norm,
        "zoneout": any(zoneout) if isinstance(zoneout, (tuple, list)) else zoneout,
        "recurrent_dropout": recurrent_dropout,
        "resets": resets,
        "return_cell_states": return_cell_states,
    }
    return [name for name, active in acts.items() if active]


def _options_native_lacks(module: nn.Module, **call: bool) -> list[str]:
    recurrent_dropout = module.training and getattr(module, "recurrent_dropout", 0)
    return what_native_lacks(
        getattr(module, "layer_norm", False), getattr(module, "zoneout", 0), recurrent_dropout, **call
    )


def _cuda_kernel(module: nn.Module, cell: str, input: Tensor | PackedSequence) -> tuple[str, str]:
    data, options = input, {}
    if isinstance(module, nn.RNNCellBase):
        length, batch = 1, 1 if input.dim() == 1 else input.shape[0]
    else:
        variant = 2 if module.layer_norm else 1 if _options_native_lacks(module) else 0  # as reference.variant_of
        options = {"bidirectional": module.bidirectional, "projected": module.proj_size > 0, "variant": variant}
        if isinstance(input, PackedSequence):
            data, length, batch = input.data, input.batch_sizes.numel(), int(input.batch_sizes[0])
        else:
            along = 1 if module.batch_first and input.dim() == 3 else 0
            length, batch = input.shape[along], 1 if input.dim() == 2 else input.shape[1 - along]
    options["device"] = data.device.index or 0
    question = (cell, data.dtype, length, batch, module.hidden_size)
    kernel, why = ops.cuda_kernel(*question, **options)
    after, why_after = ops.cuda_kernel(*question, backward=True, **options)
    return kernel, why if after == kernel else f"{why}; backward by {after}: {why_after}"


def set_backend(model: ModuleT, backend: str) -> ModuleT:
    """Switch every layer of this package inside `model` (itself included), at any time; returns `model`.

    Warns where there is none.

    Raises:
        TypeError: `model` is no module.
        ValueError: unknown backend; nothing is switched.
    """
    check_module(model)
    check_backend(backend)
    layers = [module for module in model.modules() if _has_backend(module)]
    for layer in layers:
        layer.backend = backend
    if not layers:
        what, how = "layer of rnn_ext", "rnn_ext.convert makes torch.nn's such"
        if any(getattr(module, "_has_8_bits", False) for module in model.modules()):
            what, how = "layer with a choice", "those of 8 bits have none, rnn_ext.dequantize makes floats of them"
        warnings.warn(f"no {what} in this {type(model).__name__}: {how}", stacklevel=2)
    return model


def _has_backend(module: nn.Module) -> bool:
    return isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and hasattr(module, "backend")


def native(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    num_layers: int,
    bidirectional: bool,
    dropout: float,
    training: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """All layers by torch's own kernels, called as :mod:`torch.nn` calls them: output, h_n and c_n (None unless lstm).

    Args:
        input: (L, N, I), (N, L, I) if batch_first, or (sum of lengths, I) with `batch_sizes`, int64 (L,) on the CPU.
        h_0, c_0: (num_layers * D, N, P or H) and (num_layers * D, N, H); None is zeros.
        weights: flat, as in :mod:`rnn_ext.functional`.

    Raises:
        RuntimeError: the features of `input` or the sequences of `h_0` are not as many as expected.
    """
    states = num_layers * (2 if bidirectional else 1)
    if batch_sizes is None:
        batch = input.shape[0 if batch_first else 1]
    else:  # a trace would take the number for one of all inputs
        batch = batch_sizes[0] if torch.jit.is_tracing() else int(batch_sizes[0])
    if h_0 is None:
        h_0 = input.new_zeros(states, batch, weights[1].shape[1])
    if cell == "lstm" and c_0 is None:
        c_0 = input.new_zeros(states, batch, ops.hidden_size(cell, weights))
    if input.shape[-1] != weights[0].shape[1]:
        raise RuntimeError(f"input.size(-1) must be {weights[0].shape[1]}, the input_size, got {list(input.shape)}")
    if h_0.shape[1] != batch:
        raise RuntimeError(f"Expected hx of {batch} sequences, got {list(h_0.shape)}")
    hx = (h_0, c_0) if cell == "lstm" else h_0
    options = (weights, len(weights) // states >= 4, num_layers, dropout, training, bidirectional)
    kernel = getattr(torch, cell)
    if torch.compiler.is_dynamo_compiling():
        # Break the graph here, as at torch.nn's layers: traced, these unroll or fail.
        kernel = torch.compiler.disable(kernel)
    if batch_sizes is not None:
        result = kernel(input, batch_sizes, hx, *options)
    else:
        result = kernel(input, hx, *options, batch_first)
    return result if cell == "lstm" else (*result, None)
