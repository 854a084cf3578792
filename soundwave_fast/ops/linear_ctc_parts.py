"""What the passes of linear_ctc_loss work on: the head, the valid frames as rows, and the softmax of every row.

Shape legend: N rows, B utterances, T longest utterance, D width, V vocabulary, w columns of one chunk, K compact
columns (see ops/compact.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from soundwave_fast.ops.backend import implementation
from soundwave_fast.ops.compact import CompactTargets

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def checked_head(
    hidden: Tensor,  # (B, T, D)
    weight: Tensor,  # (V, D)
    blank_row: Tensor | None,  # (D,)
    blank: int,
    one_dtype: bool = True,  # whether hidden and weight must be of the same
) -> tuple[Tensor, Tensor | None]:
    """hidden in autocast's dtype, if that is on, and blank_row in hidden's. ValueError or TypeError: see the ops."""
    for name, x in (("hidden", hidden), ("weight", weight), ("blank_row", blank_row)):
        if x is None:
            continue
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
        if x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device}, hidden on {hidden.device}")
    if hidden.dim() != 3:
        raise ValueError(f"hidden must be (B, T, D), got {tuple(hidden.shape)}")
    D = hidden.shape[2]
    if weight.dim() != 2 or weight.shape[1] != D or weight.shape[0] == 0:
        raise ValueError(f"weight must be (V, {D}) with V > 0, got {tuple(weight.shape)}")
    if blank_row is not None and blank_row.shape != (D,):
        raise ValueError(f"blank_row must be ({D},), got {tuple(blank_row.shape)}")
    V = weight.shape[0]
    if blank_row is not None and blank != V:
        raise ValueError(f"blank must be {V}, the class behind weight's rows, when blank_row is given; got {blank}")
    if blank_row is None and not 0 <= blank < V:
        raise ValueError(f"blank must lie in [0, {V}), got {blank}")
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    elif one_dtype and hidden.dtype != weight.dtype:
        raise TypeError(
            f"hidden is {hidden.dtype} and weight is {weight.dtype}: cast one of them, or call under torch.autocast"
        )
    # one row: a trainable float32 blank beside a bf16 embedding is fine
    return hidden, None if blank_row is None else blank_row.to(hidden.dtype)


@dataclass(frozen=True)
class Head:
    """The projection: `weight` (V, D), and the blank as one extra row behind it when `blank_row` (D,) is given."""

    weight: Tensor
    blank_row: Tensor | None
    blank: int  # the blank's class

    def pieces(self, width: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """(first class, (w, D) rows cast to dtype) from class 0 up; a cast copies one piece at a time."""
        V = self.weight.shape[0]
        for start in range(0, V, width):
            yield start, self.weight[start : start + width].to(dtype)
        if self.blank_row is not None:
            yield V, self.blank_row[None].to(dtype)

    def rows(self, columns_K: Tensor, dtype: torch.dtype) -> Tensor:
        """(K, D): the rows of the compact columns, the first of which is the blank."""
        if self.blank_row is None:
            return self.weight.index_select(0, columns_K).to(dtype)
        labels = self.weight.index_select(0, columns_K[1:].clamp(max=self.weight.shape[0] - 1)).to(dtype)
        return torch.cat([self.blank_row[None].to(dtype), labels])


def known_to_host(input_lengths: Tensor, hidden: Tensor) -> bool:
    """Whether loops may depend on the lengths; on an accelerator that would mean to wait for it."""
    return "cpu" in (input_lengths.device.type, hidden.device.type)


@dataclass(frozen=True)
class Frames:
    """Frames of (B, T, D) features as rows, utterance b owning rows starts[b]:starts[b + 1].

    Where the lengths are known to the host the rows are the valid frames alone; else all B * T, zeroed past a length,
    so that nothing that stood there can reach a sum.
    """

    x_ND: Tensor
    starts: list[int]
    starts_B: Tensor  # the first B of them, on the device
    utterance_N: Tensor  # int64 utterance of each row
    index_N: Tensor | None  # b * T + t of each row; None: the rows are all B * T
    valid_N: Tensor | None  # whether a row lies within its utterance's length; None: all do
    compact: CompactTargets
    shape: torch.Size  # (B, T, D)

    @classmethod
    def of(cls, hidden: Tensor, compact: CompactTargets, input_lengths: Tensor) -> Frames:
        """input_lengths: as the caller gave them; on the host, or there to be masked with."""
        B, T, D = hidden.shape
        device = hidden.device
        # No CPU has float16 products worth the name; in float32 they are also exact.
        x_ND = hidden.detach().reshape(B * T, D)
        dtype = torch.float32 if device.type == "cpu" and x_ND.dtype == torch.float16 else x_ND.dtype
        row_N, index_N, valid_N = torch.arange(B * T, device=device), None, None
        if known_to_host(input_lengths, hidden):
            lengths_B = input_lengths.reshape(-1).cpu()
            starts = [0, *lengths_B.cumsum(0).tolist()]
            starts_B = torch.tensor(starts[:-1], dtype=torch.int64).to(device, non_blocking=True)
            if starts[-1] != B * T:
                valid_BT = torch.arange(T) < lengths_B[:, None]
                row_N = index_N = valid_BT.reshape(-1).nonzero().squeeze(1).to(device, non_blocking=True)
                x_ND = x_ND.index_select(0, index_N)
        else:
            starts = [b * T for b in range(B + 1)]
            starts_B = torch.arange(B, device=device) * T  # made there: a CUDA graph takes no copy from the host
            valid_N = (torch.arange(T, device=device) < compact.input_lengths_B[:, None]).reshape(-1)
            x_ND = x_ND.masked_fill(~valid_N[:, None], 0.0)
        utterance_N = row_N // max(T, 1)
        return cls(x_ND.to(dtype), starts, starts_B, utterance_N, index_N, valid_N, compact, hidden.shape)

    def spans(self) -> Iterator[tuple[int, slice]]:
        for b, (start, end) in enumerate(pairwise(self.starts)):
            yield b, slice(start, end)

    def groups(self, most_rows: int) -> list[slice]:
        """The rows in groups of whole utterances and like size: at most most_rows of them, or one utterance."""
        fewest = max(len(self._split(most_rows, most_rows)), 1)
        return self._split(-(-self.starts[-1] // fewest), most_rows)

    def _split(self, enough: int, most: int) -> list[slice]:
        groups, first = [], 0
        for end, after in pairwise([*self.starts[1:], None]):
            full = after is None or end - first >= enough or after - first > most
            if full and end > first:
                groups.append(slice(first, end))
                first = end
        return groups

    def put_back(self, rows: Tensor, fill: float) -> Tensor:
        """(N, ...) -> (B, T, ...), `fill` in frames that are no rows."""
        B, T, _ = self.shape
        if self.index_N is not None:
            rows = rows.new_full((B * T, *rows.shape[1:]), fill).index_copy_(0, self.index_N, rows)
        return rows.view(B, T, *rows.shape[1:])


@dataclass(frozen=True)
class Softmax:
    """What the chunks of the vocabulary leave of every row's logits; `update_chunk` says how."""

    running_3N: Tensor
    picked_NK: Tensor
    argmax_N: Tensor | None

    @classmethod
    def start(cls, frames: Frames, need_argmax: bool) -> Softmax:
        N, accumulate = len(frames.x_ND), torch.promote_types(frames.x_ND.dtype, torch.float32)
        running_3N = frames.x_ND.new_full((3, N), -torch.inf, dtype=accumulate)
        running_3N[2] = 0.0
        picked_NK = frames.x_ND.new_empty((N, frames.compact.columns_BK.shape[1]), dtype=accumulate)
        return cls(running_3N, picked_NK, frames.utterance_N.new_zeros(N) if need_argmax else None)

    def __getitem__(self, rows: slice) -> Softmax:
        argmax_N = None if self.argmax_N is None else self.argmax_N[rows]
        return Softmax(self.running_3N[:, rows], self.picked_NK[rows], argmax_N)

    @property
    def sum_N(self) -> Tensor:
        return self.running_3N[2]

    def logsumexp(self) -> Tensor:
        return self.running_3N[1] + self.running_3N[2].log()


def likelihood(frames: Frames, softmax: Softmax, need_residual: bool) -> tuple[Tensor, Tensor | None]:
    """nll (B,) float64 and the residual p - gamma (N, K) of the compact columns: CTC over what the softmax picked."""
    steps = implementation("linear_ctc_loss", frames.x_ND)
    compact = frames.compact
    longest = max((end - start for start, end in pairwise(frames.starts)), default=0)
    lengths_B = compact.input_lengths_B
    lp_TBK = steps.emissions(softmax.picked_NK, softmax.running_3N, frames.starts_B, lengths_B, longest)
    nll_B, gamma_TBK = implementation("alpha_beta", frames.x_ND).alpha_beta(
        lp_TBK, compact.first_BK, lengths_B, compact.target_lengths_B, need_residual
    )
    # Emissions are at most 0, so only the recursion's own rounding can fall below.
    nll_B = nll_B.double().clamp(min=0.0)
    if not need_residual:
        return nll_B, None
    return nll_B, steps.residual(
        lp_TBK, gamma_TBK, compact.first_BK, frames.utterance_N, frames.starts_B, lengths_B, softmax.sum_N.dtype
    )


def fits_B(compact: CompactTargets) -> Tensor:
    """Whether an utterance's frames can hold its target: a frame a label, and one more between two equal ones.

    Not so if its arguments were wrong, see CompactTargets.
    """
    first_BK, lengths_B = compact.first_BK, compact.target_lengths_B
    slots = torch.arange(first_BK.shape[1], device=first_BK.device)[2:]
    twins_BK = (first_BK[:, 2:] == first_BK[:, 1:-1]) & (slots <= lengths_B[:, None])
    return (compact.input_lengths_B >= lengths_B + twins_BK.sum(1)) & (lengths_B >= 0)
