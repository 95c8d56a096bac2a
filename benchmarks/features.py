"""What the options cost that torch.nn's layers do not have: each beside what it replaces, in one run on one thread.

    taskset -c 0 python benchmarks/features.py

Each figure is the least processor time of many interleaved repeats, so that other processes add little; the ratio is
what to read.
Writes results/features.md.
"""

from __future__ import annotations

import copy
import functools
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnn_ext
from rnn_ext._files import write
from rnn_ext._options import Parser, guarded, output_file, positive_number
from rnn_ext.bench import machine

RESULTS = Path(__file__).parent / "results" / "features.md"
DIFFERENTIATED = ((1, 128, 64), (16, 30, 32), (64, 50, 128))  # N, L, H
PER_SAMPLE = ((64, 8, 16), (64, 30, 32), (32, 50, 128))
ENSEMBLES = ((10, 1, 20, 16), (10, 32, 20, 32), (64, 1, 5, 16))  # models, N, L, H
FEW_UNITS = ((65536, 4, 1), (4096, 32, 1), (4096, 32, 2), (4096, 1, 2), (256, 16, 4), (32, 32, 8))
JACOBIANS = ((1, 5, 8), (1, 20, 32), (4, 10, 16))
LAYERS = {"RNN": rnn_ext.RNN, "GRU": rnn_ext.GRU, "LSTM": rnn_ext.LSTM}


class Row(NamedTuple):
    """One comparison: `feature` should take at most `target` times as long as `plain`."""

    what: str
    feature: Callable[[], object]
    plain: Callable[[], object]
    target: float | None
    same: bool = True  # both compute the same numbers


def measure(calls: list[Callable[[], object]], seconds: float) -> list[float]:
    """The least processor time of each, of interleaved repeats for about so long."""
    best = [float("inf")] * len(calls)
    for call in calls:
        call()
    begin = time.perf_counter()
    repeats = 0
    while repeats < 5 or time.perf_counter() - begin < seconds:
        for i, call in enumerate(calls):
            start = time.process_time()
            call()
            best[i] = min(best[i], time.process_time() - start)
        repeats += 1
    return best


def times(call: Callable[[], object], count: int) -> Callable[[], None]:
    """So many calls as one, where one is too short to be timed."""

    def run() -> None:
        for _ in range(count):
            call()

    return run


def forward(call: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    return torch.no_grad()(call)


def training(call: Callable[[], tuple[Tensor, ...]], module: nn.Module, input: Tensor) -> Callable[[], object]:
    """Forward, and backward from a given gradient of each result to the parameters and the input."""
    leaves = [input, *module.parameters()]
    grads = [torch.randn_like(t) for t in forward(call)()]
    return lambda: torch.autograd.grad(call(), leaves, grads)


def both_modes(what: str, feature: Callable, plain: Callable, module: nn.Module, input: Tensor, target: float | None,
               same: bool = True) -> list[Row]:  # fmt: skip
    return [
        Row(f"{what}, forward", forward(feature), forward(plain), target, same),
        Row(
            f"{what}, forward + backward",
            training(feature, module, input),
            training(plain, module, input),
            target,
            same,
        ),
    ]


def resets() -> list[Row]:
    rows = []
    for name, (L, N, H) in (
        ("LSTM", (128, 32, 128)),
        ("GRU", (128, 8, 64)),
        ("RNN", (128, 8, 64)),
        ("LSTM", (128, 1, 64)),
    ):
        layer, x = LAYERS[name](H, H), torch.randn(L, N, H).requires_grad_()
        mask = torch.rand(L, N) < 0.03
        rows += both_modes(
            f"{name}, N={N}, L={L}, H={H}: 3 % `resets` against none",
            lambda layer=layer, x=x, mask=mask: (layer(x, resets=mask)[0],),
            lambda layer=layer, x=x: (layer(x)[0],),
            layer,
            x,
            1.15,
            same=False,
        )
    return rows


def cell_states() -> list[Row]:
    rows = []
    for L, N, H in ((128, 32, 128), (128, 1, 64), (128, 32, 512)):
        layer, x = rnn_ext.LSTM(H, H), torch.randn(L, N, H).requires_grad_()
        rows += both_modes(
            f"LSTM, N={N}, L={L}, H={H}: `return_cell_states` against none",
            lambda layer=layer, x=x: (lambda r: (r[0], r[2]))(layer(x, return_cell_states=True)),
            lambda layer=layer, x=x: (layer(x)[0],),
            layer,
            x,
            1.1,
            same=False,
        )
    return rows


def lengths() -> list[Row]:
    rows = []
    cases = (
        ("short texts, 5 to 50 tokens", "LSTM", 100, 128, True, torch.randint(5, 51, (32,))),
        ("long ragged rows, 20 to 500", "LSTM", 128, 128, False, torch.randint(20, 501, (32,))),
        ("long ragged rows, 20 to 500", "GRU", 128, 128, False, torch.randint(20, 501, (32,))),
    )
    for words, name, I, H, bidirectional, given in cases:  # noqa: E741
        layer = LAYERS[name](I, H, batch_first=True, bidirectional=bidirectional)
        theirs = rnn_ext.to_native(rnn_ext.convert(LAYERS[name](I, H, batch_first=True, bidirectional=bidirectional)))
        theirs.load_state_dict(layer.state_dict())
        x = torch.randn(32, int(given.max()), I).requires_grad_()

        def packed(module, x=x, given=given):
            return module(pack_padded_sequence(x, given, batch_first=True, enforce_sorted=False))

        def output_by_hand(module, packed=packed):
            return (pad_packed_sequence(packed(module)[0], batch_first=True)[0],)

        def output(layer=layer, x=x, given=given):
            return (layer(x, lengths=given)[0],)

        def state(result, name=name):
            return (result[1][0] if name == "LSTM" else result[1],)

        shape = f"{'bidirectional ' if bidirectional else ''}{name}, N=32, I={I}, H={H}, {words}"
        for whose, module in (("our layer packed by hand", layer), ("torch.nn's packed by hand", theirs)):
            plain = lambda module=module, f=output_by_hand: f(module)  # noqa: E731
            what = f"{shape}: `lengths` against {whose}"
            rows.append(Row(f"{what}, forward", forward(output), forward(plain), 1.0))
            rows.append(Row(f"{what}, forward + backward", training(output, layer, x), training(plain, module, x), 1.0,
                            same=False))  # fmt: skip
        rows.append(
            Row(
                f"{shape}: `lengths` against our layer packed by hand, only h_n used, forward + backward",
                training(lambda layer=layer, x=x, given=given, f=state: f(layer(x, lengths=given)), layer, x),
                training(lambda layer=layer, p=packed, f=state: f(p(layer)), layer, x),
                1.0,
                same=False,
            )
        )
    return rows


def streaming() -> list[Row]:
    rows = []
    x = torch.randn(1, 64)
    for name in ("RNN", "GRU", "LSTM"):
        layer, ours, theirs = (
            getattr(of, kind)(64, 64) for of, kind in ((rnn_ext, name), (rnn_ext, f"{name}Cell"), (nn, f"{name}Cell"))
        )
        for cell in (ours, theirs):
            cell.load_state_dict({key.removesuffix("_l0"): value for key, value in layer.state_dict().items()})
        h = torch.randn(2, 1, 64)
        flat, state = (tuple(h), tuple(h[:, None])) if name == "LSTM" else (h[0], h[:1])
        calls = [
            (
                f"{name}, N=1, H=64: 100 calls of `step` against `nn.{name}Cell`",
                lambda m=layer, s=state: m.step(x, s),
                0.5,
            ),
            (
                f"{name}, N=1, H=64: 100 calls of `{name}Cell` against `nn.{name}Cell`",
                lambda m=ours, s=flat: m(x, s),
                0.7,
            ),
        ]
        plain = times(lambda m=theirs, s=flat: m(x, s), 100)
        for what, call, target in calls:
            rows.append(Row(f"{what}, inference", torch.inference_mode()(times(call, 100)),
                            torch.inference_mode()(plain), target, same=False))  # fmt: skip
            rows.append(Row(f"{what}, in grad mode", times(call, 100), plain, target, same=False))
        stack, native = getattr(rnn_ext, name)(64, 64, 2), getattr(nn, name)(64, 64, 2)
        state = tuple(torch.randn(2, 2, 1, 64)) if name == "LSTM" else torch.randn(2, 1, 64)
        rows.append(Row(f"{name}, two layers, N=1, H=64: 100 calls of `step` against `nn.{name}`, inference",
                        torch.inference_mode()(times(lambda m=stack, s=state: m.step(x, s), 100)),
                        torch.inference_mode()(times(lambda m=native, s=state: m(x[None], s), 100)), 0.5,
                        same=False))  # fmt: skip
    for N, L, H, size in ((1, 128, 64, 8), (32, 128, 128, 8)):
        module, input = rnn_ext.LSTM(H, H), torch.randn(L, N, H)

        def chunks(module=module, input=input, size=size):
            outputs, hx = [], None
            for chunk in input.split(size):
                output, hx = module(chunk, hx)
                outputs.append(output)
            return (torch.cat(outputs),)

        def whole(module=module, input=input):
            return (module(input)[0],)

        rows.append(Row(f"LSTM, N={N}, L={L}, H={H}: chunks of {size} timesteps against one call, forward",
                        forward(chunks), forward(whole), None))  # fmt: skip
    return rows


def output_of(layer: nn.Module, input: Tensor) -> Callable[[], tuple[Tensor]]:
    return lambda: (layer(input)[0],)


def variants() -> list[Row]:
    lstm = ((1, 128, 64), (1, 512, 256), (8, 128, 128), (32, 128, 256))
    masked = {"zoneout": 0.1, "recurrent_dropout": 0.2}
    cases = [("LSTM", size, {"layer_norm": True, **masked, "weight_dropout": 0.3}) for size in lstm]
    cases += [(name, lstm[0], masked) for name in ("GRU", "RNN")]
    rows = []
    for name, (N, L, H), options in cases:
        for option, value in options.items():
            layer, plain = LAYERS[name](H, H, **{option: value}), LAYERS[name](H, H)
            x = torch.randn(L, N, H)
            what = f"{name}, N={N}, L={L}, H={H}: `{option}={value}` against none"
            calls = [output_of(m, x) for m in (layer, plain)]
            target = 1.5 if name == "LSTM" else None
            if option in ("layer_norm", "zoneout"):  # the others do nothing there
                inference = [forward(output_of(copy.deepcopy(m).eval(), x)) for m in (layer, plain)]
                rows.append(Row(f"{what}, eval, forward", *inference, target, same=False))
            rows.append(Row(f"{what}, training, forward", *calls, target, same=False))
            x.requires_grad_()
            both = [training(call, m, x) for call, m in zip(calls, (layer, plain), strict=True)]
            rows.append(Row(f"{what}, training, forward + backward", *both, target, same=False))
    return rows


def recompute() -> list[Row]:
    N, L, H = 32, 128, 256
    rows = []
    for name, kind in LAYERS.items():
        x = torch.randn(L, N, H).requires_grad_()
        again, once = (training(output_of(layer, x), layer, x) for layer in (kind(H, H, recompute=True), kind(H, H)))
        what = f"{name}, N={N}, L={L}, H={H}: `recompute=True` against none, forward + backward"
        rows.append(Row(what, again, once, None, same=False))
    return rows


def twins(name: str, size: int, **options: bool) -> tuple[nn.Module, nn.Module]:
    """Our layer and torch.nn's, with the same weights."""
    ours, theirs = LAYERS[name](size, size, **options), getattr(nn, name)(size, size, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def few_units() -> list[Row]:
    """Of many sequences, whose kernels have sequences in the lanes of vectors; beside torch.nn's layers."""
    rows = []
    for name, (N, L, H) in itertools.product(LAYERS, FEW_UNITS):
        ours, theirs = twins(name, H)
        x = torch.randn(L, N, H).requires_grad_()
        what = f"{name}, N={N}, L={L}, H={H}: against torch.nn"
        calls = [output_of(m, x) for m in (ours, theirs)]
        rows.append(Row(f"{what}, forward", *map(forward, calls), 1.0))
        both = [training(call, m, x) for call, m in zip(calls, (ours, theirs), strict=True)]
        rows.append(Row(f"{what}, forward + backward", *both, 1.0, same=False))
    return rows


def derivatives() -> list[Row]:
    """Beside torch.nn's layers, of which the LSTM has no forward mode."""
    rows = []
    for name, (N, L, H) in itertools.product(LAYERS, DIFFERENTIATED):
        ours, theirs = twins(name, H)
        x, direction = torch.randn(2, L, N, H)

        def penalty(module, x=x):
            leaf = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(module(leaf)[0].sum(), leaf, create_graph=True)
            loss = (grad.flatten(1).norm(dim=1) - 1).square().mean()
            return torch.autograd.grad(loss, [module.weight_ih_l0, module.weight_hh_l0])

        def product(module, x=x):
            parameters = list(module.parameters())
            grads = torch.autograd.grad(module(x)[0].square().mean(), parameters, create_graph=True)
            return torch.autograd.grad(grads, parameters, parameters)

        def forward_mode(module, x=x, direction=direction):
            return torch.func.jvp(lambda x: module(x)[0], (x,), (direction,))

        kinds = {"gradient penalty": penalty, "product of the parameters' Hessian": product}
        if name != "LSTM":
            kinds["forward mode"] = torch.no_grad()(forward_mode)
        for what, fn in kinds.items():
            calls = [functools.partial(fn, module) for module in (ours, theirs)]
            rows.append(Row(f"{name}, N={N}, L={L}, H={H}: {what} against torch.nn", *calls, 1.0))
    return rows


def by_weights() -> list[Row]:
    """Gradients of each sample's own loss, and Jacobians, by the weights; beside torch.nn's layers, which vmap needs
    to be given a state."""
    rows = []
    for name, (N, L, H) in itertools.product(LAYERS, PER_SAMPLE):
        ours, theirs = twins(name, H, batch_first=True)
        x, zeros = torch.randn(N, 1, L, H), torch.zeros(N, 1, 1, H)

        def per_sample(module, x=x, zeros=zeros, name=name):
            def loss(parameters, x, zeros):
                state = (zeros, zeros) if name == "LSTM" else zeros
                return torch.func.functional_call(module, parameters, (x, state))[0].square().mean()

            parameters = {key: p.detach() for key, p in module.named_parameters()}
            return torch.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, zeros)

        calls = [functools.partial(per_sample, module) for module in (ours, theirs)]
        rows.append(Row(f"{name}, N={N}, L={L}, H={H}: per-sample gradients against torch.nn", *calls, 1.0))
    for name, (N, L, H) in itertools.product(LAYERS, JACOBIANS):
        ours, theirs = twins(name, H)
        x = torch.randn(L, N, H)

        def jacobian(module, x=x):
            parameters = {key: p.detach() for key, p in module.named_parameters()}
            return torch.func.jacrev(lambda p: torch.func.functional_call(module, p, (x,))[0])(parameters)

        calls = [functools.partial(jacobian, module) for module in (ours, theirs)]
        rows.append(Row(f"{name}, N={N}, L={L}, H={H}: Jacobian by the weights against torch.nn", *calls, 1.0))
    return rows


def ensembles() -> list[Row]:
    """Training of models of the same shape side by side, beside torch.nn's layers under the same vmap."""
    rows = []
    for name, (models, N, L, H) in itertools.product(LAYERS, ENSEMBLES):
        calls = []
        ours = [LAYERS[name](H, H, batch_first=True) for _ in range(models)]
        parameters = {key: p.detach() for key, p in torch.func.stack_module_state(ours)[0].items()}
        x, zeros = torch.randn(N, L, H), torch.zeros(models, 1, N, H)
        for layer in (ours[0], getattr(nn, name)(H, H, batch_first=True)):

            def loss(parameters, zeros, x=x, name=name, layer=layer):
                state = (zeros, zeros) if name == "LSTM" else zeros
                return torch.func.functional_call(layer, parameters, (x, state))[0].square().mean()

            calls.append(functools.partial(torch.vmap(torch.func.grad(loss)), parameters, zeros))
        what = f"{models} {name}s, N={N}, L={L}, H={H}: vmap over their weights against torch.nn"
        rows.append(Row(what, *calls, 1.0))
    return rows


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=positive_number(), default=2, help="for each comparison")
    parser.add_argument("--only", default="", help="comparisons with this in their description")
    parser.add_argument("--output", type=output_file, help="(results/features.md; with --only: none)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    about = machine()
    lines = [
        "# What the options cost",
        "",
        f"`python benchmarks/features.py`, one thread, float32, {about['processor']}, our kernels for "
        f"{about['instructions']}, torch {torch.__version__}, {about['date'][:10]}; least processor time of "
        "interleaved repeats.",
        "",
        "| comparison | option (ms) | plain (ms) | ratio | target |",
        "|---|---:|---:|---:|---:|",
    ]
    head = len(lines)
    parts = (resets, cell_states, lengths, variants, recompute, streaming)
    parts += (few_units, derivatives, by_weights, ensembles)
    for row in itertools.chain.from_iterable(part() for part in parts):
        if args.only not in row.what:
            continue
        if row.same:
            torch.testing.assert_close(row.feature(), row.plain(), rtol=1e-4, atol=1e-5)
        option, plain = measure([row.feature, row.plain], args.seconds)
        ratio = option / plain
        missed = " **missed**" if row.target is not None and ratio > row.target else ""
        target = "" if row.target is None else f"{row.target:g}{missed}"
        lines.append(f"| {row.what} | {option * 1e3:.4f} | {plain * 1e3:.4f} | {ratio:.2f} | {target} |")
        print(lines[-1], flush=True)
    if not lines[head:]:
        parser.error(f"--only {args.only!r} matches no comparison")
    output = args.output or (None if args.only else RESULTS)
    if output:
        write(output, "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(guarded(main))
