"""splice: put packed audio rows in the place of placeholder tokens among text embeddings.

Shape legend: B prompts, L text positions, D width, N audio rows, P audio segments, M spliced length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from soundwave_fast.ops.backend import implementation, refuse_dtensor, shortcut
from soundwave_fast.packed import Packed

_LAYOUTS = ("right", "left", "packed")
_NAMED = 8  # rows that an error names
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Spliced:
    """What the LLM is called with. M is the longest spliced prompt, or, packed, B is 1 and M all of them end to end."""

    inputs_embeds: Tensor  # (B, M, D)
    attention_mask: Tensor | None  # (B, M), attention_mask's dtype or int64; None when packed
    position_ids: Tensor  # (B, M) int64, from 0 within each prompt, 0 on padding
    labels: Tensor | None  # (B, M), -100 on audio and padding; packed, on the first row of every prompt too
    cu_seqlens: Tensor  # (B + 1,) int32 offsets of the spliced prompts without their padding
    lengths: Tensor  # (B,) int32, equal to cu_seqlens.diff() unless overflowed
    max_len: int  # the longest length, for varlen attention; a bound on it, max_length, where that was given

    def overflowed(self) -> Tensor:
        """() bool on the device: whether max_length was too small for a prompt, so that rows are missing. No sync."""
        return self.lengths.sum() > self.cu_seqlens[-1]


def splice(
    text_embeds: Tensor,  # (B, L, D)
    audio: Packed,  # (N, D), P segments
    placeholder_mask: Tensor,  # (B, L) bool
    attention_mask: Tensor | None = None,  # (B, L); non-zero marks text, padding may be on either side
    labels: Tensor | None = None,  # (B, L)
    layout: str = "right",  # "right", "left" or "packed"
    max_length: int | None = None,  # M; None: just long enough
) -> Spliced:
    """Replace the i-th placeholder, in row-major order, by the i-th segment of audio, which may be empty.

    layout says where padding goes: "right" for training, "left" for generation, "packed" for none at all, one row
    whose position_ids restart and whose cu_seqlens bound the prompts; the first label of every prompt is -100 there, so
    that shifting labels over the row scores what it would with padding. A prompt may hold any number of placeholders.
    Audio rows are cast to text_embeds' dtype; rows of audio past its cu_seqlens[-1] are not read. Gradients reach
    audio.data and text_embeds; backward writes every row of either once.

    Without max_length the lengths of the prompts are copied to the host: the one place where this waits for an
    accelerator. With it nothing waits, and `PromptCounts` finds it without waiting, too, with the checks below. splice
    itself then does not look at an accelerator's values: a placeholder without a segment, a segment without a
    placeholder and a placeholder outside attention_mask are left out unseen, and a prompt too long loses its end (its
    beginning on the left layout), which `Spliced.overflowed()` tells.

    Raises ValueError for shapes that disagree, an unknown layout, a number of placeholders other than the number of
    segments or a placeholder outside attention_mask (naming the rows), or a max_length that is too small (values are
    checked on the CPU, under torch.compile too); TypeError for dtypes and DTensors.
    """
    _check(text_embeds, audio, placeholder_mask, attention_mask, labels, layout, max_length)
    embeds, mask, position_ids, new_labels, longest, cu_seqlens, lengths, *_ = _run(
        text_embeds, audio.data, audio.cu_seqlens, placeholder_mask, attention_mask, labels, layout, max_length
    )
    mask = None if layout == "packed" else mask
    new_labels = None if labels is None else new_labels
    return Spliced(embeds, mask, position_ids, new_labels, cu_seqlens, lengths, longest.shape[0])


def _check(text_embeds, audio, placeholder_mask, attention_mask, labels, layout, max_length) -> None:
    refuse_dtensor("splice", text_embeds=text_embeds, audio=audio.data, placeholder_mask=placeholder_mask)
    refuse_dtensor("splice", attention_mask=attention_mask, labels=labels, **{"audio.cu_seqlens": audio.cu_seqlens})
    if layout not in _LAYOUTS:
        raise ValueError(f"layout must be 'right', 'left' or 'packed', got {layout!r}")
    if text_embeds.dim() != 3:
        raise ValueError(f"text_embeds must be (B, L, D), got {tuple(text_embeds.shape)}")
    B, L, D = text_embeds.shape
    check_prompts(placeholder_mask, attention_mask, labels, (B, L), text_embeds.device)
    if audio.data.dim() != 2 or audio.data.shape[1] != D:
        raise ValueError(f"audio.data must be (rows, {D}), got {tuple(audio.data.shape)}")
    if audio.data.device != text_embeds.device:
        raise ValueError(f"audio must be on text_embeds' device {text_embeds.device}, got {audio.data.device}")
    for name, x in (("text_embeds", text_embeds), ("audio.data", audio.data)):
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if max_length is not None and max_length < 0:
        raise ValueError(f"max_length must not be negative, got {max_length}")


def check_prompts(
    placeholder_mask: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    shape: tuple[int, int],
    device: torch.device,
) -> None:
    """Raises TypeError or ValueError for a dtype, a shape or a device other than they must have."""
    if placeholder_mask.dtype != torch.bool:
        raise TypeError(f"placeholder_mask must be bool, got {placeholder_mask.dtype}")
    for name, x in (("placeholder_mask", placeholder_mask), ("attention_mask", attention_mask), ("labels", labels)):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(x.shape)}")
        if x is not None and x.device != device:
            raise ValueError(f"{name} must be on the prompts' device {device}, got {x.device}")


def check_values(placeholders: list[int], outside: list[int], segments: int) -> None:
    """Raises ValueError for what only the values show: placeholders of each prompt, and those of them on padding."""
    for b, wrong in enumerate(outside):
        if wrong:
            raise ValueError(f"placeholder_mask marks a position of row {b} that attention_mask calls padding")
    if sum(placeholders) != segments:
        raise ValueError(
            f"placeholder_mask holds {sum(placeholders)} placeholders, but audio holds {segments} segments; "
            f"{_odd_rows(placeholders, segments)}"
        )


def _odd_rows(placeholders: list[int], segments: int) -> str:
    """Which rows have another number of placeholders than was meant: as many each as there are segments, or as most."""
    if not placeholders:
        return "there are no rows"
    each, rest = divmod(segments, len(placeholders))
    start = f"with {each} a row, "
    if rest:  # no number each would do: what most rows have is all there is to go by
        each = max(sorted(set(placeholders)), key=placeholders.count)
        start = f"most rows have {each}, "
    odd = [f"row {b} has {n}" for b, n in enumerate(placeholders) if n != each]
    if not odd:
        return f"every row has {each}"
    return start + ", ".join(odd[:_NAMED]) + (f" and {len(odd) - _NAMED} rows more differ" if len(odd) > _NAMED else "")


@torch.library.custom_op("soundwave_fast::splice", mutates_args=())
def _splice(
    text_embeds: Tensor,
    audio: Tensor,
    audio_cu_seqlens: Tensor,
    placeholder_mask: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    layout: str,
    max_length: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Embeddings, mask, position ids, labels (mask and labels empty where there are none), an empty tensor as long as
    the longest prompt can be, offsets, lengths; then ends, segment and home of the plan.
    """
    ops = implementation("splice", text_embeds)
    ends, segment, home, report = ops.plan_splice(placeholder_mask, attention_mask, audio_cu_seqlens)
    length = longest = max_length
    if length is None or report.device.type == "cpu":
        totals, placeholders, outside = report.tolist()  # the one copy to the host: the output's size, the checks
        most = max(totals, default=0)
        needed = sum(totals) if layout == "packed" else most
        check_values(placeholders, outside, audio_cu_seqlens.numel() - 1)
        if max_length is None:
            length, longest = needed, most
        elif needed > max_length:
            raise ValueError(f"max_length is {max_length}, but {needed} positions are needed")
    mask_dtype = None if layout == "packed" else torch.int64 if attention_mask is None else attention_mask.dtype
    lengths = report[0]
    embeds, mask, position_ids, new_labels, cu_seqlens = ops.splice_rows(
        text_embeds, audio, audio_cu_seqlens, ends, segment, home, lengths, labels, mask_dtype, layout, length
    )
    mask = position_ids.new_empty(0) if mask is None else mask
    new_labels = position_ids.new_empty(0) if new_labels is None else new_labels
    return embeds, mask, position_ids, new_labels, torch.empty(longest, 0), cu_seqlens, lengths, ends, segment, home


@_splice.register_fake
def _(text_embeds, audio, audio_cu_seqlens, placeholder_mask, attention_mask, labels, layout, max_length):
    B, L, D = text_embeds.shape
    length = torch.library.get_ctx().new_dynamic_size() if max_length is None else max_length
    longest = torch.library.get_ctx().new_dynamic_size() if max_length is None and layout == "packed" else length
    rows = 1 if layout == "packed" else B
    x = text_embeds
    mask_dtype = torch.int64 if attention_mask is None else attention_mask.dtype
    return (
        x.new_empty(rows, length, D),
        x.new_empty(0, dtype=torch.int64) if layout == "packed" else x.new_empty(B, length, dtype=mask_dtype),
        x.new_empty(rows, length, dtype=torch.int64),
        x.new_empty(0, dtype=torch.int64) if labels is None else labels.new_empty(rows, length),
        torch.empty(longest, 0),
        x.new_empty(B + 1, dtype=torch.int32),
        x.new_empty(B, dtype=torch.int32),
        x.new_empty(B, L, dtype=torch.int32),
        x.new_empty(B, L, dtype=torch.int32),
        x.new_empty(audio_cu_seqlens.shape[0] - 1, dtype=torch.int32),
    )


@torch.library.custom_op("soundwave_fast::splice_text_backward", mutates_args=())
def _splice_text_backward(
    grad: Tensor, ends: Tensor, segment: Tensor, lengths: Tensor, cu_seqlens: Tensor, layout: str
) -> Tensor:
    return implementation("splice", grad).splice_text_backward(grad, ends, segment, lengths, cu_seqlens, layout)


@_splice_text_backward.register_fake
def _(grad, ends, segment, lengths, cu_seqlens, layout):
    return grad.new_empty(*ends.shape, grad.shape[2])


@torch.library.custom_op("soundwave_fast::splice_audio_backward", mutates_args=())
def _splice_audio_backward(
    grad: Tensor,
    audio_cu_seqlens: Tensor,
    ends: Tensor,
    home: Tensor,
    lengths: Tensor,
    cu_seqlens: Tensor,
    layout: str,
    rows: int,
    dtype: torch.dtype,
) -> Tensor:
    return implementation("splice", grad).splice_audio_backward(
        grad, audio_cu_seqlens, ends, home, lengths, cu_seqlens, layout, rows, dtype
    )


@_splice_audio_backward.register_fake
def _(grad, audio_cu_seqlens, ends, home, lengths, cu_seqlens, layout, rows, dtype):
    return grad.new_empty(rows, grad.shape[2], dtype=dtype)


def _save(ctx, inputs, output) -> None:
    _, audio, audio_cu_seqlens, _, _, _, ctx.layout, _ = inputs
    *_, cu_seqlens, lengths, ends, segment, home = output
    ctx.save_for_backward(audio_cu_seqlens, ends, segment, home, lengths, cu_seqlens)
    ctx.rows, ctx.dtype = audio.shape[0], audio.dtype
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad, *_):
    audio_cu_seqlens, ends, segment, home, lengths, cu_seqlens = ctx.saved_tensors
    text = audio = None
    if ctx.needs_input_grad[0]:
        text = _text_backward(grad, ends, segment, lengths, cu_seqlens, ctx.layout)
    if ctx.needs_input_grad[1]:
        audio = _audio_backward(
            grad, audio_cu_seqlens, ends, home, lengths, cu_seqlens, ctx.layout, ctx.rows, ctx.dtype
        )
    return text, audio, None, None, None, None, None, None


_splice.register_autograd(_backward, setup_context=_save)
_run = shortcut(_splice, _save, _backward)
_text_backward = shortcut(_splice_text_backward)
_audio_backward = shortcut(_splice_audio_backward)
