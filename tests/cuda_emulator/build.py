"""Builds programs that run CUDA sources in the emulator: plain, under ASan + UBSan, or under TSan.

Objects are cached by the content of everything they could include, so a second build costs nothing.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CUDA = ROOT / "csrc" / "cuda"
EMULATOR = HERE / "emu"
BUILD = ROOT / "build" / "cuda_emulator"
TORCH_SOURCES = (
    ROOT / "csrc/ops/layer.cpp",
    ROOT / "csrc/ops/cuda_call.cpp",
    ROOT / "csrc/ops/cuda_layer.cpp",
    HERE / "torch_layer.cpp",
)

WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-pass-failed"]  # unroll pragmas are nvcc's
# The checks that can fire in a kernel; all of UBSan takes eight times as long to compile.
UNDEFINED = "alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero"
SANITIZERS: dict[str, list[str]] = {
    "plain": [],
    "asan": [f"-fsanitize=address,{UNDEFINED}", f"-fno-sanitize-recover={UNDEFINED}", "-fno-omit-frame-pointer"],
    "tsan": ["-fsanitize=thread"],
}
FLAVOURS = tuple(SANITIZERS)


def compilers() -> list[str]:
    """The host compilers that are installed, g++ first."""
    return [name for name in ("g++", "clang++") if shutil.which(name)]


def kernel_sources() -> list[Path]:
    return sorted(CUDA.glob("*.cu"))


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _csrc(source: Path) -> Path:
    """The csrc folder whose headers a source includes: the one it lies in (mutate.py has copies) or the project's."""
    return next((folder for folder in source.parents if folder.name == "csrc"), CUDA.parent)


def _headers(source: Path) -> list[Path]:
    folders = [EMULATOR]
    if source.parent != EMULATOR:
        folders += [_csrc(source) / "cells", _csrc(source) / "cuda"]
    if source in TORCH_SOURCES:
        folders += [_csrc(source) / "ops", _csrc(source) / "cpu"]
    return [path for folder in folders for path in sorted(folder.glob("*.h"))]


def _flags(source: Path, flavour: str) -> list[str]:
    flags = ["-g1", "-fPIC", *WARNINGS, "-I", str(_csrc(source)), "-I", str(EMULATOR)]
    if source in TORCH_SOURCES:
        return [*flags, "-std=c++20", "-O0", "-DRNN_EXT_EMULATED", *(f"-isystem{path}" for path in _torch_includes())]
    flags.append("-std=c++17")
    runtime = source.parent == EMULATOR and source.name != "memory.cpp"
    if runtime:  # the runtime itself stays out of the sanitizers' sight, but tells them about its fibers
        return [*flags, "-O2", *({"asan": ["-DEMU_ASAN"], "tsan": ["-DEMU_TSAN"]}.get(flavour, []))]
    # Unoptimised code compiles in a fifth of the time under a sanitizer, and the shapes are small.
    return [*flags, "-O1" if flavour == "plain" else "-O0", *SANITIZERS[flavour]]


@functools.cache
def _torch_includes() -> tuple[str, ...]:
    from torch.utils.cpp_extension import include_paths

    return (*include_paths(), sysconfig.get_path("include"))


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")


def build(
    sources: Sequence[Path],
    flavour: str = "plain",
    compiler: str = "g++",
    folder: Path = BUILD,
    jobs: int = 2,
    link: Sequence[str] = (),
) -> Path:
    """Compile and link `sources` with the emulator; returns the program, or what else the arguments `link` make of it.

    Raises:
        RuntimeError: with the compiler's words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be compiling the same
        return _build(sources, flavour, compiler, folder, jobs, link)


def _build(sources: Sequence[Path], flavour: str, compiler: str, folder: Path, jobs: int, link: Sequence[str]) -> Path:
    all_sources = [*sources, *sorted(EMULATOR.glob("*.cpp"))]
    objects, commands = [], []
    for source in all_sources:
        flags = _flags(source, flavour)
        key = hashlib.sha256(f"{compiler}{flags}{_digest([*_headers(source), source])}".encode()).hexdigest()[:16]
        target = folder / f"{source.stem}-{flavour}-{key}.o"
        objects.append(target)
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}.o")
            commands.append(([compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(partial)], partial, target))
    running: list[tuple[subprocess.Popen[str], list[str], Path, Path]] = []

    def finish_one() -> None:
        process, command, partial, target = running.pop(0)
        output = process.communicate()[0]
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{output}")
        partial.replace(target)

    for command, partial, target in commands:
        if len(running) == jobs:
            finish_one()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        running.append((process, command, partial, target))
    while running:
        finish_one()

    key = hashlib.sha256("".join(map(str, [*objects, *link])).encode()).hexdigest()[:16]
    program = folder / f"{sources[-1].stem}-{flavour}-{key}"
    if not program.exists():
        partial = program.with_name(f"{program.name}.{os.getpid()}")
        _run([compiler, *SANITIZERS[flavour], *map(str, objects), *link, "-o", str(partial)])
        partial.replace(program)
    return program


@functools.cache
def driver(flavour: str = "plain", compiler: str = "g++") -> Path:
    """The program that runs layer calls: every kernel source and driver.cpp."""
    return build([*kernel_sources(), HERE / "driver.cpp"], flavour, compiler)


@functools.cache
def torch_library() -> Path:
    """The library of torch_layer.cpp: the torch boundary of the CUDA kernels, over the emulator."""
    import torch

    folder = Path(torch.__file__).parent / "lib"
    link = ["-shared", f"-L{folder}", f"-Wl,-rpath,{folder}", "-lc10", "-ltorch", "-ltorch_cpu"]
    return build([*kernel_sources(), *TORCH_SOURCES], link=link)


def environment(
    schedule: int = 0, arch: int = 90, seed: int = 1, resident_threads: int | None = None
) -> dict[str, str]:
    """The environment that tells a program how to schedule its threads and what GPU to be."""
    env = dict(os.environ)
    env.update(EMU_SCHEDULE=str(schedule), EMU_ARCH=str(arch), EMU_SEED=str(seed))
    if resident_threads:
        env["EMU_RESIDENT_THREADS"] = str(resident_threads)
    # Fibers move between stacks, which ASan's fake stack does not follow.
    env["ASAN_OPTIONS"] = "detect_stack_use_after_return=0:detect_leaks=0"
    env["UBSAN_OPTIONS"] = "print_stacktrace=1"
    env["TSAN_OPTIONS"] = "halt_on_error=1"
    return env


def command_line(program: Path, flavour: str) -> list[str]:
    """How to start a program: TSan's memory layout wants address randomisation off on recent Linux kernels."""
    if flavour == "tsan" and shutil.which("setarch"):
        return ["setarch", platform.machine(), "-R", str(program)]
    return [str(program)]
