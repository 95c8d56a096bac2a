"""Two gloo processes train what one process trains; and what big models do to save memory changes no gradient."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor
from torch.utils.checkpoint import checkpoint
from util import CELLS, check_gradients

import rnn_ext

ROOT = Path(__file__).resolve().parent.parent
KINDS = {"rnn_tanh": rnn_ext.RNN, "rnn_relu": rnn_ext.RNN, "gru": rnn_ext.GRU, "lstm": rnn_ext.LSTM}
STEPS, N, L, I, H = 3, 6, 7, 5, 8  # noqa: E741


class Tagger(nn.Module):
    """All three layers and a cell, ragged input."""

    def __init__(self):
        super().__init__()
        self.first = rnn_ext.LSTM(I, H, 2, batch_first=True, bidirectional=True)
        self.second = rnn_ext.GRU(2 * H, H, batch_first=True)
        self.third = rnn_ext.RNN(H, H, batch_first=True, nonlinearity="tanh")
        self.cell = rnn_ext.LSTMCell(H, H)
        self.fc = nn.Linear(H, 2)

    def forward(self, input, lengths):
        output, _ = self.first(input, lengths=lengths)
        output, _ = self.second(output)
        _, last = self.third(output, lengths=lengths)
        return self.fc(self.cell(last[0], self.cell(last[0]))[0])


def train(model: nn.Module, wrapped: nn.Module, share: slice) -> list[torch.Tensor]:
    """A few steps on this share of each batch; the parameters, in full."""
    draw = torch.Generator().manual_seed(5)
    optimizer = torch.optim.Adam(wrapped.parameters(), lr=0.05)
    for _ in range(STEPS):
        input = torch.randn(N, L, I, generator=draw, dtype=torch.float64)
        target = torch.randn(N, 2, generator=draw, dtype=torch.float64)
        lengths = torch.randint(0, L + 1, (N,), generator=draw)
        optimizer.zero_grad()
        (wrapped(input[share], lengths[share]) - target[share]).square().mean().backward()
        optimizer.step()
    parameters = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [p.detach().clone() for p in parameters]


def check_sharded_batch(mesh: dist.DeviceMesh) -> None:
    """Input and states that lie on several processes: torch's operators, whose parts know how to be shared out."""
    layer = rnn_ext.GRU(I, H).double()
    input, hx = torch.randn(L, N, I, dtype=torch.float64), torch.randn(1, N, H, dtype=torch.float64)
    expected = torch.autograd.grad(layer(input, hx)[0].square().sum(), list(layer.parameters()))
    distribute_module(layer, mesh)
    given = [distribute_tensor(x, mesh, [Shard(1)]) for x in (input, hx)]
    assert "sharding strategy" in rnn_ext.explain(layer, given[0]).reason
    found = torch.autograd.grad(layer(*given)[0].square().sum(), list(layer.parameters()))
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.full_tensor(), want)


def work(rank: int, folder: str) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Tagger().double()
    share = slice(rank, None, 2)
    results = {}
    ddp = copy.deepcopy(model)
    results["ddp"] = train(ddp, nn.parallel.DistributedDataParallel(ddp), share)
    mesh = dist.init_device_mesh("cpu", (2,))
    for name in ("fsdp", "fsdp of the whole"):
        sharded = copy.deepcopy(model)
        for layer in sharded.children() if name == "fsdp" else ():
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        assert all(isinstance(p, DTensor) for p in sharded.parameters())
        results[name] = train(sharded, sharded, share)
    check_sharded_batch(mesh)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    # What torch caches of a DTensor holds the process group, whose threads outlive it: one that lets go of a tensor
    # while the interpreter shuts down ends the process ("terminate called without an active exception").
    sys.stderr.flush()
    os._exit(0)


def test_two_processes_train_as_one(tmp_path):
    torch.manual_seed(0)
    model = Tagger().double()
    start = [p.detach().clone() for p in model.parameters()]
    expected = train(model, model, slice(None))
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(start, expected, strict=True))
    command = [sys.executable, __file__]
    children = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment()) for rank in (0, 1)]
    assert [child.wait(timeout=100) for child in children] == [0, 0]
    for rank in (0, 1):
        for name, trained in torch.load(tmp_path / f"{rank}.pt").items():
            for got, want in zip(trained, expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


# A thread of gloo that outlives the process group may end the process while the interpreter shuts down.
NO_THREAD_IS_LEFT = """
threads = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
assert not any("gloo" in name for name in threads), threads
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_torchrun_example(tmp_path):
    example = tmp_path / "example.py"
    example.write_text((ROOT / "examples" / "09_torchrun.py").read_text(encoding="utf-8") + NO_THREAD_IS_LEFT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(example)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 process(es): ")


# --- memory -------------------------------------------------------------------------------------------------------


def offloaded(fn, *args):
    with torch.autograd.graph.save_on_cpu():
        return fn(*args)


def packed(fn, *args):
    """Saved tensors leave memory, here as bytes."""

    def pack(t):
        return t.detach().clone().numpy().tobytes() if t.numel() else b"", t.shape, t.dtype

    def unpack(kept):
        data, shape, dtype = kept
        return torch.frombuffer(bytearray(data), dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return fn(*args)


WAYS = {
    "checkpoint, reentrant": lambda fn, *args: checkpoint(fn, *args, use_reentrant=True),
    "checkpoint": lambda fn, *args: checkpoint(fn, *args, use_reentrant=False),
    "save_on_cpu": offloaded,
    "hooks": packed,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cell", CELLS)
def test_saving_memory(cell, way):
    """Padded with lengths and resets, in training with dropout, whose mask a second forward draws again."""
    options = {"nonlinearity": "relu"} if cell == "rnn_relu" else {}
    module = KINDS[cell](I, H, 2, dropout=0.5, bidirectional=True, dtype=torch.float64, **options)
    input = torch.randn(L, N, I, dtype=torch.float64)
    lengths, resets = torch.randint(0, L + 1, (N,)), torch.rand(L, N) < 0.2

    def run(x):
        output, state = module(x, lengths=lengths, resets=resets)
        return output, *(state if isinstance(state, tuple) else (state,))

    found = []
    for call in (lambda fn, *args: fn(*args), WAYS[way]):
        torch.manual_seed(1)
        x = input.clone().requires_grad_()
        loss = sum(t.cos().sum() for t in call(run, x))
        module.zero_grad()
        loss.backward()
        grads = {name: p.grad.clone() for name, p in module.named_parameters()}
        found.append({"loss": loss.detach(), "input": x.grad, **grads})
    check_gradients(*found)


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
