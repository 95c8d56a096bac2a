"""The two models compute what the classes of the notebook mean, on either backend."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rnn_ext
from rnn_ext.models import BiLSTMClassifier, RNNRegressor

NATIVE = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


class NotebookRegressor(nn.Module):
    def __init__(self, input_size, hidden_size, cell, num_layers):
        super().__init__()
        self.rnn = NATIVE[cell](input_size, hidden_size, num_layers=num_layers, batch_first=True)
        self.fc = nn.Linear(hidden_size, 1)

    def forward(self, x):
        _, hidden = self.rnn(x)
        if isinstance(self.rnn, nn.LSTM):
            hidden, _ = hidden
        out = hidden[-1, :, :]
        return self.fc(out)


class NotebookClassifier(nn.Module):
    def __init__(self, vocab_size, embed_dim, rnn_hidden_size, fc_hidden_size):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim, padding_idx=0)
        self.rnn = nn.LSTM(embed_dim, rnn_hidden_size, batch_first=True, bidirectional=True)
        self.fc1 = nn.Linear(rnn_hidden_size * 2, fc_hidden_size)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(fc_hidden_size, 1)
        self.sigmoid = nn.Sigmoid()

    def forward(self, text, lengths):
        out = self.embedding(text)
        out = nn.utils.rnn.pack_padded_sequence(out, lengths.cpu().numpy(), enforce_sorted=False, batch_first=True)
        _, (hidden, _) = self.rnn(out)
        out = torch.cat((hidden[-2, :, :], hidden[-1, :, :]), dim=1)
        out = self.relu(self.fc1(out))
        return self.sigmoid(self.fc2(out))


def assert_same_training(first, second, inputs, target, steps=3):
    """Same names, initial values, outputs, gradients and losses over a few steps; in float64."""
    for (name, p), (other, q) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert name == other and torch.equal(p, q)
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.01) for model in (first, second)]
    for _ in range(steps):
        outputs = [model(*inputs) for model in (first, second)]
        assert outputs[0].shape == (target.shape[0], 1)
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-10, atol=1e-12)
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.mse_loss(output, target).backward()
        for p, q in zip(first.parameters(), second.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-12)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("backend", ["auto", "custom", "native"])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("cell", NATIVE)
def test_regressor_is_the_notebooks(cell, num_layers, backend):
    torch.manual_seed(1)
    model = RNNRegressor(6, 5, cell=cell, num_layers=num_layers, backend=backend).double()
    torch.manual_seed(1)
    notebook = NotebookRegressor(6, 5, cell, num_layers).double()
    input = torch.randn(4, 7, 6, dtype=torch.float64)
    assert_same_training(model, notebook, (input,), torch.randn(4, 1, dtype=torch.float64))


def test_regressor_as_the_notebook_calls_it():
    model = RNNRegressor(64, 32)
    assert type(model.rnn) is rnn_ext.RNN and (model.rnn.num_layers, model.rnn.backend) == (2, "auto")
    assert model(torch.randn(5, 3, 64)).shape == (5, 1)


@pytest.mark.parametrize("backend", ["auto", "custom", "native"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_classifier_is_the_notebooks(backend, dtype):
    torch.manual_seed(1)
    model = BiLSTMClassifier(30, 6, 5, 4, backend=backend).double()
    torch.manual_seed(1)
    notebook = NotebookClassifier(30, 6, 5, 4).double()
    lengths = torch.tensor([3, 8, 1, 8, 5])
    text = torch.randint(1, 30, (5, 8)) * (torch.arange(8) < lengths.unsqueeze(1))
    assert_same_training(model, notebook, (text.to(dtype), lengths), torch.tensor([[0.0], [1], [1], [0], [1]]).double())
    assert not model.embedding.weight[0].any()  # padding stays zero


@pytest.mark.parametrize("backend", ["custom", "native"])
def test_classifier_does_not_see_the_padding(backend):
    """Whatever stands there, however much of it; lengths in any form."""
    model = BiLSTMClassifier(30, 6, 5, 4, backend=backend)
    text = torch.randint(1, 30, (3, 8))
    expected = model(text, torch.tensor([3, 8, 1]))
    assert ((expected > 0) & (expected < 1)).all()
    text[0, 3:], text[2, 1:] = 7, 0
    longer = nn.functional.pad(text, (0, 4), value=9)
    for lengths in ([3, 8, 1], (3, 8, 1), torch.tensor([3, 8, 1], dtype=torch.int32)):
        torch.testing.assert_close(model(text, lengths), expected)
        torch.testing.assert_close(model(longer, lengths), expected)
    with pytest.raises(ValueError, match="lengths"):
        model(text, [3, 9, 1])


def test_backend_of_a_live_model():
    """Switched in mid-training, the losses go on as if nothing had happened."""
    torch.manual_seed(0)
    text, lengths, target = torch.randint(1, 30, (6, 9)), torch.randint(1, 10, (6,)), torch.rand(6, 1)
    series = torch.randn(6, 9, 3)
    for make, inputs in (
        (lambda: BiLSTMClassifier(30, 6, 5, 4), (text, lengths)),
        (lambda: RNNRegressor(3, 5, cell="gru"), (series,)),
    ):
        losses = []
        for plan in (["native"] * 6, ["native", "custom", "auto"] * 2):
            torch.manual_seed(2)
            model = make().double()
            optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
            losses.append([])
            for backend in plan:
                rnn_ext.set_backend(model, backend)
                assert model.rnn.backend == backend
                optimizer.zero_grad()
                doubles = [x.double() if x.is_floating_point() else x for x in inputs]
                loss = nn.functional.mse_loss(model(*doubles), target.double())
                loss.backward()
                optimizer.step()
                losses[-1].append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
        assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("cell", ["RNN", "transformer", "", None])
def test_unknown_cell(cell):
    with pytest.raises(ValueError, match=f"Unknown cell {cell!r}. Select from 'rnn', 'gru', 'lstm'"):
        RNNRegressor(3, 4, cell=cell)


def test_unknown_backend():
    for make in (lambda: RNNRegressor(3, 4, backend="fast"), lambda: BiLSTMClassifier(9, 3, 4, 2, backend="fast")):
        with pytest.raises(ValueError, match="Unknown backend 'fast'"):
            make()
