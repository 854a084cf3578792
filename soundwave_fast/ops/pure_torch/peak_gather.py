"""peak_gather in plain torch: peaks as one boolean mask over the batch, rows copied by their flat positions.

Shape legend: B utterances, T frames, D width, N rows of the output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from soundwave_fast.ops.pure_torch.rows import copy_rows


def scan_peaks(
    tokens_BT: Tensor,
    lengths_B: Tensor | None,
    blank: int | None,
    drop_blank: bool,
    scores_BT: Tensor | None,  # given: the best frame of each run; not given: the first
) -> tuple[Tensor, Tensor]:
    """Flat positions b * T + t of the kept frames in order, int64, and how many each utterance keeps, (B,) int32."""
    B, T = tokens_BT.shape
    keep_BT = torch.ones(B, T, dtype=torch.bool, device=tokens_BT.device)
    if T > 1:
        torch.ne(tokens_BT[:, 1:], tokens_BT[:, :-1], out=keep_BT[:, 1:])
    valid_BT = None
    if lengths_B is not None:
        valid_BT = torch.arange(T, device=tokens_BT.device) < lengths_B[:, None]
        keep_BT &= valid_BT
    if scores_BT is not None:
        keep_BT = _best_of_runs(keep_BT, valid_BT, scores_BT)
    if drop_blank:
        keep_BT &= tokens_BT != blank
        if T:
            nothing_B = ~keep_BT.any(1)
            keep_BT[:, 0] |= nothing_B if lengths_B is None else nothing_B & (lengths_B > 0)
    return keep_BT.view(-1).nonzero().squeeze(1), keep_BT.sum(1, dtype=torch.int32)


def _best_of_runs(start_BT: Tensor, valid_BT: Tensor | None, scores_BT: Tensor) -> Tensor:
    """(B, T) bool: the first frame with the highest score of every run; NaN counts as -inf."""
    n = start_BT.numel()
    scores = scores_BT.reshape(-1)
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    run = start_BT.view(-1).cumsum(0) - 1
    if valid_BT is not None:
        run = torch.where(valid_BT.view(-1), run, n)  # frames of the padding share a run of their own
    best = scores.new_full((n + 1,), -torch.inf).scatter_reduce_(0, run, scores, "amax")
    position = torch.arange(n, device=scores.device)
    candidate = torch.where(scores == best[run], position, n)
    winner = candidate.new_full((n + 1,), n).scatter_reduce_(0, run, candidate, "amin")
    best_BT = (winner[run] == position).view_as(start_BT)
    return best_BT if valid_BT is None else best_BT & valid_BT


def gather_peaks(
    features_BTD: Tensor | None,
    kept: Tensor,  # as scan_peaks gives it
    counts_B: Tensor,
    frames: int,  # T
    capacity: int,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Rows (capacity, D), 0 where nothing is kept; their flat positions, int64, -1 there; cu_seqlens (B + 1,) int32.

    Peaks beyond the capacity are left out. With features cu_seqlens stops there too, so that whoever reads the rows
    by it stays inside them; without, it counts all peaks and the rows are None.
    """
    cu_seqlens = counts_B.new_zeros(counts_B.numel() + 1)
    torch.cumsum(counts_B, 0, out=cu_seqlens[1:])
    if kept.numel() > capacity:
        kept = kept[:capacity]
        if features_BTD is not None:
            cu_seqlens.clamp_(max=capacity)
    missing = capacity - kept.numel()
    index_N = F.pad(kept, (0, missing), value=-1) if missing else kept
    if features_BTD is None:
        return None, index_N, cu_seqlens
    rows_ND = features_BTD.reshape(-1, features_BTD.shape[-1]).index_select(0, kept)
    return F.pad(rows_ND, (0, 0, 0, missing)) if missing else rows_ND, index_N, cu_seqlens


def gather_peaks_backward(
    grad_ND: Tensor,
    index_N: Tensor,  # flat positions, ascending, then -1
    cu_seqlens: Tensor,
    batch: int,  # B
    frames: int,  # T
) -> Tensor:
    """(B, T, D): row b * T + t is the gradient of the packed row taken from it, else 0."""
    D = grad_ND.shape[1]
    total = int(cu_seqlens[-1])
    if total < index_N.numel():
        index_N, grad_ND = index_N[:total], grad_ND[:total]
    return copy_rows(grad_ND.new_zeros(batch * frames, D), index_N, grad_ND).view(batch, frames, D)
