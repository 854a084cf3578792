"""Triton kernels of ctc_loss: pick the compact columns, and write the gradient in one pass over log_probs.

Shape legend: T frames, B utterances, C classes, S longest target, K = S + 1 compact columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton import tuning
from csrc_triton.alpha_beta import alpha_beta
from csrc_triton.launch import block

_TILE = 4096  # elements of log_probs a program holds at a time: 16 a thread, so that several loads are under way
_COMPACT_TILE = 1024


@triton.jit(do_not_specialize=["T", "B", "K", "stride_t", "stride_b"])
def _pick_kernel(
    p_lp,  # (T, B, C) floats with the strides given
    p_columns,  # (B, K) int64
    p_input_lengths,  # (B,) int64
    p_out,  # (T, B, K) float32, or float64 if p_lp is, written
    T,
    B,
    K,
    stride_t,
    stride_b,
    stride_c,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """log_probs in each utterance's compact columns, -inf past its input length, where nothing is read.

    Grid (T / BLOCK_T, B, K / BLOCK_K); no arithmetic beyond the cast.
    """
    i_b = tl.program_id(1).to(tl.int64)
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    o_k = tl.program_id(2).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < K
    o_c = tl.load(p_columns + i_b * K + o_k, mask=m_k, other=0)
    m_out = (o_t < T) & m_k[None, :]
    m_in = m_out & (o_t < tl.load(p_input_lengths + i_b))
    lp = tl.load(p_lp + o_t * stride_t + i_b * stride_b + o_c[None, :] * stride_c, mask=m_in, other=float("-inf"))
    p_out += (o_t * B + i_b) * K + o_k[None, :]
    tl.store(p_out, lp.to(p_out.dtype.element_ty), mask=m_out)


def ctc_loss_forward(
    log_probs_TBC: Tensor,
    columns_BK: Tensor,
    first_BK: Tensor,
    input_lengths_B: Tensor,
    target_lengths_B: Tensor,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """nll (B,) float64 and the residual exp(lp) - gamma of the compact columns; without need_grad that is (0, B, K).

    The residual is float32 (float64 for float64 input), 0 past an input length; columns that repeat an earlier one
    hold nothing of use.
    """
    T, B, _ = log_probs_TBC.shape
    K = columns_BK.shape[1]
    dtype = torch.promote_types(log_probs_TBC.dtype, torch.float32)
    lp_TBK = log_probs_TBC.new_empty((T, B, K), dtype=dtype)
    width = block(K, most=_COMPACT_TILE)
    tile = _COMPACT_TILE // width
    if T and B:
        _pick_kernel[(triton.cdiv(T, tile), B, triton.cdiv(K, width))](
            log_probs_TBC,
            columns_BK.contiguous(),
            input_lengths_B.contiguous(),
            lp_TBK,
            T,
            B,
            K,
            *log_probs_TBC.stride(),
            BLOCK_T=tile,
            BLOCK_K=width,
        )
    nll_B, gamma_TBK = alpha_beta(lp_TBK, first_BK, input_lengths_B, target_lengths_B, need_grad)
    return nll_B, lp_TBK.exp_().sub_(gamma_TBK) if need_grad else lp_TBK[:0]


@triton.jit(do_not_specialize=["T", "C", "stride_lp_t", "stride_lp_b", "stride_grad_t", "stride_grad_b"])
def _dense_kernel(
    p_grad_b,  # (B,) float32 or float64
    p_lp,  # (T, B, C) floats with the strides given
    p_frames,  # (B,) int64
    p_grad,  # (T, B, C) in p_lp's dtype with the strides given, written
    T,
    C,
    stride_lp_t,
    stride_lp_b,
    stride_lp_c,
    stride_grad_t,
    stride_grad_b,
    stride_grad_c,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """g_b exp(log_probs), 0 past an utterance's frames, where nothing is read. Grid (T / BLOCK_T, B).

    Computes in p_grad_b's dtype; every element has one writer.
    """
    i_b = tl.program_id(1).to(tl.int64)
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    m_t = o_t < tl.load(p_frames + i_b)
    g = tl.load(p_grad_b + i_b)
    p_lp += o_t * stride_lp_t + i_b * stride_lp_b
    p_grad += o_t * stride_grad_t + i_b * stride_grad_b
    for c in range(0, C, BLOCK_C):
        o_c = (c + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
        lp = tl.load(p_lp + o_c * stride_lp_c, mask=m_t & (o_c < C), other=float("-inf")).to(g.dtype)
        grad = tl.where(m_t, tl.exp(lp) * g, 0.0)
        tl.store(p_grad + o_c * stride_grad_c, grad.to(p_grad.dtype.element_ty), mask=(o_t < T) & (o_c < C))


@triton.jit(do_not_specialize=["B", "K", "stride_grad_t", "stride_grad_b"])
def _label_kernel(
    p_grad_b,  # (B,) float32 or float64
    p_residual,  # (T, B, K) float32 or float64
    p_columns,  # (B, K) int64
    p_first,  # (B, K) int64
    p_frames,  # (B,) int64
    p_grad,  # (T, B, C) floats with the strides given, written in the utterances' classes alone
    B,
    K,
    stride_grad_t,
    stride_grad_b,
    stride_grad_c,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """g_b residual over what _dense_kernel left in the utterances' classes. Grid (T / BLOCK_T, B, K / BLOCK_K).

    A launch of its own: threads of one would need a barrier that orders global stores, which not every GPU's does. Of
    columns of one class only the first stores, so every element has one writer.
    """
    i_b = tl.program_id(1).to(tl.int64)
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    o_k = tl.program_id(2).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < K
    m_k = m_k & (tl.load(p_first + i_b * K + o_k, mask=m_k, other=-1) == o_k)
    o_c = tl.load(p_columns + i_b * K + o_k, mask=m_k, other=0)
    mask = (o_t < tl.load(p_frames + i_b)) & m_k[None, :]
    residual = tl.load(p_residual + (o_t * B + i_b) * K + o_k[None, :], mask=mask, other=0.0)
    p_grad += o_t * stride_grad_t + i_b * stride_grad_b + o_c[None, :] * stride_grad_c
    grad = residual * tl.load(p_grad_b + i_b)
    tl.store(p_grad, grad.to(p_grad.dtype.element_ty), mask=mask)


def ctc_loss_backward(
    grad_B: Tensor,  # of each utterance's loss
    log_probs_TBC: Tensor,
    residual_TBK: Tensor,
    columns_BK: Tensor,
    first_BK: Tensor,
    frames_B: Tensor,  # frames that get a gradient; the others get 0 whatever they hold
) -> Tensor:
    """Gradient (T, B, C) in log_probs: g_b (exp(log_probs) - gamma), in log_probs' dtype and memory layout."""
    T, B, C = log_probs_TBC.shape
    K = columns_BK.shape[1]
    grad_TBC = torch.empty_like(log_probs_TBC)
    if T and B:
        grad_B, frames_B = grad_B.to(residual_TBK.dtype).contiguous(), frames_B.contiguous()
        arguments = (grad_B, log_probs_TBC, frames_B, grad_TBC, T, C, *log_probs_TBC.stride(), *grad_TBC.stride())
        wide = block(C, most=_TILE)
        default = {"BLOCK_T": min(_TILE // wide, 32), "BLOCK_C": wide, "num_warps": 8}

        def start(**sizes: int) -> None:
            _dense_kernel[(triton.cdiv(T, sizes["BLOCK_T"]), B)](*arguments, **sizes)

        tuning.launch("ctc_loss dense", f"bytes {log_probs_TBC.element_size()}, C {wide}", default, start)
        wide = block(K, most=_COMPACT_TILE)
        tile = _COMPACT_TILE // wide
        _label_kernel[(triton.cdiv(T, tile), B, triton.cdiv(K, wide))](
            grad_B,
            residual_TBK.contiguous(),
            columns_BK.contiguous(),
            first_BK.contiguous(),
            frames_B,
            grad_TBC,
            B,
            K,
            *grad_TBC.stride(),
            BLOCK_T=tile,
            BLOCK_K=wide,
        )
    return grad_TBC
