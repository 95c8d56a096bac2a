"""Layers of random shapes against torch.nn: is ours anywhere the slower one?

    python benchmarks/random_shapes.py                    one core and all: results/<machine>-random.json and .md, plot
    python benchmarks/random_shapes.py --seed 7 --threads 1 --seconds 60 --output mine.json
    RNN_EXT_CPU_CAPABILITY=avx2 python benchmarks/random_shapes.py                             both on AVX2

What run.py measures are shapes that somebody chose. These are drawn: cell, sizes (evenly on a logarithmic scale),
number of layers, directions, dtype, padded or packed, inference or training, as many as there is time for. Both compute
the same thing, which is checked first, and then take turns. Where ours is slower by more than noise it is measured a
second time, longer, and counts if it is slower again; both measurements are shown.
"""

from __future__ import annotations

import dataclasses
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peers
import run
import stored
import table
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from plot import TITLES, where
from readings import ratio
from rich.progress import Progress

from rnn_ext import bench, ops
from rnn_ext._files import check_output, write
from rnn_ext._options import Parser, guarded, positive_int, positive_number, whole_number
from rnn_ext.bench import CELLS, NOISE, Case, duration
from rnn_ext.plots import INK, STYLE, save

FOLDER = Path(__file__).parent
SECONDS = 0.05  # for a layer
MOST_FLOPS = 1.5e9  # of a call: longer ones would leave time for few
# Okabe and Ito's, which colour-blind readers can tell apart, and a marker beside every colour.
MARKS = {"rnn": ("#0072B2", "o"), "gru": ("#D55E00", "^"), "lstm": ("#009E73", "s")}


def draw_case(rng: random.Random) -> tuple[Case, str]:
    """A case and a mode, "forward" or "training"."""

    def size(low: int, high: int) -> int:
        return round(math.exp(rng.uniform(math.log(low), math.log(high))))

    while True:
        mode = rng.choice(list(TITLES))
        batch, length = rng.choice([1, size(2, 256)]), rng.choice([1, size(2, 512), size(2, 512)])
        case = Case(
            rng.choice(list(CELLS)),
            batch,
            length,
            size(1, 1024),
            size(4, 1024),
            num_layers=rng.choice([1, 1, 2]),
            bidirectional=rng.random() < 0.3,
            dtype=rng.choice(["float32"] * 5 + ["float64", "bfloat16", "float16"]),
        )
        if batch > 1 and length > 1 and rng.random() < 0.3:
            rest = (rng.randint(1, length) for _ in range(batch - 1))
            case = dataclasses.replace(case, lengths=(length, *sorted(rest, reverse=True)))
        if 2 * case.parameters * case.rows * (3 if mode == "training" else 1) <= MOST_FLOPS:
            return case, mode


def compare(case: Case, mode: str, seconds: float) -> list[float]:
    """What a call takes torch.nn and us."""
    times = bench.compare(case, mode == "training", seconds)["times"]
    return [times[name]["median"] for name in ("torch.nn", "rnn_ext")]


def measure(seed: int, threads: int, seconds: float) -> list[dict[str, Any]]:
    """In a process of its own."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    # No thread of its own for the bar, which would count as our time.
    with bench.pinned(threads), Progress(console=run.console, auto_refresh=False) as progress:
        task, start = progress.add_task(f"{threads} thread(s)", total=seconds), time.monotonic()
        while not progress.finished:
            case, mode = draw_case(rng)
            row = {"name": str(case), "cell": case.cell, "mode": mode, "threads": threads}
            row["seconds"] = compare(case, mode, SECONDS)
            if ratio(row["seconds"]) < NOISE:
                row["again"] = compare(case, mode, 1.0)
            rows.append(row)
            progress.update(task, completed=time.monotonic() - start, refresh=True)
    return rows


def slower(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if "again" in row and ratio(row["again"]) < NOISE]


def markdown(result: dict[str, Any]) -> str:
    return "\n".join(_lines(result)) + "\n"


def _lines(result: dict[str, Any]) -> Iterator[str]:
    about, rows = result["machine"], result["rows"]
    yield f"# Random shapes: {about['processor']}, {about['cores']} core(s)"
    yield ""
    yield f"{table.conditions(about)}; seed {result['seed']}"
    yield ""
    if disturbances := list(table.disturbances(about)):
        yield from (*disturbances, "")
    yield f"`python benchmarks/random_shapes.py`, which says what is drawn: {len(rows)} layers. Slower than torch.nn by"
    yield f"more than noise, also when measured again: **{len(slower(rows))}**. torch.nn's time over ours, medians of"
    yield f"about {SECONDS:g} s for both:"
    yield ""
    yield "| threads | cell | | layers | least | a twentieth below | median | a twentieth above | most |"
    yield "|---|---|---|---:|---:|---:|---:|---:|---:|"
    for threads in sorted({row["threads"] for row in rows}):
        for cell in CELLS:
            for mode, title in TITLES.items():
                of = (threads, cell, mode)
                found = [ratio(row["seconds"]) for row in rows if (row["threads"], row["cell"], row["mode"]) == of]
                if len(found) < 2:
                    continue
                parts = statistics.quantiles(found, n=20, method="inclusive")
                shown = (min(found), parts[0], parts[9], parts[18], max(found))
                cells = [str(threads), cell.upper(), title, str(len(found)), *(f"{value:.2f}" for value in shown)]
                yield f"| {' | '.join(cells)} |"
    if max(ratio(row["seconds"]) for row in rows) > 1000:
        yield ""
        yield "The most are of torch.nn's threads that waited for each other for whole time slices."
    yield ""
    yield "The least of all:"
    yield ""
    yield "| layer | | threads | torch.nn | rnn_ext | ratio | measured again |"
    yield "|---|---|---|---:|---:|---:|---:|"
    for row in sorted(rows, key=lambda row: ratio(row["seconds"]))[:20]:
        times = [duration(each) for each in row["seconds"]]
        again = f"{ratio(row['again']):.2f}" if "again" in row else ""
        cells = [row["name"], TITLES[row["mode"]], str(row["threads"]), *times, f"{ratio(row['seconds']):.2f}", again]
        yield f"| {' | '.join(cells)} |"


def picture(result: dict[str, Any]) -> Figure:
    """Every layer, measured with the fewest threads: how long it takes torch.nn, and how many times ours is as fast."""
    threads = min(row["threads"] for row in result["rows"])
    rows = [row for row in result["rows"] if row["threads"] == threads]
    figure = Figure(figsize=(9, 4.2))
    axes = figure.subplots(1, len(TITLES), sharex=True, sharey=True)
    for axis, (mode, title) in zip(axes, TITLES.items(), strict=True):
        for cell, (colour, marker) in MARKS.items():
            found = [row for row in rows if (row["cell"], row["mode"]) == (cell, mode)]
            x, y = ([get(row["seconds"]) for row in found] for get in (lambda seconds: seconds[0] * 1e3, ratio))
            axis.scatter(x, y, s=9, color=colour, marker=marker, alpha=0.55, linewidths=0, label=cell.upper())
        axis.axhline(1, color=INK, linewidth=1)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_xlabel("torch.nn's time (ms)")
        count = sum(row["mode"] == mode for row in rows)
        axis.set_title(f"{title}: {count} random layers")
    axes[0].set_ylabel("speed of rnn_ext over torch.nn")
    axes[0].annotate("as fast as torch.nn", (0, 1), (3, -10), ("axes fraction", "data"), "offset points", fontsize=8)
    axes[-1].legend(markerscale=2, loc="upper left")
    figure.suptitle(where(result, threads).replace("float32", "all dtypes"), fontsize=9, color=INK)
    return figure


def parse(argv: list[str] | None) -> Any:
    parser = Parser(description=(__doc__ or "").split("\n", 1)[0])
    cores = len(bench.allowed_cores())
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of what is drawn (%(default)s)")
    parser.add_argument("--threads", type=positive_int, nargs="+", default=sorted({1, cores}), help="(1 and all cores)")
    parser.add_argument("--seconds", type=positive_number(), default=300, help="for each of them (%(default)g)")
    parser.add_argument(
        "--output", type=run.results_file, help="JSON file (with no option: results/<machine>-random.json)"
    )
    options = parser.parse_args(argv)
    options.threads = sorted(set(options.threads))
    if max(options.threads) > cores:
        parser.error(f"--threads {max(options.threads)}: this process may use {cores} core(s)")
    return options


def main(argv: list[str] | None = None) -> int:
    """Returns 1 where ours was slower, or cannot run; results that differ end it with an error."""
    options = parse(argv)
    if not ops.is_available():
        print(f"error: {ops.load_error()}", file=sys.stderr)
        return 1
    os.environ.update(peers.INSTRUCTIONS.get(peers.held() or "", {}))  # what measures is a process of its own
    about = run.in_fresh_process(bench.machine)
    output = options.output
    if not output and options == parse([]):
        output = FOLDER / "results" / f"{run.slug(about)}-random.json"
        check_output(output)
    result: dict[str, Any] = {"machine": about, "seed": options.seed, "rows": []}
    for threads in options.threads:
        result["rows"] += run.in_fresh_process(measure, options.seed, threads, options.seconds)
    kept = stored.pack_random(result)
    shown = stored.unpack(kept)
    print(markdown(shown))
    if output:
        write(output, stored.text(kept))
        write(output.with_suffix(".md"), markdown(shown))
    if output and not options.output and not peers.held():
        with rc_context(STYLE):
            save(picture(shown), FOLDER / "plots" / "random_shapes.png")
    return 1 if slower(shown["rows"]) else 0


if __name__ == "__main__":
    sys.exit(guarded(main))
