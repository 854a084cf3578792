"""linear_ctc_loss: CTC on softmax(hidden @ weight.T) that never holds the (B, T, V) logits.

Shape legend: B utterances, T frames, D width, V vocabulary, S longest target, N valid frames of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from soundwave_fast.ops.compact import (
    CompactTargets,
    Lengths,
    check_reduction,
    compact_targets,
    mean_weights,
    reduce_loss,
)
from soundwave_fast.ops.linear_ctc_parts import Frames, Head
from soundwave_fast.ops.linear_ctc_passes import add_compact_rows, utterance_pass, vocabulary_pass

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
) -> Tensor | tuple[Tensor, Tensor]:
    """`ctc_loss(log_softmax(hidden @ weight.T))` in chunks, as one op (Soundwave, stage 1's loss, section 2.2).

    hidden and weight share one of float32, float64, bfloat16, float16; under torch.autocast both are cast to its
    dtype. GEMMs run in that dtype, the softmax in float32 or better, alpha/beta in float64.

    With blank_row the blank is class V, scored by that row: `weight` may be a frozen LLM embedding and is neither
    copied nor given a gradient, while blank_row trains. blank must then be V.

    A weight that needs no gradient costs two GEMMs forward and backward together (one without any gradient); a
    trainable weight three, or four with reduction="none", whose per-utterance gradients are known only in backward.

    Returns the loss, float32 (float64 for float64 input), () or (B,) for "none"; with return_argmax also the best
    class of every frame, (B, T) int64, the lowest among equals and `blank` past the input length.

    Frames past an input length are never read and get a gradient of exactly 0. A target that does not fit its
    input gives inf (0 with zero_infinity) and no gradient. Targets past target_lengths are never read.

    Raises ValueError for shapes that disagree, lengths out of range and labels outside [0, V) or equal to blank;
    TypeError for dtypes.
    """
    check_reduction(reduction)
    _check_tensors(hidden, weight, blank_row)
    B, T, _ = hidden.shape
    V = weight.shape[0]
    if blank_row is not None and blank != V:
        raise ValueError(f"blank must be {V}, the class behind weight's rows, when blank_row is given; got {blank}")
    if blank_row is None and not 0 <= blank < V:
        raise ValueError(f"blank must lie in [0, {V}), got {blank}")
    device = hidden.device
    if torch.is_autocast_enabled(device.type):
        hidden = hidden.to(torch.get_autocast_dtype(device.type))
    elif hidden.dtype != weight.dtype:
        raise TypeError(
            f"hidden is {hidden.dtype} and weight is {weight.dtype}: cast one of them, or call under torch.autocast"
        )
    if blank_row is not None:
        blank_row = blank_row.to(hidden.dtype)  # one row: a trainable float32 blank beside a bf16 embedding is fine
    compact = compact_targets(targets, input_lengths, target_lengths, B, T, V, blank, device)
    grad = torch.is_grad_enabled()
    if grad and weight.requires_grad:
        scale_B = None
        if reduction != "none":
            scale_B = mean_weights(compact.target_lengths_B, torch.float64)
            scale_B = scale_B if reduction == "mean" else torch.ones_like(scale_B)
        loss, argmax = _TrainableHead.apply(
            hidden, weight, blank_row, compact, scale_B, zero_infinity, return_argmax, blank
        )
    else:
        needs = (grad and hidden.requires_grad, grad and blank_row is not None and blank_row.requires_grad)
        nll_B, argmax = _FrozenHead.apply(
            hidden, weight, blank_row, compact, needs, zero_infinity, return_argmax, blank
        )
        loss = reduce_loss(nll_B, compact.target_lengths_B, reduction)
    return (loss, argmax) if return_argmax else loss


def _check_tensors(hidden: Tensor, weight: Tensor, blank_row: Tensor | None) -> None:
    for name, x in (("hidden", hidden), ("weight", weight), ("blank_row", blank_row)):
        if x is None:
            continue
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
        if x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device}, hidden on {hidden.device}")
    if hidden.dim() != 3:
        raise ValueError(f"hidden must be (B, T, D), got {tuple(hidden.shape)}")
    D = hidden.shape[2]
    if weight.dim() != 2 or weight.shape[1] != D or weight.shape[0] == 0:
        raise ValueError(f"weight must be (V, {D}) with V > 0, got {tuple(weight.shape)}")
    if blank_row is not None and blank_row.shape != (D,):
        raise ValueError(f"blank_row must be ({D},), got {tuple(blank_row.shape)}")


class _ValidFrames:
    """The rows of hidden (B, T, D) within the input lengths, and the way back."""

    def __init__(self, hidden: Tensor, compact: CompactTargets):
        self.shape = hidden.shape
        B, T, D = hidden.shape
        lengths = compact.input_lengths_B.tolist()
        starts = [0]
        for n in lengths:
            starts.append(starts[-1] + n)
        x_ND, self.index_N = hidden.detach().reshape(B * T, D), None
        if starts[-1] != B * T:
            valid_BT = torch.arange(T, device=hidden.device) < compact.input_lengths_B[:, None]
            self.index_N = valid_BT.reshape(-1).nonzero().squeeze(1)
            x_ND = x_ND.index_select(0, self.index_N)
        self.frames = Frames(x_ND, starts, compact)

    def put_back(self, rows: Tensor, fill: float) -> Tensor:
        """(N, ...) -> (B, T, ...), `fill` elsewhere."""
        B, T, _ = self.shape
        if self.index_N is not None:
            rows = rows.new_full((B * T, *rows.shape[1:]), fill).index_copy_(0, self.index_N, rows)
        return rows.view(B, T, *rows.shape[1:])


def _finish_nll(nll_B: Tensor, hidden: Tensor, zero_infinity: bool) -> Tensor:
    if zero_infinity:
        nll_B = nll_B.masked_fill(nll_B == torch.inf, 0.0)
    return nll_B.to(torch.promote_types(hidden.dtype, torch.float32))


class _FrozenHead(torch.autograd.Function):
    """Forward computes d/dhidden up to g_b, so backward scales rows; weight never gets a gradient."""

    @staticmethod
    def forward(ctx, hidden, weight, blank_row, compact, needs, zero_infinity, return_argmax, blank):
        need_hidden, need_blank = needs
        valid = _ValidFrames(hidden, compact)
        frames, head = valid.frames, Head(weight.detach(), blank_row)
        with torch.autocast(hidden.device.type, enabled=False):
            softmax, dx_ND = vocabulary_pass(frames, head, need_hidden, return_argmax)
            nll_B, residual_NK = frames.alpha_beta(softmax.picked_NK, softmax.lse(), any(needs))
            if need_hidden:
                add_compact_rows(dx_ND, residual_NK, frames, head)
        ctx.dx_ND, ctx.valid, ctx.infinite_B = dx_ND, valid, nll_B == torch.inf
        ctx.blank_residual_N = residual_NK[:, 0].clone() if need_blank else None
        if not need_blank:
            valid.frames = None  # the features themselves are not needed again
        argmax = valid.put_back(softmax.argmax_N, blank) if return_argmax else None
        if return_argmax:
            ctx.mark_non_differentiable(argmax)
        ctx.lengths_B, ctx.hidden_dtype = compact.input_lengths_B, hidden.dtype
        return _finish_nll(nll_B, hidden, zero_infinity), argmax

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_B, _):
        grad_N = torch.repeat_interleave(grad_B.masked_fill(ctx.infinite_B, 0.0), ctx.lengths_B)
        grad_hidden = grad_blank = None
        with torch.autocast(grad_B.device.type, enabled=False):
            if ctx.dx_ND is not None:
                grad_hidden = ctx.valid.put_back((ctx.dx_ND * grad_N[:, None]).to(ctx.hidden_dtype), 0.0)
            if ctx.blank_residual_N is not None:
                x_ND = ctx.valid.frames.x_ND.to(grad_N.dtype)
                grad_blank = (x_ND.t() @ (ctx.blank_residual_N * grad_N)).to(ctx.hidden_dtype)
        return grad_hidden, None, grad_blank, None, None, None, None, None


class _TrainableHead(torch.autograd.Function):
    """With scale_B (B,), the scalar sum of scale_b nll_b, its gradients made in forward; without, nll (B,).

    The gradients made in forward are handed over once; a second backward, or "none", whose scale is known only in
    backward, walks the utterances again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, blank_row, compact, scale_B, zero_infinity, return_argmax, blank):
        valid = _ValidFrames(hidden, compact)
        ctx.ready = None
        ctx.compact, ctx.scale_B = compact, scale_B
        ctx.save_for_backward(hidden, weight, blank_row)
        with torch.autocast(hidden.device.type, enabled=False):
            if scale_B is None:
                softmax, _ = vocabulary_pass(valid.frames, _head(weight, blank_row), False, return_argmax)
                nll_B, _ = valid.frames.alpha_beta(softmax.picked_NK, softmax.lse(), False)
                argmax_N = softmax.argmax_N
            else:
                nll_B, *ctx.ready, argmax_N = utterance_pass(
                    valid.frames, _head(weight, blank_row), scale_B, ctx.needs_input_grad[0], return_argmax
                )
        argmax = valid.put_back(argmax_N, blank) if return_argmax else None
        if return_argmax:
            ctx.mark_non_differentiable(argmax)
        nll_B = _finish_nll(nll_B, hidden, zero_infinity)
        return nll_B if scale_B is None else (nll_B * scale_B.to(nll_B.dtype)).sum(), argmax

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        hidden, weight, blank_row = ctx.saved_tensors
        valid = _ValidFrames(hidden, ctx.compact)
        with torch.autocast(hidden.device.type, enabled=False):
            if ctx.ready is not None:
                dx_ND, dw_VD, dblank_D = (None if g is None else g.mul_(grad) for g in ctx.ready)
                ctx.ready = None
            else:
                scale_B = grad if ctx.scale_B is None else grad * ctx.scale_B
                _, dx_ND, dw_VD, dblank_D, _ = utterance_pass(
                    valid.frames, _head(weight, blank_row), scale_B, ctx.needs_input_grad[0], False
                )
        grad_hidden = None if dx_ND is None else valid.put_back(dx_ND.to(hidden.dtype), 0.0)
        grad_blank = dblank_D.to(blank_row.dtype) if ctx.needs_input_grad[2] else None
        return grad_hidden, dw_VD, grad_blank, None, None, None, None, None


def _head(weight: Tensor, blank_row: Tensor | None) -> Head:
    return Head(weight.detach(), None if blank_row is None else blank_row.detach())
