"""What this machine can do at best, measured, and the floor that follows for the time of a layer.

Measured on one core at its best moment (:func:`measure`), by ceilings.cpp where there is a C++ compiler and else, less
sharply, by torch's own kernels:

- ``flops``: multiply-adds from registers, two flops each; ``bfloat16_flops``: the same for products of bfloat16 summed
  in float32, where the processor has an instruction for them.
- ``widen``: seconds that a multiply-add of a number of 16 bits takes longer than one of float32, where the processor
  has no instruction for their product and widens the number first; by dtype.
- ``read``: bytes per second of reading an array over and over, by its size: the levels of the cache and memory. The
  better of two orders, round and round or back and forth.
- ``cells``: seconds per hidden unit and timestep of a cell alone, forward and backward, in float32 and in bfloat16,
  with the activations of csrc; by cells.cpp, and only where that can be compiled.
- ``call``: seconds that torch takes for a module that has next to nothing to compute: in inference for one that
  multiplies two numbers, in training for one that joins five, with the gradients of all five, which a layer has at
  least. It is what is left of a call when a layer costs nothing.

The clock of a core changes from minute to minute, and what others read takes from its share of the last level of cache.
So the call, the multiply-adds and the reads that a layer's floor consists of are also timed in turns with the layer, as
its peers are (:func:`beside`), and the medians stand in the place of ``call``, ``flops`` and ``read`` for its floor;
``cells``, which are computed in registers like the multiply-adds, are taken to be as much slower as these
(:func:`in_their_place`). With several threads all do that work at once, because cores that are all busy can be slower
than one of them alone: by their common clock and cache, or because what a virtual machine calls two cores is one.

The model of the floor. A timestep of one direction needs ``2 G H I`` flops for the input projection and ``2 G H H`` for
the recurrent product per sequence, its cell for ``H`` units, and has to read the recurrent weights, ``G H H`` values,
once, from the level of cache that they fit. Reading can go on while something else is computed:

    forward             = call + max(projection + recurrent flops / F + cells, timesteps * bytes of W_hh / B)
    forward + backward  = call + max(3 projection flops / F    forward, gradients of the input and of W_ih
                                     + 3 recurrent flops / F   forward, gradients of the states and of W_hh
                                     + cells both ways, 2 * timesteps * bytes of W_hh / B)

with F the ``flops`` and B the ``read`` above. Weights of 16 bits that the processor does not multiply as such are
either made float32 once, which is free here, and have as many bytes then, or widened in every timestep, for ``widen``
each: the floor is the lower of both. Of T threads each is given a T-th of everything. The traffic of inputs, outputs
and saved values, the wait of a timestep for the one before, and everything else around the loop are free: at small H
nobody can reach the floor. A layer whose weights partly stay in registers or in a faster cache than the model says can
pass it, and so could one with cheaper activations.

``in_turn`` is the time of a layer that has no activations and reads while it computes nothing else, which is how most
are built: first the projections of all timesteps as one product, bound by flops, then the recurrent ones, each bound by
flops or by bandwidth.
"""

from __future__ import annotations

import bisect
import ctypes
import functools
import itertools
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rnn_ext import _C, ops
from rnn_ext.bench import CELLS, Case

SOURCE = Path(__file__).with_name("ceilings.cpp")
CELL_SOURCE = SOURCE.with_name("cells.cpp")
CSRC = SOURCE.parents[1] / "csrc"
PAGE = 4096
# Calls of a multiply-add kernel, and bytes read: each a fraction of a millisecond; and where threads have to be started
# for it, several.
BURST, BURSTS = (128, 1 << 22), (512, 1 << 28)
SIZES = sorted([PAGE << k for k in range(16)] + [3 * PAGE << k for k in range(14)])  # 4 KiB to 128 MiB


class Floor(NamedTuple):
    seconds: float
    bound: str  # by which of call, flops, cells and bandwidth most
    in_turn: float  # seconds


# What setup.py and kernels_*.cpp say to the compiler, for cells.cpp; by instruction set and dtype. Not for
# ceilings.cpp, whose multiply-adds the compiler has to fuse.
AVX2, AVX512 = "-mavx2 -mfma", "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl"
CELL_FLAGS = {
    ("baseline", "float32"): (16, 32 if platform.machine() == "aarch64" else 16, ""),
    ("avx2", "float32"): (32, 16, AVX2),
    ("avx512", "float32"): (64, 32, AVX512),
    ("avx512", "bfloat16"): (64, 32, f"{AVX512} -mavx512bf16 -DRNN_EXT_BFLOAT16"),
    ("amx", "float32"): (64, 32, AVX512),
    ("amx", "bfloat16"): (64, 32, f"{AVX512} -mavx512bf16 -DRNN_EXT_BFLOAT16"),
}


def compiler() -> str:
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or "c++"


@functools.cache
def compile_source(command: str, source: Path, *flags: str) -> ctypes.CDLL | None:
    """A source file beside this one as a library, None where the compiler cannot make it."""
    always = ["-O3", "-std=c++20", "-shared", "-fPIC", "-pthread"]
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder) / source.with_suffix(".so").name)
        try:
            words = [*shlex.split(command), *always, *flags, str(source), "-o", library]
            subprocess.run(words, check=True, capture_output=True)
            return ctypes.CDLL(library)
        except (OSError, subprocess.CalledProcessError):
            return None


def compile_library() -> ctypes.CDLL | None:
    """ceilings.cpp."""
    loaded = compile_source(compiler(), SOURCE)
    if loaded is None:
        return None
    for rate in (loaded.fma_rate, loaded.bfloat16_rate):
        rate.restype, rate.argtypes = ctypes.c_double, [ctypes.c_double]
    loaded.widened_rate.restype, loaded.widened_rate.argtypes = ctypes.c_double, [ctypes.c_int, ctypes.c_double]
    often = [ctypes.c_int64, ctypes.c_int]
    loaded.multiply_add.restype, loaded.multiply_add.argtypes = ctypes.c_double, [ctypes.c_int, *often]
    array = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    loaded.read_rate.restype, loaded.read_rate.argtypes = ctypes.c_double, [*array, ctypes.c_double]
    loaded.read_array.restype, loaded.read_array.argtypes = None, [*array, *often]
    return loaded


def array_of(size: int) -> torch.Tensor:
    """Memory for so many bytes from a cache line on; written, as untouched pages are all the same one."""
    return torch.ones(size // 4 + 16)


def start_of(data: torch.Tensor) -> int:
    """Where the first whole cache line of it begins."""
    return -(-data.data_ptr() // 64) * 64


def measure_cells(seconds: float) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds of a cell for one hidden unit and timestep, by dtype, direction and cell, as far as they can be had."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for dtype in ("float32", "bfloat16") if _C.computes_bfloat16() else ("float32",):
        if (ops.cpu_capability(), dtype) not in CELL_FLAGS:
            continue
        vector_bytes, registers, target = CELL_FLAGS[ops.cpu_capability(), dtype]
        defines = [f"-DRNN_EXT_VECTOR_BYTES={vector_bytes}", f"-DRNN_EXT_VECTOR_REGISTERS={registers}"]
        flags = ["-ffp-contract=off", f"-I{CSRC}", *target.split(), *defines]
        library = compile_source(compiler(), CELL_SOURCE, *flags)
        if library is None:
            continue
        library.cell_rate.restype = ctypes.c_double
        library.cell_rate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_double]
        result[dtype] = {
            direction: {
                cell: 1 / library.cell_rate(number, backward, seconds / 12) for number, cell in enumerate(CELLS)
            }
            for backward, direction in enumerate(("forward", "backward"))
        }
    return result


def measure(seconds: float = 3.0, largest: int = SIZES[-1]) -> dict[str, Any]:
    """The ceilings of the core that this runs on, in about so many seconds, for arrays of up to `largest` bytes."""
    sizes = [size for size in SIZES if size <= largest]
    each = seconds / (2 * len(sizes) + 8)
    call = {mode: call_seconds(mode == "training", each) for mode in ("forward", "training")}
    data = array_of(sizes[-1])
    start = start_of(data)
    library = compile_library()
    if library is None:
        return {**_measure_with_torch(sizes, each, data), "call": call}
    flops = library.fma_rate(2 * each)
    widened = {dtype: library.widened_rate(number, each) for number, dtype in enumerate(("bfloat16", "float16"))}
    return {
        "method": SOURCE.name,
        "flops": flops,
        "bfloat16_flops": library.bfloat16_rate(2 * each),
        "widen": {dtype: max(0.0, 2 / rate - 2 / flops) for dtype, rate in widened.items() if rate},
        "read": {size: max(library.read_rate(start, size, order, each) for order in (0, 1)) for size in sizes},
        "cells": measure_cells(2 * each),
        "call": call,
    }


class Beside(NamedTuple):
    """Work to be timed in turns with a layer."""

    ceiling: str  # whose rate it is
    amount: float  # flops or bytes of a call, of each thread
    run: Callable[[], object]


def beside(case: Case, training: bool, threads: int = 1) -> dict[str, Beside]:
    """What the floor of a layer consists of, by names for its turns; without a compiler only the call.

    Multiply-adds of the layer's kind, and reads of as many bytes as its recurrent weights have, of which each thread
    has its part; all threads at once; of both orders the better counts.
    """
    call = {"call": Beside("call", 1, one_call(training))}
    library = compile_library()
    if library is None:
        return call
    half = case.dtype == "bfloat16" and library.multiply_add(1, 1, 1) > 0
    size = max(1, round(weight_bytes(case) / threads / PAGE)) * PAGE
    data = array_of(size * threads)
    calls, amount = BURST if threads == 1 else BURSTS
    times = 2 * max(1, amount // size // 2)  # even: back and forth ends where it began

    def multiply() -> float:
        return library.multiply_add(half, calls, threads)

    def read(order: int) -> None:
        library.read_array(start_of(data), size, order, times, threads)

    return {
        **call,
        "multiply-adds": Beside("bfloat16_flops" if half else "flops", multiply(), multiply),
        "reads": Beside("read", times * size, lambda: read(0)),
        "reads back and forth": Beside("read", times * size, lambda: read(1)),
    }


def rates(work: dict[str, Beside], seconds: dict[str, float]) -> dict[str, float]:
    """What the times of :func:`beside` say, by ceiling: flops or bytes per second, and the seconds of a call."""
    found: dict[str, float] = {}
    for name, one in work.items():
        if one.ceiling == "call":
            found["call"] = seconds[name]
        else:
            found[one.ceiling] = max(found.get(one.ceiling, 0), one.amount / seconds[name])
    return found


def in_their_place(ceilings: dict[str, Any], rates: dict[str, float]) -> dict[str, Any]:
    """The ceilings for one layer: those that :func:`rates` found, the others as :func:`measure` did."""
    slower = 1.0
    for kind in {"flops", "bfloat16_flops"} & rates.keys():
        slower = ceilings[kind] / rates[kind]
    cells = {
        dtype: {
            direction: {cell: took * slower for cell, took in cells.items()} for direction, cells in directions.items()
        }
        for dtype, directions in ceilings["cells"].items()
    }
    return {**ceilings, "cells": cells, **rates}


class Multiplied(torch.nn.Module):
    """The shortest call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(self.bias, input, self.weight)


class Joined(torch.nn.Module):
    """The shortest call with the gradients of as many tensors as a layer has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh = (
            torch.nn.Parameter(torch.ones(1)) for _ in range(4)
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.cat((input, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh))


def one_call(training: bool) -> Callable[[], object]:
    """What ``call`` is the time of."""
    if not training:
        module, number = Multiplied(), torch.ones(1)
        return lambda: module(number)
    joined, input, grad = Joined(), torch.ones(1, requires_grad=True), torch.ones(5)
    tensors = (input, *joined.parameters())
    return lambda: torch.autograd.grad(joined(input), tensors, grad)


def call_seconds(training: bool, seconds: float) -> float:
    """The shortest of them."""
    call = one_call(training)
    best, end = float("inf"), 0.0
    with torch.inference_mode(not training):
        for count in itertools.count():
            start = time.perf_counter()
            call()
            now = time.perf_counter()
            best = min(best, now - start)
            if count == 0:  # which starts autograd's threads
                end = now + seconds
            elif count >= 100 and now > end:
                return best
    raise AssertionError


def _measure_with_torch(sizes: list[int], each: float, data: torch.Tensor) -> dict[str, Any]:
    def rate(amount: float, work: Any) -> float:
        best, end = 0.0, time.perf_counter() + each
        while not best or time.perf_counter() < end:
            start = time.perf_counter()
            work()
            best = max(best, amount / (time.perf_counter() - start))
        return best

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        n = 768
        a, b, out = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
        flops = rate(2 * n**3, lambda: torch.mm(a, b, out=out))
        read = {size: rate(size, data[: size // 4].sum) for size in sizes if size >= 2**16}
    finally:
        torch.set_num_threads(threads)
    return {"method": "torch", "flops": flops, "bfloat16_flops": 0.0, "widen": {}, "read": read, "cells": {}}


def better(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Of two measurements by the same method, the better of each."""
    return {
        "method": a["method"],
        "flops": max(a["flops"], b["flops"]),
        "bfloat16_flops": max(a["bfloat16_flops"], b["bfloat16_flops"]),
        "widen": {dtype: min(took, b["widen"][dtype]) for dtype, took in a["widen"].items()},
        "read": {size: max(a["read"][size], b["read"][size]) for size in a["read"]},
        "cells": {
            dtype: {
                direction: {cell: min(took, b["cells"][dtype][direction][cell]) for cell, took in cells.items()}
                for direction, cells in directions.items()
            }
            for dtype, directions in a["cells"].items()
        },
        "call": {mode: min(a["call"][mode], b["call"][mode]) for mode in a["call"]},
    }


def weight_bytes(case: Case) -> int:
    """Of the recurrent weights of one direction of a layer."""
    return case.gates * case.hidden_size**2 * case.torch_dtype.itemsize


def read_rate(ceilings: dict[str, Any], size: float) -> float:
    """Bytes per second for an array of so many bytes, between the sizes measured along the logarithm of the size."""
    if not isinstance(ceilings["read"], dict):  # of this size, out of `rates`
        return ceilings["read"]
    read = sorted((int(at), rate) for at, rate in ceilings["read"].items())  # JSON makes strings of the sizes
    sizes = [at for at, _ in read]
    place = bisect.bisect_left(sizes, size)
    if place == 0 or place == len(sizes):
        return read[min(place, len(sizes) - 1)][1]
    (low, slow), (high, fast) = read[place - 1], read[place]
    along = math.log(size / low) / math.log(high / low)
    return slow + along * (fast - slow)


def levels(ceilings: dict[str, Any], caches: dict[str, int]) -> dict[str, float]:
    """The rates of the levels of the cache, each read at half its size (so that it fits), and of memory."""
    result = {name: read_rate(ceilings, size / 2) for name, size in caches.items()}
    largest = max(int(size) for size in ceilings["read"])
    if largest > 2 * max(caches.values(), default=0):
        result["memory"] = read_rate(ceilings, largest)
    return result


def floor(case: Case, training: bool, ceilings: dict[str, Any], threads: int = 1) -> Floor:
    """The shortest time that the model in the module's docstring allows."""
    size = weight_bytes(case)
    half = case.dtype == "bfloat16" and ceilings["bfloat16_flops"] > 0
    ways = [(size, 0.0)]  # bytes of the recurrent weights, and seconds to widen them
    if case.torch_dtype.itemsize == 2 and not half:
        ways = [(2 * size, 0.0)]
        if case.dtype in ceilings["widen"]:
            ways.append((size, ceilings["widen"][case.dtype] * size / 2))
    return min(_floor(case, training, ceilings, threads, half, *way) for way in ways)


def _floor(
    case: Case, training: bool, ceilings: dict[str, Any], threads: int, half: bool, weights: int, widen: float
) -> Floor:
    """By one way to treat the recurrent weights; ``half``: products are of bfloat16."""
    flops = ceilings["bfloat16_flops"] if half else ceilings["flops"] / (2 if case.dtype == "float64" else 1)
    flops *= threads
    alive = case.batch_sizes
    width = case.gates * case.hidden_size
    part = weights / threads  # all threads read theirs at the same time
    reading = part / read_rate(ceilings, part)
    # Of float64 an activation costs at least what two vectors of float32 do.
    per_unit = ceilings["cells"].get("bfloat16" if half else "float32", {})
    passes = ("forward", "backward") if training else ("forward",)
    cell = sum(per_unit[way][case.cell] for way in passes if per_unit) * (2 if case.dtype == "float64" else 1)
    products = [2 * rows * width * case.hidden_size / flops for rows in alive]
    widen /= threads
    of_flops = of_cells = of_reading = in_turn = 0.0
    for layer in range(case.num_layers):
        inputs = case.input_size if layer == 0 else case.directions * case.hidden_size
        projection = 2 * sum(alive) * width * inputs / flops
        of_flops += case.directions * (projection + sum(products)) * (3 if training else 1)
        of_flops += case.directions * len(alive) * widen * len(passes)
        of_cells += case.directions * sum(alive) * case.hidden_size * cell / threads
        of_reading += case.directions * len(alive) * reading * len(passes)
        scan = sum(max(product + widen, reading) for product in products)
        in_turn += case.directions * (projection * (3 if training else 1) + scan * len(passes))
        in_turn += case.directions * sum(products) * (1 if training else 0)
    call = ceilings["call"]
    if isinstance(call, dict):
        call = call["training" if training else "forward"]
    work = {"flops": of_flops, "cells": of_cells}
    if of_reading > of_flops + of_cells:
        work = {"bandwidth": of_reading}
    shares = {"call": call, **work}
    return Floor(sum(shares.values()), max(shares, key=shares.__getitem__), call + in_turn)
