"""A binary text classifier: embedding, bidirectional LSTM over the real tokens, two linear layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rnn_ext.modules import LSTM


class BiLSTMClassifier(nn.Module):
    """Maps a batch of token sequences of different lengths to probabilities.

    Args:
        vocab_size: number of tokens; token 0 is the padding.
        embed_dim: features of a token's embedding.
        rnn_hidden_size: features of the hidden state of each direction.
        fc_hidden_size: features of the layer before the last.
        backend: of the LSTM; :func:`rnn_ext.set_backend` switches it later.

    Raises:
        ValueError: unknown backend.
    """

    def __init__(
        self, vocab_size: int, embed_dim: int, rnn_hidden_size: int, fc_hidden_size: int, *, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim, padding_idx=0)
        self.rnn = LSTM(embed_dim, rnn_hidden_size, batch_first=True, bidirectional=True, backend=backend)
        self.fc1 = nn.Linear(2 * rnn_hidden_size, fc_hidden_size)
        self.fc2 = nn.Linear(fc_hidden_size, 1)

    def forward(self, text: Tensor, lengths: Sequence[int] | Tensor) -> Tensor:
        """Probability of the positive class.

        Args:
            text: (N, L) token indices, int64 or int32.
            lengths: (N,) tokens of each row that count, integers of any dtype, in any order.

        Returns:
            (N, 1), in the dtype of the parameters.

        Raises:
            ValueError, TypeError: bad `lengths`.
        """
        _, (h_n, _) = self.rnn(self.embedding(text), lengths=lengths)
        hidden = torch.cat((h_n[-2], h_n[-1]), dim=1)
        return torch.sigmoid(self.fc2(torch.relu(self.fc1(hidden))))
