"""The CUDA kernels of csrc/cuda, run on the CPU by the emulator and held against the float64 reference."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch

from tests.cuda_emulator import build, mutate
from tests.cuda_emulator.case import (
    CELLS,
    DTYPES,
    TF32_KERNELS,
    Case,
    KernelReportError,
    errors,
    failures,
    make_inputs,
    request,
    run_program,
)
from tests.cuda_emulator.run import main

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="the emulator is built with g++")

# Odd sizes: a lone unit, less than a tile, more than a tile, more than two chunks of the reduction.
SIZES = [(1, 1), (3, 7), (9, 33), (2, 65)]
LAYOUTS = {
    "dense": Case("lstm"),
    "reverse": Case("lstm", reverse=True),
    "both": Case("lstm", bidirectional=True),
    "batch_first": Case("lstm", bidirectional=True, batch_first=True),
    "lengths": Case("lstm", bidirectional=True, length=7, batch=4, lengths=(7, 1, 0, 4)),
    # Nobody checks lengths that lie on a GPU: those beyond the ends count as the ends.
    "lengths_beyond": Case("lstm", bidirectional=True, length=4, batch=4, lengths=(9, 1, -3, 4)),
    "packed": Case("lstm", bidirectional=True, packed=True, length=6, batch=4, lengths=(6, 5, 5, 1)),
    "resets": Case("lstm", bidirectional=True, length=9, resets=0.3),
    "packed_resets": Case("lstm", bidirectional=True, packed=True, length=6, batch=4, lengths=(6, 5, 3, 1), resets=0.3),
    "lengths_resets": Case("lstm", bidirectional=True, length=6, batch=4, lengths=(3, 6, 0, 1), resets=0.4),
    "no_state_no_bias": Case("lstm", bidirectional=True, initial=False, bias=False),
    "one_step": Case("lstm", length=1),
}


def check(case: Case, flavour: str = "plain", compiler: str = "g++", schedule: int = 0, arch: int = 90) -> None:
    found = errors(case, flavour, compiler, schedule, arch)
    assert not failures(case, found), f"{case}: {found}"


@pytest.mark.parametrize("batch, hidden", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_step_sizes(cell: str, dtype: torch.dtype, batch: int, hidden: int) -> None:
    check(Case(cell, dtype=dtype, batch=batch, hidden=hidden, backward=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", ["step", "pointwise"])
@pytest.mark.parametrize("cell", CELLS)
def test_step_layouts(cell: str, kernel: str, layout: str) -> None:
    check(replace(LAYOUTS[layout], cell=cell, kernel=kernel, backward=True))


MASKS = {"zoneout": 0.3, "recurrent_dropout": 0.4}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", ["step", "pointwise"])
@pytest.mark.parametrize("cell", CELLS)
def test_masked_layouts(cell: str, kernel: str, layout: str) -> None:
    check(replace(LAYOUTS[layout], cell=cell, kernel=kernel, backward=True, **MASKS))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_layouts(layout: str) -> None:
    for options in ({}, MASKS):
        check(replace(LAYOUTS[layout], kernel="pointwise", layer_norm=True, backward=True, **options))


@pytest.mark.parametrize("batch, hidden", [*SIZES, (2, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_norm_sizes(dtype: torch.dtype, batch: int, hidden: int) -> None:
    check(Case("lstm", "pointwise", dtype, 3, batch, hidden, layer_norm=True, backward=True, **MASKS))


def test_variants_of_schedules_and_sanitizers() -> None:
    """Rows of two warps, whose sums meet in shared memory."""
    packed = replace(LAYOUTS["packed_resets"], kernel="pointwise", hidden=40, backward=True, **MASKS)
    for flavour, schedule in (("plain", 1), ("plain", 2), ("asan", 1), ("tsan", 1)):
        check(replace(packed, layer_norm=True), flavour, schedule=schedule)
        check(replace(packed, kernel="step", batch=4, hidden=17), flavour, schedule=schedule)


def test_variants_refuse_what_they_cannot_run() -> None:
    with pytest.raises(KernelReportError, match="layer normalisation needs hgates"):
        errors(Case("lstm", layer_norm=True, length=1))
    with pytest.raises(KernelReportError, match="persistent kernels have no variants"):
        errors(Case("gru", "persistent", zoneout=0.1, length=1))


@pytest.mark.parametrize("batch, hidden", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_persistent_sizes(cell: str, dtype: torch.dtype, batch: int, hidden: int) -> None:
    check(Case(cell, kernel="persistent", dtype=dtype, batch=batch, hidden=hidden, backward=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_persistent_layouts(cell: str, layout: str) -> None:
    check(replace(LAYOUTS[layout], cell=cell, kernel="persistent", backward=True))


@pytest.mark.parametrize("batch, hidden", [(1, 1), (3, 7), (9, 33), (17, 65), (2, 97)])  # of each compiled size one
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_tensor_sizes(cell: str, dtype: torch.dtype, batch: int, hidden: int) -> None:
    if dtype == torch.float32:
        hidden = min(hidden, {"lstm": 64, "gru": 96}.get(cell, 128))
    check(Case(cell, kernel="tensor", dtype=dtype, batch=batch, hidden=hidden, length=3, backward=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_tensor_layouts(cell: str, dtype: torch.dtype, layout: str) -> None:
    check(replace(LAYOUTS[layout], cell=cell, kernel="tensor", dtype=dtype, backward=True))


# One size for every number of blocks and of steps of the product, most of them not full; no unit at all in some block.
CLUSTER_SIZES = [
    *((torch.bfloat16, batch, hidden) for batch, hidden in ((1, 1), (3, 129), (2, 257), (1, 385))),
    (torch.float16, 9, 64),
    *((torch.float32, batch, hidden) for batch, hidden in ((9, 7), (3, 129), (1, 257))),
]


@pytest.mark.parametrize("dtype, batch, hidden", CLUSTER_SIZES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_cluster_sizes(cell: str, dtype: torch.dtype, batch: int, hidden: int) -> None:
    check(Case(cell, kernel="cluster", dtype=dtype, batch=batch, hidden=hidden, length=2, backward=True))


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [255, 384, 512])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_cluster_large_sizes(cell: str, dtype: torch.dtype, hidden: int) -> None:
    if dtype == torch.float32 and cell in ("gru", "lstm"):
        hidden = {255: 127, 384: 256, 512: 384}[hidden]
    check(Case(cell, kernel="cluster", dtype=dtype, length=2, batch=2, hidden=hidden, backward=True))


# The emulated exchange takes its time: all layouts for one cell, for the others those that hold the most.
@pytest.mark.parametrize(
    "cell, layout",
    [("lstm", layout) for layout in LAYOUTS]
    + [(cell, layout) for cell in CELLS[:3] for layout in ("packed_resets", "lengths_resets", "no_state_no_bias")],
)
def test_cluster_layouts(cell: str, layout: str) -> None:
    case = replace(LAYOUTS[layout], cell=cell, kernel="cluster", dtype=torch.bfloat16, hidden=35, backward=True)
    check(case if cell == "lstm" else replace(case, bidirectional=False, reverse=True))


def test_cluster_layouts_in_tf32() -> None:
    check(replace(LAYOUTS["packed_resets"], kernel="cluster", hidden=35, backward=True))
    check(replace(LAYOUTS["lengths_resets"], cell="gru", kernel="cluster", hidden=35, backward=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_cluster_hand_over(cell: str, dtype: torch.dtype) -> None:
    """Long enough for every buffer and every parity of its barrier, with blocks that run ahead of each other."""
    check(Case(cell, kernel="cluster", dtype=dtype, batch=2, hidden=40, length=7, backward=True), schedule=2)


def test_cluster_refuses_what_it_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("lstm", kernel="cluster", dtype=torch.bfloat16, hidden=130, length=1, batch=1)
    with pytest.raises(KernelReportError, match="cluster kernels do not take float64"):
        errors(replace(case, dtype=torch.float64))
    with pytest.raises(KernelReportError, match=r"cluster kernels .* end at hidden size 512, got 513"):
        errors(replace(case, hidden=513))
    with pytest.raises(KernelReportError, match=r"cluster kernels .* end at hidden size 384, got 385"):
        errors(replace(case, dtype=torch.float32, hidden=385))
    with pytest.raises(KernelReportError, match=r"cluster kernels .* end at hidden size 512, got 513"):
        errors(replace(case, cell="rnn_tanh", dtype=torch.float32, hidden=513))
    with pytest.raises(KernelReportError, match="clusters of 8 blocks: this GPU has no thread-block clusters"):
        errors(case, arch=80)
    monkeypatch.setenv("EMU_CLUSTER", "8")
    check(case)
    with pytest.raises(KernelReportError, match="clusters of 16 blocks: this GPU cannot hold one of them"):
        errors(replace(case, hidden=385))
    with pytest.raises(KernelReportError, match="clusters of 16 blocks: this GPU cannot hold one of them"):
        errors(replace(case, dtype=torch.float32, hidden=257))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kernel", ["tensor", "cluster"])
def test_products_are_exact(kernel: str, dtype: torch.dtype) -> None:
    """h W^T and dgates W of small integers have no rounding: a wrong fragment is off by far more than a tolerance."""
    case = Case("rnn_relu", kernel, dtype, length=1, batch=8, hidden=128, bias=False, backward=True)
    inputs = make_inputs(case)
    inputs.weight_hh[0] = (torch.arange(128 * 128).reshape(128, 128) * 7 % 5 - 1).double()
    inputs.h_0[0] = (torch.arange(8 * 128).reshape(8, 128) * 3 % 7 - 2).double()
    inputs.dh_n[0] = (torch.arange(8 * 128).reshape(8, 128) * 5 % 9 - 3).double()
    inputs.igates.zero_()
    inputs.doutput.zero_()
    raw = run_program(build.driver(), "plain", request(case, inputs))
    output, dh_0 = (torch.frombuffer(bytearray(raw[name]), dtype=case.dtype).double() for name in ("output", "dh_00"))
    want = (inputs.h_0[0] @ inputs.weight_hh[0].t()).relu()
    want_grad = (inputs.dh_n[0] * (want > 0)) @ inputs.weight_hh[0]
    assert want.max() > 100 and torch.equal(output.reshape(8, 128), want)
    assert want_grad.abs().max() > 100 and torch.equal(dh_0.reshape(8, 128), want_grad)


@pytest.mark.parametrize("kernel", TF32_KERNELS)
def test_float32_is_rounded_to_tf32(kernel: str) -> None:
    """Factors, the weight and the other, to nearest with ties away from zero; what is stored is not rounded."""

    def tf32(values: torch.Tensor) -> torch.Tensor:
        return ((values.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()

    case = Case("rnn_relu", kernel, length=2, batch=1, hidden=17, bias=False, backward=True)
    inputs = make_inputs(case)
    values = (torch.arange(17) - 8) * 0.2
    values[:3] = torch.tensor([1 + 2**-11, 1 - 2**-12, -1 - 2**-11])  # ties
    rounded = tf32(values)
    assert rounded[:3].tolist() == [1 + 2**-10, 1, -1 - 2**-10] and (rounded != values)[3:].any()
    inputs.weight_hh[0] = torch.diag(values).double()
    inputs.h_0[0] = values.reshape(1, 17).double()
    inputs.dh_n[0] = values.reshape(1, 17).double()
    inputs.igates[0], inputs.igates[1] = 2, 100  # every unit active
    inputs.doutput.zero_()
    raw = run_program(build.driver(), "plain", request(case, inputs))
    output, dgates, h_n = (
        torch.frombuffer(bytearray(raw[name]), dtype=torch.float32).reshape(-1, 17)
        for name in ("output", "dgates0", "h_n0")
    )
    assert torch.equal(output[0], (rounded * rounded + 2).float())
    assert torch.equal(output[1], (tf32(output[0]) * rounded + 100).float())
    assert torch.equal(dgates[1], values) and torch.equal(h_n, output[1:])
    assert torch.equal(dgates[0], (rounded * rounded).float())


def test_tensor_refuses_what_it_cannot_take() -> None:
    with pytest.raises(KernelReportError, match="do not take float64"):
        errors(Case("gru", kernel="tensor", dtype=torch.float64, hidden=8, length=1, batch=1))
    with pytest.raises(KernelReportError, match="end at hidden size 64, got 65"):
        errors(Case("lstm", kernel="tensor", hidden=65, length=1, batch=1))
    with pytest.raises(KernelReportError, match="end at hidden size 128, got 129"):
        errors(Case("lstm", kernel="tensor", dtype=torch.bfloat16, hidden=129, length=1, batch=1))
    check(Case("gru", kernel="tensor", dtype=torch.bfloat16, hidden=128, length=1, batch=1))


@pytest.mark.parametrize("batch, hidden, units", [(1, 1, 0), (3, 7, 3), (9, 33, 7), (17, 65, 32), (2, 129, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_grid_sizes(cell: str, dtype: torch.dtype, batch: int, hidden: int, units: int) -> None:
    check(Case(cell, "grid", dtype, batch=batch, hidden=hidden, units=units, length=3, backward=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_grid_layouts(cell: str, layout: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(replace(LAYOUTS[layout], cell=cell, kernel="grid", dtype=dtype, units=3, backward=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_grid_many_columns(dtype: torch.dtype) -> None:
    """More than a warp takes at once: 4 gates of 544 columns in backward."""
    check(Case("lstm", "grid", dtype, batch=2, hidden=520, units=20, length=2, backward=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_grid_blocks_change_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither how units are shared out nor whether a block serves one group of rows or all of them in turn."""
    case = Case("gru", "grid", dtype, batch=20, hidden=33, length=3, resets=0.2, backward=True)
    results = []
    for units, multiprocessors in ((0, 132), (5, 132), (5, 7), (17, 4), (32, 2)):
        monkeypatch.setenv("EMU_MULTIPROCESSORS", str(multiprocessors))
        data = request(replace(case, units=units), make_inputs(case))
        results.append(run_program(build.driver(), "plain", data))
    assert all(result == results[0] for result in results[1:])


def test_grid_products_are_exact() -> None:
    """As test_tensor_products_are_exact: fragments from registers and, of the other rows, from shared memory."""
    case = Case("rnn_relu", "grid", torch.float16, length=1, batch=8, hidden=128, units=32, bias=False)
    inputs = make_inputs(case)
    inputs.weight_hh[0] = (torch.arange(128 * 128).reshape(128, 128) * 7 % 5 - 1).double()
    inputs.h_0[0] = (torch.arange(8 * 128).reshape(8, 128) * 3 % 7 - 2).double()
    inputs.igates.zero_()
    raw = run_program(build.driver(), "plain", request(case, inputs))
    got = torch.frombuffer(bytearray(raw["output"]), dtype=torch.float16).reshape(8, 128)
    want = (inputs.h_0[0] @ inputs.weight_hh[0].t()).relu()
    assert want.max() > 100 and torch.equal(got.double(), want)


def test_grid_refuses_what_cannot_be_resident(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that wait for a block that cannot begin would hang: an error with the numbers instead."""
    case = Case("lstm", "grid", hidden=16, units=1, length=1, batch=1, bidirectional=True, backward=True)
    monkeypatch.setenv("EMU_MULTIPROCESSORS", "1")  # which holds 16 blocks of backward's 128 threads
    with pytest.raises(
        KernelReportError, match=r"grid_backward: .* 32 blocks of \d+ bytes .* holds 16 at once \(1 mult"
    ):
        errors(case)
    check(replace(case, bidirectional=False))
    with pytest.raises(KernelReportError, match=r"hidden size 2000, batch 1: 63 blocks of 10\d+ bytes .* holds 0 at"):
        errors(Case("lstm", "grid", hidden=2000, length=1, batch=1))
    with pytest.raises(KernelReportError, match="up to 32 units"):
        errors(replace(case, units=33))
    with pytest.raises(KernelReportError, match="grid kernels do not take float64"):
        errors(replace(case, dtype=torch.float64))


def test_persistent_refuses_what_does_not_fit() -> None:
    with pytest.raises(KernelReportError, match="hidden size 128, got 129"):
        errors(Case("gru", kernel="persistent", hidden=129, length=1, batch=1))
    with pytest.raises(KernelReportError, match=r"needs \d+ bytes of shared memory"):
        errors(Case("gru", kernel="persistent", hidden=128, length=1, batch=1), arch=80)
    check(Case("gru", kernel="persistent", hidden=112, length=1, batch=1), arch=80)


@pytest.mark.parametrize("kernel", ["step", "persistent", "cluster", "grid"])
@pytest.mark.parametrize("cell", CELLS)
def test_inference_saves_nothing(cell: str, kernel: str) -> None:
    dtype = torch.bfloat16 if kernel == "cluster" else torch.float32
    check(Case(cell, kernel=kernel, dtype=dtype, training=False, bidirectional=True, resets=0.2))


@pytest.mark.parametrize("schedule", [1, 2])
@pytest.mark.parametrize("kernel", ["step", "persistent", "tensor", "cluster", "grid"])
@pytest.mark.parametrize("cell", CELLS)
def test_schedules(cell: str, kernel: str, schedule: int) -> None:
    dtype = torch.bfloat16 if kernel in ("tensor", "cluster") else torch.float32
    both = kernel != "cluster"  # many threads already
    case = Case(cell, kernel=kernel, dtype=dtype, batch=9, hidden=33, bidirectional=both, backward=True)
    check(replace(case, units=7), schedule=schedule)


@pytest.mark.parametrize("flavour", ["asan", "tsan"])
@pytest.mark.parametrize("kernel", ["step", "persistent", "tensor", "grid"])
@pytest.mark.parametrize("cell", CELLS)
def test_sanitizers(cell: str, kernel: str, flavour: str) -> None:
    packed = replace(LAYOUTS["packed_resets"], cell=cell, kernel=kernel, hidden=33, units=13, backward=True)
    if kernel == "tensor":
        packed = replace(packed, dtype=torch.float16 if cell == "lstm" else torch.float32)
    if kernel == "grid" and flavour == "tsan":  # which remembers what some 250 threads did: two blocks of up to 128
        packed = replace(packed, hidden=7, units=4, bidirectional=False)
    dense = replace(packed, dtype=torch.bfloat16, packed=False, lengths=None, length=3, batch=9, hidden=17, resets=0)
    if kernel == "grid" and flavour == "tsan":
        dense = replace(dense, batch=5, hidden=7)
    for case in (packed, dense):
        check(case, flavour, schedule=1)


# Of the lstm the smallest clusters have a thousand threads, of the others two thousand: much for a sanitizer.
@pytest.mark.parametrize("flavour", ["asan", "tsan"])
@pytest.mark.parametrize("cell", ["lstm", *(pytest.param(cell, marks=pytest.mark.slow) for cell in CELLS[:3])])
def test_cluster_sanitizers(cell: str, flavour: str) -> None:
    packed = replace(LAYOUTS["packed_resets"], cell=cell, kernel="cluster", bidirectional=False, backward=True)
    dtype = torch.float32 if flavour == "asan" else torch.float16
    check(replace(packed, dtype=dtype, hidden=33), flavour, schedule=1)


@pytest.mark.skipif("clang++" not in build.compilers(), reason="clang++ is not installed")
@pytest.mark.parametrize("kernel", ["step", "persistent", "tensor", "grid"])
@pytest.mark.parametrize("cell", CELLS)
def test_clang(cell: str, kernel: str) -> None:
    dtype = torch.bfloat16 if kernel == "tensor" else torch.float32
    case = replace(LAYOUTS["packed_resets"], cell=cell, kernel=kernel, dtype=dtype, hidden=33, backward=True)
    check(case, compiler="clang++")


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    shape = "--cell gru --lengths 7,1,4 --resets 0.2 --reverse --backward --hidden 5"
    arguments = [*shape.split(), "--schedule", "2", "--arch", "80"]
    assert main(arguments) == 0
    assert "ok" in capsys.readouterr().out
    variant = "--kernel pointwise --layer-norm --zoneout 0.2 --recurrent-dropout 0.3 --backward"
    assert main(variant.split()) == 0
    assert "ok" in capsys.readouterr().out


@pytest.mark.parametrize(
    "right, wrong, words",
    [
        (b"cell=2", b"cell=7", "no cell has the number 7"),
        (b"hidden=7", b"hidden=0", "hidden size 0"),
        (b"variant=0", b"variant=2", "only an lstm has layer normalisation, got cell 2"),
        (b"variant=0", b"variant=3", "no variant has the number 3"),
        (b"batch=3", b"batch=4", r"batch_sizes\[0\] is 3"),
    ],
)
def test_launcher_refuses(right: bytes, wrong: bytes, words: str) -> None:
    case = Case("gru", packed=True, length=3, batch=3, lengths=(3, 2, 1))
    data = request(case, make_inputs(case)).replace(right, wrong, 1)
    with pytest.raises(KernelReportError, match=words):
        run_program(build.driver(), "plain", data)


# Each seeded mistake, and what has to be said about it under some build and schedule.
MISTAKES = {
    "missing_barrier": "NaN in the result|data race",
    "missing_second_barrier": "data race",
    "dynamic_shared_out_of_bounds": "heap-buffer-overflow",
    "static_shared_out_of_bounds": "heap-buffer-overflow",
    "global_out_of_bounds": "heap-buffer-overflow",
    "uninitialised_shared": "NaN in the result",
    "unwritten_output": "NaN in the result",
    "barrier_in_a_branch": "deadlock|exits while others wait",
    "barrier_in_two_places": "divergent barrier",
    "barrier_after_an_exit": "after a thread of the block has exited|exits while others wait",
    "shuffle_in_a_branch": "deadlock",
    "shuffle_outside_its_mask": "outside its mask|not in its mask",
    "shuffle_as_a_barrier": "data race",
    "copy_without_wait": "NaN in the result",
    "copy_wait_without_barrier": "data race|NaN in the result",
    "copy_never_committed": "uncommitted cp.async",
    "misaligned_vector": "misaligned",
    "blocks_race": "data race",
    "relaxed_flag": "data race",
    "waits_for_ever": "livelock",
    "more_than_can_wait": "more blocks than can be resident",
}


@pytest.mark.parametrize("flavour", build.FLAVOURS)
def test_features_used_correctly_are_not_reported(flavour: str) -> None:
    """cp.async pipelines, clusters, mbarrier and st.async."""
    program = build.build([build.HERE / "good_kernels.cu"], flavour)
    for schedule in (0, 1, 2):
        env = build.environment(schedule, resident_threads=1 << 20)
        result = subprocess.run(build.command_line(program, flavour), capture_output=True, text=True, env=env)
        assert result.returncode == 0, result.stderr[:1000]


def reports(mistake: str, flavour: str, schedule: int) -> str:
    program = build.build([build.HERE / "bad_kernels.cu"], flavour)
    result = subprocess.run(
        [*build.command_line(program, flavour), mistake],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120,
        env=build.environment(schedule, resident_threads=1 << 20),
    )
    return result.stderr if result.returncode else ""


def test_every_seeded_mistake_is_expected() -> None:
    program = build.build([build.HERE / "bad_kernels.cu"])
    listed = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.split()
    assert listed == list(MISTAKES)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_seeded_mistake_is_caught(mistake: str) -> None:
    """The mistake is named for what it is, by a plain build where that can see it, else by a sanitizer."""
    said = ""
    for flavour in build.FLAVOURS:
        for schedule in (0, 1):
            said = reports(mistake, flavour, schedule)
            if re.search(MISTAKES[mistake], said):
                return
    pytest.fail(f"nothing of the kind was reported; the last words: {said[:500]}")


def mutated(kind: str) -> list[str]:
    """The headers of which there are such mutants."""
    every = {source: mutate.mutants(build.CUDA / source) for source in mutate.SOURCES}
    return [source for source, found in every.items() if any(mutant.kind == kind for mutant in found)]


@pytest.mark.parametrize("source", mutated("synchronisation"))
def test_deleted_synchronisations_are_seen(source: str) -> None:
    assert mutate.run("synchronisation", sources=[source]) == []


@pytest.mark.slow
@pytest.mark.parametrize("source", mutated("bound"))
def test_weakened_bounds_are_seen(source: str) -> None:
    assert mutate.run("bound", sources=[source]) == []


# (cell, dtype, length, batch, hidden, directions, projected, backward, device) -> kernel, at every boundary. A device:
# shared bytes of a block, multiprocessors.
A100, H100 = (163 * 1024, 108), (227 * 1024, 132)
DISPATCH = [
    ("lstm", torch.float32, 3, 1, 112, 1, False, False, H100, "persistent"),
    ("lstm", torch.float32, 3, 1, 128, 1, False, False, H100, "step"),  # 4 H^2 float32 do not fit
    ("lstm", torch.bfloat16, 3, 1, 128, 1, False, False, A100, "tensor"),
    ("lstm", torch.bfloat16, 3, 1, 129, 1, False, False, A100, "step"),
    ("lstm", torch.bfloat16, 3, 1, 128, 1, False, True, H100, "tensor"),
    ("lstm", torch.bfloat16, 3, 256, 129, 2, False, False, H100, "cluster"),
    ("lstm", torch.bfloat16, 3, 257, 129, 2, False, False, H100, "step"),
    ("lstm", torch.bfloat16, 3, 1, 129, 1, False, True, H100, "cluster"),
    ("rnn_tanh", torch.float16, 3, 1024, 256, 1, False, False, H100, "cluster"),
    ("rnn_tanh", torch.float16, 3, 1025, 256, 1, False, False, H100, "pointwise"),
    ("gru", torch.float16, 3, 512, 384, 1, False, False, H100, "cluster"),
    ("gru", torch.float16, 3, 257, 385, 1, False, False, H100, "pointwise"),
    ("lstm", torch.bfloat16, 3, 128, 512, 2, False, False, H100, "cluster"),
    ("lstm", torch.bfloat16, 3, 1, 513, 1, False, False, H100, "step"),
    ("lstm", torch.float32, 3, 1, 256, 1, False, False, H100, "step"),
    ("gru", torch.float16, 3, 4160, 128, 1, False, False, H100, "tensor"),
    ("gru", torch.float16, 3, 2081, 128, 2, False, False, H100, "step"),
    ("gru", torch.float16, 3, 4161, 64, 1, False, True, H100, "step"),
    ("gru", torch.float32, 3, 1, 64, 1, False, False, H100, "persistent"),
    ("lstm", torch.float32, 3, 1, 112, 1, False, False, A100, "step"),
    ("gru", torch.float32, 3, 1, 112, 1, False, False, A100, "persistent"),
    ("rnn_tanh", torch.float32, 3, 1, 129, 1, False, False, H100, "step"),
    ("lstm", torch.float64, 3, 1, 16, 1, False, False, H100, "step"),
    ("rnn_relu", torch.float32, 3, 2080, 64, 1, False, True, H100, "persistent"),
    ("rnn_relu", torch.float32, 3, 2080, 64, 2, False, True, H100, "step"),
    ("gru", torch.float16, 3, 32, 512, 1, False, False, A100, "step"),
    ("gru", torch.float16, 3, 33, 512, 1, False, False, A100, "pointwise"),
    ("gru", torch.float16, 3, 33, 255, 1, False, False, A100, "step"),
    ("lstm", torch.float32, 3, 1, 16, 1, True, False, H100, "pointwise"),
    ("lstm", torch.float32, 4, 1, 128, 1, False, False, H100, "grid"),
    ("lstm", torch.float32, 100, 8, 1320, 1, False, True, H100, "grid"),
    ("lstm", torch.float32, 100, 8, 1321, 1, False, True, H100, "step"),  # fits no 132 blocks
    ("lstm", torch.float32, 100, 8, 1280, 2, False, True, H100, "step"),
    ("lstm", torch.float32, 100, 8, 972, 1, False, False, A100, "grid"),
    ("lstm", torch.float32, 100, 8, 973, 1, False, False, A100, "step"),
    ("lstm", torch.bfloat16, 100, 16, 2048, 1, False, False, H100, "grid"),
    ("lstm", torch.float16, 100, 8, 2113, 1, False, False, H100, "step"),
    ("lstm", torch.float16, 100, 72, 1024, 1, False, False, H100, "grid"),
    ("lstm", torch.float16, 100, 73, 1024, 1, False, False, H100, "pointwise"),  # past 10,000 clocks a timestep
    ("gru", torch.float32, 100, 16, 1024, 1, False, False, H100, "grid"),
    ("gru", torch.float32, 100, 17, 1024, 1, False, False, H100, "step"),
    ("rnn_tanh", torch.float32, 100, 32, 512, 1, False, False, (227 * 1024, 3), "step"),  # a slice of a GPU
    ("gru", torch.float64, 100, 8, 512, 1, False, False, H100, "step"),
    ("lstm", torch.float16, 100, 8, 512, 1, True, False, H100, "pointwise"),
]
DISPATCH_TF32 = [
    ("lstm", torch.float32, 3, 4160, 64, 1, False, False, A100, "tensor"),
    ("lstm", torch.float32, 3, 1, 64, 1, False, True, A100, "tensor"),
    ("lstm", torch.float32, 3, 4161, 64, 1, False, False, A100, "step"),
    ("lstm", torch.float32, 3, 1, 65, 1, False, False, A100, "persistent"),
    ("lstm", torch.float32, 3, 1, 65, 1, False, False, H100, "cluster"),
    ("lstm", torch.float32, 3, 1024, 128, 1, False, True, H100, "cluster"),
    ("lstm", torch.float32, 3, 1025, 112, 1, False, False, H100, "persistent"),
    ("lstm", torch.float32, 3, 256, 129, 2, False, False, H100, "cluster"),
    ("lstm", torch.float32, 3, 257, 129, 2, False, False, H100, "step"),
    ("lstm", torch.float32, 3, 512, 256, 1, False, True, H100, "cluster"),
    ("lstm", torch.float32, 3, 256, 384, 1, False, True, H100, "cluster"),
    ("lstm", torch.float32, 3, 257, 384, 1, False, True, H100, "pointwise"),
    ("lstm", torch.float32, 3, 1, 385, 1, False, False, H100, "step"),
    ("lstm", torch.float32, 100, 8, 385, 1, False, False, H100, "grid"),
    ("lstm", torch.float32, 3, 1, 256, 1, True, False, H100, "pointwise"),
    ("gru", torch.float32, 3, 1, 96, 1, False, True, H100, "tensor"),
    ("gru", torch.float32, 3, 1, 97, 1, False, True, H100, "cluster"),
    ("gru", torch.float32, 3, 1, 384, 1, False, True, H100, "cluster"),
    ("gru", torch.float32, 3, 1, 385, 1, False, True, H100, "step"),
    ("rnn_tanh", torch.float32, 3, 1, 128, 2, False, False, H100, "tensor"),
    ("rnn_tanh", torch.float32, 3, 512, 256, 2, False, False, H100, "cluster"),
    ("rnn_tanh", torch.float32, 3, 512, 512, 1, False, True, H100, "cluster"),
    ("rnn_tanh", torch.float32, 3, 1, 513, 1, False, True, H100, "step"),
    ("lstm", torch.float64, 3, 1, 16, 1, False, False, H100, "step"),
]


# The same of masked cells, and of those with layer normalisation.
DISPATCH_MASKED = [
    ("lstm", torch.float32, 3, 32, 64, 1, False, False, H100, "step"),
    ("gru", torch.bfloat16, 3, 33, 64, 1, False, False, H100, "step"),
    ("gru", torch.bfloat16, 3, 33, 256, 1, False, True, H100, "pointwise"),
    ("lstm", torch.float32, 3, 1, 64, 1, True, False, H100, "pointwise"),
]
DISPATCH_NORMED = [
    ("lstm", torch.float32, 3, 1, 16, 1, False, backward, H100, "pointwise") for backward in (False, True)
]


def choices(rows: list[tuple], variant: int = 0, allow_tf32: bool = False) -> list[str]:
    """What the table has for each row, "kernel: reason"."""
    program = build.build([*build.kernel_sources(), build.HERE / "dispatch_table.cpp"])
    lines = []
    for cell, dtype, length, batch, hidden, directions, projected, backward, device, *_ in rows:
        numbers = [CELLS.index(cell), DTYPES.index(dtype), variant, length, batch, hidden, directions]
        numbers += [projected, backward, allow_tf32, *device]
        lines.append(" ".join(str(int(number)) for number in numbers))
    result = subprocess.run([str(program)], input="\n".join(lines), capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


@pytest.mark.parametrize(
    "rows, variant, allow_tf32",
    [(DISPATCH, 0, False), (DISPATCH_TF32, 0, True), (DISPATCH_MASKED, 1, True), (DISPATCH_NORMED, 2, True)],
)
def test_dispatch_boundaries(rows: list[tuple], variant: int, allow_tf32: bool) -> None:
    answers = choices(rows, variant, allow_tf32)
    assert [answer.split(":")[0] for answer in answers] == [row[-1] for row in rows]
    assert all(len(answer.split(": ", 1)[1]) > 20 for answer in answers), "every choice says why"


def test_dispatch_asks_the_device_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device may have clusters of 8 blocks and none of 16, or none at all: another kernel, and it is said why."""
    here = (0, 0)
    rows = [
        ("lstm", torch.bfloat16, 100, 8, hidden, 1, False, backward, here)
        for hidden, backward in ((384, False), (512, False), (512, True))
    ]
    rows += [("lstm", torch.bfloat16, 2, 8, 512, 1, False, False, here)]  # too short for `grid`
    rows += [("lstm", torch.float32, 100, 8, 512, 1, False, False, here)]  # no clusters anywhere
    monkeypatch.setenv("EMU_MULTIPROCESSORS", "132")
    asked = choices(rows)
    assert [answer.split(":")[0] for answer in asked] == ["cluster", "cluster", "cluster", "cluster", "grid"]
    assert not any("clusters of" in answer or "assumed" in answer for answer in asked)
    assert choices([(*rows[1][:-1], H100)])[0].endswith("assumed, since none is here to be asked")
    assert "cluster" not in choices([(*rows[1][:-1], A100)])[0]

    monkeypatch.setenv("EMU_CLUSTER", "8")
    answers = choices(rows)
    assert [answer.split(":")[0] for answer in answers] == ["cluster", "grid", "grid", "step", "grid"]
    assert all(
        answer.endswith("; not by clusters of 16 blocks: this GPU cannot hold one of them") for answer in answers[1:4]
    )
    assert answers[0] == asked[0] and answers[4] == asked[4]

    monkeypatch.setenv("EMU_ARCH", "80")
    answers = choices(rows)
    assert [answer.split(":")[0] for answer in answers][3] == "step"
    assert "not by clusters of 8 blocks: this GPU has no thread-block clusters" in answers[0]
