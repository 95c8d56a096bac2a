"""python -m rnn_ext: what it prints, writes and returns, and one sentence for each mistake."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for package in ("matplotlib", "pandas", "rich"):
    pytest.importorskip(package)

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from util import refused  # noqa: E402

import rnn_ext  # noqa: E402
from rnn_ext import __main__, _options, by_hand, datasets, demo, ops, plots, training  # noqa: E402
from rnn_ext.__main__ import main  # noqa: E402

ROOT = Path(__file__).parents[1]
needs_kernels = pytest.mark.skipif(not ops.is_available(), reason="the kernels are not built")
REGRESSOR = ["train", "regressor", "--window", "6", "--hidden-size", "4", "--batch-size", "16"]
CLASSIFIER = ["train", "classifier", "--hidden-size", "4", "--batch-size", "8"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """No test writes elsewhere, nor reads the user's cache, nor the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RNN_EXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")

    def offline(folder):
        raise datasets.FetchError("pip could not download vaderSentiment==3.3.2 (no network)")

    monkeypatch.setattr(datasets.movie_reviews, "__defaults__", (offline, lambda text: None))


@pytest.fixture
def series():
    Path("level.csv").write_text("month,level\n" + "".join(f"m{i},{10 + i % 7}\n" for i in range(60)))
    return ["--data", "level.csv"]


@pytest.fixture
def reviews():
    rows = ["a fine film,1", "i loved it,1", "a dull film,0", "no no,0"] * 10
    Path("reviews.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    return ["--data", "reviews.csv"]


def fails(capsys, argv: list[str]) -> str:
    return refused(main, argv, capsys)


def score(text: str) -> float:
    line = next(line for line in text.splitlines() if line.startswith(("RMSE", "accuracy")))
    return float(line.split()[1])


# ---------------------------------------------------------------------------------------------------------------- train


def test_train_evaluate_resume_regressor(capsys, series):
    assert main([*REGRESSOR, *series, "--epochs", "3"]) == 0
    out = capsys.readouterr().out
    assert "epoch 3/3" in out and "saved to rnn_ext_regressor.pt" in out and "after 3 epochs (last value " in out
    trained = score(out)

    assert main([*REGRESSOR, *series, "--evaluate"]) == 0
    assert score(capsys.readouterr().out) == trained

    assert main(["train", "regressor", *series, "--resume", "--epochs", "5"]) == 0
    resumed = score(capsys.readouterr().out)
    assert main([*REGRESSOR, *series, "--epochs", "5", "--checkpoint", "through.pt"]) == 0
    assert score(capsys.readouterr().out) == resumed
    one, other = (torch.load(name, weights_only=True) for name in ("rnn_ext_regressor.pt", "through.pt"))
    assert one["epoch"] == 5 and one["losses"] == other["losses"] and one["config"] == other["config"]
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])

    assert main(["train", "regressor", *series, "--resume"]) == 0
    assert "has been trained for 5 epochs already; --epochs 6 would go on" in capsys.readouterr().out


def test_train_evaluate_resume_classifier(capsys, reviews):
    options = [*CLASSIFIER, *reviews, "--lr", "0.02", "--cell", "lstm"]
    assert main([*options, "--epochs", "15"]) == 0
    out = capsys.readouterr().out
    assert "accuracy 1.0000 on 8 test examples after 15 epochs (majority 0." in out
    assert main(["train", "classifier", *reviews, "--evaluate", "--test-fraction", "1"]) == 0
    assert "accuracy 1.0000 on 40 test examples" in capsys.readouterr().out
    assert main(["train", "classifier", *reviews, "--resume", "--epochs", "16"]) == 0
    checkpoint = torch.load("rnn_ext_classifier.pt", weights_only=True)
    assert checkpoint["epoch"] == 16 and checkpoint["task"]["labels"] == ["0", "1"]
    assert checkpoint["config"]["lr"] == 0.02 and "film" in checkpoint["task"]["vocabulary"]


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_cells_and_seeds(capsys, series, cell):
    scores = []
    for i, seed in enumerate("112"):
        options = ["--cell", cell, "--epochs", "1", "--seed", seed, "--checkpoint", f"{i}.pt"]
        assert main([*REGRESSOR, *series, *options]) == 0
        scores.append(score(capsys.readouterr().out))
    assert scores[0] == scores[1] != scores[2]
    assert torch.load("0.pt", weights_only=True)["config"]["cell"] == cell


@needs_kernels
def test_backends_agree(capsys, series):
    scores = []
    for backend in ("native", "custom", "auto"):
        assert main([*REGRESSOR, *series, "--epochs", "2", "--backend", backend, "--checkpoint", f"{backend}.pt"]) == 0
        scores.append(score(capsys.readouterr().out))
    assert scores[0] == pytest.approx(scores[1], abs=1e-3) and scores[0] == pytest.approx(scores[2], abs=1e-3)
    resume = ["--resume", "--checkpoint", "custom.pt", "--epochs", "3", "--backend", "native"]
    assert main(["train", "regressor", *series, *resume]) == 0


def test_built_in_series(capsys):
    assert main(["train", "regressor", "--epochs", "1"]) == 0
    assert "on 142 test examples after 1 epoch (last value 1.167, linear AR 0.5033)" in capsys.readouterr().out


@pytest.mark.parametrize("size", [1e-6, 1e150])
def test_scores_have_four_digits(capsys, size):
    Path("level.csv").write_text("level\n" + "".join(f"{(i % 7) * size}\n" for i in range(60)))
    assert main([*REGRESSOR, "--data", "level.csv", "--epochs", "1"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("RMSE"))
    assert re.match(r"RMSE \d(\.\d{1,3})?e[+-]\d+ on", line) and 0.1 < score(line) / size < 10


def test_an_existing_file_is_not_overwritten(capsys, series):
    data = Path("level.csv").read_bytes()
    expected = "error: level.csv exists: --resume goes on from it, --checkpoint names another\n"
    assert fails(capsys, [*REGRESSOR, *series, "--checkpoint", "level.csv"]) == expected
    assert Path("level.csv").read_bytes() == data
    assert main([*REGRESSOR, *series, "--epochs", "1"]) == 0
    trained = Path("rnn_ext_regressor.pt").read_bytes()
    capsys.readouterr()
    assert "rnn_ext_regressor.pt exists: " in fails(capsys, [*REGRESSOR, *series, "--epochs", "1"])
    assert Path("rnn_ext_regressor.pt").read_bytes() == trained


def test_regressor_goes_on_with_its_own_data(capsys, series):
    path = Path("rnn_ext_regressor.pt")
    assert main([*REGRESSOR, *series, "--epochs", "1"]) == 0
    before = path.read_bytes()
    capsys.readouterr()
    start = "error: rnn_ext_regressor.pt was trained on level.csv (column 'level'), got "
    again = ["train", "regressor", "--epochs", "2"]
    for option in ("--resume", "--evaluate"):
        assert fails(capsys, [*again, option]) == start + "El Niño: name the file with --data\n"
    Path("other.csv").write_text(Path("level.csv").read_text().replace("level", "depth"))
    expected = start + "other.csv (column 'depth'): --resume needs the same data\n"
    assert fails(capsys, [*again, "--resume", "--data", "other.csv"]) == expected
    assert path.read_bytes() == before

    # a model may be tested on new data
    assert main([*again, "--evaluate", "--data", "other.csv"]) == 0
    expected = "was trained on level.csv (column 'level'), this is other.csv (column 'depth')\n"
    assert expected in capsys.readouterr().out

    Path("folder").mkdir()
    Path("level.csv").rename("folder/level.csv")
    assert main([*again, "--resume", "--data", "folder/level.csv"]) == 0


@pytest.mark.parametrize("task", ["regressor", "classifier"])
def test_goes_on_with_the_examples_trained_on(capsys, series, reviews, task):
    """Others may be those it has been tested on before."""
    options, data = (REGRESSOR, series) if task == "regressor" else (CLASSIFIER, reviews)
    file, path = Path(data[1]), Path(f"rnn_ext_{task}.pt")
    assert main([*options, *data, "--epochs", "1"]) == 0
    before, text = path.read_bytes(), file.read_text()
    capsys.readouterr()
    again = ["train", task, "--resume", "--epochs", "2", *data]
    error = f"error: {path} was trained on other examples: --resume needs the same data and --test-fraction\n"
    assert fails(capsys, [*again, "--test-fraction", "0.5"]) == error
    header, *rows = text.splitlines()
    file.write_text("\n".join([header, *rows[2:], *rows]))
    assert fails(capsys, again) == error
    assert path.read_bytes() == before
    warning = f"{path} was trained on other examples of"
    assert main(["train", task, "--evaluate", *data]) == 0
    assert warning in capsys.readouterr().out
    file.write_text(text)
    assert main(again) == 0


@pytest.mark.parametrize("task", ["regressor", "classifier"])
def test_evaluates_on_what_it_has_not_been_trained_on(capsys, series, reviews, task):
    options, data = (REGRESSOR, series) if task == "regressor" else (CLASSIFIER, reviews)
    assert main([*options, *data, "--epochs", "1", "--test-fraction", "0.4"]) == 0
    *_, trained = capsys.readouterr().out.splitlines()
    assert main(["train", task, "--evaluate", *data]) == 0
    assert capsys.readouterr().out.splitlines() == [trained]
    assert main(["train", task, "--evaluate", *data, "--test-fraction", "1"]) == 0
    assert "it may have been trained on some that it is tested on here" in capsys.readouterr().out


def test_classifier_goes_on_with_its_own_data(capsys, reviews):
    assert main([*CLASSIFIER, *reviews, "--epochs", "1"]) == 0
    capsys.readouterr()
    expected = "was trained on reviews.csv (columns 'text', 'label'), got the movie reviews: name the file with --data"
    assert expected in fails(capsys, ["train", "classifier", "--resume"])


def test_own_columns(capsys):
    Path("t.csv").write_text("a,b\n" + "".join(f"{i},{i % 5}\n" for i in range(40)))
    assert main([*REGRESSOR, "--data", "t.csv", "--column", "b", "--epochs", "1"]) == 0
    Path("u.csv").write_text("review,stars\n" + "good one,5\nbad one,1\n" * 6)
    argv = [*CLASSIFIER, "--data", "u.csv", "--text-column", "review", "--label-column", "stars", "--epochs", "1"]
    assert main(argv) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cell", "elman"], "argument --cell: invalid choice: 'elman' (choose from "),
        (["--backend", "cudnn"], "argument --backend: invalid choice: 'cudnn' (choose from "),
        (["--device", "gpu"], "--device gpu cannot be used"),
        (["--device", "meta"], "--device meta cannot be used"),
        (["--epochs", "0"], "argument --epochs: 0 is not between 1 and 2147483647"),
        (["--epochs", "many"], "argument --epochs: 'many' is not a whole number"),
        (["--batch-size", "-3"], "argument --batch-size: -3 is not between 1 and"),
        (["--batch-size", "9" * 20], f"argument --batch-size: {'9' * 20} is not between 1 and"),
        (["--hidden-size", "1.5"], "argument --hidden-size: '1.5' is not a whole number"),
        (["--hidden-size", "9" * 22], f"argument --hidden-size: {'9' * 22} is not between 1 and"),
        (
            ["--hidden-size", "10000000"],
            "no model of hidden_size 10000000 can be made (its weights take more than 400000 GB)",
        ),
        (["--lr", "abc"], "argument --lr: 'abc' is not a number"),
        (["--lr", "nan"], "argument --lr: nan is not above 0"),
        (["--lr", "0"], "argument --lr: 0 is not above 0"),
        (["--seed", "-1"], "argument --seed: -1 is not between 0 and"),
        (["--test-fraction", "1.5"], "argument --test-fraction: 1.5 is not above 0 and at most 1"),
        (["--test-fraction", "1"], "--test-fraction 1 leaves nothing to train on"),
        (["--window", "60"], "level.csv (column 'level') has 60 values: a window of 60 needs at least 62"),
        (["--column", "depth"], "level.csv has no column 'depth'"),
        (["--resume"], "rnn_ext_regressor.pt: no such checkpoint"),
        (["--evaluate", "--checkpoint", "level.csv"], "level.csv is damaged or not a checkpoint"),
        (["--surprise"], "unrecognized arguments: --surprise"),
        (["--checkpoint", "level.csv/model.pt"], "level.csv/model.pt cannot be written: "),
        (["--checkpoint", "/proc/model.pt"], "/proc/model.pt cannot be written: /proc takes no file ("),
    ],
)
def test_bad_options(capsys, series, options, message):
    argv = ["train", "regressor", *series, *options]
    assert message in fails(capsys, argv)
    assert not Path("rnn_ext_regressor.pt").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(capsys, series):
    assert "--device cuda cannot be used" in fails(capsys, ["train", "regressor", *series, "--device", "cuda"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("level\n1\n\n3\n", "bad.csv, row 3 (the header is row 1), column 'level' is empty: expected a finite number"),
        (
            "level\n1\ntwo\n",
            "bad.csv, row 3 (the header is row 1), column 'level' holds 'two': expected a finite number",
        ),
        ("", "bad.csv is empty"),
        ("level\n1\n2\n3\n", "bad.csv (column 'level') has 3 values: a window of 24 needs at least 26"),
        ("\nlevel\n1\n", "bad.csv begins with a blank line, expected a header row"),
        ("month;level\nm0;1\n", "bad.csv has the one column 'month;level': expected cells separated by commas"),
        (
            "month;level\nm0;1,5\n",
            "bad.csv: the rows have more cells than the header, expected commas between cells and points",
        ),
        (
            "level\n" + "3e301\n-2e301\n" * 30,
            "bad.csv (column 'level') has values too large to be normalised (up to 3e+301)",
        ),
        (
            "level\n" + "3e-180\n-2e-180\n" * 30,
            "bad.csv (column 'level') has values too small to be normalised (up to 3e-180)",
        ),
        (  # of which only the test's part is
            "level\n" + "1\n2\n" * 30 + "1e300\n",
            "bad.csv (column 'level') has values too large to be normalised (up to 1e+300)",
        ),
    ],
)
def test_bad_data(capsys, text, message):
    Path("bad.csv").write_text(text)
    assert message in fails(capsys, ["train", "regressor", "--data", "bad.csv"])


def test_bad_classifier_options(capsys, reviews):
    assert "invalid choice: 'gru'" in fails(capsys, [*CLASSIFIER, *reviews, "--cell", "gru"])
    assert "no column 'stars'" in fails(capsys, [*CLASSIFIER, *reviews, "--label-column", "stars"])
    assert "no network" in fails(capsys, CLASSIFIER)
    assert "argument --vocab-size: 2 is not between 3 and" in fails(capsys, [*CLASSIFIER, "--vocab-size", "2"])


def test_bad_checkpoints(capsys, series, reviews):
    assert main([*REGRESSOR, *series, "--epochs", "1"]) == 0
    capsys.readouterr()
    resume = ["train", "regressor", *series, "--resume"]
    expected = "rnn_ext_regressor.pt was trained with --hidden-size 4, not 5"
    assert expected in fails(capsys, [*resume, "--hidden-size", "5"])
    assert "was trained with --cell rnn, not gru" in fails(capsys, [*resume, "--cell", "gru"])
    assert "was trained with --window 6, not 7" in fails(capsys, [*resume, "--window", "7"])
    assert "was trained with --num-layers 2, not 1" in fails(capsys, [*resume, "--num-layers", "1"])
    argv = ["train", "classifier", *reviews, "--resume", "--checkpoint", "rnn_ext_regressor.pt"]
    assert "is a checkpoint of a regressor, expected one of a classifier" in fails(capsys, argv)
    checkpoint = torch.load("rnn_ext_regressor.pt", weights_only=True)
    for changed, message in (
        ({"config": checkpoint["config"] | {"depth": 3}}, "is of another version of rnn_ext, which configures depth"),
        ({"model": {1: 2}}, "the checkpoint does not fit its own configuration"),
        ({"optimizer": {}}, "the checkpoint does not fit its own configuration"),
    ):
        torch.save(checkpoint | changed, "changed.pt")
        assert message in fails(capsys, [*resume, "--checkpoint", "changed.pt"])
    data = Path("rnn_ext_regressor.pt").read_bytes()
    Path("rnn_ext_regressor.pt").write_bytes(data[:-100])
    assert "rnn_ext_regressor.pt is damaged or not a checkpoint" in fails(capsys, resume)


def test_a_vocabulary_that_a_checkpoint_lacks(capsys, reviews):
    assert main([*CLASSIFIER, *reviews, "--epochs", "1", "--vocab-size", "9"]) == 0
    capsys.readouterr()
    expected = "rnn_ext_classifier.pt was trained with --vocab-size 9, not 8"
    assert expected in fails(capsys, ["train", "classifier", *reviews, "--resume", "--vocab-size", "8"])


def test_picture_of_a_forecast(monkeypatch, series):
    """What was measured, what the model said, and what both it and the last month are wrong by."""
    level = datasets.read_series(Path("level.csv"), "level")
    config = training.Config("regressor", window=6, hidden_size=4, backend="native")
    run = training.Training(training.Forecasting(level, 6), config)
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    plots.forecast(Path("forecast.png"), run)
    top, bottom = drawn[0].axes
    measured, said = (line.get_ydata() for line in top.lines)
    count = len(run.task.test)
    assert len(measured) == count > 5
    np.testing.assert_allclose(measured, level[-count:], rtol=1e-6)
    wrong = said - level[-count:].to_numpy()
    rmse = float(np.sqrt(np.square(wrong).mean()))
    assert rmse == pytest.approx(run.evaluate(), rel=1e-5)
    assert top.lines[1].get_label() == f"forecast one month ahead, RMSE {rmse:.2f} °C"
    np.testing.assert_allclose(bottom.lines[1].get_ydata(), wrong, atol=1e-5)
    (filled,) = bottom.collections
    of_last = filled.get_paths()[0].get_extents()
    change = -level.diff()[-count:].to_numpy()
    assert (of_last.ymin, of_last.ymax) == pytest.approx((change.min(), change.max()), abs=1e-5)


def test_custom_backend_without_kernels(capsys, series, monkeypatch):
    monkeypatch.setattr(ops, "is_available", lambda: False)
    monkeypatch.setattr(ops, "load_error", lambda: "the library is gone; run: make it")
    expected = "--backend custom cannot be used: the library is gone; run: make it"
    assert expected in fails(capsys, [*REGRESSOR, *series, "--backend", "custom"])


def test_diverging_keeps_the_last_checkpoint(capsys, series, monkeypatch):
    path = Path("rnn_ext_regressor.pt")
    assert main([*REGRESSOR, *series, "--epochs", "1"]) == 0
    before = path.read_bytes()
    capsys.readouterr()
    monkeypatch.setattr(training.Forecasting, "forward", lambda self, model, batch: model(*batch.inputs) / 0)
    message = fails(capsys, ["train", "regressor", *series, "--resume", "--epochs", "4"])
    assert "no longer finite in epoch 2" in message
    assert path.read_bytes() == before


def test_two_trainings_in_one_file(capsys, series, monkeypatch):
    """The second to save stops instead of replacing what the first has saved."""

    class Other(training.Training):
        def run_epoch(self):
            yield from super().run_epoch()
            if self.epoch == 2:
                Path("rnn_ext_regressor.pt").write_bytes(b"of somebody else")

    monkeypatch.setattr(training, "Training", Other)
    arguments = [*REGRESSOR, *series, "--epochs"]
    text = "rnn_ext_regressor.pt has been written by somebody else meanwhile: --checkpoint names another"
    assert text in fails(capsys, [*arguments, "3"])
    assert Path("rnn_ext_regressor.pt").read_bytes() == b"of somebody else"


def test_interrupted(capsys, series, monkeypatch):
    def run_epoch(self):
        if self.epoch == 1:
            raise KeyboardInterrupt
        yield from original(self)

    original = training.Training.run_epoch
    monkeypatch.setattr(training.Training, "run_epoch", run_epoch)
    assert main([*REGRESSOR, *series, "--epochs", "3"]) == 130
    expected = "stopped in epoch 2: rnn_ext_regressor.pt holds what was trained before (--resume goes on)\n"
    assert capsys.readouterr().err == expected
    assert torch.load("rnn_ext_regressor.pt", weights_only=True)["epoch"] == 1

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "run_epoch", original)
        patch.setattr(training.Training, "save", interrupt)
        assert main(["train", "regressor", *series, "--resume", "--epochs", "3"]) == 130
        assert capsys.readouterr().err == expected
        assert main([*REGRESSOR, *series, "--checkpoint", "new.pt"]) == 130
        assert capsys.readouterr().err == "stopped in epoch 1\n"

    monkeypatch.setattr(training.Training, "run_epoch", interrupt)
    assert main([*REGRESSOR, *series, "--checkpoint", "new.pt"]) == 130
    assert capsys.readouterr().err == "stopped in epoch 1\n"
    monkeypatch.setattr("rnn_ext.demo.main", interrupt)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "stopped\n"
    monkeypatch.setattr("rnn_ext.bench.main", interrupt)
    assert main(["bench"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_where_a_checkpoint_can_go(capsys, series, tmp_path):
    """Said before the training, and no device or link is replaced."""
    Path("folder").mkdir()
    train = [*REGRESSOR, *series, "--epochs", "1", "--checkpoint"]
    assert "folder is a folder, expected the name of a file" in fails(capsys, [*train, "folder"])
    assert "is a folder, expected the name of a file" in fails(capsys, [*train, ""])
    os.mkfifo("pipe")
    assert "pipe is a device, expected the name of a file" in fails(capsys, [*train, "pipe"])
    assert Path("pipe").is_fifo()
    Path("link.pt").symlink_to("real.pt")
    assert main([*train, "link.pt"]) == 0
    assert Path("link.pt").is_symlink() and torch.load("real.pt", weights_only=True)["epoch"] == 1
    capsys.readouterr()
    for name in ("run[lr=0.01].pt", "a[/b].pt"):
        assert main([*train, name]) == 0
        assert f"saved to {name}\n" in capsys.readouterr().out
        assert Path(name).is_file()


@contextlib.contextmanager
def full_disk():
    """As good as: no file grows above 4 KB, and no module is compiled to half of one. Not a fixture, which would hold
    for pytest's own output too."""
    limits, compiles = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        sys.dont_write_bytecode = compiles


def test_full_disk(capsys, series):
    with full_disk():
        message = fails(capsys, [*REGRESSOR, *series, "--epochs", "1"])
    assert message == "error: rnn_ext_regressor.pt cannot be written (File too large)\n"
    assert [path.name for path in Path().iterdir()] == ["level.csv"]


def test_terminals_of_few_letters():
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONIOENCODING"}
    environ |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "rnn_ext", "train", "regressor", "-h"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0 and "El Ni?o" in done.stdout, done.stderr


def test_a_reader_that_has_seen_enough():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "rnn_ext", "doctor"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environ, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"rnn_ext {rnn_ext.__version__}\n"


# ----------------------------------------------------------------------------------------------------------------- demo


def check_png(path: Path) -> None:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") and data.endswith(b"IEND\xaeB`\x82")
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert width == 1200 and 300 <= height <= 800
    assert 10_000 < len(data) < 200_000


@needs_kernels
def test_demo_quick_with_reviews(capsys, monkeypatch):
    rows = [("a fine film", 1), ("i loved it", 1), ("a dull film", 0), ("no no", 0)] * 30
    table = pd.DataFrame(rows, columns=["text", "label"])
    monkeypatch.setattr(datasets, "movie_reviews", lambda note: table)
    assert main(["demo", "--quick", "--out", "plots"]) == 0
    out = capsys.readouterr().out
    assert "by hand" in out and "-0.351980 +0.525252" in out  # the first timestep of the seed's exercise
    results = json.loads(Path("plots/results.json").read_text(encoding="utf-8"))
    assert results["by_hand_difference"] < 1e-6
    assert results["machine"]["instructions"] == ops.cpu_capability()
    forecast, sentiment = results["tasks"].values()
    assert forecast["metric"] == "RMSE" and sentiment["metric"] == "accuracy"
    for task in (forecast, sentiment):
        assert task["largest_loss_difference"] < 1e-3
        assert task["native"]["train_loss"] == pytest.approx(task["custom"]["train_loss"], rel=1e-3)
        assert task["native"]["epochs"] == task["custom"]["epochs"] == 2
        ratio = task["native"]["seconds_per_epoch"] / task["custom"]["seconds_per_epoch"]
        assert task["speed_up"] == pytest.approx(ratio)
        assert f"{task['speed_up']:.2f}x" in out and f"{task['largest_loss_difference']:.1e}" in out
    assert forecast["baselines"]["last value"] == pytest.approx(1.1671, abs=1e-3)
    assert "1.167" in out and "0.503" in out
    for name in ("forecast.png", "losses.png", "epoch_time.png"):
        check_png(Path("plots", name))


@needs_kernels
def test_demo_offline_goes_on(capsys):
    assert main(["demo", "--quick"]) == 0
    out = capsys.readouterr().out
    assert "Left out: pip could not download" in out
    assert "python -m rnn_ext train classifier --data my.csv" in out
    assert list(json.loads(Path("rnn_ext_demo/results.json").read_text(encoding="utf-8"))["tasks"]) == [
        "El Niño, tanh-RNN"
    ]
    check_png(Path("rnn_ext_demo/losses.png"))


def test_demo_without_kernels(capsys, monkeypatch):
    monkeypatch.setattr(ops, "is_available", lambda: False)
    monkeypatch.setattr(ops, "load_error", lambda: "the library is gone; run: make it")
    assert main(["demo", "--quick"]) == 1  # it could not show what it is for
    out = capsys.readouterr().out
    assert "Only torch's kernels can run: the library is gone; run: make it" in out
    (task,) = json.loads(Path("rnn_ext_demo/results.json").read_text(encoding="utf-8"))["tasks"].values()
    assert "native" in task and "custom" not in task and "speed_up" not in task


@pytest.mark.parametrize("out", ["/proc", "a_file"])
def test_where_the_demo_can_write(capsys, monkeypatch, out):
    """Said before the training."""
    monkeypatch.setattr(demo, "race", None)
    Path("a_file").touch()
    expected = f"error: {out}/forecast.png cannot be written: {Path(out).resolve()} "
    assert fails(capsys, ["demo", "--quick", "--out", out]).startswith(expected)


def test_demo_on_a_full_disk(capsys):
    with full_disk():
        message = fails(capsys, ["demo", "--quick"])
    assert message == "error: rnn_ext_demo/forecast.png cannot be written (File too large)\n"


def test_race_takes_turns_with_the_same_batches(monkeypatch):
    """Both start from the same weights, see the same batches, and take turns in going first."""
    order, batches = [], {"native": [], "auto": []}

    class Recorded(training.Training):
        def run_epoch(self):
            order.append(self.config.backend)
            return super().run_epoch()

    class Task(training.Forecasting):
        def forward(self, model, batch):
            batches[model.rnn.backend].append(batch.target.clone())
            return super().forward(model, batch)

    monkeypatch.setattr(demo, "Training", Recorded)
    monkeypatch.setattr(demo.plots, "NAMES", {"native": "one", "auto": "other"})
    config = training.Config("regressor", hidden_size=4, window=6, epochs=4, batch_size=16)
    task = Task(pd.Series(range(60), dtype=float), 6)
    runs = demo.race(task, config, ["native", "auto"], demo.Console(quiet=True))
    assert order == ["native", "auto", "auto", "native", "native", "auto", "auto", "native"]
    assert len(batches["native"]) == 4 * runs["native"].steps
    assert all(torch.equal(a, b) for a, b in zip(batches["native"], batches["auto"], strict=True))
    assert runs["native"].losses[0] == pytest.approx(runs["auto"].losses[0], rel=1e-5)


def test_measure():
    """The numbers of the table, from losses and times that are known."""

    class Run:
        def __init__(self, losses, seconds):
            self.losses, self.seconds, self.steps, self.epoch = losses, seconds, 2, 2
            self.task = training.Forecasting(pd.Series(range(60), dtype=float), 6)

        def evaluate(self):
            return self.losses[-1]

    runs = {"native": Run([4.0, 3, 2, 1], [6.0, 1, 5]), "custom": Run([4.0, 3.5, 2, 0.75], [2.0, 9, 1])}
    found = demo.measure(runs)
    assert found["largest_loss_difference"] == 0.5
    assert found["speed_up"] == 2.5  # of the medians, 5 and 2
    assert found["native"] == {
        "train_loss": 1.5,
        "RMSE": 1,
        "seconds_per_epoch": 5,
        "seconds_quartiles": [3, 5.5],
        "epochs": 2,
    }
    assert found["custom"]["train_loss"] == 1.375


def test_doubtful_times_are_pointed_out(capsys, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (9.3, 0.0, 0.0))
    main(["demo", "--quick"])
    out = capsys.readouterr().out.replace("\n", " ")
    assert out.count("do not rely on the times and speed-ups: a load of 9.3 on") == 2
    quiet = {"load": [0.9, 3, 3], "cores": 2}
    steady, uneven = ({"native": {"seconds_quartiles": quartiles}} for quartiles in ([4.0, 5.0], [4.0, 14.0]))
    assert demo.doubts({"machine": quiet, "tasks": {"A": steady}}) is None
    assert "a load of 1.1 on 2 core(s)" in demo.doubts({"machine": {**quiet, "load": [1.1, 0, 0]}, "tasks": {}})
    expected = "A by torch.nn: the middle half of the epochs took 4 to 14 s"
    assert expected in demo.doubts({"machine": quiet, "tasks": {"A": uneven}})


def test_by_hand():
    result = by_hand.compare()
    assert result.difference < 1e-6
    x, rnn = result.input, torch.nn.RNN(5, 2, batch_first=True)
    torch.testing.assert_close(by_hand.unroll(rnn, x), rnn(x.unsqueeze(0))[0][0])


# -------------------------------------------------------------------------------------------------------------- command


def run(*argv: str, **env: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(Path(ops.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *argv],
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_as_a_command():
    done = run("-m", "rnn_ext", "train", "regressor", "--data", "none.csv")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: none.csv: no such file\n")


def test_no_command(capsys):
    assert "the following arguments are required: demo|train|doctor|bench" in fails(capsys, [])
    assert "invalid choice: 'dance'" in fails(capsys, ["dance"])


def test_doctor(capsys):
    pytest.importorskip("rnn_ext.doctor")
    assert main(["doctor"]) == (0 if ops.is_available() else 1)
    out = capsys.readouterr().out
    assert torch.__version__ in out


def test_without_the_demo_packages():
    """The doctor runs without them; the rest says what to install."""
    block = "import sys; sys.modules.update(rich=None, pandas=None, matplotlib=None); "
    call = "from rnn_ext.__main__ import main; sys.exit(main(sys.argv[1:]))"
    done = run("-c", block + call, "demo")
    assert done.returncode == 2
    assert done.stderr == "error: rich is not installed; run: python -m pip install matplotlib numpy pandas rich\n"
    listed = re.search(r"^demo = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert listed.group(1).replace('"', "").replace(",", "") == __main__.DEMO_PACKAGES
    pytest.importorskip("rnn_ext.doctor")
    assert "torch" in run("-c", block + call, "doctor").stdout


@pytest.mark.parametrize("task", ["regressor", "classifier"])
def test_help_names_the_defaults(capsys, task):
    with pytest.raises(SystemExit):
        main(["train", task, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    config = training.DEFAULTS[task]
    for what in (
        f"features of the hidden state ({config.hidden_size})",
        f"those before --resume too ({config.epochs})",
        f"Adam's learning rate ({config.lr})",
        f"examples a step ({config.batch_size})",
    ):
        assert what in text


def test_numbers_at_their_limits():
    assert _options.whole_number(0, 5)("5") == 5
    with pytest.raises(argparse.ArgumentTypeError, match="inf is not positive and finite"):
        _options.positive_number()("inf")
