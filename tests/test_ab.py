"""benchmarks/ab.py: two builds against each other. Of times only this is asked: five calls take longer than one."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import random
from pathlib import Path

import pytest

import rnn_ext

ROOT = Path(__file__).resolve().parent.parent
TREE = Path(rnn_ext.__file__).resolve().parent.parent  # of the installed package
# A package of torch.nn's layers that has what a worker asks for.
STUB = """
import os
from torch import nn
from torch.nn import GRU, LSTM, RNN
from rnn_ext import ops
"""
STUB_OPS = """
def is_available(): return True
def cpu_capability(): return "stub"
"""
# RNN ends the process, GRU has its output at other timesteps, LSTM takes five calls; none has `step`.
BAD = """
class RNN(nn.RNN):
    def forward(self, *args):
        os.abort()

class GRU(nn.GRU):
    def forward(self, *args):
        output, h_n = super().forward(*args)
        return output.roll(1, 0), h_n

class LSTM(nn.LSTM):
    def forward(self, *args):
        for _ in range(5):
            results = super().forward(*args)
        return results
"""


@pytest.fixture
def ab(monkeypatch):
    module = importlib.import_module("ab")
    monkeypatch.setattr(module, "PLACES", 1)  # processes take a second or two to start
    return module


def stub(folder: Path, *parts: str) -> Path:
    package = folder / "rnn_ext"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("".join((STUB, *parts)))
    (package / "ops.py").write_text(STUB_OPS)
    (package / "_C.so").touch()
    return folder


def noisy(rng: random.Random, centre: float, count: int = 20) -> list[float]:
    """Ratios of a shared machine: some per cent of noise, and now and then one far off."""
    return [centre * rng.gauss(1, 0.02) * (3 if rng.random() < 0.05 else 1) for _ in range(count)]


# Statistics


def test_equal_builds_do_not_move(ab):
    rng = random.Random(0)
    found = [ab.summary([noisy(rng, 1) for _ in range(5)]) for _ in range(200)]
    assert all(abs(ratio - 1) < 0.02 and 0 < spread < 0.05 for ratio, spread in found)
    assert not any(ab.moved(*each) or ab.slower(*each) for each in found)


@pytest.mark.parametrize("centre", [0.8, 0.93, 1.1, 1.5])
def test_another_speed_is_seen(ab, centre):
    rng = random.Random(0)
    ratio, spread = ab.summary([noisy(rng, centre) for _ in range(5)])
    assert ratio == pytest.approx(centre, rel=0.02)
    assert ab.moved(ratio, spread) and ab.slower(ratio, spread) is (centre > 1)


@pytest.mark.parametrize(("places", "apart"), [(5, 0.03), (5, 0), (1, 0)])
def test_the_spread_covers_the_truth(ab, places, apart):
    """In about 95 of 100 runs, also where places differ from each other."""
    rng = random.Random(0)
    covered = 0
    for _ in range(300):
        ratio, spread = ab.summary([noisy(rng, rng.gauss(1.005, apart), 100 // places) for _ in range(places)])
        covered += abs(ratio - 1.005) <= spread
    assert 0.88 < covered / 300 <= 1


def test_a_spread_comes_of_places_that_differ(ab):
    near, far = ab.summary([[1.0] * 20] * 5), ab.summary([[x] * 20 for x in (0.9, 0.95, 1.0, 1.05, 1.1)])
    assert near == (1, 0) and far[0] == 1 and far[1] == pytest.approx(2.78 * 0.0791 / math.sqrt(5), rel=1e-2)
    assert ab.summary([[1.0, 1.2, 1.1]])[1] == pytest.approx(0.1)  # one place, and few ratios


def test_bounds_of_moved_and_slower(ab):
    assert ab.moved(1.031, 0.001) and not ab.moved(1.029, 0.001)
    assert ab.moved(0.969, 0.001) and not ab.moved(0.9, 0.11)
    assert ab.slower(1.051, 0.02) and not ab.slower(1.049, 0.02) and not ab.slower(0.5, 0.02)
    assert ab.geometric_mean([0.5, 2.0, 1.0]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ([(2.0, 1.0)], [(2.0, 1.0001)], ""),
        ([(0.0, 0.0)], [(0.0, 0.0)], ""),
        ([(2.0, 1.0)], [(2.0, 1.001)], "results differ by 5.0e-04 of their norm, expected at most 0.0001"),
        ([(2.0, 1.0)], [(2.1, 1.0)], "results differ by 4.8e-02"),
        ([(2.0, 1.0)], [(math.nan, 1.0)], "results are not finite"),
        ([(math.inf, 1.0)], [(math.inf, 1.0)], "results are not finite"),
        ([(2.0, 1.0)], [(2.0, 1.0)] * 2, "NEW has 2 results and gradients, expected 1 as OLD"),
    ],
)
def test_results_that_differ(ab, old, new, said):
    found = ab.difference(old, new, "float32")
    assert found.startswith(said) and bool(found) is bool(said)


def test_what_fails_a_run(ab):
    good = {"row": "a", "ratio": 0.9, "moved": True, "slower": False}
    assert ab.failures([good, {"row": "b", "failed": {"OLD": "no such option"}}]) == []
    bad = [good | {"slower": True}, good | {"wrong": "x"}, {"row": "a", "failed": {"NEW": "x"}}]
    assert ab.failures(bad) == ["a"] * 3


# Rows


def test_names_of_rows(ab):
    names = [row.name for row in ab.ROWS]
    assert len(set(names)) == len(names) and 50 <= len(names) <= 70
    assert max(map(len, names)) <= 70


def test_every_mode_has_rows(ab):
    for cell in ("RNN", "GRU", "LSTM"):
        rows = [row for row in ab.ROWS if row.cell == cell]
        assert {row.N for row in rows} >= {1, 8, 32} and {row.H for row in rows} >= {8, 32, 64, 256, 512} - {8, 32}
        assert {row.dtype for row in rows} == {"float32", "float64", "bfloat16", "int8"}
        assert {row.mode for row in rows} >= {"forward", "training", "step"}
        assert any(row.lengths and row.mode == "training" for row in rows)
        assert any(row.layers > 1 for row in rows) and any(row.N >= 256 and row.H <= 8 for row in rows)
        assert any(row.threads == 2 for row in rows)
    rows = ab.ROWS
    assert {row.N for row in rows} >= {1, 2, 8, 32, 128} and {row.H for row in rows} >= {1, 2, 4, 8, 32, 64, 256, 512}
    assert {(row.lengths, row.directions) for row in rows} == {
        (x, y) for x in ("", "packed", "lengths") for y in (1, 2)
    }
    assert {row.activations for row in rows if row.dtype == "int8"} == {8, 16}
    assert {"layer_norm", "zoneout", "recompute", "proj_size"} <= {key for row in rows for key, _ in row.options}
    assert {row.mode for row in rows if row.resets} == {"forward", "training"}
    assert {row.mode for row in rows if row.L == 1} == {"forward", "training", "step", "cell"}
    assert {row.mode for row in rows if dict(row.options).get("zoneout")} == {"forward", "training"}


def test_list_needs_no_builds(ab, capsys):
    assert ab.main(["--list", "--rows", "two threads"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == sum(row.threads == 2 for row in ab.ROWS) and "LSTM, N=1, L=32, H=512" in listed[2]


# What the user gives


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("missing", "{} does not exist: expected a source tree with a built rnn_ext/_C*.so, or such a file"),
        ("empty", "{} has no rnn_ext/__init__.py: expected a source tree"),
        ("source", "{} has not been built: expected a source tree"),
        ("source/rnn_ext/__init__.py", "{} is no library of rnn_ext: expected a source tree"),
        ("empty/_C.so", "{} has no Python files of rnn_ext beside it: expected a source tree"),
        (
            "stub/rnn_ext/_C.cpython-39-x86_64-linux-gnu.so",
            "{} is for another Python, expected a library for cpython-3",
        ),
    ],
)
def test_builds_that_are_none(ab, tmp_path, capsys, path, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "_C.so").touch()
    stub(tmp_path / "stub")
    (tmp_path / "stub" / "rnn_ext" / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    stub(tmp_path / "source")
    (tmp_path / "source" / "rnn_ext" / "_C.so").unlink()
    for builds in ([path, "stub"], ["stub", path]):
        with pytest.raises(SystemExit) as end:
            ab.main([str(tmp_path / build) for build in builds])
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.startswith("error: " + said.format(tmp_path / path))
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rows", "transformer"], "--rows 'transformer' matches no row; --list shows them"),
        (["--rows", "("], "'(' is not a regular expression"),
        (["--seconds", "0"], "'0' is not a positive number"),
        (["--threads", "9999"], "--threads 9999: expected 1 to "),
        (["--json", "/proc/no/file"], "--json /proc/no/file cannot be written (No such file or directory)"),
        ([], "expected two builds, OLD and NEW"),
    ],
)
def test_options_that_cannot_be(ab, tmp_path, capsys, options, said):
    builds = [str(stub(tmp_path / "stub"))] * 2 if options else ["old"]
    with pytest.raises(SystemExit) as end:
        ab.main([*builds, *options])
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_a_library_runs_with_the_files_beside_it(ab, tmp_path):
    package = stub(tmp_path) / "rnn_ext"
    (package / "_C_before.so").write_text("before")
    with contextlib.ExitStack() as stack:
        tree = ab.find_tree(str(package / "_C_before.so"), stack)
        assert (tree / "rnn_ext" / "ops.py").read_text() == STUB_OPS
        (library,) = (tree / "rnn_ext").glob("_C*")
        assert library.read_text() == "before" and library.name == f"_C{ab.EXTENSION_SUFFIXES[0]}"
    assert not tree.exists() and package.exists()
    with pytest.raises(argparse.ArgumentTypeError):
        ab.find_tree(str(tmp_path / "gone"), contextlib.ExitStack())


# Runs


def run(ab, capsys, *args: object) -> tuple[int, str, list[dict]]:
    """Exit status, output and the lines of --json."""
    file = Path(str(args[0])).parent / "rows.jsonl" if "--json" not in args else None
    code = ab.main([*map(str, args), *(["--json", str(file)] if file else [])])
    return code, capsys.readouterr().out, [json.loads(text) for text in file.read_text().splitlines()]


def test_the_installed_package_against_itself(ab, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    name = "LSTM, N=8, L=32, H=64, training"
    code = ab.main([str(TREE), str(TREE), "--rows", f"^{name}$", "--seconds", "0.05", "--json", str(file)])
    output = capsys.readouterr().out
    (result,) = map(json.loads, file.read_text().splitlines())
    assert result["row"] == name and result["group"] == "few sequences" and result["threads"] == 1
    assert 0.3 < result["ratio"] < 3 and result["spread"] >= 0 and result["pairs"] >= 3  # this short it may be anything
    assert min(result["old_seconds"], result["new_seconds"]) > 0
    assert code == int(result["slower"]) and "wrong" not in result and f"{result['ratio']:.3f} ±" in output
    assert "geometric mean" in output and "\x1b" not in output


def test_what_is_wrong_with_a_build(ab, tmp_path, capsys):
    old, new = stub(tmp_path / "old"), stub(tmp_path / "new", BAD)
    rows = "^(RNN, N=1, L=64, H=32, 2 layers|GRU, N=8, L=64, H=64|LSTM, N=1, L=32, H=256), forward$"
    code, output, results = run(ab, capsys, old, new, "--rows", f"{rows}|N=1, L=1, H=64, step", "--seconds", "0.4")
    found = {result["row"].split(",")[0] + result["row"].split()[-1]: result for result in results}
    assert code == 1 and len(results) == 5 and len(found) == 4 + 1
    # The layers of torch.nn have no step: with either build.
    assert found["LSTMstep"]["failed"].keys() == {"OLD", "NEW"} and "no attribute 'step'" in output
    assert found["RNNforward"]["failed"].keys() == {"NEW"} and "the process crashed (SIGABRT)" in output
    assert "WRONG: results differ by" in output and found["GRUforward"]["wrong"].startswith("results differ by")
    slow = found["LSTMforward"]  # after the crash, in a new process
    assert slow["slower"] and slow["ratio"] > 1.5 and "wrong" not in slow
    assert output.rstrip().endswith("5 rows fail")


def test_builds_that_cannot_be_loaded(ab, tmp_path, capsys):
    good, bad = stub(tmp_path / "good"), stub(tmp_path / "bad", "raise ImportError('no such symbol')")
    assert ab.main([str(good), str(bad)]) == 2
    assert capsys.readouterr().err == f"error: NEW, {bad}, cannot be used: ImportError: no such symbol\n"
