"""peak_gather: keep one frame of every run of equal CTC tokens, packed over the batch.

Shape legend: B utterances, T frames, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from soundwave_fast.packed import Packed

_CAPACITY_STEP = 256


def ctc_peaks(
    tokens: Tensor,  # (B, T) integers, e.g. the argmax of the CTC head
    lengths: Tensor | Sequence[int] | None = None,  # (B,); None: T everywhere
    blank: int | None = None,
    drop_blank: bool = False,
    select: str = "first",
    scores: Tensor | None = None,  # (B, T), for select="peak"
    capacity: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Flat positions b * T + t of the kept frames, (capacity,) int64 filled up with -1, and cu_seqlens (B + 1,) int32.

    Among the first lengths[b] frames, t is kept iff t == 0 or tokens[b, t] != tokens[b, t - 1] (Soundwave,
    section 2.3; its released code also keeps frames of the padding, this does not). select="peak" keeps, of each
    such run, the frame with the highest score instead of the first (the earlier one on a tie). drop_blank drops runs
    of `blank`, judged on the raw sequence: "a blank a" keeps two frames. An utterance with frames but nothing to
    keep keeps its frame 0; one of length 0 keeps nothing.

    Shapes depend on B, T and capacity alone (default: B * T rounded up to 256) and nothing syncs with an
    accelerator; there, peaks beyond a capacity that is too small are lost and cu_seqlens[-1] > capacity says so.

    Raises ValueError for shapes, lengths outside 0..T or a capacity that is too small (both checked on the CPU),
    TypeError for tokens that are not integers.
    """
    if tokens.dim() != 2:
        raise ValueError(f"tokens must be (B, T), got {tuple(tokens.shape)}")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"tokens must be integers, got {tokens.dtype}")
    if drop_blank and blank is None:
        raise ValueError("blank must be given with drop_blank")
    if select not in ("first", "peak"):
        raise ValueError(f"select must be 'first' or 'peak', got {select!r}")
    if select == "peak" and (scores is None or scores.shape != tokens.shape):
        got = None if scores is None else tuple(scores.shape)
        raise ValueError(f"scores must be {tuple(tokens.shape)} with select='peak', got {got}")
    B, T = tokens.shape
    if capacity is None:
        capacity = -(-B * T // _CAPACITY_STEP) * _CAPACITY_STEP
    time_T = torch.arange(T, device=tokens.device)
    lengths_B = _lengths(lengths, B, T, tokens.device)
    valid_BT = time_T < lengths_B[:, None]
    start_BT = torch.ones_like(valid_BT)
    start_BT[:, 1:] = tokens[:, 1:] != tokens[:, :-1]
    start_BT &= valid_BT
    keep_BT = start_BT if select == "first" else _best_of_runs(start_BT, valid_BT, scores)
    if drop_blank:
        keep_BT = keep_BT & (tokens != blank)
    nothing_B = ~keep_BT.any(1) if T else torch.ones_like(lengths_B, dtype=torch.bool)
    keep_BT = keep_BT | (nothing_B[:, None] & (time_T == 0) & valid_BT)

    order = keep_BT.reshape(-1).cumsum(0)
    slot = torch.where(keep_BT.reshape(-1), order - 1, capacity).clamp(max=capacity)  # the last slot is thrown away
    index = torch.full((capacity + 1,), -1, dtype=torch.int64, device=tokens.device)
    index.scatter_(0, slot, torch.arange(B * T, device=tokens.device))
    cu_seqlens = torch.nn.functional.pad(keep_BT.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    if cu_seqlens.device.type == "cpu" and int(cu_seqlens[-1]) > capacity:
        raise ValueError(f"capacity is {capacity}, but {int(cu_seqlens[-1])} frames are kept")
    return index[:capacity], cu_seqlens


def peak_gather(
    features: Tensor,  # (B, T, D)
    tokens: Tensor,  # (B, T)
    lengths: Tensor | Sequence[int] | None = None,  # (B,)
    blank: int | None = None,
    drop_blank: bool = False,
    *,
    select: str = "first",
    scores: Tensor | None = None,  # (B, T)
) -> Packed:
    """The rows of features that `ctc_peaks` keeps, as a Packed of data (total, D) with `index` (total,) int64.

    Differentiable through features: backward writes every row once, kept rows their gradient and others 0.
    Errors as in ctc_peaks, and ValueError when features do not go with tokens.
    """
    if features.dim() != 3 or features.shape[:2] != tokens.shape:
        raise ValueError(f"features must be (B, T, D) with (B, T) = {tuple(tokens.shape)}, got {tuple(features.shape)}")
    index, cu_seqlens = ctc_peaks(tokens, lengths, blank, drop_blank, select, scores)
    offsets = cu_seqlens.tolist()  # the one copy to the host: what follows needs the number of rows
    index = index[: offsets[-1]]
    max_len = max((end - start for start, end in pairwise(offsets)), default=0)
    return Packed(_GatherRows.apply(features, index), cu_seqlens, cu_seqlens.diff(), max_len, index)


def _lengths(lengths: Tensor | Sequence[int] | None, B: int, T: int, device: torch.device) -> Tensor:
    if lengths is None:
        return torch.full((B,), T, device=device)
    lengths_B = torch.as_tensor(lengths)
    if lengths_B.shape != (B,):
        raise ValueError(f"lengths must be ({B},), got {tuple(lengths_B.shape)}")
    if lengths_B.device.type == "cpu" and B and not (0 <= int(lengths_B.min()) and int(lengths_B.max()) <= T):
        raise ValueError(f"lengths must lie in 0..{T}, got {lengths_B.tolist()}")
    return lengths_B.to(device)


def _best_of_runs(start_BT: Tensor, valid_BT: Tensor, scores_BT: Tensor) -> Tensor:
    """(B, T) bool: the first frame with the highest score of every run; NaN counts as -inf."""
    n = start_BT.numel()
    valid = valid_BT.reshape(-1)
    scores = scores_BT.detach().reshape(-1)
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    run = torch.where(valid, start_BT.reshape(-1).cumsum(0) - 1, n)  # frames of the padding share a run of their own
    best = scores.new_full((n + 1,), -torch.inf).scatter_reduce_(0, run, scores, "amax")
    position = torch.arange(n, device=scores.device)
    candidate = torch.where(valid & (scores == best[run]), position, n)
    winner = candidate.new_full((n + 1,), n).scatter_reduce_(0, run, candidate, "amin")
    return (valid & (winner[run] == position)).view_as(start_BT)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features_BTD: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = features_BTD.shape
        return features_BTD.reshape(-1, features_BTD.shape[-1]).index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (index,) = ctx.saved_tensors
        B, T, D = ctx.shape
        # index holds no position twice, so a plain copy does what index_select's own backward would accumulate.
        return grad.new_zeros(B * T, D).index_copy(0, index, grad).view(B, T, D), None
