"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, without torch (see cpu_sanitize/main.cpp)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
SOURCES = [*sorted((CSRC / "cpu").glob("*.cpp")), HERE / "cpu_sanitize" / "main.cpp"]
# Unoptimized, so that no access is optimized away, and not inlined: a tenth of the time to compile.
FLAGS = ["-std=c++20", "-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-pthread"]
FLAGS += ["-DRNN_EXT_OUT_OF_LINE"]


def compiler() -> str:
    """A C++ compiler whose sanitizers work here; skips the test where there is none."""
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not found:
        pytest.skip("there is no C++ compiler")
    return found


def build(folder: Path) -> Path:
    cxx = compiler()
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    if subprocess.run([cxx, *FLAGS, str(probe), "-o", str(folder / "probe")], capture_output=True).returncode:
        pytest.skip(f"{cxx} cannot link the sanitizers' libraries")
    objects = [folder / f"{source.stem}.o" for source in SOURCES]
    for source, target in zip(SOURCES, objects, strict=True):
        subprocess.run([cxx, *FLAGS, f"-I{CSRC}", "-c", str(source), "-o", str(target)], check=True)
    program = folder / "main"
    subprocess.run([cxx, *FLAGS, *map(str, objects), "-o", str(program)], check=True)
    return program


@pytest.mark.slow
def test_kernels_under_sanitizers(tmp_path):
    """No access outside what the caller gave, no unwritten memory used, no undefined behaviour, nothing leaked."""
    program = build(tmp_path)
    for mode in ([], ["threads"]):
        done = subprocess.run([str(program), *mode], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        assert "configurations" in done.stdout
