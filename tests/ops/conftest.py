"""Fixtures for the ops: both implementations, poisoned memory, lengths the host does not know, counted launches."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from soundwave_fast.ops import linear_ctc_parts
from soundwave_fast.ops.backend import use_backend
from tests.ops.backends import DEVICE


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest):
    """The test runs twice: on plain torch and on the Triton kernels (interpreted where there is no GPU)."""
    with use_backend(request.param):
        yield request.param


def _poisoned(x: torch.Tensor) -> torch.Tensor:
    if x.dtype == torch.bool:
        return x.fill_(True)
    return x.fill_(float("nan") if x.is_floating_point() else 77)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is handed out uninitialised holds NaN, 77 or True: whoever leaves some of it unwritten is seen."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _original=original, **k: _poisoned(_original(*a, **k)))


@pytest.fixture(params=["lengths known", "lengths unknown"])
def lengths_known(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Unknown: what the ops over a head do when the lengths are on an accelerator, which they must not wait for."""
    known = request.param == "lengths known"
    monkeypatch.setattr(linear_ctc_parts, "known_to_host", lambda input_lengths, hidden: known)
    return known


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the Triton kernels launched while the test runs, in order."""
    names: list[str] = []
    if DEVICE == "cuda":
        from triton.runtime.jit import JITFunction as owner

        method = "run"
    else:
        from triton.runtime.interpreter import GridExecutor as owner

        method = "__call__"
    original = getattr(owner, method)

    def counted(self, *args, **kwargs):
        names.append(self.fn.__name__)
        with _disable_current_modes():  # what the interpreter does with tensors is not the op's doing
            return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, method, counted)
    return names
