"""Loads the compiled library rnn_ext._C, or says why it cannot be used and how to mend that."""

from __future__ import annotations

import importlib
import shlex
import struct
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

FOLDER = Path(__file__).parent


def remedy() -> str:
    """The command that compiles the library anew for the running Python and torch."""
    checkout = FOLDER.parent
    if (checkout / "setup.py").is_file():
        return f"run: python -m pip install -e {shlex.quote(str(checkout))}"
    return "run, in rnn_ext's source folder: python -m pip install --force-reinstall --no-deps ."


def release(version: str) -> str:
    """'2.13.0+cpu' -> '2.13': the C++ interface of torch changes from one minor release to the next."""
    return ".".join(version.split("+")[0].split(".")[:2])


def is_whole(path: Path) -> bool:
    """Whether a library is as long as its header says: a process that loads a part of one may be killed for it.

    Of what cannot be read or is no 64-bit ELF file the system's own loader says so.
    """
    try:
        with path.open("rb") as file:
            header = file.read(64)
    except OSError:
        return True
    if len(header) < 64 or not header.startswith(b"\x7fELF\x02\x01"):
        return True
    (sections,) = struct.unpack_from("<Q", header, 40)
    size, count = struct.unpack_from("<HH", header, 58)
    return path.stat().st_size >= sections + size * count


def load() -> str | None:
    """Loads rnn_ext._C, which registers the ops; returns None, or one sentence on what is wrong with its remedy."""
    libraries = [path.name for path in FOLDER.glob("_C.*")]
    try:
        info = importlib.import_module("._build_info", __package__)
    except ImportError:
        info = None
    if info is None or not libraries:
        return f"the C++ library of rnn_ext has not been built; {remedy()}"
    running = str(torch.__version__)
    if release(info.TORCH_VERSION) != release(running):
        # Not even tried: missing symbols give an error, but a changed struct crashes the process.
        return f"the C++ library of rnn_ext was built for torch {info.TORCH_VERSION}, not for {running}; {remedy()}"
    loadable = [f"_C{suffix}" for suffix in EXTENSION_SUFFIXES if f"_C{suffix}" in libraries]
    if not loadable:
        return f"the C++ library of rnn_ext was built for another Python ({libraries[0]}); {remedy()}"
    broken = next((name for name in loadable if not is_whole(FOLDER / name)), None)
    if broken:
        return f"the C++ library of rnn_ext is damaged: {broken} ends before its last section; {remedy()}"
    try:
        importlib.import_module("._C", __package__)
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        return f"the C++ library of rnn_ext cannot be loaded ({reason}); {remedy()}"
    return None
