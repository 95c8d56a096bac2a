"""The layer op on CPU tensors by the CUDA kernels: the code of csrc/ops/cuda_layer.cpp over emulated kernels."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager

from tests.cuda_emulator import build


@functools.cache
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(build.torch_library()))


@contextmanager
def emulated(kernel: str | None = None) -> Iterator[None]:
    """Within, ``rnn_ext::layer`` of CPU tensors is what CUDA tensors would get: by `kernel` ("step", "pointwise",
    "persistent", "tensor", "cluster" or "grid"), or by the one that the dispatch table chooses."""
    assert library().rnn_ext_emulate_kernel((kernel or "").encode()), kernel
    library().rnn_ext_emulate(1)
    try:
        yield
    finally:
        library().rnn_ext_emulate(0)
        library().rnn_ext_emulate_kernel(b"")
