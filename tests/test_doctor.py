"""python -m rnn_ext doctor: says what is, names a remedy for what is wrong, and never fails itself."""

from __future__ import annotations

import importlib
import os

import pytest
import torch

from rnn_ext import doctor, ops

BROKEN = "the C++ library of rnn_ext has not been built; run: python -m pip install -e ."


@pytest.fixture
def broken(monkeypatch):
    """The package as it is where the library cannot be loaded."""
    monkeypatch.setattr(ops, "is_available", lambda: False)
    monkeypatch.setattr(ops, "load_error", lambda: BROKEN)


def by_name() -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.report()}


def test_report_when_all_is_well(capsys):
    checks = by_name()
    assert list(checks)[3:] == list(doctor.CHECKS)
    assert torch.__version__ in checks["torch"].found
    assert torch.__version__ in checks["library"].found
    assert checks["instructions"].found.startswith(ops.cpu_capability())
    assert "float32" in checks["custom"].found
    assert not any(check.fatal for check in checks.values())
    assert doctor.main([]) == 0
    assert checks["custom"].found.split(";")[0] in capsys.readouterr().out


def test_refused_tiles_are_a_problem(monkeypatch):
    monkeypatch.delenv("RNN_EXT_CPU_CAPABILITY", raising=False)
    monkeypatch.setattr("rnn_ext._C.cpu_capability", lambda: "amx")
    for granted, found in ((True, "amx"), (False, "avx512")):
        monkeypatch.setattr("rnn_ext._C.multiplies_tiles", lambda granted=granted: granted)
        check = doctor.check_instructions()
        assert check.found == found
        assert ("Linux refuses the tiles" in (check.problem or "")) is not granted


def test_unknown_option(capsys):
    with pytest.raises(SystemExit, match="2"):
        doctor.main(["foo"])
    assert capsys.readouterr().err == "error: unrecognized arguments: foo\n"


def test_broken_library_ends_with_1_and_the_remedy(broken, capsys):
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert f"! library: {BROKEN}" in out
    assert "The custom backend cannot work" in out


def test_sources_newer_than_the_library(monkeypatch, tmp_path):
    """A checkout that was changed after it was built; of CUDA's sources only if the library has such kernels."""
    package = tmp_path / "rnn_ext"
    package.mkdir()
    (package / "_C.so").touch()
    for name in ("cells", "cuda"):
        (tmp_path / "csrc" / name).mkdir(parents=True)
        (tmp_path / "csrc" / name / "a.h").touch()
    monkeypatch.setattr(doctor._loader, "FOLDER", package)
    info = importlib.import_module("rnn_ext._build_info")
    for changed, with_cuda, found in (
        ("cells", False, True),
        ("cuda", True, True),
        ("cuda", False, False),
        (None, True, False),
    ):
        monkeypatch.setattr(info, "CUDA", with_cuda)
        os.utime(package / "_C.so", (2000, 2000))
        for name in ("cells", "cuda"):
            time = 3000 if name == changed else 1000
            os.utime(tmp_path / "csrc" / name / "a.h", (time, time))
        problem = doctor.check_library().problem
        assert (problem or "").startswith("csrc has changed since the library was built; run") == found


def test_no_compiler_matters_where_the_library_is_missing(broken, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "install g++" in by_name()["compiler"].problem


def test_no_compiler_is_no_problem_where_the_library_works(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    check = doctor.check_compiler()
    assert (check.found, check.problem) == ("CXX=no-such-compiler is no program, or fails", None)


def test_a_compiler_that_fails_is_passed_by(monkeypatch, tmp_path):
    for name, status in (("c++", 1), ("g++", 0)):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} 99\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert doctor.check_compiler().found == "g++ 99"


def test_failing_check_is_a_problem_not_an_exception(monkeypatch, capsys):
    def fail():
        raise OSError("disk on fire")

    monkeypatch.setitem(doctor.CHECKS, "OpenMP", fail)
    assert "OSError: disk on fire" in by_name()["OpenMP"].problem
    assert doctor.main([]) == 0


def test_wrong_results_are_fatal(monkeypatch):
    monkeypatch.setattr(doctor, "largest_difference", lambda: float("nan"))
    check = by_name()["custom"]
    assert check.fatal
    assert "disagree" in check.problem


def test_kernels_agree_with_torch():
    assert doctor.largest_difference() < 1e-12


def test_threads_above_the_cores(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    assert "OMP_NUM_THREADS=" in doctor.check_threads().problem


def test_openmp_runtimes():
    maps = """
7f00-7f01 r-xp 00000000 fe:00 1 /venv/torch/lib/libgomp.so.1
7f01-7f02 r--p 00001000 fe:00 1 /venv/torch/lib/libgomp.so.1
7f02-7f03 r-xp 00000000 fe:00 2 /usr/lib/libiomp5.so
7f03-7f04 r-xp 00000000 fe:00 3 /venv/lib/libgomp-a34b3233.so.1.0.0
7f04-7f05 r-xp 00000000 fe:00 4 /usr/lib/libomptarget-like.so
7f05-7f06 rw-p 00000000 00:00 0
"""
    assert doctor.openmp_runtimes(maps) == [
        "/usr/lib/libiomp5.so",
        "/venv/lib/libgomp-a34b3233.so.1.0.0",
        "/venv/torch/lib/libgomp.so.1",
    ]


def test_only_one_openmp_runtime_is_loaded():
    assert doctor.check_openmp().problem is None


def test_gpu_that_torch_cannot_use(monkeypatch):
    monkeypatch.setattr(doctor.Path, "exists", lambda path: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "CUDA build of torch" in doctor.check_cuda().problem
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "driver" in doctor.check_cuda().problem
    monkeypatch.setattr(doctor.Path, "exists", lambda path: False)
    assert doctor.check_cuda().problem is None


def test_gpu_that_our_kernels_cannot_use(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU {i}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (7, 5))
    monkeypatch.setattr(ops, "with_cuda", lambda: False)
    assert "install nvcc" in doctor.check_cuda().problem
    monkeypatch.setattr(ops, "with_cuda", lambda: True)
    monkeypatch.setattr(ops, "cuda_problem", lambda i: "no kernel image" if i == 1 else None)
    check = doctor.check_cuda()
    assert "GPU 0 (7.5), GPU 1 (7.5)" in check.found and check.problem == "no kernel image"


def test_override_of_the_instruction_set(monkeypatch):
    monkeypatch.setattr(ops, "cpu_capability", lambda dtype=None: "baseline")
    monkeypatch.setenv("RNN_EXT_CPU_CAPABILITY", "baseline")
    assert doctor.check_instructions().problem is None
    monkeypatch.delenv("RNN_EXT_CPU_CAPABILITY")
    monkeypatch.setattr(ops, "missing_cpu_capability", lambda: "avx2")
    assert "the processor has avx2, the library was built without" in doctor.check_instructions().problem
    monkeypatch.setattr(ops, "missing_cpu_capability", lambda: None)
    assert doctor.check_instructions().problem is None
