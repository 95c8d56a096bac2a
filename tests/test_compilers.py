"""The sources with compilers other than the one that has built them, where there are any."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parent.parent
CLANG = [name for name in ("clang++", *(f"clang++-{version}" for version in range(30, 13, -1))) if shutil.which(name)]

SOURCES = sorted(path for folder in ("cpu", "ops") for path in (ROOT / "csrc" / folder).glob("*.cpp"))


@pytest.mark.skipif(not CLANG, reason="there is no clang++")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_clang(source):
    libraries = [f"-isystem{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
    command = [CLANG[0], "-std=c++20", "-fsyntax-only", f"-I{ROOT / 'csrc'}", *libraries, "-DTORCH_EXTENSION_NAME=_C"]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
