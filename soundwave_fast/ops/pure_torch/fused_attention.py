"""torch's fused CPU attention over packed utterances: what varlen_cross_attention runs there in full precision.

No weights are kept, one log-sum-exp a row and head is. Shape legend: Nq, Nk rows over the batch, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def serves(q: Tensor, k: Tensor, dropout_p: float) -> bool:
    """Whether it is used: as many key heads as query heads, no dropout; in half precision matrix products are level."""
    return q.dtype in (torch.float32, torch.float64) and q.shape[1] == k.shape[1] and not dropout_p


def forward(q, k, v, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, out: Tensor, lse: Tensor) -> None:
    """Fill the rows of out (Nq, H, d) whose utterance has keys, and lse (Nq * H,) unless it has no elements."""
    used = 0
    for rows_q, rows_k in _utterances(cu_seqlens_q, cu_seqlens_k):
        sides = (_heads(q, rows_q), _heads(k, rows_k), _heads(v, rows_k))
        mixed, lse_1Hn = _forward(*sides, 0.0, False, scale=scale)
        out[rows_q] = mixed[0].transpose(0, 1)
        if lse.numel():
            lse[used : used + lse_1Hn.numel()] = lse_1Hn.flatten()
            used += lse_1Hn.numel()
    lse[used:].zero_()


def backward(
    grad: Tensor,  # (Nq, H, d)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,  # forward's
    lse: Tensor,  # forward's
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    dq: Tensor,  # (Nq, H, d), or no elements if not needed
    dk: Tensor,  # (Nk, H, d), or no elements
    dv: Tensor,  # as dk
) -> None:
    """Fill the rows of dq, dk and dv of utterances that have both queries and keys."""
    used = 0
    for rows_q, rows_k in _utterances(cu_seqlens_q, cu_seqlens_k):
        grads, queries, result = (_heads(x, rows_q) for x in (grad, q, out))
        lse_1Hn = lse[used : used + queries[..., 0].numel()].view(queries.shape[:3])
        used += lse_1Hn.numel()
        sides = (queries, _heads(k, rows_k), _heads(v, rows_k), result, lse_1Hn)
        if rows_k.stop - rows_k.start == 1:  # one key has weight 1 whatever its score; the kernel would add rounding
            pieces = torch.zeros_like(queries), torch.zeros_like(sides[1]), grads.sum(2, keepdim=True)
        else:
            pieces = _backward(grads, *sides, 0.0, False, scale=scale)
        for target, rows, piece in zip((dq, dk, dv), (rows_q, rows_k, rows_k), pieces):
            if target.numel():
                target[rows] = piece[0].transpose(0, 1)


def _utterances(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, slice]]:
    for (start_q, end_q), (start_k, end_k) in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist())):
        if end_q > start_q and end_k > start_k:
            yield slice(start_q, end_q), slice(start_k, end_k)


def _heads(x_NHd: Tensor, rows: slice) -> Tensor:
    """(n, H, d) -> (1, H, n, d), a view."""
    return x_NHd[rows].transpose(0, 1)[None]
