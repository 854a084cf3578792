"""ctc_loss: a drop-in for torch.nn.functional.ctc_loss with half inputs, a float64 recursion and no NaN.

Shape legend: T frames, B utterances, C classes, S longest target, K = S + 1 compact columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from soundwave_fast.ops.compact import (
    CompactTargets,
    Lengths,
    alpha_beta,
    check_reduction,
    compact_targets,
    reduce_loss,
)

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def ctc_loss(
    log_probs: Tensor,  # (T, B, C), or (T, C) for one utterance
    targets: Tensor,  # (B, S) padded, (sum of target_lengths,) concatenated, or (S,) with an unbatched log_probs
    input_lengths: Lengths,  # (B,) tensor, list or tuple
    target_lengths: Lengths,  # (B,)
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """Connectionist temporal classification loss (Graves 2006), with F.ctc_loss's arguments, values and reductions.

    log_probs is float32, float64, bfloat16 or float16; the recursion runs in float64 on the S + 1 columns it needs.
    The loss is float32 (float64 for float64 input): () for "mean" and "sum", (B,) for "none".

    The gradient is torch's: exp(log_probs) - occupancy, which is the derivative with respect to the logits behind
    a log_softmax. It is exactly 0 past an input length, whatever those frames hold, and in an utterance too short
    for its target, whose loss is inf (0 with zero_infinity).

    A loss below 0 by no more than log_probs' own rounding is returned as 0. Targets past target_lengths are never
    read (-100 is fine). An empty batch gives 0, or an empty "none".

    Raises ValueError for lengths out of range, labels outside [0, C) or equal to blank, or shapes that disagree;
    TypeError for a wrong dtype.
    """
    check_reduction(reduction)
    if log_probs.dtype not in _DTYPES:
        raise TypeError(f"log_probs must be float32, float64, bfloat16 or float16, got {log_probs.dtype}")
    if log_probs.dim() not in (2, 3):
        raise ValueError(f"log_probs must be (T, B, C) or (T, C), got {tuple(log_probs.shape)}")
    batched = log_probs.dim() == 3
    log_probs_TBC = log_probs if batched else log_probs.unsqueeze(1)
    T, B, C = log_probs_TBC.shape
    if not 0 <= blank < C:
        raise ValueError(f"blank must lie in [0, {C}), got {blank}")
    if not batched and targets.dim() == 1:
        targets = targets.unsqueeze(0)
    compact = compact_targets(targets, input_lengths, target_lengths, B, T, C, blank, log_probs.device)
    need_grad = torch.is_grad_enabled() and log_probs.requires_grad
    nll_B = _CTCLoss.apply(log_probs_TBC, compact, need_grad, zero_infinity)
    loss = reduce_loss(nll_B, compact.target_lengths_B, reduction)
    return loss if batched or reduction != "none" else loss.squeeze(0)


class _CTCLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, log_probs_TBC: Tensor, compact: CompactTargets, need_grad: bool, zero_infinity: bool) -> Tensor:
        T, _, C = log_probs_TBC.shape
        columns_TBK = compact.columns_BK.expand(T, -1, -1)
        lp_TBK = log_probs_TBC.detach().gather(2, columns_TBK).double()
        nll_B, gamma_TBK = alpha_beta(lp_TBK, compact, need_grad)
        infinite_B = nll_B == torch.inf
        # Rounding lets a frame's probabilities add up to 1 + eps * entropy, hence a loss of -T * eps * log C: dust.
        # Anything lower means that log_probs was not normalised, and gets the value torch would give.
        dust = (T + 1) * torch.finfo(log_probs_TBC.dtype).eps * (1.0 + math.log(C))
        nll_B = torch.where((nll_B < 0) & (nll_B > -dust), 0.0, nll_B)
        if zero_infinity:
            nll_B = nll_B.masked_fill(infinite_B, 0.0)
        if need_grad:
            ctx.save_for_backward(log_probs_TBC, gamma_TBK, infinite_B)
            ctx.compact = compact
        return nll_B.to(torch.float64 if log_probs_TBC.dtype == torch.float64 else torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_B: Tensor):
        log_probs_TBC, gamma_TBK, infinite_B = ctx.saved_tensors
        compact: CompactTargets = ctx.compact
        T = log_probs_TBC.shape[0]
        grad_B = grad_B.masked_fill(infinite_B, 0.0)
        columns_TBK = compact.columns_BK.expand(T, -1, -1)
        # A class that owns several columns must be written the same value by each of them.
        gamma_TBK = gamma_TBK.gather(2, compact.first_BK.expand(T, -1, -1))
        picked_TBK = log_probs_TBC.gather(2, columns_TBK).double().exp_().sub_(gamma_TBK).mul_(grad_B[:, None])
        grad_TBC = log_probs_TBC.exp().mul_(grad_B[:, None])
        grad_TBC.scatter_(2, columns_TBK, picked_TBK.to(grad_TBC.dtype))
        dead_TB = torch.arange(T, device=grad_B.device)[:, None] >= compact.input_lengths_B
        return grad_TBC.masked_fill_((dead_TB | infinite_B)[..., None], 0.0), None, None, None
