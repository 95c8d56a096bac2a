"""Pictures of a result of run.py, for a README.

Colours of Okabe and Ito, which colour-blind readers can tell apart, and a marker or a hatch beside every colour.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import readings
import stored
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from rnn_ext._options import guarded
from rnn_ext.bench import NOISE, duration
from rnn_ext.plots import COLOURS, GREY, INK, STYLE, save

# name: colour, marker, line
STYLES = {
    "rnn_ext": (COLOURS["custom"], "o", "-"),
    "torch.nn": (COLOURS["native"], "s", "-"),
    "torch.nn packed": (COLOURS["native"], "s", "-"),
    "torch.nn padded": ("#56B4E9", "D", "--"),
    "ONNX Runtime": ("#009E73", "^", ":"),
    "OpenVINO": ("#CC79A7", "v", ":"),
    "JAX": ("#E69F00", "P", "--"),
}
TITLES = {"forward": "inference", "training": "forward + backward"}


def select(result: dict[str, Any], section: str, mode: str, threads: int | None = None) -> list[dict[str, Any]]:
    rows = [row for row in result["rows"] if row["section"] == section and row["mode"] == mode and row["times"]]
    fewest = min((row["threads"] for row in rows), default=1)
    return [row for row in rows if row["threads"] == (threads or fewest)]


def where(result: dict[str, Any], threads: int) -> str:
    about = result["machine"]
    cores = "one core" if threads == 1 else f"{threads} cores"
    return f"{about['processor']}, {cores}, torch {about['versions']['torch']}, float32"


PEER_WINS = "#F0B98A"  # a paler tone of ours: faster than torch.nn, but not than all


def _bars(axis: Any, rows: list[dict[str, Any]], named: bool) -> None:
    """What the two bar charts share: a line per row, its name on the left panel only."""
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows] if named else [""] * len(rows), fontsize=8)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="y", visible=False)


def _peer_mark(axis: Any, at: float, place: int) -> None:
    axis.plot(at, place, "d", color="white", markeredgecolor=INK, markersize=5, markeredgewidth=1)


def _value(axis: Any, at: float, place: int, text: str, bold: bool = False) -> None:
    weight = "bold" if bold else "normal"
    offset = {"xytext": (5, 0), "textcoords": "offset points"}
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # in front of the line at 100 %
    axis.annotate(text, (at, place), **offset, va="center", fontsize=7.5, color=INK, fontweight=weight, bbox=box)


def _peer_handle(label: str) -> Line2D:
    return Line2D([], [], marker="d", linestyle="", color="white", markeredgecolor=INK, label=label)


def speed_up(result: dict[str, Any], threads: int) -> Figure | None:
    """How many times as fast as torch.nn, per row of the grid and of the ragged rows."""
    panels = {}
    for mode in TITLES:
        panels[mode] = [*select(result, "grid", mode, threads), *select(result, "ragged", mode, threads)]
        panels[mode] = [row for row in panels[mode] if readings.speed_up(row, readings.torch_name(row))]
    if not any(panels.values()):
        return None
    height = max(len(rows) for rows in panels.values())
    figure = Figure(figsize=(8.4, 1.5 + 0.21 * height))
    axes = figure.subplots(1, 2)
    for axis, (mode, rows) in zip(axes, panels.items(), strict=True):
        for place, row in enumerate(rows):
            over, best = readings.torch_name(row), readings.best_peer(row)
            ratio = readings.speed_up(row, over)
            lost, beaten = ratio < NOISE, readings.speed_up(row, best) < NOISE
            colour = COLOURS["native"] if lost else PEER_WINS if beaten else COLOURS["custom"]
            hatch = "////" if lost else None
            axis.barh(place, ratio - 1, left=1, height=0.72, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
            end = max(ratio, 1)
            if best != over:
                peer = row["times"][over]["median"] / row["times"][best]["median"]
                _peer_mark(axis, peer, place)
                end = max(end, peer)
            digits = 0 if ratio >= 99.5 else 1 if ratio >= 9.95 else 2
            _value(axis, end, place, f"{ratio:.{digits}f}x", bold=lost or beaten)
        axis.axvline(1, color=INK, linewidth=1)
        axis.set_xscale("log")
        low, high = axis.get_xlim()
        axis.set_xlim(min(low, 0.9), high * 1.6)
        _bars(axis, rows, axis is axes[0])
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 else (1, 3) if high < 2000 else (1,)))
        axis.xaxis.set_major_formatter("{x:g}x")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_title(TITLES[mode])
    figure.supxlabel(f"speed of rnn_ext over torch.nn (L=a..b: packed); {where(result, threads)}", fontsize=9)
    handles = [
        Patch(color=COLOURS["custom"], label="rnn_ext is fastest, or within 3 %"),
        Patch(color=PEER_WINS, label="another is faster"),
        Patch(facecolor=COLOURS["native"], hatch="////", edgecolor="white", label="torch.nn is faster"),
        _peer_handle("the fastest other one over torch.nn,\nwhere it is not torch.nn"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=9, columnspacing=1.2)
    return figure


def floor(result: dict[str, Any], threads: int) -> Figure | None:
    """How close the rows of the grid come to what the machine can do."""
    panels = {mode: [row for row in select(result, "grid", mode, threads) if row["floor"]] for mode in TITLES}
    if not any(panels.values()):
        return None
    height = max(len(rows) for rows in panels.values())
    figure = Figure(figsize=(8.4, 1.5 + 0.21 * height))
    axes = figure.subplots(1, 2)
    hatches = {"flops": "", "cells": "////", "bandwidth": "....", "call": "xxxx"}
    bounds = {"flops": "flops", "cells": "activations", "bandwidth": "reading the weights", "call": "a call"}
    seen = {row["floor"]["bound"] for rows in panels.values() for row in rows}
    styles = {bound: {"facecolor": COLOURS["custom"], "hatch": h, "edgecolor": "white"} for bound, h in hatches.items()}
    for axis, (mode, rows) in zip(axes, panels.items(), strict=True):
        for place, row in enumerate(rows):
            share = 100 * (readings.floor_share(row) or 0)
            axis.barh(place, share, height=0.72, linewidth=0, **styles[row["floor"]["bound"]])
            best = readings.best_peer(row)
            peer = 100 * row["floor"]["seconds"] / row["times"][best]["median"] if best else 0
            if best:
                _peer_mark(axis, peer, place)
            _value(axis, max(share, peer), place, f"{share:.0f}")
        axis.axvline(100, color=INK, linewidth=1)
        _bars(axis, rows, axis is axes[0])
        axis.set_xlim(0, max(112, axis.get_xlim()[1]))
        axis.xaxis.set_major_formatter("{x:.0f} %")
        axis.set_title(TITLES[mode])
    figure.supxlabel(f"least time by the machine's ceilings / time taken; {where(result, threads)}", fontsize=9)
    handles = [
        *(Patch(**styles[bound], label=f"bound by {what}") for bound, what in bounds.items() if bound in seen),
        _peer_handle("fastest of the others"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=9)
    return figure


def _lines(axis: Any, rows: list[dict[str, Any]], along: Callable[[dict[str, Any]], float], scale: float = 1) -> None:
    """Times against something, a line per contestant, both axes logarithmic."""
    names = list(dict.fromkeys(name for row in rows for name in row["times"]))
    for name in sorted(names, key=list(STYLES).index, reverse=True):  # ours on top
        points = [(along(row), row["times"][name]["median"] * scale) for row in rows if name in row["times"]]
        colour, marker, line = STYLES[name]
        width = 2.2 if name == "rnn_ext" else 1.4
        axis.plot(*zip(*points, strict=True), line, color=colour, marker=marker, markersize=4.5, linewidth=width)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    places = sorted({along(row) for row in rows})
    axis.set_xticks(places, [f"{place:g}" for place in places], fontsize=8)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: duration(value).replace(".00", "").replace(".0", "")))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.tick_params(axis="y", labelsize=8)


def _legend(figure: Figure, rows: list[dict[str, Any]]) -> None:
    names = {name for row in rows for name in row["times"]}
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle=line, markersize=5, label=name)
        for name, (colour, marker, line) in STYLES.items()
        if name in names
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8.5, columnspacing=1.2)


def _guide(axis: Any, first: float, last: float, end: float, slope: int, label: str) -> None:
    """A grey line of a power of x, to compare slopes with."""
    start = end * (first / last) ** slope
    axis.plot([first, last], [start, end], color=GREY, linewidth=0.9, zorder=0)
    side = {"va": "top", "xytext": (4, -3)} if slope == 1 else {"ha": "right", "va": "bottom", "xytext": (-4, 0)}
    axis.annotate(label, (first, start), textcoords="offset points", fontsize=8, color=GREY, **side)


def length(result: dict[str, Any], threads: int) -> Figure | None:
    """Time against the number of timesteps, with lines of slope 1 and 2."""
    panels = {mode: select(result, "length", mode) for mode in TITLES}
    if min(len(rows) for rows in panels.values()) < 2:
        return None
    figure = Figure(figsize=(8.4, 4.2))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (mode, rows) in zip(axes, panels.items(), strict=True):
        _lines(axis, rows, lambda row: row["case"]["length"])
        axis.set_title(TITLES[mode])
        low, high = axis.get_xlim()
        last = rows[-1]["case"]["length"]
        times = {name: timing["median"] for name, timing in rows[-1]["times"].items()}
        _guide(axis, rows[0]["case"]["length"], last, 0.6 * min(times.values()), 1, "linear")
        if mode == "training":
            _guide(axis, last / 4, last, 1.7 * max(times.values()), 2, "quadratic")
        axis.set_xlim(low, high)
    axes[0].set_ylabel("time of a call", fontsize=9)
    axes[0].set_ylim(bottom=0.5 * axes[0].get_ylim()[0])  # room for the label of a guide
    case = panels["forward"][0]["case"]
    what = f"packed LSTM, N={case['batch']}, H={case['hidden_size']}, sequences of L / 8 to L timesteps"
    figure.supxlabel(f"L; {what}\n{where(result, 1)}", fontsize=9)
    _legend(figure, [row for rows in panels.values() for row in rows])
    return figure


def scaling(result: dict[str, Any], threads: int) -> Figure | None:
    """Time of a timestep against N and against H, forward and backward."""
    sections = {"batch": ("batch", "N, H=128"), "hidden": ("hidden_size", "H, N=1")}
    rows = {section: select(result, section, "training") for section in sections}
    cells = list(dict.fromkeys(row["case"]["cell"] for found in rows.values() for row in found))
    if not cells or not all(rows.values()):
        return None
    figure = Figure(figsize=(8.4, 5.6))
    axes = figure.subplots(len(sections), len(cells), squeeze=False, sharey="row")
    for line, (section, (field, label)) in zip(axes, sections.items(), strict=True):
        for axis, cell in zip(line, cells, strict=True):
            chosen = [row for row in rows[section] if row["case"]["cell"] == cell]
            _lines(axis, chosen, lambda row, field=field: row["case"][field], 1 / chosen[0]["case"]["length"])
            axis.set_title(cell.upper())
            axis.set_xlabel(label, fontsize=9)
        line[0].set_ylabel("time of a timestep", fontsize=9)
    lengths = sorted({row["case"]["length"] for found in rows.values() for row in found})
    what = f"forward + backward, L={' and '.join(map(str, lengths))}"
    figure.supxlabel(f"{what}; {where(result, 1)}", fontsize=9)
    _legend(figure, [row for found in rows.values() for row in found])
    return figure


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Every picture that the result has the rows for; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    every = sorted({row["threads"] for row in result["rows"]})
    jobs = []
    for threads in every:
        suffix = "" if threads == 1 else f"_{threads}_threads"
        jobs += [(f"speed_up{suffix}", speed_up, threads), (f"floor{suffix}", floor, threads)]
    jobs += [("length", length, 1), ("scaling", scaling, 1)]
    written = []
    with rc_context({**STYLE, "hatch.linewidth": 0.6}):
        for name, picture, threads in jobs:
            figure = picture(result, threads)
            if figure is not None:
                written.append(folder / f"{name}.png")
                save(figure, written[-1])
    return written


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="results/<machine>.json")
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent / "plots", help="(%(default)s)")
    given = parser.parse_args(argv)
    try:
        result = json.loads(given.result.read_text())
    except (OSError, ValueError) as error:
        print(f"error: {given.result} cannot be read: {error}", file=sys.stderr)
        return 2
    if not stored.is_of_run(result):
        print(f"error: {given.result} holds no results of run.py", file=sys.stderr)
        return 2
    drawn = draw(stored.unpack(result), given.folder)
    if not drawn:
        print(f"error: {given.result} has no rows for a picture", file=sys.stderr)
        return 2
    for path in drawn:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))
