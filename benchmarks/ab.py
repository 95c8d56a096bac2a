"""Two builds of the package against each other: which rows became slower or faster, and do both compute the same?

    python benchmarks/ab.py OLD NEW                           all rows, up to five minutes
    python benchmarks/ab.py OLD NEW --rows 'LSTM.*training'   rows whose name or group has a match of this
    python benchmarks/ab.py --list                            the names of the rows
    python benchmarks/ab.py OLD NEW --capability avx2 --json avx2.jsonl

OLD and NEW are source trees with a library that `python setup.py build_ext --inplace` has built, or paths of such
libraries (rnn_ext/_C*.so); a library runs with the Python files beside it.

Builds have processes of their own, since both register the same torch ops. All are pinned to the same core. One of
each build take turns of some 15 ms, so that a machine that becomes slower disturbs both alike. A ratio is the median of
NEW's time over OLD's of all pairs of turns. Each row is measured in five such pairs of processes, since the addresses
that a process happens to have move a row by up to 6 per cent.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import select
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import IO, Any, NoReturn

NOISE = 0.03  # a build against its copy: benchmarks/README.md says how far rows went apart
SECONDS = 2.5  # for a row: 70 rows and the start of the workers take less than five minutes
TURN = 0.015  # seconds of a turn: short against changes of the machine, long against the other's cold caches
BATCH = 0.003  # seconds of a batch of calls; the fastest batch of a turn counts
PLACES = 5  # pairs of processes
PATIENCE = 60.0  # seconds until a worker that does not answer is ended
PAUSE = 0.002  # seconds between turns of several threads, see Worker
# Largest difference of a result's norm, or of its product with random signs, relative to the norm. The kernels may sum
# in another order, and of 16 and 8 bits other roundings follow from that.
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 3e-2, "int8": 1e-2}
SIDES = ("OLD", "NEW")


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer and what is called: N sequences, L timesteps, H units, as many inputs."""

    group: str
    cell: str
    N: int
    L: int
    H: int
    mode: str = "forward"  # "training": with backward; "step": layer.step; "cell": RNNCell, GRUCell or LSTMCell
    dtype: str = "float32"  # "int8": quantized weights
    activations: int = 16  # bits, of int8
    lengths: str = ""  # "packed": a PackedSequence; "lengths": a padded batch with lengths=
    directions: int = 1
    layers: int = 1
    options: tuple[tuple[str, Any], ...] = ()  # of the layer
    resets: bool = False
    threads: int = 1

    @property
    def name(self) -> str:
        parts = [self.cell, f"N={self.N}", f"L={self.L}", f"H={self.H}"]
        parts += [self.dtype] * (self.dtype != "float32")
        parts += [f"activations={self.activations}"] * (self.dtype == "int8")
        parts += [self.lengths] * bool(self.lengths)
        parts += ["two directions"] * (self.directions == 2)
        parts += [f"{self.layers} layers"] * (self.layers > 1)
        parts += [f"{key}={value}" for key, value in self.options]
        parts += ["resets"] * self.resets
        parts.append(self.mode)
        parts += [f"{self.threads} threads"] * (self.threads > 1)
        return ", ".join(parts)


def _rows(group: str, *rows: tuple[Any, ...]) -> list[Row]:
    """Each is (cell, N, L, H) or (cell, N, L, H, further fields)."""
    return [Row(group, *row[:4], **(row[4] if len(row) > 4 else {})) for row in rows]


TRAINING: dict[str, Any] = {"mode": "training"}
STEP: dict[str, Any] = {"mode": "step"}
DOUBLE: dict[str, Any] = {"dtype": "float64"}
BFLOAT16: dict[str, Any] = {"dtype": "bfloat16"}
INT8: dict[str, Any] = {"dtype": "int8"}
BOTH: dict[str, Any] = {"directions": 2}
PACKED: dict[str, Any] = {"lengths": "packed"}
LENGTHS: dict[str, Any] = {"lengths": "lengths"}
RESETS: dict[str, Any] = {"resets": True}
TWO_THREADS: dict[str, Any] = {"threads": 2}


def _with(**options: Any) -> dict[str, Any]:
    return {"options": tuple(options.items())}


# A call takes at most some 10 ms. All sizes and modes occur, with each cell; not all of their combinations.
ROWS = (
    *_rows(
        "one sequence",
        ("RNN", 1, 128, 8),
        ("RNN", 1, 64, 256, TRAINING),
        ("GRU", 1, 128, 32),
        ("GRU", 1, 16, 512),
        ("LSTM", 1, 128, 8, TRAINING),
        ("LSTM", 1, 128, 64),
        ("LSTM", 1, 32, 256),
    ),
    *_rows(
        "few sequences",
        ("RNN", 2, 64, 64),
        ("RNN", 8, 32, 32, TRAINING),
        ("GRU", 2, 32, 256, TRAINING),
        ("GRU", 8, 64, 64),
        ("LSTM", 2, 64, 32),
        ("LSTM", 8, 32, 64, TRAINING),
        ("LSTM", 8, 8, 512),
    ),
    *_rows(
        "many sequences",
        ("RNN", 32, 32, 64),
        ("RNN", 32, 8, 512, TRAINING),
        ("RNN", 128, 16, 256),
        ("GRU", 32, 32, 32, TRAINING),
        ("GRU", 32, 16, 256),
        ("GRU", 128, 16, 64),
        ("LSTM", 32, 8, 256, TRAINING),
        ("LSTM", 128, 16, 32, TRAINING),
    ),
    *_rows(
        "float64",
        ("RNN", 8, 32, 64, DOUBLE | TRAINING),
        ("GRU", 1, 64, 64, DOUBLE),
        ("LSTM", 32, 16, 64, DOUBLE | TRAINING),
    ),
    *_rows(
        "bfloat16",
        ("RNN", 32, 32, 64, BFLOAT16),
        ("GRU", 8, 32, 256, BFLOAT16 | TRAINING),
        ("LSTM", 1, 32, 512, BFLOAT16),
        ("LSTM", 32, 16, 256, BFLOAT16),
    ),
    *_rows(
        "int8",
        ("RNN", 1, 64, 256, INT8),
        ("GRU", 1, 32, 512, INT8 | {"activations": 8}),
        ("LSTM", 8, 32, 64, INT8),
        ("LSTM", 32, 16, 256, INT8 | {"activations": 8}),
    ),
    *_rows(
        "packed",
        ("RNN", 32, 64, 32, PACKED | TRAINING),
        ("GRU", 32, 32, 64, PACKED | BOTH),
        ("GRU", 8, 64, 64, LENGTHS | TRAINING),
        ("LSTM", 8, 32, 256, LENGTHS | BOTH),
        ("LSTM", 32, 32, 64, PACKED | BOTH | TRAINING),
    ),
    *_rows(
        "directions and stacks",
        ("RNN", 1, 64, 32, {"layers": 2}),
        ("GRU", 8, 32, 64, BOTH | TRAINING),
        ("GRU", 32, 16, 64, {"layers": 2} | TRAINING),
        ("LSTM", 1, 64, 64, BOTH),
        ("LSTM", 1, 16, 256, {"layers": 3}),
        ("LSTM", 8, 32, 64, BOTH | _with(proj_size=32)),
    ),
    *_rows(
        "single timesteps",
        ("RNN", 1, 1, 64, STEP),
        ("GRU", 1, 1, 64, STEP | {"layers": 2}),
        ("LSTM", 1, 1, 64, STEP),
        ("LSTM", 1, 1, 512, STEP),
        ("GRU", 32, 1, 64, {"mode": "cell"}),
        ("LSTM", 8, 1, 256, TRAINING),
        ("RNN", 128, 1, 256),
    ),
    *_rows(
        "few units",
        ("RNN", 4096, 8, 1, TRAINING),
        ("GRU", 1024, 8, 2, TRAINING),
        ("GRU", 512, 16, 8),
        ("LSTM", 4096, 8, 1),
        ("LSTM", 256, 16, 4, TRAINING),
    ),
    *_rows(
        "variants and resets",
        ("LSTM", 1, 64, 64, _with(layer_norm=True)),
        ("LSTM", 8, 32, 64, _with(layer_norm=True) | TRAINING),
        ("LSTM", 8, 32, 64, _with(recompute=True) | TRAINING),
        ("GRU", 1, 64, 64, _with(zoneout=0.1)),
        ("GRU", 8, 32, 64, _with(zoneout=0.1) | TRAINING),
        ("RNN", 8, 64, 64, RESETS),
        ("LSTM", 32, 32, 64, RESETS | TRAINING),
    ),
    *_rows(
        "two threads",
        ("RNN", 128, 16, 256, TWO_THREADS),
        ("GRU", 32, 16, 256, TWO_THREADS | TRAINING),
        ("LSTM", 1, 32, 512, TWO_THREADS),
        ("LSTM", 8, 64, 64, TWO_THREADS | BOTH),
    ),
)


# The worker


class Problem:
    """A row's layer with its inputs, the same numbers in every process."""

    def __init__(self, row: Row, place: int) -> None:
        import torch
        from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

        import rnn_ext

        self.row = row
        generator = torch.Generator().manual_seed(zlib.crc32(row.name.encode()))
        # Kept as long as the problem: what is allocated after it lies elsewhere in another place.
        self.padding = [torch.empty(4096 * place + 64 * (5 * place % 64)) for _ in range(2)]
        dtype = getattr(torch, "float32" if row.dtype == "int8" else row.dtype)
        kind = getattr(rnn_ext, row.cell + "Cell" * (row.mode == "cell"))
        options = dict(row.options)
        if row.mode != "cell":
            options |= {"num_layers": row.layers, "bidirectional": row.directions == 2}
        self.layer = kind(row.H, row.H, **options)
        with torch.no_grad():
            for name, parameter in sorted(self.layer.named_parameters()):
                numbers = (2 * torch.rand(parameter.shape, generator=generator) - 1) / row.H**0.5
                parameter.copy_(numbers + 1 if name.startswith("weight_norm") else numbers)
        self.layer.to(dtype)
        if row.dtype == "int8":
            rnn_ext.quantize(self.layer, activations=row.activations)
        self.training = row.mode == "training"
        self.layer.train(self.training)
        shape = (row.N, row.H) if row.mode in ("step", "cell") else (row.L, row.N, row.H)
        input = torch.randn(shape, generator=generator).to(dtype)
        self.keywords: dict[str, Any] = {}
        if row.resets:
            self.keywords["resets"] = torch.rand(row.L, row.N, generator=generator) < 0.03
        lengths = [row.L - (row.L - 1) * n // row.N for n in range(row.N)]
        if row.lengths == "lengths":
            self.keywords["lengths"] = torch.tensor(lengths)
        self.leaf = input
        self.argument: Any = input
        if row.lengths == "packed":
            packed = pack_padded_sequence(input, torch.tensor(lengths))
            self.leaf = packed.data.detach()
            self.argument = PackedSequence(self.leaf, packed.batch_sizes)
        if self.training:
            self.leaf.requires_grad_()
            self.leaves = [self.leaf, *self.layer.parameters()]
            self.grads = [torch.randn(t.shape, generator=generator).to(dtype) for t in self.results()]
        elif row.mode == "step":
            state = torch.randn(2, row.layers, row.N, row.H, generator=generator).to(dtype)
            self.state: Any = (state[0], state[1]) if row.cell == "LSTM" else state[0]
        elif row.mode == "cell":
            state = torch.randn(2, row.N, row.H, generator=generator).to(dtype)
            self.state = (state[0], state[1]) if row.cell == "LSTM" else state[0]
        self.timed = self.call()

    def results(self) -> list[Any]:
        """The tensors of a call of the layer."""
        if self.row.mode == "step":
            result: Any = self.layer.step(self.argument, self.state)
        elif self.row.mode == "cell":
            result = self.layer(self.argument, self.state)
        else:
            result = self.layer(self.argument, **self.keywords)
        return list(_tensors(result))

    def call(self) -> Callable[[], object]:
        """What is timed, without any work of ours."""
        import torch

        layer, argument, keywords = self.layer, self.argument, self.keywords
        if self.training:
            return lambda: torch.autograd.grad(self.results(), self.leaves, self.grads)
        if self.row.mode == "step":
            step, state = layer.step, self.state
            return lambda: step(argument, state)
        if self.row.mode == "cell":
            state = self.state
            return lambda: layer(argument, state)
        return lambda: layer(argument, **keywords)

    def check(self) -> list[tuple[float, float]]:
        """Of each result and gradient the norm and the product with random signs, which sees what is out of place."""
        import torch

        self.layer.eval()  # which random numbers a layer draws in training is a build's own affair
        found = list(self.results())
        if self.training:
            found += torch.autograd.grad(found, self.leaves, self.grads)
        self.layer.train(self.training)
        generator = torch.Generator().manual_seed(0)
        numbers = []
        for tensor in found:
            flat = tensor.detach().double().flatten()
            signs = torch.randint(0, 2, flat.shape, generator=generator).double() * 2 - 1
            numbers.append((float(flat.norm()), float(flat @ signs)))
        return numbers

    def seconds(self, number: int, batches: int, clock: Callable[[], float]) -> float:
        """Of a call: of the fastest of so many batches of so many calls. Others only make a batch slower."""
        import torch

        call = self.timed
        best = math.inf
        with torch.set_grad_enabled(self.training):
            if batches > 1:
                call()  # the other build had the caches
            for _ in range(batches):
                begin = clock()
                for _ in range(number):
                    call()
                best = min(best, clock() - begin)
        return best / number


def _tensors(result: Any) -> Iterator[Any]:
    """Those in nested tuples. A PackedSequence, a tuple as well, has its data."""
    if hasattr(result, "batch_sizes"):
        yield result.data
    elif isinstance(result, tuple):
        for part in result:
            yield from _tensors(part)
    else:
        yield result


def work(tree: str, cores: Sequence[int]) -> None:
    """What a worker does: it answers each line of its input with a line, until the input ends."""
    os.sched_setaffinity(0, cores)  # before torch is loaded, whose OpenMP counts the cores that it has then
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        import torch

        import rnn_ext
        from rnn_ext import ops

        found = Path(rnn_ext.__file__).parent
        if not os.path.samefile(found, Path(tree) / "rnn_ext"):
            raise ImportError(f"the package came from {found}, expected {Path(tree) / 'rnn_ext'}")
        if not ops.is_available():
            raise ImportError(str(ops.load_error()))
        torch.set_num_threads(len(cores))
    except Exception as error:
        answer({"error": _one_line(error)})
        return
    answer({"torch": str(torch.__version__), "instructions": ops.cpu_capability()})
    # Processor time leaves out other processes on this core. Of several threads it would be a sum, spinning included.
    clock = time.process_time if len(cores) == 1 else time.perf_counter
    problem = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if order["do"] == "build":
                problem = None
                row = dict(order["row"], options=tuple(map(tuple, order["row"]["options"])))
                problem = Problem(Row(**row), order["place"])
                with torch.set_grad_enabled(problem.training):
                    checked = problem.check() if order["place"] == 0 else []
                problem.seconds(1, 2, clock)
                answer({"check": checked, "seconds": problem.seconds(1, 3, clock)})
            else:
                assert problem is not None
                answer({"seconds": problem.seconds(order["number"], order["batches"], clock)})
        except Exception as error:
            answer({"error": _one_line(error)})


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


# The parent


class WorkerError(Exception):
    """A worker could not do it, or has ended."""


class UnusableError(Exception):
    """OLD or NEW cannot be loaded at all."""


class Worker:
    """A process with one of the builds, which sleeps unless it was asked for something."""

    def __init__(self, tree: Path, cores: Sequence[int], capability: str | None) -> None:
        self.tree, self.cores, self.capability = tree, tuple(cores), capability
        self.process: subprocess.Popen[str] | None = None
        self.about: dict[str, Any] = {}
        self.errors: IO[str] | None = None

    def start(self) -> None:
        others = os.environ.get("PYTHONPATH")
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(self.tree), *([others] if others else [])]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": str(len(self.cores)),
            # Threads of libgomp that wait for work spin for some 4 ms: those of the build whose turn is over would
            # take the other's core. After so few rounds they sleep, within PAUSE, and calls in a row still find them
            # awake.
            "GOMP_SPINCOUNT": "10000",
        }
        environment.pop("OMP_WAIT_POLICY", None)
        if self.capability:
            environment["RNN_EXT_CPU_CAPABILITY"] = self.capability
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, as long as the process
        command = [sys.executable, __file__, "--worker", str(self.tree), *map(str, self.cores)]
        # Elsewhere: the tree that PYTHONPATH names is to win over the current folder.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
            cwd="/",
        )
        try:
            self.about = self._answer()
        except WorkerError:
            self.stop()
            raise

    def ask(self, **order: Any) -> dict[str, Any]:
        """Starts the process if there is none. Raises WorkerError."""
        if self.process is None:
            self.start()
        assert self.process and self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # the answer will be missing
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process and self.process.stdout and self.errors
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        if not ready:
            self.stop()
            raise WorkerError(f"no answer within {PATIENCE:g} s")
        line = self.process.stdout.readline()
        if not line.endswith("\n"):
            status = self.process.wait()
            self.errors.seek(0)
            said = self.errors.read().strip().splitlines()
            self.stop()
            how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            raise WorkerError(f"the process crashed ({how})" + (f": {said[-1]}" if said else ""))
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout, self.errors):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
            self.process = None


def summary(places: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The median of all ratios, and how far it may be from the truth: half of a 95 % interval, the larger of two.

    One is of the order statistics around the median; it takes the ratios as independent. The other is Student's, of the
    medians of the places, which differ by more where addresses matter.
    """
    ratios = sorted(ratio for place in places for ratio in place)
    count = len(ratios)
    reach = 0.98 * math.sqrt(count)
    low, high = math.floor((count - 1) / 2 - reach), math.ceil((count - 1) / 2 + reach)
    spread = (ratios[min(high, count - 1)] - ratios[max(low, 0)]) / 2
    medians = [statistics.median(place) for place in places]
    if len(medians) > 1:
        student = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(medians), 2.5)
        spread = max(spread, student * statistics.stdev(medians) / math.sqrt(len(medians)))
    return statistics.median(ratios), spread


def moved(ratio: float, spread: float) -> bool:
    """By more than the noise."""
    return abs(ratio - 1) > max(spread, NOISE)


def slower(ratio: float, spread: float) -> bool:
    """By so much that the run fails: a row of sixty is past its spread alone by chance."""
    return ratio - 1 > spread + NOISE


def geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(ratio) for ratio in ratios))


def difference(old: Sequence[Sequence[float]], new: Sequence[Sequence[float]], dtype: str) -> str:
    """Whether the builds computed the same: nothing, or a sentence."""
    if len(old) != len(new):
        return f"NEW has {len(new)} results and gradients, expected {len(old)} as OLD"
    worst = 0.0
    for (norm, product), (other_norm, other_product) in zip(old, new, strict=True):
        if not all(map(math.isfinite, (norm, product, other_norm, other_product))):
            return "results are not finite"
        scale = max(norm, other_norm) or 1.0
        worst = max(worst, abs(norm - other_norm) / scale, abs(product - other_product) / scale)
    if worst <= TOLERANCE[dtype]:
        return ""
    return f"results differ by {worst:.1e} of their norm, expected at most {TOLERANCE[dtype]:g}"


def measure(row: Row, pairs: Sequence[Sequence[Worker]], seconds: float) -> dict[str, Any]:
    """What is known of a row: ratio, spread and seconds, or errors and of which builds."""
    result: dict[str, Any] = {"row": row.name, "group": row.group, "threads": row.threads}
    pause = PAUSE if row.threads > 1 else 0.0
    places: list[list[float]] = []
    times: tuple[list[float], list[float]] = ([], [])
    for place, workers in enumerate(pairs):
        answers: list[dict[str, Any]] = []
        errors: dict[str, str] = {}
        for side, worker in zip(SIDES, workers, strict=True):
            try:
                answers.append(worker.ask(do="build", row=dataclasses.asdict(row), place=place))
            except WorkerError as error:
                errors[side] = str(error)
        if errors:
            return result | {"failed": errors}
        if place == 0 and (wrong := difference(answers[0]["check"], answers[1]["check"], row.dtype)):
            result["wrong"] = wrong
        slowest = max(answer["seconds"] for answer in answers)
        number = max(1, round(BATCH / max(slowest, 1e-9)))
        batches = max(1, round(TURN / max(number * slowest, 1e-9)))
        found: list[float] = []
        begin = time.perf_counter()
        while len(found) < 3 or time.perf_counter() - begin < seconds / len(pairs):
            pair = [0.0, 0.0]
            for which in (0, 1) if len(found) % 2 == 0 else (1, 0):
                time.sleep(pause)
                try:
                    pair[which] = workers[which].ask(do="time", number=number, batches=batches)["seconds"]
                except WorkerError as error:
                    return result | {"failed": {SIDES[which]: str(error)}}
                times[which].append(pair[which])
            found.append(pair[1] / pair[0])
        places.append(found)
    ratio, spread = summary(places)
    result |= {"ratio": round(ratio, 4), "spread": round(spread, 4), "pairs": sum(map(len, places))}
    for key, found in zip(("old_seconds", "new_seconds"), times, strict=True):
        result[key] = float(f"{statistics.median(found):.4g}")
    return result | {"moved": moved(ratio, spread), "slower": slower(ratio, spread)}


def failures(results: Sequence[dict[str, Any]]) -> list[str]:
    """Why the exit status is 1: the names of the rows that are slower, wrong, or fail with NEW."""
    return [
        result["row"]
        for result in results
        if result.get("slower") or "wrong" in result or "NEW" in result.get("failed", {})
    ]


def find_tree(text: str, stack: contextlib.ExitStack) -> Path:
    """The folder to be put on the path for OLD or NEW. Raises argparse.ArgumentTypeError."""
    path = Path(os.path.abspath(text))
    expected = "expected a source tree with a built rnn_ext/_C*.so, or such a file"
    if path.is_dir():
        if not (path / "rnn_ext" / "__init__.py").is_file():
            raise argparse.ArgumentTypeError(f"{text} has no rnn_ext/__init__.py: {expected}")
        if not list((path / "rnn_ext").glob("_C*.so")):
            raise argparse.ArgumentTypeError(f"{text} has not been built: {expected}")
        return path
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text} does not exist: {expected}")
    if not re.fullmatch(r"_C.*\.so", path.name):
        raise argparse.ArgumentTypeError(f"{text} is no library of rnn_ext: {expected}")
    if not (path.parent / "__init__.py").is_file():
        raise argparse.ArgumentTypeError(f"{text} has no Python files of rnn_ext beside it: {expected}")
    version = re.search(r"cpython-(\d+)", path.name)
    if version and version[1] != (running := sysconfig.get_config_var("py_version_nodot")):
        raise argparse.ArgumentTypeError(f"{text} is for another Python, expected a library for cpython-{running}")
    # The files beside it, and this library in place of any other.
    tree = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rnn_ext_ab_")))
    (tree / "rnn_ext").mkdir()
    for entry in path.parent.iterdir():
        if not re.fullmatch(r"_C.*\.so|__pycache__", entry.name):
            (tree / "rnn_ext" / entry.name).symlink_to(entry)
    (tree / "rnn_ext" / f"_C{EXTENSION_SUFFIXES[0]}").symlink_to(path)
    return tree


class Parser(argparse.ArgumentParser):
    """As rnn_ext._options.Parser, which is not imported: no package but the two need be installed."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression ({error})") from None


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        description=(__doc__ or "").split("\n", 1)[0],
        epilog="Exit status: 0 if no row is slower by more than its spread and "
        f"{NOISE * 100:g} %, none differs in its results, and none fails with NEW; 1 otherwise; 2 if OLD, NEW or an "
        "option cannot be used. A row that fails with OLD alone is reported and does not count.",
    )
    expected = "a source tree with a library built in place, or the path of a library rnn_ext/_C*.so"
    parser.add_argument("old", nargs="?", metavar="OLD", help=expected)
    parser.add_argument("new", nargs="?", metavar="NEW", help="the same, of the build that is to be judged")
    parser.add_argument(
        "--rows", type=_pattern, default=re.compile(""), metavar="REGEX", help="rows whose name or group matches"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the rows and their groups")
    parser.add_argument("--seconds", type=_seconds, default=SECONDS, help="for each row, both builds (%(default)g)")
    parser.add_argument(
        "--threads", type=int, help="of all rows (1 and, for those that say so, 2), each on a core of its own"
    )
    parser.add_argument("--capability", help="RNN_EXT_CPU_CAPABILITY of both builds: avx2, for instance")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a line of JSON for each row, as it is measured")
    options = parser.parse_args(argv)
    options.chosen = [row for row in ROWS if options.rows.search(row.name) or options.rows.search(row.group)]
    if not options.chosen:
        parser.error(f"--rows {options.rows.pattern!r} matches no row; --list shows them")
    cores = len(os.sched_getaffinity(0))
    if options.threads is not None:
        if not 1 <= options.threads <= cores:
            parser.error(f"--threads {options.threads}: expected 1 to {cores}, the cores that this process may use")
        options.chosen = [dataclasses.replace(row, threads=options.threads) for row in options.chosen]
    if not options.list and options.new is None:
        parser.error("expected two builds, OLD and NEW")
    options.stack = contextlib.ExitStack()
    if not options.list:
        try:
            options.trees = [find_tree(text, options.stack) for text in (options.old, options.new)]
            options.json = options.stack.enter_context(options.json.open("w")) if options.json else None
        except argparse.ArgumentTypeError as error:
            parser.error(str(error))
        except OSError as error:
            parser.error(f"--json {options.json} cannot be written ({error.strerror})")
    return options


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def verdict(result: dict[str, Any]) -> str:
    if "wrong" in result:
        return f"WRONG: {result['wrong']}"
    if "failed" in result:
        return "FAILED: " + "; ".join(f"{side}: {error}" for side, error in result["failed"].items())
    if not result["moved"]:
        return ""
    return "slower" if result["ratio"] > 1 else "faster"


def line(result: dict[str, Any], width: int) -> str:
    start = f"{result['row']:{width}}"
    if "ratio" not in result:
        return f"{start}  {verdict(result)}"
    old, new = (duration(result[key]) for key in ("old_seconds", "new_seconds"))
    return f"{start}  {old:>9}  {new:>9}  {result['ratio']:.3f} ± {result['spread']:.3f}  {verdict(result)}".rstrip()


def report(results: Sequence[dict[str, Any]], console: Any) -> None:
    """The groups, and the rows that want to be looked at."""
    from rich import box
    from rich.table import Table

    measured = [result for result in results if "ratio" in result]
    console.print()
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
    for title in ("group", "rows", "NEW / OLD, geometric mean", "least", "most"):
        table.add_column(title, justify="left" if title == "group" else "right")
    groups = list(dict.fromkeys(result["group"] for result in measured))
    for group in [*groups, "all"] if len(groups) > 1 else groups:
        found = [result["ratio"] for result in measured if group in (result["group"], "all")]
        table.add_row(group, str(len(found)), *(f"{f(found):.3f}" for f in (geometric_mean, min, max)))
    console.print(table)
    noted = [result for result in results if verdict(result)]
    width = max((len(result["row"]) for result in noted), default=0)
    about = f"{len(noted)} of {len(results)} rows moved by more than the noise, differ or failed"
    console.print(f"\n{about}{':' * bool(noted)}")
    for result in sorted(noted, key=lambda result: -result.get("ratio", math.inf)):
        console.print(line(result, width), style=_style(result), soft_wrap=True)


def _style(result: dict[str, Any]) -> str:
    said = verdict(result)
    return {"": "", "faster": "green", "slower": "red"}.get(said, "bold red")


def compare(options: argparse.Namespace, console: Any) -> list[dict[str, Any]]:
    """All chosen rows, those of few threads first."""
    results: list[dict[str, Any]] = []
    allowed = sorted(os.sched_getaffinity(0))
    width = max(len(row.name) for row in options.chosen)
    for threads in sorted({row.threads for row in options.chosen}):
        rows = [row for row in options.chosen if row.threads == threads]
        if threads > len(allowed):
            console.print(f"{len(rows)} rows left out: they need {threads} cores, this process may use {len(allowed)}")
            continue
        # The last cores: the first serve most interrupts.
        cores = allowed[-threads:]
        pairs = [[Worker(tree, cores, options.capability) for tree in options.trees] for _ in range(PLACES)]
        workers = [worker for pair in pairs for worker in pair]
        try:
            for i, worker in enumerate(workers):
                try:
                    worker.start()
                except WorkerError as error:
                    side = SIDES[i % 2]
                    path = getattr(options, side.lower())
                    raise UnusableError(f"{side}, {path}, cannot be used: {error}") from None
            instructions = {worker.about["instructions"] for worker in workers}
            console.print(
                f"{threads} thread(s), core(s) {', '.join(map(str, cores))}, kernels for "
                f"{' and '.join(sorted(instructions))}, torch {workers[0].about['torch']}",
                soft_wrap=True,
            )
            for row in rows:
                result = measure(row, pairs, options.seconds)
                results.append(result)
                console.print(line(result, width), style=_style(result), soft_wrap=True)
                if options.json:
                    print(json.dumps(result), file=options.json, flush=True)
        finally:
            for worker in workers:
                worker.stop()
    return results


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status, see --help."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["--worker"]:
        work(arguments[1], [int(core) for core in arguments[2:]])
        os._exit(0)  # torch would take a second to leave, on the core that others measure on
    options = parse(argv)
    if options.list:
        for row in options.chosen:
            print(f"{row.group:22}  {row.name}")
        return 0
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    begin = time.perf_counter()
    with options.stack:
        try:
            results = compare(options, console)
        except UnusableError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    if not any("ratio" in result for result in results):
        console.print("no row was measured")
        return 1
    report(results, console)
    failed = failures(results)
    console.print(f"{time.perf_counter() - begin:.0f} s; " + (f"{len(failed)} rows fail" if failed else "no row fails"))
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
