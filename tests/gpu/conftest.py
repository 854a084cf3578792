"""The real shapes on a GPU; with SOUNDWAVE_REHEARSE=1 the same tests on a CPU, tiny, on interpreted kernels.

A rehearsal proves that a test runs and passes, not what it is there to show: the interpreter knows no races, no
rounding to bfloat16 and no graphs. With neither, tests/conftest.py skips them.
"""

from __future__ import annotations

import pytest
import torch

from soundwave_fast.ops.backend import use_backend
from tests.gpu.calls import ON_GPU
from tests.ops.conftest import launches  # noqa: F401

PAPER = {"B": 8, "T": 750, "D": 4096, "V": 128257, "S": 100, "H": 32, "d": 128, "Lq": 100, "L": 60}
TINY = {"B": 3, "T": 13, "D": 24, "V": 70, "S": 3, "H": 2, "d": 12, "Lq": 5, "L": 7}


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(scope="session")
def shape() -> dict[str, int]:
    return PAPER if ON_GPU else TINY


@pytest.fixture
def kernels():
    """Triton's kernels, on a CPU too; the GPU's memory is given back afterwards."""
    with use_backend("triton"):
        yield
    if ON_GPU:
        torch.cuda.empty_cache()
