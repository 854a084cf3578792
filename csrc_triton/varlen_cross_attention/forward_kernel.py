"""Forward kernel of varlen_cross_attention and its launcher.

Shape legend in csrc_triton/varlen_cross_attention/__init__.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.launch import INTERPRETED
from csrc_triton.varlen_cross_attention.sizes import launch
from csrc_triton.varlen_cross_attention.tiles import keep_mask, load_tile, rows_of, split_queries, store_tile

LOG2_E = 1.4426950408889634
TINY = 1e-30  # instead of a scale of 0, which would make 0 times infinity of a masked score


@triton.jit(do_not_specialize=["rows_q", "rows_k", "B", "tiles"])
def _forward_kernel(
    p_q,  # (Nq, H, d)
    p_k,  # (Nk, G, d)
    p_v,  # (Nk, G, d), k's strides
    p_out,  # (Nq, H, d) contiguous, written
    p_lse,  # (2, Nq, H) float32, written: largest q k, and log2 of the sum of 2^(scale_log2 (q k - it))
    p_cu_seqlens_q,  # (B + 1,)
    p_cu_seqlens_k,  # (B + 1,)
    p_seed,  # (1,) int64, read if DROPOUT
    rows_q,  # Nq
    rows_k,  # Nk
    B,
    tiles,
    G,
    R,
    d,
    stride_q_row,
    stride_q_head,
    stride_kv_row,
    stride_kv_head,
    scale_log2,  # above 0
    dropout_p,
    DROPOUT: tl.constexpr,
    EVEN_D: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """softmax(q k^T) v with a running maximum, BLOCK_N keys at a time, sums in float32.

    Grid ((B + 1) * G * tiles,): the programs of a key head walk its queries in steps of BLOCK_M * tiles, rows of no
    utterance first. Every row of out and lse is written, 0 where there are no keys. Masks: queries, keys, d.
    """
    i = tl.program_id(0)
    i_b = B - i // (G * tiles)
    i_g = i // tiles % G
    start_q, n_q = rows_of(p_cu_seqlens_q, i_b, B, rows_q)
    start_k, n_k = rows_of(p_cu_seqlens_k, i_b, B, rows_k)
    n_k = tl.where(i_b < B, n_k, 0)
    i_g = i_g.to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < d
    o_n = tl.arange(0, BLOCK_N)
    o_key = o_n * stride_kv_row
    rows = tl.cast(rows_q, tl.int64)
    for m in range(i % tiles * BLOCK_M, n_q * R, BLOCK_M * tiles):
        o_m = m + tl.arange(0, BLOCK_M)
        m_m = o_m < n_q * R
        o_row, o_head = split_queries(o_m, m, R)
        first = start_q + m // R
        p_queries = p_q + first * stride_q_row + i_g * R * stride_q_head
        q = load_tile(p_queries, o_row * stride_q_row + o_head * stride_q_head, o_d, m_m, m_d, EVEN_D, UPCAST)
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for n in range(0, n_k, BLOCK_N):
            m_n = o_n < n_k - n
            o_block = (start_k + n) * stride_kv_row + i_g * stride_kv_head
            k = load_tile(p_k + o_block, o_key, o_d, m_n, m_d, EVEN_D, UPCAST)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            s = tl.where(m_n[None, :], s, float("-inf"))
            above = tl.maximum(top, tl.max(s, 1))
            # The difference first, which is exact for near scores: scaled scores would round, each its own way.
            p = tl.exp2((s - above[:, None]) * scale_log2)
            shrink = tl.exp2((top - above) * scale_log2)
            total = total * shrink + tl.sum(p, 1)
            if DROPOUT:
                p = tl.where(keep_mask(p_seed, dropout_p, i_b * G + i_g, o_m, n, BLOCK_M, BLOCK_N), p, 0.0)
            v = load_tile(p_v + o_block, o_key, o_d, m_n, m_d, EVEN_D, UPCAST)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
            top = above
        some = total > 0
        if DROPOUT:
            acc = acc / (1.0 - dropout_p)
        total = tl.where(some, total, 1.0)
        out = acc / total[:, None]
        first = (first * G + i_g) * R
        o_row = o_row * (G * R) + o_head
        tl.store(p_lse + first + o_row, tl.where(some, top, 0.0), mask=m_m)
        tl.store(p_lse + first + rows * G * R + o_row, tl.log2(total), mask=m_m)
        store_tile(p_out + first * d, o_row * d, o_d, m_m, m_d, out, EVEN_D)


def forward(
    q: Tensor,  # (Nq, H, d)
    k: Tensor,  # (Nk, G, d)
    v: Tensor,  # (Nk, G, d)
    cu_seqlens_q: Tensor,  # (B + 1,)
    cu_seqlens_k: Tensor,  # (B + 1,)
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,  # (1,) int64, with dropout
    keep: bool,  # whether backward will follow; log-sum-exp is as good as free here
) -> tuple[Tensor, Tensor]:
    """out (Nq, H, d), and log-sum-exp in base 2 for `backward`, (2, Nq, H) float32.

    In two parts, since in one float32 the sum is lost under a maximum in the thousands.
    """
    H, d = q.shape[1:]
    G = k.shape[1]
    q, k, v = kernel_layout(-q if scale < 0 else q, k, v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((2, *q.shape[:2]), dtype=torch.float32, device=q.device)
    queries = max_seqlen_q * (H // G)

    def start(**blocks: int) -> None:
        tiles = max(triton.cdiv(queries, blocks["BLOCK_M"]), 1)
        _forward_kernel[(cu_seqlens_q.numel() * G * tiles,)](
            q,
            k,
            v,
            out,
            lse,
            cu_seqlens_q,
            cu_seqlens_k,
            cu_seqlens_q if seed is None else seed,
            q.shape[0],
            k.shape[0],
            cu_seqlens_q.numel() - 1,
            tiles,
            G,
            H // G,
            d,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            max(abs(scale) * LOG2_E, TINY),
            dropout_p,
            DROPOUT=seed is not None,
            UPCAST=INTERPRETED,
            **blocks,
        )

    launch("forward", q, queries, start)
    return out, lse


def kernel_layout(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same values with rows of d adjacent elements, and k and v of equal strides (as a fused projection's are).

    No stride may be so long that 128 of them overflow an int32, which offsets inside a tile are.
    """
    if q.stride(2) != 1 or max(q.stride()) >> 24:
        q = q.contiguous()
    if k.stride() != v.stride() or k.stride(2) != 1 or max(k.stride()) >> 24:
        k, v = k.contiguous(), v.contiguous()
    return q, k, v
