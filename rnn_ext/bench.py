"""python -m rnn_ext bench: our kernels against torch.nn's on this machine, in two minutes, for one shape or for many.

Both compute the same thing from the same weights, which is checked first. They take turns, so that whatever else the
machine does meets both. Needs nothing but torch; benchmarks/run.py measures more, with these same tools.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import gc
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnn_ext
from rnn_ext import ops
from rnn_ext._files import write
from rnn_ext._options import Parser, output_file, positive_int, positive_number

CELLS = {"rnn": (nn.RNN, rnn_ext.RNN, 1), "gru": (nn.GRU, rnn_ext.GRU, 3), "lstm": (nn.LSTM, rnn_ext.LSTM, 4)}
DTYPES = ("float32", "float64", "bfloat16", "float16")
# How far results may be apart, as a share of the largest value: sums in another order, and torch's own reduced
# precision, which rounds every gate.
TOLERANCE = {"float32": 1e-4, "float64": 1e-10, "bfloat16": 0.1, "float16": 0.02}
NOISE = 0.97  # a ratio of two times above this is not called a loss


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, or a stack of them, and its input: L timesteps of N sequences with I features, H hidden units."""

    cell: str
    batch: int
    length: int
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bidirectional: bool = False
    dtype: str = "float32"
    lengths: tuple[int, ...] | None = None  # of each sequence, falling, the first is `length`: the input is packed

    @property
    def gates(self) -> int:
        return CELLS[self.cell][2]

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @functools.cached_property
    def batch_sizes(self) -> list[int]:
        """How many sequences timestep t has."""
        if self.lengths is None:
            return [self.batch] * self.length
        ended = [0] * (self.length + 1)
        for length in self.lengths:
            ended[length] += 1
        alive = self.batch
        return [alive := alive - ended[t] for t in range(self.length)]

    @property
    def rows(self) -> int:
        """(timestep, sequence) pairs."""
        return self.batch * self.length if self.lengths is None else sum(self.lengths)

    @property
    def parameters(self) -> int:
        width = self.directions * self.gates * self.hidden_size
        inputs = [self.input_size] + [self.directions * self.hidden_size] * (self.num_layers - 1)
        return sum(width * (size + self.hidden_size + 2) for size in inputs)

    def __str__(self) -> str:
        length = f"{min(self.lengths)}..{self.length}" if self.lengths else f"{self.length}"
        name = ("Bi" if self.bidirectional else "") + self.cell.upper()
        layers = f" layers={self.num_layers}" if self.num_layers > 1 else ""
        dtype = "" if self.dtype == "float32" else f" {self.dtype}"
        inputs = "" if self.input_size == self.hidden_size else f" I={self.input_size}"
        return f"{name} N={self.batch} L={length}{inputs} H={self.hidden_size}{layers}{dtype}"

    def memory(self, training: bool) -> int:
        """About how many bytes a contestant needs at most: torch.nn, which keeps most steps between two gates."""
        values = (4 if training else 1) * (self.gates + 3)
        per_row = self.num_layers * self.directions * self.hidden_size * values + 3 * self.input_size
        return max(self.torch_dtype.itemsize, 4) * (self.rows * per_row + (5 if training else 3) * self.parameters)


def ragged(batch: int, shortest: int, longest: int, bend: float = 1.0) -> tuple[int, ...]:
    """Falling lengths between the two; `bend` below 1 makes most sequences longer than the mean of the two."""
    if batch == 1:
        return (longest,)
    steps = [(batch - 1 - i) / (batch - 1) for i in range(batch)]
    return tuple(round(shortest + (longest - shortest) * step**bend) for step in steps)


class Workload:
    """The tensors and modules of a case: torch.nn's module, the same input and incoming gradient for everybody.

    The input requires grad, so that training computes the gradient of everything. A case of another dtype has the same
    numbers, rounded.
    """

    def __init__(self, case: Case):
        self.case = case
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = CELLS[case.cell][0](*self._arguments(), bidirectional=case.bidirectional)
        self.torch = module.to(case.torch_dtype)
        shape = (case.length, case.batch)
        self.input = torch.randn(*shape, case.input_size, generator=generator).to(case.torch_dtype)
        self.grad_output = torch.randn(*shape, case.directions * case.hidden_size, generator=generator)
        self.grad_output = self.grad_output.to(case.torch_dtype)
        self.packed: PackedSequence | None = None
        if case.lengths is not None:
            lengths = torch.tensor(case.lengths)
            self.packed = pack_padded_sequence(self.input, lengths)
            self.grad_packed = pack_padded_sequence(self.grad_output, lengths).data
            # what padded contestants see past the end is what does not count
            beyond = (torch.arange(case.length).unsqueeze(1) >= lengths).unsqueeze(-1)
            self.input = self.input.masked_fill(beyond, 0)
            self.grad_output = self.grad_output.masked_fill(beyond, 0)

    def _arguments(self) -> tuple[int, ...]:
        return self.case.input_size, self.case.hidden_size, self.case.num_layers

    def ours(self, backend: str = "custom") -> nn.RNNBase:
        """Our layer with torch.nn's weights."""
        options = {"bidirectional": self.case.bidirectional, "dtype": self.case.torch_dtype}
        module = CELLS[self.case.cell][1](*self._arguments(), **options, backend=backend)
        module.load_state_dict(self.torch.state_dict())
        return module

    def forward(self, module: nn.RNNBase, padded: bool = False) -> Callable[[], Any]:
        """A call without arguments that returns the output; to be used under torch.inference_mode."""
        input = self.input if self.packed is None or padded else self.packed
        return lambda: module(input)[0]

    def training(self, module: nn.RNNBase, padded: bool = False) -> Callable[[], Any]:
        """The same, followed by the gradients of the input and of the parameters."""
        if self.packed is None or padded:
            data, grad = self.input.clone().requires_grad_(), self.grad_output
            input: Any = data
        else:
            data, grad = self.packed.data.clone().requires_grad_(), self.grad_packed
            input = PackedSequence(data, *self.packed[1:])
        tensors = [data, *module.parameters()]

        def run() -> tuple[Any, list[Tensor]]:
            output = module(input)[0]
            grads = torch.autograd.grad(output.data if isinstance(output, PackedSequence) else output, tensors, grad)
            return output, list(grads)

        return run

    def results(self, module: nn.RNNBase, returned: Any) -> dict[str, Tensor]:
        """What a call of the above returned, by name: output, input.grad, weight_ih_l0.grad, ..."""
        output, grads = returned if isinstance(returned, tuple) and isinstance(returned[1], list) else (returned, [])
        results = {"output": self.padded(output)}
        names = ["input", *(name for name, _ in module.named_parameters())]
        results |= {f"{name}.grad": grad.detach() for name, grad in zip(names, grads, strict=False)}
        if "input.grad" in results and self.packed is not None and results["input.grad"].dim() == 2:
            results["input.grad"] = self.padded(PackedSequence(results["input.grad"], *self.packed[1:]))
        return results

    def padded(self, output: Tensor | PackedSequence) -> Tensor:
        if isinstance(output, PackedSequence):
            output = pad_packed_sequence(output, total_length=self.case.length)[0]
        return output.detach()


def difference(results: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """The largest difference between results of the same name, as a share of the largest value of the reference.

    Infinite where a result is not finite, or none has a name of the reference; 0 if the reference is empty.
    """
    common = results.keys() & reference.keys()
    worst = float("inf") if reference and not common else 0.0
    for name in common:
        ours, theirs = results[name].double(), reference[name].double()
        if ours.shape != theirs.shape or not bool((ours.isfinite() & theirs.isfinite()).all()):
            return float("inf")
        if ours.numel():
            worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-3)))
    return worst


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of several samples, their quartiles and the least of them."""

    median: float
    low: float
    high: float
    least: float
    samples: int


def interleave(
    functions: Mapping[str, Callable[[], Any]],
    seconds: float = 2.0,
    threads: int = 1,
    sample: float = 1e-3,
    least_rounds: int = 5,
) -> dict[str, Timing]:
    """Time functions side by side: in each round a sample of every one, each time another one first.

    Before its sample a function runs for a while unobserved, until the caches are its own and, of several threads, the
    workers of the one before have stopped spinning on its cores and its own are awake.

    Args:
        functions: already called once: whatever is done only the first time has been done.
        seconds: for all of them. A round that has begun is finished, and there are at least `least_rounds`, or 3 when
            those would take more than twice as long. It ends sooner when all medians are known within half a percent.
        threads: with one, the clock is the time that this process has had a core: what it waits for other processes is
            not in it. With more it is the clock on the wall.
        sample: seconds below which a sample is several calls in a row.
    """
    clock, settle = (time.process_time, 0.004) if threads == 1 else (time.perf_counter, 0.02)
    calls = {}
    for name, function in functions.items():
        function()
        start = clock()
        function()
        calls[name] = max(1, round(sample / max(clock() - start, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start, rounds = time.perf_counter(), 0
        while True:
            for name in names[rounds % len(names) :] + names[: rounds % len(names)]:
                function, count = functions[name], range(calls[name])
                until = time.perf_counter() + settle
                while time.perf_counter() < until:
                    function()
                before = clock()
                for _ in count:
                    function()
                samples[name].append((clock() - before) / len(count))
            rounds += 1
            elapsed = time.perf_counter() - start
            known = rounds >= 15 and all(_precision(values) < 0.005 for values in samples.values())
            if rounds >= least_rounds and (elapsed > seconds or known):
                break
            if rounds >= 3 and elapsed > 2 * seconds:
                break
    finally:
        if enabled:
            gc.enable()
    return {name: timing(values) for name, values in samples.items()}


def timing(samples: list[float]) -> Timing:
    if len(samples) == 1:
        return Timing(*samples * 4, 1)
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, low, high, min(samples), len(samples))


def _precision(samples: list[float]) -> float:
    """About the standard error of the median, as a share of it."""
    found = timing(samples)
    return (found.high - found.low) / found.median / len(samples) ** 0.5


def saved_bytes(run: Callable[[], Any], module: nn.Module) -> int:
    """How much memory the graph keeps for backward, beside the parameters; every storage counts once."""
    kept: dict[int, int] = {}
    skip = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skip:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


def available_memory() -> int | None:
    """Bytes that can be had without swapping, None where the system does not say."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")))
    for group in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            found.append(int(Path(group).read_text()))
    return min(found, default=None)


def too_large(case: Case, training: bool, available: int | None = None) -> str | None:
    """One sentence if the case will hardly fit the memory, with what it needs."""
    available = available_memory() if available is None else available
    needed = case.memory(training)
    if available is None or needed <= available:
        return None
    return f"needs about {needed / 2**30:.1f} GiB of memory, and {available / 2**30:.1f} GiB are free"


def allowed_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[list[int] | None]:
    """As many torch threads, on as many cores, the last ones: the first serve most interrupts.

    Gives the cores, or None where the system cannot pin: it runs all the same. Threads of a pool that was woken before
    stay where they are.
    """
    before, cores = torch.get_num_threads(), allowed_cores()
    torch.set_num_threads(threads)
    chosen = None
    try:
        with contextlib.suppress(AttributeError, OSError):
            os.sched_setaffinity(0, cores[-threads:])
            chosen = cores[-threads:]
        yield chosen
    finally:
        torch.set_num_threads(before)
        if chosen is not None:
            os.sched_setaffinity(0, cores)


def _caches() -> dict[str, int]:
    """Bytes of each level of the first core's caches for data, as far as the system says."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        with contextlib.suppress(OSError, ValueError):
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
            if kind in ("Data", "Unified"):
                found[f"L{level}"] = int(size[:-1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[size[-1]]
    return found


def processor() -> str:
    with contextlib.suppress(OSError):
        fields = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M))
        if "model name" in fields:
            return "{} (family {}, model {})".format(*(fields.get(k) for k in ("model name", "cpu family", "model")))
    return platform.processor() or platform.machine()


def busy_cores(seconds: float = 0.3) -> float | None:
    """How many cores others keep busy while this thread sleeps; None where the system does not say."""

    def ticks() -> tuple[int, int]:  # in all, and idle ones or waiting for a disk
        fields = [int(field) for field in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
        return sum(fields), fields[3] + fields[4]

    with contextlib.suppress(OSError, ValueError, IndexError, ZeroDivisionError):
        before, idle_before = ticks()
        time.sleep(seconds)
        after, idle_after = ticks()
        return (os.cpu_count() or 1) * (1 - (idle_after - idle_before) / (after - before))
    return None


def other_work(about: Mapping[str, Any]) -> str | None:
    """What :func:`machine` found running, if it is enough to spoil a measurement."""
    busy = about.get("busy")  # which older results lack
    return f"{busy:.1f} of {about['cores']} cores are busy" if busy is not None and busy > 0.3 else None


def machine() -> dict[str, Any]:
    """What a measurement depends on."""
    return {
        "processor": processor(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "cores": len(allowed_cores()),
        "caches": _caches(),
        "memory": available_memory(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "busy": busy_cores(),
        "instructions": ops.cpu_capability() if ops.is_available() else None,
        "torch_instructions": torch.backends.cpu.get_cpu_capability(),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "rnn_ext": rnn_ext.__version__,
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def duration(seconds: float) -> str:
    """Three digits and a unit: 12.3 us."""
    unit, scale = ("s", 1.0) if seconds >= 0.9995 else ("ms", 1e3) if seconds >= 0.9995e-3 else ("us", 1e6)
    value = seconds * scale
    return f"{value:#.3g} {unit}".replace(". ", " ") if value < 999.5 else f"{value:.0f} {unit}"


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


class DifferentResults(Exception):
    """Two contestants that should have computed the same did not."""


def compare(case: Case, training: bool, seconds: float) -> dict[str, Any]:
    """torch.nn and ours: check, then time. Seconds and bytes kept for backward, by contestant.

    Raises:
        DifferentResults: with the largest difference.
    """
    work = Workload(case)
    modules = {"torch.nn": work.torch, "rnn_ext": work.ours()}
    make = work.training if training else work.forward
    mode = contextlib.nullcontext() if training else torch.inference_mode()
    with mode:
        runs = {name: make(module) for name, module in modules.items()}
        results = [work.results(modules[name], run()) for name, run in runs.items()]
        apart = difference(results[1], results[0])
        if not apart <= TOLERANCE[case.dtype]:
            raise DifferentResults(f"{case}: results differ by {apart:.1e} of the largest value")
        times = interleave(runs, seconds, torch.get_num_threads())
    return {
        "case": dataclasses.asdict(case),
        "mode": "training" if training else "forward",
        "difference": apart,
        "times": {name: dataclasses.asdict(found) for name, found in times.items()},
        "saved_bytes": {name: saved_bytes(run, modules[name]) for name, run in runs.items()} if training else None,
    }


STANDARD = [
    *(Case(cell, 1, 128, 64, 64) for cell in CELLS),
    *(Case(cell, 32, 64, 128, 128) for cell in CELLS),
    Case("lstm", 1, 64, 512, 512),
    Case("lstm", 16, 200, 20, 64, bidirectional=True, lengths=ragged(16, 25, 200)),
]


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[Case]]:
    parser = Parser(prog="python -m rnn_ext bench", description=__doc__)
    shape = parser.add_argument_group("shape (without any of these, a table of several)", argument_default=None)
    shape.add_argument("--cell", choices=list(CELLS), help="(lstm)")
    shape.add_argument("--input-size", type=positive_int, help="features of the input (the hidden size)")
    shape.add_argument("--hidden-size", type=positive_int, help="hidden units (128)")
    shape.add_argument("--batch-size", type=positive_int, help="sequences (1)")
    shape.add_argument("--length", type=positive_int, help="timesteps (128)")
    shape.add_argument("--num-layers", type=positive_int, help="recurrent layers (1)")
    shape.add_argument("--bidirectional", action="store_true", default=None, help="a second direction")
    shape.add_argument("--ragged", action="store_true", default=None, help="packed; lengths from length / 8 to length")
    shape.add_argument("--dtype", choices=DTYPES, help="(float32)")
    parser.add_argument("--threads", type=positive_int, default=torch.get_num_threads(), help="of torch (%(default)s)")
    parser.add_argument("--seconds", type=positive_number(), default=120.0, help="for everything, about (%(default)g)")
    parser.add_argument("--output", type=output_file, help="JSON file to write the numbers to")
    options = parser.parse_args(argv)
    most = max(torch.get_num_threads(), len(allowed_cores()))
    if options.threads > most:
        parser.error(f"--threads {options.threads}: expected at most {most}, the cores that this process may use")
    given = [options.cell, options.input_size, options.hidden_size, options.batch_size, options.length]
    given += [options.num_layers, options.bidirectional, options.ragged, options.dtype]
    if all(option is None for option in given):
        return options, STANDARD
    hidden, batch, length = options.hidden_size or 128, options.batch_size or 1, options.length or 128
    case = Case(
        options.cell or "lstm",
        batch,
        length,
        options.input_size or hidden,
        hidden,
        options.num_layers or 1,
        bool(options.bidirectional),
        options.dtype or "float32",
    )
    shortest = max(1, length // 8)
    if options.ragged and not too_large(dataclasses.replace(case, length=shortest), training=True):
        case = dataclasses.replace(case, lengths=ragged(batch, shortest, length))
    return options, [case]


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns 1 where our kernels cannot run or are wrong, 2 for bad options or too large a shape."""
    options, cases = parse(argv)
    if not ops.is_available():
        print(f"error: {ops.load_error()}", file=sys.stderr)
        return 1
    for case in cases:
        problem = too_large(case, training=True)
        if problem:
            print(f"error: {case} {problem}", file=sys.stderr)
            return 2

    about = machine()
    jobs = [(case, training) for case in cases for training in (False, True)]
    rows = []
    with pinned(options.threads) as cores:
        where = "not pinned" if cores is None else f"pinned to {len(cores)} of {about['cores']} cores"
        print(f"{about['processor']}, kernels for {about['instructions']}, torch {about['versions']['torch']}")
        print(f"{options.threads} thread(s), {where}; medians ± half of the middle 50 %, {options.seconds:g} s in all")
        if work := other_work(about):
            alone = " With --threads 1 only time that this process has a core counts." if options.threads > 1 else ""
            print(f"Other work is running here ({work}): the numbers will not be worth much.{alone}")
        name = max(len(str(case)) for case in cases)
        print(f"\n{'':{name}}  {'':18}{'torch.nn':>18}{'rnn_ext':>18}{'speed-up':>11}  kept for backward")
        for case, training in jobs:
            try:
                row = compare(case, training, options.seconds / len(jobs))
            except DifferentResults as error:
                print(f"error: {error}; please report this", file=sys.stderr)
                return 1
            rows.append(row)
            print(_line(case, row, name), flush=True)
    slower = sum(row["times"]["torch.nn"]["median"] < NOISE * row["times"]["rnn_ext"]["median"] for row in rows)
    print(f"\nSlower than torch.nn: {slower} of {len(rows)}.")
    if options.output:
        result = {"format": 1, "machine": about, "threads": options.threads, "pinned": cores, "rows": rows}
        write(options.output, json.dumps(result, indent=1) + "\n")
    return 0


def _line(case: Case, row: dict[str, Any], width: int) -> str:
    forward = row["mode"] == "forward"
    theirs, ours = (row["times"][name] for name in ("torch.nn", "rnn_ext"))
    shown = [f"{duration(t['median'])} ±{50 * (t['high'] - t['low']) / t['median']:.0f} %" for t in (theirs, ours)]
    ratio = theirs["median"] / ours["median"]
    kept = "" if forward else " -> ".join(size(row["saved_bytes"][name]) for name in ("torch.nn", "rnn_ext"))
    note = "  slower" if ratio < NOISE else ""
    what = f"{str(case) if forward else '':{width}}  {'forward' if forward else 'forward + backward':18}"
    return f"{what}{shown[0]:>18}{shown[1]:>18}{ratio:10.2f}x  {kept}{note}".rstrip()
