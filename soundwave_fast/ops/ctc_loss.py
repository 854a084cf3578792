"""ctc_loss: a drop-in for torch.nn.functional.ctc_loss: half inputs, deterministic, compilable, accurate, never NaN.

Shape legend: T frames, B utterances, C classes, S longest target, K = S + 1 compact columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from soundwave_fast.ops.backend import implementation, refuse_dtensor
from soundwave_fast.ops.compact import Lengths, check_reduction, compact_targets, mean_weights

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

    log_probs is float32, float64, bfloat16 or float16. The recursion reads the S + 1 columns it needs: on a CPU in
    float64, on a GPU in float32 (float64 for float64 input) re-centred so that its error does not grow with T. The
    loss is float32 (float64 for float64 input): () for "mean" and "sum", (B,) for "none".

    The gradient is torch's: exp(log_probs) - occupancy, which is the derivative with respect to the logits behind
    a log_softmax. It is exactly 0 past an input length, whatever those frames hold, and in an utterance too short
    for its target, whose loss is inf (0 with zero_infinity). Both are the same bit for bit from run to run. There is
    no second derivative.

    A loss below 0 by no more than log_probs' own rounding is returned as 0. Targets past target_lengths are never
    read (-100 is fine). An empty batch gives 0, or an empty "none".

    Raises ValueError for lengths out of range, labels outside [0, C) or equal to blank, or shapes that disagree;
    TypeError for a wrong dtype. On an accelerator, lengths and labels that live there are not looked at from the host:
    an utterance for which they are out of range gets a loss of NaN and a gradient of 0 (all utterances, if
    concatenated targets do not hold as many labels as target_lengths add up to).
    """
    refuse_dtensor("ctc_loss", log_probs=log_probs, targets=targets)
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
    loss, *_ = torch.ops.soundwave_fast.ctc_loss_forward(
        log_probs_TBC,
        compact.columns_BK,
        compact.first_BK,
        compact.input_lengths_B,
        compact.target_lengths_B,
        reduction,
        zero_infinity,
        torch.is_grad_enabled() and log_probs.requires_grad,
    )
    return loss if batched or reduction != "none" else loss.squeeze(0)


@torch.library.custom_op("soundwave_fast::ctc_loss_forward", mutates_args=())
def _forward_op(
    log_probs: Tensor,
    columns: Tensor,
    first: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    reduction: str,
    zero_infinity: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and for backward: the residual exp(lp) - gamma (T, B, K), the weight of each utterance's loss in the
    reduced one (B,), and how many frames of each utterance get a gradient (B,).
    """
    nll_B, residual_TBK = implementation("ctc_loss", log_probs).ctc_loss_forward(
        log_probs, columns, first, input_lengths, target_lengths, need_grad
    )
    infinite_B = nll_B == torch.inf
    # Rounding lets a frame's probabilities add up to 1 + eps * entropy, hence a loss of -T * eps * log C: dust.
    # Anything lower means that log_probs was not normalised, and gets the value torch would give.
    T, _, C = log_probs.shape
    dust = (T + 1) * torch.finfo(log_probs.dtype).eps * (1.0 + math.log(C))
    nll_B = torch.where((nll_B < 0) & (nll_B > -dust), 0.0, nll_B)
    if zero_infinity:
        nll_B = nll_B.masked_fill(infinite_B, 0.0)
    weight_B = mean_weights(target_lengths, nll_B.dtype) if reduction == "mean" else torch.ones_like(nll_B)
    loss = nll_B if reduction == "none" else (nll_B * weight_B).sum()
    dtype = _loss_dtype(log_probs)
    return loss.to(dtype, copy=True), residual_TBK, weight_B.to(dtype), input_lengths.masked_fill(infinite_B, 0)


def _loss_dtype(log_probs: Tensor) -> torch.dtype:
    return torch.promote_types(log_probs.dtype, torch.float32)


@_forward_op.register_fake
def _(log_probs, columns, first, input_lengths, target_lengths, reduction, zero_infinity, need_grad):
    T, B, _ = log_probs.shape
    dtype = _loss_dtype(log_probs)
    return (
        log_probs.new_empty((B,) if reduction == "none" else (), dtype=dtype),
        log_probs.new_empty((T if need_grad else 0, B, columns.shape[1]), dtype=dtype),
        log_probs.new_empty((B,), dtype=dtype),
        torch.empty_like(input_lengths),
    )


@torch.library.custom_op("soundwave_fast::ctc_loss_backward", mutates_args=())
def _backward_op(
    grad: Tensor,  # of the loss, () or (B,)
    log_probs: Tensor,
    columns: Tensor,
    first: Tensor,
    residual: Tensor,
    weight: Tensor,
    frames: Tensor,
) -> Tensor:
    return implementation("ctc_loss", log_probs).ctc_loss_backward(
        grad * weight, log_probs, residual, columns, first, frames
    )


@_backward_op.register_fake
def _(grad, log_probs, columns, first, residual, weight, frames):
    return torch.empty_like(log_probs)


def _save(ctx, inputs, output) -> None:
    log_probs, columns, first, *_, need_grad = inputs
    if need_grad:
        ctx.save_for_backward(log_probs, columns, first, *output[1:])


def _backward(ctx, grad: Tensor, *_):
    grad_TBC = torch.ops.soundwave_fast.ctc_loss_backward(grad, *ctx.saved_tensors)
    return grad_TBC, None, None, None, None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_save)
