"""What a row of a result says."""

from __future__ import annotations

from typing import Any

from rnn_ext.bench import NOISE

MODES = {"forward": "forward", "training": "forward + backward", "step": "training step"}


def median(row: dict[str, Any], name: str) -> float | None:
    return row["times"][name]["median"] if name in row["times"] else None


def is_peer(name: str) -> bool:
    """A padded pass over ragged input gives other numbers, h_n among them: shown, but not one to be compared with."""
    return not name.startswith("rnn_ext") and name != "torch.nn padded"


def best_peer(row: dict[str, Any]) -> str | None:
    return min((name for name in row["times"] if is_peer(name)), key=lambda name: median(row, name) or 0, default=None)


def torch_name(row: dict[str, Any]) -> str | None:
    """torch.nn's contestant: of ragged input the one that takes it packed."""
    return next((name for name in ("torch.nn", "torch.nn packed") if name in row["times"]), None)


def speed_up(row: dict[str, Any], over: str | None) -> float | None:
    ours, theirs = median(row, "rnn_ext"), median(row, over) if over else None
    return theirs / ours if ours and theirs else None


def ratio(seconds: list[float]) -> float:
    """Of a row of random_shapes.py, torch.nn's time over ours."""
    return seconds[0] / seconds[1]


def floor_share(row: dict[str, Any], which: str = "seconds") -> float | None:
    """Of the time that ours takes, how much it has to; ``which``: of the fields of a floor."""
    ours = median(row, "rnn_ext")
    return row["floor"][which] / ours if ours and row["floor"] else None


def is_disturbed(row: dict[str, Any]) -> bool:
    """Whether other processes had the core for a part of the time. With more threads one cannot tell."""
    return row["threads"] == 1 and row["cpu_share"] is not None and row["cpu_share"] < 0.97


def is_far_apart(row: dict[str, Any]) -> bool:
    """Whether what a core wrote took longer to another one than through a cache in common: as csrc/ops/executor.cpp."""
    return (row["distance"] or 0) > 120e-9


def losses(result: dict[str, Any]) -> list[tuple[dict[str, Any], str, float]]:
    """(row, peer, ratio of the times) of every contestant that is faster than ours beyond noise, worst first."""
    found = []
    for row in result["rows"]:
        for name in filter(is_peer, row["times"]):
            ratio = speed_up(row, name)
            if ratio is not None and ratio < NOISE:
                found.append((row, name, ratio))
    return sorted(found, key=lambda loss: loss[2])
