"""benchmarks/: they run, and say what they could not do. Nothing here looks at a time."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from test_bench import SMALL
from util import refused

from rnn_ext import _C, bench, ops
from rnn_ext.bench import Case, Timing

ROOT = Path(__file__).resolve().parent.parent
CEILINGS = {
    "method": "made up",
    "flops": 1e11,
    "bfloat16_flops": 2e11,
    "widen": {"bfloat16": 1e-11},
    "read": {4096: 2e11, 2**20: 1e11, 2**27: 1e10},
    "cells": {},
    "call": {"forward": 0.0, "training": 0.0},
}

pytestmark = pytest.mark.skipif(not ops.is_available(), reason="the C++ library cannot be loaded")


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    """Nothing that the benchmarks set outlives a test."""
    pytest.importorskip("rich")
    monkeypatch.setattr(os, "environ", dict(os.environ))


def test_what_measures_ends_with_its_parent(tmp_path):
    """A benchmark that was killed must not go on beside the next one."""
    script = tmp_path / "sleeper.py"
    script.write_text("import time\nprint('asleep', flush=True)\ntime.sleep(600)\n")
    start = f"import run, runpy; run.in_fresh_process(runpy.run_path, {str(script)!r})"
    parent = subprocess.Popen([sys.executable, "-c", start], cwd=ROOT / "benchmarks", stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout.readline() == "asleep\n"
    finally:
        parent.kill()
    # The child has the same output: it ends when both have.
    assert parent.communicate(timeout=60) == ("", None)


def test_an_interrupt_ends_what_measures(tmp_path):
    """Also one that reaches the benchmark alone; without a traceback."""
    script = tmp_path / "sleeper.py"
    script.write_text("import time\nprint('asleep', flush=True)\ntime.sleep(600)\n")
    # What a shell has begun in the background, these tests perhaps, ignores interrupts, and so do its children.
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    start += "; import run, runpy, sys; from rnn_ext._options import guarded"
    start += f"; sys.exit(guarded(lambda: run.in_fresh_process(runpy.run_path, {str(script)!r})))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    parent = subprocess.Popen([sys.executable, "-c", start], cwd=ROOT / "benchmarks", **pipes)
    assert parent.stdout.readline() == "asleep\n"
    parent.send_signal(signal.SIGINT)
    output, error = parent.communicate(timeout=60)
    assert output == "" and "stopped\n" in error and "Traceback" not in error
    assert parent.returncode == 130


def test_what_a_fresh_process_comes_to():
    import run

    assert run.in_fresh_process(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        run.in_fresh_process(divmod, 7, 0)
    with pytest.raises(run.ProcessDied):
        run.in_fresh_process(os._exit, 3)


def torch_only(monkeypatch):
    import peers

    monkeypatch.setattr(peers, "PEERS", [peer for peer in peers.PEERS if not peer.packages])


def here(function, *arguments):
    return function(*arguments)


def test_ceilings():
    import ceilings

    found = ceilings.measure(0.02, largest=2**16)
    assert found["flops"] > 0
    assert all(rate > 0 for rate in found["read"].values())
    for ways in found["cells"].values():
        assert all(ways["backward"][cell] > 0 for cell in bench.CELLS)
        assert 0 < ways["forward"]["rnn"] < ways["forward"]["gru"] < ways["forward"]["lstm"]
    assert "float32" in found["cells"] or found["method"] == "torch"
    assert ceilings.better(found, found) == found
    assert 0 < found["call"]["forward"] < found["call"]["training"]


def test_ceilings_without_a_compiler(monkeypatch):
    import ceilings

    monkeypatch.setenv("CXX", "no-such-compiler")
    found = ceilings.measure(0.02, largest=2**17)
    assert found["method"] == "torch"
    assert found["flops"] > 0
    assert found["read"]
    assert found["cells"] == {}
    assert list(ceilings.beside(SMALL, True)) == ["call"]
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("hidden", [3, 300])
def test_work_beside_a_layer(hidden, dtype, threads):
    """Its flops and bytes, by what they replace: of each thread's part of the weights in whole pages, all at once."""
    import ceilings

    work = ceilings.beside(Case("gru", 2, 3, 4, hidden, dtype=dtype), False, threads)
    call = work.pop("call")
    assert (call.ceiling, ceilings.rates({"call": call}, {"call": 3.0})) == ("call", {"call": 3.0})
    if shutil.which(ceilings.compiler().split()[0]) is None:
        pytest.skip("there is no compiler")
    multiply, *reads = work.values()
    assert multiply.ceiling == ("bfloat16_flops" if dtype == "bfloat16" and _C.computes_bfloat16() else "flops")
    assert multiply.run() == multiply.amount > 0
    assert [read.ceiling for read in reads] == ["read", "read"]
    part = 3 * hidden**2 * (4 if dtype == "float32" else 2) / threads
    for read in reads:
        read.run()
        passes = read.amount / (4096 * max(1, round(part / 4096)))
        assert passes % 2 == 0
        assert 0.5 < read.amount / (ceilings.BURST if threads == 1 else ceilings.BURSTS)[1] < 2
    for one in work.values():

        def is_of_all_threads() -> bool:
            everybody, this = time.process_time(), time.thread_time()
            one.run()  # noqa: B023
            everybody, this = time.process_time() - everybody, time.thread_time() - this
            return everybody > 1.5 * this if threads == 2 else everybody < 1.5 * this

        # One of two busy cores may be half as fast as the other for a while.
        assert any(is_of_all_threads() for _ in range(20))

    for times in (1.0, 4.0), (4.0, 1.0):  # the better counts
        seconds = dict(zip(work, (2.0, *times), strict=True))
        assert ceilings.rates(work, seconds) == {multiply.ceiling: multiply.amount / 2, "read": reads[0].amount}
    assert ceilings.rates({}, {}) == {}


def test_call_beside_a_layer():
    """In training one with as many gradients as the smallest layer has."""
    import ceilings

    assert len(ceilings.one_call(training=False)()) == 1
    module = bench.CELLS["rnn"][0](1, 1)
    grads = ceilings.one_call(training=True)()
    assert len(grads) == 1 + len(list(module.parameters()))
    assert all(grad is not None for grad in grads)


def test_floor():
    import ceilings

    assert ceilings.read_rate(CEILINGS, 1) == 2e11
    assert ceilings.read_rate(CEILINGS, 2**40) == 1e10
    assert ceilings.read_rate(CEILINGS, 2**16) == pytest.approx(1.5e11)  # half way between 2^12 and 2^20
    assert ceilings.read_rate(CEILINGS | {"read": 3e9}, 2**16) == 3e9

    many = Case("lstm", 64, 10, 128, 128)
    flops = 2 * 64 * 10 * 4 * 128 * (128 + 128)
    forward = ceilings.floor(many, False, CEILINGS)
    assert forward.bound == "flops"
    assert forward.seconds == pytest.approx(flops / 1e11)
    assert ceilings.floor(many, True, CEILINGS).seconds == pytest.approx(3 * forward.seconds)
    assert ceilings.floor(many, False, CEILINGS, 2).seconds == pytest.approx(forward.seconds / 2)
    half = dataclasses.replace(many, dtype="bfloat16")
    assert ceilings.floor(half, False, CEILINGS).seconds == pytest.approx(forward.seconds / 2)

    one = Case("rnn", 1, 10, 1, 512)  # 1 MiB of recurrent weights
    assert ceilings.floor(one, False, CEILINGS).bound == "bandwidth"
    assert ceilings.floor(one, False, CEILINGS).seconds == pytest.approx(10 * 2**20 / 1e11)
    assert ceilings.floor(one, False, CEILINGS).in_turn == pytest.approx(10 * 2**20 / 1e11 + 2 * 10 * 512 / 1e11)

    units = {"forward": {"lstm": 1e-6}, "backward": {"lstm": 2e-6}}  # beside flops; free where they are in turn
    cells = {**CEILINGS, "cells": {"float32": units}}
    for training, cell in ((False, 1e-6), (True, 3e-6)):
        bare, whole = (ceilings.floor(many, training, c) for c in (CEILINGS, cells))
        assert whole.seconds == pytest.approx(bare.seconds + 64 * 10 * 128 * cell)
        assert whole.in_turn == bare.in_turn
        assert whole.bound == "cells"
    assert ceilings.floor(half, False, cells).seconds == ceilings.floor(half, False, CEILINGS).seconds
    converted = {**cells, "bfloat16_flops": 0.0}  # by a processor that does not multiply them
    assert ceilings.floor(half, False, converted).seconds == ceilings.floor(many, False, cells).seconds
    # Widened instead where that takes less time than to read twice the bytes does.
    of_16_bits = dataclasses.replace(one, dtype="bfloat16")
    for rate, threads in ((1e11, 1), (1e9, 1), (1e9, 2)):
        slow = {**CEILINGS, "bfloat16_flops": 0.0, "read": rate}
        wide, narrow = (10 * size / threads / rate for size in (2**20, 2**19))
        computing = 2 * 10 * 512 * 513 / 1e11 / threads
        widened = computing + 10 * 512**2 * 1e-11 / threads
        expected = min(max(computing, wide), max(widened, narrow))
        assert ceilings.floor(of_16_bits, False, slow, threads).seconds == pytest.approx(expected)
        assert ceilings.floor(of_16_bits, False, {**slow, "widen": {}}, threads).seconds == pytest.approx(
            max(computing, wide)
        )
        assert ceilings.floor(of_16_bits, True, slow, threads).seconds == pytest.approx(
            min(max(3 * computing, 2 * wide), max(3 * computing + 2 * (widened - computing), 2 * narrow))
        )

    called = {**CEILINGS, "call": {"forward": 1.0, "training": 2.0}}
    for training in (False, True):
        bare, whole = (ceilings.floor(one, training, c) for c in (CEILINGS, called))
        assert whole.seconds == pytest.approx(bare.seconds + 1 + training)
        assert whole.bound == "call"

    # At half the clock the cell takes twice as long; the call and the reads are what they were found to be.
    rates = {"flops": CEILINGS["flops"] / 2, "read": 3e9, "call": 0.5}
    slow = ceilings.in_their_place(cells, rates)
    assert slow == {**CEILINGS, **rates, "cells": {"float32": {"forward": {"lstm": 2e-6}, "backward": {"lstm": 4e-6}}}}
    assert ceilings.floor(many, True, slow).seconds == pytest.approx(
        0.5 + 2 * ceilings.floor(many, True, cells).seconds
    )
    assert ceilings.in_their_place(cells, {}) == cells


def test_every_row_has_its_own_name_and_finds_its_contestants():
    import run

    rows = run.all_rows()
    assert len({str(row) for row in rows}) == len(rows)
    assert {row.section for row in rows} == set(run.table.SECTIONS)
    assert any(run.is_small(row) for row in rows)
    assert sum(run.CLASSIFIER_LENGTHS) == 9284


@pytest.mark.parametrize("section", ["grid", "call", "dtype", "model", "ragged", "stack"])
def test_contestants_agree(section, monkeypatch):
    """The smallest row of each kind, with what is installed."""
    import run

    rows = [row for row in run.all_rows() if row.section == section and row.mode != "forward"]
    row = min(rows, key=lambda row: row.case.rows * row.case.hidden_size if row.case else "demo" in row.name)
    if section == "ragged":
        row = dataclasses.replace(row, case=SMALL)
    if row.case is None or section in ("grid", "dtype", "stack"):
        monkeypatch.setattr(run, "CLASSIFIER_LENGTHS", (6, 3))
        case = row.case and dataclasses.replace(row.case, length=4, input_size=8, hidden_size=8)
        row = dataclasses.replace(row, case=case)
    result = run.measure_row(row, 1, 0.01, CEILINGS)
    assert "rnn_ext" in result["times"]
    assert any(name.startswith("torch.nn") for name in result["times"])
    assert not any("wrong" in why for why in result["left_out"].values())
    if row.case is not None and section != "call":
        assert all(rate > 0 for rate in result["rates"].values())
        assert result["floor"] == run.floor_of(row.case, row.mode, CEILINGS, result["rates"], 1)
        assert result["floor"]["seconds"] > 0
    else:
        assert result["floor"] is None
    assert run.describe(result)


def test_disturbed_rows_are_measured_again(monkeypatch):
    import run

    def measured(*shares: float) -> list[float]:
        """Of rows that would have the core for these shares of the time: which is kept, and those not measured."""
        left = list(shares)
        monkeypatch.setattr(run, "measure_row", lambda *_: {"threads": 1, "cpu_share": left.pop(0)})
        return [run.measure_undisturbed(None, 1, 0.1, CEILINGS)["cpu_share"], *left]

    assert measured(0.99, 0.98) == [0.99, 0.98]
    assert measured(0.90, 0.98, 1.0) == [0.98, 1.0]
    assert measured(0.90, 0.95, 0.92, 1.0) == [0.95, 1.0]


def test_held_to_other_instructions(monkeypatch):
    """Only torch can be held to what we are held to."""
    import peers
    import run

    monkeypatch.setenv("RNN_EXT_CPU_CAPABILITY", "avx2")
    missing = {peer.name: peer.missing() for peer in peers.PEERS}
    assert missing.pop("rnn_ext") is None and missing.pop("torch.nn") is None
    assert missing and all("cannot be held to avx2" in why for why in missing.values())
    assert run.slug({"processor": "A", "cores": 2}) == "a-2-cores-avx2"
    monkeypatch.setenv("RNN_EXT_CPU_CAPABILITY", "avx512")
    assert run.slug({"processor": "A", "cores": 2}) == "a-2-cores"


def test_a_row_says_why_it_was_left_out(monkeypatch):
    import run

    case = Case("lstm", 64, 10**7, 512, 512)
    result = run.measure_row(run.Row("grid", case, "forward", "large", run.layers), 1, 0.01, CEILINGS)
    assert "needs about" in result["left_out"]["everybody"]

    def fails(work, training, threads):
        raise OSError("libpeer.so is broken")

    monkeypatch.setattr(run.peers, "PEERS", [run.peers.PEERS[0], run.peers.Peer("broken", fails)])
    result = run.measure_row(run.Row("grid", SMALL, "forward", "small", run.layers), 1, 0.01, CEILINGS)
    assert result["left_out"] == {"broken": "OSError: libpeer.so is broken"}
    assert set(result["times"]) == {"rnn_ext"}


def test_a_peer_that_is_not_installed(monkeypatch):
    import peers

    monkeypatch.setitem(sys.modules, "no_such_peer", None)
    missing = peers.Peer("nobody", peers.ours, ("no_such_peer",)).missing()
    assert missing == "nobody is left out: no_such_peer is not installed"


def test_run_end_to_end(monkeypatch, tmp_path, capsys):
    """A grid of two tiny layers in this process, from the options to JSON, table and pictures."""
    import plot
    import run
    import stored

    torch_only(monkeypatch)
    monkeypatch.setattr(run, "in_fresh_process", here)
    monkeypatch.setattr(run.ceiling, "measure", lambda seconds: CEILINGS)
    cases = [Case("rnn", 2, 3, 4, 4), dataclasses.replace(Case("gru", 1, 3, 4, 4))]
    rows = [run.Row("grid", case, mode, str(case), run.layers, True) for case in cases for mode in plot.TITLES]
    monkeypatch.setattr(run, "all_rows", lambda: rows)
    file = tmp_path / "result.json"
    assert run.main(["--threads", "1", "--seconds", "0.01", "--output", str(file), "--rows", "grid"]) == 0

    result = json.loads(file.read_text())
    assert result["format"] == 2
    assert {"processor", "cores", "instructions", "versions", "date"} <= set(result["machine"])
    assert result["ceilings"]["1"]["flops"] == CEILINGS["flops"]
    assert stored.text(result) == file.read_text()
    result = stored.load(file)
    assert [row["mode"] for row in result["rows"]] == list(plot.TITLES) * 2
    for row in result["rows"]:
        assert set(row["times"]) == {"rnn_ext", "torch.nn"}
        assert row["times"]["rnn_ext"]["median"] > 0 and row["samples"] >= 3
        assert row["floor"]["bound"] in ("flops", "cells", "bandwidth", "call")
        assert row["auto"] in ("custom", "native")
    text = file.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out
    assert text.count("\n| GRU N=1 L=3 H=4") == 2
    assert plot.main([str(file), str(tmp_path / "plots")]) == 0
    assert (tmp_path / "plots" / "speed_up.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rows", "nothing-like-this"], "matches nothing; the sections are grid"),
        (["--rows", "("], "( is not a regular expression"),
        (["--threads", "100000"], "this process may use"),
        (["--output", "/proc/at/all.json"], "/proc takes no file"),
        (["--output", "mine.md"], "mine.md is where the table would go: expected a name that ends in .json"),
    ],
)
def test_run_refuses(arguments, message, capsys):
    import run

    assert message in refused(run.main, arguments, capsys)


def test_a_table_replaces_nothing_else(tmp_path, capsys):
    import run

    (tmp_path / "notes.md").write_text("mine\n")
    (tmp_path / "folder.md").mkdir()
    (tmp_path / "folder.json").touch()
    for name, why in (("notes", "its table would replace"), ("folder", "is a folder")):
        assert why in refused(run.main, ["--output", str(tmp_path / f"{name}.json")], capsys)
    assert (tmp_path / "notes.md").read_text() == "mine\n"


@pytest.mark.parametrize(
    "arguments, published", [([], True), (["--seconds", "0.01"], False), (["--threads", "1"], False)]
)
def test_only_all_rows_measured_in_full_are_published(arguments, published, monkeypatch, tmp_path):
    import plot
    import run

    rows = [run.Row("grid", SMALL, "forward", str(SMALL), run.layers)]
    part = {"rows": [], "ceilings": CEILINGS, "versions": {}}
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(bench, "allowed_cores", lambda: [0, 1])  # of one, `--threads 1` is all
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    monkeypatch.setattr(run, "all_rows", lambda: rows)
    monkeypatch.setattr(run, "in_fresh_process", lambda call, *_: part if call is run.measure else bench.machine())
    monkeypatch.setattr(run, "MEMORY_CASES", [])
    monkeypatch.setattr(run.peers, "held", lambda: None)
    drawn = []
    monkeypatch.setattr(plot, "draw", lambda result, folder: drawn.append(folder) or [])
    assert run.main(arguments) == 0
    assert bool(drawn) == published and len(list(tmp_path.rglob("*.json"))) == published


def measured():
    """A result with every section, two numbers of threads, and losses."""

    def timing(seconds):
        return dataclasses.asdict(Timing(seconds, 0.9 * seconds, 1.2 * seconds, 0.8 * seconds, 9))

    def row(section, case, mode, threads=1, **times):
        return {
            "section": section,
            "name": str(case),
            "case": dataclasses.asdict(case),
            "mode": mode,
            "threads": threads,
            "auto": "custom",
            "times": {
                name.replace("_nn", ".nn").replace("__", " "): timing(seconds) for name, seconds in times.items()
            },
            "left_out": {"JAX": "it crashed"} if section == "ragged" else {},
            "floor": {"seconds": 5e-4, "bound": "bandwidth", "in_turn": 8e-4} if section == "grid" else None,
            "rates": {"flops": 5e10 + 1e10 * threads, "read": 1e10} if section == "grid" else {},
            "cpu_share": 0.5 if section == "hidden" else 1.0,
            "distance": None if threads == 1 else 2.5e-7 if case.cell == "rnn" else 5e-8,
        }

    rows = []
    for mode in ("forward", "training"):
        for threads in (1, 2):
            rows.append(row("grid", Case("lstm", 1, 8, 4, 4), mode, threads, rnn_ext=1e-3, torch_nn=2e-3, JAX=5e-4))
            rows.append(row("grid", Case("rnn", 1, 8, 4, 4), mode, threads, rnn_ext=2e-3, torch_nn=1e-3))
            rows.append(row("grid", Case("gru", 1, 8, 4, 512), mode, threads, rnn_ext=1e-3))
        rows.append(row("ragged", SMALL, mode, rnn_ext=1e-3, torch_nn__packed=3e-2, torch_nn__padded=2e-3))
        one_way = dataclasses.replace(SMALL, bidirectional=False)
        rows.append(row("ragged", one_way, mode, rnn_ext=1e-3, torch_nn__packed=2e-3, torch_nn__padded=1e-3))
        for k in range(3):
            case = dataclasses.replace(SMALL, cell="lstm", length=2**k, lengths=(2**k,) * 3)
            rows.append(row("length", case, mode, rnn_ext=2**k * 1e-3, torch_nn__packed=4**k * 1e-2))
            rows.append(row("batch", Case("gru", 2**k, 8, 4, 4), mode, rnn_ext=1e-3, torch_nn=2e-3, OpenVINO=1e-2))
            rows.append(row("hidden", Case("gru", 1, 8, 4, 2**k), mode, rnn_ext=1e-3, torch_nn=2e-3))
    memory = {"name": "GRU", "saved_bytes": 2048, "peak_bytes": None}
    ceilings = CEILINGS | {"read": {"L1": 2e11, "memory": 1e10}}
    return {
        "machine": bench.machine(),
        "seconds_per_row": 0.5,
        "ceilings": {"1": ceilings, "2": ceilings},
        "rows": rows,
        "memory": [{**memory, "contestant": name} for name in ("rnn_ext", "torch.nn")],
    }


def made_up():
    """The same as it is read from a file."""
    import stored

    return stored.unpack(json.loads(stored.text(stored.pack(measured()))))


def test_what_is_stored_is_what_was_measured():
    """But for digits that nobody reads."""
    import stored

    raw = measured()
    raw["rows"][0]["times"]["JAX"]["median"] = 1 / 3
    raw["rows"][0]["left_out"] = {"OpenVINO": "inference only", "ONNX Runtime": "it crashed"}
    kept = stored.pack(raw)
    assert stored.is_of_run(kept) and "it crashed" in stored.text(kept) and "inference" not in stored.text(kept)
    for before, after in zip(raw["rows"], stored.unpack(json.loads(stored.text(kept)))["rows"], strict=True):
        for field in ("section", "name", "mode", "threads", "auto"):
            assert after[field] == before[field]
        for field in ("cell", "batch", "length", "hidden_size", "bidirectional", "dtype"):
            assert after["case"][field] == before["case"][field]
        assert after["case"]["packed"] == bool(before["case"]["lengths"])
        assert set(after["times"]) == set(before["times"])
        for name, timing in after["times"].items():
            assert timing["median"] == pytest.approx(before["times"][name]["median"], rel=1e-4)
        assert after["floor"] == (before["floor"] and pytest.approx(before["floor"]))
        assert after["cpu_share"] == (before["cpu_share"] if before["threads"] == 1 else None)
        assert after["distance"] == (before["distance"] and pytest.approx(before["distance"]))
    assert stored.rounded({"a": [1 / 3, 12345.6, 2.0, 12345, None, "x"]}) == {"a": [0.3333, 12350, 2, 12345, None, "x"]}


def test_cases_by_their_names():
    import random_shapes
    import run
    import stored

    rng = random.Random(0)
    cases = [row.case for row in run.all_rows() if row.case] + [random_shapes.draw_case(rng)[0] for _ in range(200)]
    for case in cases:
        found = stored.case_of(str(case))
        assert found.pop("packed") == bool(case.lengths)
        assert found == {name: getattr(case, name) for name in found}
    assert stored.case_of("regressor (seed)") is None


def unreadable(folder: Path) -> list[str]:
    """What keeps the results there from being few bytes, and the difference of two measurements from being read."""
    import stored

    files = sorted(folder.glob("*.json"))
    found = [
        f"{file.name}: not a line for each row, as stored.text() has it"
        for file in files
        if file.read_text() != stored.text(json.loads(file.read_text()))
    ]
    size = sum(file.stat().st_size for file in files)
    return found + ([f"{size:,} bytes: more than half a megabyte"] if size > 500_000 else [])


def test_results_are_few_bytes_and_a_line_for_each_row(tmp_path):
    import stored

    assert unreadable(ROOT / "benchmarks" / "results") == []
    result = stored.pack(measured())
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(stored.text(result))
    lines = good.read_text().splitlines()
    assert [json.loads(line.rstrip(",")) for line in lines[lines.index('"rows": [') + 1 : -2]] == result["rows"]
    assert unreadable(tmp_path) == []
    bad.write_text(json.dumps(result, indent=1))
    assert unreadable(tmp_path) == ["bad.json: not a line for each row, as stored.text() has it"]
    bad.write_text(stored.text({"rows": [[1] * 1000] * 300}))
    assert [problem.split(": ")[1] for problem in unreadable(tmp_path)] == ["more than half a megabyte"]


def test_table_shows_losses():
    import readings
    import table

    result = made_up()
    found = readings.losses(result)
    assert sorted((name, ratio) for _, name, ratio in found) == [("JAX", 0.5)] * 4 + [("torch.nn", 0.5)] * 4
    text = table.markdown(result)
    assert "Losses: 8 of" in text
    assert text.index("Losses: 8") < text.index("One layer")
    assert "**0.50**" in text
    assert "over torch.nn padded" in text
    assert "JAX: it crashed" in text
    assert "GRU N=1 L=8 I=4 H=2 *" in text  # disturbed
    assert "About 0.5 s for each row: " in text
    assert "turns with the rows: 60 GFLOP/s in the median, 60 to 60." in text
    assert "comes to another in 50 ns in the median, 50 to 250." in text
    with_two = text[text.index("input size = H; 2 thread(s)") :]
    assert "| RNN N=1 L=8 H=4 ° |" in with_two and "| LSTM N=1 L=8 H=4 |" in with_two  # far apart, and near
    assert "| RNN N=1 L=8 H=4 |" in text  # with one thread
    assert "| GRU | 2 KiB | 2 KiB | - | - |" in text


def test_rows_that_do_not_say_how_far_apart_threads_were():
    import table

    result = made_up()
    for row in result["rows"]:
        row["distance"] = None
    assert "°" not in table.markdown(result).split("## Losses")[1]
    assert "comes to another" not in table.markdown(result)


def test_targets():
    """Of each target the worst row, and of one that is not met what the floor would allow."""
    import targets

    text = list(targets.lines(made_up()))
    assert sum(line.startswith("## Targets") for line in text) == 2
    # 1 ms with a floor of 0.5 ms, JAX 0.5 ms
    what = "| LSTM, N = 1, H <= 128 | forward | the best other | 1.5"
    assert f"{what} | 0 of 1 | LSTM N=1 L=8 H=4 | 0.50 | 1.00, out of reach |" in text
    # of peak flops and bandwidth 0.8 ms
    what = "| any cell, N = 1, H 256..512 | forward | peak flops, bandwidth | 0.9"
    assert f"{what} | 0 of 1 | GRU N=1 L=8 I=4 H=512 | 0.80 | 1.60 |" in text
    # 2 ms and torch.nn 1 ms, the worst of two rows; the other is twice as fast as torch.nn
    assert "| any row | forward | torch.nn | 1 | 1 of 2 | RNN N=1 L=8 H=4 | 0.50 | 2.00 |" in text
    # and all that fall short, where the other is half as fast too
    slower = made_up()
    slower["rows"][0]["times"]["rnn_ext"]["median"] = 4e-3
    found = [line for line in targets.lines(slower) if line.startswith("| any row | forward") and "0 of 2" in line]
    assert [line.split(" | ")[5] for line in found] == ["LSTM N=1 L=8 H=4", "RNN N=1 L=8 H=4"]
    # 1 ms, packed 30 ms, padded 2 ms
    ragged = "| packed, both directions | forward + backward"
    assert f"{ragged} | torch.nn | 20 | 1 of 1 | {SMALL} | 30.00 | met |" in text
    assert f"{ragged} | torch.nn padded | 3 | 0 of 1 | {SMALL} | 2.00 |  |" in text


def test_plots(tmp_path):
    import plot

    files = plot.draw(made_up(), tmp_path)
    names = ["speed_up", "floor", "speed_up_2_threads", "floor_2_threads", "length", "scaling"]
    assert [file.stem for file in files] == names
    assert all(1000 < file.stat().st_size < 200_000 for file in files)
    assert plot.draw({**made_up(), "rows": []}, tmp_path) == []


def test_plot_refuses(tmp_path, capsys):
    import plot
    import stored

    with pytest.raises(SystemExit):
        plot.main([])
    assert "the following arguments are required: result" in capsys.readouterr().err
    assert plot.main([str(tmp_path / "nothing.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    of_another = tmp_path / "random.json"  # random_shapes.py's
    of_random_shapes = {"machine": bench.machine(), "seed": 0, "rows": []}
    for result, why in (
        ([], "random.json holds no results of run.py"),
        ({"rows": []}, "random.json holds no results of run.py"),
        (stored.pack_random(of_random_shapes), "random.json holds no results of run.py"),
        (stored.pack({**measured(), "rows": []}), "has no rows for a picture"),
    ):
        of_another.write_text(json.dumps(result))
        assert plot.main([str(of_another), str(tmp_path)]) == 2
        assert why in capsys.readouterr().err


def test_what_the_options_cost(monkeypatch, capsys, tmp_path):
    import features

    monkeypatch.setattr(features, "cell_states", list)  # the largest of them
    monkeypatch.setattr(features, "lengths", list)
    monkeypatch.setattr(features, "variants", list)
    monkeypatch.setattr(features, "recompute", list)
    for shapes in ("FEW_UNITS", "DIFFERENTIATED", "PER_SAMPLE", "JACOBIANS"):
        monkeypatch.setattr(features, shapes, ((2, 3, 4),))
    monkeypatch.setattr(features, "ENSEMBLES", ((2, 3, 4, 5),))
    output = tmp_path / "features.md"
    arguments = ["features.py", "--seconds", "0.001", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    features.main()
    rows = [line for line in output.read_text(encoding="utf-8").splitlines() if line.startswith("| LSTM")]
    assert len(rows) == 17 and all(line.count("|") == 6 for line in rows)
    assert rows[-1] in capsys.readouterr().out


def test_weights_of_8_bits(monkeypatch, capsys, tmp_path):
    import eight_bits

    def is_not_installed(*args):
        raise ImportError

    monkeypatch.setattr(eight_bits.peers, "onnx_runtime_8_bits", is_not_installed)
    monkeypatch.setattr(eight_bits, "SHAPES", ((2, 3, 4),))
    output = tmp_path / "eight_bits.md"
    monkeypatch.setattr(sys, "argv", ["eight_bits.py", "--seconds", "0.001", "--output", str(output)])
    eight_bits.main()
    rows = [line for line in output.read_text(encoding="utf-8").splitlines() if ", N=2, L=3, H=4 |" in line]
    assert [row.split(",")[0] for row in rows] == ["| RNN", "| GRU", "| LSTM"]
    cells = [[cell.strip() for cell in row.split("|")[2:-1]] for row in rows]
    assert all(float(cell.split(" (")[0]) > 0 for row in cells for cell in row if cell)
    assert [row.count("") for row in cells] == [2, 1, 1]  # who has no such layer, or is not here
    assert rows[-1] in capsys.readouterr().out


def test_random_shapes(monkeypatch, tmp_path, capsys):
    """Six tiny layers, the same for a seed; a layer counts as slower if it was so twice."""
    pytest.importorskip("matplotlib")
    import random_shapes
    import run
    import stored
    from matplotlib import rc_context

    compare, made = random_shapes.compare, []
    monkeypatch.setattr(run, "in_fresh_process", here)
    monkeypatch.setattr(random_shapes, "MOST_FLOPS", 2e5)
    monkeypatch.setattr(random_shapes, "compare", lambda *args: made.append(args) or compare(*args))
    monkeypatch.setattr(random_shapes, "time", types.SimpleNamespace(monotonic=lambda: float(len(made))))
    file = tmp_path / "result.json"
    arguments = ["--threads", "1", "1", "--seconds", "6", "--seed", "3", "--output", str(file)]
    status = random_shapes.main(arguments)
    result = stored.load(file)
    rows = result["rows"]
    assert len(made) == len(rows) + sum("again" in row for row in rows) >= 6
    assert status == bool(random_shapes.slower(rows))
    rng = random.Random(3)
    drawn = [random_shapes.draw_case(rng) for _ in rows]
    assert [(row["name"], row["mode"]) for row in rows] == [(str(case), mode) for case, mode in drawn]
    assert all(row["threads"] == 1 and len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in rows)
    text = file.with_suffix(".md").read_text()
    assert f"what is drawn: {len(rows)} layers." in text and text in capsys.readouterr().out

    row = {"name": "LSTM N=1", "cell": "lstm", "mode": "forward", "threads": 1}
    once = row | {"seconds": [0.9, 1.0], "again": [1.1, 1.0]}
    twice = row | {"seconds": [0.9, 1.0], "again": [0.8, 1.0]}
    result["rows"] = [once, twice, row | {"seconds": [3.0, 1.0]}]
    assert random_shapes.slower(result["rows"]) == [twice]
    text = random_shapes.markdown(result)
    assert "measured again: **1**" in text and "| 1 | LSTM | inference | 3 | 0.90 |" in text
    assert text.index("| 0.90 | 1.10 |") and text.index("| 0.90 | 0.80 |") < text.index("| 3.00 |  |")
    with rc_context(random_shapes.STYLE):
        random_shapes.picture(result).savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_random_shapes_are_all_that_is_offered():
    pytest.importorskip("matplotlib")
    import random_shapes

    rng = random.Random(0)
    drawn = [random_shapes.draw_case(rng) for _ in range(2000)]
    cases = [case for case, _ in drawn]
    assert {mode for _, mode in drawn} == {"forward", "training"}
    assert {case.cell for case in cases} == set(bench.CELLS) and {case.dtype for case in cases} == set(bench.DTYPES)
    assert {(case.num_layers, case.bidirectional) for case in cases} == set(itertools.product((1, 2), (False, True)))
    for field, highest in (("batch", 200), ("length", 400), ("input_size", 900), ("hidden_size", 900)):
        values = [getattr(case, field) for case in cases]
        assert min(values) <= 4 and max(values) >= highest, field
    packed = [case for case in cases if case.lengths]
    assert 100 < len(packed) < 1000 and all(case.lengths[0] == case.length > 1 for case in packed)
    assert all(case.lengths == tuple(sorted(case.lengths, reverse=True)) for case in packed)
