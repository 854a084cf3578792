"""The GEMM passes behind linear_ctc_loss, without autograd: one over vocabulary chunks, one over groups of utterances.

With z = x W^T, p = softmax(z), gamma the CTC occupancy and g_b the incoming gradient of utterance b:

    d/dx_t = g_b (sum_v p_tv W_v - sum_k gamma_t(k) W_k)          d/dW_v = sum_t g_b (p_tv - gamma_t(v)) x_t

Both passes take the compact columns k (blank and labels, where gamma lives) out of the exponentiated chunk before
its second GEMM and add (p - gamma)(k) in float32 or better instead. p and gamma nearly cancel in a trained model, so
in half precision this keeps the rounding error relative to the difference and not to p.

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

CHUNK_COLUMNS = 8192  # widest vocabulary chunk
CHUNK_ELEMENTS = 8 << 20  # most logits held at a time by the frozen pass: 32 MiB of float32
GROUP_ROWS = 1024  # frames a group of utterances aims at in the trainable pass


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

    def groups(self) -> Iterator[tuple[slice, slice]]:
        """(utterances, rows) of consecutive groups of at most GROUP_ROWS rows, or of one utterance, of like size."""
        count = -(-self.starts[-1] // GROUP_ROWS)
        even = -(-self.starts[-1] // max(count, 1))
        b0 = 0
        for b1 in range(1, len(self.starts)):
            last = b1 == len(self.starts) - 1
            size = self.starts[b1] - self.starts[b0]
            if last or size >= even or self.starts[b1 + 1] - self.starts[b0] > GROUP_ROWS:
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

    def __init__(self, frames: Frames, need_argmax: bool, take_out: bool):
        x, K = frames.x_ND, frames.compact.columns_BK.shape[1]
        N, accumulate = x.shape[0], torch.promote_types(x.dtype, torch.float32)
        self.frames, self.take_out = frames, take_out
        self.top_N = x.new_full((N,), -torch.inf, dtype=accumulate)
        self.sum_N = x.new_zeros(N, dtype=accumulate)
        self.picked_NK = x.new_zeros(N, K, dtype=accumulate)
        self.argmax_N = x.new_zeros(N, dtype=torch.int64) if need_argmax else None

    def update(self, z_Nw: Tensor, start: int) -> Tensor:
        """Exponentiate the logits of classes start.. in place, relative to the new running maximum, top_N.

        With take_out the compact columns are zeroed once counted. Returns (N,): what turns anything accumulated
        under the previous maximum into the new one's scale.
        """
        self._pick(z_Nw, start)
        if self.argmax_N is None:
            top_N = z_Nw.amax(1)
        else:
            top_N, where_N = z_Nw.max(1)
            # Strictly greater: among equals the lowest class wins, as in torch.argmax.
            self.argmax_N = torch.where(top_N > self.top_N, where_N + start, self.argmax_N)
        top_N = torch.maximum(top_N, self.top_N)
        rescale_N = (self.top_N - top_N).exp_()
        z_Nw.sub_(top_N[:, None]).exp_()
        self.sum_N.mul_(rescale_N).add_(z_Nw.sum(1))
        self.top_N = top_N
        if self.take_out:
            for rows, _, local in self._hits(start, z_Nw.shape[1]):
                z_Nw[rows].index_fill_(1, local, 0.0)
        return rescale_N

    def lse(self) -> Tensor:
        return self.sum_N.log().add_(self.top_N)

    def _pick(self, z_Nw: Tensor, start: int) -> None:
        for rows, slots, local in self._hits(start, z_Nw.shape[1]):
            self.picked_NK[rows].index_copy_(1, slots, z_Nw[rows].index_select(1, local))

    def _hits(self, start: int, width: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, compact columns, chunk columns) of every utterance that owns classes of this chunk."""
        local_BK = self.frames.compact.columns_BK - start
        inside_BK = (local_BK >= 0) & (local_BK < width)
        touched = inside_BK.any(1).tolist()
        for b, rows in self.frames.spans():
            if touched[b]:
                slots = inside_BK[b].nonzero().squeeze(1)
                yield rows, slots, local_BK[b, slots]


def vocabulary_pass(
    frames: Frames,
    head: Head,
    need_expected: bool,
    need_argmax: bool,
) -> tuple[OnlineSoftmax, Tensor | None]:
    """Walk the vocabulary once: the softmax statistics of every frame and, if asked, E (N, D) in float32 or better.

    E_t is the sum of p_tv W_v over all classes but the utterance's compact columns. One GEMM, two with E.
    """
    x = frames.x_ND
    N, D = x.shape
    width = max(1024, min(CHUNK_COLUMNS, CHUNK_ELEMENTS // max(N, 1) // 128 * 128))
    width = min(width, head.weight.shape[0])
    softmax = OnlineSoftmax(frames, need_argmax, take_out=need_expected)
    accumulate = softmax.sum_N.dtype
    expected_ND = x.new_zeros(N, D, dtype=accumulate) if need_expected else None
    low = x.new_empty(N * width)
    full = low if x.dtype == accumulate else x.new_empty(N * width, dtype=accumulate)
    for start, rows_wD in head.pieces(width, x.dtype):
        w = rows_wD.shape[0]
        low_Nw, z_Nw = low[: N * w].view(N, w), full[: N * w].view(N, w)
        torch.mm(x, rows_wD.t(), out=low_Nw)
        if full is not low:
            z_Nw.copy_(low_Nw)
        rescale_N = softmax.update(z_Nw, start)
        if need_expected:
            expected_ND.mul_(rescale_N[:, None])
            if full is low:
                expected_ND.addmm_(z_Nw, rows_wD)
            else:
                expected_ND.add_(low_Nw.copy_(z_Nw) @ rows_wD)
    if need_expected:
        expected_ND.div_(softmax.sum_N[:, None])
    return softmax, expected_ND


def add_compact_rows(expected_ND: Tensor, residual_NK: Tensor, frames: Frames, head: Head) -> Tensor:
    """E + sum_k (p - gamma)(k) W_k, in place: the gradient of every frame's features, before g_b."""
    for b, rows in frames.spans():
        compact_KD = head.rows(frames.compact.columns_BK[b], expected_ND.dtype)
        expected_ND[rows].addmm_(residual_NK[rows], compact_KD)
    return expected_ND


def utterance_pass(
    frames: Frames,
    head: Head,
    scale_B: Tensor,  # what each utterance's loss is multiplied by; 0 or more of either sign
    need_x: bool,
    need_argmax: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Walk groups of whole utterances: nll (B,), d/dx (N, D) or None, d/dW (V, D), d/dblank_row, argmax (N,) or None.

    Three GEMMs (two without d/dx), gradients of sum_b scale_b nll_b; an utterance with an infinite loss adds nothing.
    Exponentials are kept relative to the maximum of their own chunk, and the missing factor, with scale_b, goes onto
    the small operands: the rows of dX after their GEMM, the rows of x before dW's.
    """
    x = frames.x_ND
    accumulate = torch.promote_types(x.dtype, torch.float32)
    nll_B = scale_B.new_zeros(len(scale_B), dtype=torch.float64)
    # float16 has too few exponents for x / (B S): scale by the largest factor at the end, in float32.
    unit = scale_B.abs().max().clamp(min=1e-30).float() if x.dtype == torch.float16 and len(scale_B) else None
    if unit is not None:
        scale_B = scale_B / unit
    dx_ND = torch.zeros_like(x, dtype=accumulate) if need_x else None
    dw_VD = torch.zeros_like(head.weight, dtype=accumulate)
    dblank_D = None if head.blank_row is None else torch.zeros_like(head.blank_row, dtype=accumulate)
    argmax_N = x.new_zeros(len(x), dtype=torch.int64) if need_argmax else None
    groups = list(frames.groups())
    most = max((rows.stop - rows.start for _, rows in groups), default=0)
    store = x.new_empty(most * head.weight.shape[0])
    half = x.dtype != accumulate
    # Reused by every chunk: on the CPU the page faults of fresh buffers cost as much as a half GEMM.
    scratch = x.new_empty(most * CHUNK_COLUMNS if half else 0, dtype=accumulate)
    product = x.new_empty(CHUNK_COLUMNS, x.shape[1]) if half else None
    for utterances, rows in groups:
        part = frames.group(utterances, rows)
        softmax = OnlineSoftmax(part, need_argmax, take_out=True)
        chunks = list(_keep_chunks(part.x_ND, head, softmax, store, scratch))
        lse_N = softmax.lse()
        nll, residual_NK = part.alpha_beta(softmax.picked_NK, lse_N, need_grad=True)
        nll_B[utterances] = nll
        if need_argmax:
            argmax_N[rows] = softmax.argmax_N
        scale = scale_B[utterances].masked_fill(nll == torch.inf, 0.0).to(accumulate)
        scale_N1 = torch.repeat_interleave(scale, part.compact.input_lengths_B)[:, None]
        for (start, rows_wD), (exp_Nw, top_N) in zip(head.pieces(CHUNK_COLUMNS, x.dtype), chunks):
            factor_N1 = scale_N1 * (top_N - lse_N).exp_()[:, None]
            scaled_x = (part.x_ND * factor_N1).to(x.dtype)
            _add_mm(dw_VD[start : start + len(rows_wD)], exp_Nw.t(), scaled_x, product)
            if need_x:
                dx_ND[rows] += (exp_Nw @ rows_wD) * factor_N1
        residual_NK *= scale_N1
        if need_x:
            add_compact_rows(dx_ND[rows], residual_NK, part, head)
        _add_compact_grads(dw_VD, dblank_D, residual_NK, part)
    if unit is not None:
        for grad in (dx_ND, dw_VD, dblank_D):
            if grad is not None:
                grad.mul_(unit)
    return nll_B, dx_ND, dw_VD.to(head.weight.dtype), dblank_D, argmax_N


def _keep_chunks(
    x: Tensor, head: Head, softmax: OnlineSoftmax, store: Tensor, scratch: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """(exp(z - top) (N, w), top (N,)) of every chunk of the weight, in contiguous slices of store.

    The blank row's column is compact, so it is counted by the softmax but has nothing left to keep.
    """
    N = x.shape[0]
    for start, rows_wD in head.pieces(CHUNK_COLUMNS, x.dtype):
        w = rows_wD.shape[0]
        if start == head.weight.shape[0]:
            softmax.update(torch.mm(x, rows_wD.t()).to(softmax.sum_N.dtype), start)
            continue
        kept_Nw = store[N * start : N * (start + w)].view(N, w)
        torch.mm(x, rows_wD.t(), out=kept_Nw)
        z_Nw = scratch[: N * w].view(N, w).copy_(kept_Nw) if len(scratch) else kept_Nw
        softmax.update(z_Nw, start)
        if z_Nw is not kept_Nw:
            kept_Nw.copy_(z_Nw)
        yield kept_Nw, softmax.top_N


def _add_mm(out: Tensor, a: Tensor, b: Tensor, product: Tensor | None) -> None:
    """out += a @ b, accumulating in out's dtype; product is scratch for a GEMM in a narrower one."""
    if product is None:
        out.addmm_(a, b)
    else:
        out.add_(torch.mm(a, b, out=product[: len(out)]))


def _add_compact_grads(dw_VD: Tensor, dblank_D: Tensor | None, residual_NK: Tensor, frames: Frames) -> None:
    """Add (p - gamma)^T x to the compact columns' rows of dW, or, for a blank row of its own, to dblank."""
    first_BK = frames.compact.first_BK
    for b, rows in frames.spans():
        rows_KD = residual_NK[rows].t() @ frames.x_ND[rows].to(residual_NK.dtype)
        slots = (first_BK[b] == torch.arange(first_BK.shape[1], device=first_BK.device)).nonzero().squeeze(1)
        if dblank_D is not None:
            dblank_D += rows_KD[0]
            slots = slots[1:]  # slot 0 is the blank, always the first of its class
        # These classes are distinct, so rows can be read, added to and put back: much faster than index_add_.
        columns = frames.compact.columns_BK[b, slots]
        dw_VD.index_copy_(0, columns, dw_VD.index_select(0, columns).add_(rows_KD[slots]))
