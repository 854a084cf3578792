"""varlen_cross_attention: attention of packed queries to packed keys, utterance by utterance (flash-attn's layout).

Shape legend: Nq, Nk rows over the batch, B utterances, H query heads, G key heads, d head width, R = H / G.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

# A bucket of utterances may hold this many times the rows it needs before another SDPA call is worth its overhead.
_PADDING_RATIO = 1.25


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
) -> Tensor:
    """softmax(q k^T * softmax_scale) v within each utterance: (Nq, H, d), q's dtype; not causal.

    Query head h reads key head h // (H / G). A query whose utterance has no keys gives 0 and zero gradients, as do
    rows beyond cu_seqlens[-1]. Differentiable in q, k and v. dropout_p applies to the attention weights whenever it
    is above 0: pass 0 when evaluating.

    Raises ValueError for shapes, offsets (checked on the CPU) or dropout_p that do not fit, TypeError for dtypes.
    """
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p)
    B = cu_seqlens_q.numel() - 1
    if cu_seqlens_q.device.type == "cpu":
        buckets = _buckets(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist())
    else:  # the lengths are not on the host: one bucket as wide as the caller says
        buckets = [(torch.arange(B, device=q.device), max_seqlen_q, max_seqlen_k)]
    # Sums of no rows: 0, but they tie the output to all three inputs when there is nothing to attend.
    out = torch.zeros_like(q) + (q[:0].sum() + k[:0].sum() + v[:0].sum())
    for rows, width_q, width_k in buckets:
        slot_q, index_q = _slots(cu_seqlens_q, rows, width_q)
        slot_k, index_k = _slots(cu_seqlens_k, rows, width_k)
        if index_q.numel() == 0 or index_k.numel() == 0:
            continue
        mixed = _attend(
            _pad(q, slot_q, index_q, len(rows), width_q),
            _pad(k, slot_k, index_k, len(rows), width_k),
            _pad(v, slot_k, index_k, len(rows), width_k),
            (cu_seqlens_k.diff()[rows]).long(),
            softmax_scale,
            dropout_p,
        )
        out = out.index_copy(0, index_q, mixed.reshape(-1, *q.shape[1:]).index_select(0, slot_q))
    return out


def _buckets(lengths_q: list[int], lengths_k: list[int]) -> list[tuple[Tensor, int, int]]:
    """(utterances, longest query, longest key) of utterances of like length; those with nothing to do are left out."""
    order = sorted((nk, nq, b) for b, (nq, nk) in enumerate(zip(lengths_q, lengths_k)) if nq and nk)
    groups: list[list[tuple[int, int, int]]] = []
    for item in order:
        if groups:
            trial = [*groups[-1], item]
            padded = len(trial) * max(nk for nk, _, _ in trial) * max(nq for _, nq, _ in trial)
            if padded <= _PADDING_RATIO * sum(nk * nq for nk, nq, _ in trial):
                groups[-1] = trial
                continue
        groups.append([item])
    return [(torch.tensor([b for _, _, b in g]), max(nq for _, nq, _ in g), max(nk for nk, _, _ in g)) for g in groups]


def _slots(cu_seqlens: Tensor, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Where the rows of some utterances go in their (len(rows), width) block, and where they lie in the packed one."""
    start = cu_seqlens[:-1].long()[rows]
    place = torch.arange(width, device=cu_seqlens.device)
    real = place < cu_seqlens.diff()[rows][:, None]
    slot = real.reshape(-1).nonzero().squeeze(1)
    return slot, (start[:, None] + place).reshape(-1)[slot]


def _pad(x: Tensor, slot: Tensor, index: Tensor, n: int, width: int) -> Tensor:
    """(N, heads, d) packed -> (n, width, heads, d), zeros where there is no row."""
    padded = x.new_zeros(n * width, *x.shape[1:]).index_copy(0, slot, x.index_select(0, index))
    return padded.view(n, width, *x.shape[1:])


def _attend(q: Tensor, k: Tensor, v: Tensor, lengths_k: Tensor, scale: float | None, dropout_p: float) -> Tensor:
    """(n, Lq, H, d) by (n, Lk, G, d) -> (n, Lq, H, d)."""
    n, Lq, H, d = q.shape
    Lk, G = k.shape[1:3]
    R = H // G
    # Nothing is causal, so the R query heads that share a key head are simply more queries of it: no copy of k or v.
    q = q.view(n, Lq, G, R, d).permute(0, 2, 1, 3, 4).reshape(n, G, Lq * R, d)
    mask = None
    if bool((lengths_k < Lk).any()) if lengths_k.device.type == "cpu" else True:
        # An utterance without keys sees one padding key: k = v = 0 there, so output and gradients are 0, not NaN.
        real = torch.arange(Lk, device=q.device) < lengths_k.clamp(min=1)[:, None]
        mask = real[:, None, None, :]
    out = F.scaled_dot_product_attention(
        q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, dropout_p=dropout_p, scale=scale
    )
    return out.view(n, G, Lq, R, d).permute(0, 2, 1, 3, 4).reshape(n, Lq, H, d)


def _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(f"{name} must be (rows, heads, d), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} is {x.dtype}, q is {q.dtype}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if k.shape[2] != q.shape[2]:
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
    sides = (("q", cu_seqlens_q, max_seqlen_q, q.shape[0]), ("k", cu_seqlens_k, max_seqlen_k, k.shape[0]))
    for side, cu_seqlens, longest, rows in sides:
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens_{side} must be int32, got {cu_seqlens.dtype}")
        if cu_seqlens.device.type != "cpu":
            continue
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets[-1] > rows or any(a > b for a, b in pairwise(offsets)):
            raise ValueError(f"cu_seqlens_{side} must rise from 0 to at most {rows}, got {offsets}")
        if any(b - a > longest for a, b in pairwise(offsets)):
            raise ValueError(f"max_seqlen_{side} is {longest}, shorter than a sequence of cu_seqlens_{side}")
