"""python -m rnn_ext doctor: what this machine and installation can do, and how to mend what they cannot.

Needs nothing but torch, and works where the C++ library does not.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import rnn_ext
from rnn_ext import _loader, backends, ops
from rnn_ext._nvcc import find_nvcc
from rnn_ext._options import Parser
from rnn_ext._processor import cpu_features
from rnn_ext.bench import allowed_cores

CPU_FEATURES = ("sse4_2", "avx", "fma", "f16c", "avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


@dataclass(frozen=True)
class Check:
    """One line of the report: what was found and, where something is wrong, what is and what to do about it."""

    name: str
    found: str
    problem: str | None = None
    fatal: bool = False  # the custom backend cannot work


def check_library() -> Check:
    """The compiled library: present, of this torch and Python, no older than its sources."""
    error = ops.load_error()
    if error is not None:
        return Check("library", "not loaded", error, fatal=True)
    info = importlib.import_module("rnn_ext._build_info")
    cuda = "with" if info.CUDA else "without"
    found = f"built for torch {info.TORCH_VERSION} by {info.COMPILER}, {cuda} CUDA kernels"
    folders = ("cells", "cpu", "ops", *(["cuda"] if info.CUDA else []))
    sources = [path for folder in folders for path in (_loader.FOLDER.parent / "csrc" / folder).glob("*.*")]
    changed = max((path.stat().st_mtime for path in sources), default=0.0)
    if changed > max(path.stat().st_mtime for path in _loader.FOLDER.glob("_C.*")):
        return Check("library", found, f"csrc has changed since the library was built; {_loader.remedy()}")
    return Check("library", found)


def check_compiler() -> Check:
    """The C++ compiler; one is missed only where the library is yet to be built."""
    named = os.environ.get("CXX", "").strip()
    for command in [named] if named else ["c++", "g++", "clang++"]:  # as setup.py looks for it
        # A ValueError is of quotes that are not closed.
        with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
            done = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True, timeout=20)
            if done.returncode == 0:
                return Check("compiler", (done.stdout.splitlines() or [command])[0])
    found = f"CXX={named} is no program, or fails" if named else "none"
    problem = None if ops.is_available() else "the library cannot be built: install g++ (Debian: apt-get install g++)"
    return Check("compiler", found, problem)


def check_nvcc() -> Check:
    nvcc = find_nvcc()
    if nvcc is None:
        return Check("nvcc", "none (only building the CUDA kernels needs it)")
    release = re.search(r"release ([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    return Check("nvcc", f"{release.group(1) if release else 'of unknown release'} ({nvcc})")


def check_cpu() -> Check:
    name, features = cpu_features()
    return Check("processor", f"{name}: {' '.join(f for f in CPU_FEATURES if f in features) or 'features unknown'}")


def check_instructions() -> Check:
    """The instruction set that our kernels use, and whether the processor has a better one."""
    if not ops.is_available():
        return Check("instructions", "unknown: the library is not loaded")
    used = ops.cpu_capability()
    wanted = os.environ.get("RNN_EXT_CPU_CAPABILITY")
    if wanted:
        return Check("instructions", f"{used} (RNN_EXT_CPU_CAPABILITY={wanted})")
    granted = ops.cpu_capability(torch.bfloat16)
    if granted != used:
        problem = "Linux refuses the tiles of AMX, as where a thread has too small a stack for signals"
        return Check("instructions", granted, problem)
    missing = ops.missing_cpu_capability()
    if missing:
        return Check(
            "instructions", used, f"the processor has {missing}, the library was built without; {_loader.remedy()}"
        )
    return Check("instructions", used)


def check_threads() -> Check:
    cores = len(allowed_cores())
    threads = torch.get_num_threads()
    found = f"{threads} of torch's on {cores} core{'s'[: cores != 1]}"
    if threads > cores:
        return Check("threads", found, f"more threads than cores wait for each other: set OMP_NUM_THREADS={cores}")
    return Check("threads", found)


def openmp_runtimes(maps: str) -> list[str]:
    """The OpenMP runtimes among the files mapped into a process (the text of /proc/PID/maps)."""
    return sorted(set(re.findall(r"/\S*/lib(?:gomp|iomp5|omp)\b\S*\.so\S*", maps)))


def check_openmp() -> Check:
    try:
        runtimes = openmp_runtimes(Path("/proc/self/maps").read_text())
    except OSError:
        return Check("OpenMP", "unknown: no /proc")
    problem = None
    if len(runtimes) > 1:
        problem = f"two OpenMP runtimes have a pool of threads each and slow each other down; {_loader.remedy()}"
    return Check("OpenMP", ", ".join(runtimes) or "none loaded", problem)


def check_cuda() -> Check:
    driver = Path("/dev/nvidiactl").exists()
    if torch.version.cuda is None:
        problem = "there is an NVIDIA GPU, but this torch is a CPU build: install a CUDA build of torch"
        return Check("CUDA", "torch is built without it", problem if driver else None)
    if not torch.cuda.is_available():
        problem = f"torch {torch.__version__} cannot use the GPU: is the driver too old for CUDA {torch.version.cuda}?"
        return Check("CUDA", f"{torch.version.cuda} in torch, no usable GPU", problem if driver else None)
    names = [
        "{} ({}.{})".format(torch.cuda.get_device_name(i), *torch.cuda.get_device_capability(i))
        for i in range(torch.cuda.device_count())
    ]
    found = f"{torch.version.cuda} in torch, {', '.join(names)}"
    if not ops.with_cuda():
        problem = "the library has no CUDA kernels, so torch's run there; install nvcc and build it again"
        return Check("CUDA", found, problem if ops.is_available() else None)
    problems = [ops.cuda_problem(i) for i in range(torch.cuda.device_count())]
    return Check("CUDA", found, next((problem for problem in problems if problem), None))


def largest_difference() -> float:
    """Between the output and gradients of our kernels and of torch's, for one small layer of each kind."""
    worst = 0.0
    with torch.random.fork_rng(devices=[]):
        for kind in (rnn_ext.RNN, rnn_ext.GRU, rnn_ext.LSTM):
            layer = kind(5, 7, bidirectional=True, dtype=torch.float64, backend="custom")
            input = torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True)
            results = []
            for backend in ("custom", "native"):
                rnn_ext.set_backend(layer, backend)
                output = layer(input)[0]
                results.append([output, *torch.autograd.grad(output.square().sum(), [input, *layer.parameters()])])
            worst = max(worst, *((ours - torchs).abs().max().item() for ours, torchs in zip(*results, strict=True)))
    return worst


def check_custom() -> Check:
    if not ops.is_available():
        return Check("custom", "cannot run: see library")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    able = []
    for device in devices:
        dtypes = [
            str(dtype).removeprefix("torch.")
            for dtype in sorted(backends.CUSTOM_DTYPES, key=str)
            if backends.can_run_custom(torch.empty(0, dtype=dtype, device=device))[0]
        ]
        able.append(f"{device}: {', '.join(dtypes)}" if dtypes else f"{device}: nothing, torch's kernels take over")
    difference = largest_difference()
    found = f"RNN, GRU, LSTM on {'; '.join(able)}; differs from torch by at most {difference:.1e} in float64"
    if not difference < 1e-9:
        return Check("custom", found, f"our kernels disagree with torch's; {_loader.remedy()}", fatal=True)
    return Check("custom", found)


def check_native() -> Check:
    return Check("native", "torch's own kernels: whatever torch.nn.RNN, GRU and LSTM can do on this torch")


CHECKS: dict[str, Callable[[], Check]] = {
    "library": check_library,
    "compiler": check_compiler,
    "nvcc": check_nvcc,
    "processor": check_cpu,
    "instructions": check_instructions,
    "threads": check_threads,
    "OpenMP": check_openmp,
    "CUDA": check_cuda,
    "custom": check_custom,
    "native": check_native,
}


def report() -> list[Check]:
    """Every check, in the order printed. A check that fails itself becomes a problem, not an exception."""
    checks = [
        Check("Python", f"{platform.python_version()} ({sys.executable})"),
        Check("rnn_ext", f"{rnn_ext.__version__} ({_loader.FOLDER})"),
        Check("torch", f"{torch.__version__} ({Path(torch.__file__).parent})"),
    ]
    for name, check in CHECKS.items():
        try:
            checks.append(check())
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            checks.append(Check(name, "the check itself failed", f"{text}; {_loader.remedy()}", fatal=name == "custom"))
    return checks


def main(argv: list[str] | None = None) -> int:
    """Prints the report; returns 1 where the custom backend cannot work, else 0."""
    Parser(prog="python -m rnn_ext doctor", description=__doc__).parse_args(argv)
    checks = report()
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{'!' if check.problem else ' '} {check.name:{width}}  {check.found}")
    problems = [check for check in checks if check.problem]
    print()
    for check in problems:
        print(f"! {check.name}: {check.problem}")
    if any(check.fatal for check in checks):
        print("The custom backend cannot work; backend='native' and 'auto' run torch's kernels.")
        return 1
    if not problems:
        print("All is well.")
    return 0
