"""Results as files: JSON with one line for each row, so that the diff of a measurement made again can be read.

A row of run.py and of random_shapes.py is a list; the head of the file says what its places are, and who are the
contestants of each section. Only what tables, pictures and documents are made of is kept, in us, with four digits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DIGITS = 4
MACHINE = ("processor", "cores", "instructions", "torch_instructions", "versions", "date", "busy")
PLACES = [
    *("section", "name", "mode", "threads", "auto", "floor: us, bound, us in turn", "GFLOP/s", "% of the core"),
    *("ns to another core", "samples", "contestants: us, spread in %", "left out"),
]
CASE = re.compile(r"(Bi)?([A-Z]+) N=(\d+) L=(?:(\d+)\.\.)?(\d+)(?: I=\d+)? H=(\d+)(?: layers=\d+)?(?: (\w+))?")
RANDOM_PLACES = ["name", "mode", "threads", "us: torch.nn, rnn_ext", "measured again"]


def rounded(value: Any, digits: int = DIGITS) -> Any:
    """The same with so many significant digits in each number that is not whole."""
    if isinstance(value, Mapping):
        return {key: rounded(part, digits) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part, digits) for part in value]
    if not isinstance(value, float):
        return value
    value = float(f"{value:.{digits}g}")
    return int(value) if value.is_integer() else value


def text(result: Mapping[str, Any]) -> str:
    """JSON with a line for each field, and one for each part of those that have parts with parts: of the rows, each."""
    fields = (f'"{name}": {_lines(value)}' for name, value in result.items())
    return "{\n" + ",\n".join(fields) + "\n}\n"


def _lines(value: Any) -> str:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not any(isinstance(part, dict | list) for part in parts):
        return _line(value)
    if isinstance(value, dict):
        return "{\n" + ",\n".join(f"{_line(name)}:{_line(part)}" for name, part in value.items()) + "\n}"
    return "[\n" + ",\n".join(map(_line, value)) + "\n]"


def _line(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def pack(result: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a result of run.py."""
    contestants: dict[str, dict[str, None]] = {}
    for row in result["rows"]:
        contestants.setdefault(row["section"], {}).update(dict.fromkeys(row["times"]))
    about = result["machine"]
    memory = ("name", "contestant", "saved_bytes", "peak_bytes")
    head = {
        "format": 2,
        "machine": {name: about[name] for name in MACHINE if name in about},
        "seconds_per_row": result["seconds_per_row"],
        "ceilings": result["ceilings"],
        "memory": [{name: entry[name] for name in memory} for entry in result["memory"]],
        "contestants": {section: list(names) for section, names in contestants.items()},
        "places": PLACES,
    }
    return {**rounded(head), "rows": [pack_row(row, list(contestants[row["section"]])) for row in result["rows"]]}


def pack_row(row: Mapping[str, Any], contestants: list[str]) -> list[Any]:
    floor, times, distance = row["floor"], row["times"], row["distance"]
    left_out = {name: why for name, why in row["left_out"].items() if why != "inference only"}
    flops = row["rates"].get("flops")
    alone = row["threads"] == 1 and row["cpu_share"] is not None  # with more threads the share says nothing
    packed = [
        *(row[name] for name in ("section", "name", "mode", "threads", "auto")),
        floor and [1e6 * floor["seconds"], floor["bound"], 1e6 * floor["in_turn"]],
        flops and rounded(flops / 1e9, 3),
        int(100 * row["cpu_share"]) if alone else None,
        distance and rounded(1e9 * distance, 3),
        next((timing["samples"] for timing in times.values()), None),  # they took turns
        [[1e6 * times[who]["median"], _spread(times[who])] if who in times else None for who in contestants],
    ]
    return rounded([*packed, left_out] if left_out else packed)


def _spread(timing: Mapping[str, float]) -> int:
    """Half of the middle 50 %, in % of the median."""
    return round(50 * (timing["high"] - timing["low"]) / timing["median"])


def pack_random(result: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a result of random_shapes.py."""
    about = result["machine"]
    machine = {name: about[name] for name in MACHINE if name in about}
    rows = []
    for row in result["rows"]:
        times = [[1e6 * seconds for seconds in row[which]] for which in ("seconds", "again") if which in row]
        rows.append([row["name"], row["mode"], row["threads"], *times])
    return rounded({"format": 2, "machine": machine, "seed": result["seed"], "places": RANDOM_PLACES, "rows": rows})


def is_of_run(result: Any) -> bool:
    """Whether it is what :func:`pack` returns."""
    return isinstance(result, dict) and result.get("places") == PLACES


def unpack(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a table and pictures are made of, in seconds, from what was kept."""
    if is_of_run(result):
        return {**result, "rows": [unpack_row(row, result["contestants"][row[0]]) for row in result["rows"]]}
    rows = []
    for name, mode, threads, *times in result["rows"]:
        case = case_of(name)
        assert case
        both = zip(("seconds", "again"), times, strict=False)
        found = {which: [1e-6 * each for each in seconds] for which, seconds in both}
        rows.append({"name": name, "cell": case["cell"], "mode": mode, "threads": threads, **found})
    return {**result, "rows": rows}


def unpack_row(row: list[Any], contestants: list[str]) -> dict[str, Any]:
    section, name, mode, threads, auto, floor, flops, cpu_share, distance, samples, times, *left_out = row
    found = zip(contestants, times, strict=True)
    return {
        "section": section,
        "name": name,
        "case": case_of(name),
        "mode": mode,
        "threads": threads,
        "auto": auto,
        "floor": floor and {"seconds": 1e-6 * floor[0], "bound": floor[1], "in_turn": 1e-6 * floor[2]},
        "flops": flops and 1e9 * flops,
        "cpu_share": None if cpu_share is None else cpu_share / 100,
        "distance": distance and 1e-9 * distance,
        "samples": samples,
        "left_out": left_out[0] if left_out else {},
        "times": {who: {"median": 1e-6 * time[0], "spread": time[1]} for who, time in found if time},
    }


def case_of(name: str) -> dict[str, Any] | None:
    """Of a layer, from its name, which is that of a :class:`rnn_ext.bench.Case`; None of models."""
    found = CASE.fullmatch(name)
    if not found:
        return None
    both_ways, cell, batch, shortest, length, hidden, dtype = found.groups()
    return {
        "cell": cell.lower(),
        "batch": int(batch),
        "length": int(length),
        "hidden_size": int(hidden),
        "bidirectional": both_ways is not None,
        "dtype": dtype or "float32",
        "packed": shortest is not None,
    }


def load(path: Path) -> dict[str, Any]:
    return unpack(json.loads(path.read_text()))
