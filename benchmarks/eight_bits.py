"""Our layers with weights of 8 bits beside those in float32 and bfloat16, and what others have of 8 bits.

    taskset -c 0 python benchmarks/eight_bits.py

Forward, on one thread. Each time is the least processor time of interleaved repeats, of CALLS calls where one is short;
in brackets how far outputs are at most from float32's. Writes results/eight_bits.md.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import peers
import torch
from features import measure
from features import times as several
from torch import Tensor, nn

import rnn_ext
from rnn_ext._files import write
from rnn_ext._options import Parser, guarded, output_file, positive_number
from rnn_ext.bench import Case, Workload, machine

RESULTS = Path(__file__).parent / "results" / "eight_bits.md"
SHAPES = (  # N, L, H
    *((1, 1, 64), (1, 1, 512), (1, 100, 64), (1, 100, 128), (1, 100, 256), (1, 100, 512), (1, 50, 1024)),
    *((8, 100, 256), (32, 50, 512), (32, 20, 1024)),
)
OURS = ("8 bits, activations 16", "8 bits, activations 8", "float32", "bfloat16")
OTHERS = ("torch.nn, float32", "torch.nn, dynamic quantization", "ONNX Runtime, dynamic quantization")
CALLS, SHORT = 20, 2e-4  # seconds
Call = Callable[[], Tensor]


def contestants(work: Workload) -> dict[str, Call]:
    """Those there are of OURS and OTHERS, each a call that returns the output."""
    ours, theirs, x, kind = work.ours().eval(), work.torch.eval(), work.input, work.case.cell
    half, x_half = copy.deepcopy(ours).bfloat16(), x.bfloat16()
    layers = (*(rnn_ext.quantize(copy.deepcopy(ours), bits) for bits in (16, 8)), ours)
    found: dict[str, Call] = dict(zip(OURS, map(work.forward, layers), strict=False))
    found[OURS[3]] = lambda: half(x_half)[0]
    found[OTHERS[0]] = work.forward(theirs)
    if kind != "rnn":
        with warnings.catch_warnings():  # that it will be removed
            warnings.simplefilter("ignore")
            quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(copy.deepcopy(theirs)), {nn.GRU, nn.LSTM})
        found[OTHERS[1]] = lambda: quantized(x)[0]
    if kind == "lstm":
        with contextlib.suppress(ImportError):
            peer = peers.onnx_runtime_8_bits(work)
            found[OTHERS[2]] = functools.partial(_output, peer)
    return found


def _output(peer: peers.Contestant) -> Tensor:
    return peer.results(peer.run())["output"]


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=positive_number(), default=1, help="for each time")
    parser.add_argument("--output", type=output_file, default=RESULTS, help="(results/eight_bits.md)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = machine()
    names = (*OURS, *OTHERS)
    lines = [
        "# Weights of 8 bits",
        "",
        f"`python benchmarks/eight_bits.py`, forward on one thread, {about['processor']}, our kernels for "
        f"{about['instructions']}, torch {torch.__version__}, {about['date'][:10]}; milliseconds, least processor time "
        "of interleaved repeats, and how far outputs are at most from float32's.",
        "",
        f"| | {' | '.join(names)} |",
        f"|---|{'---:|' * len(names)}",
    ]
    for name, (N, L, H) in itertools.product(("RNN", "GRU", "LSTM"), SHAPES):
        with torch.no_grad():
            calls = contestants(Workload(Case(name.lower(), N, L, H, H)))
            exact = calls[OURS[2]]()
            off = {who: (call().float() - exact).abs().max().item() for who, call in calls.items()}
            count = CALLS if measure([calls[OURS[2]]], 0)[0] < SHORT else 1
            found = measure([several(call, count) for call in calls.values()], args.seconds)
            times = {who: seconds / count for who, seconds in zip(calls, found, strict=True)}
        cells = []
        for who in names:
            exactly = "" if "float32" in who else f" ({off.get(who, 0):.1g})"
            cells.append(f"{times[who] * 1e3:.4f}{exactly}" if who in times else "")
        lines.append(f"| {name}, N={N}, L={L}, H={H} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    write(args.output, "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(guarded(main))
