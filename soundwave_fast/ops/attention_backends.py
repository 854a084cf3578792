"""Which code varlen_cross_attention runs: ours, or a peer that is installed, under the same rules for empty rows.

Shape legend: Nq, Nk rows over the batch, B utterances, H query heads, G key heads, d head width.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from soundwave_fast.ops.backend import runs_triton

BACKENDS = ("auto", "triton", "torch", "varlen_attn", "flash_attn", "xformers")
WIDEST_HEAD = 128  # of the Triton kernels
_HALF = (torch.float16, torch.bfloat16)
_SINGLE = (*_HALF, torch.float32)
_MODULES = {
    "triton": "csrc_triton.varlen_cross_attention",
    "torch": "soundwave_fast.ops.pure_torch.varlen_cross_attention",
    "varlen_attn": "torch.nn.attention.varlen",
    "flash_attn": "flash_attn",
    "xformers": "xformers.ops",
}
_DTYPES = {"triton": _SINGLE, "varlen_attn": _HALF, "flash_attn": _HALF, "xformers": _SINGLE}


@functools.cache
def module(backend: str) -> ModuleType:
    """What a backend lives in; imported when first asked for. Raises ImportError where it is not installed."""
    return importlib.import_module(_MODULES[backend])


def choose(backend: str, q: Tensor, dropout_p: float) -> str:
    """The backend that will run for queries like q: `backend` itself, or what "auto" stands for.

    "auto" on a GPU is, for half and single precision and heads up to 128, the backend that csrc_triton/tuned.json names
    for the chip, element size and head width, where it can run; "triton" without one. Elsewhere it is "torch".

    Raises ValueError, naming the backend, when it is unknown, not installed or cannot do this.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    fits = q.dtype in _SINGLE and q.shape[2] <= WIDEST_HEAD
    if backend == "auto":
        if not (runs_triton(q) and fits):
            return "torch"
        # numbers alone: under torch.compile _measured runs while tracing, and what it says is part of the graph
        name = _measured(q.dtype.itemsize, 128 if q.shape[2] > 64 else 64)
        runs = q.is_cuda and q.dtype in _DTYPES.get(name, ()) and not (name == "varlen_attn" and dropout_p)
        return name if runs else "triton"
    if backend == "torch":
        return backend
    if not (q.is_cuda or (backend == "triton" and runs_triton(q))):
        raise ValueError(f"backend {backend!r} needs a GPU, q is on {q.device}")
    if q.dtype not in _DTYPES[backend]:
        raise ValueError(f"backend {backend!r} does not take {q.dtype}")
    if backend == "triton" and not fits:
        raise ValueError(f"backend 'triton' takes heads up to {WIDEST_HEAD} wide, got {q.shape[2]}")
    if backend == "varlen_attn" and dropout_p:
        raise ValueError("backend 'varlen_attn' has no dropout")
    if torch.compiler.is_compiling():  # imports cannot be traced; the op imports what it needs when it runs
        return backend
    try:
        module(backend)
    except ImportError as error:
        raise ValueError(f"backend {backend!r} is not available: {error}") from error
    return backend


def _measured(itemsize: int, d: int) -> str:
    """The backend that tuned.json names for this chip and class of shapes; "triton" where none, or not installed."""
    from csrc_triton import tuning

    name = tuning.choice("attention", f"bytes {itemsize}, d {d}", "triton")
    if name not in _DTYPES:
        return "triton"
    try:
        module(name)
    except ImportError:
        return "triton"
    return name


# torch.compiler.assume_constant_result, which would import the compiler, and Triton with it, for this one line
_measured._dynamo_marked_constant = True


def call_peer(
    backend: str,
    q: Tensor,  # (Nq, H, d)
    k: Tensor,  # (Nk, G, d)
    v: Tensor,  # (Nk, G, d)
    cu_seqlens_q: Tensor,  # (B + 1,)
    cu_seqlens_k: Tensor,  # (B + 1,)
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    dropout_p: float,
) -> Tensor:
    """A peer's attention, (Nq, H, d), with our rules around it: 0 for rows without a partner, and in their gradients.

    Peers leave those rows, and the gradients of rows beyond the offsets, as they found the memory.
    """
    if not q.shape[0] or not k.shape[0]:  # peers refuse empty tensors
        return torch.zeros_like(q) + (q[:0].sum() + k[:0].sum() + v[:0].sum())
    idle_q = _idle(cu_seqlens_q, cu_seqlens_k, q.shape[0])
    idle_k = _idle(cu_seqlens_k, cu_seqlens_q, k.shape[0])
    q, k, v = _ZeroGradient.apply(q, idle_q), _ZeroGradient.apply(k, idle_k), _ZeroGradient.apply(v, idle_k)
    offsets = (cu_seqlens_q.int(), cu_seqlens_k.int())
    # A longest query of 1 sends flash-attention down a road that gets empty sequences wrong (its issue 1537).
    longest = (max(max_seqlen_q, 2), max(max_seqlen_k, 1))
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    out = _PEERS[backend](q, k, v, *offsets, *longest, scale, dropout_p)
    return out.masked_fill(idle_q[:, None, None], 0)


def _idle(cu_seqlens: Tensor, other: Tensor, rows: int) -> Tensor:
    """(rows,) bool: whose utterance has no row on the other side, or that are of no utterance. No host sync."""
    row = torch.arange(rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    b = torch.searchsorted(cu_seqlens[1:], row, right=True)
    alone = torch.nn.functional.pad(other.diff() == 0, (0, 1), value=True)
    return alone[b]


class _ZeroGradient(torch.autograd.Function):
    """Identity; the gradient of the marked rows is 0, whatever came back (NaN included)."""

    @staticmethod
    def forward(ctx, x: Tensor, marked: Tensor) -> Tensor:
        ctx.save_for_backward(marked)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (marked,) = ctx.saved_tensors
        return grad.masked_fill(marked[:, None, None], 0), None


def _varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale, dropout_p) -> Tensor:
    attend: Callable = module("varlen_attn").varlen_attn
    accepted = inspect.signature(attend).parameters  # scale and enable_gqa came one after the other
    options = {}
    if "scale" in accepted:
        options["scale"] = scale
    else:
        q = q * (scale * q.shape[2] ** 0.5)
    if k.shape[1] != q.shape[1]:
        if "enable_gqa" in accepted:
            options["enable_gqa"] = True
        else:
            k, v = _repeat_heads(k, q), _repeat_heads(v, q)
    return attend(q, k, v, cu_q, cu_k, max_q, max_k, **options)


def _flash_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale, dropout_p) -> Tensor:
    attend = module("flash_attn").flash_attn_varlen_func
    return attend(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p=dropout_p, softmax_scale=scale, deterministic=True)


def _xformers(q, k, v, cu_q, cu_k, max_q, max_k, scale, dropout_p) -> Tensor:
    """Its mask is made of host lengths: this one backend waits for the device."""
    ops = module("xformers")
    lengths = torch.stack([cu_q.diff(), cu_k.diff()]).tolist()
    mask = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(*lengths)
    rows = [sum(side) for side in lengths]
    if 0 in rows:
        return torch.zeros_like(q) + (q[:0].sum() + k[:0].sum() + v[:0].sum())
    k, v = (_repeat_heads(x, q)[None, : rows[1]] for x in (k, v))
    out = ops.memory_efficient_attention(q[None, : rows[0]], k, v, attn_bias=mask, p=dropout_p, scale=scale)[0]
    return torch.nn.functional.pad(out, (0, 0, 0, 0, 0, q.shape[0] - rows[0]))


def _repeat_heads(x: Tensor, q: Tensor) -> Tensor:
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], 1)


_PEERS = {"varlen_attn": _varlen_attn, "flash_attn": _flash_attn, "xformers": _xformers}
