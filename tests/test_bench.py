"""rnn_ext/bench.py, which all figures come from: cases, clocks, comparisons, the command's lines."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import math
import os
import time
from pathlib import Path

import pytest
import torch
from util import refused

from rnn_ext import bench, ops
from rnn_ext.bench import Case, Timing, Workload

SMALL = Case("gru", 3, 5, 4, 6, bidirectional=True, lengths=(5, 4, 2))
pytestmark = pytest.mark.skipif(not ops.is_available(), reason="the C++ library cannot be loaded")


def test_cases():
    assert Case("rnn", 3, 5, 4, 4, lengths=(5, 2, 2)).batch_sizes == [3, 3, 1, 1, 1]
    assert sum(bench.ragged(5, 10, 50, 0.5)) > sum(bench.ragged(5, 10, 50)) == 150
    case = Case("gru", 2, 3, 4, 5)
    rows, parameters = 6, 3 * 5 * (4 + 5 + 2)
    assert case.memory(False) == 4 * (rows * (5 * 6 + 12) + 3 * parameters)
    assert case.memory(True) == 4 * (rows * (5 * 24 + 12) + 5 * parameters)
    assert dataclasses.replace(case, dtype="bfloat16").memory(True) == case.memory(True)
    assert dataclasses.replace(case, dtype="float64").memory(True) == 2 * case.memory(True)
    assert bench.too_large(case, True, case.memory(True)) is None
    assert "needs about" in bench.too_large(case, True, case.memory(True) - 1)


def test_workload():
    """Its padding is zero, and the caller's random numbers go on as they were."""
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    work = Workload(Case("rnn", 2, 4, 3, 3, lengths=(4, 2)))
    assert torch.equal(torch.rand(1), expected)
    assert (work.input[2:, 1] == 0).all() and (work.grad_output[2:, 1] == 0).all() and (work.input[:2] != 0).all()


def test_difference_of_nothing_and_of_nan():
    zeros, nan = {"a": torch.zeros(2)}, {"a": torch.tensor([0.0, math.nan])}
    assert bench.difference(zeros, zeros) == bench.difference(zeros, {}) == 0
    assert bench.difference({"a": torch.full((2,), 1e-5)}, zeros) == pytest.approx(0.01)
    for ours, theirs in ((zeros, nan), (nan, zeros), (nan, nan), ({}, zeros), ({"b": torch.zeros(2)}, zeros)):
        assert bench.difference(ours, theirs) == math.inf


def test_different_results_are_no_comparison(monkeypatch):
    for apart in (math.nan, 1.0):
        monkeypatch.setattr(bench, "difference", lambda ours, theirs, apart=apart: apart)
        with pytest.raises(bench.DifferentResults):
            bench.compare(Case("rnn", 1, 1, 2, 2), False, 0.01)


def test_timing():
    samples = [4.0, 1.0, 2.0, 3.0, 5.0]
    assert dataclasses.astuple(bench.timing(samples)) == (3.0, 2.0, 4.0, 1.0, 5)
    assert bench._precision(samples) == pytest.approx(2 / 3 / 5**0.5)


def test_clock_and_garbage(monkeypatch):
    """One thread is timed by the process's time, several by the clock on the wall; nothing is collected meanwhile."""
    asked, enabled = [], []
    process_time = time.process_time
    monkeypatch.setattr(bench.time, "process_time", lambda: asked.append(1) or process_time())
    bench.interleave({"a": lambda: None}, seconds=0, threads=2, sample=0)
    assert not asked
    bench.interleave({"a": lambda: enabled.append(gc.isenabled())}, seconds=0, threads=1, sample=0)
    assert asked and gc.isenabled() and not enabled[-1]


def test_when_there_are_enough_samples(monkeypatch):
    """Calls of a second, each sample of which is settled for by another one."""
    now = [0.0]
    for clock in ("perf_counter", "process_time"):
        monkeypatch.setattr(bench.time, clock, lambda: now[0])

    def takes(*seconds):
        turn = itertools.cycle(seconds)

        def call():
            now[0] += next(turn)

        return call

    for seconds, count in ((9.5, 5), (4.5, 5), (3.5, 4), (100, 15)):
        assert bench.interleave({"a": takes(1.0)}, seconds)["a"].samples == count
    unsteady = bench.interleave({"a": takes(1.0), "b": takes(1.0, 1.0, 3.0)}, seconds=1000)
    assert unsteady["a"].samples > 15


def test_what_is_kept_for_backward(monkeypatch):
    """Storages once each, without parameters; of both contestants."""
    linear = torch.nn.Linear(4, 4, bias=False)
    x, y = torch.randn(2, 4, requires_grad=True), torch.randn(8, requires_grad=True)
    assert bench.saved_bytes(lambda: linear(x), linear) == 32
    assert bench.saved_bytes(lambda: (y * y[:8]) * y.view(8), linear) == 64
    asked = []
    monkeypatch.setattr(bench, "saved_bytes", lambda run, module: asked.append(type(module).__module__) or 0)
    bench.compare(Case("rnn", 1, 2, 2, 2), True, 0)
    assert asked == ["torch.nn.modules.rnn", "rnn_ext.modules"]


def test_free_memory(monkeypatch, tmp_path):
    """The least that the system and its groups say."""
    files = {"/proc/meminfo": "MemFree: 1 kB\nMemAvailable: 100 kB\n", "/sys/fs/cgroup/memory.max": "2048\n"}

    def path(name):
        file = tmp_path / name.replace("/", "_")
        if name in files:
            file.write_text(files[name])
        return file

    monkeypatch.setattr(bench, "Path", path)
    assert bench.available_memory() == 2048
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert bench.available_memory() == 102400
    monkeypatch.setattr(bench, "available_memory", lambda: None)
    assert bench.too_large(Case("gru", 2, 3, 4, 5), True) is None


def test_busy_cores(monkeypatch):
    stats = iter(["cpu  100 0 10 300 20 0 0 0 7 7\ncpu0 1", "cpu  105 2 11 308 22 1 1 0 9 9\ncpu0 1", "", "cpu a"])
    monkeypatch.setattr(Path, "read_text", lambda self: next(stats))
    assert bench.busy_cores(0) == (os.cpu_count() or 1) * 0.5  # 10 of 20 ticks
    assert bench.busy_cores(0) is bench.busy_cores(0) is None  # nothing that it can read


def test_other_work():
    assert bench.other_work({"busy": 0.31, "cores": 2}) == "0.3 of 2 cores are busy"
    assert (
        bench.other_work({"busy": 0.3, "cores": 2}) is bench.other_work({"busy": None}) is bench.other_work({}) is None
    )


def test_pinned(monkeypatch):
    calls = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cores: calls.append(list(cores)))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 1, 2})
    before = torch.get_num_threads()
    with bench.pinned(2) as cores:
        assert cores == [2, 3] and torch.get_num_threads() == 2
    assert calls == [[2, 3], [1, 2, 3]] and torch.get_num_threads() == before


def test_durations():
    found = [bench.duration(seconds) for seconds in (0.9996, 9.996e-4, 0.9994, 999.7)]
    assert found == ["1.00 s", "1.00 ms", "999 ms", "1000 s"]


def test_shape_of_the_command():
    given = ["--input-size", "3", "--hidden-size", "5", "--num-layers", "2", "--bidirectional", "--dtype", "float64"]
    assert bench.parse(given)[1] == [Case("lstm", 1, 128, 3, 5, 2, True, "float64")]
    assert bench.parse(["--bidirectional"])[1] == [Case("lstm", 1, 128, 128, 128, 1, True)]
    assert bench.parse(["--ragged", "--length", "5", "--batch-size", "2"])[1][0].lengths == (5, 1)


def measured(theirs: float, ours: float, mode: str = "forward") -> dict:
    times = {"torch.nn": Timing(*[theirs] * 4, 5), "rnn_ext": Timing(*[ours] * 4, 5)}
    kept = {"torch.nn": 2048, "rnn_ext": 1024}
    return {"mode": mode, "times": {k: dataclasses.asdict(t) for k, t in times.items()}, "saved_bytes": kept}


def test_lines_of_the_command(monkeypatch, capsys):
    """Which way the ratio is, what is called slower, and the end of a wrong result."""
    case = Case("rnn", 1, 1, 2, 2)
    assert bench._line(case, measured(2.0, 1.0), 20).endswith("2.00x")
    assert bench._line(case, measured(1.0, 2.0), 20).endswith("0.50x    slower")
    assert "2 KiB -> 1 KiB" in bench._line(case, measured(2.0, 1.0, "training"), 20)

    seconds, results = [], iter([measured(2.0, 1.99), measured(1.0, 2.0, "training")])
    monkeypatch.setattr(bench, "compare", lambda case, training, limit: seconds.append(limit) or next(results))
    about = {"processor": "p", "instructions": "i", "cores": 2, "busy": 0.7, "versions": {"torch": "t"}}
    monkeypatch.setattr(bench, "machine", lambda: about)
    arguments = ["--cell", "rnn", "--seconds", "10", "--threads", "1"]
    assert bench.main(arguments) == 0
    out = capsys.readouterr().out
    assert seconds == [5, 5] and "Slower than torch.nn: 1 of 2." in out
    assert "Other work is running here (0.7 of 2 cores are busy): the numbers will not be worth much.\n" in out

    def wrong(*_):
        raise bench.DifferentResults("it differs")

    monkeypatch.setattr(bench, "compare", wrong)
    assert bench.main(arguments) == 1
    assert "error: it differs; please report this" in capsys.readouterr().err


def test_batch_sizes():
    assert SMALL.batch_sizes == [3, 3, 2, 2, 1]
    assert SMALL.rows == 11
    assert dataclasses.replace(SMALL, lengths=None).batch_sizes == [3] * 5
    assert bench.ragged(4, 2, 8) == (8, 6, 4, 2)
    assert bench.ragged(1, 2, 8) == (8,)


@pytest.mark.parametrize("cell", list(bench.CELLS))
def test_parameters_are_those_of_the_module(cell):
    case = Case(cell, 1, 1, 3, 5, num_layers=2, bidirectional=True)
    assert case.parameters == sum(p.numel() for p in Workload(case).torch.parameters())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", [SMALL, Case("lstm", 2, 3, 4, 4, num_layers=2, dtype="bfloat16")], ids=str)
def test_compare(case, training):
    row = bench.compare(case, training, 0.01)
    assert row["difference"] <= bench.TOLERANCE[case.dtype]
    assert set(row["times"]) == {"torch.nn", "rnn_ext"}
    assert all(times["least"] <= times["low"] <= times["median"] <= times["high"] for times in row["times"].values())
    if training:
        assert row["saved_bytes"]["rnn_ext"] > 0
    json.dumps(row)


def test_wrong_results_are_not_timed(monkeypatch):
    monkeypatch.setattr(bench, "interleave", None)
    torch.manual_seed(1)
    monkeypatch.setattr(Workload, "ours", lambda self: torch.nn.GRU(4, 6, bidirectional=True))
    with pytest.raises(bench.DifferentResults, match="differ by"):
        bench.compare(SMALL, False, 0.01)


def test_difference():
    one = {"output": torch.tensor([1.0, -4.0])}
    assert bench.difference(one, one) == 0
    assert bench.difference({"output": torch.tensor([1.4, -4.0])}, one) == pytest.approx(0.1)
    assert bench.difference({"output": torch.tensor([float("nan"), -4.0])}, one) == float("inf")
    assert bench.difference({"output": torch.zeros(3)}, one) == float("inf")


def test_interleave_takes_turns():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    times = bench.interleave(runs, seconds=0, sample=0)
    turns = "".join(name for name, _ in itertools.groupby(order[4:]))  # after two calls each to warm up
    assert turns == "abab"  # ab ba ab, settling and samples together
    assert isinstance(times["a"], Timing)
    assert times["a"].samples == 3


def test_a_case_too_large_says_what_it_needs():
    case = Case("lstm", 64, 10**6, 512, 512)
    assert "needs about" in bench.too_large(case, True, available=2**30)
    assert bench.too_large(SMALL, True, available=2**30) is None


def test_pinned_works_without_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    with bench.pinned(1) as cores:
        assert cores is None
    assert bench.allowed_cores()


def test_numbers_for_people():
    texts = [bench.duration(seconds) for seconds in (1.23e-5, 9.996e-4, 0.1, 99.96, 1234.5)]
    assert texts == ["12.3 us", "1.00 ms", "100 ms", "100 s", "1234 s"]
    assert bench.size(3 * 2**20) == "3 MiB"


def test_command(tmp_path, capsys):
    file = tmp_path / "mine.json"
    arguments = ["--cell", "rnn", "--hidden-size", "5", "--length", "4", "--ragged", "--batch-size", "3"]
    assert bench.main([*arguments, "--seconds", "0.01", "--threads", "1", "--output", str(file)]) == 0
    text = capsys.readouterr().out
    assert "RNN N=3 L=1..4 H=5" in text
    assert "forward + backward" in text
    assert "Slower than torch.nn: " in text
    result = json.loads(file.read_text())
    assert [row["mode"] for row in result["rows"]] == ["forward", "training"]
    assert result["machine"]["instructions"] == ops.cpu_capability()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--hidden-size", "0"], "0 is not between 1 and"),
        (["--seconds", "nan"], "nan is not positive"),
        (["--cell", "qrnn"], "invalid choice"),
        (["--length", "1000000000"], "needs about"),
        (["--output", "/proc/at/all.json"], "/proc takes no file"),
        (["--output", "/proc/all.json"], "/proc/all.json cannot be written"),
        (["--output", "/proc"], "/proc is a folder, expected the name of a file"),
        (["--length", "x"], "'x' is not a whole number"),
        (["--length", str(10**30)], "is not between 1 and 2147483647"),
        (["--seconds", "x"], "'x' is not a number"),
        (["--threads", "100000"], "--threads 100000: expected at most"),
        (["--batch-size", "2000000000", "--ragged"], "needs about"),
    ],
)
def test_command_refuses(arguments, message, capsys):
    assert message in refused(bench.main, arguments, capsys)


def test_command_without_the_library(monkeypatch, capsys):
    monkeypatch.setattr(ops, "is_available", lambda: False)
    monkeypatch.setattr(ops, "load_error", lambda: "it has not been built; run: pip install")
    assert bench.main([]) == 1
    assert "has not been built" in capsys.readouterr().err
