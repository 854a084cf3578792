"""torch's fused CPU attention over packed utterances: what varlen_cross_attention runs there in full precision.

No weights are kept, one log-sum-exp a row and head is. The queries are scaled before they come in: the kernel's forward
and backward round a scale of their own differently, and that difference is in every weight that backward makes.

Shape legend: Nq, Nk rows over the batch, B utterances, H heads, n rows of one utterance, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

Utterance = tuple[slice, slice]  # its rows of q, its rows of k
_LARGEST = 24.0  # log-sum-exp; its own rounding is an error of every weight that backward makes from it


def serves(q: Tensor, k: Tensor, dropout_p: float) -> bool:
    """Whether it is used: as many key heads as query heads, no dropout; in half precision matrix products are level."""
    return q.dtype in (torch.float32, torch.float64) and q.shape[1] == k.shape[1] and not dropout_p


def forward(q, k, v, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, out: Tensor, lse: Tensor) -> None:
    """Fill the rows of out (Nq, H, d) whose utterance has keys, and lse (Nq * H,) unless it has no elements."""
    q, k, v = (_rows_in_line(x) for x in (q, k, v))
    used = 0
    for rows_q, rows_k in utterances(cu_seqlens_q, cu_seqlens_k):
        queries, sides = _heads(q, rows_q), (_heads(k, rows_k), _heads(v, rows_k))
        mixed, lse_1Hn = _forward(queries * scale, *sides, 0.0, False, scale=1.0)
        if _large(lse_1Hn):  # scaled queries are rounded, which now shows; backward will not use the kernel
            mixed, lse_1Hn = _forward(queries, *sides, 0.0, False, scale=scale)
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
    dq: Tensor,  # (Nq, H, d)
    dk: Tensor,  # (Nk, H, d)
    dv: Tensor,  # (Nk, H, d)
) -> list[Utterance]:
    """Fill the rows of dq, dk and dv of utterances that have both queries and keys.

    Those with scores too large for a log-sum-exp in the tensors' precision are left alone, and returned.
    """
    grad, q, k, v = (_rows_in_line(x) for x in (grad, q, k, v))
    used, left = 0, []
    for rows_q, rows_k in utterances(cu_seqlens_q, cu_seqlens_k):
        grads, queries, result = (_heads(x, rows_q) for x in (grad, q, out))
        lse_1Hn = lse[used : used + queries[..., 0].numel()].view(queries.shape[:3])
        used += lse_1Hn.numel()
        if _large(lse_1Hn):
            left.append((rows_q, rows_k))
            continue
        sides = (queries * scale, _heads(k, rows_k), _heads(v, rows_k), result, lse_1Hn)
        if rows_k.stop - rows_k.start == 1:  # one key has weight 1 whatever its score; the kernel would add rounding
            pieces = torch.zeros_like(queries), torch.zeros_like(sides[1]), grads.sum(2, keepdim=True)
        else:
            pieces = _backward(grads, *sides, 0.0, False, scale=1.0)
        for target, rows, piece in zip((dq, dk, dv), (rows_q, rows_k, rows_k), pieces):
            target[rows] = piece[0].transpose(0, 1)
        dq[rows_q].mul_(scale)
    return left


def utterances(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[Utterance]:
    """Those that have both queries and keys."""
    for (start_q, end_q), (start_k, end_k) in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist())):
        if end_q > start_q and end_k > start_k:
            yield slice(start_q, end_q), slice(start_k, end_k)


def _large(lse: Tensor) -> bool:
    return not lse.abs().max() <= _LARGEST  # NaN is, too


def _rows_in_line(x_NHd: Tensor) -> Tensor:
    """x, copied where a row of a head is not d neighbours in memory, or rows overlap: the kernel looks at neither."""
    row, _, element = x_NHd.stride()
    return x_NHd if element == 1 and row >= x_NHd.shape[2] else x_NHd.contiguous()


def _heads(x_NHd: Tensor, rows: slice) -> Tensor:
    """(n, H, d) -> (1, H, n, d), a view."""
    return x_NHd[rows].transpose(0, 1)[None]
