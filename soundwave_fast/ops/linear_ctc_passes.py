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

import torch
from torch import Tensor

from soundwave_fast.ops.linear_ctc_parts import Frames, Head, OnlineSoftmax

CHUNK_COLUMNS = 8192  # widest vocabulary chunk
CHUNK_ELEMENTS = 8 << 20  # most logits held at a time by the frozen pass: 32 MiB of float32
GROUP_ROWS = 1024  # frames a group of utterances aims at in the trainable pass


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
    softmax = OnlineSoftmax(frames, need_argmax, keep=need_expected)
    accumulate = softmax.sum_N.dtype
    expected_ND = x.new_zeros(N, D, dtype=accumulate) if need_expected else None
    chunk = x.new_empty(N * width)
    for start, rows_wD in head.pieces(width, x.dtype):
        z_Nw = chunk[: N * len(rows_wD)].view(N, len(rows_wD))
        torch.mm(x, rows_wD.t(), out=z_Nw)
        rescale_N = softmax.update(z_Nw, start)
        if need_expected:
            expected_ND.mul_(rescale_N[:, None])
            add_mm(expected_ND, z_Nw, rows_wD)
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
    groups = list(frames.groups(GROUP_ROWS))
    most = max((rows.stop - rows.start for _, rows in groups), default=0)
    store = x.new_empty(most * head.weight.shape[0])
    product = x.new_empty(CHUNK_COLUMNS, x.shape[1]) if x.dtype != accumulate else None
    for utterances, rows in groups:
        part = frames.group(utterances, rows)
        softmax = OnlineSoftmax(part, need_argmax, keep=True)
        chunks = list(_keep_chunks(part.x_ND, head, softmax, store))
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
            add_mm(dw_VD[start : start + len(rows_wD)], exp_Nw.t(), scaled_x, product)
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


def _keep_chunks(x: Tensor, head: Head, softmax: OnlineSoftmax, store: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(exp(z - top) (N, w), top (N,)) of every chunk of the weight, in contiguous slices of store.

    The blank row's column is compact, so it is counted by the softmax but has nothing left to keep.
    """
    N = x.shape[0]
    for start, rows_wD in head.pieces(CHUNK_COLUMNS, x.dtype):
        w = rows_wD.shape[0]
        if start == head.weight.shape[0]:
            softmax.update(torch.mm(x, rows_wD.t()), start)
            continue
        kept_Nw = store[N * start : N * (start + w)].view(N, w)
        torch.mm(x, rows_wD.t(), out=kept_Nw)
        softmax.update(kept_Nw, start)
        yield kept_Nw, softmax.top_N


def add_mm(out: Tensor, a: Tensor, b: Tensor, product: Tensor | None = None) -> None:
    """out += a @ b, accumulating in out's dtype; product is scratch for a GEMM in a narrower one."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    else:
        out.add_(a @ b if product is None else torch.mm(a, b, out=product[: len(out)]))


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
