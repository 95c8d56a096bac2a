"""What the command lines have in common."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from rnn_ext._files import InputError, check_output


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")  # one sentence, not the usage of twenty options above it


def whole_number(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """A type of argparse's options."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    return read


def positive_number(high: float = math.inf) -> Callable[[str], float]:
    """A type of argparse's options: finite numbers."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not (0 < value <= high and math.isfinite(value)):
            expected = f"above 0 and at most {high}" if math.isfinite(high) else "positive and finite"
            raise argparse.ArgumentTypeError(f"{text} is not {expected}")
        return value

    return read


def output_file(text: str) -> Path:
    """A type of argparse's options: what can be written, or replaced."""
    path = Path(text)
    try:
        check_output(path)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return path


positive_int = whole_number(1)


def guarded(run: Callable[[], int | None]) -> int:
    """What `run` returns, or the exit status of what ended it, said in one sentence."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # not every terminal has an ñ
    try:
        code = run() or 0
        if sys.stdout:  # which may be closed
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # by head, for instance, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(*(stop.args or ["stopped"]), file=sys.stderr)
        return 130
