"""The CPU kernels with compilers other than the one that has built them, where there are any."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CLANG = [name for name in ("clang++", *(f"clang++-{version}" for version in range(30, 13, -1))) if shutil.which(name)]


@pytest.mark.skipif(not CLANG, reason="there is no clang++")
@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), ids=lambda path: path.stem)
def test_clang(source):
    """setup.py takes clang++ where there is no other compiler."""
    command = [CLANG[0], "-std=c++20", "-fsyntax-only", "-I", str(ROOT / "csrc"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
