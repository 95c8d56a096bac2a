"""What we want to be, beside what we are, and what the machine allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import readings

from rnn_ext.bench import NOISE

BEST, PADDED, FLOAT32, PEAK = "the best other", "torch.nn padded", "our float32", "peak flops, bandwidth"
TORCH = "torch.nn"


class Target(NamedTuple):
    what: str
    section: str
    mode: str
    over: str
    wanted: float  # ratio of the times; of PEAK: of `in_turn` in ceilings.py
    rows: Callable[[dict[str, Any]], bool] = lambda case: True  # of a row's case


def _single(*cells: str, low: int = 1, high: int = 1 << 30) -> Callable[[dict[str, Any]], bool]:
    return lambda case: case["cell"] in cells and case["batch"] == 1 and low <= case["hidden_size"] <= high


def _batched(*cells: str, low: int = 1) -> Callable[[dict[str, Any]], bool]:
    return lambda case: case["cell"] in cells and case["batch"] >= 8 and case["hidden_size"] >= low


def _bidirectional(case: dict[str, Any]) -> bool:
    return case["bidirectional"]


def _of(dtype: str, rows: Callable[[dict[str, Any]], bool] = lambda case: True) -> Callable[[dict[str, Any]], bool]:
    return lambda case: case["dtype"] == dtype and case["length"] > 1 and rows(case)


def _both(what: str, section: str, over: str, wanted: tuple[float, float], rows: Any = Target._field_defaults["rows"]):
    return [
        Target(what, section, mode, over, want, rows)
        for mode, want in zip(("forward", "training"), wanted, strict=True)
    ]


ALL = ("rnn", "gru", "lstm")
TARGETS = [
    *_both("RNN, N = 1, H <= 128", "grid", BEST, (2, 2), _single("rnn", high=128)),
    *_both("RNN, N = 1, H <= 128", "grid", TORCH, (10, 25), _single("rnn", high=128)),
    *_both("GRU, N = 1, H <= 128", "grid", BEST, (1.8, 2), _single("gru", high=128)),
    *_both("GRU, N = 1, H <= 128", "grid", TORCH, (10, 25), _single("gru", high=128)),
    *_both("LSTM, N = 1, H <= 128", "grid", BEST, (1.5, 1.8), _single("lstm", high=128)),
    *_both("any cell, N = 1, H 256..512", "grid", BEST, (1.1, 1.2), _single(*ALL, low=256)),
    Target("any cell, N = 1, H 256..512", "grid", "forward", PEAK, 0.9, _single(*ALL, low=256)),
    *_both("RNN and GRU, N >= 8", "grid", BEST, (1.2, 1.3), _batched("rnn", "gru")),
    *_both("LSTM, N >= 8", "grid", BEST, (1, 1.15), _batched("lstm")),
    Target("LSTM, N >= 8, H >= 256", "grid", "forward", PEAK, 0.9, _batched("lstm", low=256)),
    *_both("a call of one timestep", "call", TORCH, (2, 2), _single(*ALL, high=64)),
    *_both("any call of one timestep", "call", BEST, (1, 1)),
    *_both("packed, both directions", "ragged", TORCH, (3, 20), _bidirectional),
    Target("packed, both directions", "ragged", "training", PADDED, 3, _bidirectional),
    Target("bfloat16, N = 1", "dtype", "forward", FLOAT32, 1.9, _of("bfloat16", _single(*ALL))),
    Target("bfloat16, N >= 8", "dtype", "forward", FLOAT32, 1.8, _of("bfloat16", _batched(*ALL))),
    Target("bfloat16", "dtype", "training", FLOAT32, 1.5, _of("bfloat16")),
    Target("regressor (seed)", "model", "step", TORCH, 4),
    Target("classifier (seed)", "model", "step", TORCH, 15),
    *_both("any row", "grid", TORCH, (1, 1)),
]


def ratio(row: dict[str, Any], over: str) -> float | None:
    if over == PEAK:
        return readings.floor_share(row, "in_turn")
    names = {BEST: readings.best_peer(row), TORCH: readings.torch_name(row), FLOAT32: "rnn_ext float32"}
    return readings.speed_up(row, names.get(over, over))


def chosen(target: Target, rows: list[dict[str, Any]], threads: int) -> list[dict[str, Any]]:
    """The rows a target is about, the worst first."""
    found = [row for row in rows if (row["section"], row["mode"], row["threads"]) == (*target[1:3], threads)]
    if target.section == "model":
        found = [row for row in found if row["name"] == target.what]
    else:
        found = [row for row in found if target.rows(row["case"])]
    found = [row for row in found if ratio(row, target.over) is not None]
    return sorted(found, key=lambda row: ratio(row, target.over) or 0)


def lines(result: dict[str, Any]) -> Iterator[str]:
    """A table of all targets: the worst row of each, or all that do not meet it and whether their floors forbid it."""
    for threads in map(int, result["ceilings"]):
        found = [(target, rows) for target in TARGETS if (rows := chosen(target, result["rows"], threads))]
        if not found:
            continue
        yield ""
        yield f"## Targets; {threads} thread(s)"
        yield ""
        yield "Met within noise (3 %) by so many rows: the worst of them, or all that do not meet it, and what they"
        yield "would be at their floors."
        yield ""
        yield "| what | mode | over | wanted | met by | row | is | at the floor |"
        yield "|---|---|---|---|---|---|---|---|"
        for target, rows in found:
            short = [row for row in rows if (ratio(row, target.over) or 0) < NOISE * target.wanted]
            met = f"{len(rows) - len(short)} of {len(rows)}"
            for row in short or rows[:1]:
                is_, at_floor = ratio(row, target.over) or 0, "" if short else "met"
                share = readings.floor_share(row)
                if short and share:
                    best = is_ / share
                    at_floor = f"{best:.2f}" + (", out of reach" if best < target.wanted else "")
                mode = readings.MODES[target.mode]
                cells = [target.what, mode, target.over, f"{target.wanted:g}", met, row["name"], f"{is_:.2f}", at_floor]
                yield f"| {' | '.join(cells)} |"
