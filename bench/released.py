"""The audio side computed the way the authors' code does, one utterance at a time: what the benchmarks compare with.

Written from the description of that code (full logits, argmax, roll-and-compare peaks, `nn.MultiheadAttention` with a
key padding mask, concatenation round the placeholder), on the parameters of our modules, so that both sides compute
the same function of the same weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from soundwave_fast.model import SoundwaveForConditionalGeneration


def align(model: SoundwaveForConditionalGeneration, frames_BTE: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """nn.Linear, nn.TransformerEncoder, nn.LayerNorm over the padded batch."""
    adapter = model.alignment_adapter
    B, T, E = frames_BTE.shape
    x = adapter.mm_projector1(frames_BTE[:, : T - T % 2].reshape(B, T // 2, 2 * E))
    lengths = lengths // 2
    padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
    mask = torch.zeros(padding.shape, dtype=x.dtype, device=x.device).masked_fill(padding, float("-inf"))
    return adapter.out_norm(adapter.asr_transformer_encoder(x, src_key_padding_mask=mask)), lengths


def head(model, hidden_BTD: Tensor) -> Tensor:
    """(B, T, V) logits."""
    return model.ctc_head.audio_feature_head(hidden_BTD)


def ctc(
    model, hidden_BTD: Tensor, lengths: Tensor, targets_BS: Tensor, target_lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """(loss, logits): the whole (B, T, V), cast to float32 for log_softmax and F.ctc_loss."""
    logits = head(model, hidden_BTD)
    log_probs = logits.float().log_softmax(-1).transpose(0, 1)
    with torch.backends.cudnn.flags(enabled=False):
        blank = model.config.ctc_blank_id
        loss = F.ctc_loss(log_probs, targets_BS, lengths, target_lengths, blank=blank, zero_infinity=True)
    return loss, logits


def shrink(model, hidden_BTD: Tensor, tokens_BT: Tensor, lengths: Tensor) -> list[Tensor]:
    """Kept frames of every utterance after look-back over all its frames, residual and LayerNorm: a list of (n, D)."""
    adapter = model.shrinking_adapter
    kept_rows = []
    for hidden, tokens, length in zip(hidden_BTD, tokens_BT, lengths):
        hidden, tokens = hidden[:length], tokens[:length]
        keep = tokens != tokens.roll(1)
        keep[0] = True
        if adapter.drop_blank:
            keep &= tokens != adapter.blank
            if not keep.any():
                keep[0] = True
        kept = hidden[torch.where(keep)[0]][None]
        keys = hidden[None]
        out, _ = adapter.encoder_attn(kept, keys, keys, need_weights=False)
        kept_rows.append(adapter.atten_layer_norm(kept + out)[0])
    return kept_rows


def splice(model, input_ids: Tensor, audio: list[Tensor]) -> Tensor:
    """Embeddings with each prompt's placeholder replaced, right-padded with zeros: (B, M, D)."""
    rows = []
    embed = model.get_input_embeddings()
    for ids, segment in zip(input_ids, audio):
        at = int(torch.where(ids == model.config.audio_token_id)[0][0])
        rows.append(torch.cat([embed(ids[:at]), segment.to(embed.weight.dtype), embed(ids[at + 1 :])]))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def splice_labels(model, input_ids: Tensor, labels: Tensor, audio: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """`splice` with labels (-100 on audio and padding) and the attention mask."""
    embeds = splice(model, input_ids, audio)
    new_labels, masks = [], []
    for ids, label, segment in zip(input_ids, labels, audio):
        at = int(torch.where(ids == model.config.audio_token_id)[0][0])
        new_labels.append(torch.cat([label[:at], label.new_full((len(segment),), -100), label[at + 1 :]]))
        masks.append(torch.ones_like(new_labels[-1]))
    pad = torch.nn.utils.rnn.pad_sequence
    return embeds, pad(new_labels, batch_first=True, padding_value=-100), pad(masks, batch_first=True)
