"""One layer call: its inputs, the reference's answer in float64, and what the emulated kernels answer."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rnn_ext import reference
from tests.cuda_emulator import build

CELLS = tuple(reference.CELLS)  # in the order of csrc/cells/list.h
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # the numbers of RnnExtDtype
SAVED = {"rnn_tanh": 0, "rnn_relu": 0, "gru": 4, "lstm": 4}  # S and Q of launch.h
SAVED_MASKED = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 4, "lstm": 5}
NORM_SAVED, NORM_GRAD_GATES, NORM_GRAD_GATE, NORM_STATISTICS, NORM_SCRATCH = 8, 14, 8, 4, 7
GRAD_GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 4, "lstm": 4}
KERNELS = ("step", "pointwise", "persistent", "tensor", "cluster", "grid")

# Relative to the largest value of an array (at least 1). The kernels round h (and, backward, the saved gates and the
# gate gradients) to the storage type at every timestep: some roundings of 2^-9 or 2^-12 add up over a sequence.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# float32 in these kernels: the two factors of each product are rounded to TF32, by 2^-11 each, and nothing else is. A
# sum of such products with random signs is off by far less, and a cell damps what it gets from the timestep before.
TF32_KERNELS = ("tensor", "cluster")
TF32_TOLERANCE = 2 * 2**-11


class KernelReportError(RuntimeError):
    """The emulator or a sanitizer reported a mistake in a kernel, or the launcher refused."""


@dataclass(frozen=True)
class Case:
    """What to run. `lengths` are padded lengths, or with `packed` those of a packed batch, in non-increasing order."""

    cell: str
    kernel: str = "step"
    dtype: torch.dtype = torch.float32
    length: int = 5
    batch: int = 3
    hidden: int = 7
    lengths: tuple[int, ...] | None = None
    packed: bool = False
    batch_first: bool = False
    resets: float = 0.0
    reverse: bool = False
    bidirectional: bool = False
    backward: bool = False
    initial: bool = True
    bias: bool = True
    training: bool = True  # keep what backward needs
    layer_norm: bool = False
    zoneout: float = 0.0
    recurrent_dropout: float = 0.0
    units: int = 0  # of a block of `grid`; 0: as the launcher likes
    seed: int = 0

    @property
    def directions(self) -> list[bool]:
        """Of each direction, whether it runs in reverse."""
        return [False, True] if self.bidirectional else [self.reverse]

    @property
    def variant(self) -> int:
        """The number of its RnnExtVariant."""
        return 2 if self.layer_norm else 1 if self.zoneout or self.recurrent_dropout else 0

    @property
    def grad_gates(self) -> int:
        return NORM_GRAD_GATES if self.layer_norm else GRAD_GATES[self.cell]

    @property
    def saved(self) -> int:
        return NORM_SAVED if self.layer_norm else (SAVED_MASKED if self.variant else SAVED)[self.cell]


@dataclass
class Inputs:
    """Everything a call reads, already rounded to the dtype, in float64. Rows are dense (L, N) whatever the layout."""

    igates: Tensor  # (L, N, D * G * H)
    weight_hh: list[Tensor]  # of each direction, (G * H, H)
    bias_hh: list[Tensor] | None
    h_0: list[Tensor] | None
    c_0: list[Tensor] | None
    resets: Tensor | None  # (L, N) bool
    active: Tensor  # (L, N) bool
    doutput: Tensor  # (L, N, D * H), and so on: the gradients that flow in
    dcells: Tensor
    dh_n: list[Tensor]
    dc_n: list[Tensor]
    hidden_mask: list[Tensor] | None  # of each direction, (N, H)
    zoneout: Tensor | None  # (L, N, D * H), of h and of c alike
    norm: list[list[Tensor]] | None  # of each direction: the scales of both products (G * H), of c (H), the shift of c


def make_inputs(case: Case) -> Inputs:
    """Random inputs of a case, the same for the same seed."""
    generator = torch.Generator().manual_seed(case.seed)
    gates = reference.CELLS[case.cell].gates
    length, batch, hidden, count = case.length, case.batch, case.hidden, len(case.directions)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        values = (torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1) * scale
        return values.to(case.dtype).double()

    def each(*shape: int, scale: float = 1.0) -> list[Tensor]:
        return [draw(*shape, scale=scale) for _ in range(count)]

    igates = draw(length, batch, count * gates * hidden)
    relu = case.cell == "rnn_relu"
    if relu:  # stay away from the kink: there a rounding changes a gradient altogether
        igates = (igates + igates.sign()).to(case.dtype).double()
    lengths = torch.tensor(case.lengths) if case.lengths is not None else None
    resets = torch.rand(length, batch, generator=generator) < case.resets if case.resets > 0 else None

    def ones(p: float, *shape: int) -> Tensor:
        return (torch.rand(*shape, generator=masks) < p).double()

    def mask() -> Tensor:
        return (ones(1 - case.recurrent_dropout, batch, hidden) / (1 - case.recurrent_dropout)).float().double()

    masks = torch.Generator().manual_seed(case.seed + 1)
    every = torch.full((batch,), length)
    norm_sizes = (gates * hidden, gates * hidden, hidden, hidden)
    return Inputs(
        hidden_mask=[mask() for _ in range(count)] if case.recurrent_dropout else None,
        zoneout=ones(case.zoneout, length, batch, count * hidden) if case.zoneout else None,
        norm=[[draw(size) for size in norm_sizes] for _ in range(count)] if case.layer_norm else None,
        igates=igates,
        weight_hh=each(gates * hidden, hidden, scale=hidden**-0.5 / (4 if relu else 1)),
        bias_hh=each(gates * hidden, scale=0.25) if case.bias else None,
        h_0=each(batch, hidden) if case.initial else None,
        c_0=each(batch, hidden) if case.initial else None,
        resets=resets,
        active=reference.active_mask(length, every if lengths is None else lengths, torch.device("cpu")),
        doutput=draw(length, batch, count * hidden),
        dcells=draw(length, batch, count * hidden),
        dh_n=each(batch, hidden),
        dc_n=each(batch, hidden),
    )


def expected(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """The reference's answer in float64, named like the kernels' arrays (`dgates`: those of the input side)."""
    gates = reference.CELLS[case.cell].gates
    has_cell = reference.CELLS[case.cell].has_cell_state
    answer: dict[str, Tensor] = {}
    outputs = []
    for d, reverse in enumerate(case.directions):
        width = gates * case.hidden
        igates = inputs.igates[..., d * width : (d + 1) * width].clone().requires_grad_()
        zeros = torch.zeros(case.batch, case.hidden, dtype=torch.float64)
        state = [(inputs.h_0[d] if inputs.h_0 else zeros).clone().requires_grad_()]
        if has_cell:
            state.append((inputs.c_0[d] if inputs.c_0 else zeros).clone().requires_grad_())
        bias = inputs.bias_hh[d] if inputs.bias_hh else torch.zeros(width, dtype=torch.float64)
        bias = bias.clone().requires_grad_()
        identity = torch.eye(width, dtype=torch.float64)
        norm = inputs.norm[d] if inputs.norm else []
        weights = reference.LayerWeights(identity, inputs.weight_hh[d], torch.zeros_like(bias), bias, None, *norm)
        keep = None if inputs.zoneout is None else inputs.zoneout.chunk(len(case.directions), -1)[d]
        masks = reference.Masks(inputs.hidden_mask[d] if inputs.hidden_mask else None, keep, keep)
        output, final, cells = reference.scan(
            case.cell, igates, tuple(state), weights, inputs.active, inputs.resets, reverse, masks
        )
        outputs.append(output)
        answer[f"h_n{d}"] = final[0].detach()
        if has_cell:
            answer[f"c_n{d}"] = final[1].detach()
        if not case.backward:
            continue
        share = slice(d * case.hidden, (d + 1) * case.hidden)
        total = (output * inputs.doutput[..., share]).sum() + (final[0] * inputs.dh_n[d]).sum()
        if has_cell:
            total = total + (cells * inputs.dcells[..., share]).sum() + (final[1] * inputs.dc_n[d]).sum()
        grads = torch.autograd.grad(total, [igates, bias, *state], allow_unused=True, materialize_grads=True)
        names = [f"dgates{d}", f"dbias_hh{d}", f"dh_0{d}", f"dc_0{d}"]
        answer.update(zip(names, grads, strict=False))
    answer["output"] = torch.cat(outputs, -1).detach()
    return answer


def _to_rows(case: Case, active: Tensor, dense: Tensor) -> Tensor:
    """(L, N, F) as the rows of the case's layout."""
    if case.packed:
        return dense[active]
    return (dense.transpose(0, 1) if case.batch_first else dense).reshape(-1, dense.shape[-1])


def _from_rows(case: Case, active: Tensor, rows: Tensor) -> Tensor:
    if case.packed:
        dense = rows.new_zeros(case.length, case.batch, rows.shape[-1])
        dense[active] = rows
        return dense
    if case.batch_first:
        return rows.reshape(case.batch, case.length, -1).transpose(0, 1)
    return rows.reshape(case.length, case.batch, -1)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def request(case: Case, inputs: Inputs) -> bytes:
    """The driver's request file (see driver.cpp)."""
    cell, hidden, batch = case.cell, case.hidden, case.batch
    gates, has_cell = reference.CELLS[cell].gates, reference.CELLS[cell].has_cell_state
    count = len(case.directions)
    accumulator = torch.float64 if case.dtype == torch.float64 else torch.float32
    rows = int(inputs.active.sum()) if case.packed else case.length * batch
    words = {
        "kernel": case.kernel,
        "cell": CELLS.index(cell),
        "dtype": DTYPES.index(case.dtype),
        "length": case.length,
        "batch": batch,
        "hidden": hidden,
        "directions": count,
        "units": case.units,
        "backward": int(case.backward),
        "time_stride": 1 if case.batch_first else batch,
        "batch_stride": case.length if case.batch_first else 1,
        "igates_stride": count * gates * hidden,
        "output_stride": count * hidden,
        "dgates_stride": case.grad_gates * hidden,
        "variant": case.variant,
    }
    arrays: dict[str, Tensor] = {}
    blanks: dict[str, tuple[int, torch.dtype]] = {"output": (rows * count * hidden, case.dtype)}

    def put(name: str, tensor: Tensor) -> None:
        arrays[name] = tensor.to(case.dtype)

    put("igates", _to_rows(case, inputs.active, inputs.igates))
    if inputs.zoneout is not None:
        keep = _to_rows(case, inputs.active, inputs.zoneout).to(accumulator)
        arrays.update({"zoneout_h": keep, "zoneout_c": keep})
    if case.packed:
        sizes = inputs.active.sum(1)
        arrays["batch_sizes"] = sizes
        arrays["row_offsets"] = sizes.cumsum(0) - sizes
    if case.lengths is not None:
        arrays["lengths"] = torch.tensor(case.lengths, dtype=torch.int64)
    if inputs.resets is not None:
        arrays["resets"] = inputs.resets.to(torch.uint8)
    if case.backward:
        put("doutput", _to_rows(case, inputs.active, inputs.doutput))
        if has_cell:
            put("dcells", _to_rows(case, inputs.active, inputs.dcells))
    for d, reverse in enumerate(case.directions):
        words[f"reverse{d}"] = int(reverse)
        if inputs.hidden_mask:
            arrays[f"hidden_mask{d}"] = inputs.hidden_mask[d].to(accumulator)
            if case.kernel == "pointwise":  # what the kernel then keeps up to date
                put(f"h_masked{d}", inputs.hidden_mask[d] * (inputs.h_0[d] if inputs.h_0 else 0))
        if inputs.norm:
            for name, tensor in zip(reference.LayerWeights._fields[5:], inputs.norm[d], strict=True):
                put(f"{name}{d}", tensor)
            blanks[f"scratch{d}"] = (batch * NORM_SCRATCH * hidden, accumulator)
            if case.training or case.backward:
                blanks[f"statistics{d}"] = (rows * NORM_STATISTICS, accumulator)
        put(f"weight_hh{d}", inputs.weight_hh[d])
        if inputs.bias_hh:
            put(f"bias_hh{d}", inputs.bias_hh[d])
        if inputs.h_0:
            put(f"h_0{d}", inputs.h_0[d])
        if inputs.c_0 and has_cell:
            put(f"c_0{d}", inputs.c_0[d])
        blanks[f"h_n{d}"] = (batch * hidden, case.dtype)
        if has_cell:
            blanks[f"c_n{d}"] = (batch * hidden, case.dtype)
            saves_cells = case.training or case.backward
            blanks[f"cells{d}" if saves_cells else f"cell_state{d}"] = (
                (rows if saves_cells else batch) * hidden,
                accumulator,
            )
        if case.saved and (case.training or case.backward):
            blanks[f"saved{d}"] = (rows * case.saved * hidden, case.dtype)
        if case.backward:
            put(f"dh_n{d}", inputs.dh_n[d])
            blanks[f"dgates{d}"] = (rows * case.grad_gates * hidden, case.dtype)
            blanks[f"dh_0{d}"] = (batch * hidden, case.dtype)
            if cell == "gru" or case.variant:
                blanks[f"dh_carry{d}"] = (batch * hidden, accumulator)
            if has_cell:
                put(f"dc_n{d}", inputs.dc_n[d])
                blanks[f"dc_0{d}"] = (batch * hidden, case.dtype)
                blanks[f"dc_carry{d}"] = (batch * hidden, accumulator)
    parts = [" ".join(f"{key}={value}" for key, value in words.items()).encode() + b"\n"]
    for name, tensor in arrays.items():
        data = _bytes(tensor)
        parts.append(f"{name} {len(data)}\n".encode() + data)
    for name, (numbers, dtype) in blanks.items():
        parts.append(f"{name}? {numbers * torch.empty(0, dtype=dtype).element_size()}\n".encode())
    return b"".join(parts)


def _parse(response: bytes) -> dict[str, bytes]:
    arrays, at = {}, 0
    while at < len(response):
        end = response.index(b"\n", at)
        name, size = response[at:end].decode().split()
        arrays[name] = response[end + 1 : end + 1 + int(size)]
        at = end + 1 + int(size)
    return arrays


def run_program(
    program: Path, flavour: str, data: bytes, schedule: int = 0, arch: int = 90, seed: int = 1, timeout: float = 120
) -> dict[str, bytes]:
    """Hand a request to a driver.

    Raises:
        KernelReportError: with the first lines of the report.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "request"), Path(folder, "response")
        asked.write_bytes(data)
        # TSan can only compare blocks that are there at the same time.
        resident = 1 << 20 if flavour == "tsan" else None
        try:
            result = subprocess.run(
                [*build.command_line(program, flavour), str(asked), str(answered)],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
                env=build.environment(schedule, arch, seed, resident),
            )
        except subprocess.TimeoutExpired:
            raise KernelReportError(f"no end after {timeout:.0f} s") from None
        if result.returncode:
            lines = [line for line in result.stderr.splitlines() if re.search(r"[^\s=]", line)]
            raise KernelReportError("\n".join(lines[:12]) or f"the program ended with {result.returncode}")
        return _parse(answered.read_bytes())


def errors(
    case: Case,
    flavour: str = "plain",
    compiler: str = "g++",
    schedule: int = 0,
    arch: int = 90,
    program: Path | None = None,
    timeout: float = 120,
) -> dict[str, float]:
    """Run a case and compare: the largest error of each array, relative to its largest value (at least 1).

    Raises:
        KernelReportError: if the emulator or a sanitizer has something to report.
    """
    inputs = make_inputs(case)
    want = expected(case, inputs)
    data = request(case, inputs)
    raw = run_program(program or build.driver(flavour, compiler), flavour, data, schedule, arch, timeout=timeout)

    def tensor(name: str, columns: int) -> Tensor:
        return torch.frombuffer(bytearray(raw[name]), dtype=case.dtype).double().reshape(-1, columns)

    gates, hidden = reference.CELLS[case.cell].gates, case.hidden
    result = {}
    for name, target in want.items():
        if name.startswith("dbias_hh"):  # the hidden side of the gate gradients, summed over rows
            first = NORM_GRAD_GATE if case.layer_norm else 0
            slots = [0, 1, 3] if case.cell == "gru" else list(range(first, first + gates))
            every = tensor(f"dgates{name[-1]}", case.grad_gates * hidden).reshape(-1, case.grad_gates, hidden)
            got = every[:, slots].sum(0).flatten()
        elif name.startswith("dgates"):
            rows = tensor(name, case.grad_gates * hidden)[:, : gates * hidden]
            got = _from_rows(case, inputs.active, rows)
        elif name == "output":
            got = _from_rows(case, inputs.active, tensor(name, len(case.directions) * hidden))
        else:
            got = tensor(name, hidden)
        difference = (got - target).abs().max().item()
        worst = difference / max(1.0, target.abs().max().item())
        result[name] = worst if worst == worst else float("inf")
    return result


def tolerance(case: Case, name: str) -> float:
    """What an array may differ by. A sum over rows adds their errors up."""
    scale = (case.length * case.batch) ** 0.5 if name.startswith("dbias_hh") else 1.0
    tf32 = case.kernel in TF32_KERNELS and case.dtype == torch.float32
    return (TF32_TOLERANCE if tf32 else TOLERANCE[case.dtype]) * max(1.0, scale)


def failures(case: Case, found: dict[str, float]) -> dict[str, float]:
    """The errors that are past tolerance."""
    return {name: error for name, error in found.items() if not error <= tolerance(case, name)}
