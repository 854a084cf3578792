"""Backward of varlen_cross_attention for few queries, the usual case, and the launcher of all its backward kernels.

One program per utterance and key head holds Q, dO and dQ, streams K and V once and writes each row of dK and dV once.

Shape legend in csrc_triton/varlen_cross_attention/__init__.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.launch import INTERPRETED
from csrc_triton.varlen_cross_attention.forward_kernel import LOG2_E, TINY, kernel_layout
from csrc_triton.varlen_cross_attention.sizes import launch
from csrc_triton.varlen_cross_attention.tiled_kernels import backward_tiled
from csrc_triton.varlen_cross_attention.tiles import (
    load_lse,
    load_tile,
    rows_of,
    score_scale,
    split_queries,
    store_tile,
    weights_and_grads,
)


@triton.jit(do_not_specialize=["rows_q", "rows_k", "B"])
def _stationary_kernel(
    p_q,  # (Nq, H, d)
    p_k,  # (Nk, G, d)
    p_v,  # (Nk, G, d), k's strides
    p_out,  # (Nq, H, d) contiguous
    p_do,  # (Nq, H, d) contiguous
    p_lse,  # (2, Nq, H) float32, as forward writes it
    p_dq,  # (Nq, H, d) contiguous, written if NEED_Q
    p_dk,  # (Nk, G, d) contiguous, written if NEED_KV
    p_dv,  # (Nk, G, d) contiguous, written if NEED_KV
    p_cu_seqlens_q,  # (B + 1,)
    p_cu_seqlens_k,  # (B + 1,)
    p_seed,  # (1,) int64, read if DROPOUT
    rows_q,  # Nq
    rows_k,  # Nk
    B,
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
    NEED_KV: tl.constexpr,
    DROPOUT: tl.constexpr,
    EVEN_D: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """All gradients of one utterance and key head, of at most BLOCK_M queries (rows * R); float32 sums.

    Grid ((B + 1) * G,): programs of rows that no utterance has come first and write zeros. An utterance without
    queries gets dK = dV = 0, one without keys dQ = 0. Masks: queries, keys, d.
    """
    i_b = B - tl.program_id(0) // G
    i_g = tl.program_id(0) % G
    start_q, n_q = rows_of(p_cu_seqlens_q, i_b, B, rows_q)
    start_k, n_k = rows_of(p_cu_seqlens_k, i_b, B, rows_k)
    scale = score_scale(scale, n_k)
    i_g = i_g.to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < d
    o_m = tl.arange(0, BLOCK_M)
    o_row, o_head = split_queries(o_m, 0, R)
    o_out = o_row * (G * R) + o_head
    o_n = tl.arange(0, BLOCK_N)
    if i_b == B:
        if NEED_Q:
            for m in range(0, n_q, BLOCK_M):
                for r in range(0, R):
                    p_row = p_dq + (((start_q + m) * G + i_g) * R + r) * d
                    store_tile(
                        p_row,
                        o_m * (G * R * d),
                        o_d,
                        o_m < n_q - m,
                        m_d,
                        tl.zeros((BLOCK_M, BLOCK_D), tl.float32),
                        EVEN_D,
                    )
        if NEED_KV:
            zeros = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            for n in range(0, n_k, BLOCK_N):
                first = ((start_k + n) * G + i_g) * d
                store_tile(p_dk + first, o_n * (G * d), o_d, o_n < n_k - n, m_d, zeros, EVEN_D)
                store_tile(p_dv + first, o_n * (G * d), o_d, o_n < n_k - n, m_d, zeros, EVEN_D)
    else:
        m_m = o_m < n_q * R
        first = (start_q * G + i_g) * R
        do = load_tile(p_do + first * d, o_out * d, o_d, m_m, m_d, EVEN_D, UPCAST)
        out = load_tile(p_out + first * d, o_out * d, o_d, m_m, m_d, EVEN_D, UPCAST)
        delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
        top, log_total = load_lse(p_lse + first, o_out, m_m, tl.cast(rows_q, tl.int64) * G * R)
        p_queries = p_q + start_q * stride_q_row + i_g * R * stride_q_head
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
            ds = ds.to(q.dtype)
            if NEED_KV:
                o_block = ((start_k + n) * G + i_g) * d
                dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision="ieee")
                store_tile(p_dv + o_block, o_n * (G * d), o_d, m_n, m_d, dv, EVEN_D)
                dk = tl.dot(tl.trans(ds), q, input_precision="ieee")
                store_tile(p_dk + o_block, o_n * (G * d), o_d, m_n, m_d, dk * scale, EVEN_D)
            if NEED_Q:
                dq = tl.dot(ds, k, dq, input_precision="ieee")
        if NEED_Q:
            store_tile(p_dq + first * d, o_out * d, o_d, m_m, m_d, dq * scale, EVEN_D)


def backward(
    grad: Tensor,  # (Nq, H, d)
    q: Tensor,  # (Nq, H, d)
    k: Tensor,  # (Nk, G, d)
    v: Tensor,  # (Nk, G, d)
    out: Tensor,  # (Nq, H, d), forward's
    lse: Tensor,  # (2, Nq, H) float32, forward's
    cu_seqlens_q: Tensor,  # (B + 1,)
    cu_seqlens_k: Tensor,  # (B + 1,)
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,  # (1,) int64, forward's
    need_q: bool,
    need_kv: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; what is not needed comes back with no elements."""
    H, d = q.shape[1:]
    G = k.shape[1]
    q, k, v = kernel_layout(-q if scale < 0 else q, k, v)
    grad = grad.contiguous()
    dq = torch.empty(q.shape if need_q else (0,), dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(k.shape if need_kv else (0,), dtype=k.dtype, device=k.device) for _ in range(2))
    queries = max_seqlen_q * (H // G)
    offsets = (cu_seqlens_q, cu_seqlens_k, cu_seqlens_q if seed is None else seed)
    rows = (q.shape[0], k.shape[0], cu_seqlens_q.numel() - 1)
    numbers = (
        G,
        H // G,
        d,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        abs(scale),
        max(abs(scale) * LOG2_E, TINY),
        dropout_p,
    )
    flags = {"DROPOUT": seed is not None, "UPCAST": INTERPRETED}
    tensors = (q, k, v, out, grad, lse, dq, dk, dv)

    def start(**blocks: int) -> None:
        if queries > blocks["BLOCK_M"]:
            backward_tiled(*tensors, offsets, rows, numbers, flags, queries, max_seqlen_k)
            return
        _stationary_kernel[(cu_seqlens_q.numel() * G,)](
            *tensors, *offsets, *rows, *numbers, NEED_Q=need_q, NEED_KV=need_kv, **flags, **blocks
        )

    launch("stationary", q, queries, start)
    return -dq if scale < 0 else dq, dk, dv
