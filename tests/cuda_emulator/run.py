"""Runs one shape through the CUDA kernels in the emulator and compares with the float64 reference.

    python -m tests.cuda_emulator.run --cell lstm --kernel step --dtype float32 --length 5 --hidden 33 --backward

Prints the largest error of every array; exits with 1 when one is past the dtype's tolerance or a report was made.
"""

from __future__ import annotations

import argparse
import sys

import torch

from tests.cuda_emulator import build
from tests.cuda_emulator.case import CELLS, DTYPES, KERNELS, Case, KernelReportError, errors, failures, tolerance


def main(argv: list[str] | None = None) -> int:
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    parser = argparse.ArgumentParser(prog="python -m tests.cuda_emulator.run", description=__doc__.split("\n")[0])
    parser.add_argument("--cell", choices=CELLS, default="lstm")
    parser.add_argument("--kernel", choices=KERNELS, default="step")
    parser.add_argument("--dtype", choices=names, default="float32")
    parser.add_argument("--length", type=int, default=5, metavar="L")
    parser.add_argument("--batch", type=int, default=3, metavar="N")
    parser.add_argument("--hidden", type=int, default=33, metavar="H")
    parser.add_argument("--lengths", metavar="7,1,4", help="one length per sequence (then N and L are theirs)")
    parser.add_argument("--packed", action="store_true", help="packed rows; lengths are sorted")
    parser.add_argument("--batch-first", action="store_true")
    parser.add_argument("--resets", type=float, default=0.0, metavar="P", help="a sequence begins with probability P")
    parser.add_argument("--reverse", action="store_true")
    parser.add_argument("--bidirectional", action="store_true")
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--inference", action="store_true", help="save nothing for backward")
    parser.add_argument("--no-initial", action="store_true", help="start from zeros, given as null")
    parser.add_argument("--no-bias", action="store_true")
    parser.add_argument("--layer-norm", action="store_true", help="lstm with --kernel pointwise")
    parser.add_argument("--zoneout", type=float, default=0.0, metavar="P", help="of h and c alike")
    parser.add_argument("--recurrent-dropout", type=float, default=0.0, metavar="P")
    parser.add_argument("--units", type=int, default=0, metavar="U", help="hidden units of a block of grid")
    parser.add_argument("--arch", type=int, choices=(80, 90), default=90)
    parser.add_argument("--schedule", type=int, choices=(0, 1, 2), default=0, help="ascending, descending, random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flavour", choices=build.FLAVOURS, default="plain")
    parser.add_argument("--compiler", choices=("g++", "clang++"), default="g++")
    args = parser.parse_args(argv)

    lengths = tuple(int(part) for part in args.lengths.split(",")) if args.lengths else None
    if args.packed:
        lengths = tuple(sorted(lengths or (args.length,) * args.batch, reverse=True))
    case = Case(
        cell=args.cell,
        kernel=args.kernel,
        dtype=getattr(torch, args.dtype),
        length=max(lengths) if lengths else args.length,
        batch=len(lengths) if lengths else args.batch,
        hidden=args.hidden,
        lengths=lengths,
        packed=args.packed,
        batch_first=args.batch_first,
        resets=args.resets,
        reverse=args.reverse,
        bidirectional=args.bidirectional,
        backward=args.backward,
        initial=not args.no_initial,
        bias=not args.no_bias,
        training=not args.inference,
        layer_norm=args.layer_norm,
        zoneout=args.zoneout,
        recurrent_dropout=args.recurrent_dropout,
        units=args.units,
        seed=args.seed,
    )
    try:
        found = errors(case, args.flavour, args.compiler, args.schedule, args.arch)
    except KernelReportError as report:
        print(report)
        return 1
    wrong = failures(case, found)
    for name, error in found.items():
        print(f"{name:10} {error:9.2e}  {'PAST ' if name in wrong else 'within '}{tolerance(case, name):.0e}")
    print(f"largest error {max(found.values()):.2e}: {'FAILED' if wrong else 'ok'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
