"""The steps of linear_ctc_loss between its matrix products, in plain torch.

Shape legend: N rows of several utterances laid end to end, w classes of one vocabulary chunk, B utterances, T longest
utterance, K compact columns (see ops/compact.py), D width, V vocabulary, R rows of any kind.
"""

from __future__ import annotations

import torch
from torch import Tensor


def update_chunk(
    z_Nw: Tensor,  # logits of classes start, start + 1, ...; they, and padding behind the rows, may be destroyed
    out_Nw: Tensor | None,  # z_Nw itself or room of its dtype, for the exponentials; None: not wanted
    start: int,
    columns_BK: Tensor,
    utterance_N: Tensor,  # utterance of each row, ascending
    running_3N: Tensor,  # maximum, offset, and the sum of exp(z - offset) so far; at first -inf, -inf, 0
    picked_NK: Tensor,  # takes the logits of the compact columns
    argmax_N: Tensor | None,  # takes the class of the maximum, the lowest among equals
    expected_ND: Tensor | None,  # what was accumulated relative to the old offset; rescaled to the new one
    base_N: Tensor,  # takes the logarithm of what out_Nw must be multiplied by to give exp(z)
) -> Tensor | None:
    """Take one chunk of logits into the softmax over the vocabulary, and leave its exponentials in out_Nw.

    Compact columns are picked and then count as 0 in out_Nw: their p - occupancy is added elsewhere, in float32 or
    better. Returns (N,), what out_Nw must be multiplied by to stand relative to the new offset; None stands for 1.
    Where neither out_Nw nor expected_ND is wanted the offset is the maximum itself: the best class loses no digit.
    """
    hits = list(_hits(start, z_Nw.shape[1], columns_BK, utterance_N))
    for rows, slots, local in hits:
        picked_NK[rows].index_copy_(1, slots, z_Nw[rows].index_select(1, local).to(picked_NK.dtype))
    wide_Nw = z_Nw.to(running_3N.dtype)
    maximum_N, offset_N, sum_N = running_3N.unbind(0)
    if argmax_N is None:
        top_N = wide_Nw.amax(1)
    else:
        top_N, where_N = wide_Nw.max(1)
        # Strictly greater: among equals the lowest class wins, as in torch.argmax.
        argmax_N.copy_(torch.where(top_N > maximum_N, where_N + start, argmax_N))
    torch.maximum(maximum_N, top_N, out=maximum_N)
    # softmax is one pass over rows that stay in the cache, and the chunk's own sum can be told from the largest
    # probability: exp(top) / sum. So the chunk stands relative to its own logsumexp, whatever the offset.
    into = out_Nw if out_Nw is not None and out_Nw.dtype == wide_Nw.dtype else wide_Nw
    torch.softmax(wide_Nw, 1, out=into)
    if out_Nw is None and expected_ND is None:
        base_N.copy_(top_N)
        own_N = into.amax(1).reciprocal_()
    else:
        torch.sub(top_N, into.amax(1).log_(), out=base_N)
        own_N = None
    if out_Nw is not None and into is not out_Nw:
        out_Nw.copy_(into)
    if out_Nw is not None:
        for rows, _, local in hits:
            out_Nw[rows].index_fill_(1, local, 0.0)
    before_N = offset_N.clone()
    torch.maximum(before_N, base_N, out=offset_N)
    rescale_N, relative_N = (before_N - offset_N).exp_(), (base_N - offset_N).exp_()
    if own_N is not None:
        relative_N.mul_(own_N)
    torch.addcmul(relative_N, sum_N, rescale_N, out=sum_N)
    if expected_ND is not None:
        expected_ND.mul_(rescale_N[:, None])
    return relative_N


def emissions(
    picked_NK: Tensor,
    running_3N: Tensor,  # after the last chunk
    starts_B: Tensor,  # first row of each utterance
    lengths_B: Tensor,
    frames: int,  # T
) -> Tensor:
    """Compact log-probabilities (T, B, K), at most 0; 0 past a length. float64, which costs nothing here."""
    (N, K), B = picked_NK.shape, lengths_B.shape[0]
    _, offset_N, sum_N = running_3N.double().unbind(0)
    # Both come from the same chunk values, so a picked logit exceeds its own logsumexp by rounding at most.
    lp_NK = picked_NK.double().sub_((offset_N + sum_N.log())[:, None]).clamp_(max=0.0)
    t_T = torch.arange(frames, device=picked_NK.device)
    row_TB = (starts_B + t_T[:, None]).clamp(max=max(N - 1, 0))
    lp_TBK = lp_NK[row_TB] if N else lp_NK.new_zeros(frames, B, K)
    return lp_TBK.masked_fill_((t_T[:, None] >= lengths_B)[..., None], 0.0)


def residual(
    lp_TBK: Tensor,
    gamma_TBK: Tensor,  # occupancy, of any float dtype
    first_BK: Tensor,
    utterance_N: Tensor,
    starts_B: Tensor,
    lengths_B: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """p - gamma (N, K) in `dtype`: 0 in columns that repeat a class, and in rows past a length."""
    t_N = torch.arange(len(utterance_N), device=lp_TBK.device) - starts_B[utterance_N]
    residual_NK = lp_TBK[t_N, utterance_N].exp_().sub_(gamma_TBK[t_N, utterance_N])
    repeats_BK = first_BK != torch.arange(first_BK.shape[1], device=first_BK.device)
    never_NK = repeats_BK[utterance_N] | (t_N >= lengths_B[utterance_N])[:, None]
    return residual_NK.masked_fill_(never_NK, 0.0).to(dtype)


def scale_rows(
    x_RD: Tensor,
    factor_R: Tensor,
    log_factor_R: Tensor | None,  # None: 0
    dtype: torch.dtype,
) -> Tensor:
    """x * factor * exp(log_factor) in `dtype`, row by row, as a new tensor."""
    wide = torch.promote_types(x_RD.dtype, torch.float32)
    factor_R = factor_R.to(wide)
    if log_factor_R is not None:
        factor_R = factor_R * log_factor_R.to(wide).exp()
    if len(x_RD) == 1 and x_RD.dtype == dtype:
        return x_RD * factor_R[0]  # a scalar of a wider dtype needs no wider copy of x
    return (x_RD * factor_R[:, None]).to(dtype)


def add_label_rows(
    weight_grad_VD: Tensor,  # changed in place
    rows_KD: Tensor,
    columns_K: Tensor,
    first_K: Tensor,
) -> None:
    """weight_grad[columns[k]] += rows[k] for the labels, k > 0, in the column that is the first of its class."""
    slots = (first_K == torch.arange(len(first_K), device=first_K.device)).nonzero().squeeze(1)[1:]
    # These classes are distinct, so rows can be read, added to and put back: much faster than index_add_.
    columns = columns_K[slots]
    added = weight_grad_VD.index_select(0, columns) + rows_KD[slots]
    weight_grad_VD.index_copy_(0, columns, added.to(weight_grad_VD.dtype))


def _hits(start: int, width: int, columns_BK: Tensor, utterance_N: Tensor):
    """(rows, compact columns, chunk columns) of every utterance that owns classes of this chunk."""
    local_BK = columns_BK - start
    inside_BK = (local_BK >= 0) & (local_BK < width)
    touched = inside_BK.any(1).nonzero().squeeze(1)
    bounds = torch.stack([touched, touched + 1]).to(utterance_N.dtype)
    first, end = torch.searchsorted(utterance_N, bounds).tolist()
    for b, row, stop in zip(touched.tolist(), first, end):
        if row < stop:
            slots = inside_BK[b].nonzero().squeeze(1)
            yield slice(row, stop), slots, local_BK[b, slots]
