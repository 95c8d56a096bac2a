"""Drop-in recurrent layers for PyTorch: ``rnn_ext.RNN``, ``LSTM``, ``GRU`` and their cells, on our kernels or torch's.

``from rnn_ext import LSTM`` in place of ``from torch.nn import LSTM`` is the whole migration; :func:`rnn_ext.convert`
does the same to a model that already exists.
"""

from rnn_ext import functional, models, quantized
from rnn_ext._version import __version__
from rnn_ext.backends import explain, set_backend
from rnn_ext.cells import GRUCell, LSTMCell, RNNCell
from rnn_ext.convert import convert, to_native
from rnn_ext.modules import GRU, LSTM, RNN
from rnn_ext.quantized import dequantize, quantize

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "__version__",
    "convert",
    "dequantize",
    "explain",
    "functional",
    "models",
    "quantize",
    "quantized",
    "set_backend",
    "to_native",
]
