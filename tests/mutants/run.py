"""Seeded faults: does a test see each of them?

    python -m tests.mutants.run [NAME ...]

A mutant is a patch in this folder. Above the patch stand the fault, in words, and the tests that should see it. The
patches are applied one at a time to a copy of the project. The copy is built again if the fault is in C++, with the
kernels of the baseline instruction set alone. A mutant is killed if a test fails, crashes or does not end. The program
exits with 1 if a mutant survives or cannot be tried.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NOT_COPIED = (".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", "_C.*.so", ".*_cache")
SECONDS = 900  # for the tests of a mutant


@dataclass(frozen=True)
class Mutant:
    name: str
    fault: str
    file: str
    tests: tuple[str, ...]
    patch: Path

    @property
    def is_compiled(self) -> bool:
        """Whether the library must be built again. Tests compile the CUDA kernels themselves, for the emulator."""
        return self.file.startswith("csrc/") and not self.file.startswith("csrc/cuda/")


@dataclass(frozen=True)
class Verdict:
    outcome: str  # killed, survived or broken
    why: str
    seconds: float


def read(patch: Path) -> Mutant:
    """A mutant from its patch. Raises ValueError if a line of the head is missing."""
    text = patch.read_text()
    found = [re.search(pattern, text, re.M) for pattern in (r"^Fault: (.+)$", r"^\+\+\+ b/(.+)$", r"^Tests: (.+)$")]
    if not all(found):
        raise ValueError(f"{patch}: expected lines that begin with 'Fault: ', 'Tests: ' and '+++ b/'")
    fault, file, tests = (match[1] for match in found if match)
    return Mutant(patch.stem, fault, file, tuple(tests.split()), patch)


def apply(mutant: Mutant, tree: Path, *options: str) -> None:
    """Raises RuntimeError, with git's words, if the patch does not fit the tree."""
    command = ["git", "apply", *options, str(mutant.patch)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the patch does not apply: {done.stderr.strip()}")


def build(tree: Path) -> None:
    """Raises RuntimeError, with the end of the compiler's words, if the library does not compile."""
    environment = {**os.environ, "RNN_EXT_CPU_ISAS": "baseline", "RNN_EXT_BUILD": "cpu"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(
        command, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"does not compile: {done.stdout[-400:]}")


def judge(tests: Sequence[str], tree: Path, seconds: float = SECONDS) -> Verdict:
    """What these tests say of a tree. Where no test ran the verdict is `broken`."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "2", "-p", "no:cacheprovider", "-p", "no:warnings"]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [*command, *tests], cwd=tree, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return Verdict("killed", f"no end after {seconds:g} s", seconds)
    took = time.perf_counter() - start
    failed = re.search(r"^FAILED (\S+)", done.stdout, re.M)
    if failed:
        return Verdict("killed", failed[1], took)
    if done.returncode == 0:
        return Verdict("survived", f"{' '.join(tests)} passed", took)
    return Verdict("broken", (done.stdout + done.stderr)[-400:], took)


def attempt(mutant: Mutant, clean: Path, tree: Path) -> Verdict:
    """The tests' verdict on a mutant. `tree` becomes a copy of `clean`: it is always the same folder, so that ninja
    finds what it has built."""
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(clean, tree, symlinks=True)
    try:
        apply(mutant, tree)
        if mutant.is_compiled:
            build(tree)
    except RuntimeError as error:
        return Verdict("broken", str(error), 0)
    return judge(mutant.tests, tree)


def report(verdicts: dict[Mutant, Verdict]) -> Table:
    killed = sum(verdict.outcome == "killed" for verdict in verdicts.values())
    table = Table("mutant", "fault", "outcome", "by", "s", title=f"{killed} of {len(verdicts)} mutants killed")
    for mutant, verdict in verdicts.items():
        table.add_row(mutant.name, mutant.fault, verdict.outcome, verdict.why, f"{verdict.seconds:.0f}")
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants to try (default: all)")
    options = parser.parse_args(arguments)
    mutants = {patch.stem: read(patch) for patch in sorted(HERE.glob("*.patch"))}
    unknown = [name for name in options.names if name not in mutants]
    if unknown:
        parser.error(f"unknown mutant {unknown[0]!r}, expected one of {', '.join(mutants)}")
    chosen = [mutants[name] for name in options.names or mutants]

    console = Console()
    verdicts = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        clean, tree = Path(folder, "clean"), Path(folder, "tree")
        shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
        console.print("building the project without a fault")
        build(tree)
        shutil.copytree(tree, clean, symlinks=True)
        console.print("running all of these tests without a fault")
        before = judge(sorted({test for mutant in chosen for test in mutant.tests}), tree, 4 * SECONDS)
        if before.outcome != "survived":
            console.print(f"a test fails without a fault: {before.why}", markup=False)
            return 1
        for number, mutant in enumerate(chosen, 1):
            verdicts[mutant] = attempt(mutant, clean, tree)
            verdict = verdicts[mutant]
            line = f"{number}/{len(chosen)} {mutant.name}: {verdict.outcome}, {verdict.why}, {verdict.seconds:.0f} s"
            console.print(line, markup=False, highlight=False)
    console.print(report(verdicts))
    return 0 if all(verdict.outcome == "killed" for verdict in verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
