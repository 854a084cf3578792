"""ctc_loss in plain torch: gather the compact columns, alpha/beta in float64, write each gradient element in place.

Shape legend: T frames, B utterances, C classes, S longest target, K = S + 1 compact columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from soundwave_fast.ops.pure_torch.alpha_beta import alpha_beta

BLOCK_ELEMENTS = 1 << 20  # gradient elements worked on at a time: they stay in the cache between the passes over them


def ctc_loss_forward(
    log_probs_TBC: Tensor,
    columns_BK: Tensor,
    first_BK: Tensor,
    input_lengths_B: Tensor,
    target_lengths_B: Tensor,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """nll (B,) float64 and the residual exp(lp) - gamma of the compact columns; without need_grad that is (0, B, K).

    The residual is float32 (float64 for float64 input), equal in columns of equal class, 0 past an input length.
    Subtracting in float64, before rounding, keeps it accurate where a confident model makes the two cancel.
    """
    T, B, _ = log_probs_TBC.shape
    K = columns_BK.shape[1]
    dtype = torch.promote_types(log_probs_TBC.dtype, torch.float32)
    lp_TBK = log_probs_TBC.gather(2, columns_BK.expand(T, -1, -1)).double()
    nll_B, gamma_TBK = alpha_beta(lp_TBK, first_BK, input_lengths_B, target_lengths_B, need_grad)
    if not need_grad:
        return nll_B, log_probs_TBC.new_empty((0, B, K), dtype=dtype)
    residual_TBK = lp_TBK.exp_().sub_(gamma_TBK).gather(2, first_BK.expand(T, -1, -1))
    dead_TB = torch.arange(T, device=nll_B.device)[:, None] >= input_lengths_B
    return nll_B, residual_TBK.masked_fill_(dead_TB[..., None], 0.0).to(dtype)


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
    grad_TBC = torch.empty_like(log_probs_TBC)
    step = max(1, BLOCK_ELEMENTS // max(B * C, 1))
    for t in range(0, T, step):
        frames = slice(t, t + step)
        part = grad_TBC[frames]
        if log_probs_TBC.dtype.itemsize < 4:
            part.copy_(log_probs_TBC[frames].float().exp_().mul_(grad_B[:, None]))
        else:
            torch.exp(log_probs_TBC[frames], out=part).mul_(grad_B[:, None])
        index = columns_BK.expand(len(part), -1, -1)
        part.scatter_(2, index, (residual_TBK[frames] * grad_B[:, None]).to(part.dtype))
    for b, n in enumerate(frames_B.tolist()):
        if n < T:
            grad_TBC[n:, b] = 0.0
    return grad_TBC
