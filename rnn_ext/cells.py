"""``RNNCell``, ``LSTMCell`` and ``GRUCell``: one timestep, as :mod:`torch.nn`'s cells, by the op of the layers.

For a whole stack one timestep at a time, see ``step`` of the layers.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from rnn_ext import backends, functional, modules, ops


class _Cell(modules.Leaf, nn.RNNCellBase):
    """What the three cells share. Like the layers they derive from torch.nn's base, not from its cells."""

    backend: str
    mode: str  # as the layers'
    _gates: int
    _read_by_plain: ClassVar[frozenset[str]] = frozenset(
        {"weight_ih", "weight_hh", "bias_ih", "bias_hh", "_parameters", "backend"}
    )

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        nn.RNNCellBase.__init__(self, input_size, hidden_size, bias, self._gates, device=device, dtype=dtype)
        self.backend = backends.check_backend(backend)

    def _step(self, input: Tensor, h: Tensor | None, c: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        self._check_not_traced(input, "forward")
        for name, tensor in (("input", input), ("hx", h), ("hx", c)):
            if not hasattr(tensor, "dim") and (tensor is not None or name == "input"):
                found = type(tensor).__name__
                raise TypeError(f"{type(self).__name__}: expected {name} as a tensor, got {found}")
            if tensor is not None and tensor.is_nested:
                raise RuntimeError(f"{type(self).__name__}: expected {name} as a dense tensor, got a nested tensor")
            if tensor is not None and tensor.dim() not in (1, 2):
                kind, size = type(self).__name__, list(tensor.shape)
                raise ValueError(f"{kind}: Expected {name} to be 1D or 2D, got {tensor.dim()}D instead: {size}")
            if tensor is not None and tensor.dim() != input.dim():
                size = list(tensor.shape)
                raise RuntimeError(f"For {input.dim()}-D input, hx should also be {input.dim()}-D but got {size}")
        if input.dim() == 1:
            h, c = functional.map_present(lambda state: state.unsqueeze(0), h, c)
            return functional.map_present(lambda state: state.squeeze(0), *self._step(input.unsqueeze(0), h, c))
        cell = self.mode.lower()
        weights = [self.weight_ih, self.weight_hh]
        if self.bias_ih is not None or self.bias_hh is not None:
            weights += [self.bias_ih, self.bias_hh]
        for name, weight in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), weights, strict=False):
            if weight is None:
                raise ValueError(f"{type(self).__name__}: expected a tensor as {name}, got None")
        if backends.use_custom(backends.backend_for(self.backend, weights), input):
            h, c = functional.dense_state(cell, "hx", h), functional.dense_state(cell, "hx", c)
            return ops.cell(input, h, c, weights, cell)
        zeros = None
        if h is None or c is None:  # dense beside a sparse input
            zeros = input.new_zeros(input.shape[0], self.hidden_size, layout=torch.strided)
        h, c = zeros if h is None else h, zeros if c is None else c
        if cell == "lstm":
            return torch.lstm_cell(input, (h, c), *weights)
        return getattr(torch, f"{cell}_cell")(input, h, *weights), None

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The next state, (N, H) or unbatched (H,), from `input` (N, I) or (I,) and `hx`, like the result or None."""
        if self._plain and not torch.compiler.is_compiling():
            state = ops.plain_cell(self.__dict__, self.mode, input, hx)
            if state is not None:
                return state
        return self._step(input, hx)[0]

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.backend == "auto" else f"{text}, backend={self.backend!r}"


class RNNCell(_Cell):
    """One timestep of an Elman RNN, a replacement for :class:`torch.nn.RNNCell`.

    Equivalent to ``torch.nn.RNNCell(input_size, hidden_size, ...)``, with the same parameters, initial values for the
    same seed, and state_dict.

    Args:
        input_size: I, features of `input`.
        hidden_size: H, features of the state.
        bias: whether there are bias_ih and bias_hh.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        device, dtype: of the parameters.
        backend: ``"auto"``, ``"custom"`` or ``"native"``, see :mod:`rnn_ext.backends`; an attribute, can be changed.

    Raises:
        ValueError: an unknown `backend`; in a call, `input` or `hx` of neither one nor two dimensions.
        RuntimeError: in a call, an unknown `nonlinearity`, or dimensions, sizes, dtypes or devices that do not match.
    """

    _gates = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype, backend=backend)
        self.nonlinearity = nonlinearity

    @property
    def mode(self) -> str:
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity {self.nonlinearity!r}. Select from 'tanh' or 'relu'.")
        return f"RNN_{self.nonlinearity.upper()}"


class GRUCell(_Cell):
    """One timestep of a gated recurrent unit, a replacement for :class:`torch.nn.GRUCell`.

    Arguments and errors are those of :class:`RNNCell` without `nonlinearity`.
    """

    mode = "GRU"
    _gates = 3


class LSTMCell(_Cell):
    """One timestep of a long short-term memory, a replacement for :class:`torch.nn.LSTMCell`.

    Arguments and errors are those of :class:`RNNCell` without `nonlinearity`.
    """

    mode = "LSTM"
    _gates = 4

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The next ``(h, c)``, each (N, H) or unbatched (H,), from `input` (N, I) or (I,) and such a pair or None."""
        if self._plain and not torch.compiler.is_compiling():
            states = ops.plain_cell(self.__dict__, self.mode, input, hx)
            if states is not None:
                return states
        return self._step(input, *functional.split_state(hx))
