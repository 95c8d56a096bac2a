"""Our layers and cells as classes of torch.nn: for code that asks for ``isinstance(layer, nn.LSTM)``.

Elsewhere take those of :mod:`rnn_ext`, which are no subclasses on purpose: torch.compile breaks the graph at a layer
that is an nn.RNN, LSTM or GRU, unless ``torch._dynamo.config.allow_rnn`` is set. Arguments, results and errors are the
same.
``rnn_ext.convert(model, as_subclass=True)`` makes the layers of a model these.
"""

from __future__ import annotations

from torch import nn

from rnn_ext import cells, modules


class RNN(modules.RNN, nn.RNN):
    """A :class:`torch.nn.RNN` that computes as :class:`rnn_ext.RNN`."""


class GRU(modules.GRU, nn.GRU):
    """A :class:`torch.nn.GRU` that computes as :class:`rnn_ext.GRU`."""


class LSTM(modules.LSTM, nn.LSTM):
    """A :class:`torch.nn.LSTM` that computes as :class:`rnn_ext.LSTM`."""


class RNNCell(cells.RNNCell, nn.RNNCell):
    """A :class:`torch.nn.RNNCell` that computes as :class:`rnn_ext.RNNCell`."""


class GRUCell(cells.GRUCell, nn.GRUCell):
    """A :class:`torch.nn.GRUCell` that computes as :class:`rnn_ext.GRUCell`."""


class LSTMCell(cells.LSTMCell, nn.LSTMCell):
    """A :class:`torch.nn.LSTMCell` that computes as :class:`rnn_ext.LSTMCell`."""
