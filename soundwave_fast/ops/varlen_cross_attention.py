"""varlen_cross_attention: attention of packed queries to packed keys, utterance by utterance (flash-attn's layout).

Shape legend: Nq, Nk rows over the batch, B utterances, H query heads, G key heads, d head width.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from soundwave_fast.ops import attention_backends
from soundwave_fast.ops.backend import refuse_dtensor, shortcut

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def varlen_cross_attention(
    q: Tensor,  # (Nq, H, d)
    k: Tensor,  # (Nk, G, d), H a multiple of G
    v: Tensor,  # (Nk, G, d)
    cu_seqlens_q: Tensor,  # (B + 1,) int32
    cu_seqlens_k: Tensor,  # (B + 1,) int32
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,  # None: d ** -0.5
    dropout_p: float = 0.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """softmax(q k^T * softmax_scale) v within each utterance: (Nq, H, d), q's dtype; not causal.

    Query head h reads key head h // (H / G). A query whose utterance has no keys gives 0 and zero gradients, a key
    whose utterance has no queries gets zero gradients, as do rows beyond cu_seqlens[-1]; those are never read.
    Differentiable in q, k and v, once; bit for bit the same from run to run.

    dropout_p applies to the attention weights whenever it is above 0: pass 0 when evaluating. The op draws one seed
    from torch's generator, and backward draws the same mask again: each backend has its own mask of the same law.

    backend: "auto" (on a GPU Triton, or what csrc_triton/tuned.json names for the chip and is installed; elsewhere
    torch), "triton" (d <= 128), "torch", or a peer where installed, on a GPU: "varlen_attn" (torch's own; half
    precision, no dropout), "flash_attn" (half precision), "xformers". Rules for empty rows hold for all. Peers are as
    differentiable, compilable and deterministic as they are; xformers alone copies the offsets to the host.

    Raises ValueError for shapes, devices, dropout_p, a backend that cannot run, or offsets that do not rise from 0 to
    at most the number of rows or are wider than max_seqlen (values are checked on the CPU, under torch.compile too);
    TypeError for dtypes and DTensors. On a GPU offsets are not read back: with bad ones, or a max_seqlen that is too
    small, nothing outside the tensors is touched and the rows concerned are undefined.
    """
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, dropout_p)
    backend = attention_backends.choose(backend, q, dropout_p)
    sizes = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, dropout_p)
    if backend not in ("triton", "torch"):
        return attention_backends.call_peer(backend, q, k, v, *sizes)
    seed = None
    if dropout_p:
        # The kernels read their seed on the device, torch's generators take theirs from the host: neither waits.
        seed = torch.randint(1 << 62, (1,), device=q.device if backend == "triton" else "cpu")
    keep = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return _run(q, k, v, *sizes, seed, backend, keep)[0]


def _check(q, k, v, cu_seqlens_q, cu_seqlens_k, dropout_p) -> None:
    refuse_dtensor("varlen_cross_attention", q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(f"{name} must be (rows, heads, d), got {tuple(x.shape)}")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} is {x.dtype}, q is {q.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if k.shape[2] != q.shape[2] or q.shape[2] == 0:
        raise ValueError(f"k has head width {k.shape[2]}, q has {q.shape[2]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q's {q.shape[1]} heads must be a multiple of k's {k.shape[1]}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape or cu_seqlens_q.dim() != 1 or cu_seqlens_q.numel() < 1:
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must both be (B + 1,), got {tuple(cu_seqlens_q.shape)} and "
            f"{tuple(cu_seqlens_k.shape)}"
        )
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32, got {cu_seqlens.dtype}")
        if cu_seqlens.device != q.device:
            raise ValueError(f"{name} is on {cu_seqlens.device}, q on {q.device}")


def _check_offsets(side: str, cu_seqlens: Tensor, longest: int, rows: int) -> None:
    """Raises ValueError for values that do not fit; on an accelerator they are not read."""
    if cu_seqlens.device.type != "cpu":
        return
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] > rows or any(a > b for a, b in pairwise(offsets)):
        raise ValueError(f"cu_seqlens_{side} must rise from 0 to at most {rows}, got {offsets}")
    if any(b - a > longest for a, b in pairwise(offsets)):
        raise ValueError(f"max_seqlen_{side} is {longest}, shorter than a sequence of cu_seqlens_{side}")


@torch.library.custom_op("soundwave_fast::varlen_cross_attention", mutates_args=())
def _varlen_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """out, and what backward needs beside it: log-sum-exp of the kernels, attention weights of the torch path."""
    _check_offsets("q", cu_seqlens_q, max_seqlen_q, q.shape[0])
    _check_offsets("k", cu_seqlens_k, max_seqlen_k, k.shape[0])
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    sizes = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, dropout_p, seed)
    with torch.cuda.device_of(q):
        return attention_backends.module(backend).forward(q, k, v, *sizes, keep)


@_varlen_cross_attention.register_fake
def _(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, dropout_p, seed, backend, keep):
    if backend == "triton":
        saved = q.new_empty((2, *q.shape[:2]), dtype=torch.float32)
    else:
        saved = q.new_empty(attention_backends.module("torch").kept_elements(q, k, max_seqlen_k, dropout_p, keep))
    return q.new_empty(q.shape), saved


@torch.library.custom_op("soundwave_fast::varlen_cross_attention_backward", mutates_args=())
def _varlen_cross_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    saved: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
    need_q: bool,
    need_kv: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; what is not needed has no elements."""
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    sizes = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, dropout_p, seed)
    with torch.cuda.device_of(q):
        return attention_backends.module(backend).backward(grad, q, k, v, out, saved, *sizes, need_q, need_kv)


@_varlen_cross_attention_backward.register_fake
def _(grad, q, k, v, out, saved, cu_q, cu_k, max_q, max_k, scale, dropout_p, seed, backend, need_q, need_kv):
    dq = q.new_empty(q.shape if need_q else (0,))
    return dq, *(k.new_empty(k.shape if need_kv else (0,)) for _ in range(2))


def _save(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.numbers, seed, ctx.backend, _ = inputs
    out, saved = output
    ctx.save_for_backward(q, k, v, out, saved, cu_seqlens_q, cu_seqlens_k, seed)
    ctx.mark_non_differentiable(saved)


def _backward(ctx, grad, _):
    *tensors, seed = ctx.saved_tensors
    need_q, need_k, need_v = ctx.needs_input_grad[:3]
    dq, dk, dv = _run_backward(grad, *tensors, *ctx.numbers, seed, ctx.backend, need_q, need_k or need_v)
    return dq if need_q else None, dk if need_k else None, dv if need_v else None, *[None] * 9


_varlen_cross_attention.register_autograd(_backward, setup_context=_save)
_run = shortcut(_varlen_cross_attention, _save, _backward)
_run_backward = shortcut(_varlen_cross_attention_backward)
