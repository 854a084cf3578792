"""The GEMM passes behind linear_ctc_loss and linear_argmax: no gradients, a frozen head's, or all of them.

With z = x W^T, p = softmax(z), gamma the CTC occupancy and g_b the incoming gradient of utterance b:

    d/dx_t = g_b (sum_v p_tv W_v - sum_k gamma_t(k) W_k)          d/dW_v = sum_t g_b (p_tv - gamma_t(v)) x_t

All walk the vocabulary in chunks and keep exponentials relative to an offset of their row; the missing factor, with
g_b, goes onto the small operands: the rows of dX after their GEMM, the rows of x before dW's. Compact columns k (blank
and labels, where gamma lives) are taken out of the exponentials, and (p - gamma)(k) is added in float32 or better at
the end. p and gamma nearly cancel in a trained model, so in half precision this keeps the rounding error relative to
the difference and not to p; and gamma is wanted only once, for the whole batch.

The loops are the same on every device, and nothing in them depends on a value that the device computes.

Shape legend: N rows, B utterances, D width, V vocabulary, w columns of one chunk, K compact columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from soundwave_fast.ops.backend import implementation, runs_triton
from soundwave_fast.ops.gemm import add_mm, mm
from soundwave_fast.ops.linear_ctc_parts import Frames, Head, Softmax, fits_B, likelihood

CHUNK_COLUMNS = 8192  # widest vocabulary chunk
CHUNK_ALIGN = 128  # columns: what every library's fastest kernels ask of a leading dimension
# Logits of a chunk at most. A CPU's must stay in its cache, and in memory that malloc gives again without page faults
# (glibc: less than 32 MiB); a GPU's only fills it.
CHUNK_ELEMENTS = {"cpu": 5 << 20, "cuda": 64 << 20}
FROZEN_ROWS = {"cpu": 2048, "cuda": 8192}  # rows of a group of utterances that walk the vocabulary together
# Exponentials of a group where all are kept. Every group reads and writes dW once more, in float32: on a GPU with D
# and V of an LLM a group of 750 rows would spend longer on that than on its product, one of 1500 does not.
TRAINED_BYTES = {"cpu": 128 << 20, "cuda": 384 << 20}


@dataclass(frozen=True)
class Chunk:
    """The exponentials of one chunk for one group: exp(z) = exp_Nw * exp(base_N)."""

    start: int
    exp_Nw: Tensor
    base_N: Tensor


def _limit(limits: dict[str, int], x: Tensor) -> int:
    return limits.get(x.device.type, limits["cuda"])


def _width(x_ND: Tensor, vocabulary: int) -> int:
    """Columns of a chunk for these rows: aligned, and all chunks about equally wide."""
    limits = {"columns": CHUNK_COLUMNS, "elements": _limit(CHUNK_ELEMENTS, x_ND)}
    if runs_triton(x_ND):
        from csrc_triton import tuning

        limits = tuning.sizes("linear_ctc_loss chunks", f"bytes {x_ND.element_size()}, D {x_ND.shape[1]}", **limits)
    most = min(limits["columns"], limits["elements"] // max(len(x_ND), 1))
    most = max(most // CHUNK_ALIGN * CHUNK_ALIGN, CHUNK_ALIGN)
    even = -(-vocabulary // -(-vocabulary // most))
    return _aligned(even)


def _aligned(columns: int) -> int:
    return -(-columns // CHUNK_ALIGN) * CHUNK_ALIGN


def _walk(
    frames: Frames,
    rows: slice,
    head: Head,
    softmax: Softmax,  # of the rows
    expected_ND: Tensor | None,  # of the rows, zeros; takes the sum of exp(z - offset) W
    store: Tensor | None,  # room for the exponentials of all chunks; None: they are not kept
) -> list[Chunk]:
    """Take a group of rows through the vocabulary: one GEMM, or two with expected_ND. The chunks, if they are kept."""
    steps = implementation("linear_ctc_loss", frames.x_ND)
    x_ND, utterance_N = frames.x_ND[rows], frames.utterance_N[rows]
    N, V = len(x_ND), len(head.weight)
    width = _width(x_ND, V)
    wanted = store is not None or expected_ND is not None
    scratch = x_ND.new_empty(N * width) if store is None else None
    base_N = torch.empty_like(softmax.sum_N)
    chunks = []
    for start, rows_wD in head.pieces(width, x_ND.dtype):
        w, blank_alone = len(rows_wD), start == V
        stride = _aligned(w) if x_ND.is_cuda else w
        room = x_ND.new_empty(N * stride) if blank_alone else scratch if store is None else store[N * start :]
        kept_Nw = room[: N * stride].view(N, stride)[:, :w]
        z_Nw = mm(x_ND, rows_wD.t(), out=kept_Nw)
        if store is None:
            kept_Nw = z_Nw
        else:
            base_N = torch.empty_like(base_N)
        out_Nw = kept_Nw if wanted and not blank_alone else None  # the blank is a compact column: nothing is left
        relative_N = steps.update_chunk(
            z_Nw,
            out_Nw,
            start,
            frames.compact.columns_BK,
            utterance_N,
            softmax.running_3N,
            softmax.picked_NK,
            softmax.argmax_N,
            expected_ND,
            base_N,
        )
        if blank_alone:
            continue
        if expected_ND is not None:
            add_mm(expected_ND, kept_Nw, rows_wD, None if relative_N is None else relative_N[:, None])
        if store is not None:
            chunks.append(Chunk(start, kept_Nw, base_N))
        del z_Nw, kept_Nw, out_Nw  # the next chunk shall find this one's memory, while it is in the cache
    return chunks


def best_classes(frames: Frames, head: Head) -> tuple[Tensor, Tensor]:
    """Every row's most probable class (N,) int64 and its log-probability (N,), in float32 or better. One GEMM."""
    softmax = Softmax.start(frames, need_argmax=True)
    for rows in frames.groups(_limit(FROZEN_ROWS, frames.x_ND)):
        _walk(frames, rows, head, softmax[rows], None, None)
    # Where nothing is kept the offset is the maximum: no difference of two large numbers, however sure a frame is.
    return softmax.argmax_N, softmax.sum_N.log().neg_().clamp_(max=0.0)


def frozen_pass(
    frames: Frames, head: Head, need_x: bool, need_blank: bool, need_argmax: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """nll (B,), argmax (N,), d nll / dx (N, D) and d nll_b / d blank_row (B, D), in float32 or better.

    One GEMM without need_x, two with it. An utterance with an infinite loss gets gradients that mean nothing.
    """
    x = frames.x_ND
    softmax = Softmax.start(frames, need_argmax)
    accumulate = softmax.sum_N.dtype
    dx_ND = torch.zeros_like(x, dtype=accumulate) if need_x else None
    for rows in frames.groups(_limit(FROZEN_ROWS, x)):
        _walk(frames, rows, head, softmax[rows], None if dx_ND is None else dx_ND[rows], None)
    nll_B, residual_NK = likelihood(frames, softmax, need_x or need_blank)
    dblank_BD = torch.zeros(len(nll_B), x.shape[1], dtype=accumulate, device=x.device) if need_blank else None
    if need_x:
        factor_N = softmax.sum_N.reciprocal()
        if frames.valid_N is not None:
            factor_N.masked_fill_(~frames.valid_N, 0.0)
        dx_ND.mul_(factor_N[:, None])
    if need_x or need_blank:
        for b, rows in frames.spans():
            if need_x:
                dx_ND[rows].addmm_(residual_NK[rows], head.rows(frames.compact.columns_BK[b], accumulate))
            if need_blank:
                dblank_BD[b] = residual_NK[rows, 0] @ x[rows].to(accumulate)
    return nll_B, softmax.argmax_N, dx_ND, dblank_BD


def trained_pass(
    frames: Frames,
    head: Head,
    scale_B: Tensor,  # what each utterance's loss is multiplied by; 0 or more of either sign
    need_x: bool,
    need_argmax: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """nll (B,), argmax (N,), and the gradients of sum_b scale_b nll_b: dx (N, D), dW (V, D), dblank_row (D,).

    Gradients are in float32 or better, dW possibly in weight's dtype. Three GEMMs, two without need_x; exponentials
    of one group of utterances are held at a time. An utterance that does not fit its target adds nothing.
    """
    x = frames.x_ND
    V, D = head.weight.shape
    softmax = Softmax.start(frames, need_argmax)
    accumulate = softmax.sum_N.dtype
    scale_N = torch.where(fits_B(frames.compact), scale_B, 0.0).to(accumulate)[frames.utterance_N]
    if frames.valid_N is not None:
        scale_N = scale_N.masked_fill(~frames.valid_N, 0.0)
    dx_ND = torch.zeros_like(x, dtype=accumulate) if need_x else None
    groups = frames.groups(_limit(TRAINED_BYTES, x) // (V * x.element_size()))
    narrow = len(groups) == 1 and x.dtype == head.weight.dtype != torch.float16  # nothing to accumulate
    dw_VD = torch.empty(V, D, dtype=x.dtype if narrow else accumulate, device=x.device)
    if not groups:
        dw_VD.zero_()
    most = max((rows.stop - rows.start for rows in groups), default=0)
    store = x.new_empty(most * _aligned(V))
    for i, rows in enumerate(groups):
        part = softmax[rows]
        chunks = _walk(frames, rows, head, part, None if dx_ND is None else dx_ND[rows], store)
        lse_N = part.logsumexp()
        for chunk in chunks:
            target_wD = dw_VD[chunk.start : chunk.start + chunk.exp_Nw.shape[1]]
            _add_weight_grad(target_wD, chunk, x[rows], scale_N[rows], chunk.base_N - lse_N, overwrite=i == 0)
    nll_B, residual_NK = likelihood(frames, softmax, True)
    residual_NK.mul_(scale_N[:, None])
    if need_x:
        dx_ND.mul_((scale_N / softmax.sum_N)[:, None])
    dblank_D = torch.zeros(D, dtype=accumulate, device=x.device)
    _add_compact_grads(dx_ND, dw_VD, dblank_D, residual_NK, frames, head)
    if head.blank_row is None:
        dw_VD[head.blank] += dblank_D
    return nll_B, softmax.argmax_N, dx_ND, dw_VD, dblank_D


def _add_weight_grad(
    target_wD: Tensor, chunk: Chunk, x_ND: Tensor, scale_N: Tensor, log_factor_N: Tensor, overwrite: bool
) -> None:
    """target += sum_n exp_n^T scale_n exp(log_factor_n) x_n."""
    steps = implementation("linear_ctc_loss", x_ND)
    unit = None
    if x_ND.dtype == torch.float16:  # too few exponents for a probability times a scale: the largest factor comes last
        scale_N, log_factor_N = scale_N * log_factor_N.exp(), None
        unit = scale_N.abs().max().clamp(min=1e-30)
        scale_N = scale_N / unit
    scaled_ND = steps.scale_rows(x_ND, scale_N, log_factor_N, x_ND.dtype)
    add_mm(target_wD, chunk.exp_Nw.t(), scaled_ND, unit, overwrite)


def _add_compact_grads(
    dx_ND: Tensor | None,
    dw_VD: Tensor,
    dblank_D: Tensor,
    residual_NK: Tensor,
    frames: Frames,
    head: Head,
) -> None:
    """Add what the compact columns owe: (p - gamma) W to dx, (p - gamma)^T x to dW, and to dblank for the blank."""
    steps = implementation("linear_ctc_loss", frames.x_ND)
    columns_BK, first_BK = frames.compact.columns_BK, frames.compact.first_BK
    for b, rows in frames.spans():
        if rows.start == rows.stop:
            continue
        if dx_ND is not None:
            dx_ND[rows].addmm_(residual_NK[rows], head.rows(columns_BK[b], dx_ND.dtype))
        rows_KD = residual_NK[rows].t() @ frames.x_ND[rows].to(residual_NK.dtype)
        dblank_D += rows_KD[0]
        steps.add_label_rows(dw_VD, rows_KD, columns_BK[b], first_BK[b])
