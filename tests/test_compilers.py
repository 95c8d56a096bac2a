"""The sources with compilers other than the one that has built them, where there are any."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import test_cpu_sanitize
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parent.parent
CLANG = [name for name in ("clang++", *(f"clang++-{version}" for version in range(30, 13, -1))) if shutil.which(name)]
AARCH64 = "aarch64-linux-gnu-g++"

SOURCES = sorted(path for folder in ("cpu", "ops") for path in (ROOT / "csrc" / folder).glob("*.cpp"))


@pytest.mark.skipif(not CLANG, reason="there is no clang++")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_clang(source):
    libraries = [f"-isystem{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
    command = [CLANG[0], "-std=c++20", "-fsyntax-only", f"-I{ROOT / 'csrc'}", *libraries, "-DTORCH_EXTENSION_NAME=_C"]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not all(map(shutil.which, (AARCH64, "qemu-aarch64"))), reason=f"no {AARCH64} or qemu-aarch64")
def test_aarch64(tmp_path):
    """The kernels for NEON, run by an emulator (tests/cpu_sanitize/main.cpp without sanitizers), against those for SSE2
    on this machine: without and with fused multiply-adds, so to rounding."""
    flags = ["-ffp-contract=off", "-DRNN_EXT_BASELINE_ONLY"]
    test_cpu_sanitize.build(tmp_path / "write", test_cpu_sanitize.compiler(), flags, "-Og")
    test_cpu_sanitize.build(tmp_path / "compare", f"{AARCH64} -static", flags, "-Og")
    results = tmp_path / "results"  # most of a gigabyte, so it goes from one to the other
    os.mkfifo(results)
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([tmp_path / "write", "write", results], **piped) as writer:
        command = ["qemu-aarch64", tmp_path / "compare", "compare", results]
        reader = subprocess.run(command, capture_output=True, text=True, check=False)
        if reader.returncode:
            writer.kill()  # it may wait for a reader
        assert reader.returncode == 0, reader.stderr
        assert reader.stdout == f"{test_cpu_sanitize.CONFIGURATIONS}, no tiles\n"
        assert reader.stdout == writer.stdout.read()
        assert writer.wait() == 0, writer.stderr.read()
