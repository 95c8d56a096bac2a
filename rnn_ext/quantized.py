"""Layers for inference whose weights are integers of 8 bits: what :func:`rnn_ext.quantize` makes of others.

Each row of a weight, one for each gate and unit, is rounded to 127 steps of a scale of its own, up to its largest
number. What is multiplied by weights, a timestep's inputs or h, is rounded to 16 bits (or 8, see quantize) with a scale
of its own for each timestep and sequence. The products are summed as integers, exactly; gates, cell states and h are
float32. So results depend neither on the batch around a sequence nor on the number of threads. One large feature makes
the steps of all others large: normalise inputs. Where none is as large as 1e-30, all count as zeros. Inf or NaN in the
inputs makes all gates of their timestep NaN.

This saves memory (units are stored by 16: little of a layer of 8) and time: large layers of few sequences wait for
their weights, and integers are multiplied faster. ``benchmarks/README.md`` has figures.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from rnn_ext import functional, modules, ops, reference, subclasses
from rnn_ext.backends import check_module, warn_without

__all__ = ["GRU", "LSTM", "RNN", "dequantize", "quantize"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_BLOCK = 16  # as kQuantizedBlock of csrc/cpu/quantized.h, where the layout is described
_STEPS = 127


def pack(weight: Tensor, gates: int, activations: int = 16) -> tuple[Tensor, Tensor]:
    """A weight (gates * units, depth) in 8 bits, in the layout of the kernel, and the scales of its rows, float32."""
    side = 32 // activations  # columns that lie side by side
    scale = weight.abs().amax(1).div(_STEPS) if weight.shape[1] else weight.new_zeros(len(weight))
    numbers = (weight / scale.where(scale > 0, 1).unsqueeze(1)).round().clamp(-_STEPS, _STEPS).to(torch.int8)
    numbers = numbers.unflatten(0, (gates, -1))
    units, depth = numbers.shape[1:]
    numbers = nn.functional.pad(numbers, (0, -depth % side, 0, -units % _BLOCK))
    numbers = numbers.reshape(gates, -(-units // _BLOCK), _BLOCK, -(-depth // side), side)
    return numbers.permute(1, 3, 0, 2, 4).flatten(2), scale


def unpack(numbers: Tensor, scale: Tensor, gates: int, depth: int) -> Tensor:
    """The reverse: the weight that the numbers stand for."""
    plain = numbers.unflatten(2, (gates, _BLOCK, -1)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return plain[:, : scale.numel() // gates, :depth].flatten(0, 1) * scale.unsqueeze(1)


class _Quantized(modules.Leaf):
    """What the three layers share. quantize() gives a layer this class."""

    _added: ClassVar[dict[str, Any]] = {}
    _has_8_bits: ClassVar[bool] = True  # asked for where this module cannot be imported
    _kind: ClassVar[str]
    mode: str
    input_size: int
    hidden_size: int
    proj_size: int
    num_layers: int
    bidirectional: bool
    batch_first: bool
    dropout: float
    activations: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(f"a quantized.{self._kind} is made of an rnn_ext.{self._kind} by rnn_ext.quantize")

    @property
    def _flat_weights(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._flat_weights_names]

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Scales and biases remain float32 in a model of 16 bits."""
        before = {name: self._buffers[name] for name in self._flat_weights_names if name in self._buffers}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            if self._buffers[name].dtype != tensor.dtype:
                self._buffers[name] = tensor.to(self._buffers[name].device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        """Refuse, in one sentence, what was not made of such a layer, which the shapes of tensors need not tell."""
        weight, sizes = (state_dict.get(f"{prefix}{name}") for name in ("weight_ih_l0", "sizes"))
        where = prefix.rstrip(".") or type(self).__name__
        own = _sizes(self, self.activations)
        found = own if sizes is None or sizes.is_meta else dict(zip(own, sizes.tolist(), strict=False))
        if weight is not None and weight.is_floating_point():
            errors.append(f"{where} has weights of 8 bits, the checkpoint has not: load it before rnn_ext.quantize")
        elif found != own:
            found, own = (", ".join(f"{key}={value}" for key, value in of.items()) for of in (found, own))
            errors.append(f"{where}: the checkpoint is of a layer with {found}; expected {own}")
        else:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def flatten_parameters(self) -> None:
        """For cuDNN: nothing to do."""

    def _run(
        self,
        input: Tensor | PackedSequence,
        h_0: Tensor | None,
        c_0: Tensor | None,
        lengths: Sequence[int] | Tensor | None,
        resets: Tensor | None,
        cell_states: bool = False,
    ) -> tuple[Tensor | PackedSequence, Tensor, Tensor | None, Tensor | PackedSequence | None]:
        self._check_not_traced(input, "forward")
        if torch.onnx.is_in_onnx_export():
            raise RuntimeError("torch.onnx.export knows no layers of 8 bits: export rnn_ext.dequantize(model)")
        data = input.data if isinstance(input, PackedSequence) else input
        has_features = isinstance(data, Tensor) and not data.is_nested and data.dim() > 0
        if has_features and data.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {data.shape[-1]}"
            )
        return functional.recurrent(
            self.mode.lower(),
            input,
            h_0,
            c_0,
            self._flat_weights,
            self.num_layers,
            self.bidirectional,
            self.batch_first,
            quantized=True,
            lengths=lengths,
            resets=resets,
            cell_states=cell_states,
        )

    def step(self, input: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """One timestep of the whole stack, see :meth:`rnn_ext.RNN.step`."""
        self._check_step(input)
        along = 1 if self.batch_first and input.dim() == 2 else 0
        output, state = self.forward(input.unsqueeze(along), state)
        return output.squeeze(along), state

    def dequantized(self) -> nn.RNNBase:
        """A layer of rnn_ext with the rounded weights, float32 on the CPU: to export, or to train further."""
        options = {"proj_size": self.proj_size} if self.proj_size else {}
        if self.mode.startswith("RNN"):
            options["nonlinearity"] = self.nonlinearity
        layer = getattr(modules, self._kind)(
            self.input_size,
            self.hidden_size,
            self.num_layers,
            bias=self.bias,
            batch_first=self.batch_first,
            dropout=self.dropout if self.num_layers > 1 else 0.0,  # or torch warns
            bidirectional=self.bidirectional,
            device="cpu",
            dtype=torch.float32,
            **options,
        ).train(self.training)
        values = {name: getattr(self, name).cpu() for name in self._flat_weights_names}
        for suffix in _suffixes(self):
            names = (f"{name}{suffix}" for name in ("scale_ih", "scale_hh", "bias_ih", "bias_hh"))
            values |= zip(names, values[f"factors{suffix}"].flatten(1), strict=True)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                value = values[name]
                if name.startswith("weight"):
                    gates = 1 if name.startswith("weight_hr") else reference.CELLS[self.mode.lower()].gates
                    value = unpack(value, values["scale" + name.removeprefix("weight")], gates, parameter.shape[1])
                parameter.copy_(value)
        return layer

    def __prepare_scriptable__(self) -> nn.Module:
        kind = self._kind
        raise RuntimeError(
            f"torch.jit.script cannot compile a quantized.{kind}: trace it, or script to_native(dequantize(model))"
        )

    def extra_repr(self) -> str:
        return f"{nn.RNNBase.extra_repr(self)}, activations={self.activations}"


class _OneState(_Quantized):
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Sequence[int] | Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Output and h_n, shaped as torch.nn's, see :mod:`rnn_ext.functional`; on the CPU, `input` of float32, bfloat16
        or float16, and results like it, also under autocast."""
        if not torch.compiler.is_compiling():
            results = ops.quantized_forward(self.__dict__, input, hx, lengths, resets, False)
            if results is not None:
                return results
        return self._run(input, hx, None, lengths, resets)[:2]


class RNN(_OneState):
    """An :class:`rnn_ext.RNN` for inference with weights of 8 bits; of such a layer or a :class:`torch.nn.RNN`."""

    _kind = "RNN"


class GRU(_OneState):
    """An :class:`rnn_ext.GRU` for inference with weights of 8 bits; of such a layer or a :class:`torch.nn.GRU`."""

    _kind = "GRU"


class LSTM(_Quantized):
    """An :class:`rnn_ext.LSTM` for inference with weights of 8 bits; of such a layer or a :class:`torch.nn.LSTM`."""

    _kind = "LSTM"

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Sequence[int] | Tensor | None = None,
        resets: Tensor | None = None,
        return_cell_states: bool = False,
    ) -> (
        tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]
        | tuple[Tensor | PackedSequence, tuple[Tensor, Tensor], Tensor | PackedSequence]
    ):
        """Output, ``(h_n, c_n)`` and, if asked for, the cell states, shaped as torch.nn's, see
        :mod:`rnn_ext.functional`; on the CPU, `input` of float32, bfloat16 or float16, and results like it, also under
        autocast."""
        if not torch.compiler.is_compiling():
            results = ops.quantized_forward(self.__dict__, input, hx, lengths, resets, return_cell_states)
            if results is not None:
                return results
        output, h_n, c_n, cells = self._run(input, *functional.split_state(hx), lengths, resets, return_cell_states)
        return (output, (h_n, c_n), cells) if return_cell_states else (output, (h_n, c_n))


OURS: dict[type[nn.Module], type[_Quantized]] = {
    getattr(of, ours._kind): ours for ours in (RNN, GRU, LSTM) for of in (nn, modules, subclasses)
}


def quantize(model: ModuleT, activations: int = 16) -> ModuleT:
    """Make every RNN, LSTM and GRU of torch.nn and rnn_ext in `model`, itself included, one of this module; in place.

    For inference on the CPU: the layers have no gradients, and no parameters but buffers, of which the weights are int8
    (make initial states by ``input.new_zeros``). Call the model under ``torch.no_grad()``, also when torch.compile
    compiles it. Each layer stays the object that it is and only changes its class. Copy the model first
    (:func:`copy.deepcopy`) to keep the original; :func:`dequantize` makes float32 layers with the rounded weights. What
    else is in the model, cells included, stays; dropout, which acts in training, does not act any more.

    To load a checkpoint of quantized layers, build the model, quantize it with the same `activations`, on the meta
    device if you like (``load_state_dict(.., assign=True)``), and load.

    Args:
        model: any module.
        activations: bits that inputs and h are rounded to, 16 or 8. With 8 the error is about twice as large, and a
            call takes a half to nine tenths of the time, if the processor multiplies bytes (AVX512_VNNI, AVX-VNNI, the
            dot products of aarch64).

    Subclasses of those layers are left alone, with a warning, as by :func:`rnn_ext.convert`; so are layers that torch
    has parametrized.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no module.
        ValueError: `activations` is neither 16 nor 8, or another than a layer has already; a layer has layer
            normalisation or zoneout, or weights that are not finite or not there; nothing is quantized.
    """
    check_module(model)
    if isinstance(activations, float) or activations not in (8, 16):
        raise ValueError(f"activations must be 16 or 8 bits, got {activations!r}")
    layers = [(name or "model", module) for name, module in model.named_modules()]
    for name, module in layers:
        if isinstance(module, _Quantized) and module.activations != activations:
            raise ValueError(f"{name} is quantized with activations={module.activations} already, got {activations}")
    found = [(name, module) for name, module in layers if type(module) in OURS]
    with torch.inference_mode(False):  # in inference mode there would be buffers that nothing can be loaded into
        buffers = [_buffers(module, name, int(activations)) for name, module in found]
    for name, module in layers:
        if isinstance(module, nn.RNNBase) and type(module) not in OURS:
            why = f"{type(module).__qualname__} is a subclass"
            if parametrize.is_parametrized(module):
                why = "remove its parametrizations first"
            warnings.warn(f"{name} is left as it is: {why}", stacklevel=2)
    warn_without(model, (nn.RNNBase, _Quantized), "RNN, LSTM or GRU", "quantized")
    for (_, module), own in zip(found, buffers, strict=True):
        for key in module._flat_weights_names:
            del module._parameters[key]
        module.__class__ = OURS[type(module)]
        module.activations = int(activations)
        for attribute in _OF_FLOATS:
            vars(module).pop(attribute, None)
        module._flat_weights_names = [key for key in own if key != "sizes"]
        for key, tensor in own.items():
            module.register_buffer(key, tensor)
    return model


def dequantize(model: ModuleT) -> ModuleT:
    """The reverse of :func:`quantize`: every quantized layer in `model`, itself included, becomes one of rnn_ext; in
    place, returns `model`.

    The layers have the rounded weights, float32 on the CPU, and can be trained, exported, or handed to
    :func:`rnn_ext.to_native`. Options that are for training alone, `dropout` aside, `backend` and whether weights
    require gradients are as of a new layer. Warns where there is no layer at all.

    Raises:
        TypeError: `model` is no module.
    """
    check_module(model)
    warn_without(model, (nn.RNNBase, _Quantized), "RNN, LSTM or GRU", "dequantized")
    for module in model.modules():
        if not isinstance(module, _Quantized):
            continue
        layer = module.dequantized()
        for key in (*module._flat_weights_names, "sizes"):
            del module._buffers[key]
        module.__class__ = type(layer)
        module._parameters.update(layer._parameters)
        del module.activations
        for attribute in ("_flat_weights_names", *_OF_FLOATS):
            if attribute in vars(layer):
                vars(module)[attribute] = vars(layer)[attribute]
    return model


# Attributes of a layer that a quantized one has no use for.
_OF_FLOATS = ("_flat_weights", "_flat_weight_refs", "_all_weights", "backend", *modules.OPTIONS)


def _sizes(layer: nn.Module, activations: int) -> dict[str, int]:
    sizes = ("input_size", "hidden_size", "proj_size", "bias")
    return {"activations": activations} | {name: int(getattr(layer, name)) for name in sizes}


def _suffixes(layer: nn.Module) -> list[str]:
    """Of the names of weights, in the order of :mod:`rnn_ext.functional`."""
    directions = ("", "_reverse") if layer.bidirectional else ("",)
    return [f"_l{k}{direction}" for k in range(layer.num_layers) for direction in directions]


def _buffers(layer: nn.RNNBase, name: str, activations: int) -> dict[str, Tensor]:
    """What the op takes for the weights of a layer, in its order; ValueError with the layer's name where it cannot."""
    for option in ("layer_norm", "zoneout"):
        if modules.acts(getattr(layer, option, 0)):
            raise ValueError(f"{name} has {option}={getattr(layer, option)!r}, which quantized layers have not")
    parameters = dict(layer.named_parameters())

    def find(key: str) -> Tensor:
        weight = parameters.get(key)
        if weight is None:
            raise ValueError(
                f"{name}.{key} is no parameter: remove what computes it first, weight_norm or pruning for instance"
            )
        problem = None
        if not weight.is_floating_point():
            problem = f"of {weight.dtype}"
        elif not weight.is_meta and not weight.detach().float().isfinite().all():
            problem = "with inf or NaN in it, or what is such in float32"
        if problem:
            raise ValueError(f"{name}.{key} cannot be quantized: expected finite numbers, got a weight {problem}")
        return weight.detach().float()

    gates = reference.CELLS[layer.mode.lower()].gates
    buffers = {}
    for suffix in _suffixes(layer):
        weight_ih, scale_ih = pack(find(f"weight_ih{suffix}"), gates, activations)
        weight_hh, scale_hh = pack(find(f"weight_hh{suffix}"), gates, activations)
        no_bias = torch.zeros_like(scale_ih)
        biases = [find(f"bias_{part}{suffix}") if layer.bias else no_bias for part in ("ih", "hh")]
        buffers[f"weight_ih{suffix}"] = weight_ih
        buffers[f"weight_hh{suffix}"] = weight_hh
        buffers[f"factors{suffix}"] = torch.stack([scale_ih, scale_hh, *biases]).unflatten(1, (gates, -1))
        if layer.proj_size:
            weight_hr, scale_hr = pack(find(f"weight_hr{suffix}"), 1, activations)
            buffers |= {f"weight_hr{suffix}": weight_hr, f"scale_hr{suffix}": scale_hr}
    buffers["sizes"] = torch.tensor(list(_sizes(layer, activations).values()), device="cpu")
    return buffers
