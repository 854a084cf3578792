"""linear_ctc_loss against Linear + log_softmax + F.ctc_loss and against checkpointed chunks: forward and backward.

All frames are valid, every target is S long, features require gradients; a trainable head's weight too. V is odd as
in the vocabularies that users have, which rules out the fastest kernels for eager's logits; "eager, V aligned" pads
them. "compiled" compiles eager's softmax, or the chunks. With "blank row" the head is a frozen LLM embedding of V - 1
rows and a trained row for the blank, which eager has to join anew in every step.

cut-cross-entropy and liger have no row: they fuse a head with a cross-entropy of one label a frame, and hand out
neither log-probabilities of several classes nor take gradients of them.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from bench.harness import Case, Unavailable, device, record, rows
from soundwave_fast import cost_model
from soundwave_fast.ops import linear_ctc_loss

ON_GPU = device().type == "cuda"
BASE = {"B": 8, "T": 750, "D": 4096, "V": 128257} if ON_GPU else {"B": 8, "T": 150, "D": 576, "V": 49153}
NANO_ON_GPU = {"B": 8, "T": 750, "D": 576, "V": 49153}
S = 100 if ON_GPU else 20
SWEEP = {"T": (100, 400), "B": (1, 32), "V": (32001, 65537), "D": (896, 2048)}
if not ON_GPU:
    SWEEP = {"T": (50, 400), "B": (2,), "V": (4097, 16385), "D": (144, 1152)}
ALIGN = 128
CHUNK = 8192


def _inputs(case: Case, where: torch.device, seed: int):
    B, T, D, V = case.shape.values()
    generator = torch.Generator(where).manual_seed(seed)  # a billion numbers: drawn where they are wanted
    dtype = getattr(torch, case.dtype)
    hidden = torch.randn(B, T, D, generator=generator, device=where).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, generator=generator, device=where) / D**0.5).to(dtype)
    targets = torch.randint(1, V, (B, S), generator=generator, device=where)
    lengths = torch.full((B,), T, device=where), torch.full((B,), S, device=where)
    return hidden, weight.requires_grad_(case.variant.startswith("trainable")), targets, *lengths


def _with_blank_row(loss):
    """`loss` of a frozen embedding and a trained row before it, class 0."""

    def joined(hidden, row, embedding, *labels):
        return loss(hidden, torch.cat([row[None], embedding]), *labels)

    return joined


def ours_with_blank_row(hidden, row, embedding, targets, *lengths):
    """The row is the last class, and nothing is joined: the same loss under other numbers of the classes."""
    blank = len(embedding)
    return linear_ctc_loss(hidden, embedding, targets - 1, *lengths, blank, zero_infinity=True, blank_row=row)


def _ctc(log_probs, targets, input_lengths, target_lengths):
    """As the released code calls it: float32 and not cuDNN, which knows neither its blank nor long targets."""
    with torch.backends.cudnn.flags(enabled=False):
        return F.ctc_loss(log_probs.transpose(0, 1), targets, input_lengths, target_lengths, zero_infinity=True)


def _log_softmax(logits):
    return logits.float().log_softmax(-1)


def as_released(hidden, weight, *labels):
    return _ctc(_log_softmax(F.linear(hidden, weight)), *labels)


def aligned(hidden, weight, *labels):
    """Logits of a width that a GPU's kernels like; the padding is cut off before the softmax reads it."""
    if not ON_GPU:
        raise Unavailable("a CPU does not mind an odd width")
    logits = F.linear(hidden, F.pad(weight, (0, 0, 0, -len(weight) % ALIGN)))
    return _ctc(_log_softmax(logits[..., : len(weight)]), *labels)


def compiled(hidden, weight, *labels):
    return _ctc(_compiled(_log_softmax)(F.linear(hidden, weight)), *labels)


def _logsumexp_and_labels(hidden, rows, start, classes):
    """One chunk: its logsumexp, and the logits of the (B, K) classes that lie in it (0 elsewhere)."""
    logits = F.linear(hidden, rows).float()
    local = classes - start
    inside = (local >= 0) & (local < len(rows))
    index = local.clamp(0, len(rows) - 1)[:, None].expand(-1, hidden.shape[1], -1)
    return logits.logsumexp(-1), logits.gather(2, index) * inside[:, None]


def chunks(hidden, weight, targets, input_lengths, target_lengths, chunk=_logsumexp_and_labels):
    """What one would write first: checkpointed vocabulary chunks, and CTC over blank and labels alone."""
    classes = F.pad(targets, (1, 0))
    parts = [
        checkpoint(chunk, hidden, weight[start : start + CHUNK], start, classes, use_reentrant=False)
        for start in range(0, len(weight), CHUNK)
    ]
    log_probs = sum(labels for _, labels in parts) - torch.stack([lse for lse, _ in parts]).logsumexp(0)[..., None]
    first = (classes[:, :, None] == classes[:, None]).int().argmax(-1)
    loss = _ctc(log_probs, first[:, 1:], input_lengths, target_lengths)
    # F.ctc_loss returns exp(log_probs) - occupancy; behind these log_probs the first term does not belong.
    weights = 1 / (len(targets) * target_lengths[:, None, None])
    excess = (log_probs.exp() * weights).sum()
    return loss - (excess - excess.detach())


def chunks_compiled(hidden, weight, *labels):
    if not ON_GPU:
        raise Unavailable("compiled on a GPU alone")
    return chunks(hidden, weight, *labels, chunk=_compiled(_logsumexp_and_labels))


def ours(hidden, weight, *labels):
    return linear_ctc_loss(hidden, weight, *labels, zero_infinity=True)


@functools.cache
def _compiled(f):
    return torch.compile(f)


def _provider(loss):
    def make(case: Case, where: torch.device, seed: int):
        hidden, weight, *labels = _inputs(case, where, seed)
        function = loss
        if case.variant.startswith("blank row"):
            function = ours_with_blank_row if loss is ours else _with_blank_row(loss)
            labels = [weight[1:].clone(), *labels]
            weight = weight[0].clone().requires_grad_()

        def step():
            value = function(hidden, weight, *labels)
            value.backward()
            results = value, hidden.grad, *([] if weight.grad is None else [weight.grad])
            hidden.grad = weight.grad = None
            return results

        return step

    return make


PROVIDERS = {
    "eager as released": _provider(as_released),
    "eager, V aligned": _provider(aligned),
    "eager, softmax compiled": _provider(compiled),
    "checkpointed chunks": _provider(chunks),
    "checkpointed chunks, compiled": _provider(chunks_compiled),
    "ours": _provider(ours),
}


def case(variant: str = "frozen head", dtype: str = "bfloat16" if ON_GPU else "float32", **shape: int) -> Case:
    B, T, D, V = shape.values()
    cost = cost_model.linear_ctc_loss(B * T, D, V, dtype, variant.startswith("trainable"))  # a row more is nothing
    sources = ("soundwave_fast/ops/linear_ctc_passes.py", "soundwave_fast/ops/linear_ctc_parts.py")
    sources += ("soundwave_fast/ops/gemm.py", "soundwave_fast/ops/compact.py")
    sources += ("soundwave_fast/ops/pure_torch/alpha_beta.py", "csrc_triton/alpha_beta.py")
    rounds, providers = 5 if ON_GPU else 3, dict(PROVIDERS)
    if variant == "blank row" and not ON_GPU:
        del providers["checkpointed chunks"]  # the frozen head has it, 20 s a row
    variant = f"{variant} {dtype}"
    return Case("linear_ctc_loss", variant, shape, providers, dtype=dtype, cost=cost, sources=sources, rounds=rounds)


CASES = [
    case(head, dtype, **shape)
    for shape in ((BASE, NANO_ON_GPU) if ON_GPU else (BASE,))
    for head in ("frozen head", "trainable head", "blank row")
    for dtype in (("bfloat16",) if ON_GPU else ("float32", "bfloat16"))
    if (head, dtype) != ("blank row", "bfloat16") or ON_GPU
]


@rows(CASES)
def test_linear_ctc_loss(benchmark, request, case, provider):
    record(benchmark, request, case, provider)
