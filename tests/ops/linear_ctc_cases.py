"""The small batch that the tests of linear_ctc_loss share: repeats, an empty target, a single frame, no frame."""

from __future__ import annotations

import pytest
import torch

from soundwave_fast.ops import linear_ctc_passes
from tests.ops.backends import DEVICE

B, T, D, V = 5, 9, 6, 41
TARGETS = [[1, 1, 2, 1], [], [33], [40, 40, 40], [6, 2]]
INPUT_LENGTHS = [9, 5, 1, 7, 0]  # the last cannot hold its target
TARGET_LENGTHS = [len(t) for t in TARGETS]
FEASIBLE = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0], dtype=torch.float64)


def shrink_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks and several groups, also on tensors this small."""
    groups = {"cpu": 13, "cuda": 13}
    monkeypatch.setattr(linear_ctc_passes, "CHUNK_COLUMNS", 24)
    monkeypatch.setattr(linear_ctc_passes, "CHUNK_ALIGN", 8)
    monkeypatch.setattr(linear_ctc_passes, "FROZEN_ROWS", groups)
    monkeypatch.setattr(linear_ctc_passes, "TRAINED_BYTES", {key: rows * V * 4 for key, rows in groups.items()})


def padded(fill: int = -100) -> torch.Tensor:
    return torch.tensor([t + [fill] * (4 - len(t)) for t in TARGETS], device=DEVICE)


def make(dtype=torch.float64, seed: int = 0, scale: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    weight = scale * torch.randn(V, D, generator=generator, dtype=torch.float64)
    blank_row = torch.randn(D, generator=generator, dtype=torch.float64)
    return [x.to(DEVICE, dtype) for x in (hidden, weight, blank_row)]
