"""What the two CTC ops share: argument checks, compact emission columns, reductions.

CTC reads at most S + 1 of the C columns of an utterance's log-probabilities: the blank and its labels. Everything
between the ops works on that compact (T, B, K) tensor, K = S + 1.

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

    A label that repeats uses the column of its first occurrence; columns past the target hold the blank again. Every
    class and column is in range, also where lengths or labels on an accelerator were not: such an utterance has input
    length 0 and target length -1, which alpha_beta answers with a loss of NaN.
    """

    columns_BK: Tensor  # int64 class of every compact column
    first_BK: Tensor  # int64 compact column where the same class first occurs
    input_lengths_B: Tensor  # int64
    target_lengths_B: Tensor  # int64

    def __getitem__(self, rows: slice) -> CompactTargets:
        """The same for a range of utterances."""
        return CompactTargets(
            self.columns_BK[rows], self.first_BK[rows], self.input_lengths_B[rows], self.target_lengths_B[rows]
        )


def lengths_tensor(lengths: Lengths) -> Tensor:
    """Lengths as a custom op takes them: a tensor as it is, wherever it lies, a sequence or a number on the CPU."""
    if isinstance(lengths, Tensor):
        return lengths
    return torch.tensor([lengths] if isinstance(lengths, int) else list(lengths), dtype=torch.int64)


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
    """Check the arguments of a CTC loss and build its compact columns on `device`, without waiting for an accelerator.

    S is the longest target where target_lengths are known to Python; while they are compiled as a tensor it is what
    the shape of targets allows; where they live on an accelerator that too, cut to frames + 1, which no input fits.

    What lies past a target length is never looked at. Raises ValueError for lengths out of range, labels outside
    [0, classes) or equal to blank, and shapes that disagree; TypeError for targets that are not int32 / int64. Values
    that live on an accelerator are not checked, see CompactTargets.
    """
    if targets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"targets must be int32 or int64, got {targets.dtype}")
    if targets.dim() not in (1, 2):
        raise ValueError(f"targets must be 1-D or 2-D, got {tuple(targets.shape)}")
    if targets.dim() == 2 and targets.shape[0] != batch:
        raise ValueError(f"targets must have {batch} rows, got {tuple(targets.shape)}")
    compiling = torch.compiler.is_compiling()
    input_lengths = _checked_lengths(input_lengths, "input_lengths", batch)
    target_lengths = _checked_lengths(target_lengths, "target_lengths", batch)
    if device.type == "cpu":
        targets, input_lengths, target_lengths = (
            x.cpu() if isinstance(x, Tensor) else x for x in (targets, input_lengths, target_lengths)
        )
    if isinstance(target_lengths, Tensor) and (compiling or not target_lengths.is_cpu):
        longest = targets.shape[-1] if target_lengths.is_cpu else min(targets.shape[-1], frames + 1)
    else:
        host = target_lengths.tolist() if isinstance(target_lengths, Tensor) else target_lengths
        longest = max(0, max(host)) if batch else 0
    sizes = longest, frames, classes, blank, device
    if not compiling:
        return CompactTargets(*_compact(targets, input_lengths, target_lengths, *sizes))
    lengths = (
        x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.int64) for x in (input_lengths, target_lengths)
    )
    return CompactTargets(*torch.ops.soundwave_fast.compact_targets(targets, *lengths, *sizes))


def lengths_on_host(lengths: Lengths, name: str, batch: int, most: int | None) -> list[int]:
    """Lengths in any of the forms F.ctc_loss takes, as host ints; ValueError / TypeError name the argument."""
    lengths = _checked_lengths(lengths, name, batch)
    host = lengths.tolist() if isinstance(lengths, Tensor) else lengths
    for b, n in enumerate(host):
        if n < 0 or (most is not None and n > most):
            raise ValueError(f"{name}[{b}] is {n}, outside 0..{most if most is not None else ''}")
    return host


def _checked_lengths(lengths: Lengths, name: str, batch: int) -> Tensor | list[int]:
    """A (B,) tensor of integers, wherever it lies, or a list; their values are not looked at."""
    if not isinstance(lengths, Tensor):
        lengths = list(lengths) if isinstance(lengths, Sequence) else [lengths]
        if not torch.compiler.is_compiling():  # where int() would bake a symbolic length into the graph
            lengths = [int(n) for n in lengths]
        count = len(lengths)
    else:
        if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
            raise TypeError(f"{name} must hold integers, got {lengths.dtype}")
        lengths, count = lengths.reshape(-1), lengths.numel()
    if count != batch:
        raise ValueError(f"{name} must hold one length per utterance ({batch}), got {count}")
    return lengths


def _to(x: Tensor, device: torch.device) -> Tensor:
    """x on device. A copy to an accelerator is not waited for; its host memory is read before the call returns."""
    return x.to(device, non_blocking=device.type != "cpu")


@torch.library.custom_op("soundwave_fast::compact_targets", mutates_args=())
def _compact_op(
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    longest: int,
    frames: int,
    classes: int,
    blank: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _compact(targets, input_lengths, target_lengths, longest, frames, classes, blank, device)


@_compact_op.register_fake
def _(targets, input_lengths, target_lengths, longest, frames, classes, blank, device):
    columns_BK = targets.new_empty((input_lengths.shape[0], longest + 1), dtype=torch.int64, device=device)
    lengths_B = targets.new_empty(input_lengths.shape, dtype=torch.int64, device=device)
    return columns_BK, torch.empty_like(columns_BK), lengths_B, torch.empty_like(lengths_B)


def _compact(
    targets: Tensor,
    input_lengths: Tensor | list[int],
    target_lengths: Tensor | list[int],
    longest: int,  # S: longer targets are cut
    frames: int,
    classes: int,
    blank: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """CompactTargets' four tensors on device, with what lies on the host checked."""
    width, batch = targets.shape[-1], len(input_lengths)
    if _on_host(input_lengths):
        input_lengths = lengths_on_host(input_lengths, "input_lengths", batch, frames)
    if _on_host(target_lengths):
        target_lengths = lengths_on_host(target_lengths, "target_lengths", batch, width)
        if targets.dim() == 1 and sum(target_lengths) != width:
            raise ValueError(
                f"concatenated targets hold {width} labels, but target_lengths add up to {sum(target_lengths)}"
            )
    lengths = (
        _to(x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.int64), device).to(torch.int64, copy=True)
        for x in (input_lengths, target_lengths)
    )
    if targets.is_cpu and not isinstance(input_lengths, Tensor) and not isinstance(target_lengths, Tensor):
        rows = _compact_rows(targets, target_lengths, longest, classes, blank)
        return *(_to(x, device) for x in rows), *lengths
    return _mark(_to(targets, device), *lengths, longest, frames, classes, blank)


def _on_host(lengths: Tensor | list[int]) -> bool:
    return not isinstance(lengths, Tensor) or lengths.is_cpu


def _compact_rows(targets: Tensor, lengths: list[int], longest: int, classes: int, blank: int) -> tuple[Tensor, Tensor]:
    """columns (B, K) and first (B, K) in Python: for some thousand labels that beats as many small tensor ops."""
    host, start = targets.tolist(), 0
    columns, first = [], []
    for b, n in enumerate(lengths):
        row = host[b][:n] if targets.dim() == 2 else host[start : start + n]
        start += n
        if row and (min(row) < 0 or max(row) >= classes or blank in row):
            s, label = next((s, c) for s, c in enumerate(row) if not 0 <= c < classes or c == blank)
            raise ValueError(
                f"targets of utterance {b}: label {s} is {label}, not in [0, {classes}) or equal to blank ({blank})"
            )
        seen, rest = {blank: 0}, longest - n
        columns.append([blank, *row] + [blank] * rest)
        first.append([0] + [seen.setdefault(c, k) for k, c in enumerate(row, 1)] + [0] * rest)
    shape = (len(lengths), longest + 1)
    return torch.tensor(columns, dtype=torch.int64).view(shape), torch.tensor(first, dtype=torch.int64).view(shape)


def _mark(
    targets: Tensor,
    input_lengths_B: Tensor,
    target_lengths_B: Tensor,
    longest: int,
    frames: int,
    classes: int,
    blank: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """_compact where no value may be looked at: utterances with one out of range are marked instead."""
    width = targets.shape[-1]
    slots_S = torch.arange(longest, device=targets.device)
    real_BS = slots_S < target_lengths_B[:, None]
    if targets.dim() == 2:
        labels_BS = targets[:, :longest].to(torch.int64)
    else:
        starts_B = target_lengths_B.cumsum(0) - target_lengths_B
        flat = targets if width else targets.new_full((1,), blank)
        labels_BS = flat[(starts_B[:, None] + slots_S).clamp(0, max(width - 1, 0))].to(torch.int64)
    wrong_BS = real_BS & ((labels_BS < 0) | (labels_BS >= classes) | (labels_BS == blank))
    bad_B = wrong_BS.any(1) | (input_lengths_B < 0) | (input_lengths_B > frames)
    bad_B |= (target_lengths_B < 0) | (target_lengths_B > width)
    if targets.dim() == 1:
        bad_B |= target_lengths_B.sum() != width
    labels_BS = torch.where(real_BS & ~wrong_BS, labels_BS, blank)
    columns_BK = torch.nn.functional.pad(labels_BS, (1, 0), value=blank)
    input_lengths_B = input_lengths_B.masked_fill(bad_B, 0)
    target_lengths_B = target_lengths_B.masked_fill(bad_B, -1).clamp(max=longest)
    return columns_BK, _first_occurrence(columns_BK), input_lengths_B, target_lengths_B


def _first_occurrence(x_BK: Tensor) -> Tensor:
    """(B, K) int64: the first column of the row that holds the same value. O(K log K), not K x K."""
    sorted_BK, order_BK = x_BK.sort(dim=1, stable=True)
    slots = torch.arange(x_BK.shape[1], device=x_BK.device).expand_as(x_BK)
    new_BK = torch.ones_like(sorted_BK, dtype=torch.bool)
    new_BK[:, 1:] = sorted_BK[:, 1:] != sorted_BK[:, :-1]
    run_BK = torch.where(new_BK, slots, 0).cummax(dim=1).values
    return order_BK.gather(1, run_BK).gather(1, order_BK.argsort(dim=1))


def reduce_loss(nll_B: Tensor, target_lengths_B: Tensor, reduction: str) -> Tensor:
    """F.ctc_loss's reductions: "none"; "sum"; "mean" of nll over target length (at least 1). An empty batch gives 0."""
    if reduction == "none":
        return nll_B
    if reduction == "sum":
        return nll_B.sum()
    return (nll_B / (target_lengths_B.clamp(min=1) * max(nll_B.shape[0], 1))).sum()


def mean_weights(target_lengths_B: Tensor, dtype: torch.dtype) -> Tensor:
    """(B,): what "mean" multiplies each utterance's loss by."""
    B = max(target_lengths_B.numel(), 1)
    return 1.0 / (target_lengths_B.clamp(min=1).to(dtype) * B)


def check_reduction(reduction: str) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
