"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, without torch (see cpu_sanitize/main.cpp)."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from rnn_ext._processor import cpu_features

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
CONFIGURATIONS = "1242 configurations"  # all that main.cpp has
FLAGS = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS += ["-DRNN_EXT_EMULATED_TILES"]  # of AMX, whose loads and stores the sanitizers would not see


def compiler() -> str:
    """A C++ compiler; skips the test where there is none."""
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not found:
        pytest.skip("there is no C++ compiler")
    return found


def build(program: Path, cxx: str, flags: Sequence[str], kernels: str = "-O0") -> Path:
    """The driver with all CPU kernels, not inlined: a tenth of the time to compile. These are not even optimized under
    sanitizers, so that no access is optimized away; the driver, which looks at every number, is."""
    driver = program.with_name(f"{program.name}_driver.o")
    always = [*shlex.split(cxx), "-std=c++20", "-pthread", "-DRNN_EXT_OUT_OF_LINE", f"-I{CSRC}", *flags]
    main = str(HERE / "cpu_sanitize" / "main.cpp")
    subprocess.run([*always, "-O1", "-c", main, "-o", str(driver)], check=True)
    sources = sorted(map(str, (CSRC / "cpu").glob("*.cpp")))
    subprocess.run([*always, kernels, *sources, str(driver), "-o", str(program)], check=True)
    return program


@pytest.mark.slow
def test_kernels_under_sanitizers(tmp_path):
    """No access outside what the caller gave, no unwritten memory used, no undefined behaviour, nothing leaked."""
    cxx = compiler()
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    linked = [*shlex.split(cxx), *FLAGS, str(probe), "-o", str(tmp_path / "probe")]
    if subprocess.run(linked, capture_output=True, check=False).returncode:
        pytest.skip(f"{cxx} cannot link the sanitizers' libraries")
    program = build(tmp_path / "main", cxx, FLAGS)
    vectors = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni"}
    tiles = "tiles too" if vectors <= cpu_features()[1] else "no tiles"
    # That nobody uses the stack of a function that has returned takes a quarter of the time: one of the two sees to it.
    for mode, returned in ([], 0), (["threads"], 1):
        environ = {**os.environ, "ASAN_OPTIONS": f"detect_stack_use_after_return={returned}"}
        done = subprocess.run([str(program), *mode], capture_output=True, text=True, env=environ)
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout == ("10 configurations\n" if mode else f"{CONFIGURATIONS}, {tiles}\n")
