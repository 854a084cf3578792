"""Triton kernels of peak_gather: a scan that finds the peaks of each utterance, the row gather, and its backward.

Shape legend: B utterances, T frames, D width, N rows of the output.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton import tuning
from csrc_triton.launch import block, row_key, row_sizes
from csrc_triton.ragged import locate, store_offsets

_TILE = 4096  # elements of a copied tile: 32 a thread, so that several 16-byte loads are under way


@triton.jit
def _better(start_a, score_a, frame_a, start_b, score_b, frame_b):
    """Run-wise argmax as an associative scan: b starts a run or has the strictly higher score, else a stays."""
    take_b = (start_b != 0) | (score_b > score_a)
    return start_a | start_b, tl.where(take_b, score_b, score_a), tl.where(take_b, frame_b, frame_a)


@triton.jit(do_not_specialize=["T", "blank"])
def _scan_kernel(
    p_tokens,  # (B, T), any integer
    p_lengths,  # (B,) integers, not read unless HAS_LENGTHS
    p_scores,  # (B, T) floats, not read unless SELECT_PEAK
    p_kept,  # (B, T) int32, written: the kept frames of utterance b in order, then untouched
    p_counts,  # (B,) int32, written: how many
    T,
    blank,
    stride_token_b,
    stride_token_t,
    stride_score_b,
    stride_score_t,
    HAS_LENGTHS: tl.constexpr,
    DROP_BLANK: tl.constexpr,
    SELECT_PEAK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The frames one utterance keeps. Grid (B,): a program walks its utterance once, BLOCK_T frames at a time.

    Reads frames below the length alone; scores are compared in float32 (float64 if they are), NaN as -inf. No two
    threads write one element, so there is no barrier; kept entries past the count are left as they are.
    """
    i_b = tl.program_id(0).to(tl.int64)
    p_tokens += i_b * stride_token_b
    p_scores += i_b * stride_score_b
    p_kept += i_b * T
    length = T
    if HAS_LENGTHS:
        length = tl.minimum(tl.maximum(tl.load(p_lengths + i_b), 0), T).to(tl.int32)
    count = tl.zeros((), tl.int32)
    if SELECT_PEAK:
        SCORE: tl.constexpr = tl.float64 if p_scores.dtype.element_ty == tl.float64 else tl.float32
        open_score = tl.full((), float("-inf"), SCORE)  # best frame so far of the run that reaches into this block
        open_frame = tl.zeros((), tl.int32)
    for t in range(0, length, BLOCK_T):
        o_t = t + tl.arange(0, BLOCK_T)
        m_t = o_t < length
        p_t = p_tokens + o_t.to(tl.int64) * stride_token_t
        token = tl.load(p_t, mask=m_t, other=0)
        before = tl.load(p_t - stride_token_t, mask=m_t & (o_t > 0), other=0)
        start = m_t & ((o_t == 0) | (token != before))
        mark, frame = start, o_t  # where a run is counted, and the frame it is counted for
        if SELECT_PEAK:
            score = tl.load(p_scores + o_t.to(tl.int64) * stride_score_t, mask=m_t, other=float("-inf")).to(SCORE)
            score = tl.where(score == score, score, float("-inf"))
            started, best, frame = tl.associative_scan((start.to(tl.int32), score, o_t), 0, _better)
            reaches = (started == 0) & (open_score >= best)
            best = tl.where(reaches, open_score, best)
            frame = tl.where(reaches, open_frame, frame)
            last = o_t == tl.minimum(t + BLOCK_T, length) - 1
            open_score = tl.max(tl.where(last, best, float("-inf")), 0)
            open_frame = tl.sum(tl.where(last, frame, 0), 0)
            after = tl.load(p_t + stride_token_t, mask=o_t + 1 < length, other=0)
            mark = m_t & ((o_t + 1 == length) | (token != after))
        if DROP_BLANK:
            mark = mark & (token != blank)
        rank = count + tl.cumsum(mark.to(tl.int32), 0) - 1
        tl.store(p_kept + rank, frame, mask=mark)
        count += tl.sum(mark.to(tl.int32), 0)
    nothing = (count == 0) & (length > 0)
    tl.store(p_kept, 0, mask=nothing)
    tl.store(p_counts + i_b, tl.where(nothing, 1, count))


def scan_peaks(
    tokens_BT: Tensor,
    lengths_B: Tensor | None,
    blank: int | None,
    drop_blank: bool,
    scores_BT: Tensor | None,  # given: the best frame of each run; not given: the first
) -> tuple[Tensor, Tensor]:
    """The kept frames of each utterance, (B, T) int32 valid up to its count, and the counts (B,) int32: one launch."""
    B, T = tokens_BT.shape
    kept_BT = torch.empty(B, T, dtype=torch.int32, device=tokens_BT.device)
    counts_B = torch.empty(B, dtype=torch.int32, device=tokens_BT.device)
    scores = tokens_BT if scores_BT is None else scores_BT
    if B:
        _scan_kernel[(B,)](
            tokens_BT,
            tokens_BT if lengths_B is None else lengths_B.contiguous(),
            scores,
            kept_BT,
            counts_B,
            T,
            blank if drop_blank else 0,
            *tokens_BT.stride(),
            *scores.stride(),
            HAS_LENGTHS=lengths_B is not None,
            DROP_BLANK=drop_blank,
            SELECT_PEAK=scores_BT is not None,
            BLOCK_T=block(T, most=1024),
        )
    return kept_BT, counts_B


@triton.jit(do_not_specialize=["B", "T", "capacity"])
def _gather_kernel(
    p_features,  # (B, T, D), any strides
    p_kept,  # (B, T) int32
    p_counts,  # (B,) int32
    p_rows,  # (capacity, D), written
    p_index,  # (capacity,) int64, written
    p_cu_seqlens,  # (B + 1,) int32, written by program 0
    B,
    T,
    D,
    capacity,
    stride_b,
    stride_t,
    stride_d,
    HAS_FEATURES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Copy BLOCK_N packed rows a program from the frames they stand for; 0 and index -1 past the last.

    Grid (rows / BLOCK_N, at least 1). Every program sums the B counts for itself, which spares a launch. No arithmetic
    on the rows: any dtype. Every element of the outputs is written once.
    """
    i_n = tl.program_id(0).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    group, first, total = locate(p_counts, B, o_n, BLOCK_N, BLOCK_B)
    if i_n == 0:
        limit = tl.minimum(total, capacity) if HAS_FEATURES else total
        store_offsets(p_counts, p_cu_seqlens, B, limit, limit, BLOCK_B)
    m_n = o_n < tl.minimum(total, capacity)
    b = group.to(tl.int64)
    t = tl.load(p_kept + b * T + o_n - first, mask=m_n, other=0).to(tl.int64)
    tl.store(p_index + o_n, tl.where(m_n, b * T + t, -1), mask=o_n < capacity)
    if HAS_FEATURES:
        p_from = p_features + (b * stride_b + t * stride_t)[:, None]
        for d in range(0, D, BLOCK_D):
            o_d = (d + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
            x = tl.load(p_from + o_d * stride_d, mask=m_n[:, None] & (o_d < D), other=0)
            tl.store(p_rows + o_n[:, None] * D + o_d, x, mask=(o_n < capacity)[:, None] & (o_d < D))


def gather_peaks(
    features_BTD: Tensor | None,
    kept_BT: Tensor,
    counts_B: Tensor,
    frames: int,  # T
    capacity: int,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Rows (capacity, D), 0 where nothing is kept; their flat positions, int64, -1 there; cu_seqlens: one launch.

    Peaks beyond the capacity are left out. With features cu_seqlens stops there too, so that whoever reads the rows
    by it stays inside them; without, it counts all peaks and the rows are None.
    """
    B, device = counts_B.numel(), counts_B.device
    index_N = torch.empty(capacity, dtype=torch.int64, device=device)
    cu_seqlens = torch.empty(B + 1, dtype=torch.int32, device=device)
    rows_ND, source, D, default = None, index_N, 0, {"BLOCK_N": 128, "BLOCK_D": 16, "num_warps": 4}
    if features_BTD is not None:
        source, D = features_BTD, features_BTD.shape[2]
        rows_ND = source.new_empty(capacity, D)
        default = row_sizes(D, _TILE, 64)

    def start(**sizes: int) -> None:
        _gather_kernel[(max(triton.cdiv(capacity, sizes["BLOCK_N"]), 1),)](
            source,
            kept_BT,
            counts_B,
            index_N if rows_ND is None else rows_ND,
            index_N,
            cu_seqlens,
            B,
            frames,
            D,
            capacity,
            *((0, 0, 0) if rows_ND is None else source.stride()),
            HAS_FEATURES=rows_ND is not None,
            BLOCK_B=block(B, most=64),
            **sizes,
        )

    if rows_ND is None:
        start(**default)
    else:
        tuning.launch("peak_gather rows", row_key(rows_ND), default, start)
    return rows_ND, index_N, cu_seqlens


@triton.jit(do_not_specialize=["T"])
def _gather_backward_kernel(
    p_grad,  # (N, D), any strides
    p_index,  # (N,) int64, ascending up to cu_seqlens[B]
    p_cu_seqlens,  # (B + 1,) int32
    p_out,  # (B, T, D), written
    T,
    D,
    stride_n,
    stride_d,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Give BLOCK_N frames of one utterance a program the gradient of the packed row taken from them, else 0.

    Grid (B * ceil(T / BLOCK_N),). A frame is looked up among the kept ones of its utterance, BLOCK_K at a time: how
    many lie before it is its rank. Every row of the output is written once; there is nothing to clear beforehand.
    """
    tiles = tl.cdiv(T, BLOCK_N)
    i_b = tl.program_id(0) // tiles
    o_t = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_t = o_t < T
    position = i_b.to(tl.int64) * T + o_t
    start = tl.load(p_cu_seqlens + i_b)
    end = tl.load(p_cu_seqlens + i_b + 1)
    row = tl.zeros((BLOCK_N,), tl.int64) + start
    kept = tl.zeros((BLOCK_N,), tl.int32)
    for k in range(start, end, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = (o_k < end)[None, :]
        index = tl.load(p_index + o_k, mask=o_k < end, other=0)[None, :]
        row += tl.sum((m_k & (index < position[:, None])).to(tl.int32), 1)
        kept += tl.sum((m_k & (index == position[:, None])).to(tl.int32), 1)
    m_n = (m_t & (kept > 0))[:, None]
    for d in range(0, D, BLOCK_D):
        o_d = (d + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
        x = tl.load(p_grad + row[:, None] * stride_n + o_d * stride_d, mask=m_n & (o_d < D), other=0)
        tl.store(p_out + position[:, None] * D + o_d, x, mask=m_t[:, None] & (o_d < D))


def gather_peaks_backward(
    grad_ND: Tensor,
    index_N: Tensor,  # flat positions, ascending, then -1
    cu_seqlens: Tensor,
    batch: int,  # B
    frames: int,  # T
) -> Tensor:
    """(B, T, D): row b * T + t is the gradient of the packed row taken from it, else 0: one launch."""
    D = grad_ND.shape[1]
    out_BTD = grad_ND.new_empty(batch, frames, D)

    def start(**sizes: int) -> None:
        _gather_backward_kernel[(batch * triton.cdiv(frames, sizes["BLOCK_N"]),)](
            grad_ND,
            index_N,
            cu_seqlens,
            out_BTD,
            frames,
            D,
            *grad_ND.stride(),
            BLOCK_K=64,
            **sizes,
        )

    if out_BTD.numel():
        tuning.launch("peak_gather backward", row_key(grad_ND), row_sizes(D, _TILE, 64), start)
    return out_BTD
