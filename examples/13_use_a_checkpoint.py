"""How do I use what `python -m rnn_ext train` has saved? A forecaster is made of a checkpoint, without the data."""

import dataclasses
import tempfile
from pathlib import Path

import torch

from rnn_ext import datasets
from rnn_ext.models import RNNRegressor
from rnn_ext.training import DEFAULTS, Config, Forecasting, Training, load_checkpoint

series = datasets.el_nino()
path = Path(tempfile.mkdtemp()) / "rnn_ext_regressor.pt"
training = Training(Forecasting(series, window=24), dataclasses.replace(DEFAULTS["regressor"], epochs=2))
for _ in range(training.config.epochs):
    for _loss in training.run_epoch():
        pass
training.save(path)  # as `python -m rnn_ext train regressor` does after each epoch

checkpoint = load_checkpoint(path, "regressor")
config, scale = Config(**checkpoint["config"]), checkpoint["task"]
model = RNNRegressor(1, config.hidden_size, cell=config.cell, num_layers=config.num_layers)
model.load_state_dict(checkpoint["model"])
model.eval()


@torch.inference_mode()
def forecast(values: list[float]) -> float:
    """The value after these, at least `config.window` of them, in the unit of the data."""
    seen = (torch.tensor(values[-config.window :]) - scale["mean"]) / scale["std"]
    return float(model(seen.view(1, -1, 1))) * scale["std"] + scale["mean"]


past = series.to_list()
print(f"last months {past[-3:]}, forecast {forecast(past):.2f} °C")
expected = training.task.unscale(training.predict())[-1]  # of the last month but one, which the test ends with
assert abs(forecast(past[:-1]) - float(expected)) < 1e-3
