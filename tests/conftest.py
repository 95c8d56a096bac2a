"""Settings of every test: generated cases are the same on every run, and one thread unless a test asks for more."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

from rnn_ext import ops
from rnn_ext._nvcc import LOOKED_FOR, find_nvcc

# Derandomized: the same cases each run, so that a red build can be repeated. HYPOTHESIS_PROFILE=explore looks further.
hypothesis.settings.register_profile(
    "repeatable", deadline=None, derandomize=True, database=None, max_examples=60, print_blob=True
)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(autouse=True)
def _same_start():
    """Every test starts from the same seed and thread count, and leaves torch's global switches as it found them."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    grad_mode, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    capability = ops.cpu_capability() if ops.is_available() else None
    yield
    if capability:
        from rnn_ext import _C

        ops.set_cpu_capability(capability)
        _C.widen_always(False)
        _C.multiply_integers(True)
        _C.assume_thread_distance(-1)
    torch.set_grad_enabled(grad_mode)
    torch.set_default_dtype(dtype)


@pytest.fixture(params=[False, True], ids=["where_it_pays", "always"])
def widening(request: pytest.FixtureRequest) -> None:
    """Whether 16-bit weights that the processor does not multiply are widened in every step, of layers of any size."""
    from rnn_ext import _C

    _C.widen_always(request.param)


@pytest.fixture(scope="session")
def nvcc() -> str:
    """The path of nvcc. A machine may be without one, but CI, which installs what it needs, may not."""
    found = find_nvcc()
    if found is None:
        missing = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        missing(f"nvcc was not found {LOOKED_FOR}")
    return found
