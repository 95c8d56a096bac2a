"""What each object file of the last build cost: core-seconds, bytes of code, functions; and the biggest templates.

    python benchmarks/size.py [--templates N] [--match REGEX]

Build first (`python setup.py build_ext --inplace`). The seconds are those of the file's last compilation.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

BUILD = Path(__file__).resolve().parent.parent / "build"


@dataclass(frozen=True)
class Size:
    """One object file. `templates` maps the name of a function or template to its instantiations' bytes."""

    name: str
    seconds: float | None
    templates: dict[str, list[int]]

    @property
    def functions(self) -> int:
        return sum(map(len, self.templates.values()))

    @property
    def text(self) -> int:
        return sum(map(sum, self.templates.values()))


def objects_of(text: str) -> list[Path]:
    """The object files that a build.ninja compiles."""
    return [Path(re.sub(r"\$(.)", r"\1", path)) for path in re.findall(r"^build (.*?)(?<!\$): compile ", text, re.M)]


def without(pair: str, text: str) -> str:
    """`text` less all that stands between the two brackets of `pair`, and them."""
    kept, depth = [], 0
    for character in text:
        depth += character == pair[0]
        if not depth:
            kept.append(character)
        depth -= character == pair[1] and depth > 0
    return "".join(kept)


def template_of(name: str) -> str:
    """'void a::f<int, b<c> >(int) [clone .isra.0]' -> 'a::f'. What is said of a lambda is left out, too."""
    name = re.sub(r"operator(<<|<=|<|>>|>=|->|>)", "operator", name)  # their brackets are no pairs
    name = name.replace("operator()", "operator").replace("(anonymous namespace)::", "").split(" [clone")[0]
    name = without("()", without("<>", name)).replace("rnn_ext::cpu::", "").removesuffix(" const")
    return name.split()[-1] if name.split() else "?"


def read(listing: str) -> dict[str, list[int]]:
    """The code in what `nm --print-size --demangle` prints, by template."""
    templates: dict[str, list[int]] = {}
    for size, name in re.findall(r"^\S+ (\S+) [tTwWiu] (.*)$", listing, re.M):
        templates.setdefault(template_of(name), []).append(int(size, 16))
    return templates


def measure(path: Path) -> Size:
    listing = subprocess.run(
        ["nm", "--print-size", "--demangle", "--defined-only", str(path)], capture_output=True, text=True, check=True
    ).stdout
    seconds = path.with_name(path.name + ".seconds")
    return Size(path.stem, float(seconds.read_text()) if seconds.exists() else None, read(listing))


def tables(sizes: Iterable[Size], templates: int) -> list[Table]:
    sizes = sorted(sizes, key=lambda size: -(size.seconds or 0))
    files = Table("object", "core-s", "KB of code", "functions", show_footer=True)
    for column in files.columns[1:]:
        column.justify = "right"
    for size in sizes:
        seconds = "?" if size.seconds is None else f"{size.seconds:.0f}"
        files.add_row(size.name, seconds, f"{size.text / 1e3:,.0f}", f"{size.functions:,}")
    totals = ("all", f"{sum(size.seconds or 0 for size in sizes):.0f}")
    totals += (f"{sum(size.text for size in sizes) / 1e3:,.0f}", f"{sum(size.functions for size in sizes):,}")
    for column, total in zip(files.columns, totals, strict=True):
        column.footer = total
    text, count = Counter(), Counter()
    for size in sizes:
        for name, each in size.templates.items():
            # The instruction set's namespace is in the name of the object.
            plain = re.sub(r"^(baseline|neon_dot|avx\w+)::", "", name)
            text[plain] += sum(each)
            count[plain] += len(each)
    biggest = Table("template", "KB of code", "instantiations")
    for column in biggest.columns[1:]:
        column.justify = "right"
    for name, size in text.most_common(templates):
        biggest.add_row(name, f"{size / 1e3:,.0f}", f"{count[name]:,}")
    return [files, biggest]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--templates", type=int, default=20, metavar="N", help="how many templates to show (20)")
    parser.add_argument("--match", default="", metavar="REGEX", help="objects whose names match, 'avx512' say")
    options = parser.parse_args(argv)
    manifest = BUILD / "build.ninja"
    if not manifest.exists():
        sys.exit(f"nothing was built in {BUILD}: run python setup.py build_ext --inplace")
    if shutil.which("nm") is None:
        sys.exit("nm, of the binutils that a compiler needs, was not found")
    paths = [path for path in objects_of(manifest.read_text()) if re.search(options.match, path.stem)]
    console = Console(width=None if sys.stdout.isatty() else 100)
    for table in tables([measure(path) for path in paths if path.exists()], options.templates):
        console.print(table)


if __name__ == "__main__":
    main()
