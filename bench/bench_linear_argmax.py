"""linear_argmax against Linear + log_softmax + max, and against max and logsumexp of the logits: no gradients.

All frames are valid. V is odd as in the vocabularies that users have.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.harness import Case, device, record, rows
from soundwave_fast import cost_model
from soundwave_fast.ops import linear_argmax

ON_GPU = device().type == "cuda"
BASE = {"B": 8, "T": 750, "D": 4096, "V": 128257} if ON_GPU else {"B": 8, "T": 150, "D": 576, "V": 49153}


def _log_softmax(hidden, weight):
    best, tokens = F.linear(hidden, weight).float().log_softmax(-1).max(-1)
    return tokens, best


def _logsumexp(hidden, weight):
    logits = F.linear(hidden, weight)
    best, tokens = logits.max(-1)
    return tokens, best.float() - logits.float().logsumexp(-1)


def _provider(greedy):
    def make(case: Case, where: torch.device, seed: int):
        B, T, D, V = case.shape.values()
        generator = torch.Generator(where).manual_seed(seed)
        dtype = getattr(torch, case.dtype)
        hidden = torch.randn(B, T, D, generator=generator, device=where).to(dtype)
        weight = (torch.randn(V, D, generator=generator, device=where) / D**0.5).to(dtype)

        @torch.inference_mode()
        def step():
            # Where rounding makes two classes equal the providers may choose differently; the value says as much.
            return greedy(hidden, weight)[1:]

        return step

    return make


def case(**shape: int) -> Case:
    B, T, D, V = shape.values()
    dtype = "bfloat16" if ON_GPU else "float32"
    return Case(
        "linear_argmax",
        "no gradients",
        shape,
        {
            "log_softmax, max": _provider(_log_softmax),
            "max, logsumexp": _provider(_logsumexp),
            "max, logsumexp, compiled": _provider(torch.compile(_logsumexp)),
            "ours": _provider(linear_argmax),
        },
        dtype=dtype,
        cost=cost_model.linear_ctc_loss(B * T, D, V, dtype, trainable=False, backward=False),
        sources=("soundwave_fast/ops/pure_torch/linear_ctc_loss.py", "csrc_triton/linear_ctc_loss.py"),
    )


CASES = [case(**BASE)]


@rows(CASES)
def test_linear_argmax(benchmark, request, case, provider):
    record(benchmark, request, case, provider)
