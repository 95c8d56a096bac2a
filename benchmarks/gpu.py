"""The CUDA kernels against torch.nn (cuDNN) on this GPU: the second part of `make gpu`.

    python benchmarks/gpu.py                     the grid: results/<card>.json, and the table
    python benchmarks/gpu.py --quick             a few rows: does it run?
    python benchmarks/gpu.py --show FILE         the table of earlier results
    python benchmarks/gpu.py --check             says whether there is a GPU to measure, and ends with 1 if not

In each row both compute the same thing, which is checked first, and then take turns; the clock is CUDA events around
each call, the figure the median in microseconds for each timestep. "forward" is inference, "training" a forward and a
backward pass with the gradients of the input and of all parameters. tf32 is float32 with torch's permission to round
the factors of products, which torch's kernels use; ours do in library GEMMs, `tensor` and `cluster`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import stored
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnn_ext
from rnn_ext import ops
from rnn_ext._files import write
from rnn_ext._nvcc import find_nvcc, library_folders
from rnn_ext._options import Parser, guarded, output_file, positive_number

FOLDER = Path(__file__).parent
MICRO_SECONDS = 120
CELLS = ("rnn_tanh", "gru", "lstm")
DTYPES = ("float32", "tf32", "bfloat16", "float16")
NOISE = 0.97  # a ratio above it is no loss
# Largest difference of two outputs, which are bounded by 1.
TOLERANCE = {"float32": 1e-4, "tf32": 2e-2, "bfloat16": 6e-2, "float16": 1e-2}
# Times that, of gradients as a share of the largest: both sides round at every timestep, and gradients sum over all.
GRADIENT_TOLERANCE = 4


@dataclasses.dataclass(frozen=True)
class Row:
    cell: str
    dtype: str
    hidden: int
    batch: int
    length: int
    mode: str  # forward or training
    packed: bool = False  # lengths from half of `length` up

    def __str__(self) -> str:
        packed = " packed" if self.packed else ""
        return f"{self.cell} {self.dtype} H={self.hidden} N={self.batch} L={self.length}{packed} {self.mode}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "tf32" else getattr(torch, self.dtype)


PLACES = [*(field.name for field in dataclasses.fields(Row)), "kernel", "us a timestep: ours, torch's; or a problem"]

# What the kernels are designed for (H100): the rows that it covers, and microseconds for each timestep.
TARGETS: list[tuple[str, Callable[[Row], bool], str, float]] = [
    ("H <= 128", lambda r: r.hidden <= 128 and not r.packed, "forward", 0.6),
    ("H 256..512, N <= 64, bf16 and TF32",
     lambda r: 256 <= r.hidden <= 512 and r.batch <= 64 and r.dtype in ("bfloat16", "tf32") and not r.packed,
     "forward", 1.2),
    ("LSTM H = 768, fp16, N = 16",
     lambda r: (r.cell, r.hidden, r.dtype, r.batch) == ("lstm", 768, "float16", 16) and not r.packed, "forward", 2.0),
    ("LSTM H = 768, fp16, N = 16",
     lambda r: (r.cell, r.hidden, r.dtype, r.batch) == ("lstm", 768, "float16", 16) and not r.packed, "training", 5.0),
]  # fmt: skip


def grid(quick: bool = False) -> list[Row]:
    """The rows, those first that decide most: a run that is out of time leaves out the last."""
    modes = ("forward", "training")
    if quick:
        return [Row(cell, "float32", 64, 16, 64, mode) for cell in CELLS for mode in modes]
    rows = [Row("lstm", "float16", 768, 16, 1024, mode) for mode in modes]
    for packed in (False, True):
        rows += [Row("lstm", dtype, 128, 32, 512, mode, packed) for dtype in DTYPES for mode in modes]
    sizes = itertools.product((64, 128, 256, 512, 1024), (1, 16, 64, 256))
    for (hidden, batch), cell, dtype, mode in itertools.product(sizes, reversed(CELLS), DTYPES, modes):
        rows.append(Row(cell, dtype, hidden, batch, 128, mode))
    return rows


class CudaClock:
    """Seconds of a call on the current stream, which first waits while the host launches what it can of it."""

    WAIT = 500_000  # clock cycles, a quarter of a millisecond

    def __call__(self, call: Callable[[], object]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(self.WAIT)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


@contextlib.contextmanager
def precision(row: Row) -> Iterator[None]:
    """TF32 for this row only."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = row.dtype == "tf32"
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def contestants(row: Row, device: str) -> tuple[nn.Module, nn.Module, Tensor | PackedSequence]:
    """Our module and torch's with the same numbers, and their input."""
    torch.manual_seed(0)
    name, options = {"rnn_tanh": ("RNN", {}), "gru": ("GRU", {}), "lstm": ("LSTM", {})}[row.cell]
    sizes = {"device": device, "dtype": row.torch_dtype, **options}
    theirs = getattr(nn, name)(row.hidden, row.hidden, **sizes)
    ours = getattr(rnn_ext, name)(row.hidden, row.hidden, backend="custom", **sizes)
    ours.load_state_dict(theirs.state_dict())
    input: Tensor | PackedSequence = torch.randn(row.length, row.batch, row.hidden, device=device).to(row.torch_dtype)
    if row.packed:
        steps = torch.linspace(row.length, row.length // 2, row.batch).long()
        input = pack_padded_sequence(input, steps)
    return ours, theirs, input


def call_of(module: nn.Module, input: Tensor | PackedSequence, mode: str) -> Callable[[], list[Tensor]]:
    """What is timed. Returns the output's rows and, in training, the gradients of the input and the parameters."""

    def rows(output: Tensor | PackedSequence) -> Tensor:
        return output.data if isinstance(output, PackedSequence) else output

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [rows(module(input)[0])]

    if mode == "forward":
        return forward
    data = rows(input).detach().requires_grad_()
    given = input._replace(data=data) if isinstance(input, PackedSequence) else data
    leaves = [data, *module.parameters()]
    (output,) = forward()
    generator = torch.Generator(output.device).manual_seed(1)  # the same for both contestants
    cotangent = torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype)

    def training() -> list[Tensor]:
        output = rows(module(given)[0])
        return [output.detach(), *torch.autograd.grad(output, leaves, cotangent)]

    return training


def differences(ours: list[Tensor], theirs: list[Tensor]) -> list[float]:
    """The largest of each pair: of the outputs as it is, of gradients as a share of the largest value."""
    found = [(a.float() - b.float()).abs().max().item() for a, b in zip(ours, theirs, strict=True)]
    largest = [max(b.float().abs().max().item(), 1e-30) for b in theirs]
    return [found[0], *(d / most for d, most in zip(found[1:], largest[1:], strict=True))]


def measure(row: Row, clock: Callable[[Callable[[], object]], float], device: str, seconds: float = 0.3) -> dict:
    """A row's figures, or why there are none."""
    result: dict[str, Any] = dataclasses.asdict(row)
    try:
        with precision(row):
            ours, theirs, input = contestants(row, device)
            if device == "cuda":
                explained = rnn_ext.explain(ours, input)
                result["kernel"] = explained.kernel.rsplit(" ", 1)[-1]
            calls = {"ours": call_of(ours, input, row.mode), "torch": call_of(theirs, input, row.mode)}
            result["difference"], *of_gradients = differences(*(call() for call in calls.values()))
            if not result["difference"] <= TOLERANCE[row.dtype]:
                return result | {"problem": f"outputs differ by {result['difference']:.2e}"}
            for apart in of_gradients:
                if not apart <= GRADIENT_TOLERANCE * TOLERANCE[row.dtype]:
                    return result | {"problem": f"gradients differ by {apart:.2e} of the largest value"}
            for call in calls.values():
                call()
            times: dict[str, list[float]] = {name: [] for name in calls}
            stop = time.monotonic() + seconds
            while len(times["torch"]) < 3 or (time.monotonic() < stop and len(times["torch"]) < 100):
                for name, call in calls.items():
                    times[name].append(clock(call))
    except (RuntimeError, ValueError) as error:  # out of memory, or one of the two refuses
        return result | {"problem": str(error).splitlines()[0]}
    return result | {name: 1e6 * statistics.median(taken) / row.length for name, taken in times.items()}


def micro(console: Console) -> dict[str, float] | None:
    """gpu_micro.cu on this GPU; None, with a line that says why, where it cannot be compiled."""
    nvcc = find_nvcc()
    if nvcc is None:
        console.print("micro-measurements are left out: nvcc was not found")
        return None
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder, "gpu_micro"))
        result = subprocess.run(compile_micro(nvcc, f"{major}{minor}", program), capture_output=True, text=True)
        if result.returncode == 0:
            try:
                result = subprocess.run([program], capture_output=True, text=True, timeout=MICRO_SECONDS)
            except subprocess.TimeoutExpired:
                console.print(f"micro-measurements are left out: they hung, or took more than {MICRO_SECONDS} seconds")
                return None
        if result.returncode:
            console.print(f"micro-measurements are left out: {(result.stderr or result.stdout).strip()[:300]}")
            return None
        return json.loads(result.stdout)


def compile_micro(nvcc: str, arch: str, program: str) -> list[str]:
    """The command that compiles gpu_micro.cu for a compute capability ("90")."""
    arch += "a" if int(arch) >= 90 else ""
    sources = FOLDER.parent / "csrc"
    command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{arch}", f"-I{sources}", *library_folders(nvcc)]
    return [*command, str(FOLDER / "gpu_micro.cu"), "-o", program]


def card() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "card": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "shared_bytes_per_block": properties.shared_memory_per_block_optin,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def ratio(row: dict[str, Any]) -> float | None:
    """torch's time over ours: below 1 is a loss."""
    return row["torch"] / row["ours"] if "torch" in row and "ours" in row else None


def losses(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows in which torch is faster beyond noise, worst first."""
    found = [row for row in result["rows"] if (ratio(row) or 1.0) < NOISE]
    return sorted(found, key=lambda row: ratio(row) or 0.0)


def is_failure(row: dict[str, Any]) -> bool:
    """Whether a row has no figure for another reason than memory: wrong numbers, a launch that was refused, ..."""
    return "out of memory" not in row.get("problem", "out of memory")


def pack(result: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a result: each row as a list, with two figures or with a problem."""
    rows = []
    for row in result["rows"]:
        figures = [row["problem"]] if ratio(row) is None else [row["ours"], row["torch"]]
        rows.append([*dataclasses.astuple(row_of(row)), row.get("kernel"), *figures])
    return stored.rounded({**result, "places": PLACES, "rows": rows})


def unpack(result: dict[str, Any]) -> dict[str, Any]:
    fields = [field.name for field in dataclasses.fields(Row)]
    rows = []
    for values in result["rows"]:
        *of_row, kernel = values[: len(fields) + 1]
        figures = values[len(fields) + 1 :]
        row = dict(zip(fields, of_row, strict=True)) | ({"kernel": kernel} if kernel else {})
        names = ("ours", "torch") if len(figures) == 2 else ("problem",)
        rows.append(row | dict(zip(names, figures, strict=True)))
    return {**result, "rows": rows}


def row_of(row: dict[str, Any]) -> Row:
    return Row(**{field.name: row[field.name] for field in dataclasses.fields(Row)})


def show(result: dict[str, Any], console: Console) -> None:
    """Every row, the losses, the problems and the targets."""
    title = f"{result['card']}, torch {result['torch']}, CUDA {result['cuda']}, cuDNN {result['cudnn']}"
    table = Table(title=f"{title}: microseconds for each timestep", title_justify="left")
    for name in ("layer", "kernel", "rnn_ext", "torch.nn", "torch.nn / rnn_ext"):
        table.add_column(name, justify="left" if name in ("layer", "kernel") else "right", no_wrap=name != "layer")
    for row in result["rows"]:
        found = ratio(row)
        if found is None:
            table.add_row(str(row_of(row)), row.get("kernel", "-"), f"[yellow]{row['problem']}[/yellow]")
            continue
        style = "bold red" if found < NOISE else ""
        figures = (f"{row['ours']:.3f}", f"{row['torch']:.3f}", f"{found:.2f}")
        table.add_row(str(row_of(row)), row.get("kernel", "-"), *figures, style=style)
    console.print(table)
    lost, timed = losses(result), [row for row in result["rows"] if ratio(row) is not None]
    console.print(f"Losses: {len(lost)} of {len(timed)} rows")
    for row in lost:
        console.print(f"  {ratio(row):.2f}  {row_of(row)} ({row.get('kernel', '-')})", style="bold red")
    for row in result["rows"]:
        if ratio(row) is None:
            console.print(f"  no figure: {row_of(row)}: {row['problem']}", style="yellow")
    if result["left_out"]:
        console.print(f"Out of time: {result['left_out']} rows were not measured", style="yellow")
    for name, covers, mode, limit in TARGETS:
        rows = [row for row in timed if row["mode"] == mode and covers(row_of(row))]
        if rows:
            worst = max(rows, key=lambda row: row["ours"])
            met = sum(row["ours"] <= limit for row in rows)
            console.print(
                f"Target {name}, {mode} <= {limit} us: met in {met} of {len(rows)} rows, "
                f"worst {worst['ours']:.3f} ({row_of(worst)})"
            )
    for name, microseconds in (result["micro"] or {}).items():
        console.print(f"  {name}: {microseconds:.3f} us")


def run(
    rows: Sequence[Row],
    clock: Callable,
    device: str,
    seconds: float,
    console: Console,
    save: Callable[[list[dict], int], None] = lambda done, left: None,
) -> tuple[list[dict], int]:
    """The rows that could be measured in the time, and how many were left; `save` is given both after each row."""
    done: list[dict] = []
    stop = time.monotonic() + seconds
    for index, row in enumerate(rows):
        if time.monotonic() > stop:
            return done, len(rows) - index
        done.append(measure(row, clock, device))
        if "problem" in done[-1]:
            console.print(f"{row}: {done[-1]['problem']}", style="yellow")
        save(done, len(rows) - index - 1)
    return done, 0


def why_not() -> str | None:
    """What keeps this machine from measuring, in one line."""
    if not torch.cuda.is_available():
        what = "this torch has no CUDA" if torch.version.cuda is None else "torch finds no usable GPU"
        return f"No GPU to measure here: {what}."
    return None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="benchmarks/gpu.py", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few small rows")
    parser.add_argument(
        "--seconds", type=positive_number(), default=150, help="stop starting rows after so long (%(default)s)"
    )
    parser.add_argument("--output", type=output_file, help="instead of results/<card>.json")
    parser.add_argument("--show", type=Path, metavar="FILE", help="only print the table of these results")
    parser.add_argument("--check", action="store_true", help="only say whether there is a GPU to measure")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    if args.show:
        try:
            show(unpack(json.loads(args.show.read_text())), console)
        except (OSError, ValueError, KeyError, TypeError) as error:
            console.print(
                f"error: {args.show} holds no results of gpu.py ({type(error).__name__}: {error})", markup=False
            )
            return 2
        return 0
    problem = why_not()
    if problem or args.check:
        console.print(problem or f"GPU: {torch.cuda.get_device_name()}")
        return 1 if problem else 0
    problem = str(ops.load_error()) if not ops.is_available() else None
    if problem is None and not ops.with_cuda():
        problem = (
            "the library has been built without CUDA kernels: RNN_EXT_BUILD=cuda python setup.py build_ext --inplace"
        )
    problem = problem or ops.cuda_problem(0)
    if problem:
        console.print(problem)
        return 1
    result = card() | {"micro": None}
    slug = result["card"].lower().replace(" ", "-").replace("/", "-")
    path = args.output or FOLDER / "results" / f"{slug}.json"

    def save(rows: list[dict], left: int) -> None:
        result.update(rows=rows, left_out=left)
        write(path, stored.text(pack(result)))

    # What has been measured is kept, whatever the next row does to the GPU.
    save(*run(grid(args.quick), CudaClock(), "cuda", args.seconds, console, save))
    result["micro"] = micro(console)
    save(result["rows"], result["left_out"])
    show(result, console)
    console.print(f"Written: {path}")
    return 1 if any(is_failure(row) for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(guarded(main))
