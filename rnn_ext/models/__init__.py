"""Two small models built of the layers: a sequence regressor and a text classifier."""

from rnn_ext.models.classifier import BiLSTMClassifier
from rnn_ext.models.regressor import RNNRegressor

__all__ = ["BiLSTMClassifier", "RNNRegressor"]
