"""splice in plain torch: where every text position and audio row goes, then two copies.

Shape legend: B prompts, L text positions, D width, N audio rows, P audio segments, M output positions a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from soundwave_fast.ops.pure_torch.rows import copy_rows

IGNORE = -100


def plan_splice(
    placeholder_BL: Tensor,  # bool
    valid_BL: Tensor | None,  # non-zero where there is text
    cu_seqlens_P: Tensor,  # (P + 1,) int32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What becomes of each position, whatever the layout; all int32.

    ends (B, L):    where its rows end within the spliced prompt; text is 1 long, padding 0.
    segment (B, L): the audio segment it is replaced by; -1 for text, -2 where nothing remains.
    home (P,):      flat position b * L + l of the placeholder of each segment, -1 for a segment without one.
    report (3, B):  length of each spliced prompt, placeholders in it, and those of them that lie in padding.
    """
    B, L = placeholder_BL.shape
    P = cu_seqlens_P.numel() - 1
    valid = torch.ones_like(placeholder_BL) if valid_BL is None else valid_BL != 0
    segment = (placeholder_BL.reshape(-1).cumsum(0) - 1).view(B, L)
    placed = placeholder_BL & valid & (segment < P)
    text = valid & ~placeholder_BL
    span = F.pad(cu_seqlens_P.diff(), (0, 1))  # one more, so that a batch without segments can be indexed
    width = torch.where(placed, span[segment.clamp(0, P)], text)
    ends = width.cumsum(1, dtype=torch.int32)
    slot = torch.where(placed, segment, P).view(-1)  # the last slot is thrown away
    home = ends.new_full((P + 1,), -1).scatter_(0, slot, torch.arange(B * L, dtype=torch.int32, device=ends.device))
    segment = torch.where(placed, segment, torch.where(text, -1, -2)).to(torch.int32)
    report = torch.stack([width.sum(1), placeholder_BL.sum(1), (placeholder_BL & ~valid).sum(1)]).to(torch.int32)
    return ends, segment, home[:P], report


def splice_rows(
    text_BLD: Tensor,
    audio_ND: Tensor,
    cu_seqlens_P: Tensor,  # (P + 1,) int32 offsets of the audio
    ends_BL: Tensor,
    segment_BL: Tensor,
    home_P: Tensor,
    lengths_B: Tensor,  # int32, of the spliced prompts
    labels_BL: Tensor | None,
    mask_dtype: torch.dtype | None,
    layout: str,
    length: int,  # M
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:
    """Embeddings (B, M, D), mask (B, M), position ids (B, M), labels (B, M), cu_seqlens (B + 1,) int32.

    Packed, they have one row of M. What does not fit into M is left out, at the end or, on the left layout, at the
    beginning; cu_seqlens counts what is there. Packed, the first label of every prompt becomes -100: the row before it
    is another prompt's.
    """
    B, M, D = len(lengths_B), length, text_BLD.shape[2]
    slot_M = torch.arange(M, dtype=torch.int32, device=text_BLD.device)
    if layout == "packed":
        cu_seqlens = F.pad(lengths_B.cumsum(0, dtype=torch.int32), (1, 0)).clamp_(max=M)
        within = slot_M - cu_seqlens[torch.searchsorted(cu_seqlens[1:], slot_M, right=True)]
        within, there = within[None], (slot_M < cu_seqlens[-1])[None]
    else:
        cu_seqlens = F.pad(lengths_B.clamp(max=M).cumsum(0, dtype=torch.int32), (1, 0))
        within = slot_M[None].expand(B, M)
        if layout == "left":
            within = within - (M - lengths_B)[:, None]
        there = (within >= 0) & (within < lengths_B[:, None])
    shape, rows = within.shape, within.numel()
    text_to, audio_to = _routes(cu_seqlens_P, ends_BL, segment_BL, home_P, lengths_B, cu_seqlens, layout, M)
    embeds = text_BLD.new_zeros(rows + 1, D)  # the last row is thrown away
    copy_rows(embeds, text_to, text_BLD.reshape(-1, D))
    copy_rows(embeds, audio_to, audio_ND[: len(audio_to)])
    labels = None
    if labels_BL is not None:
        labels = labels_BL.new_full((rows + 1,), IGNORE).index_copy_(0, text_to, labels_BL.reshape(-1))
        if layout == "packed":
            labels.index_fill_(0, cu_seqlens[:-1].long(), IGNORE)
        labels = labels[:-1].view(shape)
    position_ids = torch.where(there, within, 0).long()
    mask = None if mask_dtype is None else there.to(mask_dtype)
    return embeds[:-1].view(*shape, D), mask, position_ids, labels, cu_seqlens


def splice_text_backward(
    grad_BMD: Tensor, ends_BL: Tensor, segment_BL: Tensor, lengths_B: Tensor, cu_seqlens: Tensor, layout: str
) -> Tensor:
    """(B, L, D): each text position gets the gradient of the row it became, others 0."""
    to = _text_route(ends_BL, segment_BL, lengths_B, cu_seqlens, layout, grad_BMD.shape[1])
    return _rows_or_zero(grad_BMD, to).view(*ends_BL.shape, grad_BMD.shape[2])


def splice_audio_backward(
    grad_BMD: Tensor,
    cu_seqlens_P: Tensor,
    ends_BL: Tensor,
    home_P: Tensor,
    lengths_B: Tensor,
    cu_seqlens: Tensor,
    layout: str,
    rows: int,  # N
    dtype: torch.dtype,
) -> Tensor:
    """(N, D): each audio row gets the gradient of the row it became; those without a placeholder or an owner, 0."""
    to = _audio_route(cu_seqlens_P, ends_BL, home_P, lengths_B, cu_seqlens, layout, grad_BMD.shape[1])
    grad_ND = _rows_or_zero(grad_BMD, to).to(dtype)
    return F.pad(grad_ND, (0, 0, 0, rows - len(to))) if len(to) < rows else grad_ND


def _rows_or_zero(grad_BMD: Tensor, to: Tensor) -> Tensor:
    """Row to[i] of grad, flattened; 0 where that is past the last."""
    grad = grad_BMD.reshape(-1, grad_BMD.shape[2])
    if not len(grad):
        return grad.new_zeros(len(to), grad.shape[1])
    nowhere = (to == len(grad)).nonzero().squeeze(1)
    return grad.index_select(0, to.clamp(max=len(grad) - 1)).index_fill_(0, nowhere, 0)


def _routes(cu_seqlens_P, ends_BL, segment_BL, home_P, lengths_B, cu_seqlens, layout: str, M: int):
    return (
        _text_route(ends_BL, segment_BL, lengths_B, cu_seqlens, layout, M),
        _audio_route(cu_seqlens_P, ends_BL, home_P, lengths_B, cu_seqlens, layout, M),
    )


def _first_rows(lengths_B: Tensor, cu_seqlens: Tensor, layout: str, M: int) -> Tensor:
    """(B,) int64: flat output row of each prompt's first; on the left layout before the row's first if M is short."""
    if layout == "packed":
        return cu_seqlens[:-1].long()
    first_B = torch.arange(len(lengths_B), device=lengths_B.device) * M
    return first_B + (M - lengths_B) if layout == "left" else first_B


def _keep_inside(row: Tensor, prompt: Tensor, lengths_B: Tensor, layout: str, M: int) -> Tensor:
    """Rows that are not the prompt's own become the one past the last; a CPU has checked that there are none."""
    if row.device.type == "cpu":
        return row
    rows = M if layout == "packed" else len(lengths_B) * M
    lowest = torch.zeros_like(row) if layout == "packed" else prompt * M
    return torch.where((row >= lowest) & (row < lowest + M), row, rows)


def _text_route(ends_BL, segment_BL, lengths_B, cu_seqlens, layout: str, M: int) -> Tensor:
    """(B * L,) flat output row of each text position, the one past the last for others."""
    B, L = ends_BL.shape
    row = _first_rows(lengths_B, cu_seqlens, layout, M)[:, None] + (ends_BL - 1)
    row = _keep_inside(row, torch.arange(B, device=row.device)[:, None], lengths_B, layout, M)
    return torch.where(segment_BL == -1, row, M if layout == "packed" else B * M).view(B * L)


def _audio_route(cu_seqlens_P, ends_BL, home_P, lengths_B, cu_seqlens, layout: str, M: int) -> Tensor:
    """(audio rows with an owner,) flat output row of each, the one past the last where its segment has no place."""
    home = home_P.long()
    if not ends_BL.numel():
        return home[:0]
    prompt = torch.div(home, ends_BL.shape[1], rounding_mode="floor")
    # A row is as far from its segment's end as what it becomes is from the end of the placeholder's place.
    shift = _first_rows(lengths_B, cu_seqlens, layout, M)[prompt] + ends_BL.view(-1)[home] - cu_seqlens_P[1:]
    span = cu_seqlens_P.diff()
    shift, prompt = torch.repeat_interleave(torch.stack([shift, prompt]), span, dim=1)
    row = torch.arange(len(shift), device=home.device) + shift
    row = _keep_inside(row, prompt, lengths_B, layout, M)
    return torch.where(prompt < 0, M if layout == "packed" else len(lengths_B) * M, row)
