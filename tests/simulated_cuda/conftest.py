"""The fixture of the device that is not there; where a real one is, tests/gpu asks that."""

from __future__ import annotations

import pytest
import torch

from csrc_triton.launch import INTERPRETED
from tests.simulated_cuda.device import simulated_cuda


@pytest.fixture
def waits():
    """The test runs with "cuda" simulated; the waits so far."""
    if torch.cuda.is_available() or not INTERPRETED:
        pytest.skip("needs interpreted kernels, and no GPU")
    with simulated_cuda() as seen:
        yield seen
