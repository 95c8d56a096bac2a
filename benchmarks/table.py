"""The results as Markdown, losses first."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import targets
from readings import (
    MODES,
    best_peer,
    floor_share,
    is_disturbed,
    is_far_apart,
    is_peer,
    losses,
    median,
    speed_up,
    torch_name,
)

from rnn_ext.bench import CELLS, NOISE, duration, other_work, size

SECTIONS = {
    "grid": "One layer, input size = H",
    "stack": "Two layers, one sequence",
    "ragged": "Packed, lengths differ",
    "model": "Whole training steps of two models: of the demo's size (demo) and of a smaller one's (seed)",
    "call": "One timestep: what a call costs",
    "dtype": "bfloat16 and float16",
    "length": "Cost against L (packed, L / 8 to L timesteps)",
    "batch": "Cost against N",
    "hidden": "Cost against H",
}


def conditions(about: dict[str, Any]) -> str:
    """When, by what, and for which instructions."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    kernels = f"our kernels for {about['instructions']}, torch's for {about['torch_instructions']}"
    return f"{about['date']}; {versions}; {kernels}"


def disturbances(about: dict[str, Any]) -> Iterator[str]:
    """An entry of a list about other work, if there was any."""
    if work := other_work(about):
        yield f"- Other work was running when it began, {work}: rows with several threads are not to be trusted."
    elif about.get("load", 0) > 0.5:  # older results, which lack "busy"
        yield f"- The minute before it began had a load of {about['load']:.1f}. If that was other work and no other"
        yield "  benchmark, rows with several threads suffer."


def markdown(result: dict[str, Any]) -> str:
    return "\n".join(_lines(result)) + "\n"


def _lines(result: dict[str, Any]) -> Iterator[str]:
    about = result["machine"]
    yield f"# {about['processor']}, {about['cores']} core(s)"
    yield ""
    yield conditions(about)
    yield ""
    for threads, ceilings in result["ceilings"].items():
        reads = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in ceilings["read"].items())
        call = " and ".join(duration(ceilings["call"][mode]) for mode in ("forward", "training"))
        half = f" ({ceilings['bfloat16_flops'] / 1e9:.0f} in bfloat16)" if ceilings["bfloat16_flops"] else ""
        widened = " and ".join(
            f"{2e-9 / (took + 2 / ceilings['flops']):.0f} of {dtype}"
            for dtype, took in ceilings.get("widen", {}).items()  # which older results lack
        )
        if widened:
            half += f" ({widened} that is widened for it)"
        yield f"- Ceilings of a core, measured beside the rows with {threads} thread(s): {ceilings['flops'] / 1e9:.0f}"
        yield f"  GFLOP/s{half}; reading {reads} GB/s; a call that does nothing {call} (inference, with backward)."
        turns = [row["flops"] / 1e9 for row in rows_of(result, threads) if row["flops"]]
        if turns:
            low, middle, high = min(turns), statistics.median(turns), max(turns)
            yield f"  In turns with the rows: {middle:.0f} GFLOP/s in the median, {low:.0f} to {high:.0f}."
        apart = [row["distance"] for row in rows_of(result, threads) if row["distance"]]
        if apart:
            low, middle, high = (1e9 * seconds for seconds in (min(apart), statistics.median(apart), max(apart)))
            yield f"  What a core writes comes to another in {middle:.0f} ns in the median, {low:.0f} to {high:.0f}."
        for dtype, ways in ceilings["cells"].items():
            costs = (f"{cell.upper()} {' and '.join(f'{1e9 * ways[way][cell]:.2f}' for way in ways)}" for cell in CELLS)
            yield f"  A cell alone, forward and backward, in {dtype}: {', '.join(costs)} ns a unit."
    yield from disturbances(about)
    yield ""
    samples = [row["samples"] for row in result["rows"] for _ in row["times"]]
    if samples:
        yield f"About {result['seconds_per_row']:g} s for each row: {min(samples)} to {max(samples)} samples of each"
        yield f"contestant, {statistics.median(samples):g} in the median."
    yield "Medians ± half of the middle 50 %. Speed-ups are the time of the other / the time of rnn_ext: below 1 is a"
    yield "loss. The floor is what a call, cells, flops and reads of the weights, timed beside the row, allow"
    yield "(benchmarks/ceilings.py). A * marks rows during which other processes had the core for more than 3 % of the"
    yield "time, which is not counted but leaves its traces in the caches; a ° those of several threads that were far"
    yield "apart after it, on cores without a cache in common, as happens to a virtual machine, or on busy ones."
    yield ""
    found = losses(result)
    compared = sum(len(list(filter(is_peer, row["times"]))) for row in result["rows"])
    yield f"## Losses: {len(found)} of {compared} comparisons"
    yield ""
    if found:
        yield "| row | threads | faster | rnn_ext | it | speed-up |"
        yield "|---|---|---|---|---|---|"
    for row, name, ratio in found:
        ours, theirs = (duration(median(row, contestant) or 0) for contestant in ("rnn_ext", name))
        yield f"| {_name(row)} | {row['threads']} | {name} | {ours} | {theirs} | **{ratio:.2f}** |"
    yield from targets.lines(result)
    for section, title in SECTIONS.items():
        for threads in result["ceilings"]:
            rows = [row for row in rows_of(result, threads) if row["section"] == section]
            if rows:
                yield ""
                yield f"## {title}; {threads} thread(s)"
                yield ""
                yield from _table(rows)
    if result["memory"]:
        yield ""
        yield "## Memory of a forward and a backward pass"
        yield ""
        yield "| row | kept for backward: rnn_ext | torch.nn | peak: rnn_ext | torch.nn |"
        yield "|---|---|---|---|---|"
        for name in dict.fromkeys(entry["name"] for entry in result["memory"]):
            entries = {entry["contestant"]: entry for entry in result["memory"] if entry["name"] == name}
            cells = [entries[who][what] for what in ("saved_bytes", "peak_bytes") for who in ("rnn_ext", "torch.nn")]
            yield f"| {name} | {' | '.join('-' if cell is None else size(cell) for cell in cells)} |"
    missing = [(row, name, why) for row in result["rows"] for name, why in row["left_out"].items()]
    if missing:
        yield ""
        yield "## Left out"
        yield ""
        for row, name, why in missing:
            yield f"- {_name(row)}, {row['threads']} thread(s): {name}: {why}"


def rows_of(result: dict[str, Any], threads: str) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if str(row["threads"]) == threads]


def _name(row: dict[str, Any]) -> str:
    return f"{row['section']}: {row['name']}, {MODES[row['mode']]}"


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    names = list(dict.fromkeys(name for row in rows for name in row["times"]))
    with_floor = any(row["floor"] for row in rows)
    others = {"torch.nn padded": "over torch.nn padded", "rnn_ext float32": "over float32"}
    others = {name: title for name, title in others.items() if name in names}
    head = ["row", "", *names, "over torch.nn", "over the best other", *others.values()]
    head += ["of the floor", "bound by", "auto"] * with_floor
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        cells = [row["name"] + " *" * is_disturbed(row) + " °" * is_far_apart(row), MODES[row["mode"]]]
        for name in names:
            timing = row["times"].get(name)
            cells.append(_spread(timing) if timing else "-")
        cells += [_ratio(speed_up(row, torch_name(row))), _ratio(speed_up(row, best_peer(row)))]
        cells += [_ratio(speed_up(row, name)) for name in others]
        if with_floor:
            share = floor_share(row)
            cells += [f"{100 * share:.0f} %" if share else "-", row["floor"]["bound"] if row["floor"] else "-"]
            cells.append(row["auto"] or "-")
        yield f"| {' | '.join(cells)} |"


def _spread(timing: dict[str, Any]) -> str:
    return f"{duration(timing['median'])} ±{timing['spread']} %"


def _ratio(ratio: float | None) -> str:
    if ratio is None:
        return "-"
    return f"**{ratio:.2f}**" if ratio < NOISE else f"{ratio:.2f}"
