"""Truth of splice: a python list a prompt, padded at the end."""

import torch
from torch import Tensor


def splice(
    text_embeds: Tensor,  # (B, L, D)
    segments: list[Tensor],  # (n_i, D)
    placeholder_mask: list[list[bool]],
    valid: list[list[bool]],
    labels: list[list[int]],
    left: bool = False,
    packed: bool = False,  # the first label of every prompt becomes -100, as where another prompt's row precedes it
) -> tuple[Tensor, list[list[int]], list[list[int]], list[list[int]]]:
    """inputs_embeds (B, M, D), attention mask, position ids and labels of the padded layouts."""
    segments = list(segments)
    embeds, new_labels = [], []
    for b in range(text_embeds.shape[0]):
        rows, row_labels = [], []
        for i in range(text_embeds.shape[1]):
            if placeholder_mask[b][i]:
                segment = segments.pop(0)
                rows += list(segment)
                row_labels += [-100] * len(segment)
            elif valid[b][i]:
                rows.append(text_embeds[b, i])
                row_labels.append(labels[b][i])
        if packed:
            row_labels[:1] = [-100] * len(row_labels[:1])
        embeds.append(rows)
        new_labels.append(row_labels)
    longest = max(len(rows) for rows in embeds)
    mask, positions = [], []
    for rows, row_labels in zip(embeds, new_labels):
        n, gap = len(rows), longest - len(rows)
        at = 0 if left else n
        rows[at:at] = [torch.zeros_like(text_embeds[0, 0])] * gap
        row_labels[at:at] = [-100] * gap
        mask.append([0] * gap + [1] * n if left else [1] * n + [0] * gap)
        positions.append([0] * gap + list(range(n)) if left else list(range(n)) + [0] * gap)
    return torch.stack([torch.stack(rows) for rows in embeds]), mask, positions, new_labels
