"""The layers without a module: all timesteps, directions and layers of a tanh/relu RNN, a GRU or an LSTM as a function.

The four functions take the same options:

- `num_layers` (int, 1): layers stacked on each other.
- `bidirectional` (bool, False): whether D is 2, a second direction reading each sequence from its end, or 1.
- `batch_first` (bool, False): the layout of `input`, `output` and `resets`; states are always (..., N, features).
- `dropout` (float, 0.0) and `training` (bool, False): in training, the probability of zeroing an output of any layer
  but the last.
- `lengths` ((N,) list, tuple, range, or array or tensor of any integer dtype, None): row n is a sequence of
  ``lengths[n]`` timesteps, 0 to L, in any order: as if packed, with zeros in `output` past each end. `output` has L
  timesteps even if no row has (``pad_packed_sequence`` gives as many as the longest row has). A row of length 0 keeps
  its state. `dropout` between layers draws other masks than for a PackedSequence. Not for a PackedSequence.
- `resets` (bool (L, N), or (N, L) if batch_first, (L,) if unbatched, None): timesteps at which an independent sequence
  begins: the state before it is zero, in both directions. Not for a PackedSequence; custom backend only.
- `recompute` (bool, False): keep only `input` and the initial states for backward, which then runs forward once more.
  Saves memory and changes nothing else; the native backend, which cannot, runs as ever. Figures: :class:`rnn_ext.RNN`.
- `weight_dropout` (float, 0.0): in training, the probability of zeroing an element of weight_hh, the rest is scaled by
  1 / (1 - p) (DropConnect; Merity, Keskar and Socher 2018). One mask per call; `weights` stay as they are.
- `recurrent_dropout` (float, 0.0): in training, the probability of zeroing an element of h_{t-1} where it enters
  ``W_hh h``, the rest is scaled by 1 / (1 - p). One mask for all timesteps of a sequence (variational dropout; Gal and
  Ghahramani 2016), its own for each layer and direction. Custom backend only.
- `zoneout` (float, 0.0; lstm: also a pair, of h and of c): in training, the probability of an element of the state to
  stay what it was before the timestep; else its share, ``p h_{t-1} + (1 - p) h_t`` (Krueger et al. 2017). The cell's h
  is computed from c before zoneout. Custom backend only.
- `backend` (``"auto"``, ``"custom"`` or ``"native"``): see :mod:`rnn_ext.backends`.

`weights` is flat, without layer normalisation in the order of ``module.parameters()``: for each layer, for each
direction, weight_ih (G*H, I), weight_hh (G*H, P or H), then bias_ih and bias_hh (G*H,) if there are biases, then
weight_hr (P, H) if the LSTM is projected, then weight_norm_ih, weight_norm_hh (G*H,), weight_norm_c and bias_norm_c
(H,) if it has layer normalisation, see :class:`rnn_ext.LSTM`. G is 1 for an RNN, 3 for a GRU, 4 for an LSTM. All
tensors have the same dtype, float32, float64, bfloat16 or float16 (native: whatever torch supports), and are on the
same device.

They raise

- ValueError: number of dimensions or dtype of `input`; values or shape of `lengths`, shape of `resets`; number of
  `weights`; `num_layers` below 1; `dropout` outside [0, 1], another probability outside [0, 1); an unknown backend, or
  an option that the backend cannot run.
- TypeError: `lengths` that are not integers, `resets` that are not bool, a probability that is no number, `recompute`
  or `return_cell_states` that is not bool.
- RuntimeError: `input`, `lengths` or `resets` that are sparse or nested, a nested state; a tensor whose memory has been
  freed; any other mismatch of sizes, dtypes or devices; backend ``"custom"`` where it cannot run.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from typing_extensions import Unpack

from rnn_ext import backends, ops

__all__ = ["gru", "lstm", "rnn_relu", "rnn_tanh"]


class Options(TypedDict, total=False):
    num_layers: int
    bidirectional: bool
    batch_first: bool
    dropout: float
    training: bool
    lengths: Sequence[int] | Tensor | None
    resets: Tensor | None
    recompute: bool
    zoneout: float | tuple[float, float]
    recurrent_dropout: float
    weight_dropout: float
    backend: str


class Extras(NamedTuple):
    """What torch.nn's layers do not have and that is the same for every layer of a stack."""

    recompute: bool = False
    zoneout: tuple[float, float] = (0.0, 0.0)  # of h and of c
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0


NO_EXTRAS = Extras()


class Call(NamedTuple):
    """What a call is told besides its tensors."""

    cell: str
    num_layers: int
    bidirectional: bool
    batch_first: bool  # of padded batches only
    dropout: float
    training: bool
    backend: str
    cell_states: bool
    extras: Extras
    quantized: bool  # the weights are those of :mod:`rnn_ext.quantized`


def check_extras(
    cell: str,
    recompute: bool,
    zoneout: float | tuple[float, float],
    recurrent_dropout: float,
    weight_dropout: float,
) -> Extras:
    """The options, checked: TypeError or ValueError with the name of the wrong one."""
    if not isinstance(recompute, bool):
        raise TypeError(f"recompute must be a bool, got {recompute!r}")
    pair = zoneout if isinstance(zoneout, (tuple, list)) else (zoneout, zoneout if cell == "lstm" else 0.0)
    if len(pair) != 2 or (pair is zoneout and cell != "lstm"):
        expected = "a number or a pair of numbers" if cell == "lstm" else "a number"
        raise TypeError(f"zoneout must be {expected}, got {zoneout!r}")
    for name, value in (
        ("zoneout", pair[0]),
        ("zoneout", pair[1]),
        ("recurrent_dropout", recurrent_dropout),
        ("weight_dropout", weight_dropout),
    ):
        _check_number(name, value)
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be a probability in [0, 1), got {value!r}")
    return Extras(recompute, (float(pair[0]), float(pair[1])), float(recurrent_dropout), float(weight_dropout))


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {value!r}")


def rnn_tanh(
    input: Tensor | PackedSequence, hx: Tensor | None, weights: Sequence[Tensor], **options: Unpack[Options]
) -> tuple[Tensor | PackedSequence, Tensor]:
    """Elman RNN, ``h' = tanh(W_ih x + b_ih + W_hh h + b_hh)``, as documented for :class:`torch.nn.RNN`.

    Args:
        input: (L, N, I), (N, L, I) if batch_first, (L, I) unbatched, or a PackedSequence.
        hx: initial state (num_layers * D, N, H), (num_layers * D, H) unbatched; None is zero.
        weights: flat, see the module's docstring.
        options: see the module's docstring, which lists the errors too.

    Returns:
        output, like `input` with D * H features, and h_n, like `hx`.
    """
    return recurrent("rnn_tanh", input, hx, None, weights, **options)[:2]


def rnn_relu(
    input: Tensor | PackedSequence, hx: Tensor | None, weights: Sequence[Tensor], **options: Unpack[Options]
) -> tuple[Tensor | PackedSequence, Tensor]:
    """Elman RNN with relu in place of tanh; arguments and results of :func:`rnn_tanh`."""
    return recurrent("rnn_relu", input, hx, None, weights, **options)[:2]


def gru(
    input: Tensor | PackedSequence, hx: Tensor | None, weights: Sequence[Tensor], **options: Unpack[Options]
) -> tuple[Tensor | PackedSequence, Tensor]:
    """Gated recurrent unit as documented for :class:`torch.nn.GRU`; arguments and results of :func:`rnn_tanh`."""
    return recurrent("gru", input, hx, None, weights, **options)[:2]


def lstm(
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    return_cell_states: bool = False,
    **options: Unpack[Options],
) -> (
    tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]
    | tuple[Tensor | PackedSequence, tuple[Tensor, Tensor], Tensor | PackedSequence]
):
    """Long short-term memory as documented for :class:`torch.nn.LSTM`, projected if weight_hr are given.

    Args:
        input: as in :func:`rnn_tanh`.
        hx: ``(h_0, c_0)``, (num_layers * D, N, P or H) and (num_layers * D, N, H), without N if unbatched; or None.
        weights: flat, see the module's docstring.
        return_cell_states: return the last layer's cell state at every timestep too. Custom backend only.
        options: see the module's docstring, which lists the errors too.

    Returns:
        output, like `input` with D * (P or H) features, ``(h_n, c_n)``, like `hx`, and if asked for the cell states,
        like `input` with D * H features.
    """
    h_0, c_0 = split_state(hx)
    output, h_n, c_n, cells = recurrent("lstm", input, h_0, c_0, weights, cell_states=return_cell_states, **options)
    return (output, (h_n, c_n), cells) if return_cell_states else (output, (h_n, c_n))


def split_state(hx: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    """``(h_0, c_0)`` of an LSTM's `hx`."""
    if hx is None:
        return None, None
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        found = type(hx).__name__
        if isinstance(hx, Tensor):
            found = f"a tensor of size {list(hx.shape)}"
        elif isinstance(hx, (tuple, list)):
            found += f" of {len(hx)}"
        raise RuntimeError(f"LSTM: expected hx to be the two states (h_0, c_0), got {found}")
    return hx[0], hx[1]


def recurrent(
    cell: str,
    input: Tensor | PackedSequence,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    backend: str = "auto",
    lengths: Sequence[int] | Tensor | None = None,
    resets: Tensor | None = None,
    cell_states: bool = False,
    recompute: bool = False,
    zoneout: float | tuple[float, float] = 0.0,
    recurrent_dropout: float = 0.0,
    weight_dropout: float = 0.0,
    quantized: bool = False,
) -> tuple[Tensor | PackedSequence, Tensor, Tensor | None, Tensor | PackedSequence | None]:
    """Any cell, input in any layout: output, h_n, c_n (None unless lstm), cells (None unless asked for)."""
    h_0, c_0 = dense_state(cell, "h_0", h_0), dense_state(cell, "c_0", c_0)
    packed = isinstance(input, PackedSequence)
    if not packed and not hasattr(input, "dim"):
        raise TypeError(f"{cell}: expected input as a tensor or a PackedSequence, got {type(input).__name__}")
    if isinstance(weights, Tensor) or not hasattr(weights, "__len__"):
        raise TypeError(f"{cell}: expected weights as a list of tensors, got {type(weights).__name__}")
    if not isinstance(cell_states, bool):
        raise TypeError(f"return_cell_states must be a bool, got {cell_states!r}")
    if not quantized:
        backends.check_layout(cell, input.data if packed else input)
    extras = NO_EXTRAS
    if recompute is not False or zoneout != 0 or recurrent_dropout != 0 or weight_dropout != 0:
        extras = check_extras(cell, recompute, zoneout, recurrent_dropout, weight_dropout)
    dim = 1 if packed else input.dim()
    batch_first = batch_first and dim == 3
    call = Call(
        cell, num_layers, bidirectional, batch_first, dropout, training, backend, cell_states, extras, quantized
    )
    if packed:
        if lengths is not None or resets is not None:
            raise ValueError("lengths and resets are for padded input, got a PackedSequence, which has its own lengths")
        return _packed(call, input, h_0, c_0, weights)
    if dim == 3:
        return _layers(call, input, h_0, c_0, weights, None, lengths, resets)
    if dim == 2:
        return _unbatched(call, input, h_0, c_0, weights, lengths, resets)
    raise ValueError(f"{cell}: Expected input to be 2D or 3D, got {dim}D instead: {list(input.shape)}")


def dense_state(cell: str, name: str, state: Any) -> Tensor | None:
    """A state as the kernels take it; TypeError if it is no tensor, RuntimeError if it is a nested one."""
    if state is None:
        return None
    if not hasattr(state, "dim"):
        raise TypeError(f"{cell}: expected {name} as a tensor, got {type(state).__name__}")
    if state.is_nested:
        backends.check_layout(cell, state, name)
    return state if state.layout is torch.strided else state.to_dense()


def step(
    cell: str,
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    num_layers: int,
    dropout: float,
    training: bool,
    backend: str,
    zoneout: float | tuple[float, float] = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One timestep of any cell, in one direction: `input` is (N, I) or (I,); output, h_n, c_n (None unless lstm)."""
    h_0, c_0 = dense_state(cell, "h_0", h_0), dense_state(cell, "c_0", c_0)
    if ops.is_cast(input) and backends.use_custom(backend, input):
        options = (num_layers, dropout, training, backend, zoneout)
        with torch.autocast("cpu", enabled=False):
            input, h_0, c_0, *weights = ops.uncast(weights[0], input, h_0, c_0, *weights)
            return step(cell, input, h_0, c_0, weights, *options)
    there = all(weight is not None for weight in weights)
    plain = num_layers == 1 and not zoneout and input.dim() == 2 and there
    if plain and input.dtype == weights[0].dtype and backends.use_custom(backends.backend_for(backend, weights), input):
        output, h_n, c_n, _ = ops.layer(input.unsqueeze(0), h_0, c_0, weights, cell=cell)
        return output.squeeze(0), h_n, c_n if cell == "lstm" else None
    stack = (num_layers, False, False, dropout, training)
    output, h_n, c_n, _ = recurrent(cell, input.unsqueeze(0), h_0, c_0, weights, *stack, backend, zoneout=zoneout)
    return output.squeeze(0), h_n, c_n


def _unbatched(
    call: Call,
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    lengths: Sequence[int] | Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    for state in (h_0, c_0):
        if state is not None and state.dim() != 2:
            raise RuntimeError(f"For unbatched 2-D input, hx should also be 2-D but got {list(state.shape)}")
    if resets is not None:
        _check_resets(resets, input.shape[:1])
        resets = resets.unsqueeze(1)
    h_0, c_0 = map_present(lambda state: state.unsqueeze(1), h_0, c_0)
    results = _layers(call, input.unsqueeze(1), h_0, c_0, weights, None, lengths, resets)
    return map_present(lambda tensor: tensor.squeeze(1), *results)


def _packed(
    call: Call,
    input: PackedSequence,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
) -> tuple[PackedSequence, Tensor, Tensor | None, PackedSequence | None]:
    """States come and go in the order that the sequences had before they were sorted by length."""
    data, batch_sizes, order, inverse = input
    if data.dim() != 2:
        raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}: {list(data.shape)}")
    if order is not None:
        for state in (h_0, c_0):
            if state is not None and state.shape[1:2] != order.shape:
                raise RuntimeError(f"Expected hx to have {order.shape[0]} sequences in dim 1, got {list(state.shape)}")
        h_0, c_0 = map_present(lambda state: state.index_select(1, order), h_0, c_0)
    output, h_n, c_n, cells = _layers(call, data, h_0, c_0, weights, batch_sizes, None, None)
    if inverse is not None:
        h_n, c_n = map_present(lambda state: state.index_select(1, inverse), h_n, c_n)
    output, cells = map_present(lambda tensor: PackedSequence(tensor, batch_sizes, order, inverse), output, cells)
    return output, h_n, c_n, cells


def map_present(function: Callable[[Tensor], Any], *tensors: Tensor | None) -> tuple:
    """Of each tensor that is there; None of the others."""
    return tuple([None if tensor is None else function(tensor) for tensor in tensors])


def _layers(
    call: Call,
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Sequence[int] | Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Padded (L, N, I) or (N, L, I), or packed (sum of lengths, I): check, choose the backend, run.

    Checked here is what has an exception of its own in torch.nn. The op checks the sizes, dtypes and devices of its
    layer, which would cost a streaming call a microsecond to do twice.
    """
    extras = call.extras
    if not call.quantized:  # or they were checked when they were made
        _check_weights(call, input, weights)
    _check_number("dropout", call.dropout)
    if not 0 <= call.dropout <= 1:
        raise ValueError(f"dropout must be a probability in [0, 1], got {call.dropout!r}")
    if h_0 is not None and h_0.dim() != 3:
        raise RuntimeError(f"For batched 3-D input, hx should also be 3-D but got {list(h_0.shape)}")
    if lengths is not None:
        lengths = _check_lengths(lengths, input, call.batch_first)
    if resets is not None:
        _check_resets(resets, input.shape[:2])
    if call.quantized:
        return _quantized(call, input, h_0, c_0, weights, batch_sizes, lengths, resets)
    count = len(weights) // (call.num_layers * 2 if call.bidirectional else call.num_layers)
    if call.training and extras.weight_dropout:
        p = extras.weight_dropout
        weights = [w * _dropout_mask(w.shape, p, w).to(w.dtype) if i % count == 1 else w for i, w in enumerate(weights)]
    only_custom = lengths is not None or resets is not None or call.cell_states or count > 5
    if extras is not NO_EXTRAS:  # of which torch's kernels do with recompute and weight_dropout
        only_custom = only_custom or any(extras.zoneout) or (call.training and extras.recurrent_dropout > 0)
    backend = backends.backend_for(call.backend, weights)
    run = _custom if backends.use_custom(backend, input, only_custom) else _native
    return run(call, input, h_0, c_0, weights, batch_sizes, lengths, resets)


def _check_weights(call: Call, input: Tensor, weights: Sequence[Tensor]) -> None:
    if call.num_layers < 1:
        raise ValueError(f"num_layers must be greater than zero, got {call.num_layers}")
    states = call.num_layers * 2 if call.bidirectional else call.num_layers
    count, rest = divmod(len(weights), states)
    if rest or not 2 <= count <= (9 if call.cell == "lstm" else 5):
        raise ValueError(
            f"Expected 2 to 5 weights for each of {states} layers and directions"
            f"{' (6 to 9 with layer normalisation)' if call.cell == 'lstm' else ''}, got {len(weights)} in all"
        )
    for i, weight in enumerate(weights):
        if not isinstance(weight, Tensor):
            found = type(weight).__name__ if weight is not None else None
            raise ValueError(f"Expected a tensor for each weight, got {found} for number {i} of {len(weights)}")
    weight_ih = weights[0]
    if len(weight_ih.shape) != 2 or len(weights[1].shape) != 2:
        sizes = f"{list(weight_ih.shape)} and {list(weights[1].shape)}"
        raise RuntimeError(f"Expected two-dimensional weight_ih and weight_hh, got sizes {sizes}")
    if input.dtype != weight_ih.dtype and (input.is_meta or not torch.is_autocast_enabled(input.device.type)):
        or_model = f", or convert model: model.to({input.dtype})" if input.dtype.is_floating_point else ""
        raise ValueError(
            f"{call.cell} input dtype ({input.dtype}) does not match weight dtype ({weight_ih.dtype}). "
            f"Convert input: input.to({weight_ih.dtype}){or_model}"
        )


def _check_states(
    call: Call,
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    out: int,
    hidden: int,
    batch_sizes: Tensor | None,
) -> None:
    """The sizes of the states of a whole stack, of `out` and of `hidden` features."""
    states = call.num_layers * 2 if call.bidirectional else call.num_layers
    for name, state, features in (("h_0", h_0, out), ("c_0", c_0, hidden)):
        if state is None:
            continue
        # Of a packed input only the backend knows N.
        of = state if batch_sizes is not None else input
        batch = of.shape[:1] if call.batch_first else of.shape[1:2]
        if state.shape != (states, *batch, features):
            raise RuntimeError(f"Expected {name} of size {[states, *batch, features]}, got {list(state.shape)}")


def _check_length(value: int, i: int, length: int) -> None:
    """In the words that csrc/ops has for a tensor's."""
    if not 0 <= value <= length:
        raise ValueError(f"expected lengths between 0 and {length}, got {value} for batch entry {i}")


def _check_lengths(lengths: Sequence[int] | Tensor, input: Tensor, batch_first: bool) -> Tensor:
    """int64 on the input's device. Values of a tensor are for the backend to check: they may still be on their way."""
    batch, length = input.shape[:2] if batch_first else (input.shape[1], input.shape[0])
    if hasattr(lengths, "__array__") and not isinstance(lengths, Tensor):
        array = lengths.__array__()
        try:
            lengths = torch.as_tensor(array.copy(), device="cpu")  # it may change before backward
        except TypeError:
            raise TypeError(f"lengths must be integers, got an array of {array.dtype}") from None
    if isinstance(lengths, Tensor):
        if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
            raise TypeError(f"lengths must be integers, got a tensor of {lengths.dtype}")
        backends.check_layout("lengths", lengths, "them")
        if lengths.is_meta and not input.is_meta:
            raise ValueError(f"lengths are on meta, without values, and input is on {input.device}")
    elif isinstance(lengths, (list, tuple, range)):
        for i, value in enumerate(lengths):
            # First what torch.compile and torch.export ask no hasattr of: a number that varies.
            if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
                _check_length(value, i, length)
            elif isinstance(value, bool) or not hasattr(value, "__index__"):
                raise TypeError(f"lengths must be integers, got {value!r}")
            else:
                try:
                    value = operator.index(value)
                except TypeError:  # of a tensor or an array that holds something else
                    raise TypeError(f"lengths must be integers, got {value!r}") from None
                _check_length(value, i, length)
        lengths = torch.tensor(lengths, dtype=torch.int64, device="cpu")  # whatever torch's default device
    else:
        raise TypeError(
            f"lengths must be a list, a tuple, a range, an array or a tensor of integers, got {type(lengths).__name__}"
        )
    if lengths.shape != (batch,):
        raise ValueError(f"Expected lengths of shape ({batch},), one for each sequence, got {list(lengths.shape)}")
    if input.is_cuda and lengths.is_cpu and not torch.compiler.is_compiling():  # the last chance without waiting
        for i, value in enumerate(lengths.tolist()):
            _check_length(value, i, length)
        # A copy from pageable memory is taken at once and does not wait for what the device has to do.
        return lengths.to(input.device, torch.int64, non_blocking=not lengths.is_pinned())
    return lengths.to(input.device, torch.int64)


def _check_resets(resets: Tensor, expected: tuple[int, ...]) -> None:
    if not isinstance(resets, Tensor) or resets.dtype != torch.bool:
        what = f"one of {resets.dtype}" if isinstance(resets, Tensor) else type(resets).__name__
        raise TypeError(f"resets must be a tensor of torch.bool, got {what}")
    backends.check_layout("resets", resets, "them")
    if resets.shape != expected:
        raise ValueError(f"Expected resets of shape {list(expected)}, as the timesteps, got {list(resets.shape)}")


def _custom(
    call: Call,
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One op for each layer, or one call for a stack without dropout and extras.

    States are in torch's order: layer 0 forward, layer 0 reverse, layer 1 forward, ...
    """
    cell, num_layers, bidirectional, batch_first, dropout, training, _, cell_states, extras, _ = call
    sequence = (batch_sizes, lengths, resets)

    def layer(input: Tensor, h_0: Tensor | None, c_0: Tensor | None, weights: Sequence[Tensor], cells: bool) -> tuple:
        more = () if extras is NO_EXTRAS else (_masks(call, input, h_0, weights, batch_sizes), extras.recompute)
        return ops.layer(input, h_0, c_0, weights, cell, *sequence, bidirectional, batch_first, cells, *more)

    if num_layers == 1:
        return _one_after_another(call, layer, input, h_0, c_0, weights)

    if extras is NO_EXTRAS and not (training and dropout > 0):
        layout = (bidirectional, batch_first)
        results = ops.stack(input, h_0, c_0, weights, cell, num_layers, *sequence, *layout, cell_states)
        if results is not None:
            output, h_n, c_n, cells = results
            return output, h_n, c_n if cell == "lstm" else None, cells if cell_states else None
    _check_states(call, input, h_0, c_0, weights[1].shape[1], ops.hidden_size(cell, weights), batch_sizes)
    return _one_after_another(call, layer, input, h_0, c_0, weights)


def _quantized(
    call: Call,
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The same with the weights of :mod:`rnn_ext.quantized`, of which the last of a projected layer are scales (P,)."""
    backends.check_quantized(input)
    layout = (call.cell, batch_sizes, lengths, resets, call.bidirectional, call.batch_first)
    hidden = weights[2].shape[-1]
    _check_states(call, input, h_0, c_0, weights[-1].numel() if weights[-1].dim() == 1 else hidden, hidden, batch_sizes)

    if not input.is_meta and torch.is_autocast_enabled(input.device.type):  # which casts states of other layers
        h_0, c_0 = map_present(lambda state: state.to(input.dtype), h_0, c_0)

    def layer(input: Tensor, h_0: Tensor | None, c_0: Tensor | None, weights: Sequence[Tensor], cells: bool) -> tuple:
        return ops.quantized_layer(input, h_0, c_0, weights, *layout, cells)

    return _one_after_another(call, layer, input, h_0, c_0, weights)


def _one_after_another(
    call: Call,
    layer: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]],
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """``layer(input, h_0, c_0, weights, cell_states)`` for each layer, with dropout between them."""
    if call.num_layers == 1:
        output, h_n, c_n, cells = layer(input, h_0, c_0, weights, call.cell_states)
        return output, h_n, c_n if call.cell == "lstm" else None, cells if call.cell_states else None
    count = len(weights) // call.num_layers
    directions = 2 if call.bidirectional else 1
    h_0s = [None] * call.num_layers if h_0 is None else h_0.split(directions)
    c_0s = [None] * call.num_layers if c_0 is None else c_0.split(directions)
    h_ns, c_ns = [], []
    for k in range(call.num_layers):
        if k > 0 and call.training and call.dropout > 0:
            input = _dropout(input, call.dropout, call.batch_first)
        part = weights[k * count : (k + 1) * count]
        wants_cells = call.cell_states and k == call.num_layers - 1
        input, h_n, c_n, cells = layer(input, h_0s[k], c_0s[k], part, wants_cells)
        h_ns.append(h_n)
        c_ns.append(c_n)
    c_n = torch.cat(c_ns) if call.cell == "lstm" else None
    return input, torch.cat(h_ns), c_n, cells if call.cell_states else None


def _wide(like: Tensor) -> torch.dtype:
    """At least float32: a probability is not to be rounded to bfloat16."""
    return torch.promote_types(like.dtype, torch.float32)


def _dropout_mask(shape: Sequence[int], p: float, like: Tensor) -> Tensor:
    """0 with probability p, else 1 / (1 - p); not mapped by torch.func.vmap where `like` is."""
    return ops.random_mask(shape, 1 - p, 1 / (1 - p), _wide(like), like.device)


def _masks(
    call: Call,
    input: Tensor,
    h_0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
) -> Sequence[Tensor | None]:
    """The op's `masks` for one layer, drawn with torch's generator, or constants in eval."""
    zoneout_h, zoneout_c = call.extras.zoneout
    recurrent = call.extras.recurrent_dropout if call.training else 0.0
    if not (zoneout_h or zoneout_c or recurrent):
        return ()
    directions = 2 if call.bidirectional else 1
    features = weights[1].shape[1]
    hidden_mask = None
    if recurrent:
        if batch_sizes is None:
            batch = input.shape[0 if call.batch_first else 1]
        else:
            batch = int(batch_sizes[0]) if h_0 is None else h_0.shape[1]
        hidden_mask = _dropout_mask((directions, batch, features), recurrent, input)

    def keep(p: float, *shape: int) -> Tensor | None:
        if not p:
            return None
        if call.training:
            return ops.random_mask(shape, p, 1.0, _wide(input), input.device)
        return torch.full(shape[-1:], p, dtype=_wide(input), device=input.device).expand(shape)

    lead, hidden = input.shape[:-1], ops.hidden_size(call.cell, weights)
    if zoneout_h and zoneout_h == zoneout_c and features == hidden:  # a call costs more than a small layer's numbers
        return hidden_mask, *keep(zoneout_h, 2, *lead, directions * hidden).unbind()
    return hidden_mask, keep(zoneout_h, *lead, directions * features), keep(zoneout_c, *lead, directions * hidden)


def _dropout(output: Tensor, dropout: float, batch_first: bool) -> Tensor:
    """torch.nn draws the mask of a padded batch in time-major order: so do we, to draw the same mask."""
    if not batch_first:
        return torch.nn.functional.dropout(output, dropout)
    ones = torch.ones_like(output.transpose(0, 1), memory_format=torch.contiguous_format)
    return output * torch.nn.functional.dropout(ones, dropout).transpose(0, 1)


def _native(
    call: Call,
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, None]:
    """torch's kernels, which know packed sequences but neither lengths nor resets nor cell states."""
    cell, num_layers, bidirectional, batch_first, dropout, training, _, cell_states, extras, _ = call
    states = num_layers * 2 if bidirectional else num_layers
    lacking = backends.what_native_lacks(
        layer_norm=len(weights) // states > 5,
        zoneout=extras.zoneout,
        recurrent_dropout=training and extras.recurrent_dropout,
        resets=resets is not None,
        return_cell_states=cell_states,
    )
    if lacking:
        supported, reason = backends.can_run_custom_here(input)
        why = "" if supported else f": {reason}"
        raise ValueError(f"{lacking[0]} is an option of the custom backend, but this call runs on the native one{why}")
    _check_states(call, input, h_0, c_0, weights[1].shape[1], ops.hidden_size(cell, weights), batch_sizes)
    stack = (num_layers, bidirectional, dropout, training)
    if lengths is None:
        output, h_n, c_n = backends.native(cell, input, batch_sizes, h_0, c_0, weights, *stack, batch_first)
        return output, h_n, c_n, None

    lengths = lengths.cpu()
    total_length = input.shape[1 if batch_first else 0]
    for i, value in enumerate(lengths.tolist()):
        _check_length(value, i, total_length)
    if 0 in input.shape[:2]:  # which torch does not pack either: a row or a timestep more, which is then cut off
        first, second = input.shape[:2]
        batch = lengths.numel()
        input = input.new_zeros(max(first, 1), max(second, 1), input.shape[2])
        lengths = lengths.new_zeros(max(batch, 1))
        if batch == 0:
            h_0 = c_0 = None
        output, h_n, c_n, _ = _native(call, input, h_0, c_0, weights, batch_sizes, lengths, resets)
        return output[:first, :second], *map_present(lambda state: state[:, :batch], h_n, c_n), None
    # A row of length 0 cannot be packed: it runs one timestep of zeros, which is then thrown away.
    empty = (lengths == 0).to(input.device).unsqueeze(1)
    empty_row = empty.unsqueeze(1 if batch_first else 0)
    packed = pack_padded_sequence(
        input.masked_fill(empty_row, 0), lengths.clamp(min=1), batch_first, enforce_sorted=False
    )
    again = call._replace(batch_first=False, backend="native", extras=NO_EXTRAS)  # which have been at the weights
    output, h_n, c_n, _ = _packed(again, packed, h_0, c_0, weights)
    output, _ = pad_packed_sequence(output, batch_first, total_length=total_length)
    h_n = torch.where(empty, 0 if h_0 is None else h_0, h_n)
    if cell == "lstm":
        c_n = torch.where(empty, 0 if c_0 is None else c_0, c_n)
    return output.masked_fill(empty_row, 0), h_n, c_n, None
