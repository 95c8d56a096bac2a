"""``RNN``, ``LSTM`` and ``GRU``: the layers of :mod:`torch.nn` with the same arguments, parameters and results.

Their forward takes what torch.nn's takes and, keyword-only, `lengths`, `resets` and (LSTM) `return_cell_states`; these,
the shapes, the dtypes and the errors are documented in :mod:`rnn_ext.functional`, which does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.fx.proxy import TraceError
from torch.nn.utils.rnn import PackedSequence

from rnn_ext import functional
from rnn_ext.backends import check_backend


def _with_backend(extra_repr: Callable[[nn.Module], str]) -> Callable[[nn.Module], str]:
    def with_backend(self) -> str:
        text = extra_repr(self)
        return text if self.backend == "auto" else f"{text}, backend={self.backend!r}"

    return with_backend


class _Layer(nn.RNNBase):
    """What the three layers share.

    It derives from nn.RNNBase and not from nn.RNN, nn.LSTM or nn.GRU: torch.compile breaks the graph at those.
    """

    backend: str

    def __init__(self, mode: str, *args, backend: str = "auto", **kwargs) -> None:
        if mode != "LSTM" and "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__(mode, *args, **kwargs)
        self.backend = check_backend(backend)

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
        if isinstance(input, Proxy):
            return self._fx_leaf(input, hx=hx, lengths=lengths, resets=resets)
        output, h_n, _, _ = functional.recurrent(
            self.mode.lower(),
            input,
            hx,
            None,
            self._flat_weights,
            self.num_layers,
            self.bidirectional,
            self.batch_first,
            self.dropout,
            self.training,
            self.backend,
            lengths,
            resets,
        )
        return output, h_n

    def _fx_leaf(self, input: Proxy, **options) -> Proxy:
        """Stay one node of a symbolic trace, as every module of torch.nn does (torch.fx knows those by name)."""
        target = input.tracer.path_of_module(self)
        if not target:
            raise TraceError(f"{type(self).__name__} can be traced inside a model, not as the model itself")
        options = {name: value for name, value in options.items() if value is not None}
        return input.tracer.create_proxy("call_module", target, (input,), options)

    def step(self, input: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One timestep of the whole stack, for streaming: ``forward`` with L = 1 and without that dimension.

        A method, so hooks on the module do not run.

        Args:
            input: (N, I), or (I,) unbatched.
            state: as `hx` of forward; None is zero.

        Returns:
            output, (N, H), for a projected LSTM (N, P), without N if unbatched; and the new state, like `state`.

        Raises:
            ValueError: the layer is bidirectional; number of dimensions of `input`. Else as forward.
        """
        output, h_n, _ = self._step(input, state, None)
        return output, h_n

    def _step(self, input: Tensor, h_0: Tensor | None, c_0: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.bidirectional:
            raise ValueError("step: a bidirectional layer needs the whole sequence, got bidirectional=True")
        if input.dim() not in (1, 2):
            raise ValueError(f"step: Expected input to be 1D or 2D, got {input.dim()}D instead: {list(input.shape)}")
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
        )

    extra_repr = _with_backend(nn.RNNBase.extra_repr)


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
            **kwargs,
        )


class LSTM(_Layer):
    """Multi-layer long short-term memory, a replacement for :class:`torch.nn.LSTM`.

    Equivalent to ``torch.nn.LSTM(input_size, hidden_size, ...)``; arguments and errors are those of :class:`RNN`
    without `nonlinearity`, and

    Args:
        proj_size: P, if not 0: h_t is projected to P features by weight_hr, (P, H).
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
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
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
        )

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
        if isinstance(input, Proxy):
            return self._fx_leaf(
                input, hx=hx, lengths=lengths, resets=resets, return_cell_states=return_cell_states or None
            )
        h_0, c_0 = functional.split_state(hx)
        output, h_n, c_n, cells = functional.recurrent(
            "lstm",
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
        )
        return (output, (h_n, c_n), cells) if return_cell_states else (output, (h_n, c_n))

    def step(self, input: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One timestep of the whole stack, see :meth:`RNN.step`; `state` is ``(h_0, c_0)`` as forward's `hx`."""
        output, h_n, c_n = self._step(input, *functional.split_state(state))
        return output, (h_n, c_n)
