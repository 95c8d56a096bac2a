"""rnn_ext against torch.nn, ONNX Runtime, OpenVINO and JAX, side by side on this machine.

    python benchmarks/run.py                       everything: results/<machine>.json and .md, plots/. With any option
                                                   only what --output names is written
    python benchmarks/run.py --quick               a few small rows, two minutes: does it run?
    python benchmarks/run.py --rows 'grid LSTM N=1 .*forward$' --threads 1 --output mine.json
    RNN_EXT_CPU_CAPABILITY=avx2 python benchmarks/run.py       torch.nn and us on AVX2: results/<machine>-avx2.json

In each row all contestants compute the same thing, which is checked before the clock starts, and then take turns, on as
many pinned cores as there are threads. With one thread the clock is the time that the process has had the core, so that
it may be shared with others (the results say how much it was). Each number of threads has a process of its own, because
most peers settle theirs once. The ceilings of the machine are measured in the same process, before the first row and
after the last, those that a row's floor depends on most also in turns with its contestants, and each row is given its
floor (see ceilings.py). The medians, their spread and everything that was left out, with the reason, go to the JSON
file (stored.py).

Modes: "forward" is inference; "training" is a forward and a backward pass with the gradients of the input and of all
parameters; "step" is a whole training step of a model, with loss and optimizer.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ceilings as ceiling
import peers
import readings
import stored
import table
import torch
from peers import Contestant, Unsupported
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

import rnn_ext
from rnn_ext import _C, bench, ops
from rnn_ext._files import check_output, write
from rnn_ext._options import Parser, guarded, output_file, positive_int, positive_number
from rnn_ext.bench import CELLS, Case, Workload, duration, ragged
from rnn_ext.models import BiLSTMClassifier, RNNRegressor

FOLDER = Path(__file__).parent
console = Console(highlight=False, soft_wrap=True)

# The seed classifier's batch: 32 texts of 62 to 500 words, 9,284 in all.
CLASSIFIER_LENGTHS = ragged(32, 62, 500, 0.9168)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the results. `build` gives the contestants for a number of threads and says who was left out."""

    section: str
    case: Case | None
    mode: str
    name: str
    build: Callable[[Row, int, dict[str, str]], list[Contestant]]
    all_threads: bool = False  # measured with every number of threads, not only with one

    def __str__(self) -> str:
        return f"{self.section} {self.name} {self.mode}"


def layers(row: Row, threads: int, left_out: dict[str, str]) -> list[Contestant]:
    """Ours and every peer that is installed and can run the case."""
    assert row.case is not None
    work = Workload(row.case)
    found = []
    for peer in peers.PEERS:
        missing = peer.missing()
        try:
            if missing is None:
                found += peer.build(work, row.mode == "training", threads)
        except Unsupported as error:
            left_out[peer.name] = str(error)
        except Exception as error:  # a peer's own failure must not end the run of the others
            left_out[peer.name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return found


def torch_cell(work: Workload, training: bool) -> Contestant:
    """Of one timestep, for which it exists."""
    case = work.case
    cell = {"rnn": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}[case.cell](case.input_size, case.hidden_size)
    cell.to(work.input.dtype)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in work.torch.state_dict().items()})
    input = work.input[0].clone().requires_grad_(training)
    tensors, grad = [input, *cell.parameters()], work.grad_output[0]

    def run() -> Any:
        state = cell(input)
        output = state[0] if isinstance(state, tuple) else state
        return (output, torch.autograd.grad(output, tensors, grad)) if training else (output, ())

    def results(returned: Any) -> dict[str, Tensor]:
        return {"output": returned[0].detach().unsqueeze(0)}

    return Contestant(f"torch.nn.{type(cell).__name__}", run, results)


def calls(row: Row, threads: int, left_out: dict[str, str]) -> list[Contestant]:
    """A call of one timestep: the modules, and torch's cell."""
    assert row.case is not None
    work, training = Workload(row.case), row.mode == "training"
    return [*peers.ours(work, training, threads), *peers.torch_nn(work, training, threads), torch_cell(work, training)]


def dtypes(row: Row, threads: int, left_out: dict[str, str]) -> list[Contestant]:
    """Ours in a reduced precision against ours in float32, and torch.nn's layer and cell in the reduced one."""
    case = row.case
    assert case is not None
    training = row.mode == "training"
    full = peers.ours(Workload(dataclasses.replace(case, dtype="float32")), training, threads)[0]
    work = Workload(case)
    found = peers.ours(work, training, threads)
    found.append(Contestant("rnn_ext float32", full.run, full.results))
    if case.length == 1:
        found.append(torch_cell(work, training))
    try:
        found += peers.torch_nn(work, training, threads)
    except RuntimeError as error:
        left_out["torch.nn"] = str(error).splitlines()[0]
    return found


class PackedClassifier(BiLSTMClassifier):
    """The classifier as one writes it with torch.nn."""

    def __init__(self, *sizes: int):
        super().__init__(*sizes)
        self.rnn = nn.LSTM(sizes[1], sizes[2], batch_first=True, bidirectional=True)

    def forward(self, text: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embedding(text), lengths, batch_first=True, enforce_sorted=False)
        _, (h_n, _) = self.rnn(packed)
        return torch.sigmoid(self.fc2(torch.relu(self.fc1(torch.cat((h_n[-2], h_n[-1]), dim=1)))))


def models(row: Row, threads: int, left_out: dict[str, str]) -> list[Contestant]:
    """A whole step: forward, loss, backward, Adam."""
    torch.manual_seed(0)
    inputs: tuple[Tensor, ...]
    if "classifier" in row.name:
        sizes = (10_000, 64 if "demo" in row.name else 20, 64, 64)
        lengths = torch.tensor(CLASSIFIER_LENGTHS)[torch.randperm(len(CLASSIFIER_LENGTHS))]
        text = torch.randint(1, sizes[0], (len(lengths), int(lengths.max())))
        inputs = text.masked_fill(torch.arange(text.shape[1]) >= lengths.unsqueeze(1), 0), lengths
        target = torch.randint(0, 2, (len(lengths), 1)).float()
        contestants = {"rnn_ext": BiLSTMClassifier(*sizes, backend="custom"), "torch.nn": PackedClassifier(*sizes)}
        loss_of = F.binary_cross_entropy
    else:
        size, batch, length = (1, 64, 24) if "demo" in row.name else (64, 32, 100)
        inputs = (torch.randn(batch, length, size),)
        target = torch.randn(batch, 1)
        contestants = {
            "rnn_ext": RNNRegressor(size, 32, backend="custom"),
            "torch.nn": rnn_ext.to_native(RNNRegressor(size, 32)),
        }
        loss_of = F.mse_loss
    weights = contestants["rnn_ext"].state_dict()

    def contestant(name: str, model: nn.Module) -> Contestant:
        model.load_state_dict(weights)
        optimizer = torch.optim.Adam(model.parameters())

        def run() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model(*inputs), target)
            loss.backward()
            optimizer.step()
            return loss

        def results(returned: Tensor) -> dict[str, Tensor]:
            grads = {f"{n}.grad": p.grad.clone() for n, p in model.named_parameters()}
            return {"loss": returned.detach(), **grads}

        return Contestant(name, run, results)

    return [contestant(name, model) for name, model in contestants.items()]


def all_rows() -> list[Row]:
    """Everything there is to measure, in the order of the results."""
    modes = ("forward", "training")

    def rows(section: str, cases: Iterable[Case], build: Any = layers, all_threads: bool = False) -> list[Row]:
        return [Row(section, case, mode, str(case), build, all_threads) for case in cases for mode in modes]

    shapes = [(1, 128, 64), (1, 512, 256), (1, 128, 512), (2, 128, 64), (4, 64, 100)]
    shapes += [(8, 128, 64), (32, 128, 128), (32, 128, 256), (64, 128, 512)]
    called = [(1, 64), (1, 512), (8, 512), (32, 256), (32, 512)]
    classifier = Case("lstm", 32, 500, 20, 64, bidirectional=True, lengths=CLASSIFIER_LENGTHS)
    one_way = [Case(cell, 32, 200, 64, 64, lengths=ragged(32, 25, 200)) for cell in CELLS]
    halves, halved = ("bfloat16", "float16"), [(1, 512, 256), (8, 128, 64), (32, 128, 256)]
    lengths = [64, 128, 256, 512, 1024, 2048]
    steps = ["regressor (seed)", "regressor (demo)", "classifier (seed)", "classifier (demo)"]
    return [
        *rows("grid", [Case(cell, n, t, h, h) for cell in CELLS for n, t, h in shapes], all_threads=True),
        *rows("stack", [Case(c, 1, 128, h, h, num_layers=2) for c in CELLS for h in (64, 128, 256)], all_threads=True),
        *rows("ragged", [classifier, dataclasses.replace(classifier, cell="gru"), *one_way], all_threads=True),
        *[Row("model", None, "step", name, models, True) for name in steps],
        *rows("call", [Case(cell, n, 1, h, h) for cell in CELLS for n, h in called], calls, all_threads=True),
        *rows(
            "dtype",
            [Case(c, n, t, h, h, dtype="bfloat16") for c in CELLS for n, t, h in halved]
            + [Case(c, n, t, 512, 512, dtype=d) for c in CELLS for n, t in ((1, 1), (32, 1), (1, 128)) for d in halves],
            dtypes,
        ),
        *rows("length", [Case("lstm", 8, t, 64, 64, lengths=ragged(8, t // 8, t)) for t in lengths]),
        *rows("batch", [Case(cell, 2**k, 64, 128, 128) for cell in CELLS for k in range(8)]),
        *rows("hidden", [Case(cell, 1, 64, h, h) for cell in CELLS for h in (16, 32, 64, 128, 256, 512, 1024)]),
    ]


def is_small(row: Row) -> bool:
    """Part of --quick."""
    if row.case is None:
        return "demo" in row.name and "regressor" in row.name
    return row.section in ("grid", "call", "dtype", "length") and row.case.rows * row.case.hidden_size**2 < 5e6


def measure_row(row: Row, threads: int, seconds: float, ceilings: dict[str, Any]) -> dict[str, Any]:
    """Check, then time. Contestants that cannot run, or whose results are wrong, are left out with a reason."""
    result: dict[str, Any] = {
        "section": row.section,
        "name": row.name,
        "case": dataclasses.asdict(row.case) if row.case else None,
        "mode": row.mode,
        "threads": threads,
        "auto": None,
        "times": {},
        "left_out": {},
        "floor": None,
        "rates": {},
        "cpu_share": None,
        "distance": None,
    }
    left_out: dict[str, str] = result["left_out"]
    if row.case is not None:
        problem = bench.too_large(row.case, row.mode == "training")
        if problem:
            left_out["everybody"] = problem
            return result
        result["auto"] = auto_backend(row.case, row.mode == "training")
    tolerance = bench.TOLERANCE[row.case.dtype if row.case else "float32"]
    with contextlib.nullcontext() if row.mode != "forward" else torch.inference_mode():
        # inference_mode is entered here, once for all: inside a contestant it would be part of the time
        contestants = row.build(row, threads, left_out)
        found = {}
        for contestant in contestants:
            try:
                found[contestant.name] = contestant.results(contestant.run())
            except Exception as error:
                left_out[contestant.name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        reference = next((r for name, r in found.items() if name.startswith("torch.nn")), {})
        runs = {}
        for contestant in contestants:
            if contestant.name not in found:
                continue
            apart = bench.difference(found[contestant.name], reference)
            if apart <= tolerance:
                runs[contestant.name] = contestant.run
            else:
                left_out[contestant.name] = f"wrong: {apart:.1e} from torch.nn, as a share of the largest value"
        if runs:
            start, cpu = time.perf_counter(), time.process_time()
            has_floor = row.case and row.section != "call"  # there a floor of a microsecond says nothing
            beside = ceiling.beside(row.case, row.mode == "training", threads) if has_floor else {}
            times = bench.interleave(runs | {name: work.run for name, work in beside.items()}, seconds, threads)
            result["cpu_share"] = (time.process_time() - cpu) / (time.perf_counter() - start)
            result["distance"] = 1e-9 * _C.thread_distance() if threads > 1 else None
            result["times"] = {name: dataclasses.asdict(times[name]) for name in runs}
            result["rates"] = ceiling.rates(beside, {name: times[name].median for name in beside})
            if has_floor:
                result["floor"] = floor_of(row.case, row.mode, ceilings, result["rates"], threads)
    return result


def measure_undisturbed(row: Row, threads: int, seconds: float, ceilings: dict[str, Any]) -> dict[str, Any]:
    """Up to three measurements of a row, until one has the core to itself; else the one that had the most of it."""
    found = []
    for _ in range(3):
        found.append(measure_row(row, threads, seconds, ceilings))
        if not readings.is_disturbed(found[-1]):
            return found[-1]
    return max(found, key=lambda result: result["cpu_share"])


def floor_of(case: Case, mode: str, ceilings: dict[str, Any], rates: dict[str, float], threads: int) -> dict[str, Any]:
    return ceiling.floor(case, mode == "training", ceiling.in_their_place(ceilings, rates), threads)._asdict()


def auto_backend(case: Case, training: bool) -> str:
    """Which backend "auto" picks for the case."""
    work = Workload(case)
    module = work.ours("auto")
    input = work.input if work.packed is None else work.packed
    with contextlib.nullcontext() if training else torch.inference_mode():
        return rnn_ext.explain(module, input).backend


def describe(row: dict[str, Any]) -> str:
    """One line for the terminal."""
    head = f"{row['section']} {row['name']} {row['mode']} x{row['threads']}"
    times = {name: timing["median"] for name, timing in row["times"].items()}
    parts = [f"{name} {duration(seconds)}" for name, seconds in times.items()]
    ours, peer = times.get("rnn_ext"), readings.best_peer(row)
    if ours and peer:
        ratio = times[peer] / ours
        parts.append(f"{ratio:.2f}x {peer}" + (" LOSS" if ratio < bench.NOISE else ""))
    if ours and row["floor"]:
        parts.append(f"{100 * row['floor']['seconds'] / ours:.0f} % of the floor ({row['floor']['bound']})")
    if readings.is_disturbed(row):
        parts.append(f"had the core for {100 * row['cpu_share']:.0f} % of the time only")
    parts += [f"{name} left out ({why})" for name, why in row["left_out"].items() if why != "inference only"]
    return f"{head}: {', '.join(parts)}"


def measure(rows: list[str], threads: int, seconds: float) -> dict[str, Any]:
    """The rows of these names, in a process of its own, pinned to `threads` cores."""
    peers.set_jax_threads(threads)
    chosen = {str(row): row for row in all_rows()}
    with bench.pinned(threads):
        found = ceiling.measure(min(3.0, 2 * seconds))
        versions = {}
        for peer in peers.PEERS:
            missing = peer.missing()
            if missing:
                console.print(missing)
            elif peer.packages:
                versions[peer.name] = peer.version()
        results = []
        if rows and threads > 1:  # whose threads start meanwhile, and stand in each other's way
            measure_row(chosen[rows[0]], threads, seconds, found)
        for name in rows:
            results.append(measure_undisturbed(chosen[name], threads, seconds, found))
            console.print(describe(results[-1]))
        final = ceiling.better(found, ceiling.measure(min(3.0, 2 * seconds)))
    for result in results:
        if result["floor"]:
            case = result["case"]
            case = Case(**{**case, "lengths": case["lengths"] and tuple(case["lengths"])})
            result["floor"] = floor_of(case, result["mode"], final, result["rates"], threads)
    return {"rows": results, "ceilings": final, "versions": versions}


MEMORY_CASES = [
    *(Case(cell, 32, 128, 256, 256) for cell in CELLS),
    Case("lstm", 32, 500, 20, 64, bidirectional=True, lengths=CLASSIFIER_LENGTHS),
]


def measure_memory(case: Case, contestant: str) -> dict[str, Any]:
    """Bytes kept for backward and the growth of the process at its peak, in a process of its own."""
    torch.set_num_threads(1)
    build = {"rnn_ext": peers.ours, "torch.nn": peers.torch_nn}[contestant]
    small = dataclasses.replace(case, batch=2, length=8, lengths=(8, 4) if case.lengths else None)
    build(Workload(small), True, 1)[0].run()  # what is loaded or cached at the first call is not this case's
    work = Workload(case)
    made = build(work, True, 1)[0]
    module = work.ours() if contestant == "rnn_ext" else work.torch
    before = _reset_peak()
    made.run()
    peak = _memory_of("VmHWM")
    return {
        "name": str(case),
        "contestant": contestant,
        "peak_bytes": peak - before if peak is not None and before is not None else None,
        "saved_bytes": bench.saved_bytes(work.training(module), module),
    }


def _memory_of(field: str) -> int | None:
    with contextlib.suppress(OSError):
        match = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)
        return int(match[1]) * 1024 if match else None
    return None


def _reset_peak() -> int | None:
    """Resident bytes now, and the peak set back to them; None where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _memory_of("VmRSS")


def _end_with_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the parent answers

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    parent = multiprocessing.parent_process()
    assert parent
    threading.Thread(target=wait, daemon=True).start()


class ProcessDied(Exception):
    """A fresh process ended without a result."""


def _send_result(sender: multiprocessing.connection.Connection, function: Callable[..., Any], arguments: Any) -> None:
    _end_with_parent()
    try:
        result = function(*arguments), None
    except Exception as error:
        traceback.print_exc()
        result = None, error
    sender.send(result)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process, which does not go on measuring when this one is interrupted or killed.

    Raises:
        ProcessDied: it ended without a result. (What the function raises is raised here, too.)
    """
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_send_result, args=(sender, function, arguments))
    try:
        process.start()
        sender.close()
        result, error = receiver.recv()
        process.join()
    except EOFError:
        raise ProcessDied from None
    finally:
        if process.pid:
            process.kill()
            process.join()
    if error:
        raise error
    return result


def slug(about: Mapping[str, Any]) -> str:
    """A file name for a machine."""
    text = f"{about['processor']} {about['cores']} cores {peers.held() or ''}".lower()
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text} is not a regular expression ({error})") from None


def results_file(text: str) -> Path:
    """A type of argparse's options: a JSON file, beside which a table goes."""
    path = output_file(text)
    beside = path.with_suffix(".md")
    if path == beside:
        raise argparse.ArgumentTypeError(f"{text} is where the table would go: expected a name that ends in .json")
    if beside.exists() and not path.exists():
        raise argparse.ArgumentTypeError(f"{text}: its table would replace {beside}, which is not one")
    output_file(str(beside))
    return path


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(bench.allowed_cores())
    parser.add_argument("--quick", action="store_true", help="a few small rows, less time for each")
    parser.add_argument("--rows", type=pattern, help="regular expression for section, name and mode of a row")
    parser.add_argument("--threads", type=positive_int, nargs="+", help="(1 and all cores)")
    parser.add_argument("--seconds", type=positive_number(), help="for each row, about (3; quick: 0.4)")
    parser.add_argument(
        "--output", type=results_file, help="JSON file, its table beside it (with no option: results/<machine>.json)"
    )
    options = parser.parse_args(argv)
    options.threads = sorted(set(options.threads or (1, cores)))
    options.seconds = options.seconds or (0.4 if options.quick else 3.0)
    if max(options.threads) > cores:
        parser.error(f"--threads {max(options.threads)}: this process may use {cores} core(s)")
    return options


def save(result: dict[str, Any], output: Path | None) -> dict[str, Any]:
    """Write what is kept of a result, if there is a file for it, and its table; returns that, as it is read again."""
    kept = stored.pack(result)
    shown = stored.unpack(kept)
    if output:
        write(output, stored.text(kept))
        write(output.with_suffix(".md"), table.markdown(shown))
    return shown


def main(argv: list[str] | None = None) -> int:
    """Returns 1 where our results were wrong or missing, 2 for bad options."""
    options = parse(argv)
    rows = [row for row in all_rows() if not options.quick or is_small(row)]
    if options.rows:
        rows = [row for row in rows if options.rows.search(str(row))]
    whole, published = not options.quick and not options.rows, options == parse([])
    if not rows:
        sections = ", ".join(dict.fromkeys(row.section for row in all_rows()))
        print(f"error: --rows {options.rows.pattern!r} matches nothing; the sections are {sections}", file=sys.stderr)
        return 2
    if not ops.is_available():
        print(f"error: {ops.load_error()}", file=sys.stderr)
        return 1
    os.environ.update(peers.INSTRUCTIONS.get(peers.held() or "", {}))  # what measures is a process of its own
    about = in_fresh_process(bench.machine)
    if work := bench.other_work(about):
        console.print(f"Other work is running here ({work}): the numbers will suffer.")
    result: dict[str, Any] = {"machine": about, "seconds_per_row": options.seconds}
    result |= {"ceilings": {}, "rows": [], "memory": []}
    output = options.output
    if published:
        output = FOLDER / "results" / f"{slug(about)}.json"
        check_output(output)
    for threads in options.threads:
        chosen = [str(row) for row in rows if row.all_threads or threads == min(options.threads)]
        if not chosen:
            continue
        try:
            part = in_fresh_process(measure, chosen, threads, options.seconds)
        except ProcessDied:
            print(f"error: the process that measured with {threads} thread(s) died", file=sys.stderr)
            return 1
        levels = ceiling.levels(part["ceilings"], about["caches"])
        result["ceilings"][str(threads)] = part["ceilings"] | {"read": levels}
        result["rows"] += part["rows"]
        about["versions"] |= part["versions"]
        save(result, output)  # what comes now takes minutes, and may not end well
    if whole:
        for case in MEMORY_CASES:
            result["memory"] += [in_fresh_process(measure_memory, case, name) for name in ("rnn_ext", "torch.nn")]

    shown = save(result, output)
    print(f"\n{table.markdown(shown)}")
    if output:
        console.print(f"written: {output} and {output.with_suffix('.md').name}")
    if published and not peers.held():
        import plot

        for path in plot.draw(shown, FOLDER / "plots"):
            console.print(f"drawn: {path}")
    return 1 if any("rnn_ext" in row["left_out"] for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(guarded(main))
