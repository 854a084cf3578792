"""What the two CTC ops share: argument checks, compact emission columns, and alpha/beta over them in float64.

CTC reads at most S + 1 of the C columns of an utterance's log-probabilities: the blank and its labels. Everything
here works on that compact (T, B, K) tensor, K = S + 1, where float64 costs nothing.

Shape legend: T frames, B utterances, S longest target, K = S + 1 compact columns, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Lengths = Tensor | Sequence[int] | int


@dataclass(frozen=True)
class CompactTargets:
    """Targets rewritten over compact columns: column 0 is the blank, column s + 1 is label s of the utterance.

    A label that repeats uses the column of its first occurrence; columns past the target hold the blank again.
    """

    columns_BK: Tensor  # int64 class of every compact column
    first_BK: Tensor  # int64 compact column where the same class first occurs
    input_lengths_B: Tensor  # int64
    target_lengths_B: Tensor  # int64

    @property
    def ids_BS(self) -> Tensor:
        """The targets as compact columns, at least one wide because the native op rejects (B, 0) storage."""
        return self.first_BK[:, 1:] if self.first_BK.shape[1] > 1 else self.first_BK

    def __getitem__(self, rows: slice) -> CompactTargets:
        """The same for a range of utterances."""
        return CompactTargets(
            self.columns_BK[rows], self.first_BK[rows], self.input_lengths_B[rows], self.target_lengths_B[rows]
        )


def lengths_on_host(lengths: Lengths, name: str, batch: int, most: int | None) -> list[int]:
    """Lengths in any of the forms F.ctc_loss takes, as host ints; ValueError / TypeError name the argument."""
    if isinstance(lengths, Tensor):
        if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
            raise TypeError(f"{name} must hold integers, got {lengths.dtype}")
        host = lengths.reshape(-1).tolist()
    else:
        host = [int(n) for n in (lengths if isinstance(lengths, Sequence) else [lengths])]
    if len(host) != batch:
        raise ValueError(f"{name} must hold one length per utterance ({batch}), got {len(host)}")
    for b, n in enumerate(host):
        if n < 0 or (most is not None and n > most):
            raise ValueError(f"{name}[{b}] is {n}, outside 0..{most if most is not None else ''}")
    return host


def compact_targets(
    targets: Tensor,  # (B, S) padded or (sum of target_lengths,) concatenated, int32 or int64
    input_lengths: Lengths,  # (B,)
    target_lengths: Lengths,  # (B,)
    batch: int,
    frames: int,
    classes: int,  # labels live in [0, classes)
    blank: int,
    device: torch.device,
) -> CompactTargets:
    """Check the arguments of a CTC loss and build its compact columns on `device`.

    What lies past a target length is never looked at. Raises ValueError for lengths out of range, labels outside
    [0, classes) or equal to blank, and shapes that disagree; TypeError for targets that are not int32 / int64.
    """
    if targets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"targets must be int32 or int64, got {targets.dtype}")
    input_host = lengths_on_host(input_lengths, "input_lengths", batch, frames)
    most = targets.shape[1] if targets.dim() == 2 else None
    target_host = lengths_on_host(target_lengths, "target_lengths", batch, most)
    targets = targets.to(device=device, dtype=torch.int64)
    target_lengths_B = torch.tensor(target_host, dtype=torch.int64, device=device)
    S = max(target_host, default=0)
    slots = torch.arange(S, device=device)
    real_BS = slots < target_lengths_B[:, None]
    if targets.dim() == 2:
        if targets.shape[0] != batch:
            raise ValueError(f"targets must have {batch} rows, got {tuple(targets.shape)}")
        labels_BS = targets[:, :S]
    elif targets.dim() == 1:
        if targets.numel() != sum(target_host):
            raise ValueError(
                f"concatenated targets hold {targets.numel()} labels, but target_lengths add up to {sum(target_host)}"
            )
        labels_BS = targets.new_full((batch, S), blank).masked_scatter(real_BS, targets)
    else:
        raise ValueError(f"targets must be 1-D or 2-D, got {tuple(targets.shape)}")
    labels_BS = labels_BS.masked_fill(~real_BS, blank)
    if targets.device.type == "cpu":  # on an accelerator this would be a host sync
        wrong_BS = real_BS & ((labels_BS < 0) | (labels_BS >= classes) | (labels_BS == blank))
        if wrong_BS.any():
            b, s = wrong_BS.nonzero()[0].tolist()
            raise ValueError(
                f"targets[{b}, {s}] is {int(labels_BS[b, s])}: a label must lie in [0, {classes}) and not be "
                f"blank ({blank})"
            )
    columns_BK = torch.nn.functional.pad(labels_BS, (1, 0), value=blank)
    input_lengths_B = torch.tensor(input_host, dtype=torch.int64, device=device)
    return CompactTargets(columns_BK, _first_occurrence(columns_BK), input_lengths_B, target_lengths_B)


def _first_occurrence(x_BK: Tensor) -> Tensor:
    """(B, K) int64: the first column of the row that holds the same value. O(K log K), not K x K."""
    sorted_BK, order_BK = x_BK.sort(dim=1, stable=True)
    slots = torch.arange(x_BK.shape[1], device=x_BK.device).expand_as(x_BK)
    new_BK = torch.ones_like(sorted_BK, dtype=torch.bool)
    new_BK[:, 1:] = sorted_BK[:, 1:] != sorted_BK[:, :-1]
    run_BK = torch.where(new_BK, slots, 0).cummax(dim=1).values
    return torch.empty_like(order_BK).scatter_(1, order_BK, order_BK.gather(1, run_BK))


def alpha_beta(
    log_probs_TBK: Tensor,  # float64, compact emissions; frames past an input length may hold anything
    targets: CompactTargets,
    need_occupancy: bool,
) -> tuple[Tensor, Tensor | None]:
    """Negative log-likelihood (B,) and occupancy gamma (T, B, K), both float64.

    gamma_t(k) is the posterior probability that frame t emits column k (Graves 2006, eq. 14); it is 0 in columns that
    repeat an earlier one, past the input length, and everywhere in an utterance whose loss is inf. The native op
    returns exp(lp) - gamma as its gradient, so gamma = exp(lp) - gradient; frames are first shifted to a maximum of
    0 (gamma does not change) so that exp stays in [0, 1] whatever the input's scale.
    """
    T, B, K = log_probs_TBK.shape
    if B == 0 or T == 0:  # the native op rejects both
        feasible_B = targets.target_lengths_B == 0
        nll_B = torch.where(feasible_B, 0.0, torch.inf).to(log_probs_TBK.dtype)
        return nll_B, log_probs_TBK.new_zeros(T, B, K) if need_occupancy else None
    dead_TB = torch.arange(T, device=log_probs_TBK.device)[:, None] >= targets.input_lengths_B
    lp_TBK = log_probs_TBK.masked_fill(dead_TB[..., None], 0.0)
    top_TB = lp_TBK.amax(2)
    top_TB = torch.where(top_TB.isfinite(), top_TB, 0.0)
    lp_TBK = lp_TBK - top_TB[..., None]
    arguments = (targets.ids_BS, targets.input_lengths_B, targets.target_lengths_B)
    nll_B, alpha = torch._ctc_loss(lp_TBK, *arguments, 0, False)
    gamma_TBK = None
    if need_occupancy:
        grad_TBK = torch.ops.aten._ctc_loss_backward(torch.ones_like(nll_B), lp_TBK, *arguments, nll_B, alpha, 0, False)
        gamma_TBK = lp_TBK.exp().sub_(grad_TBK)
        never_TBK = dead_TB[..., None] | (nll_B == torch.inf)[:, None] | (lp_TBK == -torch.inf)
        gamma_TBK = gamma_TBK.masked_fill_(never_TBK, 0.0).clamp_(0.0, 1.0)
    return nll_B - top_TB.sum(0), gamma_TBK


def reduce_loss(nll_B: Tensor, target_lengths_B: Tensor, reduction: str) -> Tensor:
    """F.ctc_loss's reductions: "none"; "sum"; "mean" of nll over target length (at least 1). An empty batch gives 0."""
    if reduction == "none":
        return nll_B
    if reduction == "sum":
        return nll_B.sum()
    return (nll_B * mean_weights(target_lengths_B, nll_B.dtype)).sum()


def mean_weights(target_lengths_B: Tensor, dtype: torch.dtype) -> Tensor:
    """(B,): what "mean" multiplies each utterance's loss by."""
    B = max(target_lengths_B.numel(), 1)
    return 1.0 / (target_lengths_B.clamp(min=1).to(dtype) * B)


def check_reduction(reduction: str) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
