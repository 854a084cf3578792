"""Truth of linear_ctc_loss: all the logits at once, in float64."""

import torch
from torch import Tensor

from soundwave_fast.ops.reference.ctc_loss import ctc_loss


def linear_ctc_loss(
    hidden: Tensor,  # (B, T, D)
    weight: Tensor,  # (V, D)
    targets: list[list[int]],
    input_lengths: list[int],
    blank: int = 0,
    blank_row: Tensor | None = None,  # (D,)
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihoods (B,) float64, and argmax (B, T) int64 with `blank` past the input length."""
    rows = weight if blank_row is None else torch.cat([weight, blank_row[None]])
    logits_BTV = hidden.double() @ rows.double().t()
    argmax_BT = logits_BTV.argmax(2)
    for b, n in enumerate(input_lengths):
        argmax_BT[b, n:] = blank
    return ctc_loss(logits_BTV.log_softmax(2).transpose(0, 1), targets, input_lengths, blank), argmax_BT
