"""Frozen Whisper encoder on a batch of any length up to 30 s: each utterance gets exactly what it would get alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

MEL_PER_FRAME = 2  # conv2 has stride 2: 100 mel frames/s -> 50 encoder frames/s
# Silence encoded past an utterance's end and then dropped. The frame at the cut looks like no other, and CTC takes the
# shortcut: it learns to emit an utterance's last words there at once instead of where they are said (bench/LOG.md).
EDGE_MELS = 8


def count_mels(
    input_features: Tensor,  # (N, mels, M)
    feature_lengths: Tensor | None = None,  # (N,)
    input_features_mask: Tensor | None = None,  # (N, M), 1 on the frames that count, which come first
) -> Tensor:  # (N,)
    """Mel frames that count, of either way to say it.

    Raises:
        ValueError: both or neither given, a shape that does not fit, or (where values can be read without waiting for
            an accelerator) a mask with frames that count behind one that does not.
    """
    if (feature_lengths is None) == (input_features_mask is None):
        which = "neither is" if feature_lengths is None else "both are"
        raise ValueError(f"feature_lengths, input_features_mask: one of them is needed with audio, {which} given")
    N, M = input_features.shape[0], input_features.shape[-1]
    if feature_lengths is not None:
        if feature_lengths.shape != (N,):
            raise ValueError(f"feature_lengths must be ({N},), got {tuple(feature_lengths.shape)}")
        return feature_lengths
    if input_features_mask.shape != (N, M):
        raise ValueError(f"input_features_mask must be ({N}, {M}), got {tuple(input_features_mask.shape)}")
    counts = input_features_mask != 0
    if counts.device.type == "cpu" and not torch.compiler.is_compiling() and (counts[:, 1:] > counts[:, :-1]).any():
        raise ValueError("input_features_mask must be 1 on the first frames of an utterance and 0 on the rest")
    return counts.sum(-1)


def encode_frames(
    encoder: WhisperEncoder,
    input_features: Tensor,  # (B, mels, M) log-mel, M <= 3000, zeros past each utterance's end
    mel_lengths: Tensor | None,  # (B,) mel frames that count; None: all of them
) -> Tensor:  # (B, M // 2, d_model); rows past an utterance's end are unspecified
    """Whisper encoder over the first `M` mel frames with sliced positions and masked padding.

    `WhisperEncoder.forward` insists on 30 s. Here padding is masked where it could leak: after conv1 (so that conv2
    sees the zeros it would see alone) and in every self-attention. On a full 30 s window the result equals
    `WhisperEncoder.forward`; without lengths there is no mask, and attention may take its fastest road.

    Raises:
        ValueError: more mel frames than the encoder has positions for, or padding and an attention without masks.
    """
    mels = input_features.shape[-1]
    positions = encoder.embed_positions.weight
    if mels > MEL_PER_FRAME * positions.shape[0]:
        raise ValueError(
            f"input_features: {mels} mel frames, the encoder takes at most {MEL_PER_FRAME * positions.shape[0]} (30 s)"
        )
    attention = encoder.config._attn_implementation or ""
    if mel_lengths is not None and "flash" in attention:
        raise ValueError(
            f"attn_implementation: {attention} takes no padding mask, which encoder_pad='longest' needs; "
            "pass {'audio_config': 'sdpa'}"
        )
    x_BDM = F.gelu(encoder.conv1(input_features.to(encoder.conv1.weight.dtype)))
    if mel_lengths is not None:
        valid_BM = torch.arange(mels, device=input_features.device) < mel_lengths[:, None]
        x_BDM = x_BDM * valid_BM[:, None].to(x_BDM.dtype)
    x_BTD = F.gelu(encoder.conv2(x_BDM)).transpose(1, 2)
    frames = x_BTD.shape[1]
    x_BTD = x_BTD + positions[:frames].to(x_BTD.dtype)
    mask_B1TT = None
    if mel_lengths is not None:
        valid_BT = valid_BM[:, ::MEL_PER_FRAME]
        # additive form: what every attention implementation of the layers accepts
        mask_BT = torch.zeros_like(valid_BT, dtype=x_BTD.dtype).masked_fill(~valid_BT, torch.finfo(x_BTD.dtype).min)
        mask_B1TT = mask_BT[:, None, None, :].expand(-1, 1, frames, -1)
    for layer in encoder.layers:
        x_BTD = layer(x_BTD, mask_B1TT)
        x_BTD = x_BTD[0] if isinstance(x_BTD, tuple) else x_BTD
    return encoder.layer_norm(x_BTD)
