"""Triton kernels of linear_ctc_loss: what happens to logits and gradients between its matrix products.

Shape legend: N rows of several utterances laid end to end, w classes of one vocabulary chunk, B utterances, T longest
utterance, K compact columns (one for the blank, one a label), D width, V vocabulary, R rows of any kind.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton import tuning
from csrc_triton.launch import block

_TILE = 4096  # elements of a row copied by one program
# How far a logit may exceed its row's offset before the offset follows: exp(60) is no strain on bfloat16, which has
# float32's exponents, and float16 ends at exp(11).
_LAZY, _LAZY_FLOAT16 = 60.0, 8.0


@triton.jit(do_not_specialize=["start", "K", "stride_running"])
def _update_chunk_kernel(
    p_z,  # (N, w), rows stride_z apart, read, with the padding behind them up to column `room`
    p_out,  # (N, w), rows stride_out apart, written if HAS_OUT, with 0 up to column `room`; may be p_z
    p_columns,  # (B, K) int64, read
    p_utterance,  # (N,) int64, read
    p_running,  # (3, N) maximum, offset, sum; rows stride_running apart; read and written; its dtype accumulates
    p_picked,  # (N, K), written where a compact column lies in this chunk
    p_argmax,  # (N,) int64, written if HAS_ARGMAX where this chunk holds a new maximum
    p_expected,  # (N, D), read and written if HAS_EXPECTED, in the rows whose offset moves from one value to another
    p_base,  # (N,), written: the offset
    start,
    w,
    room,
    K,
    D,
    stride_z,
    stride_out,
    stride_running,
    LAZY: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_ARGMAX: tl.constexpr,
    HAS_EXPECTED: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row of one chunk, held in registers: read once and, if wanted, written once. Grid (N,).

    Columns past w count as -inf; `room` is there so that an odd w does not cost the wide loads and stores. A compact
    column outside this chunk is neither read nor written. Threads read logits and running scalars that others
    overwrite, and put zeros where others wrote: hence two barriers.
    """
    i_n = tl.program_id(0).to(tl.int64)
    ACCUMULATE: tl.constexpr = p_running.dtype.element_ty
    p_z += i_n * stride_z
    p_out += i_n * stride_out
    p_columns += tl.load(p_utterance + i_n) * K
    p_picked += i_n * K
    o_w = tl.arange(0, BLOCK_W)
    b_z = tl.load(p_z + o_w, mask=o_w < room, other=float("-inf")).to(ACCUMULATE)
    b_z = tl.where(o_w < w, b_z, float("-inf"))
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        local = tl.load(p_columns + o_k, mask=o_k < K, other=-1) - start
        m_k = (o_k < K) & (local >= 0) & (local < w)
        picked = tl.load(p_z + local, mask=m_k, other=0.0).to(ACCUMULATE)
        tl.store(p_picked + o_k, picked, mask=m_k)

    p_maximum, p_offset, p_sum = p_running + i_n, p_running + i_n + stride_running, p_running + i_n + 2 * stride_running
    maximum, before, total = tl.load(p_maximum), tl.load(p_offset), tl.load(p_sum)
    tl.debug_barrier()
    top = tl.max(b_z, 0)
    if HAS_ARGMAX:
        # The lowest among equals; w - 1 at most, also in a row of NaN.
        where = tl.minimum(tl.min(tl.where(b_z == top, o_w, BLOCK_W), 0), w - 1)
        tl.store(p_argmax + i_n, start + where.to(tl.int64), mask=top > maximum)
    offset = tl.where((before == float("-inf")) | (top > before + LAZY), top, before)
    b_e = tl.exp(b_z - offset)
    rescale = tl.exp(before - offset)
    tl.store(p_maximum, tl.maximum(maximum, top))
    tl.store(p_offset, offset)
    tl.store(p_sum, total * rescale + tl.sum(b_e, 0))
    tl.store(p_base + i_n, offset)

    if HAS_EXPECTED:
        if (offset != before) & (before != float("-inf")):
            p_expected += i_n * D
            for d in range(0, D, BLOCK_D):
                o_d = d + tl.arange(0, BLOCK_D)
                expected = tl.load(p_expected + o_d, mask=o_d < D, other=0.0)
                tl.store(p_expected + o_d, expected * rescale, mask=o_d < D)
    if HAS_OUT:
        tl.store(p_out + o_w, b_e.to(p_out.dtype.element_ty), mask=o_w < room)
        tl.debug_barrier()
        zero = tl.zeros((BLOCK_K,), p_out.dtype.element_ty)
        for k in range(0, K, BLOCK_K):
            o_k = k + tl.arange(0, BLOCK_K)
            local = tl.load(p_columns + o_k, mask=o_k < K, other=-1) - start
            tl.store(p_out + local, zero, mask=(o_k < K) & (local >= 0) & (local < w))


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
) -> None:
    """Take one chunk of logits into the softmax over the vocabulary, and leave its exponentials in out_Nw.

    Compact columns are picked and then count as 0 in out_Nw. The offset is the first chunk's maximum and follows a
    later one only when that is far above, so that expected_ND is rescaled in few rows or none; where neither out_Nw nor
    expected_ND is wanted it always follows: the best class loses no digit. Returns None: out_Nw already stands relative
    to the offset.
    """
    lazy = 0.0 if out_Nw is None and expected_ND is None else _LAZY_FLOAT16 if z_Nw.dtype == torch.float16 else _LAZY
    N, w = z_Nw.shape
    room = min(-(-w // 16) * 16, *(x.stride(0) for x in (z_Nw, out_Nw) if x is not None))
    D = 1 if expected_ND is None else expected_ND.shape[1]
    BLOCK_W = block(w, most=1 << 16)

    def launch(num_warps: int) -> None:
        _update_chunk_kernel[(N,)](
            z_Nw,
            z_Nw if out_Nw is None else out_Nw,
            columns_BK,
            utterance_N,
            running_3N,
            picked_NK,
            utterance_N if argmax_N is None else argmax_N,
            running_3N if expected_ND is None else expected_ND,
            base_N,
            start,
            w,
            room,
            columns_BK.shape[1],
            D,
            z_Nw.stride(0),
            0 if out_Nw is None else out_Nw.stride(0),
            running_3N.stride(0),
            LAZY=lazy,
            HAS_OUT=out_Nw is not None,
            HAS_ARGMAX=argmax_N is not None,
            HAS_EXPECTED=expected_ND is not None,
            BLOCK_W=BLOCK_W,
            BLOCK_K=block(columns_BK.shape[1], most=128),
            BLOCK_D=block(D, most=1024),
            num_warps=num_warps,
        )

    if N:
        default = {"num_warps": 8 if BLOCK_W > 2048 else 4}
        tuning.launch("linear_ctc_loss update", f"bytes {z_Nw.itemsize}, w {BLOCK_W}", default, launch)


@triton.jit(do_not_specialize=["B", "K", "stride_running"])
def _emissions_kernel(
    p_picked,  # (N, K), read below the lengths
    p_running,  # (3, N), rows stride_running apart, read
    p_starts,  # (B,) int64, read
    p_lengths,  # (B,) int64, read
    p_lp,  # (T, B, K), written
    B,
    K,
    stride_running,
    BLOCK_K: tl.constexpr,
):
    """Compact log-probabilities of one frame of one utterance, 0 past its length. Grid (T * B,)."""
    pid = tl.program_id(0).to(tl.int64)
    i_t, i_b = pid // B, pid % B
    live = i_t < tl.load(p_lengths + i_b)
    i_n = tl.where(live, tl.load(p_starts + i_b) + i_t, 0)
    offset = tl.load(p_running + stride_running + i_n, mask=live, other=0.0)
    log_sum = tl.log(tl.load(p_running + 2 * stride_running + i_n, mask=live, other=1.0))
    read = tl.where(live, K, 0)  # a bound instead of `live &` in the mask: see _frame of alpha_beta.py
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        picked = tl.load(p_picked + i_n * K + o_k, mask=o_k < read, other=0.0)
        lp = picked - offset - log_sum
        # Both come from the same chunk values, so lp exceeds 0 by rounding at most; NaN stays NaN.
        lp = tl.where(live & (lp <= 0), lp, tl.where(live & (lp != lp), lp, 0.0))
        tl.store(p_lp + pid * K + o_k, lp, mask=o_k < K)


def emissions(
    picked_NK: Tensor,
    running_3N: Tensor,  # after the last chunk
    starts_B: Tensor,  # first row of each utterance
    lengths_B: Tensor,
    frames: int,  # T
) -> Tensor:
    """Compact log-probabilities (T, B, K), at most 0; 0 past a length."""
    K, B = picked_NK.shape[1], lengths_B.shape[0]
    lp_TBK = picked_NK.new_empty(frames, B, K)
    if lp_TBK.numel():
        _emissions_kernel[(frames * B,)](
            picked_NK,
            running_3N,
            starts_B,
            lengths_B,
            lp_TBK,
            B,
            K,
            running_3N.stride(0),
            BLOCK_K=block(K, most=256),
            num_warps=1,
        )
    return lp_TBK


@triton.jit(do_not_specialize=["B", "K", "stride_gamma_t", "stride_gamma_b"])
def _residual_kernel(
    p_lp,  # (T, B, K), read below the lengths
    p_gamma,  # (T, B, K), any float and any strides, read below the lengths
    p_first,  # (B, K) int64, read
    p_utterance,  # (N,) int64, read
    p_starts,  # (B,) int64, read
    p_lengths,  # (B,) int64, read
    p_residual,  # (N, K), written
    B,
    K,
    stride_gamma_t,
    stride_gamma_b,
    stride_gamma_k,
    BLOCK_K: tl.constexpr,
):
    """p - gamma of one row, in the dtype of p_residual; 0 in repeated columns and past the length. Grid (N,)."""
    i_n = tl.program_id(0).to(tl.int64)
    i_b = tl.load(p_utterance + i_n)
    i_t = i_n - tl.load(p_starts + i_b)
    live = i_t < tl.load(p_lengths + i_b)
    p_gamma += i_t * stride_gamma_t + i_b * stride_gamma_b
    read = tl.where(live, K, 0)  # a bound instead of `live &` in the mask: see _frame of alpha_beta.py
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        first = tl.load(p_first + i_b * K + o_k, mask=o_k < read, other=-1)
        m_k = first == o_k
        lp = tl.load(p_lp + (i_t * B + i_b) * K + o_k, mask=m_k, other=0.0)
        gamma = tl.load(p_gamma + o_k * stride_gamma_k, mask=m_k, other=0.0)
        difference = tl.where(m_k, tl.exp(lp) - gamma.to(lp.dtype), 0.0)
        tl.store(p_residual + i_n * K + o_k, difference.to(p_residual.dtype.element_ty), mask=o_k < K)


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
    N, (_, B, K) = len(utterance_N), lp_TBK.shape
    residual_NK = torch.empty(N, K, dtype=dtype, device=lp_TBK.device)
    if residual_NK.numel():
        _residual_kernel[(N,)](
            lp_TBK,
            gamma_TBK,
            first_BK,
            utterance_N,
            starts_B,
            lengths_B,
            residual_NK,
            B,
            K,
            *gamma_TBK.stride(),
            BLOCK_K=block(K, most=256),
            num_warps=1,
        )
    return residual_NK


@triton.jit(do_not_specialize=["n_blocks"])
def _scale_rows_kernel(
    p_x,  # (R, D), rows stride_x apart, read
    p_factor,  # (R,), read
    p_log_factor,  # (R,), read if HAS_LOG
    p_out,  # (R, D), written
    D,
    n_blocks,
    stride_x,
    HAS_LOG: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A piece of one row times its factor, in float32 or better, cast. Grid (R * n_blocks,)."""
    pid = tl.program_id(0).to(tl.int64)
    i_r = pid // n_blocks
    o_d = (pid % n_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    WIDE: tl.constexpr = tl.float64 if p_x.dtype.element_ty == tl.float64 else tl.float32
    factor = tl.load(p_factor + i_r).to(WIDE)
    if HAS_LOG:
        factor *= tl.exp(tl.load(p_log_factor + i_r).to(WIDE))
    x = tl.load(p_x + i_r * stride_x + o_d, mask=o_d < D, other=0.0).to(WIDE)
    tl.store(p_out + i_r * D + o_d, (x * factor).to(p_out.dtype.element_ty), mask=o_d < D)


def scale_rows(
    x_RD: Tensor,
    factor_R: Tensor,
    log_factor_R: Tensor | None,  # None: 0
    dtype: torch.dtype,
) -> Tensor:
    """x * factor * exp(log_factor) in `dtype`, row by row, as a new tensor."""
    R, D = x_RD.shape
    out_RD = torch.empty(R, D, dtype=dtype, device=x_RD.device)
    BLOCK_D = block(D, most=_TILE)
    n_blocks = triton.cdiv(D, BLOCK_D)
    if out_RD.numel():
        _scale_rows_kernel[(R * n_blocks,)](
            x_RD,
            factor_R.contiguous(),
            x_RD if log_factor_R is None else log_factor_R.contiguous(),
            out_RD,
            D,
            n_blocks,
            x_RD.stride(0),
            HAS_LOG=log_factor_R is not None,
            BLOCK_D=BLOCK_D,
        )
    return out_RD


@triton.jit(do_not_specialize=["n_blocks"])
def _add_label_rows_kernel(
    p_weight_grad,  # (V, D), read and written in the rows of the labels
    p_rows,  # (K, D), read
    p_columns,  # (K,) int64, read
    p_first,  # (K,) int64, read
    D,
    n_blocks,
    BLOCK_D: tl.constexpr,
):
    """A piece of one row added to the gradient of its class. Grid ((K - 1) * n_blocks,).

    Only columns that are the first of their class count, so no two programs meet.
    """
    pid = tl.program_id(0).to(tl.int64)
    i_k = pid // n_blocks + 1
    o_d = (pid % n_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < tl.where(tl.load(p_first + i_k) == i_k, D, 0)
    p_weight_grad += tl.load(p_columns + i_k) * D + o_d
    row = tl.load(p_rows + i_k * D + o_d, mask=m_d, other=0.0)
    grad = tl.load(p_weight_grad, mask=m_d, other=0.0).to(row.dtype)
    tl.store(p_weight_grad, (grad + row).to(p_weight_grad.dtype.element_ty), mask=m_d)


def add_label_rows(
    weight_grad_VD: Tensor,  # changed in place
    rows_KD: Tensor,
    columns_K: Tensor,
    first_K: Tensor,
) -> None:
    """weight_grad[columns[k]] += rows[k] for the labels, k > 0, in the column that is the first of its class."""
    K, D = rows_KD.shape
    BLOCK_D = block(D, most=_TILE)
    n_blocks = triton.cdiv(D, BLOCK_D)
    if K > 1 and D:
        _add_label_rows_kernel[((K - 1) * n_blocks,)](
            weight_grad_VD, rows_KD, columns_K, first_K, D, n_blocks, BLOCK_D=BLOCK_D
        )
