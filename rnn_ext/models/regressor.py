"""A sequence regressor: recurrent layers, then one linear unit on the last layer's final hidden state."""

from __future__ import annotations

from torch import Tensor, nn

from rnn_ext.modules import GRU, LSTM, RNN

CELLS = {"rnn": RNN, "gru": GRU, "lstm": LSTM}


class RNNRegressor(nn.Module):
    """Maps a sequence to one number.

    Args:
        input_size: features of each timestep.
        hidden_size: features of the hidden state.
        cell: ``"rnn"`` (tanh), ``"gru"`` or ``"lstm"``.
        num_layers: recurrent layers.
        backend: of the recurrent layers; :func:`rnn_ext.set_backend` switches it later.

    Raises:
        ValueError: unknown cell or backend.
    """

    def __init__(
        self, input_size: int, hidden_size: int, *, cell: str = "rnn", num_layers: int = 2, backend: str = "auto"
    ) -> None:
        super().__init__()
        if cell not in CELLS:
            raise ValueError(f"Unknown cell {cell!r}. Select from {', '.join(map(repr, CELLS))}.")
        self.rnn = CELLS[cell](input_size, hidden_size, num_layers, batch_first=True, backend=backend)
        self.fc = nn.Linear(hidden_size, 1)

    def forward(self, input: Tensor) -> Tensor:
        """(N, L, input_size) -> (N, 1), in the dtype of the parameters."""
        _, hidden = self.rnn(input)
        h_n = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.fc(h_n[-1])
