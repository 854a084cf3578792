"""CTCLoss and LinearCTCLoss: nn.Module faces of the two losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from soundwave_fast.ops.compact import Lengths, check_reduction
from soundwave_fast.ops.ctc_loss import ctc_loss
from soundwave_fast.ops.linear_ctc_loss import linear_ctc_loss


class CTCLoss(nn.Module):
    """`torch.nn.CTCLoss` on `soundwave_fast.ops.ctc_loss`: the same constructor and the same call.

    Raises ValueError for an unknown reduction; the call raises what `ctc_loss` raises.
    """

    def __init__(self, blank: int = 0, reduction: str = "mean", zero_infinity: bool = False) -> None:
        super().__init__()
        check_reduction(reduction)
        self.blank, self.reduction, self.zero_infinity = blank, reduction, zero_infinity

    def forward(
        self,
        log_probs: Tensor,  # (T, B, C) or (T, C)
        targets: Tensor,  # (B, S), (sum of target_lengths,) or (S,)
        input_lengths: Lengths,  # (B,)
        target_lengths: Lengths,  # (B,)
    ) -> Tensor:
        return ctc_loss(
            log_probs, targets, input_lengths, target_lengths, self.blank, self.reduction, self.zero_infinity
        )

    def extra_repr(self) -> str:
        return f"blank={self.blank}, reduction={self.reduction!r}, zero_infinity={self.zero_infinity}"


class LinearCTCLoss(nn.Module):
    """A CTC head and its loss in one: `nn.Linear(hidden_size, num_classes, bias=False)` without its logits in memory.

    `weight` (num_classes, hidden_size) is nn.Linear's, so state dicts can be exchanged. Call it for training, `logits`
    where the scores themselves are wanted. Under FSDP shard this module, not the loss: the weight is whole inside it.

    Raises ValueError for an unknown reduction or a blank outside [0, num_classes); the call raises what
    `linear_ctc_loss` raises.
    """

    def __init__(
        self,
        hidden_size: int,
        num_classes: int,
        blank: int = 0,
        reduction: str = "mean",
        zero_infinity: bool = False,
        return_argmax: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        if not 0 <= blank < num_classes:
            raise ValueError(f"blank must lie in [0, {num_classes}), got {blank}")
        self.blank, self.reduction, self.zero_infinity = blank, reduction, zero_infinity
        self.return_argmax = return_argmax
        self.weight = nn.Parameter(torch.empty(num_classes, hidden_size, device=device, dtype=dtype))
        nn.init.uniform_(self.weight, -(hidden_size**-0.5), hidden_size**-0.5)  # nn.Linear's

    def forward(
        self,
        hidden: Tensor,  # (B, T, D)
        targets: Tensor,  # (B, S) or (sum of target_lengths,)
        input_lengths: Lengths,  # (B,)
        target_lengths: Lengths,  # (B,)
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The loss, or with return_argmax (loss, best class of every frame (B, T))."""
        return linear_ctc_loss(
            hidden,
            self.weight,
            targets,
            input_lengths,
            target_lengths,
            self.blank,
            self.reduction,
            self.zero_infinity,
            self.return_argmax,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden @ weight.T: (..., num_classes), all of it in memory."""
        return nn.functional.linear(hidden, self.weight)

    def extra_repr(self) -> str:
        classes, hidden = self.weight.shape
        return f"{hidden}, {classes}, blank={self.blank}, reduction={self.reduction!r}"
