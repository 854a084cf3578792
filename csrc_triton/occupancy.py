"""Triton kernels that turn CTC's forward and backward states into occupancies, all frames in parallel.

Shape legend: T frames, B utterances, S longest target, K = S + 1 compact columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.launch import block

_TILE = 1024  # states of either kind that a program holds


@triton.jit(do_not_specialize=["K"])
def _chain_kernel(
    p_first,  # (B, K) int64
    p_target_lengths,  # (B,) int64
    p_next,  # (B, K) int32, written
    K,
    BLOCK_K: tl.constexpr,
):
    """The next column of the same class within the target, 0 behind the last. Grid (B, K / BLOCK_K)."""
    i_b = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    p_first += i_b * K
    own = tl.load(p_first + o_k, mask=o_k < K, other=-1)
    after = tl.zeros((BLOCK_K,), tl.int32)
    k = tl.minimum(tl.load(p_target_lengths + i_b), K - 1).to(tl.int32)
    while k > 0:
        after = tl.where((own == tl.load(p_first + k)) & (o_k < k) & (o_k > 0), k, after)
        k -= 1
    tl.store(p_next + i_b * K + o_k, after, mask=o_k < K)


@triton.jit
def _joint(p_forward, p_backward, o_k, mask):
    """Log of the probability, up to the frame's constant, of passing through each state."""
    forward = tl.load(p_forward + o_k, mask=mask, other=float("-inf"))
    return forward + tl.load(p_backward + o_k, mask=mask, other=float("-inf"))


@triton.jit(do_not_specialize=["T", "B", "K"])
def _occupancy_kernel(
    p_states,  # (2, B, T, 2, K), float32 or float64
    p_nll,  # (B,) float64
    p_first,  # (B, K) int64
    p_next,  # (B, K) int32
    p_input_lengths,  # (B,) int64
    p_target_lengths,  # (B,) int64
    p_gamma,  # (T, B, K) floats, written
    T,
    B,
    K,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """gamma of BLOCK_T frames of one utterance, grid (T / BLOCK_T, B): softmax over a frame's states, summed by class.

    Accumulates in p_states' dtype. A label that occurs again collects its states by walking the chain of columns in
    p_next, so each element has one writer and one order of summation. Frames past the input length and utterances
    without a finite alignment read no states and get 0.
    """
    i_b = tl.program_id(1).to(tl.int64)
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    frames = tl.load(p_input_lengths + i_b)
    labels = tl.load(p_target_lengths + i_b)
    valid = (frames >= 0) & (frames <= T) & (labels >= 0) & (labels < K)
    labels = tl.where(valid, labels, 0)
    frames = tl.where(valid & (tl.load(p_nll + i_b) != float("inf")), frames, 0)
    m_t = o_t < frames
    p_forward = p_states + ((i_b * T + o_t) * 2 * K)[:, None]
    p_backward = p_forward + B.to(tl.int64) * T * 2 * K

    LOG: tl.constexpr = p_states.dtype.element_ty
    top = tl.full((BLOCK_T,), float("-inf"), LOG)
    total = tl.zeros((BLOCK_T,), LOG)
    total_blank = tl.zeros((BLOCK_T,), LOG)
    k = tl.zeros((), tl.int64)
    while k <= labels:
        o_k = (k + tl.arange(0, BLOCK_K))[None, :]
        blank = _joint(p_forward, p_backward, o_k, m_t[:, None] & (o_k <= labels))
        label = _joint(p_forward + K, p_backward + K, o_k, m_t[:, None] & (o_k < labels))
        higher = tl.maximum(top, tl.maximum(tl.max(blank, 1), tl.max(label, 1)))
        origin = tl.where(higher == float("-inf"), 0.0, higher)
        scale = tl.exp(top - origin)
        sum_blank = tl.sum(tl.exp(blank - origin[:, None]), 1)
        total_blank = total_blank * scale + sum_blank
        total = total * scale + (sum_blank + tl.sum(tl.exp(label - origin[:, None]), 1))
        top = higher
        k += BLOCK_K
    origin = tl.where(top == float("-inf"), 0.0, top)[:, None]
    total = tl.where(m_t, total, 1.0)[:, None]

    k = tl.zeros((), tl.int64)
    while k < K:
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        owner = m_k & (o_k > 0) & (o_k <= labels)
        owner = owner & (tl.load(p_first + i_b * K + o_k, mask=owner, other=-1) == o_k)
        o_from = o_k - 1  # the label of column k is label k - 1
        m_from = owner
        gamma = tl.zeros((BLOCK_T, BLOCK_K), LOG)
        while tl.max(m_from.to(tl.int32), 0) > 0:
            joint = _joint(p_forward + K, p_backward + K, o_from[None, :], m_t[:, None] & m_from[None, :])
            gamma += tl.exp(joint - origin)
            o_from = tl.load(p_next + i_b * K + o_from + 1, mask=m_from, other=0).to(tl.int64) - 1
            m_from = m_from & (o_from >= 0)
        gamma = tl.where(o_k[None, :] == 0, total_blank[:, None], gamma) / total
        p_out = p_gamma + ((o_t * B + i_b) * K)[:, None] + o_k[None, :]
        tl.store(p_out, gamma, mask=(o_t < T)[:, None] & m_k[None, :])
        k += BLOCK_K


def occupancy(
    states: Tensor,  # (2, B, T, 2, K): forward, backward by blank, label
    nll_B: Tensor,
    first_BK: Tensor,
    input_lengths_B: Tensor,
    target_lengths_B: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """gamma (T, B, K) in dtype from the states of the two recursions; see csrc_triton.alpha_beta."""
    _, B, T, _, K = states.shape
    gamma_TBK = states.new_empty((T, B, K), dtype=dtype)
    if T and B:
        width = block(K, most=_TILE)
        after_BK = torch.empty_like(first_BK, dtype=torch.int32)
        _chain_kernel[(B, triton.cdiv(K, width))](first_BK, target_lengths_B, after_BK, K, BLOCK_K=width)
        tile = min(_TILE // width, 16)
        _occupancy_kernel[(triton.cdiv(T, tile), B)](
            states,
            nll_B,
            first_BK,
            after_BK,
            input_lengths_B,
            target_lengths_B,
            gamma_TBK,
            T,
            B,
            K,
            BLOCK_T=tile,
            BLOCK_K=width,
        )
    return gamma_TBK
