"""Deletes or weakens every synchronisation and index bound of csrc/cuda, one at a time: does a test see it?

    python -m tests.cuda_emulator.mutate [--only synchronisation|bound] [--match TEXT]

A mutant is killed when a case ends with a report or a wrong number in some build and schedule. One that survives has to
stand in EXPLAINED with the reason why nothing could be seen; the program ends with 1 if one does not, or if an
explained one dies.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tests.cuda_emulator import build
from tests.cuda_emulator.case import Case, KernelReportError, errors, failures

# The headers that hold kernels, and what a mutated one is compiled into.
SOURCES = {
    "sequence.h": ("cuda/step_float32.cu", "driver.cpp"),
    "step_kernels.h": ("cuda/step_float32.cu",),
    "variant_kernels.h": ("cuda/variant_float32.cu",),
    "persistent_kernels.h": ("cuda/persistent_float32.cu",),
    "tensor_kernels.h": ("cuda/tensor_bfloat16.cu",),
    "cluster_kernels.h": ("cuda/cluster_bfloat16.cu",),
    "cluster_backward.h": ("cuda/cluster_bfloat16.cu",),
    "grid_kernels.h": ("cuda/grid_float32.cu", "cuda/grid_bfloat16.cu"),
    "device_ops.h": ("cuda/grid_float32.cu",),  # the orders of its twins only
}

SYNCHRONISATIONS = re.compile(
    r"(__syncthreads|__syncwarp|named_barrier|copy_async_\w+(<\w+>)?|cluster_\w+|mbarrier_\w+|store_async_\w+"
    r"|block\.wait|block\.tell)\([^;]*\);"
)
ORDERS = re.compile(r"__ATOMIC_(ACQUIRE|RELEASE)")
# A comparison that guards something: in an if, a conditional expression, or a conjunction.
OPERAND = r"(?:\w+::)*[\w.]+(?:\([\w.]*\))?(?:\[\w+\])?(?: [*+] (?:\w+::)*\w+)*"
COMPARISON = re.compile(rf"(?<![\w<.:]){OPERAND} (<|>=) {OPERAND}(?![\w(<:])")
LOOP = re.compile(r"for \(.*;.*;.*\)")
SHARED_LOOP = re.compile(r"for \(\w+ \w+ = (thread|lane|threadIdx\.x);")  # by the threads together
LEAVES = re.compile(r"\b(return|continue);")


# Seconds for a case of less than one, or of three under TSan. What hangs does so in the plain build, the first; the
# sanitizers' builds may only be slow on a busy machine.
TIME_LIMITS = {"plain": 20, "asan": 120, "tsan": 240}


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int
    kind: str  # synchronisation or bound
    line_text: str
    before: str  # what was taken away
    after: str
    text: str  # of the mutated file

    @property
    def name(self) -> str:
        return f"{self.file}: {self.before}"


# Mutants that live, and why: "file: what was taken away".
EXPLAINED = {
    "step_kernels.h: k0 + kChunk < hidden": "saves work: a chunk of zeros, never read",
    "step_kernels.h: row0 >= d.now.rows": "saves work: every row is checked again",
    "step_kernels.h: row0 >= rows": "saves work: every row is checked again",
    "variant_kernels.h: n >= backward_rows(d)": "saves work: gradients_arrive writes nothing for such a row",
    "tensor_kernels.h: __syncwarp(kWholeWarp);": "orders nothing: a thread reads what it wrote; spares registers",
    "cluster_kernels.h: slot < kGates * kUnits": "a gru leaves a slot of its products empty: nobody reads its sums",
    "cluster_kernels.h: i < kRows * kColumns": "one zero too many, where h of the first timestep is yet to arrive",
    "cluster_kernels.h: step < steps": "the row after the last timestep: computed, not read",
    "cluster_kernels.h: group < kGates": "saves work: a prefetch changes nothing, wherever it points",
    "cluster_kernels.h: tile_unit < hidden": "saves work: a prefetch changes nothing, wherever it points",
    "cluster_backward.h: step < steps": "the row after the last timestep: computed, not read",
    "grid_kernels.h: first + i * kGridWarps < pairs": "saves work: both factors are zero there",
    "grid_kernels.h: tile + j < rows": "behind the weight lie the block's sums, and what is read there is dropped",
}


def mutants(file: Path) -> Iterator[Mutant]:
    """Every mutant of a source, in order."""
    text = file.read_text()
    at = 0
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        code = line.split("//")[0]
        edits: list[tuple[str, int, int, str]] = []
        wrappers = file.name == "device_ops.h"
        for found in ORDERS.finditer(code):
            edits.append(("synchronisation", *found.span(), "__ATOMIC_RELAXED"))
        for found in SYNCHRONISATIONS.finditer(code):
            if "RNN_EXT_DEVICE" not in code and not wrappers:
                # What it names stays in use, or the compiler's warning would end the mutant.
                edits.append(("synchronisation", *found.span(), f"if (false) {found[0]}"))
        guards = "#" not in code and (
            " if (" in code or "?" in code or "&&" in code or "return " in code or "const bool" in code
        )
        for found in COMPARISON.finditer(code):
            if LOOP.search(code):
                # The others run over register arrays.
                if "hidden" in found[0] or "length" in found[0] or SHARED_LOOP.search(code):
                    edits.append(("bound", *found.span(), found[0].replace("<", "<=")))
            elif guards and not wrappers and "constexpr" not in code and "static_assert" not in code:
                never = LEAVES.search(code)
                edits.append(("bound", *found.span(), f"({found[0]} {'&& false' if never else '|| true'})"))
        for kind, start, end, after in edits:
            changed = text[: at + start] + after + text[at + end :]
            yield Mutant(file.name, number, kind, line.strip(), code[start:end], after, changed)
        at += len(line)


def cases(mutant: Mutant) -> list[Case]:
    """Small shapes that between them go everywhere: partial tiles, several chunks, packed, padded, resets."""
    file = "grid_" if mutant.file == "device_ops.h" else mutant.file
    kernel = next((name for name in ("persistent", "tensor", "cluster", "grid") if file.startswith(name)), "step")
    dtype = torch.bfloat16 if kernel in ("tensor", "cluster") else torch.float32
    base = Case("gru", kernel=kernel, dtype=dtype, batch=3, hidden=19, length=4, bidirectional=True, backward=True)
    if kernel == "grid":
        base = replace(base, units=8)
    ragged = replace(base, cell="lstm", lengths=(6, 0, 2), resets=0.3)
    packed = replace(
        base, cell="lstm", packed=True, length=5, batch=10, lengths=(5, 5, 4, 3, 2, 1, 1, 1, 1, 1), resets=0.3
    )
    if mutant.file == "variant_kernels.h":  # rows of two warps
        options = {"kernel": "pointwise", "layer_norm": True, "hidden": 40, "zoneout": 0.3, "recurrent_dropout": 0.4}
        return [replace(packed, **options), replace(ragged, **options)]
    fused = [packed, ragged, base, replace(base, hidden=32, batch=2)]
    if kernel == "grid" and mutant.kind == "synchronisation":
        # TSan remembers what some 250 threads did, no more: two blocks of up to 128.
        few = replace(packed, batch=8, lengths=packed.lengths[:8], hidden=7, units=4, bidirectional=False)
        return [few, replace(ragged, cell="gru", hidden=7, units=4, bidirectional=False)]
    if kernel == "grid":
        fused += [replace(packed, dtype=torch.bfloat16), replace(base, dtype=torch.bfloat16)]
    if kernel != "step":
        return fused
    return [*fused, replace(ragged, kernel="pointwise"), replace(packed, kernel="pointwise", cell="gru")]


def verdict(mutant: Mutant, folder: Path) -> str | None:
    """What killed the mutant, or None.

    Raises:
        RuntimeError: with the compiler's words. A mutant that does not compile says nothing about the tests.
    """
    tree = folder / "csrc"
    if not tree.exists():
        for part in ("cells", "cuda"):
            shutil.copytree(build.CUDA.parent / part, tree / part)
        for source in (build.HERE / "mutated").iterdir():
            shutil.copy(source, tree / "cuda" / source.name)
        shutil.copy(build.HERE / "driver.cpp", tree / "driver.cpp")
    target = tree / "cuda" / mutant.file
    original = target.read_text()
    target.write_text(mutant.text)
    # Only the objects that the cases run are built from the mutated tree; the others come from the unchanged one.
    changed = [tree / name for name in SOURCES[mutant.file]]
    names = {source.name for source in changed}
    rest = [source for source in [*build.kernel_sources(), build.HERE / "driver.cpp"] if source.name not in names]
    try:
        for flavour, limit in TIME_LIMITS.items():
            program = build.build([*changed, *rest], flavour)
            for case in cases(mutant):
                for schedule in (0, 1) if flavour != "asan" else (0,):
                    try:
                        wrong = failures(case, errors(case, flavour, schedule=schedule, program=program, timeout=limit))
                    except KernelReportError as report:
                        return f"{flavour}: {str(report).splitlines()[0][:100]}"
                    if wrong:
                        return f"{flavour}: wrong {', '.join(wrong)}"
            program.unlink()
    finally:
        target.write_text(original)
    return None


def run(kind: str | None = None, match: str = "", sources: Iterable[str] = SOURCES) -> list[str]:
    """Try mutants of these headers; returns what is wrong: unexplained survivors, explanations of mutants that died."""
    problems, tried, survived = [], 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for source in sources:
            path = build.CUDA / source
            for mutant in mutants(path):
                if (kind and mutant.kind != kind) or match not in mutant.name:
                    continue
                tried += 1
                try:
                    killed, reason = verdict(mutant, Path(folder)), EXPLAINED.get(mutant.name)
                except RuntimeError as error:
                    problems.append(f"does not compile: line {mutant.line} of {mutant.name}: {error}")
                    continue
                survived += killed is None
                print(
                    f"{mutant.file}:{mutant.line} [{mutant.before} -> {mutant.after}] {killed or 'SURVIVES'}",
                    flush=True,
                )
                if killed is None and reason is None:
                    problems.append(f"survives without an explanation: line {mutant.line} of {mutant.name}")
                if killed is not None and reason is not None:
                    problems.append(f"is killed, yet explained as a survivor: line {mutant.line} of {mutant.name}")
    print(f"{tried} mutants, {survived} survive, {len(problems)} problems")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cuda_emulator.mutate", description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("synchronisation", "bound"))
    parser.add_argument("--match", default="", help="only mutants whose file or line contains this")
    args = parser.parse_args()
    problems = run(args.only, args.match)
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
