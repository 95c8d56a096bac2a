"""From torch.nn's layers to ours and back, inside any model."""

from __future__ import annotations

import warnings
from typing import TypeVar

from torch import nn

from rnn_ext import subclasses
from rnn_ext.backends import check_backend, check_module, warn_without
from rnn_ext.cells import GRUCell, LSTMCell, RNNCell
from rnn_ext.modules import GRU, LSTM, OPTIONS, RNN, Leaf

ModuleT = TypeVar("ModuleT", bound=nn.Module)

TO_CUSTOM = {
    nn.RNN: RNN,
    nn.LSTM: LSTM,
    nn.GRU: GRU,
    nn.RNNCell: RNNCell,
    nn.LSTMCell: LSTMCell,
    nn.GRUCell: GRUCell,
}
_LAYERS = (nn.RNNBase, nn.RNNCellBase, Leaf), "RNN, LSTM, GRU or cell of these"
TO_SUBCLASS = {native: getattr(subclasses, native.__name__) for native in TO_CUSTOM}
TO_NATIVE = {ours: native for table in (TO_CUSTOM, TO_SUBCLASS) for native, ours in table.items()}


def convert(model: ModuleT, backend: str = "auto", as_subclass: bool = False) -> ModuleT:
    """Make every nn.RNN, nn.LSTM, nn.GRU and cell of these in `model`, itself included, one of ours; in place.

    Each layer stays the object that it is and only changes its class, so that parameters, hooks, training flag, ties
    and every reference to it remain. Copy the model first (:func:`copy.deepcopy`) to keep the original.

    Subclasses (your own, and those that torch.nn.utils.parametrize and fully_shard make) are left alone, with a
    warning: what they override cannot be known. Convert before you parametrize or shard. So, with a warning, is a
    model without any such layer, one of torch.jit for instance.

    Args:
        model: any module.
        backend: of the converted layers: ``"auto"``, ``"custom"`` or ``"native"``.
        as_subclass: whether they stay an nn.RNN, LSTM and so on for ``isinstance``, which the code around them may ask
            for, and layers of rnn_ext become such; torch.compile breaks the graph at these layers, see
            :mod:`rnn_ext.subclasses`.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no module.
        ValueError: unknown backend; nothing is converted.
    """
    check_backend(backend)
    check_module(model)
    warn_without(model, *_LAYERS, "converted")
    classes = TO_CUSTOM
    if as_subclass:  # also those that are ours, which keep their options
        classes = TO_SUBCLASS | {ours: TO_SUBCLASS[native] for native, ours in TO_CUSTOM.items()}
    for module, kind in _change_class(model, classes):
        if kind in TO_CUSTOM:
            module.__dict__.pop("_flat_weights", None)  # ours is a property
            vars(module).update(module._added, backend=backend)
    return model


def to_native(model: ModuleT) -> ModuleT:
    """The reverse of :func:`convert`: all layers and cells of rnn_ext become torch.nn's; in place, returns `model`.

    For what reads the class of a layer: quantization, TorchScript; and what of ONNX export "auto" does not do. Warns as
    :func:`convert`.

    Raises:
        TypeError: `model` is no module.
        ValueError: a layer has an option that torch.nn lacks (`recompute` aside, which changes no result), or is one of
            :mod:`rnn_ext.quantized`; nothing is converted.
    """
    check_module(model)
    warn_without(model, *_LAYERS, "changed")
    for name, module in model.named_modules():
        if getattr(module, "_has_8_bits", False):
            raise ValueError(f"{name or 'model'} has weights of 8 bits, torch.nn has not: rnn_ext.dequantize first")
        if type(module) in TO_NATIVE and isinstance(module, nn.RNNBase):
            for option, value in module._options_in_use().items():
                if option != "recompute":
                    raise ValueError(f"{name or 'model'} has {option}={value!r}, torch.nn has not")
    for module, _ in _change_class(model, TO_NATIVE):
        del module.backend
        if isinstance(module, nn.RNNBase):
            for option in OPTIONS:
                del module.__dict__[option]
            module._init_flat_weights()
    return model


def _change_class(
    model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]
) -> list[tuple[nn.Module, type[nn.Module]]]:
    """The modules that are of another class now, and which they were of."""
    changed = []
    for name, module in model.named_modules():
        kind = type(module)
        if kind in classes:
            module.__class__ = classes[kind]
            changed.append((module, kind))
        elif isinstance(module, tuple(classes)) and kind not in TO_NATIVE:
            warnings.warn(f"{name or 'model'} is left as it is: {kind.__qualname__} is a subclass", stacklevel=3)
    return changed
