"""Backward of varlen_cross_attention for more queries than one program can hold.

One program per tile of queries gives dQ, then one per block of keys dK and dV: 7 products in place of the stationary
kernel's 5, but neither atomics nor a float32 dQ in memory, and long utterances are shared among programs.

Shape legend in csrc_triton/varlen_cross_attention/__init__.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.varlen_cross_attention.sizes import launch
from csrc_triton.varlen_cross_attention.tiles import (
    load_lse,
    load_tile,
    rows_of,
    score_scale,
    split_queries,
    store_tile,
    weights_and_grads,
)


@triton.jit(do_not_specialize=["rows_q", "rows_k", "B", "tiles"])
def _queries_kernel(
    p_q,  # (Nq, H, d)
    p_k,  # (Nk, G, d)
    p_v,  # (Nk, G, d), k's strides
    p_out,  # (Nq, H, d) contiguous
    p_do,  # (Nq, H, d) contiguous
    p_lse,  # (2, Nq, H) float32
    p_delta,  # (Nq, H) float32, written: rowsum(dO * O)
    p_dq,  # (Nq, H, d) contiguous, written if NEED_Q
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
    scale,
    scale_log2,
    dropout_p,
    NEED_Q: tl.constexpr,
    DROPOUT: tl.constexpr,
    EVEN_D: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """delta and dQ of BLOCK_M queries at a time, float32 sums over the keys. Grid and masks as in forward.

    Every row is written, 0 for rows without keys.
    """
    i = tl.program_id(0)
    i_b = B - i // (G * tiles)
    i_g = i // tiles % G
    start_q, n_q = rows_of(p_cu_seqlens_q, i_b, B, rows_q)
    start_k, n_k = rows_of(p_cu_seqlens_k, i_b, B, rows_k)
    scale = score_scale(scale, n_k)
    n_k = tl.where(i_b < B, n_k, 0)
    i_g = i_g.to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < d
    o_n = tl.arange(0, BLOCK_N)
    for m in range(i % tiles * BLOCK_M, n_q * R, BLOCK_M * tiles):
        o_m = m + tl.arange(0, BLOCK_M)
        m_m = o_m < n_q * R
        o_row, o_head = split_queries(o_m, m, R)
        o_out = o_row * (G * R) + o_head
        first = ((start_q + m // R) * G + i_g) * R
        do = load_tile(p_do + first * d, o_out * d, o_d, m_m, m_d, EVEN_D, UPCAST)
        out = load_tile(p_out + first * d, o_out * d, o_d, m_m, m_d, EVEN_D, UPCAST)
        delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
        tl.store(p_delta + first + o_out, delta, mask=m_m)
        if NEED_Q:
            top, log_total = load_lse(p_lse + first, o_out, m_m, tl.cast(rows_q, tl.int64) * G * R)
            p_queries = p_q + (start_q + m // R) * stride_q_row + i_g * R * stride_q_head
            q = load_tile(p_queries, o_row * stride_q_row + o_head * stride_q_head, o_d, m_m, m_d, EVEN_D, UPCAST)
            dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            for n in range(0, n_k, BLOCK_N):
                m_n = o_n < n_k - n
                o_block = (start_k + n) * stride_kv_row + i_g * stride_kv_head
                k = load_tile(p_k + o_block, o_n * stride_kv_row, o_d, m_n, m_d, EVEN_D, UPCAST)
                v = load_tile(p_v + o_block, o_n * stride_kv_row, o_d, m_n, m_d, EVEN_D, UPCAST)
                p, ds = weights_and_grads(
                    q, do, k, v, top, log_total, delta, m_m, m_n, p_seed, scale_log2, dropout_p, i_b * G + i_g, o_m, n,
                    DROPOUT, BLOCK_M, BLOCK_N,
                )  # fmt: skip
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
            store_tile(p_dq + first * d, o_out * d, o_d, m_m, m_d, dq * scale, EVEN_D)


@triton.jit(do_not_specialize=["rows_q", "rows_k", "B", "tiles"])
def _keys_kernel(
    p_q,  # (Nq, H, d)
    p_k,  # (Nk, G, d)
    p_v,  # (Nk, G, d), k's strides
    p_do,  # (Nq, H, d) contiguous
    p_lse,  # (2, Nq, H) float32
    p_delta,  # (Nq, H) float32, as _queries_kernel writes it
    p_dk,  # (Nk, G, d) contiguous, written
    p_dv,  # (Nk, G, d) contiguous, written
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
    scale,
    scale_log2,
    dropout_p,
    DROPOUT: tl.constexpr,
    EVEN_D: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dK and dV of BLOCK_N keys at a time, float32 sums over the queries, BLOCK_M at a time.

    Grid ((B + 1) * G * tiles,): the programs of a key head walk its keys in steps of BLOCK_N * tiles, rows of no
    utterance first. Every row is written, 0 without queries. Masks: queries, keys, d.
    """
    i = tl.program_id(0)
    i_b = B - i // (G * tiles)
    i_g = i // tiles % G
    start_q, n_q = rows_of(p_cu_seqlens_q, i_b, B, rows_q)
    start_k, n_k = rows_of(p_cu_seqlens_k, i_b, B, rows_k)
    scale = score_scale(scale, n_k)
    n_q = tl.where(i_b < B, n_q, 0)
    i_g = i_g.to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < d
    o_n = tl.arange(0, BLOCK_N)
    for n in range(i % tiles * BLOCK_N, n_k, BLOCK_N * tiles):
        m_n = o_n < n_k - n
        o_block = (start_k + n) * stride_kv_row + i_g * stride_kv_head
        k = load_tile(p_k + o_block, o_n * stride_kv_row, o_d, m_n, m_d, EVEN_D, UPCAST)
        v = load_tile(p_v + o_block, o_n * stride_kv_row, o_d, m_n, m_d, EVEN_D, UPCAST)
        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for m in range(0, n_q * R, BLOCK_M):
            o_m = m + tl.arange(0, BLOCK_M)
            m_m = o_m < n_q * R
            o_row, o_head = split_queries(o_m, m, R)
            o_out = o_row * (G * R) + o_head
            first = ((start_q + m // R) * G + i_g) * R
            p_queries = p_q + (start_q + m // R) * stride_q_row + i_g * R * stride_q_head
            q = load_tile(p_queries, o_row * stride_q_row + o_head * stride_q_head, o_d, m_m, m_d, EVEN_D, UPCAST)
            do = load_tile(p_do + first * d, o_out * d, o_d, m_m, m_d, EVEN_D, UPCAST)
            top, log_total = load_lse(p_lse + first, o_out, m_m, tl.cast(rows_q, tl.int64) * G * R)
            delta = tl.load(p_delta + first + o_out, mask=m_m, other=0.0)
            p, ds = weights_and_grads(
                q, do, k, v, top, log_total, delta, m_m, m_n, p_seed, scale_log2, dropout_p, i_b * G + i_g, o_m, n,
                DROPOUT, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision="ieee")
            dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision="ieee")
        o_block = ((start_k + n) * G + i_g) * d
        store_tile(p_dv + o_block, o_n * (G * d), o_d, m_n, m_d, dv, EVEN_D)
        store_tile(p_dk + o_block, o_n * (G * d), o_d, m_n, m_d, dk * scale, EVEN_D)


def backward_tiled(
    q: Tensor,  # (Nq, H, d)
    k: Tensor,  # (Nk, G, d)
    v: Tensor,  # (Nk, G, d)
    out: Tensor,  # (Nq, H, d)
    grad: Tensor,  # (Nq, H, d)
    lse: Tensor,  # (2, Nq, H) float32
    dq: Tensor,  # (Nq, H, d), or no elements: not needed
    dk: Tensor,  # (Nk, G, d), or no elements
    dv: Tensor,  # (Nk, G, d), or no elements
    offsets: tuple[Tensor, Tensor, Tensor],  # cu_seqlens_q, cu_seqlens_k, seed
    rows: tuple[int, int, int],  # Nq, Nk, B
    numbers: tuple,  # G ... dropout_p, as the kernels take them
    flags: dict[str, bool],  # DROPOUT, UPCAST
    queries: int,  # at most so many to a key head of an utterance
    keys: int,  # and so many keys
) -> None:
    """Fills dq, dk and dv: two launches."""
    delta = torch.empty_like(lse[0])
    programs = offsets[0].numel() * k.shape[1]
    need_q, need_kv = dq.dim() == 3, dk.dim() == 3

    def for_queries(**blocks: int) -> None:
        tiles = triton.cdiv(queries, blocks["BLOCK_M"])
        _queries_kernel[(programs * tiles,)](
            q, k, v, out, grad, lse, delta, dq, *offsets, *rows, tiles, *numbers, NEED_Q=need_q, **flags, **blocks
        )

    def for_keys(**blocks: int) -> None:
        tiles = max(triton.cdiv(keys, blocks["BLOCK_N"]), 1)
        _keys_kernel[(programs * tiles,)](
            q, k, v, grad, lse, delta, dk, dv, *offsets, *rows, tiles, *numbers, **flags, **blocks
        )

    launch("queries", q, queries, for_queries)
    if need_kv:
        launch("keys", q, queries, for_keys)
