"""`make gpu` without a GPU: everything but the device itself. What the tests of the device do on the emulator, what the
benchmark prints of results made up here, and that the micro-measurements compile."""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from rnn_ext import ops
from tests.cuda_emulator.torch_layer import emulated

ROOT = Path(__file__).resolve().parent.parent
needs_emulator = pytest.mark.skipif(
    not (shutil.which("g++") and ops.is_available()), reason="needs g++ and the library"
)


@pytest.fixture(scope="module")
def gpu():
    return importlib.import_module("gpu")


def wall(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def printed(gpu, result, width=140) -> str:
    console = Console(width=width, record=True, file=io.StringIO(), highlight=False)
    gpu.show(result, console)
    return console.export_text()


def made_up(gpu, rows):
    """Results in the form that main() writes. The figures are invented: round numbers, no card of that name."""
    return {
        "card": "Imaginary 1", "compute_capability": "9.0", "multiprocessors": 1, "shared_bytes_per_block": 1,
        "torch": "0", "cuda": "0", "cudnn": 0, "date": "-", "micro": {"launch": 1.0}, "rows": rows, "left_out": 2,
    }  # fmt: skip


def row(gpu, ours=None, theirs=None, problem=None, **changes):
    fields = {"cell": "lstm", "dtype": "float32", "hidden": 64, "batch": 1, "length": 10, "mode": "forward"} | changes
    found = gpu.dataclasses.asdict(gpu.Row(**fields)) | {"kernel": "persistent"}
    return found | ({"problem": problem} if problem else {"ours": ours, "torch": theirs, "difference": 0.0})


@needs_emulator
def test_the_tests_of_the_device_pass_on_the_emulator():
    """All that need no stream or graph of a real GPU: a mistake in them would otherwise be found there first."""
    env = {**os.environ, "RNN_EXT_TEST_DEVICE": "cpu"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:xdist", "-p", "no:cacheprovider", "-x"]
    done = subprocess.run(
        [*command, "tests/test_cuda_device.py"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-3000:]
    passed = int(done.stdout.split(" passed")[0].split()[-1])
    assert passed > 150, done.stdout[-300:]


@needs_emulator
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16"])
def test_a_row_is_checked_and_timed(gpu, dtype, mode, packed):
    wanted = gpu.Row("gru", dtype, 6, 2, 4, mode, packed)
    with emulated():
        found = gpu.measure(wanted, wall, "cpu", seconds=0)
    assert "problem" not in found, found
    assert found["ours"] > 0 and found["torch"] > 0 and found["difference"] <= gpu.TOLERANCE[dtype]
    assert gpu.row_of(found) == wanted
    assert json.loads(json.dumps(found)) == found


def test_precision_is_put_back(gpu):
    before = torch.backends.cuda.matmul.allow_tf32
    with gpu.precision(gpu.Row("gru", "tf32", 6, 2, 4, "forward")):
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32 == before


@needs_emulator
def test_a_wrong_row_has_no_figure(gpu, monkeypatch):
    """Different outputs, and a contestant that raises, are said instead of timed."""
    wanted = gpu.Row("lstm", "float32", 6, 2, 4, "forward")
    monkeypatch.setitem(gpu.TOLERANCE, "float32", -1.0)
    found = gpu.measure(wanted, wall, "cpu", seconds=0)
    assert found["problem"].startswith("outputs differ by") and "ours" not in found
    with emulated("persistent"):
        found = gpu.measure(gpu.Row("lstm", "float32", 200, 1, 1, "forward"), wall, "cpu", seconds=0)
    assert "hidden size 128, got 200" in found["problem"]


@needs_emulator
@pytest.mark.parametrize("factor", [1.5, float("nan")])
def test_wrong_gradients_have_no_figure(gpu, monkeypatch, factor):
    contestants = gpu.contestants

    def wrong(row, device):
        ours, theirs, input = contestants(row, device)
        ours.weight_hh_l0.register_hook(lambda grad: grad * factor)
        return ours, theirs, input

    monkeypatch.setattr(gpu, "contestants", wrong)
    with emulated():
        found = gpu.measure(gpu.Row("lstm", "float32", 6, 2, 4, "training"), wall, "cpu", seconds=0)
    expected = "5.00e-01" if factor == 1.5 else "nan"
    assert found["problem"].startswith(f"gradients differ by {expected}") and "ours" not in found


@needs_emulator
def test_rows_are_left_when_the_time_is_up(gpu):
    rows = [gpu.Row("rnn_tanh", "float32", 4, 1, 2, "forward")] * 3
    console = Console(file=io.StringIO())
    assert gpu.run(rows, wall, "cpu", -1.0, console) == ([], 3)
    with emulated():
        done, left = gpu.run(rows[:1], wall, "cpu", 60.0, console)
    assert len(done) == 1 and left == 0


def test_rows_are_kept_as_they_come(gpu):
    """A GPU that hangs later takes none of them away."""
    saved = []
    rows = [gpu.Row("rnn_tanh", "float32", 4, 1, 2, "forward")] * 2
    with emulated():
        gpu.run(
            rows, wall, "cpu", 60.0, Console(file=io.StringIO()), lambda done, left: saved.append((len(done), left))
        )
    assert saved == [(1, 1), (2, 0)]


@pytest.mark.parametrize(
    ("problem", "fails"),
    [
        (None, False),
        ("outputs differ by 1.00e+00", True),
        ("rnn_ext on CUDA: grid_forward: invalid argument", True),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", False),
    ],
)
def test_what_fails_the_gate(gpu, problem, fails):
    assert gpu.is_failure(row(gpu, 1.0, 2.0) if problem is None else row(gpu, problem=problem)) is fails


def test_micro_measurements_that_hang(gpu, monkeypatch):
    """They are left out with a line, and the rest of the results stays."""
    monkeypatch.setattr(gpu, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(gpu, "library_folders", lambda nvcc: [])
    monkeypatch.setattr(gpu.torch.cuda, "get_device_capability", lambda: (9, 0))

    def run(command, timeout=None, **options):
        if timeout:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(gpu.subprocess, "run", run)
    console = Console(file=io.StringIO())
    assert gpu.micro(console) is None
    assert "they hung" in console.file.getvalue()


def test_table(gpu):
    rows = [
        row(gpu, 1.0, 2.0),
        row(gpu, 0.5, 2.0, hidden=128, batch=16),
        row(gpu, 4.0, 1.0, mode="training"),
        row(gpu, 1.0, 0.98, batch=16),  # within noise
        row(gpu, problem="outputs differ by 1.00e+00", dtype="float16"),
        row(gpu, 1.0, 1.0, dtype="bfloat16", hidden=512, packed=True),
        row(gpu, 1.0, 1.0, dtype="bfloat16", hidden=512),
    ]
    text = printed(gpu, made_up(gpu, rows))
    assert "Imaginary 1" in text
    assert "Losses: 1 of 6 rows" in text
    assert "0.25  lstm float32 H=64 N=1 L=10 training (persistent)" in text
    assert "no figure: lstm float16 H=64 N=1 L=10 forward: outputs differ" in text
    assert "Out of time: 2 rows" in text
    assert "Target H <= 128, forward <= 0.6 us: met in 1 of 3 rows, worst 1.000" in text
    assert "forward <= 1.2 us: met in 1 of 1 rows" in text  # packed rows have no target
    assert "launch: 1.000 us" in text
    assert gpu.losses(made_up(gpu, rows)) == [rows[2]]


def test_table_of_a_file(gpu, tmp_path, capsys):
    path = tmp_path / "made_up.json"
    result = made_up(gpu, [row(gpu, 1.0, 2.0), row(gpu, problem="out of memory", packed=True)])
    path.write_text(gpu.stored.text(gpu.pack(result)))
    for found in result["rows"]:
        found.pop("difference", None)
    assert gpu.unpack(json.loads(path.read_text()))["rows"] == result["rows"]
    assert gpu.main(["--show", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "Losses: 0 of 1 rows" in shown and "packed forward: out of memory" in shown


def test_grid(gpu):
    rows = gpu.grid()
    assert len(rows) == len(set(rows)) > 400
    assert {r.cell for r in rows} == set(gpu.CELLS) and {r.dtype for r in rows} == set(gpu.DTYPES)
    assert set(gpu.grid(quick=True)) - set(rows)
    for name, covers, mode, _ in gpu.TARGETS:
        assert any(covers(r) and r.mode == mode for r in rows), f"nothing measures the target {name}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [[], ["--check"], ["--quick"]])
def test_without_a_gpu_one_line_says_so(arguments):
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout.count("\n") == 1 and "No GPU to measure here" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_gpu_without_a_gpu(tmp_path):
    done = subprocess.run(
        ["make", "-s", "gpu", f"GPU_PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert done.stdout.count("\n") == 1 and "No GPU to measure here" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seconds", "soon"], "error: argument --seconds: 'soon' is not a number\n"),
        (["--output", "/proc"], "error: argument --output: /proc is a folder, expected the name of a file\n"),
        (["--frob"], "error: unrecognized arguments: --frob\n"),
    ],
)
def test_bad_arguments(gpu, arguments, message, capsys):
    with pytest.raises(SystemExit):
        gpu.parse(arguments)
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("arch", ["80", "90"])
def test_micro_measurements_compile(gpu, nvcc, arch, tmp_path):
    program = tmp_path / "gpu_micro"
    command = gpu.compile_micro(nvcc, arch, str(program))
    done = subprocess.run([*command, "-Werror", "all-warnings"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if not torch.cuda.is_available():
        said = subprocess.run([str(program)], capture_output=True, text=True)
        assert said.returncode == 1 and said.stderr.startswith("device: ")
