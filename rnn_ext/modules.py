"""``RNN``, ``LSTM`` and ``GRU``: the layers of :mod:`torch.nn` with the same arguments, parameters and results.

Their forward takes what torch.nn's takes and, keyword-only, `lengths`, `resets` and (LSTM) `return_cell_states`; these,
the shapes, the dtypes and the errors are documented in :mod:`rnn_ext.functional`, which does the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.fx.proxy import TraceError
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from rnn_ext import functional, ops
from rnn_ext.backends import check_backend

# What torch.nn's layers do not have: attributes, with the values that make a layer do as torch.nn's does.
OPTIONS = {
    "recompute": False,
    # Integers: torch.compile makes an input of a float and then, seeing it decide something, compiles once more.
    "zoneout": 0,
    "recurrent_dropout": 0,
    "weight_dropout": 0,
}


def acts(value: Any) -> bool:
    """Whether this value of an option makes a layer do other than torch.nn's does: not 0, nor a pair of these."""
    return any(value) if isinstance(value, (tuple, list)) else bool(value != 0)


# In whose place torch.fx puts another one while it traces. (It has a flag, too, by another name in each release.)
_MODULE_CALL = nn.Module._wrapped_call_impl  # as torch defines it, also if this is imported in a trace


class Leaf(nn.Module):
    """What torch.nn's layers are to torch's tools, which know those by name."""

    # Attributes that torch.nn's class does not have, as they are where nothing was said.
    _added: ClassVar[dict[str, Any]] = {"backend": "auto"}
    # What csrc/ops/plain_forward.cpp takes from a module's __dict__, and the property in whose place it reads
    # parameters: a subclass may mean something else by it, and is not plain then.
    _read_by_plain: ClassVar[frozenset[str]] = frozenset()
    _plain: bool = True

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__:
            if base.__module__ not in (__name__, "rnn_ext.cells"):
                cls._plain = cls._plain and cls._read_by_plain.isdisjoint(vars(base))

    def __call__(self, *args, **kwargs):
        """Stay one node of a symbolic trace: before the hooks run, which the node will call."""
        if nn.Module.__call__ is not _MODULE_CALL:
            proxy = next((x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Proxy)), None)
            if proxy is not None:
                tracer = proxy.tracer

                def leaf(*args, **kwargs):
                    return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)

                return tracer.call_module(self, leaf, args, kwargs)
        return super().__call__(*args, **kwargs)

    def __setstate__(self, state: dict) -> None:
        """Also of what torch.nn's class, or a version with fewer options, has pickled."""
        super().__setstate__(state)
        attributes = vars(self)
        attributes.pop("_flat_weights", None)
        for name, default in self._added.items():
            attributes.setdefault(name, default)

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.jit.script cannot read our forward, and what this returned would stay in the user's model."""
        kind = type(self).__name__
        raise RuntimeError(
            f"torch.jit.script cannot compile rnn_ext.{kind}: script rnn_ext.to_native(copy.deepcopy(model)) instead, "
            "whose layers are torch.nn's"
        )

    def _check_not_traced(self, input: Tensor, name: str) -> None:
        if isinstance(input, Proxy):
            kind = type(self).__name__
            raise TraceError(
                f"{kind}.{name} can be no node of a symbolic trace, which a call of the {kind} in a model can"
            )

    def _check_step(self, input: Tensor) -> None:
        """What `step` of a layer takes."""
        self._check_not_traced(input, "step")
        if not isinstance(input, Tensor):
            raise TypeError(f"step: expected input as a tensor, got {type(input).__name__}")
        if self.bidirectional:
            raise ValueError("step: a bidirectional layer needs the whole sequence, got bidirectional=True")
        for name in ("recurrent_dropout", "weight_dropout"):
            if self.training and getattr(self, name, 0) > 0:
                raise ValueError(
                    f"step: {name}={getattr(self, name)} draws one mask for a whole sequence, which steps cannot "
                    "share: expected a layer in eval mode"
                )
        if input.dim() not in (1, 2):
            raise ValueError(f"step: Expected input to be 1D or 2D, got {input.dim()}D instead: {list(input.shape)}")


class _Layer(Leaf, nn.RNNBase):
    """What the three layers share.

    It derives from nn.RNNBase and not from nn.RNN, nn.LSTM or nn.GRU: torch.compile breaks the graph at those. See
    :mod:`rnn_ext.subclasses`.
    """

    backend: str
    _added: ClassVar[dict[str, Any]] = Leaf._added | OPTIONS
    _read_by_plain: ClassVar[frozenset[str]] = frozenset(
        {"_flat_weights", "_flat_weights_names", "_parameters", "mode", "backend", "dropout", "training", "num_layers"}
        | {"bidirectional", "batch_first", "layer_norm", *OPTIONS}
    )

    def __init__(
        self,
        mode: str,
        *args,
        backend: str,
        recompute: bool,
        zoneout: float | tuple[float, float],
        recurrent_dropout: float,
        weight_dropout: float,
        **kwargs,
    ) -> None:
        if mode != "LSTM" and "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if mode != "LSTM" and "layer_norm" in kwargs:
            raise TypeError("layer_norm is an option of LSTM, not of RNN or GRU")
        nn.RNNBase.__init__(self, mode, *args, **kwargs)  # by its name: a subclass may be an nn.LSTM as well
        self.backend = check_backend(backend)
        extras = functional.check_extras(mode.lower(), recompute, zoneout, recurrent_dropout, weight_dropout)
        self.recompute = recompute
        pair = extras.zoneout if isinstance(zoneout, (tuple, list)) else extras.zoneout[0]
        self.zoneout = pair if any(extras.zoneout) else 0
        self.recurrent_dropout = extras.recurrent_dropout or 0
        self.weight_dropout = extras.weight_dropout or 0

    @property
    def layer_norm(self) -> bool:
        """Whether the layer has the weights of layer normalisation: as it was made."""
        return any(name.startswith("weight_norm") for name in vars(self).get("_flat_weights_names", ()))

    @layer_norm.setter
    def layer_norm(self, value: bool) -> None:
        if value is not self.layer_norm:
            raise AttributeError(f"layer_norm is fixed when a layer is made: expected {self.layer_norm}, got {value!r}")

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        """Say in one sentence what a checkpoint of :mod:`rnn_ext.quantized` is."""
        if f"{prefix}factors_l0" not in state_dict:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
            return
        where, sizes = prefix.rstrip(".") or type(self).__name__, state_dict.get(f"{prefix}sizes")
        how = "" if sizes is None or sizes.is_meta else f", activations={int(sizes[0])}"
        errors.append(
            f"the checkpoint has weights of 8 bits, {where} has not: rnn_ext.quantize(model{how}) before you load it"
        )

    @property
    def _flat_weights(self) -> list[Tensor]:
        """The weights in the order of :mod:`rnn_ext.functional`, looked up anew at each call.

        nn.RNNBase keeps a list that goes stale under functional_call, parametrizations and deepcopy.
        """
        parameters = self._parameters
        # What is not a parameter (any more) is an attribute: weight_norm, parametrizations, pruning, DataParallel.
        return [parameters[n] if n in parameters else getattr(self, n, None) for n in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor]) -> None:
        pass

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Sequence[int] | Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Output and h_n, as torch.nn's; shapes, dtypes and errors are documented in :mod:`rnn_ext.functional`."""
        if self._plain and not torch.compiler.is_compiling():
            results = ops.plain_forward(self.__dict__, input, hx, lengths, resets, False)
            if results is not None:
                return results
        self._check_not_traced(input, "forward")
        output, h_n, _, _ = self._run(input, hx, None, lengths, resets)
        return output, h_n

    def _run(
        self,
        input: Tensor | PackedSequence,
        h_0: Tensor | None,
        c_0: Tensor | None,
        lengths: Sequence[int] | Tensor | None,
        resets: Tensor | None,
        return_cell_states: bool = False,
    ) -> tuple[Tensor | PackedSequence, Tensor, Tensor | None, Tensor | PackedSequence | None]:
        return functional.recurrent(
            self.mode.lower(),
            input,
            h_0,
            c_0,
            self._flat_weights,
            self.num_layers,
            self.bidirectional,
            self.batch_first,
            self.dropout,
            self.training,
            self.backend,
            lengths,
            resets,
            return_cell_states,
            self.recompute,
            self.zoneout,
            self.recurrent_dropout,
            self.weight_dropout,
        )

    def step(self, input: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One timestep of the whole stack, for streaming: ``forward`` with L = 1 and without that dimension.

        A method, so hooks on the module do not run.

        Args:
            input: (N, I), or (I,) unbatched.
            state: as `hx` of forward; None is zero.

        Returns:
            output, (N, H), for a projected LSTM (N, P), without N if unbatched; and the new state, like `state`.

        Raises:
            ValueError: the layer is bidirectional or, in training, has `recurrent_dropout` or `weight_dropout`, whose
                mask is one for a whole sequence; number of dimensions of `input`. Else as forward.
        """
        if self._plain and not torch.compiler.is_compiling():
            results = ops.plain_step(self.__dict__, input, state)
            if results is not None:
                return results
        output, h_n, _ = self._step(input, state, None)
        return output, h_n

    def _step(self, input: Tensor, h_0: Tensor | None, c_0: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        self._check_step(input)
        return functional.step(
            self.mode.lower(),
            input,
            h_0,
            c_0,
            self._flat_weights,
            self.num_layers,
            self.dropout,
            self.training,
            self.backend,
            self.zoneout,
        )

    def _options_in_use(self) -> dict[str, Any]:
        """Those that make the layer do other than torch.nn's does."""
        values = {name: getattr(self, name) for name in ("layer_norm", *OPTIONS)}
        return {name: value for name, value in values.items() if acts(value)}

    def extra_repr(self) -> str:
        shown = self._options_in_use()
        if self.backend != "auto":
            shown = {"backend": self.backend, **shown}
        return ", ".join([super().extra_repr(), *(f"{name}={value!r}" for name, value in shown.items())])


class RNN(_Layer):
    """Multi-layer Elman RNN with tanh or relu, a replacement for :class:`torch.nn.RNN`.

    Equivalent to ``torch.nn.RNN(input_size, hidden_size, ...)``, with the same parameters, initial values for the same
    seed, and state_dict.

    Args:
        input_size: I, features of `input`.
        hidden_size: H, features of the state.
        num_layers: layers stacked on each other.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        bias: whether there are bias_ih and bias_hh.
        batch_first: whether `input` and `output` are (N, L, features) and not (L, N, features).
        dropout: probability of zeroing an output of every layer but the last, in training.
        bidirectional: whether a second direction reads the sequence from its end.
        device: of the parameters.
        dtype: of the parameters: float32, float64, bfloat16 or float16 (native: whatever torch supports).
        backend: ``"auto"``, ``"custom"`` or ``"native"``, see :mod:`rnn_ext.backends`; an attribute, can be changed.
        recompute: keep only `input` and the initial states for backward, which then runs forward once more: less
            memory, the same bits. An attribute, can be changed; without effect on the native backend. One layer of
            N = 32, L = 128, I = H = 256 in float32 keeps 4 MiB instead of 28 (LSTM), 24 (GRU) or 8 (RNN), two layers
            8 instead of 52, 44 or 12. ``benchmarks/results/features.md`` has the time it takes.
        zoneout, recurrent_dropout, weight_dropout: probabilities in [0, 1), see :mod:`rnn_ext.functional`. Attributes,
            can be changed. Masks are drawn with torch's generator. Active in training; in eval, zoneout takes the
            expectation.

    Raises:
        ValueError, TypeError: as torch.nn.RNN for the same mistake; ValueError for an unknown `backend`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        recompute: bool = False,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        **kwargs,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity {nonlinearity!r}. Select from 'tanh' or 'relu'.")
        super().__init__(
            f"RNN_{nonlinearity.upper()}",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            backend=backend,
            recompute=recompute,
            zoneout=zoneout,
            recurrent_dropout=recurrent_dropout,
            weight_dropout=weight_dropout,
            **kwargs,
        )
        self.nonlinearity = nonlinearity


class GRU(_Layer):
    """Multi-layer gated recurrent unit, a replacement for :class:`torch.nn.GRU`.

    Equivalent to ``torch.nn.GRU(input_size, hidden_size, ...)``; arguments and errors are those of :class:`RNN` without
    `nonlinearity`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        recompute: bool = False,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        **kwargs,
    ) -> None:
        super().__init__(
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            backend=backend,
            recompute=recompute,
            zoneout=zoneout,
            recurrent_dropout=recurrent_dropout,
            weight_dropout=weight_dropout,
            **kwargs,
        )


class LSTM(_Layer):
    """Multi-layer long short-term memory, a replacement for :class:`torch.nn.LSTM`.

    Equivalent to ``torch.nn.LSTM(input_size, hidden_size, ...)``; arguments and errors are those of :class:`RNN`
    without `nonlinearity`, and

    Args:
        proj_size: P, if not 0: h_t is projected to P features by weight_hr, (P, H).
        layer_norm: normalise gates and cell state (Ba, Kiros and Hinton 2016, equations 20 to 22):

            gates = LN(W_ih x_t) * weight_norm_ih + b_ih + LN(W_hh h_{t-1}) * weight_norm_hh + b_hh
            h_t = o_t * tanh(LN(c_t) * weight_norm_c + bias_norm_c)

            with c_t and o_t as ever and ``LN(x) = (x - mean(x)) / sqrt(var(x) + 1e-5)`` over all 4H gates and over the
            H cells, biased variance. Further parameters of each layer and direction, named ``weight_norm_ih_l0`` and so
            on: weight_norm_ih and weight_norm_hh (4H,) and weight_norm_c (H,), ones at first, bias_norm_c (H,), zeros.
            Custom backend only. Fixed when the layer is made.
        zoneout: as a pair, the probabilities of h and of c.

    ``benchmarks/results/features.md`` has what they cost.
    """

    # For subclasses whose forward is written after torch's: two states, where nn.RNNBase knows one.
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args
    permute_hidden = nn.LSTM.permute_hidden

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        recompute: bool = False,
        layer_norm: bool = False,
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device=device,
            dtype=dtype,
            backend=backend,
            recompute=recompute,
            zoneout=zoneout,
            recurrent_dropout=recurrent_dropout,
            weight_dropout=weight_dropout,
        )
        if not isinstance(layer_norm, bool):
            raise TypeError(f"layer_norm must be a bool, got {layer_norm!r}")
        if layer_norm:
            self._add_norms(device, dtype)

    def _add_norms(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        sizes = {"weight_norm_ih": 4, "weight_norm_hh": 4, "weight_norm_c": 1, "bias_norm_c": 1}
        for weights in self._all_weights:  # the names, of each layer and direction
            suffix = weights[0].removeprefix("weight_ih")
            for name, parts in sizes.items():
                full = torch.zeros if name == "bias_norm_c" else torch.ones
                parameter = nn.Parameter(full(parts * self.hidden_size, device=device, dtype=dtype))
                self.register_parameter(name + suffix, parameter)
                weights.append(name + suffix)
        self._flat_weights_names = [name for weights in self._all_weights for name in weights]
        self._init_flat_weights()

    def reset_parameters(self) -> None:
        """Draw the weights anew as torch.nn does, and set those of layer normalisation to ones and zeros."""
        super().reset_parameters()
        for name, parameter in self.named_parameters():
            if name.startswith("weight_norm"):
                nn.init.ones_(parameter)
            elif name.startswith("bias_norm"):
                nn.init.zeros_(parameter)

    def flatten_parameters(self) -> None:
        """For cuDNN, which has no layer normalisation."""
        if not self.layer_norm:
            super().flatten_parameters()

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
        """Output and ``(h_n, c_n)``, as torch.nn's, and if asked for the cell states; see :mod:`rnn_ext.functional`."""
        if self._plain and not torch.compiler.is_compiling():
            results = ops.plain_forward(self.__dict__, input, hx, lengths, resets, return_cell_states)
            if results is not None:
                return results
        self._check_not_traced(input, "forward")
        h_0, c_0 = functional.split_state(hx)
        output, h_n, c_n, cells = self._run(input, h_0, c_0, lengths, resets, return_cell_states)
        return (output, (h_n, c_n), cells) if return_cell_states else (output, (h_n, c_n))

    def step(self, input: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One timestep of the whole stack, see :meth:`RNN.step`; `state` is ``(h_0, c_0)`` as forward's `hx`."""
        if self._plain and not torch.compiler.is_compiling():
            results = ops.plain_step(self.__dict__, input, state)
            if results is not None:
                return results
        output, h_n, c_n = self._step(input, *functional.split_state(state))
        return output, (h_n, c_n)
