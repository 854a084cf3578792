"""splice: put packed audio rows in the place of placeholder tokens among text embeddings.

Shape legend: B prompts, L text positions, D width, N audio rows, P audio segments, M spliced length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from soundwave_fast.packed import Packed

IGNORE = -100  # the label cross entropy skips


@dataclass(frozen=True)
class Spliced:
    """What the LLM is called with. M is the longest spliced prompt, or, packed, B is 1 and M all of them end to end."""

    inputs_embeds: Tensor  # (B, M, D)
    attention_mask: Tensor | None  # (B, M), attention_mask's dtype or int64; None when packed
    position_ids: Tensor  # (B, M) int64, from 0 within each prompt, 0 on padding
    labels: Tensor | None  # (B, M), -100 on audio and padding
    cu_seqlens: Tensor  # (B + 1,) int32 offsets of the spliced prompts without their padding


def splice(
    text_embeds: Tensor,  # (B, L, D)
    audio: Packed,  # (N, D), P segments
    placeholder_mask: Tensor,  # (B, L) bool
    attention_mask: Tensor | None = None,  # (B, L); non-zero marks text, padding may be on either side
    labels: Tensor | None = None,  # (B, L)
    layout: str = "right",  # "right", "left" or "packed"
) -> Spliced:
    """Replace the i-th placeholder, in row-major order, by the i-th segment of audio, which may be empty.

    layout says where padding goes: "right" for training, "left" for generation, "packed" for none at all, one row
    whose position_ids restart and whose cu_seqlens bound the prompts. A prompt may hold any number of placeholders.
    Audio rows are cast to text_embeds' dtype; gradients reach audio.data and text_embeds. Vectorised over the batch;
    on an accelerator it waits for the counts and lengths that size the output.

    Raises ValueError for shapes that disagree, an unknown layout, a number of placeholders other than the number of
    segments, or a placeholder outside attention_mask (naming the row).
    """
    B, L, D = _check(text_embeds, audio, placeholder_mask, attention_mask, labels, layout)
    device = text_embeds.device
    valid_BL = torch.ones_like(placeholder_mask) if attention_mask is None else attention_mask.bool()
    per_prompt_B = placeholder_mask.sum(1)
    # Each text position is 1 wide, a placeholder as wide as its segment, padding 0.
    segment_BL = (placeholder_mask.reshape(-1).cumsum(0) - 1).view(B, L)
    spans = F.pad(audio.lengths.long(), (0, 1))  # one more, so that a batch without segments can be indexed
    width_BL = torch.where(placeholder_mask, spans[segment_BL.clamp(0, len(audio))], 1) * valid_BL
    length_B = width_BL.sum(1)
    outside_B = (placeholder_mask & ~valid_BL).any(1).long()

    host = torch.stack([per_prompt_B, outside_B, length_B]).tolist()  # sizes the output, and carries the checks
    _check_counts(host[0], host[1], len(audio))
    total, longest = sum(host[2]), max(host[2], default=0)

    first_BL = width_BL.cumsum(1) - width_BL  # place of each source position within its spliced prompt
    start_B = length_B.cumsum(0) - length_B
    if layout == "packed":
        base_B, slots, shape = start_B, total, (1, total)
    else:
        base_B = torch.arange(B, device=device) * longest
        if layout == "left":
            base_B = base_B + longest - length_B
        slots, shape = B * longest, (B, longest)

    text_at = (valid_BL & ~placeholder_mask).reshape(-1).nonzero().squeeze(1)
    text_to = (base_B[:, None] + first_BL).reshape(-1)[text_at]
    audio_first_P = (base_B[:, None] + first_BL)[placeholder_mask]
    audio_to = audio_first_P[audio.segment_ids()] + audio.positions()

    embeds = text_embeds.new_zeros(slots, D)
    embeds = embeds.index_copy(0, text_to, text_embeds.reshape(B * L, D).index_select(0, text_at))
    embeds = embeds.index_copy(0, audio_to, audio.data.to(text_embeds.dtype))

    within = torch.arange(total, device=device)
    prompt = torch.repeat_interleave(torch.arange(B, device=device), length_B, output_size=total)
    within = within - start_B[prompt]
    row_to = base_B[prompt] + within
    position_ids = within.new_zeros(slots).index_copy_(0, row_to, within).view(shape)
    mask = None
    if layout != "packed":
        dtype = torch.int64 if attention_mask is None else attention_mask.dtype
        mask = torch.zeros(slots, dtype=dtype, device=device).index_fill_(0, row_to, 1).view(shape)
    new_labels = None
    if labels is not None:
        new_labels = labels.new_full((slots,), IGNORE)
        new_labels = new_labels.index_copy_(0, text_to, labels.reshape(-1)[text_at]).view(shape)
    cu_seqlens = F.pad(length_B.cumsum(0), (1, 0)).to(torch.int32)
    return Spliced(embeds.view(*shape, D), mask, position_ids, new_labels, cu_seqlens)


def _check(text_embeds, audio, placeholder_mask, attention_mask, labels, layout) -> tuple[int, int, int]:
    if layout not in ("right", "left", "packed"):
        raise ValueError(f"layout must be 'right', 'left' or 'packed', got {layout!r}")
    if text_embeds.dim() != 3:
        raise ValueError(f"text_embeds must be (B, L, D), got {tuple(text_embeds.shape)}")
    B, L, D = text_embeds.shape
    if placeholder_mask.dtype != torch.bool:
        raise TypeError(f"placeholder_mask must be bool, got {placeholder_mask.dtype}")
    for name, x in (("placeholder_mask", placeholder_mask), ("attention_mask", attention_mask), ("labels", labels)):
        if x is not None and x.shape != (B, L):
            raise ValueError(f"{name} must be ({B}, {L}), got {tuple(x.shape)}")
    if audio.data.dim() != 2 or audio.data.shape[1] != D:
        raise ValueError(f"audio.data must be (rows, {D}), got {tuple(audio.data.shape)}")
    return B, L, D


def _check_counts(placeholders: list[int], outside: list[int], segments: int) -> None:
    for b, wrong in enumerate(outside):
        if wrong:
            raise ValueError(f"placeholder_mask marks a position of row {b} that attention_mask calls padding")
    if sum(placeholders) == segments:
        return
    where = ""
    if segments == len(placeholders):  # one segment a prompt is what was meant: the odd rows can be named
        odd = [f"row {b} has {n}" for b, n in enumerate(placeholders) if n != 1]
        where = f"; with one segment per prompt, {', '.join(odd[:8])}"
    raise ValueError(
        f"placeholder_mask holds {sum(placeholders)} placeholders, but audio holds {segments} segments{where}"
    )
