"""Small calls that between them launch every kernel of csrc_triton: for sanitizers, and for what launchers pass on.

`python tests/gpu/small_cases.py [NAME ...]` runs them, on the GPU where there is one, else interpreted; it prints the
names of those that ran. Shapes are odd on purpose: every mask has something to hide.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")  # before triton is imported

from soundwave_fast.ops import ctc_loss, linear_argmax, linear_ctc_loss, peak_gather, splice, varlen_cross_attention
from soundwave_fast.ops.backend import use_backend
from soundwave_fast.packed import pack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(DEVICE, dtype).requires_grad_()


def ctc(S: int = 5, T: int = 19, C: int = 37, dtype: torch.dtype = torch.float32) -> None:
    log_probs = torch.randn(T, 2, C).log_softmax(-1).to(DEVICE, dtype).requires_grad_()
    targets = torch.randint(1, C, (2, S))
    targets[0, 1:3] = targets[0, 0]  # repeats
    ctc_loss(log_probs, targets.to(DEVICE), (T, max(T - 3, 1)), (S, max(S - 2, 0)), zero_infinity=True).backward()


def ctc_chunked() -> None:
    """A target whose states take two launches."""
    ctc(S=1030, T=3)


def linear_ctc(trainable: bool, D: int = 24, V: int = 83, dtype: torch.dtype = torch.float32) -> None:
    hidden, weight = _leaf(2, 11, D, dtype=dtype), _leaf(V, D, dtype=dtype).detach().requires_grad_(trainable)
    lengths = torch.tensor([11, 7], device=DEVICE), torch.tensor([4, 2], device=DEVICE)
    targets = torch.randint(1, V, (2, 4), device=DEVICE)
    linear_ctc_loss(hidden, weight, targets, *lengths, return_argmax=True)[0].backward()


def argmax(D: int = 24, V: int = 83, dtype: torch.dtype = torch.float32) -> None:
    hidden, weight, row = (_leaf(*shape, dtype=dtype) for shape in ((2, 11, D), (V, D), (D,)))
    linear_argmax(hidden, weight, torch.tensor([11, 7], device=DEVICE), V, blank_row=row)


def peaks(select: str, D: int = 40, dtype: torch.dtype = torch.float32) -> None:
    features, tokens = _leaf(3, 21, D, dtype=dtype), torch.randint(0, 3, (3, 21), device=DEVICE)
    scores = torch.rand(3, 21, device=DEVICE) if select == "peak" else None
    packed = peak_gather(features, tokens, [21, 0, 13], 0, True, select=select, scores=scores, capacity=64)
    packed.data.float().sum().backward()


def splicing(layout: str, D: int = 40, dtype: torch.dtype = torch.float32) -> None:
    text, audio = _leaf(2, 9, D, dtype=dtype), pack([torch.randn(n, D).to(DEVICE, dtype) for n in (5, 3)])
    rows = audio.data.requires_grad_()
    placeholder = torch.zeros(2, 9, dtype=torch.bool, device=DEVICE)
    placeholder[0, 2] = placeholder[1, 5] = True
    labels = torch.randint(0, 9, (2, 9), device=DEVICE)
    mask = torch.ones(2, 9, dtype=torch.int64, device=DEVICE)
    length = 24 if layout == "packed" else 13
    out = splice(text, audio.with_data(rows), placeholder, mask, labels, layout=layout, max_length=length)
    out.inputs_embeds.float().sum().backward()


def attention(queries: int, d: int = 32, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
    lengths_q, lengths_k = (queries, 0, queries - 1), (33, 5, 0)
    offsets = [torch.tensor([0, *x]).cumsum(0).to(DEVICE, torch.int32) for x in (lengths_q, lengths_k)]
    q = _leaf(sum(lengths_q), 2, d, dtype=dtype)
    k, v = (_leaf(sum(lengths_k), 1, d, dtype=dtype) for _ in range(2))
    varlen_cross_attention(q, k, v, *offsets, queries, 33, None, dropout).float().sum().backward()


CASES: dict[str, Callable[[], None]] = {
    "ctc": ctc,
    "ctc chunked": ctc_chunked,
    "linear_ctc frozen": lambda: linear_ctc(False),
    "linear_ctc trainable": lambda: linear_ctc(True),
    "linear_ctc bfloat16": lambda: linear_ctc(True, dtype=torch.bfloat16),
    "linear_argmax": argmax,
    "peaks first": lambda: peaks("first"),
    "peaks best": lambda: peaks("peak"),
    "splice right": lambda: splicing("right"),
    "splice left": lambda: splicing("left"),
    "splice packed": lambda: splicing("packed"),
    "attention stationary": lambda: attention(5),
    "attention tiled": lambda: attention(40),
    "attention dropout": lambda: attention(5, dropout=0.2),
    "attention bfloat16": lambda: attention(9, dtype=torch.bfloat16),
}


def run(name: str) -> None:
    """One case on the Triton kernels, finished when this returns."""
    torch.manual_seed(0)
    with use_backend("triton"):
        CASES[name]()
    if DEVICE == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    for wanted in sys.argv[1:] or CASES:
        run(wanted)
        print(wanted, flush=True)
