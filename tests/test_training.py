"""Tasks, baselines, epochs and checkpoints, on small made-up data."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

import pytest
import torch

np = pytest.importorskip("numpy")
pd = pytest.importorskip("pandas")

from rnn_ext import ops, training  # noqa: E402
from rnn_ext.datasets import InputError, el_nino  # noqa: E402
from rnn_ext.training import DEFAULTS, Forecasting, Sentiment, Training, load_checkpoint, tokenize  # noqa: E402

SINE = pd.Series(np.sin(np.arange(80) * 0.7) * 3 + 10, name="level")
SMALL = dataclasses.replace(DEFAULTS["regressor"], hidden_size=4, window=6, batch_size=16, epochs=2)
SMALL_TEXT = dataclasses.replace(DEFAULTS["classifier"], hidden_size=4, embed_dim=4, fc_hidden_size=4, batch_size=8)


def texts(count: int = 40) -> pd.DataFrame:
    words = {"good": ["a fine film", "I loved it!"], "bad": ["a dull film , really", "no"]}
    rows = [(words[label][i % 2], label) for i in range(count // 2) for label in words]
    return pd.DataFrame(rows, columns=["text", "label"])


def train(run: Training, epochs: int) -> Training:
    for _ in range(epochs):
        for _ in run.run_epoch():
            pass
    return run


def same_state(a: Training, b: Training) -> bool:
    pairs = zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs) and a.losses == b.losses and a.epoch == b.epoch


# --------------------------------------------------------------------------------------------------------- forecasting


def test_windows_and_split():
    series = pd.Series(np.arange(20.0))
    task = Forecasting(series, window=4, test_fraction=0.25)
    assert (len(task.train), len(task.test)) == (12, 4)
    # normalised with what is trained on, which ends where the test's targets begin
    assert task.state == {"mean": np.arange(16.0).mean(), "std": pytest.approx(np.arange(16.0).std())}
    torch.testing.assert_close(task.unscale(task.test.target), torch.tensor([16.0, 17, 18, 19]).double())
    first = task.unscale(task.train.inputs[0][0])
    torch.testing.assert_close(first, torch.tensor([0.0, 1, 2, 3]).double(), rtol=0, atol=1e-5)
    assert task.train.inputs[0].shape == (12, 4, 1) and task.train.target.shape == (12, 1)
    assert list(task.index) == [16, 17, 18, 19]


def test_forecasting_baselines():
    # always the last value: off by one on a line, which a linear function of the window forecasts exactly
    task = Forecasting(pd.Series(np.arange(40.0)), window=4)
    assert task.baselines["last value"] == pytest.approx(1)
    assert task.baselines["linear AR"] == pytest.approx(0, abs=1e-6)
    assert "linear AR" not in Forecasting(pd.Series(np.arange(9.0)), window=4).baselines  # fewer examples than weights


def test_el_nino_baselines():
    task = Forecasting(el_nino(), 24)
    assert (len(task.train), len(task.test)) == (566, 142)
    assert task.index[0] == pd.Timestamp("1999-03-01") and task.index[-1] == pd.Timestamp("2010-12-01")
    assert task.baselines["last value"] == pytest.approx(1.1671, abs=1e-3)
    assert task.baselines["linear AR"] == pytest.approx(0.5033, abs=1e-3)


def test_score_is_in_the_units_of_the_series():
    task = Forecasting(SINE, 6)
    output = task.test.target + 1 / task.state["std"]  # off by 1 everywhere
    assert task.score(output, task.test.target) == pytest.approx(1, rel=1e-5)


def test_constant_series():
    run = train(Training(Forecasting(pd.Series(np.full(40, 5.0)), 6), SMALL), 1)
    assert math.isfinite(run.evaluate())


@pytest.mark.parametrize("count", [0, 5, 6, 7])
def test_short_series(count):
    with pytest.raises(InputError, match=f"my.csv has {count} values: a window of 6 needs at least 8"):
        Forecasting(pd.Series(np.arange(float(count))), 6, name="my.csv")
    with pytest.raises(InputError, match="at least 7") if count < 7 else pytest.MonkeyPatch.context():
        Forecasting(pd.Series(np.arange(float(count))), 6, test_fraction=1)


@pytest.mark.parametrize("test_fraction", [0.001, 0.5, 0.999])
def test_both_parts_have_an_example(test_fraction):
    task = Forecasting(pd.Series(np.arange(8.0)), 6, test_fraction)
    assert len(task.train) == len(task.test) == 1


# ---------------------------------------------------------------------------------------------------------- classifying


def test_tokenize():
    assert tokenize("It's GOOD, isn't it?! 10/10") == ["it's", "good", "isn't", "it", "?", "!", "10", "10"]
    assert tokenize("''great''") == ["great"]
    assert tokenize("déjà-vu ...") == ["déjà", "vu"]


def test_vocabulary():
    task = Sentiment(texts(), vocab_size=100)
    assert task.state["labels"] == ["bad", "good"]
    assert task.state["vocabulary"][:2] == ["<padding>", "<unknown>"]
    assert set(task.state["vocabulary"][2:]) == {"a", "fine", "film", "i", "loved", "it", "!", "dull", "really", "no"}
    small = Sentiment(texts(), vocab_size=4)
    assert small.state["vocabulary"][2:] == task.state["vocabulary"][2:4]  # the most frequent ones
    text, lengths = small.train.inputs
    assert text.max() == 3 and text.shape == (32, 4)
    assert ((text != training.PADDING).sum(1) == lengths).all() and lengths.min() == 1
    words = task.state["vocabulary"]
    for row, label in zip(task.train.inputs[0], task.train.target, strict=True):
        read = " ".join(words[i] for i in row.tolist() if i != training.PADDING)
        assert (read, label.item()) in {("a fine film", 1), ("i loved it !", 1), ("a dull film really", 0), ("no", 0)}


def test_vocabulary_without_a_word():
    with pytest.raises(InputError, match="vocab_size is 2, expected at least 3: padding, unknown and one word"):
        Sentiment(texts(), vocab_size=2)
    assert len(Sentiment(texts(), vocab_size=3).state["vocabulary"]) == 3


def test_sentiment_split_and_baseline():
    task = Sentiment(texts(), 100)
    assert (len(task.train), len(task.test)) == (32, 8)
    positive = float(task.test.target.mean())
    assert task.baselines == {"majority": max(positive, 1 - positive)}
    assert task.score(torch.full((8, 1), 0.9), task.test.target) == pytest.approx(positive)
    again = Sentiment(texts(), 100)
    torch.testing.assert_close(task.test.inputs, again.test.inputs)  # the same texts, whatever torch's seed


def test_vocabulary_is_of_what_is_trained_on():
    table = pd.DataFrame({"text": [f"word{i}" for i in range(40)], "label": ["good", "bad"] * 20})
    task = Sentiment(table, 100)
    assert len(task.state["vocabulary"]) == 2 + 32 and (task.test.inputs[0] == training.UNKNOWN).all()
    # The split is the same in every version, for the checkpoints that are evaluated.
    assert not {f"word{i}" for i in (4, 16, 21, 5, 11, 14, 39, 29)} & set(task.state["vocabulary"])


def test_text_without_a_known_word_is_unknown():
    table = pd.concat([texts(), pd.DataFrame({"text": ["...", "zzz zzz"], "label": ["good", "bad"]})])
    state = Sentiment(texts(), 100).state
    text, lengths = Sentiment(table.tail(2), 100, test_fraction=1, state=state).test.inputs
    assert sorted(lengths.tolist()) == [1, 2] and set(text[text > 0].tolist()) == {training.UNKNOWN}


def test_batch_is_trimmed_to_its_longest():
    task = Sentiment(texts(), 100)
    seen = []

    def model(text, lengths):
        seen.append((text.shape[1], int(lengths.max())))
        return torch.full((len(text), 1), 0.5)

    short = task.train[task.train.inputs[1] == 1]
    task.forward(model, short)
    assert seen == [(1, 1)]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a"] * 4, r"my\.csv has 1 different labels \('a'\), expected two"),
        (["1", "2", "3", "4"], r"has 4 different labels \('1', '2', '3', '4'\), expected two"),
    ],
)
def test_wrong_labels(labels, message):
    with pytest.raises(InputError, match=message):
        Sentiment(pd.DataFrame({"text": ["x"] * 4, "label": labels}), 100, name="my.csv")


def test_labels_unknown_to_the_checkpoint():
    state = Sentiment(texts(), 100).state
    with pytest.raises(InputError, match=r"has the labels 'pos', but the checkpoint was trained on \['bad', 'good'\]"):
        Sentiment(pd.DataFrame({"text": ["x"], "label": ["pos"]}), 100, 1, state)


# ------------------------------------------------------------------------------------------------------------- training


def test_training_learns():
    run = train(Training(Forecasting(SINE, 6), dataclasses.replace(SMALL, hidden_size=16, lr=0.01)), 30)
    assert run.evaluate() < 0.2 * run.task.baselines["last value"]
    assert run.epoch == 30 and len(run.losses) == 30 * run.steps == 30 * 4 and len(run.seconds) == 30
    run = train(Training(Sentiment(texts(), 100), dataclasses.replace(SMALL_TEXT, lr=0.02)), 20)
    assert run.evaluate() == 1


def test_same_seed_same_training_other_seed_other():
    task = Forecasting(SINE, 6)
    one = train(Training(task, SMALL), 2)
    torch.manual_seed(123)  # torch's own generator has no say
    assert same_state(one, train(Training(task, SMALL), 2))
    assert not same_state(one, train(Training(task, dataclasses.replace(SMALL, seed=1)), 2))


def test_order_changes_from_epoch_to_epoch():
    task = Forecasting(SINE, 6)
    run = Training(task, dataclasses.replace(SMALL, lr=1e-30))  # weights stand still: losses tell the batches
    train(run, 2)
    first, second = run.losses[: run.steps], run.losses[run.steps :]
    assert first != second
    assert sum(first[:3]) != pytest.approx(sum(second[:3]))


@pytest.mark.parametrize("kind", ["regressor", "classifier"])
@pytest.mark.parametrize("backend", ["native", "custom"])
def test_resuming_equals_not_stopping(kind, backend, tmp_path):
    if backend == "custom" and not ops.is_available():
        pytest.skip(str(ops.load_error()))
    task, config = (Forecasting(SINE, 6), SMALL) if kind == "regressor" else (Sentiment(texts(), 100), SMALL_TEXT)
    config = dataclasses.replace(config, backend=backend)
    through = train(Training(task, config), 4)

    path = tmp_path / "model.pt"
    train(Training(task, config), 2).save(path)
    checkpoint = load_checkpoint(path, kind)
    assert checkpoint["epoch"] == 2 and checkpoint["task"] == task.state
    resumed = Training(task, training.Config(**checkpoint["config"]), checkpoint)
    assert resumed.evaluate() == train(Training(task, config), 2).evaluate()
    train(resumed, 2)
    assert same_state(through, resumed)


@pytest.mark.skipif(not ops.is_available(), reason="the kernels are not built")
def test_backends_agree_and_can_be_switched():
    task = Forecasting(SINE, 6)
    runs = {b: train(Training(task, dataclasses.replace(SMALL, backend=b)), 3) for b in ("native", "custom")}
    np.testing.assert_allclose(runs["native"].losses, runs["custom"].losses, rtol=1e-4, atol=1e-6)
    switched = Training(task, dataclasses.replace(SMALL, backend="custom"), runs["native"].checkpoint())
    train(switched, 1)
    np.testing.assert_allclose(switched.losses, train(runs["native"], 1).losses, rtol=1e-4, atol=1e-6)


def test_diverging_says_so():
    run = Training(Forecasting(SINE, 6), dataclasses.replace(SMALL, lr=1e30))
    with pytest.raises(InputError, match=r"no longer finite in epoch \d: train with a learning rate below 1e\+30"):
        train(run, 5)
    run = Training(Sentiment(texts(), 100), SMALL_TEXT)
    torch.nn.init.constant_(run.model.fc2.bias, math.nan)  # binary_cross_entropy alone would speak of "all elements"
    with pytest.raises(InputError, match=r"no longer finite in epoch 1"):
        train(run, 1)


def test_continuing_from_memory_leaves_the_first_training_alone():
    task = Forecasting(SINE, 6)
    first = train(Training(task, SMALL), 2)
    second = Training(task, SMALL, first.checkpoint())
    train(second, 2)
    assert len(first.losses) == 2 * first.steps
    assert same_state(train(first, 2), second)


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "model.pt"
    train(Training(Forecasting(SINE, 6), SMALL), 1).save(path)
    return path


def test_checkpoint_is_plain_data(checkpoint):
    found = torch.load(checkpoint, weights_only=True)
    assert found["config"] == dataclasses.asdict(SMALL)
    assert list(found["model"]) == list(Training(Forecasting(SINE, 6), SMALL).model.state_dict())


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_truncated_checkpoint(checkpoint, kept):
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(InputError, match=r"model\.pt is damaged or not a checkpoint \(.+\)$"):
        load_checkpoint(checkpoint, "regressor")


class Foreign:
    """Something that only an unsafe load would make."""


@pytest.mark.parametrize(
    "content", [b"hello", b"\x80\x04N.", torch.nn.RNN(1, 2), Foreign()], ids=["bytes", "pickle", "module", "foreign"]
)
def test_not_a_checkpoint(tmp_path, content):
    path = tmp_path / "model.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(InputError, match=r"model\.pt is (damaged or )?not a checkpoint") as caught:
        load_checkpoint(path, "regressor")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [{"weight": torch.ones(2)}, [1, 2], torch.ones(3), {"format": "rnn_ext training 1"}]
)
def test_foreign_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"model\.pt is not a checkpoint of rnn_ext"):
        load_checkpoint(tmp_path / "model.pt", "regressor")


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("run"),)


def test_loading_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": training.CHECKPOINT_FORMAT, "model": Malicious()}, "model.pt")
    with pytest.raises(InputError, match=r"model\.pt is damaged or not a checkpoint"):
        load_checkpoint(Path("model.pt"), "regressor")
    assert not Path("run").exists()


def test_checkpoint_of_another_task(checkpoint):
    with pytest.raises(InputError, match=r"is a checkpoint of a regressor, expected one of a classifier"):
        load_checkpoint(checkpoint, "classifier")


def test_checkpoint_that_contradicts_itself(checkpoint):
    found = load_checkpoint(checkpoint, "regressor")
    config = training.Config(**{**found["config"], "hidden_size": 5})
    with pytest.raises(InputError, match=r"does not fit its own configuration"):
        Training(Forecasting(SINE, 6), config, found)


def test_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match=r"none\.pt: no such checkpoint"):
        load_checkpoint(tmp_path / "none.pt", "regressor")


@pytest.mark.parametrize(
    ("where", "name", "value", "message"),
    [
        (None, "epoch", "x", "epoch is 'x', expected a whole number from 0"),
        (None, "epoch", -1, "epoch is -1, expected a whole number from 0"),
        (None, "losses", None, "losses is None, expected a list of numbers"),
        (None, "losses", ["x"], "losses is ['x'], expected a list of numbers"),
        (None, "model", [1], "model is [1], expected a table"),
        (None, "optimizer", 3, "optimizer is 3, expected a table"),
        (None, "data", 3, "data is 3, expected a text"),
        (None, "examples", 3, "examples is 3, expected a text"),
        ("task", "mean", "x", "mean is 'x', expected a finite number"),
        ("task", "std", math.nan, "std is nan, expected a finite number"),
        ("config", "hidden_size", "x", "hidden_size is 'x', expected a whole number from 1"),
        ("config", "batch_size", 0, "batch_size is 0, expected a whole number from 1"),
        ("config", "seed", 2**70, f"seed is {2**70}, expected a whole number from 0"),
        ("config", "lr", -1.0, "lr is -1.0, expected a positive number"),
        ("config", "cell", 1, "cell is 1, expected a text"),
    ],
)
def test_checkpoint_with_a_wrong_value(checkpoint, where, name, value, message):
    found = torch.load(checkpoint, weights_only=True)
    (found[where] if where else found)[name] = value
    torch.save(found, checkpoint)
    with pytest.raises(InputError) as caught:
        load_checkpoint(checkpoint, "regressor")
    assert str(caught.value) == f"{checkpoint} is not a checkpoint of a regressor: {message}"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("vocabulary", "words", "vocabulary is 'words', expected a list of words"),
        ("labels", ["bad"], "labels is ['bad'], expected two labels"),
    ],
)
def test_classifier_checkpoint_with_a_wrong_value(tmp_path, name, value, message):
    found = Training(Sentiment(texts(), 100), SMALL_TEXT).checkpoint()
    found["task"] = found["task"] | {name: value}
    torch.save(found, tmp_path / "model.pt")
    with pytest.raises(InputError) as caught:
        load_checkpoint(tmp_path / "model.pt", "classifier")
    assert str(caught.value).endswith(f"is not a checkpoint of a classifier: {message}")


def test_interrupted_save_keeps_the_old_checkpoint(checkpoint, monkeypatch):
    before = checkpoint.read_bytes()

    def fsync(handle):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(InputError, match=r"model\.pt cannot be written \(No space left"):
        train(Training(Forecasting(SINE, 6), SMALL), 1).save(checkpoint)
    assert checkpoint.read_bytes() == before
    assert [path.name for path in checkpoint.parent.iterdir()] == ["model.pt"]


# ------------------------------------------------------------------------------------ what is easily got a little wrong


def test_as_many_examples_as_coefficients():
    """Of a window of 4 and a constant: five determine them."""
    task = Forecasting(pd.Series(np.arange(10.0)), 4)
    assert len(task.train) == 5 and "linear AR" in task.baselines


def test_words_of_equal_frequency_are_in_order():
    table = pd.DataFrame({"text": ["d c b a"] * 4, "label": ["x", "y"] * 2})
    assert Sentiment(table, 100).state["vocabulary"][2:] == ["a", "b", "c", "d"]


def test_new_texts_of_one_label_or_without_a_word():
    state = Sentiment(texts(), 100).state
    task = Sentiment(texts().query("label == 'good'"), 100, 1, state)
    assert task.test.target.unique().tolist() == [1]
    numbers, _ = Sentiment(pd.DataFrame({"text": ["..."], "label": ["good"]}), 100, 1, state).test.inputs
    assert numbers.tolist() == [[training.UNKNOWN]]


def test_a_probability_of_a_half_is_no():
    task = Sentiment(texts(), 100)
    count = len(task.test)
    assert task.score(torch.full((count, 1), 0.5), torch.zeros(count, 1)) == 1


def test_the_seed_orders_the_examples(monkeypatch):
    seeded = torch.default_generator.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeded(0))  # the same weights
    configs = [dataclasses.replace(SMALL, seed=seed, lr=1e-30) for seed in (0, 7)]
    first, second = (list(Training(Forecasting(SINE, 6), config).run_epoch()) for config in configs)
    assert first != second


def test_an_epoch_after_an_evaluation_trains():
    run = Training(Forecasting(SINE, 6), SMALL)
    run.evaluate()
    assert not run.model.training
    next(run.run_epoch())
    assert run.model.training


def test_another_learning_rate_after_a_checkpoint():
    task = Forecasting(SINE, 6)
    checkpoint = train(Training(task, SMALL), 1).checkpoint()
    run = Training(task, dataclasses.replace(SMALL, lr=0.5), checkpoint)
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.5]


def test_seconds_of_an_epoch_are_those_of_all_steps(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(clock))
    run = Training(Forecasting(SINE, 6), SMALL)
    list(run.run_epoch())
    assert run.seconds == [run.steps]


def test_infinite_output_is_not_trained_on():
    run = Training(Forecasting(SINE, 6), SMALL)
    torch.nn.init.constant_(run.model.fc.bias, math.inf)
    with pytest.raises(InputError, match="no longer finite in epoch 1"):
        next(run.run_epoch())


def test_predictions_of_more_examples_than_are_computed_at_once():
    run = Training(Forecasting(pd.Series(np.arange(300.0)), 6, test_fraction=1), SMALL)
    run.test = run.test[:257]
    assert run.predict().shape == (257, 1)


def test_a_cell_that_there_is_not():
    with pytest.raises(InputError, match="Unknown cell 'elman'"):
        Training(Forecasting(SINE, 6), dataclasses.replace(SMALL, cell="elman"))


def test_checkpoint_at_the_ends_of_what_is_allowed(tmp_path):
    """Before the first epoch, of the largest seed."""
    Training(Forecasting(SINE, 6), dataclasses.replace(SMALL, seed=2**63 - 1)).save(tmp_path / "model.pt")
    found = load_checkpoint(tmp_path / "model.pt", "regressor")
    assert (found["epoch"], found["config"]["seed"]) == (0, 2**63 - 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["config"].update(lr=0.0), r"lr is 0\.0, expected a positive number"),
        (lambda c: c.update(epoch=True), "epoch is True, expected a whole number"),
        (lambda c: c["config"].update({1: 2, "more": 1}), "its configuration or its task is no table"),
    ],
)
def test_checkpoint_just_beyond_them(tmp_path, change, message):
    checkpoint = Training(Forecasting(SINE, 6), SMALL).checkpoint()
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "model.pt")
    with pytest.raises(InputError, match=message):
        load_checkpoint(tmp_path / "model.pt", "regressor")
