"""What the GEMM passes of linear_ctc_loss are made of: the head, the valid frames, and the online softmax over chunks.

Shape legend: N valid frames of the batch laid end to end, B utterances, D width, V vocabulary, w columns of one chunk,
K compact columns (see ops/compact.py), T longest utterance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from soundwave_fast.ops.compact import CompactTargets, alpha_beta

# Logits exponentiated at a time, 32 MiB of float32. Smaller, cache-sized blocks gain nothing on idle cores and lose 2
# to 10 times on shared ones, where every parallel op may wait a scheduler slice for its slower thread.
BLOCK_ELEMENTS = 8 << 20


@dataclass(frozen=True)
class Head:
    """The projection: `weight` (V, D), and the blank as one extra row behind it when `blank_row` (D,) is given."""

    weight: Tensor
    blank_row: Tensor | None

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


@dataclass(frozen=True)
class Frames:
    """The valid frames of some utterances: x (N, D), utterance b owning rows starts[b]:starts[b + 1]."""

    x_ND: Tensor
    starts: list[int]
    compact: CompactTargets

    def spans(self) -> Iterator[tuple[int, slice]]:
        for b, (start, end) in enumerate(pairwise(self.starts)):
            yield b, slice(start, end)

    def groups(self, group_rows: int) -> Iterator[tuple[slice, slice]]:
        """(utterances, rows) of consecutive groups of at most group_rows rows, or of one utterance, of like size."""
        count = -(-self.starts[-1] // group_rows)
        even = -(-self.starts[-1] // max(count, 1))
        b0 = 0
        for b1 in range(1, len(self.starts)):
            last = b1 == len(self.starts) - 1
            size = self.starts[b1] - self.starts[b0]
            if last or size >= even or self.starts[b1 + 1] - self.starts[b0] > group_rows:
                yield slice(b0, b1), slice(self.starts[b0], self.starts[b1])
                b0 = b1

    def group(self, utterances: slice, rows: slice) -> Frames:
        starts = [s - rows.start for s in self.starts[utterances.start : utterances.stop + 1]]
        return Frames(self.x_ND[rows], starts, self.compact[utterances])

    def alpha_beta(self, picked_NK: Tensor, lse_N: Tensor, need_grad: bool) -> tuple[Tensor, Tensor | None]:
        """nll (B,) float64 and the residual p - gamma (N, K) in lse's dtype, 0 in columns that repeat a class."""
        compact = self.compact
        lengths = [end - start for start, end in pairwise(self.starts)]
        B, T, K = len(lengths), max(lengths, default=0), picked_NK.shape[1]
        device = picked_NK.device
        utterance_N = torch.repeat_interleave(torch.arange(B, device=device), compact.input_lengths_B)
        first_row_B = torch.tensor(self.starts[:-1], device=device, dtype=torch.int64)
        slot_N = (torch.arange(len(lse_N), device=device) - first_row_B[utterance_N]) * B + utterance_N
        # Both come from one chunk, so a picked logit exceeds its own logsumexp by rounding at most.
        lp_NK = picked_NK.double().sub_(lse_N.double()[:, None]).clamp_(max=0.0)
        lp_TBK = lp_NK.new_zeros(T * B, K).index_copy_(0, slot_N, lp_NK).view(T, B, K)
        nll_B, gamma_TBK = alpha_beta(lp_TBK, compact, need_grad)
        nll_B = nll_B.clamp(min=0.0)
        if not need_grad:
            return nll_B, None
        residual_NK = lp_NK.exp_().sub_(gamma_TBK.view(T * B, K).index_select(0, slot_N))
        repeats_BK = compact.first_BK != torch.arange(K, device=device)
        return nll_B, residual_NK.masked_fill_(repeats_BK[utterance_N], 0.0).to(lse_N.dtype)


class OnlineSoftmax:
    """Running maximum, sum of exponentials, argmax and picked compact logits of N rows, fed one chunk at a time."""

    def __init__(self, frames: Frames, need_argmax: bool, keep: bool):
        x, K = frames.x_ND, frames.compact.columns_BK.shape[1]
        N, accumulate = x.shape[0], torch.promote_types(x.dtype, torch.float32)
        self.frames, self.keep, self.scratch = frames, keep, None
        self.top_N = x.new_full((N,), -torch.inf, dtype=accumulate)
        self.sum_N = x.new_zeros(N, dtype=accumulate)
        self.picked_NK = x.new_zeros(N, K, dtype=accumulate)
        self.argmax_N = x.new_zeros(N, dtype=torch.int64) if need_argmax else None

    def update(self, z_Nw: Tensor, start: int) -> Tensor:
        """Take the logits of classes start.. and, with keep, leave exp(z - top_N) in their place, 0 in compact columns.

        top_N is the new running maximum. Returns (N,): what turns anything accumulated under the previous maximum
        into the new one's scale. Works through blocks of rows, in float32 or better whatever z's dtype.
        """
        hits = list(self._hits(start, z_Nw.shape[1]))
        for rows, slots, local in hits:
            self.picked_NK[rows].index_copy_(1, slots, z_Nw[rows].index_select(1, local).to(self.picked_NK.dtype))
        before_N, self.top_N = self.top_N, torch.empty_like(self.top_N)
        step = max(1, BLOCK_ELEMENTS // z_Nw.shape[1])
        for row in range(0, z_Nw.shape[0], step):
            self._update_block(z_Nw[row : row + step], slice(row, row + step), before_N, start)
        if self.keep:
            for rows, _, local in hits:
                z_Nw[rows].index_fill_(1, local, 0.0)
        return (before_N - self.top_N).exp_()

    def _update_block(self, z: Tensor, rows: slice, before_N: Tensor, start: int) -> None:
        wide = z if z.dtype == self.sum_N.dtype else self._scratch(z).copy_(z)
        if self.argmax_N is None:
            top = wide.amax(1)
        else:
            top, where = wide.max(1)
            # Strictly greater: among equals the lowest class wins, as in torch.argmax.
            self.argmax_N[rows] = torch.where(top > before_N[rows], where + start, self.argmax_N[rows])
        torch.maximum(top, before_N[rows], out=self.top_N[rows])
        wide.sub_(self.top_N[rows, None]).exp_()
        self.sum_N[rows] = self.sum_N[rows] * (before_N[rows] - self.top_N[rows]).exp_() + wide.sum(1)
        if self.keep and wide is not z:
            z.copy_(wide)

    def _scratch(self, z: Tensor) -> Tensor:
        """float32 room for a block, allocated once: page faults of fresh memory cost more than the arithmetic."""
        if self.scratch is None or len(self.scratch) < z.numel():
            self.scratch = torch.empty(z.numel(), dtype=self.sum_N.dtype, device=z.device)
        return self.scratch[: z.numel()].view(z.shape)

    def lse(self) -> Tensor:
        return self.sum_N.log().add_(self.top_N)

    def _hits(self, start: int, width: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, compact columns, chunk columns) of every utterance that owns classes of this chunk."""
        local_BK = self.frames.compact.columns_BK - start
        inside_BK = (local_BK >= 0) & (local_BK < width)
        touched = inside_BK.any(1).tolist()
        for b, rows in self.frames.spans():
            if touched[b]:
                slots = inside_BK[b].nonzero().squeeze(1)
                yield rows, slots, local_BK[b, slots]
