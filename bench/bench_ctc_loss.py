"""ctc_loss against F.ctc_loss, native and cuDNN: forward and backward over vocabularies, and the recursion alone.

All frames valid, every target S labels; log_probs is a leaf, so log_softmax and its backward are not in it.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from bench.harness import Case, Unavailable, device, record, rows
from soundwave_fast import cost_model
from soundwave_fast.ops import ctc_loss
from soundwave_fast.ops.backend import implementation
from soundwave_fast.ops.compact import compact_targets

ON_GPU = device().type == "cuda"
BASE = {"B": 8, "T": 750 if ON_GPU else 150, "S": 100 if ON_GPU else 20, "C": 32}
SWEEP = {"C": (200, 5000, 49153, 128257) if ON_GPU else (200, 1000, 5000, 49153), "S": (5, 60)}


def _inputs(case: Case, where: torch.device, seed: int):
    B, T, S, C = (case.shape[key] for key in "BTSC")
    generator = torch.Generator(where).manual_seed(seed)  # a billion numbers: drawn where they are wanted
    log_probs = (
        torch.randn(T, B, C, generator=generator, device=where).log_softmax(-1).to(where, getattr(torch, case.dtype))
    )
    targets = torch.randint(1, C, (B, S), generator=generator, device=where)
    return log_probs.requires_grad_(), targets, torch.full((B,), T), torch.full((B,), S)


def _provider(loss, prepare=lambda *inputs: inputs):
    def make(case: Case, where: torch.device, seed: int):
        log_probs, *labels = prepare(*_inputs(case, where, seed))

        def step():
            value = loss(log_probs, *labels)
            value.backward()
            results = value, log_probs.grad
            log_probs.grad = None
            return results

        return step

    return make


def native(log_probs, *labels):
    with torch.backends.cudnn.flags(enabled=False):
        return F.ctc_loss(log_probs, *labels)


def as_float32(log_probs, *labels):
    return native(log_probs.float(), *labels)


@functools.cache
def _compiled(loss):
    return torch.compile(loss)


def _for_cudnn(log_probs, targets, input_lengths, target_lengths):
    """cuDNN wants labels in one row of int32 on the host, float32, and targets shorter than 256."""
    if not log_probs.is_cuda or not torch.backends.cudnn.is_available():
        raise Unavailable("needs cuDNN")
    flat = targets.reshape(-1).to("cpu", torch.int32)
    return log_probs, flat, input_lengths.to(torch.int32), target_lengths.to(torch.int32)


def case(variant: str = "fwd+bwd", dtype: str = "float32", **shape: int) -> Case:
    providers = {"F.ctc_loss": _provider(native if dtype == "float32" else as_float32)}
    if dtype == "float32":
        providers["F.ctc_loss, cuDNN"] = _provider(F.ctc_loss, _for_cudnn)
    providers["F.ctc_loss, compiled"] = _provider(_compiled(native if dtype == "float32" else as_float32))
    providers["ours"] = _provider(ctc_loss)
    cost = cost_model.ctc_loss(*(shape[key] for key in "BTCS"), dtype)
    sources = ("soundwave_fast/ops/compact.py", "soundwave_fast/ops/pure_torch/alpha_beta.py")
    sources += ("csrc_triton/alpha_beta.py", "csrc_triton/occupancy.py")
    rounds, note = 21 if shape["C"] < 10000 else 7, ""
    if not ON_GPU and shape["C"] <= 200 and shape["T"] < 200:
        note = "a small vocabulary leaves nothing to save; ours computes in float64 (docs/numerics.md)"
    peers = ("F.ctc_loss, cuDNN",)
    return Case("ctc_loss", variant, shape, providers, dtype, cost, sources, rounds=rounds, peers=peers, note=note)


def _recursion_native(case: Case, where: torch.device, seed: int):
    log_probs, *labels = _inputs(case, where, seed)
    log_probs = log_probs.detach()
    one = torch.ones(log_probs.shape[1], device=where)

    def step():
        nll, alpha = torch._ctc_loss(log_probs, *labels, 0, False)
        return nll, torch.ops.aten._ctc_loss_backward(one, log_probs, *labels, nll, alpha, 0, False)

    return step


def _recursion_ours(case: Case, where: torch.device, seed: int):
    """On emissions that are compact already, as linear_ctc_loss calls it."""
    log_probs, *labels = _inputs(case, where, seed)
    T, B, C = log_probs.shape
    compact = compact_targets(*labels, B, T, C, 0, where)
    emissions = log_probs.detach().gather(2, compact.columns_BK.expand(T, -1, -1))
    alpha_beta = implementation("alpha_beta", emissions).alpha_beta
    arguments = compact.first_BK, compact.input_lengths_B, compact.target_lengths_B
    return lambda: alpha_beta(emissions, *arguments, True)


def recursion(**shape: int) -> Case:
    """C = S + 1 classes: what is left of the op when the vocabulary is gone."""
    providers = {"native": _recursion_native, "ours": _recursion_ours}
    sources = ("soundwave_fast/ops/pure_torch/alpha_beta.py", "csrc_triton/alpha_beta.py", "csrc_triton/occupancy.py")
    return Case("ctc_loss", "recursions", shape, providers, sources=sources, rounds=21, compare=False)


CASES = [
    *(case(**{**BASE, "C": C}) for C in (BASE["C"], *SWEEP["C"])),
    case("fwd+bwd bfloat16", "bfloat16", **{**BASE, "C": SWEEP["C"][-1]}),
    case("fwd+bwd long", B=8, T=750, S=100, C=200),
    recursion(**{**BASE, "C": BASE["S"] + 1}),
    recursion(B=8, T=1500, S=300, C=301),
]


@rows(CASES)
def test_ctc_loss(benchmark, request, case, provider):
    record(benchmark, request, case, provider)
