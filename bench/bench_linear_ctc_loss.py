"""linear_ctc_loss against Linear + log_softmax + F.ctc_loss: pytest-benchmark rows, time and extra peak memory.

Run: python -m pytest bench/bench_linear_ctc_loss.py --benchmark-group-by=group --benchmark-columns=min,median,rounds

Groups are frozen / trainable by dtype; each holds an `eager` and an `ours` row of one process, so compare within a
group. `extra_peak_mib` in extra_info is the growth of resident memory over one forward and backward (Linux only).
"""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F

from soundwave_fast.ops import linear_ctc_loss

B, T, D, V, S = 8, 150, 576, 49153, 20
ROUNDS = 5


def _status_mib(field: str) -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))


def extra_peak_mib(step) -> float | None:
    """How far one call of step lifts the resident set above where it stood, or None where Linux does not tell."""
    gc.collect()
    try:
        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")  # resets VmHWM
    except OSError:
        return None
    before = _status_mib("VmRSS")
    step()
    return _status_mib("VmHWM") - before


def make_step(which: str, dtype: torch.dtype, trainable: bool):
    """One forward and backward on fixed random features; all frames valid, every target S long."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, D, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, generator=generator) / D**0.5).to(dtype).requires_grad_(trainable)
    targets = torch.randint(1, V, (B, S), generator=generator)
    input_lengths, target_lengths = torch.full((B,), T), torch.full((B,), S)

    def eager():
        log_probs = F.linear(hidden, weight).float().log_softmax(-1)  # F.ctc_loss has no half on the CPU
        return F.ctc_loss(log_probs.transpose(0, 1), targets, input_lengths, target_lengths)

    def ours():
        return linear_ctc_loss(hidden, weight, targets, input_lengths, target_lengths)

    loss = eager if which == "eager" else ours

    def step():
        loss().backward()
        hidden.grad = weight.grad = None

    return step


@pytest.mark.parametrize("which", ["eager", "ours"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("head", ["frozen", "trainable"])
def test_linear_ctc_loss(benchmark, head, dtype, which):
    benchmark.group = f"{head} {str(dtype).removeprefix('torch.')}"
    step = make_step(which, dtype, trainable=head == "trainable")
    step()
    benchmark.extra_info["extra_peak_mib"] = extra_peak_mib(step)
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.pedantic(step, rounds=ROUNDS, warmup_rounds=0)
