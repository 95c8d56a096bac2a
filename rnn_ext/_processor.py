"""What this processor computes with, and which kernels that needs. Imports nothing of the package: setup.py loads this
file without torch."""

from __future__ import annotations

import platform
import re
from pathlib import Path

# Instruction sets by the names of RNN_EXT_CPU_CAPABILITY, worst first. Each has kernels in parts,
# csrc/cpu/kernels_PART*. Each part needs features of the processor, by their names in /proc/cpuinfo. The first part
# decides for the whole set.
_AVX2 = {"avx2", "fma", "f16c"}
_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
INSTRUCTION_SETS: dict[str, dict[str, set[str]]] = {
    "baseline": {"baseline": set()},
    "avx2": {"avx2": _AVX2, "avx2_vnni": _AVX2 | {"avx_vnni"}},
    "avx512": {
        "avx512": _AVX512,
        "avx512_bf16": _AVX512 | {"avx512_bf16"},
        "avx512_vnni": _AVX512 | {"avx512_vnni"},
    },
    "amx": {"avx512_amx": _AVX512 | {"avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "amx_tile"}},
}
# Beyond a set's own parts. "amx" multiplies tiles of bfloat16 and 8 bits only.
_ALSO = {"amx": "avx512"}
VARIABLE = "RNN_EXT_CPU_ISAS"


def cpu_features() -> tuple[str, set[str]]:
    """The processor's name and features, as far as the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return name.group(1) if name else platform.machine(), set(flags.group(1).split() if flags else ())


def every_part() -> list[str]:
    return [part for parts in INSTRUCTION_SETS.values() for part in parts]


def parts_of(name: str) -> list[str]:
    """The parts that a set needs, those of other sets included."""
    return [*(parts_of(_ALSO[name]) if name in _ALSO else []), *INSTRUCTION_SETS[name]]


def best_set(features: set[str]) -> str:
    """The best set for a processor of these features."""
    fits = [name for name, parts in INSTRUCTION_SETS.items() if next(iter(parts.values())) <= features]
    return fits[-1]


def choose_parts(wish: str, features: set[str]) -> list[str]:
    """The parts to compile: the baseline always, and what RNN_EXT_CPU_ISAS asks for.

    Args:
        wish: "native" or "" (the best set for `features`, without parts that these cannot run), "all", or names of
            sets, separated by commas, semicolons or spaces.

    Raises:
        ValueError: `wish` names no set.
    """
    names = re.findall(r"[^\s,;]+", wish)
    if names in ([], ["native"]):
        needs = {part: needed for parts in INSTRUCTION_SETS.values() for part, needed in parts.items()}
        chosen = {part for part in parts_of(best_set(features)) if needs[part] <= features}
    elif names == ["all"]:
        chosen = set(every_part())
    else:
        wrong = [name for name in names if name not in INSTRUCTION_SETS]
        if wrong:
            known = ", ".join(INSTRUCTION_SETS)
            raise ValueError(f"{VARIABLE} is {wish!r}; expected native, all, or names out of {known}")
        chosen = {part for name in names for part in parts_of(name)}
    return [part for part in every_part() if part in chosen or part == "baseline"]


def part_of(file: str) -> str | None:
    """The part that csrc/cpu/kernels_avx512_double.cpp, say, belongs to; None for files that are always compiled."""
    stem = Path(file).stem.removeprefix("kernels_")
    fitting = [part for part in every_part() if stem == part or stem.startswith(f"{part}_")]
    return max(fitting, key=len, default=None)
