"""python -m rnn_ext demo | train | doctor | bench."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

from rnn_ext._files import InputError, check_output, one_line, version
from rnn_ext._options import Parser, guarded, positive_int, positive_number, whole_number
from rnn_ext._version import __version__

DELEGATED = {
    "doctor": "versions, compiler, instruction set, CUDA, what each backend can do, and how to mend what is wrong",
    "bench": "measure against torch.nn",
}
DEMO_PACKAGES = "matplotlib numpy pandas rich"  # as in pyproject.toml
# What the weights' shapes and their meaning depend on: a checkpoint cannot go on with another value.
FIXED = ("cell", "hidden_size", "num_layers", "window", "vocab_size")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m rnn_ext", description=__doc__)
    parser.add_argument("--version", action="version", version=f"rnn_ext {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="train both models on real data with torch's kernels and with ours")
    demo.add_argument("--out", type=Path, default=Path("rnn_ext_demo"), help="folder for the plots (%(default)s)")
    demo.add_argument("--quick", action="store_true", help="two short epochs: does it run at all?")

    train = commands.add_parser("train", help="train a model on the demo's data or on your own CSV file")
    tasks = train.add_subparsers(dest="task", required=True, metavar="regressor|classifier")
    for task, data, size, epochs, lr in (
        ("regressor", "El Niño's sea temperatures", 32, 100, 0.001),
        ("classifier", "the movie reviews", 64, 4, 0.002),
    ):
        # no option has a default here: what was not given comes from the checkpoint, or from training.DEFAULTS
        sub = tasks.add_parser(task, help=f"by default on {data}", argument_default=argparse.SUPPRESS)
        sub.add_argument("--data", type=Path, help=f"CSV file with a header row (default: {data})")
        if task == "regressor":
            sub.add_argument("--column", help="of the file (default: its only column of numbers)")
            sub.add_argument("--window", type=positive_int, help="values seen before the one to forecast (24)")
            sub.add_argument("--num-layers", type=positive_int, help="recurrent layers (2)")
            sub.add_argument("--cell", choices=["rnn", "gru", "lstm"], help="(rnn, with tanh)")
        else:
            sub.add_argument("--text-column", help="of the file (text)")
            sub.add_argument("--label-column", help="of the file; two different labels (label)")
            sub.add_argument("--vocab-size", type=whole_number(3), help="words, with padding and unknown (10000)")
            sub.add_argument("--cell", choices=["lstm"], help="the classifier's is always an LSTM")
        sub.add_argument("--hidden-size", type=positive_int, help=f"features of the hidden state ({size})")
        sub.add_argument(
            "--backend", choices=["auto", "custom", "native"], help="our kernels, torch's, or either (auto)"
        )
        sub.add_argument("--device", help="cpu, cuda, cuda:1, ... (cpu)")
        sub.add_argument("--seed", type=whole_number(0, 2**63 - 1), help="of the weights and the examples' order (0)")
        sub.add_argument("--epochs", type=positive_int, help=f"in all, those before --resume too ({epochs})")
        sub.add_argument("--batch-size", type=positive_int, help="examples a step (64)")
        sub.add_argument("--lr", type=positive_number(1000), help=f"Adam's learning rate ({lr})")
        sub.add_argument("--test-fraction", type=positive_number(1), help="share of the data only tested on (0.2)")
        sub.add_argument("--checkpoint", type=Path, help=f"where it is saved, after each epoch (rnn_ext_{task}.pt)")
        sub.add_argument("--resume", action="store_true", help="go on from --checkpoint")
        sub.add_argument("--evaluate", action="store_true", help="only test what is in --checkpoint")

    for name, text in DELEGATED.items():
        if importlib.util.find_spec(f"rnn_ext.{name}"):
            commands.add_parser(name, help=text, add_help=False)
    commands.metavar = "|".join(commands.choices)
    return parser


def train(options: dict[str, Any]) -> int:
    import torch
    from rich.console import Console

    from rnn_ext import backends, datasets
    from rnn_ext.demo import progress_bars
    from rnn_ext.training import DEFAULTS, Config, Forecasting, Sentiment, Training, load_checkpoint

    console = Console(highlight=False, markup=False)  # which would read brackets in the name of a file
    task_name = options["task"]
    path = options.get("checkpoint", Path(f"rnn_ext_{task_name}.pt"))
    resume, evaluate = options.get("resume", False), options.get("evaluate", False)
    loaded = version(path) if resume else None
    checkpoint = load_checkpoint(path, task_name) if resume or evaluate else None
    if not evaluate:
        check_output(path)
        if path.exists() and not resume:
            raise InputError(f"{path} exists: --resume goes on from it, --checkpoint names another")
    config = Config(**checkpoint["config"]) if checkpoint else DEFAULTS[task_name]
    given = {field.name: options[field.name] for field in dataclasses.fields(Config) if field.name in options}
    for name in FIXED if checkpoint else ():
        if given.get(name, getattr(config, name)) != getattr(config, name):
            option = name.replace("_", "-")
            raise InputError(f"{path} was trained with --{option} {getattr(config, name)}, not {given[name]}")
    config = dataclasses.replace(config, **given)

    try:
        probe = torch.zeros(1, device=config.device)
        probe.item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = one_line(error)
        raise InputError(f"--device {config.device} cannot be used ({reason})") from None
    supported, reason = backends.can_run_custom(probe)
    if config.backend == "custom" and not supported:
        raise InputError(f"--backend custom cannot be used: {reason}")

    file = options.get("data")
    name = "El Niño" if task_name == "regressor" else "the movie reviews"
    state = checkpoint["task"] if checkpoint else None
    trained_on = checkpoint["data"] if checkpoint else None
    fraction = options.get("test_fraction", checkpoint["test_fraction"] if checkpoint else 0.2)
    if trained_on and not file and trained_on != name:  # before the reviews are fetched
        raise InputError(f"{path} was trained on {trained_on}, got {name}: name the file with --data")
    if task_name == "regressor":
        series = datasets.read_series(file, options.get("column")) if file else datasets.el_nino()
        if file:
            name = f"{file.name} (column {series.name!r})"  # without the folder: files may be moved
        task = Forecasting(series, config.window, fraction, state, name)
    else:
        if file:
            columns = options.get("text_column", "text"), options.get("label_column", "label")
            table = datasets.read_texts(file, *columns)
            name = f"{file.name} (columns {columns[0]!r}, {columns[1]!r})"
        else:
            table = datasets.movie_reviews(note=console.print)
        task = Sentiment(table, config.vocab_size, fraction, state, name)
    if trained_on and trained_on != name:
        if not evaluate:
            raise InputError(f"{path} was trained on {trained_on}, got {name}: --resume needs the same data")
        console.print(f"{path} was trained on {trained_on}, this is {name}", soft_wrap=True)
    if not evaluate and not len(task.train):
        raise InputError("--test-fraction 1 leaves nothing to train on: it is meant for --evaluate")

    run = Training(task, config, checkpoint)
    if not evaluate:
        if checkpoint and checkpoint["examples"] != run.examples:  # tested on before, for instance
            raise InputError(f"{path} was trained on other examples: --resume needs the same data and --test-fraction")
        train_to_the_end(run, path, loaded, console, progress_bars)
    elif trained_on == name and checkpoint["examples"] != run.examples:
        was = f"{path} was trained on other examples of {name}"
        console.print(f"{was}: it may have been trained on some that it is tested on here", soft_wrap=True)
    score = run.evaluate()
    what = f"{len(task.test)} test example{'s'[: len(task.test) != 1]} after {run.epoch} epoch{'s'[: run.epoch != 1]}"
    form = ".4f" if task.metric == "accuracy" else ".4g"  # an RMSE is as large or small as the data
    beside = ", ".join(f"{name} {value:{form}}" for name, value in task.baselines.items())
    console.print(f"{task.metric} {score:{form}} on {what} ({beside})", soft_wrap=True)
    return 0


def train_to_the_end(run: Any, path: Path, written: Any, console: Any, progress_bars: Any) -> None:
    """Saves after each epoch to `path`, of which `written` is the version known."""
    epochs = run.config.epochs
    if run.epoch >= epochs:
        trained = f"{run.epoch} epoch{'s'[: run.epoch != 1]}"
        console.print(
            f"{path} has been trained for {trained} already; --epochs {run.epoch + 1} would go on", soft_wrap=True
        )
        return
    with progress_bars(console) as progress:
        bar = progress.add_task(
            "epoch", total=epochs * run.steps, completed=run.epoch * run.steps, loss=math.nan, seconds=0
        )
        while run.epoch < epochs:
            epoch = run.epoch + 1
            progress.update(bar, description=f"epoch {epoch}/{epochs}", seconds=sum(run.seconds))
            try:
                for loss in run.run_epoch():
                    progress.update(bar, advance=1, loss=loss)
                if version(path) not in (written, None):
                    raise InputError(f"{path} has been written by somebody else meanwhile: --checkpoint names another")
                run.save(path)
                written = version(path)
            except KeyboardInterrupt:
                kept = f": {path} holds what was trained before (--resume goes on)" if path.exists() else ""
                raise KeyboardInterrupt(f"stopped in epoch {epoch}{kept}") from None
    console.print(f"saved to {path}", soft_wrap=True)


def run(argv: list[str]) -> int:
    if argv and argv[0] in DELEGATED and importlib.util.find_spec(f"rnn_ext.{argv[0]}"):
        # they read their own options, and work without the packages of the demo
        return importlib.import_module(f"rnn_ext.{argv[0]}").main(argv[1:]) or 0
    options = vars(make_parser().parse_args(argv))
    try:
        from rnn_ext import demo
    except ModuleNotFoundError as error:
        missing = error.name.partition(".")[0]
        print(f"error: {missing} is not installed; run: python -m pip install {DEMO_PACKAGES}", file=sys.stderr)
        return 2
    if options["command"] == "demo":
        return demo.main(options["out"], options["quick"])
    return train(options)


def main(argv: list[str] | None = None) -> int:
    return guarded(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
