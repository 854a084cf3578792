"""Error budgets: an op may be at most so many times as far from float64 truth as eager torch in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor

FORWARD = 2.0
BACKWARD = 3.0


def error(x: Tensor, truth: Tensor) -> float:
    """Largest absolute difference, relative to truth's largest magnitude; inf must sit where truth's does."""
    x, truth = x.detach().double(), truth.detach().double()
    assert x.shape == truth.shape, f"{tuple(x.shape)} against {tuple(truth.shape)}"
    assert not x.isnan().any(), "NaN"
    assert torch.equal(x.isinf(), truth.isinf()), "inf in different places"
    finite = truth.isfinite()
    if not finite.any():
        return 0.0
    scale = truth[finite].abs().max().clamp(min=1e-30)
    return float((x[finite] - truth[finite]).abs().max() / scale)


def assert_within_budget(ours: Tensor, eager: Tensor, truth: Tensor, times: float) -> None:
    """error(ours) <= times * error(eager) + 4 eps of the dtype the result is stored in.

    In float64 truth is no better than eager and often the same computation, so eager's error counts as 4 eps at least.
    """
    eps = torch.finfo(ours.dtype).eps
    of_eager = max(error(eager, truth), 4 * eps if ours.dtype == torch.float64 else 0.0)
    allowed = times * of_eager + 4 * eps
    got = error(ours, truth)
    assert got <= allowed, f"error {got:.3g}, allowed {allowed:.3g} ({times} times eager's, plus rounding)"
