"""``rnn_ext::random_mask``, which draws the masks of dropout and zoneout on the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from util import instruction_sets

from rnn_ext import ops


def philox(seed: int, counter: int) -> list[int]:
    """Philox4x32-10 as its paper has it."""
    low = 2**32 - 1
    x, key = [counter & low, counter >> 32, 0, 0], [seed & low, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [b >> 32 ^ x[1] ^ key[0], b & low, a >> 32 ^ x[3] ^ key[1], a & low]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return x


def draw(seed: int, *size: int, p: float = 0.5, value: float = 1.0, dtype=torch.float32) -> Tensor:
    return torch.ops.rnn_ext.random_mask(torch.tensor(seed), size, p, value, dtype)


def test_known_answers():
    """The test vector published with the algorithm; and the op's numbers, by every instruction set."""
    assert philox(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for seed in (0, 2**63 - 1, -5):
        # In blocks of 16 counters, one word of each after the other.
        words = [philox(seed % 2**64, 16 * block + k)[w] for block in range(3) for w in range(4) for k in range(16)]
        for p in (0.0, 0.25, 0.7, 1.0):
            for dtype in (torch.float32, torch.float64):
                want = torch.tensor([3.0 if word < p * 2**32 else 0 for word in words], dtype=dtype)
                for _ in instruction_sets():
                    for size in (0, 1, 33, 129, 192):
                        assert torch.equal(draw(seed, size, p=p, value=3, dtype=dtype), want[:size])


def test_what_is_certain():
    """Also where a word is the largest there is: element 18,320,394 of this one."""
    assert draw(40, 2**25, p=1.0).all()
    assert draw(40, 2**25, p=1 - 2**-32)[18320394] == 0


def test_frequencies_and_independence():
    """As often as asked, also in each column; neither neighbours nor seeds go together."""
    n = 512
    for p in (1e-3, 0.1, 0.5, 0.9):
        mask = draw(1, n, n, p=p)
        sigma = math.sqrt(p * (1 - p))
        assert abs(mask.mean() - p) < 4 * sigma / n
        assert (mask.mean(0) - p).abs().max() < 5 * sigma / math.sqrt(n)
        centred = mask - p
        others = [draw(2, n, n, p=p) - p, *(centred.flatten().roll(k).view(n, n) for k in (1, 2, 16, 64, n))]
        for other in others:
            assert abs((centred * other).mean()) < 5 * sigma**2 / n
    assert torch.equal(draw(1, 7, 9), draw(1, 63).view(7, 9))


class Calls(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


def test_from_torchs_generator(monkeypatch):
    """The same seed, the same mask; vmap's randomness; state restored by whoever restores torch's."""

    def mask() -> Tensor:
        return ops.random_mask((4, 40), 0.5, 2.0, torch.float64, torch.device("cpu"))

    torch.manual_seed(3)
    first, state, second = mask(), torch.get_rng_state(), mask()
    assert set(first.unique().tolist()) == {0, 2} and not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(mask(), second)
    torch.set_rng_state(state)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randint", None)
        assert torch.equal(mask(), second)  # by the binding
    torch.set_rng_state(state)
    with Calls() as calls:  # what Python looks at takes another way
        assert torch.equal(mask(), second)
    assert torch.ops.rnn_ext.random_mask.default in calls.seen
    of = {r: torch.vmap(lambda x: x + mask(), randomness=r)(torch.zeros(3, 1)) for r in ("same", "different")}
    assert torch.equal(of["same"][0], of["same"][1]) and not torch.equal(of["different"][0], of["different"][1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda x: x + mask())(torch.zeros(3, 1))


def test_compiled():
    compiled = torch.compile(lambda x: x + draw(1, x.shape[0], 3), backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (5, 6):
        assert torch.equal(compiled(torch.zeros(n, 3)), draw(1, n, 3))


def test_bad_arguments():
    with pytest.raises(RuntimeError, match="expected seed to be one number of int64, got Double"):
        torch.ops.rnn_ext.random_mask(torch.zeros((), dtype=torch.float64), (3,), 0.5, 1.0, torch.float32)
    with pytest.raises(RuntimeError, match=r"expected seed to be one number of int64, got Long ?\[2\]"):
        torch.ops.rnn_ext.random_mask(torch.zeros(2, dtype=torch.int64), (3,), 0.5, 1.0, torch.float32)
    with pytest.raises(ValueError, match=r"expected p to be a probability, got 1\.5"):
        draw(1, 3, p=1.5)
    with pytest.raises(RuntimeError, match="expected dtype to be float32 or float64, got Half"):
        draw(1, 3, dtype=torch.float16)


def test_negative_probability():
    with pytest.raises(ValueError, match=r"expected p to be a probability, got -0\.5"):
        draw(1, 3, p=-0.5)
