"""How do I train a model of these layers? As any other: here sixty years of El Niño's sea temperatures.

The kernels are changed in the middle of the training, which nothing but the clock notices.
"""

import torch

import rnn_ext
from rnn_ext import datasets

torch.manual_seed(0)
WINDOW, TESTED = 24, 142  # months seen before the one to forecast; months kept for the test

series = torch.tensor(datasets.el_nino().to_numpy(), dtype=torch.float32)
mean, std = series[:-TESTED].mean(), series[:-TESTED].std()
scaled = (series - mean) / std
past, future = scaled.unfold(0, WINDOW, 1)[:-1].unsqueeze(-1), scaled[WINDOW:].unsqueeze(-1)
train_x, train_y, test_x, test_y = past[:-TESTED], future[:-TESTED], past[-TESTED:], future[-TESTED:]

model = rnn_ext.models.RNNRegressor(input_size=1, hidden_size=32, cell="rnn", num_layers=2)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for epoch in range(16):
    if epoch == 8:
        rnn_ext.set_backend(model, "native")
    for index in torch.randperm(len(train_x)).split(64):
        loss = torch.nn.functional.mse_loss(model(train_x[index]), train_y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if epoch % 4 == 3:
        print(f"epoch {epoch + 1:2}: training loss {loss:.3f}")

with torch.no_grad():
    rmse = float((model(test_x) - test_y).square().mean().sqrt() * std)
last_value = float((test_x[:, -1] - test_y).square().mean().sqrt() * std)
print(f"RMSE on {TESTED} months: {rmse:.2f} °C, with last month's temperature as the forecast {last_value:.2f} °C")
assert rmse < 0.75 * last_value
