"""What the user gave, refused in one sentence; and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def one_line(error: Exception) -> str:
    """The first sentence of an error that may go on for pages."""
    return re.split(r"\.\s|\n", str(error).strip())[0] or type(error).__name__


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one sentence that names it and says what was expected."""


def _file_of(path: Path) -> Path:
    """The file that ``path`` names, links followed, which need not exist."""
    try:
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            raise InputError(f"{path} is a {'folder' if target.is_dir() else 'device'}, expected the name of a file")
    except OSError as error:  # a name that is too long, or below what cannot be searched
        raise InputError(f"{path} cannot be written ({error.strerror})") from None
    return target


def check_output(path: Path) -> None:
    """Whether a file of this name can be written, or replaced: asked before the work whose results go there.

    Raises:
        InputError: it is a folder or a device, is read-only, or lies where nothing can be written.
    """
    target = _file_of(path)
    if target.exists() and not os.access(target, os.W_OK):
        raise InputError(f"{path} cannot be written: it is read-only")
    folder = next(parent for parent in target.parents if parent.exists())
    if not folder.is_dir():
        raise InputError(f"{path} cannot be written: {folder} is no folder")
    try:
        with tempfile.NamedTemporaryFile(dir=folder):  # permissions do not tell, of root or of /proc for instance
            pass
    except OSError as error:
        raise InputError(f"{path} cannot be written: {folder} takes no file ({error.strerror})") from None


def _mode(target: Path) -> int:
    """What is there has, or else what a new file gets."""
    if target.exists():
        return stat.S_IMODE(target.stat().st_mode)
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write into that becomes ``path`` once it is complete and on the disk, and vanishes after an error.

    Raises:
        InputError: it cannot be written: see :func:`check_output`; or the disk is full.
    """
    target = _file_of(path)
    name = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, _mode(target))  # mkstemp makes files that only their owner can read
        os.replace(name, target)
    except BaseException as error:
        if name:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
        if isinstance(error, OSError):  # a full disk's has no name of a file
            raise InputError(f"{path} cannot be written ({error.strerror or error})") from None
        raise


def version(path: Path) -> str | None:
    """A hash of what the file holds; None where there is none, or something else that is not to be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    except OSError:
        return None


def write(path: Path, text: str) -> None:
    """:func:`replacing`, of text in UTF-8."""
    with replacing(path) as file:
        file.write(text.encode())
