"""The figures in the documents are those of the committed results, as far as their digits tell."""

from __future__ import annotations

import functools
import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ZEN_5, ZEN_4 = "amd-epyc-family-26-model-2-2-cores", "amd-epyc-family-25-model-17-2-cores"
AMX = "intel-r-xeon-r-processor-family-6-model-167-2-cores"
ICE_LAKE = "intel-r-xeon-r-processor-2-80ghz-family-6-model-106-2-cores"
README, GUIDE, BENCHMARKS = "README.md", "docs/guide.md", "benchmarks/README.md"
FLOAT32 = "rnn_ext float32"

Range = tuple[float, float]  # between which a number is: tables give theirs rounded
Row = dict[str, Any]


@functools.cache
def results(name: str) -> dict[str, Any]:
    import stored

    return stored.load(RESULTS / f"{name}.json")


@functools.cache
def table(name: str) -> dict[str, list[str]]:
    """The cells of each row after its first, by that; of the table's head, too, whose first is empty or a title."""
    lines = (RESULTS / name).read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


def exactly(*values: float) -> list[Range]:
    return [(value, value) for value in values]


def rounded(text: str) -> Range:
    """What a number may be that is written so."""
    half = 0.5 * 10.0 ** -len(text.partition(".")[2])
    return float(text) - half, float(text) + half


def divide(over: Range, under: Range) -> Range:
    return over[0] / under[1], over[1] / under[0]


def ends(values: Iterable[Range | float]) -> list[Range]:
    """The least and the most of them."""
    ranges = [value if isinstance(value, tuple) else (value, value) for value in values]
    assert ranges
    lows, highs = zip(*ranges, strict=True)
    return [(min(lows), min(highs)), (max(lows), max(highs))]


# --- Of each kind of result the numbers that the documents speak of


def comparisons(name: str) -> list[Range]:
    import readings

    result = results(name)
    return exactly(
        len(readings.losses(result)), sum(readings.is_peer(who) for row in result["rows"] for who in row["times"])
    )


def lost_by(name: str) -> list[Range]:
    """How many per cent less than the other's speed ours has where it lost, the least and the most."""
    import readings

    return ends(100 * (1 - ratio) for _, _, ratio in readings.losses(results(name)))


def speed_ups(name: str, over: str, chosen: Callable[[Row, Row], bool]) -> Iterator[float]:
    """Of the rows, of layers, for which chosen(row, its case) is true."""
    import readings

    for row in results(name)["rows"]:
        ratio = readings.speed_up(row, over)
        if ratio is not None and row["case"] and chosen(row, row["case"]):
            yield ratio


def random_layers(name: str, threads: int | None = None) -> list[Row]:
    return [row for row in results(f"{name}-random")["rows"] if threads in (None, row["threads"])]


def random_ratios(name: str, threads: int | None = None, which: str = "seconds") -> list[float]:
    import readings

    return [readings.ratio(row[which]) for row in random_layers(name, threads) if which in row]


def share(rows: list[Row], part: str) -> Range:
    """How many per cent of them have `part` in their names."""
    return exactly(100 * sum(part in f"{row['name']} " for row in rows) / len(rows))[0]


def is_large_padded(row: Row) -> bool:
    sizes = {name: int(size) for name, size in re.findall(r"\b([NLH])=(\d+)", row["name"])}
    plain = not re.search(r"float16|float64|\.\.", row["name"])
    return plain and sizes["N"] >= 8 and sizes["L"] >= 16 and sizes["H"] >= 64


BITS_16, BITS_8 = "8 bits, activations 16", "8 bits, activations 8"
TORCH_8, ONNX_8 = "torch.nn, dynamic quantization", "ONNX Runtime, dynamic quantization"


def eight_bits(ours: str, other: str, chosen: Callable[[int], bool] = lambda units: True) -> list[Range]:
    """Our share of the other's time, of the layers for whose units chosen() is true, and the other can."""
    rows = table("eight_bits.md")
    titles = rows[""]
    found = []
    for name, shown in rows.items():
        shape = re.fullmatch(r"\w+, N=\d+, L=\d+, H=(\d+)", name)
        if not shape or not chosen(int(shape[1])):
            continue
        times = [shown[titles.index(title)].split(" ")[0] for title in (ours, other)]
        if all(times):
            found.append(divide(rounded(times[0]), rounded(times[1])))
    return found


def eight_bits_off(who: str, cells: str) -> float:
    """How far outputs are off at most."""
    rows = table("eight_bits.md")
    column = rows[""].index(who)
    shown = [cells_[column] for name, cells_ in rows.items() if re.match(cells, name)]
    return max(float(re.search(r"\((.*)\)", text)[1]) for text in shown if text)


def features(pattern: str) -> list[Range]:
    """What an option takes over what it is compared with, of the rows whose names have the pattern."""
    rows = {name: shown for name, shown in table("features.md").items() if re.search(pattern, name)}
    return [divide(rounded(shown[0]), rounded(shown[1])) for shown in rows.values()]


def feature_times(pattern: str) -> list[Range]:
    """In milliseconds."""
    return [rounded(shown[0]) for name, shown in table("features.md").items() if re.search(pattern, name)]


def micro(milliseconds: list[Range]) -> list[Range]:
    """Of 100 calls, as the microseconds of one."""
    return [(10 * low, 10 * high) for low, high in milliseconds]


def inverse(ranges: list[Range]) -> list[Range]:
    return [divide((1, 1), each) for each in ranges]


def extra(ranges: list[Range], scale: float) -> list[Range]:
    """What is more than once as long."""
    return [((low - 1) * scale, (high - 1) * scale) for low, high in ranges]


# --- The claims: where, the words with a # for each number, and what those are


def large(units: int) -> bool:
    return units >= 256


def of_64(units: int) -> bool:
    return units == 64


def long_padded_lstm(row: Row, case: Row) -> bool:
    plain = case["cell"] == "lstm" and case["dtype"] == "float32" and not case["packed"]
    return plain and case["batch"] >= 32 and case["length"] > 1 and row["threads"] == 1


def in_bfloat16(row: Row, case: Row) -> bool:
    return case["dtype"] == "bfloat16"


def trains_one_step(row: Row, case: Row) -> bool:
    return case["length"] == 1 and row["mode"] == "training"


DERIVATIVES = "gradient penalty|Hessian|forward mode"
SMALLEST = "N=1, L=128, H=64: `(layer_norm|zoneout|recurrent_dropout|weight_dropout)"
FEW_UNITS = r"H=\d: against torch.nn"
STEP = r"^(RNN|GRU|LSTM), N=1, H=64: 100 calls of `step`"
CLAIMS: list[tuple[str, str, Callable[[], list[Range]]]] = [
    (README, "Of # layers drawn at random", lambda: exactly(len(random_layers(ZEN_5, 1)))),
    (
        README,
        "on a core of a Zen 5; half are more than # times as fast, the slowest # times",
        lambda: exactly(statistics.median(random_ratios(ZEN_5, 1)), min(random_ratios(ZEN_5, 1))),
    ),
    (
        README,
        "padded float32 LSTMs of 32 sequences and 128 units or more and many timesteps: # to # times",
        lambda: ends(speed_ups(ZEN_5, "torch.nn", long_padded_lstm)),
    ),
    (README, r"\| Zen 5 \| # of # \| # of # \|", lambda: comparisons(ZEN_5) + comparisons(f"{ZEN_5}-avx2")),
    (
        README,
        r"\| Zen 4 \| # of #, by # and # %\. .* \| # of #\. None came again \| \| Xeon with",
        lambda: comparisons(ZEN_4) + lost_by(ZEN_4) + comparisons(f"{ZEN_4}-avx2"),
    ),
    (README, r"\| Xeon with AMX \| # of #, by # to # %\. Four are", lambda: comparisons(AMX) + lost_by(AMX)),
    (
        README,
        r"\| Xeon, Ice Lake \(busy\) \| # of #, by # to # %\. .* \| # of #, by # % \|",
        lambda: [
            *comparisons(ICE_LAKE),
            *lost_by(ICE_LAKE),
            *comparisons(f"{ICE_LAKE}-avx2"),
            lost_by(f"{ICE_LAKE}-avx2")[1],
        ],
    ),
    (
        README,
        r"\*\*bfloat16\*\* is # to # times as fast as our float32 where the processor multiplies it by pairs, and "
        "# to # times",
        lambda: ends(speed_ups(ZEN_5, FLOAT32, in_bfloat16)) + ends(speed_ups(AMX, FLOAT32, in_bfloat16)),
    ),
    (
        GUIDE,
        r"from 256 units on, # to # of the time of our float32, with `activations=8` # to #\.",
        lambda: ends(eight_bits(BITS_16, "float32", large)) + ends(eight_bits(BITS_8, "float32", large)),
    ),
    (
        README,
        "Weights and activations of 8 bits are up to # times as fast",
        lambda: ends(inverse(eight_bits(BITS_8, "float32")))[1:],
    ),
    (
        README,
        "the dynamic quantization of torch and of ONNX Runtime in all # layers",
        lambda: exactly(len(eight_bits(BITS_8, TORCH_8))),
    ),
    (
        README,
        r"were off by up to #, torch's by #\. With activations of 16 bits, the default, it is #,",
        lambda: exactly(*(eight_bits_off(who, "GRU|LSTM") for who in (BITS_8, TORCH_8, BITS_16))),
    ),
    (README, r"\| # to # us for 64 units", lambda: micro(ends(feature_times(f"{STEP}.*inference")))),
    (README, "a seventh of it, # times the time", lambda: features("LSTM.*recompute")),
    (
        GUIDE,
        "64 units takes # to # us in inference, # to # of the time of torch.nn's cell; two layers take # to # of ",
        lambda: [
            *micro(ends(feature_times(f"{STEP}.*inference"))),
            *ends(features(f"{STEP}.*inference")),
            *ends(features("two layers")),
        ],
    ),
    (
        GUIDE,
        r"`lengths=` takes # to # of the time of torch.nn packed by hand, with backward # to #\.",
        lambda: [
            *ends(features("`lengths` against torch.nn.*forward$")),
            *ends(features("`lengths` against torch.nn.*backward$")),
        ],
    ),
    (GUIDE, "a seventh of what it keeps otherwise, and takes # times as long", lambda: features("LSTM.*recompute")),
    (
        GUIDE,
        "forward mode of plain layers are # to # times as fast as torch.nn's, per-sample gradients # to # times",
        lambda: ends(inverse(features(DERIVATIVES))) + ends(inverse(features("per-sample"))),
    ),
    (BENCHMARKS, r"\[# of #\]\(results/amd-epyc-family-26-model-2-2-cores.md", lambda: comparisons(ZEN_5)),
    (BENCHMARKS, r"\[# of #\]\(results/amd-epyc-family-26-model-2-2-cores-avx2", lambda: comparisons(f"{ZEN_5}-avx2")),
    (BENCHMARKS, r"\[# of #\]\(results/amd-epyc-family-25-model-17-2-cores.md", lambda: comparisons(ZEN_4)),
    (BENCHMARKS, r"\[# of #\]\(results/amd-epyc-family-25-model-17-2-cores-avx2", lambda: comparisons(f"{ZEN_4}-avx2")),
    (BENCHMARKS, r"\[# of #\]\(results/intel-[^)]*-167-2-cores.md", lambda: comparisons(AMX)),
    (BENCHMARKS, "-167-2-cores.md\\), by # to # %", lambda: lost_by(AMX)),
    (BENCHMARKS, r"\[# of #\]\(results/intel-[^)]*-106-2-cores.md", lambda: comparisons(ICE_LAKE)),
    (BENCHMARKS, r"\[# of #\]\(results/intel-[^)]*-106-2-cores-avx2", lambda: comparisons(f"{ICE_LAKE}-avx2")),
    (BENCHMARKS, "-17-2-cores.md\\), by # and # %", lambda: lost_by(ZEN_4)),
    (BENCHMARKS, "-17-2-cores-avx2.md\\), by # and # %", lambda: lost_by(f"{ZEN_4}-avx2")),
    (BENCHMARKS, "-106-2-cores.md\\), by # to # %", lambda: lost_by(ICE_LAKE)),
    (BENCHMARKS, "-106-2-cores-avx2.md\\), by # %", lambda: lost_by(f"{ICE_LAKE}-avx2")[1:]),
    (
        BENCHMARKS,
        "half of one sequence, # % of one timestep. None of #, on one core of the Zen 5 and on two, is slower than "
        "torch.nn, the least # times",
        lambda: [
            share(random_layers(ZEN_5), " L=1 "),
            *exactly(len(random_layers(ZEN_5)), min(random_ratios(ZEN_5))),
        ],
    ),
    (
        BENCHMARKS,
        "Five of the # on one core are padded float32 of at least 8 sequences, 16 timesteps and 64 units: # to # times",
        lambda: [
            *exactly(len(random_layers(ZEN_5, 1))),
            *ends(row["seconds"][0] / row["seconds"][1] for row in random_layers(ZEN_5, 1) if is_large_padded(row)),
        ],
    ),
    (
        BENCHMARKS,
        "\\[none of #\\]\\(results/intel-[^)]*-167-2-cores-random.md\\) is slower, the least # times",
        lambda: exactly(len(random_layers(AMX)), min(random_ratios(AMX))),
    ),
    (
        BENCHMARKS,
        "On Ice Lake \\[none of #\\].* came out slower twice: on one core the least #, on two # "
        "and, measured again, #\\.",
        lambda: exactly(
            len(random_layers(ICE_LAKE)),
            min(random_ratios(ICE_LAKE, 1)),
            min(random_ratios(ICE_LAKE, 2)),
            min(random_ratios(ICE_LAKE, 2, "again")),
        ),
    ),
    (
        BENCHMARKS,
        "\\[none of #\\]\\(results/amd-epyc-family-25-model-17-2-cores-random.md\\) is slower, the least # times",
        lambda: exactly(len(random_layers(ZEN_4)), min(random_ratios(ZEN_4))),
    ),
    (
        BENCHMARKS,
        "From 256 units on activations of 16 bits take # to # of the time of our float32, of 8 bits # to #;",
        lambda: ends(eight_bits(BITS_16, "float32", large)) + ends(eight_bits(BITS_8, "float32", large)),
    ),
    (
        BENCHMARKS,
        "of 64 units # to #, and # to #\\.",
        lambda: ends(eight_bits(BITS_16, "float32", of_64)) + ends(eight_bits(BITS_8, "float32", of_64)),
    ),
    (
        BENCHMARKS,
        "Activations of 8 bits take # to # of the time of torch's dynamic quantization and, of LSTMs, # to # of ONNX",
        lambda: ends(eight_bits(BITS_8, TORCH_8)) + ends(eight_bits(BITS_8, ONNX_8)),
    ),
    (
        BENCHMARKS,
        "of 16 bits # to #, and # to #: they take longer",
        lambda: ends(eight_bits(BITS_16, TORCH_8)) + ends(eight_bits(BITS_16, ONNX_8)),
    ),
    (
        BENCHMARKS,
        "multiplies bfloat16 by pairs, it is # to # times as fast as our float32 \\(training of one timestep # to #; "
        "on the Zen 4 an RNN of \\d sequences and \\d+ units in training #\\)",
        lambda: [
            *ends(
                speed_ups(ZEN_5, FLOAT32, lambda row, case: in_bfloat16(row, case) and not trains_one_step(row, case))
            ),
            *ends(speed_ups(ZEN_5, FLOAT32, lambda row, case: in_bfloat16(row, case) and trains_one_step(row, case))),
            ends(
                speed_ups(ZEN_4, FLOAT32, lambda row, case: in_bfloat16(row, case) and not trains_one_step(row, case))
            )[0],
        ],
    ),
    (
        BENCHMARKS,
        "by AMX's tiles # to # times \\(one timestep # to #\\), and # to # times as fast as torch's",
        lambda: [
            *ends(speed_ups(AMX, FLOAT32, lambda row, case: in_bfloat16(row, case) and case["length"] > 1)),
            *ends(speed_ups(AMX, FLOAT32, lambda row, case: in_bfloat16(row, case) and case["length"] == 1)),
            *ends(speed_ups(AMX, "torch.nn", in_bfloat16)),
        ],
    ),
    (
        BENCHMARKS,
        "on Ice Lake, which does neither any faster, # to #: there it can be slower",
        lambda: ends(speed_ups(ICE_LAKE, FLOAT32, in_bfloat16)),
    ),
    (
        BENCHMARKS,
        r"\bfloat16 is # to # times as fast",
        lambda: ends(
            ratio
            for name in (ZEN_5, ZEN_4, ICE_LAKE, AMX)
            for ratio in speed_ups(name, FLOAT32, lambda row, case: case["dtype"] == "float16")
        ),
    ),
    (README, "sequences take # to # of torch.nn's time", lambda: ends(features(FEW_UNITS))),
    (
        BENCHMARKS,
        "sequences take # to # of its time, with backward # to #\\.",
        lambda: [
            *ends(features(f"{FEW_UNITS}, forward$")),
            *ends(features(f"{FEW_UNITS}, forward \\+ backward$")),
        ],
    ),
    (BENCHMARKS, "A call of a cell takes # to # of", lambda: ends(features("100 calls of `(RNN|GRU|LSTM)Cell`"))),
    (BENCHMARKS, "`step` # to # of it", lambda: ends(features(STEP))),
    (BENCHMARKS, "and of two layers # to # of torch.nn's", lambda: ends(features("two layers"))),
    (BENCHMARKS, "Resets cost up to # % of a call", lambda: ends(extra(features("`resets`"), 100))[1:]),
    (BENCHMARKS, "cell states # %", lambda: ends(extra(features("`return_cell_states`"), 100))[1:]),
    (
        BENCHMARKS,
        "the dropouts cost # to # % of the smallest LSTM",
        lambda: ends(extra(features(f"^LSTM, {SMALLEST}"), 100)),
    ),
    (
        BENCHMARKS,
        "up to # times what the smallest RNN takes",
        lambda: ends(extra(features(f"^RNN, {SMALLEST}"), 1))[1:],
    ),
    (
        BENCHMARKS,
        "`lengths=` takes # to # of the time of torch.nn packed by hand, with backward # to #\\.",
        lambda: [
            *ends(features("`lengths` against torch.nn.*forward$")),
            *ends(features("`lengths` against torch.nn.*backward$")),
        ],
    ),
    (
        BENCHMARKS,
        "Second derivatives and forward mode take # to # of the time of torch.nn, per-sample gradients # to #, "
        "Jacobians by the weights # to #, ensembles by vmap over their weights # to #\\.",
        lambda: [
            end for pattern in (DERIVATIVES, "per-sample", "Jacobian", "vmap over") for end in ends(features(pattern))
        ],
    ),
]
NUMBER = r"(\d(?:[\d,]*\d)?(?:\.\d+)?)"


@pytest.mark.parametrize(
    ("document", "words", "numbers"), CLAIMS, ids=[f"{where}-{words}" for where, words, _ in CLAIMS]
)
def test_figures_are_of_the_results(document, words, numbers):
    text = " ".join((ROOT / document).read_text().split())
    found = re.findall(words.replace("#", NUMBER), text)
    assert len(found) == 1, f"{document} has these words {len(found)} times"
    shown = found[0] if isinstance(found[0], tuple) else (found[0],)
    expected = numbers()
    assert len(shown) == len(expected)
    for number, (low, high) in zip(shown, expected, strict=True):
        least, most = rounded(number.replace(",", ""))
        assert low <= most + 1e-9 and least - 1e-9 <= high, f"{number} should be {low:.4g} to {high:.4g}: {shown}"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*cores*.json")), ids=lambda path: path.stem)
def test_tables_are_of_the_results(path):
    """As run.py or random_shapes.py would write them today."""
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    import random_shapes
    import stored
    import table as run_table

    result = stored.load(path)
    markdown = (random_shapes if path.stem.endswith("random") else run_table).markdown
    assert path.with_suffix(".md").read_text() == markdown(result)
