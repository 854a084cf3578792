"""The audio side as one writes it with care in eager torch: the whole batch at once, padded and masked, no loop.

The benchmarks' second baseline beside bench/released.py, and what torch.compile is given, for the one shape that is
timed: its best case. On the parameters of our modules, so that all sides compute the same function of the same weights.

Shape legend: B utterances, T adapter frames, Q most kept frames of an utterance, N kept frames in all, D width,
L prompt, M prompt with the audio in it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def align(adapter, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, D) adapter frames and their lengths: the released modules over the padded batch with a key mask."""
    B, T50, E = frames.shape
    x, lengths = adapter.mm_projector1(frames[:, : T50 - T50 % 2].reshape(B, T50 // 2, 2 * E)), lengths // 2
    if adapter.over_time:
        padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
        mask = torch.zeros(padding.shape, dtype=x.dtype, device=x.device).masked_fill(padding, float("-inf"))
        x = adapter.asr_transformer_encoder(x, src_key_padding_mask=mask)
    else:
        x = adapter.asr_transformer_encoder(x.reshape(-1, 1, x.shape[-1])).view_as(x)
    return adapter.out_norm(x), lengths


def ctc(model, hidden: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, argmax): full logits, log_softmax in float32, torch's own CTC."""
    logits = model.ctc_head.audio_feature_head(hidden)
    log_probs = logits.float().log_softmax(-1).transpose(0, 1)
    with torch.backends.cudnn.flags(enabled=False):
        blank = model.config.ctc_blank_id
        loss = F.ctc_loss(log_probs, targets, lengths, target_lengths, blank=blank, zero_infinity=True)
    return loss, logits.argmax(-1)


def shrink(adapter, hidden: Tensor, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(N, D) kept frames after look-back, residual and LayerNorm, and how many each utterance keeps."""
    valid = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    keep = valid.clone()
    keep[:, 1:] &= tokens[:, 1:] != tokens[:, :-1]
    if adapter.drop_blank:
        keep &= tokens != adapter.blank
        keep[:, 0] |= ~keep.any(1) & (lengths > 0)
    counts = keep.sum(1)
    Q = int(counts.max())
    at = keep.int().argsort(dim=1, descending=True, stable=True)[:, :Q, None].expand(-1, -1, hidden.shape[2])
    queries = hidden.gather(1, at)
    real = torch.arange(Q, device=tokens.device) < counts[:, None]
    keys, seen = (queries, real) if adapter.keys == "kept" else (hidden, valid)
    mixed, _ = adapter.encoder_attn(queries, keys, keys, key_padding_mask=~seen, need_weights=False)
    return adapter.atten_layer_norm(queries + mixed)[real], counts


def splice(
    text: Tensor,  # (B, L, D) embeddings of the prompts
    placeholder: Tensor,  # (B, L) bool, one True a prompt
    rows: Tensor,  # (N, D) audio
    counts: Tensor,  # (B,)
    labels: Tensor | None = None,  # (B, L)
    left: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(B, M, D), mask and labels (-100 on audio and padding): places by cumsum, put there by boolean masks."""
    B, L, D = text.shape
    end = torch.where(placeholder, counts[:, None], 1).cumsum(1)
    M = int(end[:, -1].max())
    shift = M - end[:, -1:] if left else torch.zeros_like(end[:, -1:])
    b, at = torch.where(~placeholder)
    place = (end + shift)[b, at] - 1
    slot = torch.arange(M, device=text.device)
    mask = (slot >= shift) & (slot < end[:, -1:] + shift)
    is_audio = mask.clone()
    is_audio[b, place] = False
    out = text.new_zeros(B, M, D)
    out[b, place] = text[b, at]
    out[is_audio] = rows.to(out.dtype)
    if labels is not None:
        spread = labels.new_full((B, M), -100)
        spread[b, place] = labels[b, at]
        labels = spread
    return out, mask, labels


def audio_side(model, speech, prompt: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """CTC loss, and the prompts with the audio in them: embeddings (B, M, D), mask, labels."""
    hidden, lengths = align(model.alignment_adapter, speech.frames, speech.lengths)
    loss, tokens = ctc(model, hidden, lengths, speech.targets, speech.target_lengths)
    return loss, *_spliced(model, hidden, tokens, lengths, prompt, prompt["labels"])


def hear(model, speech, prompt: dict[str, Tensor]) -> tuple[Tensor, Tensor, None]:
    """The same without a loss and labels."""
    hidden, lengths = align(model.alignment_adapter, speech.frames, speech.lengths)
    tokens = model.ctc_head.audio_feature_head(hidden).argmax(-1)
    return _spliced(model, hidden, tokens, lengths, prompt, None)


def _spliced(model, hidden, tokens, lengths, prompt, labels) -> tuple[Tensor, Tensor, Tensor | None]:
    rows, counts = shrink(model.shrinking_adapter, hidden, tokens, lengths)
    text, placeholder = embed(model, prompt["input_ids"])
    return splice(text, placeholder, rows, counts, labels)


def embed(model, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings of the prompts, and where the placeholder is, whose id lies past the LLM's table."""
    placeholder = ids == model.config.audio_token_id
    return model.get_input_embeddings()(ids.masked_fill(placeholder, 0)), placeholder
