"""Compiles and links with ninja, shows the progress, and keeps what each object file cost."""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

# Core-seconds of files by the end of their names: the longest are compiled first. They also give the estimate.
SECONDS = {
    "_avx512.cpp": 180,
    "_avx512_double.cpp": 110,
    "_avx2.cpp": 85,
    "_avx512_bf16.cpp": 80,
    "_avx512_widened.cpp": 65,
    "_baseline.cpp": 50,
    "_avx2_double.cpp": 70,
    "_baseline_double.cpp": 45,
    "_avx2_widened.cpp": 60,
    "_avx512_amx.cpp": 55,
    ".cu": 25,
}
OTHERS = 10
HEARTBEAT = 15  # seconds without a word, at most


@dataclass(frozen=True)
class Job:
    """One source file. `command` is the compiler with its flags."""

    source: Path
    output: Path
    command: Sequence[str]

    @property
    def seconds(self) -> int:
        return next((seconds for end, seconds in SECONDS.items() if self.source.name.endswith(end)), OTHERS)


def quoted(path: Path) -> str:
    """A path as ninja reads it in a list of files."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def escaped(text: str) -> str:
    """A variable's value as ninja reads it."""
    return text.replace("$", "$$")


def ninja_file(jobs: Sequence[Job], link: Sequence[str], library: Path) -> str:
    # -I -S: Python starts in 10 ms.
    timed = shlex.join([sys.executable, "-I", "-S", str(Path(__file__).with_name("timed.py"))])
    lines = [
        "builddir = .",
        "rule compile",
        f"  command = {escaped(timed)} $out.seconds $compiler -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $linker",
    ]
    for job in sorted(jobs, key=lambda job: -job.seconds):  # ninja starts them in this order
        lines.append(f"build {quoted(job.output)}: compile {quoted(job.source)}")
        lines.append(f"  compiler = {escaped(shlex.join(job.command))}")
        lines.append(f"  description = {escaped(str(job.source))}")
    linker = [*link[:1], *(str(job.output) for job in jobs), *link[1:], "-o", str(library)]
    lines.append(f"build {quoted(library)}: link {' '.join(quoted(job.output) for job in jobs)}")
    lines.append(f"  linker = {escaped(shlex.join(linker))}")
    lines.append(f"  description = {escaped(library.name)}")
    return "\n".join(lines) + "\n"


def compile_and_link(folder: Path, jobs: Sequence[Job], link: Sequence[str], library: Path, processes: int) -> None:
    """Brings `library` up to date.

    Args:
        folder: where ninja keeps its log. Builds of several torch versions share one, and with it the objects that do
            not depend on torch.
        jobs: the files to compile, each with its object file.
        link: the linker and its flags; the objects come after the first word.
        processes: compilers to run at a time.

    Raises:
        SystemExit: there is no ninja, or something could not be compiled or linked; then the compiler has said why.
    """
    if find_ninja() is None:
        raise SystemExit("rnn_ext is compiled by ninja, which was not found: pip install ninja.")
    for job in jobs:
        job.output.parent.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one ninja at a time may write to its log
        (folder / "build.ninja").write_text(ninja_file(jobs, link, library))
        ninja = [find_ninja(), "-C", str(folder), "-j", str(processes)]
        # On one line each: "[finished/total] description".
        environ = {**os.environ, "NINJA_STATUS": "[%f/%t] ", "TERM": "dumb"}
        dry = subprocess.run([*ninja, "-n"], env=environ, capture_output=True, text=True)
        stale = set(re.findall(r"^\[\d+/\d+\] (.*)$", dry.stdout, re.MULTILINE))
        seconds = {str(job.source): job.seconds for job in jobs if str(job.source) in stale}
        with progress_output() as write:
            progress = Progress(seconds, processes, write)
            with subprocess.Popen(
                ninja, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            ) as done:
                for line in lines_of(done.stdout):
                    progress.show(line)
        if done.returncode:
            raise SystemExit("rnn_ext could not be compiled: the compiler's words are above.")


def find_ninja() -> str | None:
    """The program of the Python package ninja, which the PATH need not have, else that on the PATH."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        return shutil.which("ninja")
    return shutil.which("ninja", path=BIN_DIR) or shutil.which("ninja")


def lines_of(stream: IO[str]):
    """The lines of a stream as they come, and None whenever none has come for a while."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=HEARTBEAT)
        except queue.Empty:
            yield None
            continue
        if not line:
            return
        yield line


class Progress:
    """Turns ninja's lines into ours: how many files are done, the seconds so far, and an estimate of the rest.

    Args:
        seconds: the expected core-seconds of each file that is to be compiled.
        processes: compilers that run at a time.
        write: takes a line.
    """

    def __init__(self, seconds: dict[str, int], processes: int, write: Callable[[str], None]):
        self.seconds = seconds
        self.processes = processes
        self.write = write
        self.left = set(seconds)
        self.start = time.monotonic()
        if seconds:
            write(f"rnn_ext: {len(seconds)} files to compile, {processes} at a time: {minutes(self.expected())}")

    def expected(self) -> float:
        """Seconds for what is left, by the pace so far."""
        left = sum(self.seconds[name] for name in self.left) / self.processes
        done = sum(self.seconds.values()) / self.processes - left
        passed = time.monotonic() - self.start
        # The table is for some machine; a tenth of the work tells how fast this one is.
        pace = passed / done if done > 0.1 * (done + left) else 1
        return left * pace

    def show(self, line: str | None) -> None:
        status = line and re.match(r"\[\d+/\d+\] (.*)$", line)
        if line and not status:
            if not re.match(r"ninja: (Entering directory|no work to do)", line):
                self.write(line.rstrip("\n"))
            return
        self.left.discard(status[1] if status else "")
        done, total = len(self.seconds) - len(self.left), len(self.seconds)
        now = f"{time.monotonic() - self.start:.0f} s"
        name = Path(status[1]).name if status else "..."
        if status and status[1] not in self.seconds:
            self.write(f"rnn_ext: {name} linked, {now}")
        else:
            self.write(f"rnn_ext: {done} of {total} files, {now}, {minutes(self.expected())} left: {name}")


def minutes(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {seconds:.0f} s"


@contextlib.contextmanager
def progress_output():
    """A function that prints a line, on the terminal, too, where pip keeps what is printed to itself."""
    with contextlib.ExitStack() as stack:
        terminal = None
        if not sys.stdout.isatty():
            with contextlib.suppress(OSError):
                terminal = stack.enter_context(open("/dev/tty", "w"))
        if terminal and os.tcgetpgrp(terminal.fileno()) != os.getpgrp():
            terminal = None  # the terminal belongs to another job

        def write(line: str) -> None:
            print(line, flush=True)
            if terminal:
                with contextlib.suppress(OSError):
                    terminal.write(f"\r{line}\n")
                    terminal.flush()

        yield write
