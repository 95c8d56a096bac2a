"""Many callers at once, one or two threads inside a call, and processes made before and after a call."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from util import CELLS, LAYOUTS, Case, build, cotangents, gradients, instruction_sets, run, same_bits

import rnn_ext
from rnn_ext import ops

if ops.is_available():
    from rnn_ext import _C

CASES = [
    Case(cell, layout, True, proj=5 if cell == "lstm" else 0, size=(7, 5, 9, 21))
    for cell in CELLS
    for layout in LAYOUTS
]
# More multiply-adds than a kernel leaves to one thread.
LARGE = Case("lstm", "dense", size=(8, 64, 64, 128))


def together(count: int, job) -> None:
    """Run ``job(index)`` in that many threads that start at once; the first exception is raised here."""
    barrier = threading.Barrier(count)

    def start(index: int):
        barrier.wait()
        return job(index)

    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(start, index) for index in range(count)]:
            future.result()


@pytest.mark.parametrize("threads", [1, 2])
def test_many_python_threads(threads):
    """Each with problems of its own and all with one in common, forward and backward: the bits of a lone call."""
    torch.set_num_threads(threads)
    problems = [build(case).to(torch.float32) for case in CASES]
    expected = [gradients(run, problem) for problem in problems]

    def job(index: int) -> None:
        torch.set_num_threads(threads)
        for turn in range(2 * len(problems)):
            chosen = (index * 5 + turn) % len(problems) if turn % 3 else 0
            values, grads = gradients(run, problems[chosen])
            same_bits(values, expected[chosen][0])
            same_bits(grads, expected[chosen][1])

    together(8, job)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("cell", CELLS)
def test_threads_that_share_the_units_of_a_small_batch(cell, dtype):
    """The bits of one thread, for numbers of threads that divide the units evenly or not, or exceed the processors."""
    length = 450 if cell.startswith("rnn") else 120  # enough work that a second thread is woken
    for batch, bidirectional in itertools.product((3, 1), (False, True)):
        hidden = 258 if bidirectional else 250  # the gates of the last 2 share a vector of 16, those of 10 do not
        flags = {"lengths": bidirectional and batch > 1, "resets": not bidirectional}
        problem = build(Case(cell, "dense", bidirectional, size=(length, batch, 5, hidden), **flags)).to(dtype)
        torch.set_num_threads(1)
        values, grads = gradients(run, problem)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            again, again_grads = gradients(run, problem)
            same_bits(again, values)
            same_bits(again_grads, grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_a_thread_that_computes_the_input_gates_of_one_sequence(cell, dtype):
    """The bits of one thread, with input gates kept for backward and in a room that is used again. More threads than
    there are processors do without."""
    for bidirectional, hidden in ((False, 67), (True, 48)):  # with a tail and an odd number of inputs, and without
        problem = build(Case(cell, "dense", bidirectional, size=(643, 1, hidden - 6, hidden))).to(dtype)
        if bidirectional:
            problem = dataclasses.replace(problem, resets=torch.arange(643).remainder(50).eq(0).unsqueeze(1))
        for _ in instruction_sets():
            torch.set_num_threads(1)
            values, grads = gradients(run, problem)
            for threads in (2, 4):
                torch.set_num_threads(threads)
                again, again_grads = gradients(run, problem)
                same_bits(again, values)
                same_bits(again_grads, grads)
                with torch.no_grad():
                    same_bits(run(problem), values)


def test_many_python_threads_on_a_large_problem():
    torch.set_num_threads(2)
    problem = build(LARGE).to(torch.float32)
    values, grads = gradients(run, problem)

    def job(index: int) -> None:
        torch.set_num_threads(1 + index % 2)
        for _ in range(2):
            again, again_grads = gradients(run, problem)
            same_bits(again, values)
            same_bits(again_grads, grads)

    together(4, job)


def test_mistakes_in_many_threads():
    """Exceptions raised while others compute neither mix nor leak into sound calls."""
    problem = build(CASES[0])
    expected = run(problem)

    def job(index: int) -> None:
        for _ in range(30):
            if index % 2:
                same_bits(run(problem), expected)
            else:
                features = 10 + index
                with pytest.raises(RuntimeError, match=f"got {features}"):
                    run(problem.having({"input": torch.zeros(7, 5, features, dtype=torch.float64)}))

    together(6, job)


def test_shared_module_and_backward_in_another_thread():
    """Forward here, backward there; gradients of concurrent backwards add up in the shared parameters."""
    module = rnn_ext.LSTM(9, 21, 2, bidirectional=True, dtype=torch.float64, backend="custom")
    input = torch.randn(5, 3, 9, dtype=torch.float64)
    module(input)[0].sum().backward()
    one = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    losses = [module(input)[0].sum() for _ in range(6)]
    together(6, lambda index: losses[index].backward())
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.grad, 6 * one[name], rtol=1e-12, atol=1e-12)


def ticks_during(call) -> int:
    """How often this thread gets on in the middle of a call that another one makes."""
    ticks, span = [], []

    def timed() -> None:
        start = time.perf_counter()
        call()
        span.extend((start, time.perf_counter()))

    thread = threading.Thread(target=timed)
    thread.start()
    while thread.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.0005)
    start, end = span
    return sum(start + (end - start) * 0.2 < tick < end - (end - start) * 0.2 for tick in ticks)


def test_other_python_threads_run_meanwhile():
    """The GIL is released: this thread gets on while another is inside one call; not in each, on a busy machine."""
    problem = build(Case("lstm", size=(600, 16, 64, 128))).to(torch.float32).requiring()
    results = run(problem)
    grads = list(cotangents(results).values())
    assert any(ticks_during(lambda: run(problem)) for _ in range(20)), "no other thread ran during forward"
    backward = torch.autograd.backward
    assert any(ticks_during(lambda: backward(list(results.values()), grads, retain_graph=True)) for _ in range(20)), (
        "no other thread ran during backward"
    )


def script(text: str, **env: str) -> str:
    """Run a script in a fresh interpreter and give back what it printed; a hang is an error."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **env}
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{text}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


FORKED = """
import os, signal, torch, traceback, rnn_ext
from test_threads import LARGE, CASES
from util import build, cotangents, run

torch.set_num_threads(2)
jobs = []
for case, dtype in ((CASES[0], torch.float32), (LARGE, torch.float32), (LARGE, torch.float16)):
    problem = build(case).to(dtype).requiring()
    jobs.append((problem, list(problem.leaves().values()), list(cotangents(run(problem)).values())))

def compute(problem, leaves, grad_of):
    results = list(run(problem).values())
    return [t.detach() for t in results] + list(torch.autograd.grad(results, leaves, grad_of))

expected = [compute(*job) for job in jobs]

def child():
    pid = os.fork()
    if pid == 0:
        signal.alarm(100)  # a child that hangs ends by itself
        try:
            for job, want in zip(jobs, expected):
                # torch's own operators would hang here, too: comparing is one of them
                assert all(torch.equal(a, b) for a, b in zip(compute(*job), want))
            assert torch.get_num_threads() == 1
            output, _ = rnn_ext.GRU(64, 64, 2, dropout=0.1)(torch.randn(100, 32, 64))
            output.sum().backward()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0

child()
for job, want in zip(jobs, expected):  # and the parent goes on
    assert all(torch.equal(a, b) for a, b in zip(compute(*job), want))
child()
print("well")
"""


def test_fork_after_use():
    """The child inherits a pool of threads that do not exist there, and must not wait for them: nor does torch, which
    converts for float16 and computes between layers."""
    assert script(FORKED) == "well\n"


NO_MEMORY = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>

int refuses;  /* memory to all threads but the first */

void* aligned_alloc(size_t alignment, size_t bytes) {
  if (refuses && syscall(SYS_gettid) != getpid()) return NULL;
  return ((void* (*)(size_t, size_t))dlsym(RTLD_NEXT, "aligned_alloc"))(alignment, bytes);
}
"""

SCARCE = """
import ctypes, torch, rnn_ext
refuses = ctypes.c_int.in_dll(ctypes.CDLL(None), "refuses")
torch.set_num_threads(2)
# shared units, slices of the batch, directions, the layers of a stack
shapes = (512, 1, 1, 1), (128, 64, 1, 1), (256, 2, 1, 2), (64, 1, 2, 1), (64, 3, 2, 1)
for hidden, batch, layers, directions in shapes:
    dtype = torch.bfloat16 if batch == 3 else torch.float32
    layer = rnn_ext.LSTM(64, hidden, layers, bidirectional=directions == 2, backend="custom", dtype=dtype)
    input = torch.randn(256, batch, 64, dtype=dtype)
    states = [torch.randn(layers * directions, batch, hidden, dtype=dtype).requires_grad_() for _ in range(2)]
    refuses.value = 1
    try:
        for _ in range(300 if layers == 1 else 1):  # of which the first thread does all if the other comes late
            layer(input, states)
        print("done")
    except RuntimeError as error:
        print(str(error).split(":")[1].strip())
    refuses.value = 0
    output = layer(input, states)[0]
    refuses.value = 1
    try:
        found = torch.autograd.grad(output.sum(), states, retain_graph=True)
    except RuntimeError as error:
        assert "not enough memory" in str(error), error
        found = None
    refuses.value = 0
    for again in range(2):
        expected = torch.autograd.grad(output.sum(), states, retain_graph=True)
        assert found is None or all(map(torch.equal, found, expected))
        found = expected
"""


def test_threads_that_get_no_memory(tmp_path):
    """It is the call that fails, not the process, and the next one is as ever."""
    source, library = tmp_path / "no_memory.c", tmp_path / "no_memory.so"
    source.write_text(NO_MEMORY)
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or "clang"
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"], check=True)
    printed = script(SCARCE, LD_PRELOAD=str(library), OMP_NUM_THREADS="2").split("\n")
    assert printed[:3] == ["not enough memory"] * 3, printed
    for of_stack in printed[3:5]:  # all it needs is taken by the first thread
        assert of_stack in ("done", "not enough memory"), printed


WORKERS = """
import torch, rnn_ext
from torch.utils.data import DataLoader, Dataset

torch.set_num_threads(2)
module = rnn_ext.LSTM(64, 128, bidirectional=True, backend="custom")
torch.manual_seed(0)
inputs = torch.randn(6, 8, 64, 64)
with torch.no_grad():
    expected = [module(x)[0] for x in inputs]

class Features(Dataset):
    def __len__(self):
        return 6
    def __getitem__(self, index):
        with torch.no_grad():
            return module(inputs[index])[0]

for index, batch in enumerate(DataLoader(Features(), batch_size=1, num_workers=2)):
    assert torch.equal(batch[0], expected[index])
print("well")
"""


def test_in_the_workers_of_a_dataloader():
    assert script(WORKERS) == "well\n"


def spawned(module, input, queue) -> None:
    torch.set_num_threads(1)
    queue.put(module(input)[0].detach().numpy())


def test_spawned_process():
    """A module travels to a fresh process and computes there what it does here."""
    context = multiprocessing.get_context("spawn")
    module = rnn_ext.GRU(9, 21, 2, bidirectional=True, backend="custom")
    input = torch.randn(5, 3, 9)
    queue = context.SimpleQueue()
    process = context.Process(target=spawned, args=(module, input, queue))
    process.start()
    result = queue.get()
    process.join()
    assert process.exitcode == 0
    assert torch.equal(torch.from_numpy(result), module(input)[0].detach())


COUNTED = """
import os, torch
import rnn_ext
from test_threads import LARGE
from util import build, gradients, run

def threads():
    return sorted(os.listdir("/proc/self/task"))

def work():
    gradients(run, problem)
    stack(steps)

problem = build(LARGE).to(torch.float32)
stack, steps = rnn_ext.LSTM(64, 64, 2).requires_grad_(False), torch.randn(256, 1, 64)  # a team of two: its layers
torch.set_num_threads(1)
work()
alone = threads()
for _ in range(3):
    work()
assert threads() == alone, (alone, threads())
torch.set_num_threads(THREADS)
torch.randn(2_000_000).exp_()
torch.randn(700, 700) @ torch.randn(700, 700)
pool = threads()
for _ in range(3):
    work()
assert threads() == pool, (pool, threads())
print("well")
"""


@pytest.mark.parametrize("threads", [2, 4])
def test_no_threads_beside_torchs(threads):
    """With one thread none is made; with several it is torch's own pool that works, and that pool stays as it is."""
    assert script(COUNTED.replace("THREADS", str(threads)), OMP_NUM_THREADS="1") == "well\n"


WOKEN = """
import os, time, torch
from rnn_ext import GRU

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(2)
module, steps = GRU(256, 256, backend="custom").requires_grad_(False), torch.zeros(1, 1, 256)
alone = threads()
for _ in range(3):
    module(steps)
    time.sleep(0.01)
assert threads() == alone, "a call that is no longer than waking a thread takes"
for _ in range(1000):
    module(steps)
print(threads() - alone)
"""


@pytest.mark.parametrize(("policy", "woken"), [("active", 1), ("PASSIVE", 0)])
def test_calls_in_quick_succession_keep_a_thread_awake(policy, woken):
    """One timestep is shared when threads that it wakes are awake for the next, which they are if they wait for it."""
    if len(os.sched_getaffinity(0)) < 2:
        woken = 0  # two threads on one processor do not wait actively
    assert script(WOKEN, OMP_WAIT_POLICY=policy, OMP_NUM_THREADS="1") == f"{woken}\n"


FAR = """
import os, torch
from rnn_ext import RNN, _C

_C.assume_thread_distance(distance)
module = RNN(units, units, backend="custom", bidirectional=both)
output = module(torch.zeros(steps, batch, units))[1].sum()  # not so much that torch would wake a thread
torch.set_num_threads(2)
alone = len(os.listdir("/proc/self/task"))
for _ in range(1000):
    torch.autograd.grad(output, list(module.parameters()), retain_graph=True)
print(len(os.listdir("/proc/self/task")) - alone)
"""


@pytest.mark.parametrize(
    ("steps", "batch", "units", "both", "shared_if_far"),
    [  # multiply-adds
        (400, 1, 64, False, False),  # 3.3e6: little
        (405, 1, 80, False, False),  # 5.2e6: little for each row
        (120, 1, 150, False, True),  # 5.4e6, of 4.5e4 for each row
        (250, 3, 64, False, False),  # 6.1e6: the same of two or three
        (300, 12, 32, False, False),  # 7.4e6 of several sequences: little for each row
        (40, 16, 64, False, False),  # 5.2e6: little
        (50, 16, 64, False, True),  # 6.6e6
        (34, 24, 48, False, False),  # 3.8e6 of so many that they go in parts: little
        (34, 24, 56, False, True),  # 5.1e6
        (200, 1, 64, True, True),  # each thread takes a direction
    ],
)
def test_little_work_backward_is_shared_by_threads_that_are_near(steps, batch, units, both, shared_if_far):
    """What they pass on to each other would cost those that are far apart more than they gain."""
    # Two threads on one processor do not wait actively: they are not asked, and get what is worth waking one for.
    much = steps * batch * (2 if both else 1) * 2 * units**2 >= 5e6
    alone = len(os.sched_getaffinity(0)) < 2
    for distance, shared in ((50, True), (250, shared_if_far)):
        values = f"distance, steps, batch, units, both = {distance, steps, batch, units, both}\n"
        found = script(values + FAR, OMP_WAIT_POLICY="active", OMP_NUM_THREADS="1")
        assert found == f"{int(much if alone else shared)}\n", distance


FAR_FORWARD = """
import os, torch
from rnn_ext import RNN, _C

_C.assume_thread_distance(distance)
module, input = RNN(units, units, layers, backend="custom"), torch.zeros(steps, batch, units)
torch.set_num_threads(2)
alone = len(os.listdir("/proc/self/task"))
torch.set_grad_enabled(trains)
for _ in range(1000):
    module(input)
print(len(os.listdir("/proc/self/task")) - alone)
"""


@pytest.mark.parametrize(
    ("steps", "batch", "units", "layers", "trains", "shared_if_far"),
    [  # multiply-adds
        (400, 1, 64, 1, True, False),  # 3.3e6, of which backward is left to one thread
        (400, 1, 64, 1, False, True),
        (1, 1, 512, 1, False, True),  # one timestep, whose weights take as long as 2.6e6
        (1, 1, 512, 1, True, True),
        (20, 8, 128, 1, True, False),  # 5.2e6 of several sequences
        (20, 8, 128, 1, False, True),
        (5, 10, 128, 1, False, False),  # 1.6e6
        (200, 2, 64, 1, False, True),  # a sequence for each thread, whose units would be too few to share
        (400, 1, 64, 2, True, False),  # layers that would run at the same time
        (400, 1, 64, 2, False, True),
    ],
)
def test_little_work_forward_is_shared_by_threads_that_are_near(steps, batch, units, layers, trains, shared_if_far):
    much = layers * steps * batch * 2 * units**2 >= 5e6
    alone = len(os.sched_getaffinity(0)) < 2
    for distance, shared in ((50, True), (250, shared_if_far)):
        values = f"distance, steps, batch, units = {distance, steps, batch, units}\n"
        values += f"layers, trains = {layers, trains}\n"
        found = script(values + FAR_FORWARD, OMP_WAIT_POLICY="active", OMP_NUM_THREADS="1")
        assert found == f"{int(much if alone else shared)}\n", distance


def test_distance_of_threads():
    assert _C.thread_distance() == 0
    torch.set_num_threads(2)
    assert 0 < _C.thread_distance() < 1e9


UNDISTURBED = """
import math, torch
torch.set_flush_denormal(FLUSH)
torch.set_num_threads(2)
threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
import rnn_ext
from rnn_ext import ops
from test_threads import LARGE
from util import build, gradients, run
rnn_ext.LSTM(64, 64)(torch.zeros(1, 1, 64).expand(200, 16, 64))  # the first to start threads
gradients(run, build(LARGE).to(torch.float32))
assert torch.get_num_threads() == threads and torch.get_float32_matmul_precision() == precision
many = torch.full((200_000,), 1e-310, dtype=torch.float64)  # for both threads
kept = (many * 1.0).view(torch.int64) != 0
assert not kept.any() if FLUSH else kept.all(), kept.sum()
print("well")
"""


@pytest.mark.parametrize("flush", [False, True])
def test_process_is_left_as_it_was(flush):
    """Importing and calling change neither thread count nor precision nor, on any thread, the floating-point unit."""
    assert script(UNDISTURBED.replace("FLUSH", str(flush))) == "well\n"


FORKED_ALONE = """
import os, torch, rnn_ext
alone = len(os.listdir("/proc/self/task")) == 1
pid = os.fork()
if pid == 0:
    torch.set_num_threads(2)
    layer, input = rnn_ext.LSTM(64, 512), torch.randn(400, 1, 64)
    with torch.no_grad():
        for _ in range(20):  # the threads share the units: neither can do without the other
            layer(input)
    stats = [open(f"/proc/self/task/{task}/stat").read().split() for task in os.listdir("/proc/self/task")]
    print(alone, sum(int(stat[13]) > 5 for stat in stats), flush=True)
    os._exit(0)
os.waitpid(pid, 0)
"""


def test_fork_before_use():
    """A parent of one thread leaves its child no pool to wait for: the child makes its own."""
    found = script(FORKED_ALONE, OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    assert found == "True 2\n" or found == "False 1\n"  # torch may have started a thread when it was imported


FORKED_STACK = """
import os, signal, torch, rnn_ext
torch.set_num_threads(2)
layer, input = rnn_ext.LSTM(101, 96, 2), torch.randn(60, 1, 101)
expected = layer(input)[0].detach()
if (pid := os.fork()) == 0:
    signal.alarm(100)
    print("well" if torch.equal(layer(input)[0], expected) else "differs", flush=True)
    os._exit(0)
os.waitpid(pid, 0)
"""


def test_a_stack_after_a_fork():
    """Whether its layers run at the same time is asked before anything is computed."""
    assert script(FORKED_STACK) == "well\n"


GRANDCHILD = """
import os, signal, torch, rnn_ext
torch.set_num_threads(2)
layer, input = rnn_ext.LSTM(64, 512), torch.randn(100, 16, 64)
with torch.no_grad():
    expected = layer(input)[0]

def child(depth):
    if (pid := os.fork()) == 0:
        signal.alarm(100)
        if depth:
            child(depth - 1)
        else:
            with torch.no_grad():
                print("well" if torch.equal(layer(input)[0], expected) else "differs", flush=True)
        os._exit(0)
    os.waitpid(pid, 0)

child(1)
"""


def test_a_fork_of_a_fork():
    """Its parent had one thread, and yet inherited the pool."""
    assert script(GRANDCHILD) == "well\n"


LEFT = """
import os, signal, sys, torch, rnn_ext
torch.set_num_threads(2)
layer, input = rnn_ext.LSTM(64, 64).half(), torch.randn(400, 64, 64).half()
layer(input)[0].sum().backward()
output = layer(input)[0]
grad = torch.ones((), dtype=output.dtype).expand(output.shape)
if (pid := os.fork()) == 0:
    signal.alarm(100)
    layer(input) if os.environ["PASS"] == "forward" else output.backward(grad)
    torch.randn(2000, 2000).mul(2)  # torch's own, which would wait for the pool
    print("well", flush=True)
    os._exit(0)
os.waitpid(pid, 0)
"""


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_torch_leaves_the_inherited_pool(which):
    """After the first call of either."""
    assert script(LEFT, PASS=which) == "well\n"


ASKED = """
import os, signal, threading, torch, rnn_ext
awake = threading.Event()
thread = threading.Thread(target=awake.wait)
thread.start()  # but no pool
layer, input = rnn_ext.LSTM(64, 64), torch.randn(400, 64, 64)
if (pid := os.fork()) == 0:
    signal.alarm(100)
    threads = []
    for _ in range(2):
        layer(input)
        threads.append(torch.get_num_threads())
        torch.set_num_threads(2)
    print(threads, flush=True)
    os._exit(0)
os.waitpid(pid, 0)
awake.set()
"""


def test_a_child_may_ask_for_threads():
    """After the first call, which leaves a pool that may be inherited: there was none."""
    assert script(ASKED, OMP_NUM_THREADS="2") == "[1, 2]\n"


FEWER = """
import torch
from util import Case, build, gradients, run, same_bits
torch.set_num_threads(1)
problem = build(Case("lstm", bidirectional=True, size=(12, 1, 64, 512)), torch.float32)
expected = gradients(run, problem)
torch.set_num_threads(4)
found = gradients(run, problem)
same_bits(found[0], expected[0])
same_bits(found[1], expected[1])
print("well")
"""


@pytest.mark.parametrize("limit", ["1", "2", "3"])
def test_fewer_threads_than_were_asked_for(limit):
    assert script(FEWER, OMP_THREAD_LIMIT=limit) == "well\n"


def calls_that_take_long() -> dict:
    sequence, row = torch.randn(600, 16, 64), torch.randn(2000, 256)
    plain, recomputing, stacked = (rnn_ext.LSTM(64, 128, **o) for o in ({}, {"recompute": True}, {"num_layers": 2}))
    cell = rnn_ext.LSTMCell(256, 512)
    return {
        "plain_forward": lambda: plain(sequence),
        "extended_layer": lambda: recomputing(sequence),
        "stack": lambda: ops.stack(sequence, None, None, stacked._flat_weights, "lstm", 2),
        "step": lambda: cell(row),
        "random_mask": lambda: _C.random_mask((2**27,), 0.5, 1.0, False),
    }


@pytest.mark.parametrize("which", ["plain_forward", "extended_layer", "stack", "step", "random_mask"])
def test_every_way_in_releases_the_gil(which):
    call = calls_that_take_long()[which]
    assert any(ticks_during(call) for _ in range(20))
