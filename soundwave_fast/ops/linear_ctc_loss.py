"""linear_ctc_loss: CTC on softmax(hidden @ weight.T) that never holds the (B, T, V) logits.

Shape legend: B utterances, T frames, D width, V vocabulary, S longest target.
"""

from __future__ import annotations

import torch
from torch import Tensor

from soundwave_fast.ops.backend import implementation, refuse_dtensor
from soundwave_fast.ops.compact import (
    Lengths,
    check_reduction,
    compact_targets,
    lengths_tensor,
    mean_weights,
    reduce_loss,
)
from soundwave_fast.ops.linear_ctc_parts import Frames, Head, checked_head
from soundwave_fast.ops.linear_ctc_passes import frozen_pass, trained_pass


def linear_ctc_loss(
    hidden: Tensor,  # (B, T, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (B, S) padded, or (sum of target_lengths,) concatenated
    input_lengths: Lengths,  # (B,) tensor, list or tuple
    target_lengths: Lengths,  # (B,)
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
    return_argmax: bool = False,
    *,
    blank_row: Tensor | None = None,  # (D,)
    utterance_weights: Tensor | None = None,  # (B,) floating point
) -> Tensor | tuple[Tensor, Tensor]:
    """`ctc_loss(log_softmax(hidden @ weight.T))` in chunks, as one op (Soundwave, stage 1's loss, section 2.2).

    hidden and weight share one of float32, float64, bfloat16, float16; under torch.autocast both are cast to its
    dtype. GEMMs run in that dtype, the softmax in float32 or better, alpha/beta in float32 with float64 offsets or
    in float64.

    With blank_row the blank is class V, scored by that row: `weight` may be a frozen LLM embedding and is neither
    copied nor given a gradient, while blank_row trains. blank must then be V.

    utterance_weights multiply each utterance's loss before the reduction (0 takes out an infinite one, too, but not the
    gradients of frames that are NaN); they get no gradient.

    A weight that needs no gradient costs two GEMMs forward and backward together (one without any gradient); a
    trainable weight three, or four with reduction="none", whose per-utterance gradients are known only in backward:
    utterance_weights with "sum" say the same in three. Three keep the weight's gradient from forward to backward.

    Returns the loss, float32 (float64 for float64 input), () or (B,) for "none"; with return_argmax also the best
    class of every frame, (B, T) int64, the lowest among equals and `blank` past the input length.

    What stands in frames past an input length has no influence, and their gradient is exactly 0; input_lengths on
    the host (a list, a CPU tensor) also save the work on them. A target that does not fit its input gives inf (0 with
    zero_infinity) and no gradient. Targets past target_lengths are never read. Nothing waits for an accelerator.

    Raises ValueError for shapes that disagree, lengths out of range, labels outside [0, V) or equal to blank and
    utterance_weights that require a gradient; TypeError for dtypes, and for a DTensor. On an accelerator values are not
    looked at: a wrong length or label makes the loss of its utterance NaN, and its gradient 0.
    """
    refuse_dtensor(
        "linear_ctc_loss", hidden=hidden, weight=weight, blank_row=blank_row, utterance_weights=utterance_weights
    )
    check_reduction(reduction)
    hidden, blank_row = checked_head(hidden, weight, blank_row, blank)
    _check_weights(utterance_weights, hidden)
    grad = torch.is_grad_enabled()
    need_hidden = grad and hidden.requires_grad
    need_blank = grad and blank_row is not None and blank_row.requires_grad
    lengths = [lengths_tensor(x) for x in (input_lengths, target_lengths)]
    arguments = (hidden, weight, blank_row, targets, *lengths, blank)
    if grad and weight.requires_grad and reduction != "none":
        mean = reduction == "mean"
        loss, argmax, *_ = _reduced(*arguments, utterance_weights, need_hidden, return_argmax, mean, zero_infinity)
    else:
        # Gradients per utterance of a trainable weight would be B weights: backward makes them once it knows the sum.
        deferred = grad and weight.requires_grad
        nll_B, argmax, *_ = _nll(*arguments, need_hidden and not deferred, need_blank and not deferred, return_argmax)
        if zero_infinity:
            nll_B = nll_B.masked_fill(nll_B == torch.inf, 0.0)
        nll_B = _weighted(nll_B, utterance_weights)
        loss = reduce_loss(nll_B, lengths[1].reshape(-1).to(hidden.device, non_blocking=True), reduction)
    return (loss, argmax) if return_argmax else loss


def _check_weights(weights: Tensor | None, hidden: Tensor) -> None:
    if weights is None:
        return
    if weights.shape != hidden.shape[:1] or weights.device != hidden.device:
        raise ValueError(
            f"utterance_weights must be ({hidden.shape[0]},) on {hidden.device}, got {tuple(weights.shape)} on "
            f"{weights.device}"
        )
    if not weights.is_floating_point():
        raise TypeError(f"utterance_weights must be floating point, got {weights.dtype}")
    if weights.requires_grad and torch.is_grad_enabled():
        raise ValueError("utterance_weights must not require a gradient: none is computed")


def _weighted(nll_B: Tensor, weights: Tensor | None) -> Tensor:
    """Each loss times its weight; 0 times anything is 0."""
    return nll_B if weights is None else torch.where(weights == 0, 0.0, nll_B * weights.to(nll_B.dtype))


# Custom ops return a tensor of no elements in the place of what was not asked for.


def _frames(
    hidden: Tensor,
    weight: Tensor,
    blank_row: Tensor | None,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
) -> tuple[Frames, Head]:
    B, T, _ = hidden.shape
    compact = compact_targets(targets, input_lengths, target_lengths, B, T, weight.shape[0], blank, hidden.device)
    head = Head(weight.detach(), None if blank_row is None else blank_row.detach(), blank)
    return Frames.of(hidden, compact, input_lengths), head


def _loss_dtype(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Gradients wait for backward's factor in their own dtype; those of float16 not, as they may be below its range."""
    return torch.float32 if dtype == torch.float16 else dtype


def _outputs(frames: Frames, blank: int, argmax_N: Tensor | None, dx_ND: Tensor | None, dtype: torch.dtype):
    """argmax (B, T) and d/dhidden (B, T, D) from those of the rows."""
    argmax_BT = dx_BTD = None
    if argmax_N is not None:
        argmax_N = argmax_N if frames.valid_N is None else argmax_N.masked_fill_(~frames.valid_N, blank)
        argmax_BT = frames.put_back(argmax_N, blank)
    if dx_ND is not None:
        dx_BTD = frames.put_back(dx_ND.to(_kept_dtype(dtype)), 0.0)
    return (
        frames.x_ND.new_empty(0, dtype=torch.int64) if argmax_BT is None else argmax_BT,
        frames.x_ND.new_empty(0, dtype=_kept_dtype(dtype)) if dx_BTD is None else dx_BTD,
    )


@torch.library.custom_op("soundwave_fast::linear_ctc_nll", mutates_args=())
def _nll(
    hidden: Tensor,
    weight: Tensor,
    blank_row: Tensor | None,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    need_hidden: bool,
    need_blank: bool,
    need_argmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll (B,), argmax (B, T), and d nll_b / d hidden_b (B, T, D), d nll_b / d blank_row (B, D)."""
    with torch.autocast(hidden.device.type, enabled=False):
        frames, head = _frames(hidden, weight, blank_row, targets, input_lengths, target_lengths, blank)
        nll_B, argmax_N, dx_ND, dblank_BD = frozen_pass(frames, head, need_hidden, need_blank, need_argmax)
        argmax, dx = _outputs(frames, blank, argmax_N, dx_ND, hidden.dtype)
    dtype = _loss_dtype(hidden)
    return nll_B.to(dtype), argmax, dx, hidden.new_empty(0, dtype=dtype) if dblank_BD is None else dblank_BD


@_nll.register_fake
def _(hidden, weight, blank_row, targets, input_lengths, target_lengths, blank, need_hidden, need_blank, need_argmax):
    B, T, D = hidden.shape
    dtype = _loss_dtype(hidden)
    return (
        hidden.new_empty(B, dtype=dtype),
        hidden.new_empty((B, T) if need_argmax else 0, dtype=torch.int64),
        hidden.new_empty((B, T, D) if need_hidden else 0, dtype=_kept_dtype(hidden.dtype)),
        hidden.new_empty((B, D) if need_blank else 0, dtype=dtype),
    )


@torch.library.custom_op("soundwave_fast::linear_ctc_nll_backward", mutates_args=())
def _nll_backward(
    grad_B: Tensor,
    nll_B: Tensor,
    dx_BTD: Tensor,
    dblank_BD: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and blank_row in `dtype`; an utterance whose loss is not finite adds nothing."""
    grad_B = grad_B.masked_fill(~nll_B.isfinite(), 0.0)
    scale_rows = implementation("linear_ctc_loss", dx_BTD).scale_rows
    grad_hidden, grad_blank = dx_BTD.new_empty(0, dtype=dtype), dx_BTD.new_empty(0, dtype=dtype)
    if dx_BTD.dim() == 3:
        grad_hidden = scale_rows(dx_BTD.flatten(1), grad_B, None, dtype).view(dx_BTD.shape)
    if dblank_BD.dim() == 2:
        grad_blank = scale_rows(dblank_BD, grad_B, None, dblank_BD.dtype).sum(0).to(dtype)
    return grad_hidden, grad_blank


@_nll_backward.register_fake
def _(grad_B, nll_B, dx_BTD, dblank_BD, dtype):
    return torch.empty_like(dx_BTD, dtype=dtype), dblank_BD.new_empty(dblank_BD.shape[1:] or 0, dtype=dtype)


@torch.library.custom_op("soundwave_fast::linear_ctc_nll_gradients", mutates_args=())
def _nll_gradients(
    grad_B: Tensor,
    hidden: Tensor,
    weight: Tensor,
    blank_row: Tensor | None,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    need_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum_b grad_b nll_b: of hidden (B, T, D), weight (V, D) and blank_row (D,), in their dtypes."""
    with torch.autocast(hidden.device.type, enabled=False):
        frames, head = _frames(hidden, weight, blank_row, targets, input_lengths, target_lengths, blank)
        _, _, dx_ND, dw_VD, dblank_D = trained_pass(frames, head, grad_B, need_hidden, False)
        _, dx = _outputs(frames, blank, None, dx_ND, hidden.dtype)
    grad_blank = hidden.new_empty(0) if blank_row is None else dblank_D.to(hidden.dtype)
    return dx.to(hidden.dtype), dw_VD.to(weight.dtype), grad_blank


@_nll_gradients.register_fake
def _(grad_B, hidden, weight, blank_row, targets, input_lengths, target_lengths, blank, need_hidden):
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape),
        hidden.new_empty(0 if blank_row is None else hidden.shape[2]),
    )


@torch.library.custom_op("soundwave_fast::linear_ctc_reduced", mutates_args=())
def _reduced(
    hidden: Tensor,
    weight: Tensor,
    blank_row: Tensor | None,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    weights: Tensor | None,
    need_hidden: bool,
    need_argmax: bool,
    mean: bool,
    zero_infinity: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss (), argmax (B, T), and the loss's gradients of hidden (B, T, D), weight (V, D) and blank_row (D,)."""
    with torch.autocast(hidden.device.type, enabled=False):
        frames, head = _frames(hidden, weight, blank_row, targets, input_lengths, target_lengths, blank)
        scale_B = mean_weights(frames.compact.target_lengths_B, torch.float64)
        scale_B = scale_B if mean else torch.ones_like(scale_B)
        scale_B = scale_B if weights is None else scale_B * weights
        nll_B, argmax_N, dx_ND, dw_VD, dblank_D = trained_pass(frames, head, scale_B, need_hidden, need_argmax)
        argmax, dx = _outputs(frames, blank, argmax_N, dx_ND, hidden.dtype)
    if zero_infinity:
        nll_B = nll_B.masked_fill(nll_B == torch.inf, 0.0)
    loss = _weighted(nll_B, scale_B).sum().to(_loss_dtype(hidden))
    dblank = hidden.new_empty(0, dtype=loss.dtype) if blank_row is None else dblank_D
    return loss, argmax, dx, dw_VD.to(_kept_dtype(weight.dtype)), dblank


@_reduced.register_fake
def _(
    hidden, weight, blank_row, targets, input_lengths, target_lengths, blank, weights, need_hidden, need_argmax, mean,
    zero_infinity,
):  # fmt: skip
    B, T, D = hidden.shape
    dtype = _loss_dtype(hidden)
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty((B, T) if need_argmax else 0, dtype=torch.int64),
        hidden.new_empty((B, T, D) if need_hidden else 0, dtype=_kept_dtype(hidden.dtype)),
        weight.new_empty(weight.shape, dtype=_kept_dtype(weight.dtype)),
        hidden.new_empty(0 if blank_row is None else D, dtype=dtype),
    )


@torch.library.custom_op("soundwave_fast::linear_ctc_reduced_backward", mutates_args=())
def _reduced_backward(
    grad: Tensor,
    dx_BTD: Tensor,
    dw_VD: Tensor,
    dblank_D: Tensor,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients made in forward, times the loss's own."""
    scale_rows = implementation("linear_ctc_loss", dw_VD).scale_rows
    grads = []
    for x, to in ((dx_BTD, dtype), (dw_VD, weight_dtype), (dblank_D, dtype)):
        grads.append(scale_rows(x.view(1, -1), grad.view(1), None, to).view(x.shape))
    return grads[0], grads[1], grads[2]


@_reduced_backward.register_fake
def _(grad, dx_BTD, dw_VD, dblank_D, dtype, weight_dtype):
    return (
        torch.empty_like(dx_BTD, dtype=dtype),
        torch.empty_like(dw_VD, dtype=weight_dtype),
        torch.empty_like(dblank_D, dtype=dtype),
    )


def _nll_setup(ctx, inputs, output) -> None:
    nll_B, argmax, dx_BTD, dblank_BD = output
    ctx.mark_non_differentiable(argmax, dx_BTD, dblank_BD)
    ctx.set_materialize_grads(False)
    ctx.deferred, ctx.dtype, ctx.blank = inputs[1].requires_grad, inputs[0].dtype, inputs[6]
    ctx.save_for_backward(*(inputs[:6] if ctx.deferred else (nll_B, dx_BTD, dblank_BD)))


def _nll_grads(ctx, grad_B, *_):
    grads = [None] * 10
    if grad_B is None:
        return tuple(grads)
    hidden, _, blank = ctx.needs_input_grad[:3]
    if ctx.deferred:
        grads[0], grads[1], grads[2] = _nll_gradients(grad_B, *ctx.saved_tensors, ctx.blank, hidden)
    else:
        grads[0], grads[2] = _nll_backward(grad_B, *ctx.saved_tensors, ctx.dtype)
    return tuple(grad if need else None for grad, need in zip(grads, (*ctx.needs_input_grad[:3], *[False] * 7)))


def _reduced_setup(ctx, inputs, output) -> None:
    loss, argmax, *gradients = output
    ctx.mark_non_differentiable(argmax, *gradients)
    ctx.set_materialize_grads(False)
    ctx.dtypes = (inputs[0].dtype, inputs[1].dtype)
    ctx.save_for_backward(*gradients)


def _reduced_grads(ctx, grad, *_):
    if grad is None:
        return (None,) * 12
    grads = _reduced_backward(grad, *ctx.saved_tensors, *ctx.dtypes)
    return *(x if need else None for x, need in zip(grads, ctx.needs_input_grad[:3])), *[None] * 9


_nll.register_autograd(_nll_grads, setup_context=_nll_setup)
_reduced.register_autograd(_reduced_grads, setup_context=_reduced_setup)
