"""Loss terms as (sum, count): only the trainer divides, by counts summed over all ranks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100


def next_token_loss(
    hidden_BLD: Tensor,  # the LLM's last hidden states
    lm_head: nn.Module,
    labels_BL: Tensor,  # token ids, -100 where nothing is to be predicted; not shifted. The first of a row never counts
    most: int | None = None,  # labels there can be at most; None: counted, which waits for an accelerator
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the next token, summed, and the number of predicted tokens.

    Only positions that predict something pass through `lm_head`: with short answers after long prompts most of the
    (positions x vocabulary) product would be thrown away. In a packed row the first label of every prompt must be -100,
    as `splice` leaves it, or the prompt before would be scored on it.
    """
    target_M = labels_BL[:, 1:].flatten()
    counts_M = target_M != IGNORE
    where_N = counts_M.nonzero().squeeze(-1) if most is None else _first_places(counts_M, most)
    hidden_ND = hidden_BLD[:, :-1].flatten(0, 1).index_select(0, where_N)
    target_N = target_M.index_select(0, where_N)
    if most is not None:  # what fills up to `most` may be anything, NaN times a gradient of 0 is NaN
        hidden_ND = hidden_ND.masked_fill((target_N == IGNORE)[:, None], 0)
    logits_NV = lm_head(hidden_ND).float()
    loss = F.cross_entropy(logits_NV, target_N, reduction="sum", ignore_index=IGNORE)
    return loss, counts_M.sum().float()


def _first_places(counts_M: Tensor, most: int) -> Tensor:
    """(N,) the places that are True, then some that are not; N is `most`, or all places if there are fewer."""
    return counts_M.byte().argsort(descending=True, stable=True)[:most]
