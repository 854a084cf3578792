"""Triton kernels of splice, backward: one for the text embeddings and one for the audio rows, each row written once.

Shape legend: B prompts, L text positions, D width, N audio rows, P audio segments, M output positions a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton import tuning
from csrc_triton.launch import block, row_key, row_sizes
from csrc_triton.splice.forward import LAYOUTS, TILE


@triton.jit
def _output_row(p_lengths, p_cu_seqlens, b, within, mask, M, LAYOUT: tl.constexpr):
    """Flat output row of place `within` of prompt b (int64 both), and whether the output has it."""
    if LAYOUT == 2:
        row = tl.load(p_cu_seqlens + b, mask=mask, other=0).to(tl.int64) + within
        there = mask & (row < M)
    else:
        if LAYOUT == 1:
            within += M - tl.load(p_lengths + b, mask=mask, other=0).to(tl.int64)
        row = b * M + within
        there = mask & (within >= 0) & (within < M)
    return row, there


@triton.jit(do_not_specialize=["B", "L", "M"])
def _text_backward_kernel(
    p_grad,  # (rows, D), any strides
    p_ends,  # (B, L) int32
    p_segment,  # (B, L) int32
    p_lengths,  # (B,) int32
    p_cu_seqlens,  # (B + 1,) int32
    p_out,  # (B, L, D), written
    B,
    L,
    D,
    M,
    stride_b,
    stride_m,
    stride_d,
    LAYOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Give BLOCK_N text positions a program the gradient of the row they became, else 0. Grid (B * L / BLOCK_N,)."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = o_n // L
    m_n = b < B
    within = tl.load(p_ends + o_n, mask=m_n, other=0).to(tl.int64) - 1
    text = tl.load(p_segment + o_n, mask=m_n, other=-2) == -1
    row, there = _output_row(p_lengths, p_cu_seqlens, b, within, text, M, LAYOUT)
    if LAYOUT == 2:
        p_grad += (row * stride_m)[:, None]
    else:
        p_grad += (b * stride_b + (row - b * M) * stride_m)[:, None]
    for d in range(0, D, BLOCK_D):
        o_d = (d + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
        x = tl.load(p_grad + o_d * stride_d, mask=there[:, None] & (o_d < D), other=0)
        tl.store(p_out + o_n[:, None] * D + o_d, x, mask=m_n[:, None] & (o_d < D))


def splice_text_backward(
    grad_BMD: Tensor, ends_BL: Tensor, segment_BL: Tensor, lengths_B: Tensor, cu_seqlens: Tensor, layout: str
) -> Tensor:
    """(B, L, D): each text position gets the gradient of the row it became, others 0: one launch."""
    (B, L), (M, D) = ends_BL.shape, grad_BMD.shape[1:]
    out_BLD = grad_BMD.new_empty(B, L, D)

    def start(**sizes: int) -> None:
        _text_backward_kernel[(triton.cdiv(B * L, sizes["BLOCK_N"]),)](
            grad_BMD,
            ends_BL,
            segment_BL,
            lengths_B,
            cu_seqlens,
            out_BLD,
            B,
            L,
            D,
            M,
            *grad_BMD.stride(),
            LAYOUT=LAYOUTS[layout],
            **sizes,
        )

    if out_BLD.numel():
        tuning.launch("splice text backward", row_key(grad_BMD), row_sizes(D, TILE, 64), start)
    return out_BLD


@triton.jit(do_not_specialize=["N", "P", "L", "M"])
def _audio_backward_kernel(
    p_grad,  # (rows, D), any strides
    p_cu_audio,  # (P + 1,) int32
    p_ends,  # (B, L) int32
    p_home,  # (P,) int32
    p_lengths,  # (B,) int32
    p_cu_seqlens,  # (B + 1,) int32
    p_out,  # (N, D), written
    N,
    P,
    L,
    D,
    M,
    stride_b,
    stride_m,
    stride_d,
    LAYOUT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Give BLOCK_N audio rows a program the gradient of the row they became, else 0. Grid (N / BLOCK_N,).

    A row's segment is the number of segments that end at or before it; its home leads to its prompt and place.
    """
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    segment = tl.zeros((BLOCK_N,), tl.int32)
    for p in range(0, P, BLOCK_P):
        o_p = p + tl.arange(0, BLOCK_P)
        end = tl.load(p_cu_audio + 1 + o_p, mask=o_p < P, other=0)
        segment += tl.sum(((o_p < P)[None, :] & (end[None, :] <= o_n[:, None])).to(tl.int32), 1)
    owned = (o_n < N) & (segment < P)
    home = tl.load(p_home + segment, mask=owned, other=-1).to(tl.int64)
    owned = owned & (home >= 0)
    b = tl.where(owned, home // tl.maximum(L, 1), 0)
    left = tl.load(p_cu_audio + segment + 1, mask=owned, other=0) - o_n
    within = tl.load(p_ends + home, mask=owned, other=0) - left
    row, there = _output_row(p_lengths, p_cu_seqlens, b, within, owned, M, LAYOUT)
    if LAYOUT == 2:
        p_grad += (row * stride_m)[:, None]
    else:
        p_grad += (b * stride_b + (row - b * M) * stride_m)[:, None]
    for d in range(0, D, BLOCK_D):
        o_d = (d + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
        x = tl.load(p_grad + o_d * stride_d, mask=there[:, None] & (o_d < D), other=0)
        tl.store(p_out + o_n[:, None] * D + o_d, x.to(p_out.dtype.element_ty), mask=(o_n < N)[:, None] & (o_d < D))


def splice_audio_backward(
    grad_BMD: Tensor,
    cu_seqlens_P: Tensor,
    ends_BL: Tensor,
    home_P: Tensor,
    lengths_B: Tensor,
    cu_seqlens: Tensor,
    layout: str,
    rows: int,  # N
    dtype: torch.dtype,
) -> Tensor:
    """(N, D): each audio row gets the gradient of the row it became; those without a placeholder or an owner, 0.

    One launch.
    """
    M, D = grad_BMD.shape[1:]
    out_ND = grad_BMD.new_empty(rows, D, dtype=dtype)

    def start(**sizes: int) -> None:
        _audio_backward_kernel[(triton.cdiv(rows, sizes["BLOCK_N"]),)](
            grad_BMD,
            cu_seqlens_P,
            ends_BL,
            home_P,
            lengths_B,
            cu_seqlens,
            out_ND,
            rows,
            home_P.numel(),
            ends_BL.shape[1],
            D,
            M,
            *grad_BMD.stride(),
            LAYOUT=LAYOUTS[layout],
            BLOCK_P=block(home_P.numel(), most=64),
            **sizes,
        )

    if out_ND.numel():
        tuning.launch("splice audio backward", row_key(grad_BMD), row_sizes(D, TILE, 64), start)
    return out_ND
