"""The CUDA kernels on a GPU: `pytest -m cuda`, the first part of `make gpu`.

With RNN_EXT_TEST_DEVICE=cpu the same tests run their smaller sizes over the emulator, so that a GPU finds no mistake in
the tests themselves; what asks for streams, graphs and the like is then left out (tests/test_gpu_gate.py does this).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_sequence

import rnn_ext
from rnn_ext import ops
from tests import util
from tests.cuda_emulator.case import TF32_KERNELS, TF32_TOLERANCE
from tests.util import CELLS, Case

DEVICE = os.environ.get("RNN_EXT_TEST_DEVICE", "cuda")
EMULATED = DEVICE == "cpu"
CUDA = not EMULATED and torch.cuda.is_available()
KERNELS = ("step", "pointwise", "persistent", "grid")
TENSOR = "tensor"  # float32 in TF32
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
VALUES = {**util.VALUE_TOLERANCE, torch.float32: 5e-6, torch.bfloat16: 3e-2, torch.float16: 6e-3}
GRADIENTS = {**util.GRAD_TOLERANCE, torch.float32: 3e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}

pytestmark = pytest.mark.cuda
if not (CUDA or EMULATED):  # one line of the report, not one for each of more than a thousand tests
    pytest.skip("every test of this file needs a CUDA device", allow_module_level=True)
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def _full_precision():
    """Not by monkeypatch, which restores what stands in an object's __dict__: these settings do not."""
    matmul = torch.backends.cuda.matmul
    flags = [(matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32")]
    flags += [(matmul, f"allow_{name}_reduced_precision_reduction") for name in ("bf16", "fp16")]
    before = [getattr(*flag) for flag in flags] if CUDA else []
    for owner, name in flags[: len(before)]:
        setattr(owner, name, False)
    yield
    for (owner, name), value in zip(flags, before, strict=False):
        setattr(owner, name, value)


@contextlib.contextmanager
def kernels(kernel: str | None = None) -> Iterator[None]:
    """Layers on DEVICE run this CUDA kernel, or the dispatch table's."""
    if EMULATED:
        from tests.cuda_emulator.torch_layer import emulated

        with emulated(kernel):
            yield
        return
    ops.force_cuda_kernel(kernel)
    try:
        yield
    finally:
        ops.force_cuda_kernel(None)


def fits(kernel: str | None, cell: str, dtype: torch.dtype, hidden: int) -> bool:
    """Whether such a kernel can run it here."""
    if kernel == "cluster":
        clusters = not CUDA or torch.cuda.get_device_capability() >= (9, 0)
        tf32_ends_early = dtype == torch.float32 and cell in ("gru", "lstm")
        return clusters and dtype != torch.float64 and hidden <= (384 if tf32_ends_early else 512)
    if kernel == TENSOR:
        if dtype == torch.float32:
            return hidden <= 64
        return dtype.itemsize == 2 and hidden <= 128
    if kernel not in ("persistent", "grid"):
        return True
    if dtype == torch.float64 or (kernel == "persistent" and hidden > 128):
        return False
    weight = {"lstm": 4, "gru": 3}.get(cell, 1) * hidden * hidden * dtype.itemsize
    # Far enough from the limits, which dispatch.h knows and tests/test_cuda_emulator.py tests.
    if kernel == "persistent":
        return weight < 140 * 1024
    device = torch.cuda.get_device_properties(DEVICE) if CUDA else None
    return device is None or 3 * weight < device.multi_processor_count * device.shared_memory_per_block_optin


# How the kernels say that a GPU has too little for a layer, which depends on the GPU; of no layer of so few units.
TOO_LARGE = r"bytes of shared memory|cannot hold one of them|this GPU has no thread-block clusters"
FITS_ANY = 65


@contextlib.contextmanager
def unless_too_large(hidden: int) -> Iterator[None]:
    """Skips a test whose layer this GPU cannot hold."""
    try:
        yield
    except RuntimeError as error:
        if hidden <= FITS_ANY or not re.search(TOO_LARGE, str(error)):
            raise
        pytest.skip(str(error).splitlines()[0])


def to_device(problem: util.Problem) -> util.Problem:
    """The masks move too; batch_sizes stay on the CPU, as torch has them."""
    moved = problem.map(lambda t: t.to(DEVICE))
    for name in ("lengths", "resets"):
        mask = getattr(problem, name)
        setattr(moved, name, None if mask is None else mask.to(DEVICE))
    return moved


def agree(case: Case, dtype: torch.dtype, kernel: str | None, options: str = "") -> None:
    """`options`: those of util.COMBINED."""
    problem, masks = util.sample(case, options, dtype) if options else (util.build(case, dtype), [])
    there, masks_there = to_device(problem), [m if m is None else m.to(DEVICE) for m in masks]

    def run(problem: util.Problem) -> dict[str, torch.Tensor]:
        return util.run(problem, masks=masks_there)

    with kernels(kernel):
        grad_of = util.cotangents({name: t.cpu() for name, t in run(there).items()})
        actual, grads = util.gradients(run, there, {name: grad.to(DEVICE) for name, grad in grad_of.items()})
    double = {name: grad.double() for name, grad in grad_of.items()}
    expected, expected_grads = util.gradients(lambda p: util.oracle(p, masks), problem.to(torch.float64), double)
    tf32 = kernel in TF32_KERNELS and dtype == torch.float32
    assert all(t.dtype == dtype and t.device.type == DEVICE for t in (*actual.values(), *grads.values()))
    util.check(
        {name: t.cpu() for name, t in actual.items()},
        expected,
        TF32_TOLERANCE if tf32 else VALUES[dtype],
        1.0,
        f"{case} {kernel}: value of",
    )
    if case.cell == "rnn_relu" and (dtype.itemsize == 2 or tf32):
        return  # a rounding takes some unit across the kink, and its gradient with it
    floor = 1e-3 * util.largest(expected_grads.values())
    grads = {name: t.cpu() for name, t in grads.items()}
    tolerance = 4 * TF32_TOLERANCE if tf32 else GRADIENTS[dtype]
    util.check(grads, expected_grads, tolerance, floor, f"{case} {kernel}: gradient of")


# (L, N, I, H): odd sizes, tiles and their edges; the largest are for a GPU only.
SIZES = [(1, 1, 1, 1), (3, 2, 5, 7)]
if not EMULATED:
    SIZES += [(4, 9, 3, 33), (2, 5, 8, 65), (33, 65, 40, 112), (17, 129, 64, 128), (9, 40, 100, 257), (7, 300, 33, 512)]
    SIZES += [(6, 16, 64, 768), (6, 5, 9, 900)]


@pytest.mark.parametrize(
    ("cell", "kernel", "dtype", "size"),
    [
        (cell, kernel, dtype, size)
        for cell, kernel, dtype, size in itertools.product(CELLS, [None, *KERNELS, TENSOR, "cluster"], DTYPES, SIZES)
        if fits(kernel, cell, dtype, size[3])
    ],
    ids=str,
)
def test_sizes(cell, kernel, dtype, size):
    with unless_too_large(size[3]):
        agree(Case(cell, bidirectional=size[0] % 2 == 1, size=size), dtype, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("cell", CELLS)
def test_layouts(cell, kernel):
    """Every layout with every mask, in both directions; projections by pointwise."""
    size = (3, 4, 3, 5) if EMULATED else (13, 37, 9, 65)
    for layout in util.LAYOUTS:
        masks = [(False, False)] if layout == "packed" else [(False, True), (True, False), (True, True)]
        for lengths, resets in masks:
            for proj in (0, 5) if cell == "lstm" and kernel == "pointwise" else (0,):
                for state in (True, False):
                    case = Case(cell, layout, True, True, proj, lengths, resets, state, size)
                    agree(case, torch.float32, kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("cell", "options"), [(cell, options) for cell in CELLS for options in util.combined(cell)])
def test_variants(cell, options, dtype):
    """By step, pointwise and the table; of an LSTM projected too."""
    for size in [(3, 4, 3, 17)] if EMULATED else [(3, 4, 3, 17), (9, 37, 9, 65), (7, 70, 33, 300), (3, 9, 40, 1025)]:
        for layout in util.LAYOUTS:
            case = Case(cell, layout, True, lengths=layout == "batch_first", resets=layout == "dense", size=size)
            for kernel in (None,) if "norm" in options else (None, "step", "pointwise"):
                agree(case, dtype, kernel, options)
            if cell == "lstm":
                agree(case.but(proj=size[3] - 3), dtype, None, options)


@pytest.mark.skipif(EMULATED, reason="the emulator's device is the CPU, whose lengths are checked")
@pytest.mark.parametrize("kernel", KERNELS)
def test_lengths_beyond_the_ends(kernel):
    """They are read on the device only, and count as the ends."""
    problem = to_device(util.build(Case("lstm", bidirectional=True, lengths=True, size=(4, 3, 2, 5)), torch.float32))
    results = []
    for lengths in ([9, 2, -3], [4, 2, 0]):
        problem.lengths = torch.tensor(lengths, device=DEVICE)
        with kernels(kernel):
            results.append(util.gradients(util.run, problem))
    for values, grads in results[1:]:
        util.same_bits(values, results[0][0])
        util.same_bits(grads, results[0][1])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("cell", CELLS)
def test_same_bits_a_hundred_times(cell, kernel):
    size = (3, 5, 4, 7) if EMULATED else (50, 70, 32, 64)
    problem = to_device(util.build(Case(cell, bidirectional=True, lengths=True, resets=True, size=size), torch.float32))
    with kernels(kernel):
        first, first_grads = util.gradients(util.run, problem)
        for _ in range(2 if EMULATED else 100):
            again, grads = util.gradients(util.run, problem)
            util.same_bits(again, first)
            util.same_bits(grads, first_grads)


@pytest.mark.parametrize("kernel", ["step", "persistent", "grid"])
def test_more_than_65535_timesteps(kernel):
    length = 300 if EMULATED else 70_000
    module = rnn_ext.RNN(1, 4, backend="custom").to(DEVICE)
    input = torch.randn(length, 1, 1, device=DEVICE)
    with kernels(kernel):
        output, _ = module(input)
        output[-1].sum().backward()
    expected, _ = rnn_ext.set_backend(module.cpu(), "native")(input[-200:].cpu())
    torch.testing.assert_close(output[-100:].detach().cpu(), expected[-100:].detach(), rtol=1e-4, atol=1e-5)
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_modules(name, kernel):
    """As torch.nn on the same device, in float64 where torch computes it: padded, packed, with lengths."""
    torch.manual_seed(0)
    ours = getattr(rnn_ext, name)(5, 7, 2, bidirectional=True, backend="custom").to(DEVICE)
    lengths = [4, 1, 3]
    rows = [torch.randn(n, 5, device=DEVICE) for n in lengths]
    padded = pad_sequence(rows)
    calls = {
        "padded": lambda: ours(padded)[0],
        "packed": lambda: ours(pack_sequence(rows, enforce_sorted=False))[0].data,
        "list": lambda: ours(padded, lengths=lengths)[0],
        "lengths": lambda: ours(padded, lengths=torch.tensor(lengths, device=DEVICE, dtype=torch.int32))[0],
    }
    for call in calls.values():
        results = []
        for backend in ("custom", "native"):
            rnn_ext.set_backend(ours, backend)
            with kernels(kernel):
                output = call()
                results.append([output, *torch.autograd.grad(output.square().sum(), list(ours.parameters()))])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_training_falls_like_torchs():
    torch.manual_seed(0)
    module = rnn_ext.LSTM(3, 8, proj_size=4, backend="custom", dtype=torch.float64).to(DEVICE)
    twin = nn.LSTM(3, 8, proj_size=4, dtype=torch.float64)
    twin.load_state_dict(module.state_dict())
    input, target = torch.randn(5, 4, 3, dtype=torch.float64), torch.randn(5, 4, 4, dtype=torch.float64)
    losses = []
    for model, device in ((module, DEVICE), (twin, "cpu")):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            with kernels():
                loss = nn.functional.mse_loss(model(input.to(device))[0], target.to(device))
                loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


# ---- what only a GPU has --------------------------------------------------------------------------------------------


def gpu_layer(kernel: str | None, requires_grad: bool = True, **options):
    """A bidirectional LSTM with lengths on the GPU, its input and its leaves."""
    module = rnn_ext.LSTM(16, 48, bidirectional=True, backend="custom", device="cuda", **options)
    input = torch.randn(20, 9, 16, device="cuda", requires_grad=requires_grad)
    lengths = torch.tensor([20, 1, 0, 7, 19, 20, 3, 11, 5], device="cuda")
    return module, input, lengths


VARIANTS = [
    *((kernel, {}) for kernel in KERNELS),
    *((kernel, {"zoneout": 0.1}) for kernel in ("step", "pointwise")),
    (None, {"layer_norm": True, "zoneout": 0.1}),
    (None, {"layer_norm": True, "zoneout": 0.1, "proj_size": 20}),
]


@needs_gpu
@pytest.mark.parametrize("kernel, options", VARIANTS, ids=str)
def test_nothing_waits_for_the_device(kernel, options):
    more = {"recurrent_dropout": 0.2, "weight_dropout": 0.3} if options else {}
    module, input, lengths = gpu_layer(kernel, **options, **more)
    resets = torch.rand(20, 9, device="cuda") < 0.2
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with kernels(kernel):
            output, _ = module(input, lengths=lengths, resets=resets)
            output.backward(torch.ones_like(output))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("kernel, options", VARIANTS, ids=str)
def test_cuda_graph(kernel, options):
    """Forward and backward in one graph; replayed on new numbers it gives what a call would."""
    module, input, lengths = gpu_layer(kernel, **options)
    module.eval()  # nothing is drawn

    def step():
        output, (h_n, _) = module(input, lengths=lengths)
        grads = torch.autograd.grad(output.square().sum() + h_n.sum(), [input, *module.parameters()])
        return [output.detach(), *grads]

    with kernels(kernel):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            input.copy_(torch.randn_like(input))
            lengths.copy_(torch.tensor([3, 20, 5, 0, 1, 20, 20, 8, 13], device="cuda"))
        graph.replay()
        expected = step()
    for actual, want in zip(captured, expected, strict=True):
        torch.testing.assert_close(actual, want, rtol=1e-5, atol=1e-6)


@needs_gpu
@pytest.mark.parametrize("hidden, blocks", [(256, 8), (512, 16)])
def test_explain_asks_this_device_for_clusters(hidden, blocks):
    """As the launch does: what is said to run does, and what is said to be missing is refused."""
    module = rnn_ext.LSTM(8, hidden, dtype=torch.bfloat16, device=DEVICE, backend="custom")
    input = torch.zeros(50, 8, 8, dtype=torch.bfloat16, device=DEVICE)
    kernel, reason = ops.cuda_kernel("lstm", input.dtype, 50, 8, hidden, device=torch.cuda.current_device())
    explanation = rnn_ext.explain(module, input)
    assert explanation.kernel.endswith(kernel) and reason in explanation.reason and "assumed" not in reason
    missing = f"not by clusters of {blocks} blocks: " in reason
    assert missing != (kernel == "cluster")
    with kernels("cluster"), torch.no_grad():
        if missing:
            with pytest.raises(RuntimeError, match=f"clusters of {blocks} blocks: "):
                module(input)
        else:
            assert module(input)[0].isfinite().all()


@needs_gpu
@pytest.mark.parametrize("kernel", KERNELS)
def test_side_stream(kernel):
    """Kernels follow the current stream: here it starts long after the default one."""
    module, input, lengths = gpu_layer(kernel, requires_grad=False)
    with kernels(kernel), torch.no_grad():
        expected = module(input * 2, lengths=lengths)[0]
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            doubled = input * 2  # not there yet for a kernel on another stream
            output = module(doubled, lengths=lengths)[0]
        stream.synchronize()
    assert torch.equal(output, expected)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_second_device():
    module = rnn_ext.GRU(4, 8, backend="custom", device="cuda:1")
    input = torch.randn(5, 2, 4, device="cuda:1")
    with torch.cuda.device(0):
        output = module(input)[0]
    expected = rnn_ext.set_backend(module.cpu(), "native")(input.cpu())[0]
    torch.testing.assert_close(output.cpu(), expected, rtol=1e-4, atol=1e-5)
    assert torch.cuda.current_device() == 0


@needs_gpu
def test_tensors_on_different_devices():
    weights = [torch.randn(20, 4), torch.randn(20, 5)]
    on_gpu = [weight.cuda() for weight in weights]
    input = torch.randn(3, 2, 4)
    with pytest.raises(RuntimeError, match="weight_ih is on cpu but input is on cuda:0: expected the same device"):
        ops.layer(input.cuda(), None, None, weights, cell="lstm")
    with pytest.raises(RuntimeError, match="weight_ih is on cuda:0 but input is on cpu: expected the same device"):
        ops.layer(input, None, None, on_gpu, cell="lstm")
    with pytest.raises(RuntimeError, match="h_0 is on cpu but input is on cuda:0"):
        ops.layer(input.cuda(), torch.zeros(1, 2, 5), None, on_gpu, cell="lstm")
    with pytest.raises(RuntimeError, match="resets is on cpu but input is on cuda:0"):
        ops.layer(input.cuda(), None, None, on_gpu, cell="lstm", resets=torch.zeros(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="between 0 and 3, got 4"):
        rnn_ext.LSTM(4, 5, backend="custom", device="cuda")(input.cuda(), lengths=torch.tensor([4, 1]))


@needs_gpu
def test_out_of_memory_has_numbers_and_breaks_nothing():
    module = rnn_ext.LSTM(1, 64, backend="custom", device="cuda")
    before = [p.detach().clone() for p in module.parameters()]
    huge = torch.zeros(1, 1, 1, device="cuda").expand(1 << 16, 1 << 16, 1)
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate [\d.]+ \w+"):
        module(huge)
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))
    assert module(torch.zeros(2, 3, 1, device="cuda"))[0].isfinite().all()


@needs_gpu
def test_no_more_blocks_than_can_be_is_no_hang():
    """A persistent kernel of more blocks than fit at once runs them in turn."""
    agree(Case("gru", size=(2, 5000, 3, 16)), torch.float32, "persistent")


@needs_gpu
def test_autocast():
    module, input, lengths = gpu_layer(None)
    with torch.autocast("cuda", torch.bfloat16):
        output, _ = module(input, lengths=lengths)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters())


@needs_gpu
def test_compiled():
    module, input, lengths = gpu_layer(None)

    def loss(x):
        return module(x, lengths=lengths)[0].square().sum()

    expected = torch.autograd.grad(loss(input), list(module.parameters()))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(input), list(module.parameters()))
    for ours, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-6)


@needs_gpu
def test_vmap_of_gradients():
    weights = [torch.randn(20, 3, device="cuda"), torch.randn(20, 5, device="cuda")]
    input = torch.randn(4, 6, 3, device="cuda")

    def loss(weight_hh, x):
        return ops.layer(x.unsqueeze(1), None, None, [weights[0], weight_hh], cell="lstm")[0].square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 1))(weights[1], input)
    for n in range(6):
        torch.testing.assert_close(per_sample[n], torch.func.grad(loss)(weights[1], input[:, n]), rtol=1e-4, atol=1e-5)


# ---- compute-sanitizer ----------------------------------------------------------------------------------------------

SHORT_RUN = """
import torch
from rnn_ext import ops
from tests import util
from tests.test_cuda_device import agree, to_device, kernels, fits

for cell in util.CELLS:
    for layout in ("dense", "packed"):
        for kernel in ("step", "pointwise", "persistent", "grid"):
            case = util.Case(cell, layout, True, lengths=layout == "dense", size=(3, 5, 4, 33))
            with kernels(kernel):
                util.gradients(util.run, to_device(util.build(case, torch.float32)))
    agree(util.Case(cell, "packed", True, size=(3, 5, 4, 33)), torch.float32, None, "masks")
    for proj in (0, 5) if cell == "lstm" else ():
        agree(util.Case(cell, "packed", True, proj=proj, size=(3, 5, 4, 33)), torch.float32, None, "norm+masks")
if torch.cuda.is_available():
    torch.cuda.synchronize()
print("done")
"""


def test_short_run_of_the_sanitizers():
    """The program that compute-sanitizer watches does what it is to do."""
    result = subprocess.run([sys.executable, "-c", SHORT_RUN], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.endswith("done\n"), result.stderr[-2000:]


ROOT = Path(__file__).resolve().parent.parent
SANITIZER = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


@needs_gpu
@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    # PyTorch's caching allocator would hide an access just past a tensor.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [str(SANITIZER), "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SHORT_RUN]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    said = result.stdout + result.stderr
    if "Device not supported" in said:  # some virtual machines keep the debugger's interface from their guests
        pytest.skip("compute-sanitizer cannot work on this machine")
    assert result.returncode == 0 and "done" in said, said[-3000:]
