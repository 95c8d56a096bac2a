"""nvcc's own gates: every kernel compiles for every architecture without a spill, at the known cost.

The cost of each kernel (registers per thread, static shared memory per block) stands
in benchmarks/results/cuda_resources.json with the nvcc that gave it. The same nvcc must give it again; another one has
only to compile without spills. After a change that is meant:

    RNN_EXT_UPDATE_RESOURCES=1 python -m pytest tests/test_cuda_compile.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import stored

from tests.cuda_emulator.build import CUDA, HERE, ROOT, kernel_sources

TABLE = ROOT / "benchmarks" / "results" / "cuda_resources.json"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120")
UPDATE = "RNN_EXT_UPDATE_RESOURCES"

NUMBERS = ["registers", "bytes of shared memory"]

Resources = dict[str, list[int]]  # kernel -> NUMBERS


def nvcc_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", text)
    assert found, text
    return found[1]


def demangle(names: list[str]) -> list[str]:
    """C++ names without the parts that say nothing: namespaces, return types, parameters."""
    filt = shutil.which("cu++filt") or shutil.which("c++filt")
    if not names or filt is None:
        return names
    plain = subprocess.run([filt], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    result = []
    for name in plain.splitlines():
        name = re.sub(r"rnn_ext::(cuda|cells)::|\((int|bool)\)|^void ", "", name)
        result.append(name.split("(")[0])
    return result


def read_report(report: str) -> Resources:
    """What `ptxas -v` says of each kernel."""
    kernels: Resources = {}
    blocks = re.split(r"Compiling entry function '(\w+)'", report)[1:]
    for name, block in zip(demangle(blocks[::2]), blocks[1::2], strict=True):
        registers = re.search(r"Used (\d+) registers", block)
        shared = re.search(r"(\d+) bytes smem", block)
        assert registers, block
        kernels[name] = [int(registers[1]), int(shared[1]) if shared else 0]
    return kernels


def compile_source(nvcc: str, source: Path, arch: str, folder: Path) -> subprocess.CompletedProcess[str]:
    # The host's part, which is the same for all, takes as long as the device's: once is enough.
    output = "-c" if arch == ARCHITECTURES[0] else "-cubin"
    command = [nvcc, "-std=c++17", f"-arch={arch}", "-I", str(CUDA.parent), output, str(source)]
    gates = ["-Werror", "all-warnings", "-Xptxas", "-v,--warn-on-spills,--warning-as-error"]
    return subprocess.run(
        [*command, *gates, "-o", str(folder / f"{source.stem}-{arch}.o")], capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def report_of(nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[int, str]]:
    """Compiles a source for an architecture, once for all test processes: return code and what was printed."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "cuda_compile"
    folder.mkdir(exist_ok=True)

    def report(source: str, arch: str) -> tuple[int, str]:
        known = folder / f"{source}-{arch}.json"
        if not known.exists():
            result = compile_source(nvcc, CUDA / source, arch, folder)
            mine = known.with_suffix(f".{os.getpid()}")
            mine.write_text(json.dumps([result.returncode, result.stdout + result.stderr]))
            mine.replace(known)
        return tuple(json.loads(known.read_text()))

    return report


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", [path.name for path in kernel_sources()])
def test_compiles_without_spills(report_of: Callable[[str, str], tuple[int, str]], source: str, arch: str) -> None:
    code, text = report_of(source, arch)
    assert code == 0, text


def test_ptx_of_features_no_kernel_uses_yet(nvcc: str, tmp_path: Path) -> None:
    result = compile_source(nvcc, HERE / "good_kernels.cu", "sm_90a", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_resources(nvcc: str, report_of: Callable[[str, str], tuple[int, str]]) -> None:
    version = nvcc_version(nvcc)
    found: dict[str, Any] = {"nvcc": version, "numbers": NUMBERS, "architectures": list(ARCHITECTURES)}
    jobs = [(path.name, arch) for path in sorted(kernel_sources()) for arch in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(report_of, *zip(*jobs, strict=True)))
    for source in dict.fromkeys(source for source, _ in jobs):
        of = [read_report(text) for (name, _), (_, text) in zip(jobs, reports, strict=True) if name == source]
        found[source] = {kernel: [each.get(kernel) for each in of] for kernel in sorted(set().union(*of))}
    if os.environ.get(UPDATE):
        TABLE.parent.mkdir(parents=True, exist_ok=True)
        TABLE.write_text(stored.text(found))
    known = json.loads(TABLE.read_text())
    if known["nvcc"] != version:
        pytest.skip(f"the table is of nvcc {known['nvcc']}, this is {version}")
    assert found == known, f"resources changed; if that is meant, run again with {UPDATE}=1"
