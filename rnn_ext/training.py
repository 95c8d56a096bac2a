"""Training of the two models: data to tensors, epochs, metrics, naive baselines and checkpoints.

A :class:`Task` is data with its model, loss, metric and baselines; a :class:`Training` is a model on its way through
the epochs of a task. The order of the examples depends on the seed and the number of the epoch alone, so a training
resumed from a checkpoint goes on exactly as if it had never stopped, and two backends see the same batches.
"""

from __future__ import annotations

import abc
import collections
import copy
import dataclasses
import functools
import hashlib
import io
import math
import re
import reprlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rnn_ext._files import InputError, one_line, replacing
from rnn_ext.models import BiLSTMClassifier, RNNRegressor

CHECKPOINT_FORMAT = "rnn_ext training 1"
PADDING, UNKNOWN = 0, 1  # the first two entries of every vocabulary


@dataclasses.dataclass(frozen=True)
class Config:
    """What a training needs to be told, besides its data. ``num_layers`` and ``window`` are the regressor's own, as is
    the choice of a ``cell``; ``embed_dim``, ``fc_hidden_size`` and ``vocab_size`` are the classifier's."""

    task: str
    cell: str = "rnn"
    hidden_size: int = 32
    num_layers: int = 2
    window: int = 24
    embed_dim: int = 64
    fc_hidden_size: int = 64
    vocab_size: int = 10_000
    epochs: int = 100
    batch_size: int = 64
    lr: float = 1e-3
    seed: int = 0
    backend: str = "auto"
    device: str = "cpu"


DEFAULTS = {
    "regressor": Config("regressor"),
    "classifier": Config("classifier", cell="lstm", hidden_size=64, epochs=4, lr=2e-3),
}


@dataclasses.dataclass
class Examples:
    """Inputs of the model and their targets (N, 1); the first dimension of each counts the examples."""

    inputs: tuple[Tensor, ...]
    target: Tensor

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, index: Tensor | slice) -> Examples:
        return Examples(tuple(tensor[index] for tensor in self.inputs), self.target[index])

    def to(self, device: str) -> Examples:
        return Examples(tuple(tensor.to(device) for tensor in self.inputs), self.target.to(device))


def tested_of(count: int, test_fraction: float) -> int:
    """How many of ``count`` examples are the test: at least one, and not all unless that was asked for."""
    return count if test_fraction == 1 else max(1, min(round(count * test_fraction), count - 1))


class Task(abc.ABC):
    """Data, and what depends on the kind of it. ``state`` is what a checkpoint keeps to read other data alike."""

    metric: str
    name: str  # of the data
    test_fraction: float
    train: Examples
    test: Examples
    baselines: dict[str, float]
    state: dict[str, Any]

    @abc.abstractmethod
    def build(self, config: Config) -> nn.Module:
        """The model that ``config`` asks for, freshly initialised."""

    def forward(self, model: nn.Module, batch: Examples) -> Tensor:
        return model(*batch.inputs)

    @abc.abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """To train on: a scalar."""

    @abc.abstractmethod
    def score(self, output: Tensor, target: Tensor) -> float:
        """``metric`` of the test examples."""


class Forecasting(Task):
    """The next value of a series from the ``window`` values before it; the last part of the series is the test.

    Args:
        series: numbers in the order of time, at a constant interval.
        window: how many of them the model sees.
        test_fraction: share of the examples, counted from the end, that is only tested on.
        state: mean and standard deviation to normalise with; by default those of what is trained on.
        name: of the data, for messages and the checkpoint.

    Raises:
        InputError: the series is too short for one window to train on (unless test_fraction is 1) and one to test on.
    """

    metric = "RMSE"

    def __init__(
        self,
        series: pd.Series,
        window: int,
        test_fraction: float = 0.2,
        state: dict[str, Any] | None = None,
        name: str = "",
    ):
        what = name or "the series"
        values = torch.tensor(series.to_numpy(), dtype=torch.float64)
        count = len(values) - window
        trained = count - tested_of(count, test_fraction)
        needed = 1 if test_fraction == 1 else 2
        if count < needed:
            raise InputError(f"{what} has {len(values)} values: a window of {window} needs at least {window + needed}")
        if state is None:
            seen = values[: window + trained]
            std = float(seen.std(correction=0))
            state = {"mean": float(seen.mean()), "std": std if std > 0 else 1.0}
        if state["std"] == 1.0 and 0 < float(values.max() - values.min()) < 1e-150:  # whose squares are zero
            raise InputError(f"{what} has values too small to be normalised (up to {float(values.abs().max()):g})")
        scaled = ((values - state["mean"]) / state["std"]).float()
        if not (math.isfinite(state["std"]) and scaled.square().isfinite().all()):
            raise InputError(f"{what} has values too large to be normalised (up to {float(values.abs().max()):g})")
        self.name, self.state, self.test_fraction = name, state, test_fraction
        self.index = series.index[window + trained :]

        def windows(of: Tensor) -> tuple[Tensor, Tensor]:
            return of.unfold(0, window, 1)[:count], of[window:]

        self.baselines = _forecasting_baselines(*windows(values), trained)
        past, future = windows(scaled.unsqueeze(-1))
        examples = Examples((past.transpose(1, 2),), future)
        self.train, self.test = examples[:trained], examples[trained:]

    def build(self, config: Config) -> nn.Module:
        return RNNRegressor(
            1, config.hidden_size, cell=config.cell, num_layers=config.num_layers, backend=config.backend
        )

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, target)

    def score(self, output: Tensor, target: Tensor) -> float:
        return float(F.mse_loss(output, target).sqrt()) * self.state["std"]

    def unscale(self, output: Tensor) -> Tensor:
        return output.squeeze(-1).double() * self.state["std"] + self.state["mean"]


def _forecasting_baselines(past: Tensor, future: Tensor, trained: int) -> dict[str, float]:
    """RMSE on the test examples of the last value, and of the best linear function of the window (least squares)."""

    def rmse(forecast: Tensor) -> float:
        return float((forecast - future[trained:]).square().mean().sqrt())

    baselines = {"last value": rmse(past[trained:, -1])}
    if trained > past.shape[1]:  # fewer examples than coefficients do not determine them
        design = torch.cat([past, torch.ones_like(past[:, :1])], 1)
        # gelsd: an always constant column, or a constant series, leaves the matrix without full rank
        solution = torch.linalg.lstsq(design[:trained], future[:trained].unsqueeze(-1), driver="gelsd").solution
        baselines["linear AR"] = rmse((design[trained:] @ solution).squeeze(-1))
    return baselines


def tokenize(text: str) -> list[str]:
    return re.findall(r"\w+(?:'\w+)?|[!?]", text.lower())


class Sentiment(Task):
    """Which of two labels a text has.

    Args:
        table: columns ``text`` and ``label``, with two different labels.
        vocab_size: entries of the vocabulary at most, padding and unknown included: the most frequent of the words
            trained on.
        test_fraction: share of the texts, drawn at random (always the same ones), that is only tested on.
        state: vocabulary and labels of a checkpoint; by default those of what is trained on.
        name: of the data, for messages and the checkpoint.

    Raises:
        InputError: not two labels, or not those of ``state``; too few texts; a vocabulary without a word.
    """

    metric = "accuracy"

    def __init__(
        self,
        table: pd.DataFrame,
        vocab_size: int,
        test_fraction: float = 0.2,
        state: dict[str, Any] | None = None,
        name: str = "",
    ):
        if state is None and vocab_size < 3:
            raise InputError(f"vocab_size is {vocab_size}, expected at least 3: padding, unknown and one word")
        what = name or "the data"
        labels = sorted(str(label) for label in table["label"].unique())
        shown = ", ".join(map(repr, labels[:5])) + (", ..." if len(labels) > 5 else "")
        if state is None and len(labels) != 2:
            raise InputError(f"{what} has {len(labels)} different labels ({shown}), expected two")
        if state is not None and not set(labels) <= set(state["labels"]):
            raise InputError(f"{what} has the labels {shown}, but the checkpoint was trained on {state['labels']}")
        tested = tested_of(len(table), test_fraction)
        if tested == len(table) and test_fraction < 1:
            raise InputError(f"{what} has {len(table)} texts, expected at least 2: one to train on and one to test on")

        # one fixed order whatever the seed of the training: a resumed training must not have seen its test texts
        order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
        texts = [tokenize(text) for text in table["text"]]
        trained = order[tested:]
        if state is None:
            words = collections.Counter(word for i in trained.tolist() for word in texts[i])
            frequent = sorted(words, key=lambda word: (-words[word], word))[: vocab_size - 2]
            state = {"vocabulary": ["<padding>", "<unknown>", *frequent], "labels": labels}
        self.name, self.state, self.test_fraction = name, state, test_fraction
        number = {word: i for i, word in enumerate(state["vocabulary"])}
        rows = [torch.tensor([number.get(word, UNKNOWN) for word in text] or [UNKNOWN]) for text in texts]
        target = [[float(str(label) == state["labels"][1])] for label in table["label"]]
        examples = Examples(
            (
                nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING),
                torch.tensor([len(row) for row in rows]),
            ),
            torch.tensor(target),
        )
        self.train, self.test = examples[trained], examples[order[:tested]]
        positive = float(self.test.target.mean())
        self.baselines = {"majority": max(positive, 1 - positive)}

    def build(self, config: Config) -> nn.Module:
        return BiLSTMClassifier(
            len(self.state["vocabulary"]),
            config.embed_dim,
            config.hidden_size,
            config.fc_hidden_size,
            backend=config.backend,
        )

    def forward(self, model: nn.Module, batch: Examples) -> Tensor:
        text, lengths = batch.inputs
        return model(text[:, : int(lengths.max())], lengths)  # padding that the whole batch shares is left out

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy(output, target)

    def score(self, output: Tensor, target: Tensor) -> float:
        return float(((output > 0.5) == (target > 0.5)).float().mean())


class Training:
    """A model and its optimizer after ``epoch`` epochs of ``task``, with the loss of each step.

    Args:
        checkpoint: of :meth:`checkpoint` or :func:`load_checkpoint`, to go on from; by default the weights come from
            ``config.seed``.

    Raises:
        InputError: no memory holds such a model, or the checkpoint does not fit its own configuration.
    """

    def __init__(self, task: Task, config: Config, checkpoint: dict[str, Any] | None = None):
        self.task, self.config = task, config
        torch.manual_seed(config.seed)
        try:
            self.model = task.build(config).to(config.device)
        except (RuntimeError, MemoryError, ValueError) as error:
            # torch has no exception of its own for what no memory holds, and its message is about its allocator
            gigabytes = 4 * config.hidden_size**2 // 10**9
            reason = f"its weights take more than {gigabytes} GB" if gigabytes else one_line(error)
            raise InputError(f"no model of hidden_size {config.hidden_size} can be made ({reason})") from None
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr)
        self.train, self.test = task.train.to(config.device), task.test.to(config.device)
        self.epoch = 0
        self.losses: list[float] = []
        self.seconds: list[float] = []
        if checkpoint is not None:
            try:
                self.model.load_state_dict(checkpoint["model"])
                # a copy: the optimizer would go on in the tensors of the training that made the checkpoint
                self.optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))
            except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
                raise InputError(f"the checkpoint does not fit its own configuration ({one_line(error)})") from None
            for group in self.optimizer.param_groups:
                group["lr"] = config.lr
            self.epoch = checkpoint["epoch"]
            self.losses = list(checkpoint["losses"])

    @functools.cached_property
    def examples(self) -> str:
        """What is trained on: a hash."""
        digest = hashlib.sha256()
        for tensor in (*self.task.train.inputs, self.task.train.target):
            digest.update(f"{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()

    @property
    def steps(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-len(self.train) // self.config.batch_size)

    def run_epoch(self) -> Iterator[float]:
        """Trains an epoch, handing out the loss of each step. The time between the steps is not counted.

        Raises:
            InputError: the model's output is not finite any more.
        """
        generator = torch.Generator().manual_seed(self.config.seed + self.epoch)
        self.model.train()
        seconds = 0.0
        for index in torch.randperm(len(self.train), generator=generator).split(self.config.batch_size):
            start = time.perf_counter()
            batch = self.train[index]
            output = self.task.forward(self.model, batch)
            if not output.isfinite().all():  # binary_cross_entropy would raise on NaN, or kill the process on a GPU
                raise InputError(
                    f"the model's output is no longer finite in epoch {self.epoch + 1}: "
                    f"train with a learning rate below {self.config.lr:g}, or look for huge values in the data"
                )
            loss = self.task.loss(output, batch.target)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            value = loss.item()  # waits for a GPU too
            seconds += time.perf_counter() - start
            self.losses.append(value)
            yield value
        self.epoch += 1
        self.seconds.append(seconds)

    def predict(self) -> Tensor:
        """The model's output for the test examples, (N, 1)."""
        self.model.eval()
        with torch.inference_mode():
            parts = [self.task.forward(self.model, self.test[i : i + 256]) for i in range(0, len(self.test), 256)]
        return torch.cat(parts)

    def evaluate(self) -> float:
        """The task's metric for the test examples: RMSE in the unit of the series, or accuracy from 0 to 1."""
        return self.task.score(self.predict(), self.test.target)

    def checkpoint(self) -> dict[str, Any]:
        """Plain containers, numbers, strings and tensors only: ``torch.load(..., weights_only=True)`` reads it."""
        return {
            "format": CHECKPOINT_FORMAT,
            "config": dataclasses.asdict(self.config),
            "task": self.task.state,
            "data": self.task.name,
            "examples": self.examples,
            "test_fraction": self.task.test_fraction,
            "epoch": self.epoch,
            "losses": self.losses,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def save(self, path: Path) -> None:
        """Replaces ``path`` as a whole: whoever stops the process finds the checkpoint before or after, never half."""
        content = io.BytesIO()  # on a full disk torch.save itself would speak of positions in an archive
        torch.save(self.checkpoint(), content)
        with replacing(path) as file:
            file.write(content.getbuffer())


def _is_whole(value: Any, low: int, high: int = 2**31 - 1) -> bool:
    return type(value) is int and low <= value <= high


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _values(checkpoint: dict[str, Any]) -> Iterator[tuple[str, Any, bool, str]]:
    """Of each value in a checkpoint: its name, itself, whether it is as expected, and what is expected."""
    config, state = checkpoint["config"], checkpoint["task"]
    for field in dataclasses.fields(Config):
        name, value = field.name, config[field.name]
        if name == "seed":
            yield name, value, _is_whole(value, 0, 2**63 - 1), "a whole number from 0"
        elif field.type == "int":
            yield name, value, _is_whole(value, 1), "a whole number from 1"
        elif field.type == "float":
            yield name, value, _is_number(value) and 0 < value < math.inf, "a positive number"
        else:
            yield name, value, isinstance(value, str), "a text"
    if config["task"] == "regressor":
        for name, value in state.items():
            yield name, value, _is_number(value) and abs(value) <= sys.float_info.max, "a finite number"
    else:
        yield "vocabulary", state["vocabulary"], _are_texts(state["vocabulary"]), "a list of words"
        labels = state["labels"]
        yield "labels", labels, _are_texts(labels) and len(labels) == 2, "two labels"
    for name in ("data", "examples"):
        yield name, checkpoint[name], isinstance(checkpoint[name], str), "a text"
    fraction = checkpoint["test_fraction"]
    yield "test_fraction", fraction, _is_number(fraction) and 0 < fraction < 1, "a number between 0 and 1"
    epoch, losses = checkpoint["epoch"], checkpoint["losses"]
    yield "epoch", epoch, _is_whole(epoch, 0), "a whole number from 0"
    yield "losses", losses, isinstance(losses, list) and all(map(_is_number, losses)), "a list of numbers"
    for name in ("model", "optimizer"):
        yield name, checkpoint[name], isinstance(checkpoint[name], dict), "a table"


def load_checkpoint(path: Path, task: str) -> dict[str, Any]:
    """What :meth:`Training.save` wrote, on the CPU.

    Raises:
        InputError: no such file; truncated, or not a checkpoint of ``task`` written by this package.
    """
    try:
        data = path.read_bytes()  # first: the errors of the file are not those of what it holds
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    try:
        checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        # torch.load has no exception of its own: UnpicklingError, RuntimeError, EOFError, KeyError, ... by the damage
        raise InputError(f"{path} is damaged or not a checkpoint ({one_line(error)})") from None
    keys = {"format", "config", "task", "data", "examples", "test_fraction", "epoch", "losses", "model", "optimizer"}
    if not isinstance(checkpoint, dict) or set(checkpoint) != keys or checkpoint["format"] != CHECKPOINT_FORMAT:
        raise InputError(f"{path} is not a checkpoint of rnn_ext ({CHECKPOINT_FORMAT!r})")
    held = {"regressor": {"mean", "std"}, "classifier": {"vocabulary", "labels"}}[task]
    config, state = checkpoint["config"], checkpoint["task"]
    if not (isinstance(config, dict) and isinstance(state, dict) and all(isinstance(name, str) for name in config)):
        raise InputError(f"{path} is damaged: its configuration or its task is no table")
    unknown = set(config) ^ {field.name for field in dataclasses.fields(Config)}
    if unknown:
        raise InputError(f"{path} is of another version of rnn_ext, which configures {', '.join(sorted(unknown))}")
    if config["task"] != task:
        raise InputError(f"{path} is a checkpoint of a {config['task']}, expected one of a {task}")
    if set(state) != held:
        raise InputError(
            f"{path} is damaged: expected {', '.join(sorted(held))} of its task, got {sorted(map(str, state))}"
        )
    for name, value, good, expected in _values(checkpoint):
        if not good:
            found = " ".join(reprlib.repr(value).split())
            raise InputError(f"{path} is not a checkpoint of a {task}: {name} is {found}, expected {expected}")
    return checkpoint
