"""Loss terms as (sum, count): only the trainer divides, by counts summed over all ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100


def next_token_loss(
    hidden_BLD: Tensor,  # the LLM's last hidden states
    lm_head: nn.Module,
    labels_BL: Tensor,  # token ids, -100 where nothing is to be predicted; not shifted. The first of a row never counts
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the next token, summed, and the number of predicted tokens.

    Only positions that predict something pass through `lm_head`: with short answers after long prompts most of the
    (positions x vocabulary) product would be thrown away. In a packed row the first label of every prompt must be -100,
    as `splice` leaves it, or the prompt before would be scored on it.
    """
    target_BL = labels_BL[:, 1:]
    where = (target_BL != IGNORE).flatten().nonzero().squeeze(-1)
    hidden_ND = hidden_BLD[:, :-1].flatten(0, 1).index_select(0, where)
    target_N = target_BL.flatten().index_select(0, where)
    logits_NV = lm_head(hidden_ND).float()
    return F.cross_entropy(logits_NV, target_N, reduction="sum"), torch.tensor(float(len(where)), device=where.device)
