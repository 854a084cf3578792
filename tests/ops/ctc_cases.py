"""What the tests of ctc_loss share: five small targets in one batch, and helpers to run losses on them."""

from __future__ import annotations

import torch

from tests.ops.backends import DEVICE

T, C = 12, 7
TARGETS = [[1, 1, 2, 1], [], [3], [5, 5, 5], [6, 2]]
INPUT_LENGTHS = [12, 5, 1, 7, 9]
TARGET_LENGTHS = [len(t) for t in TARGETS]
B = len(TARGETS)


def padded(blank: int = 0, fill: int = -100) -> torch.Tensor:
    """TARGETS (B, 5), with the blank's place and class 0 exchanged."""
    rows = [[0 if x == blank else x for x in t] + [fill] * (5 - len(t)) for t in TARGETS]
    return torch.tensor(rows)


def make_log_probs(dtype=torch.float64, seed: int = 0, device=None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, B, C, generator=generator, dtype=torch.float64).log_softmax(-1)
    return x.to(device or DEVICE, dtype).requires_grad_()


def value_and_grad(f, x, weights=None):
    loss = f(x)
    total = loss.sum() if weights is None else (loss * weights.to(loss)).sum()
    return loss.detach(), torch.autograd.grad(total, x)[0]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b))
