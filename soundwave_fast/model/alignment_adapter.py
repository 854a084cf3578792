"""Alignment adapter: two encoder frames stacked, a projection and one pre-norm transformer layer; CTC teaches it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from soundwave_fast.model.config import SoundwaveConfig

STACK = 2  # encoder frames per adapter frame: 50 -> 25 frames a second


class AlignmentAdapter(nn.Module):
    """Linear(2 d_enc, D) -> TransformerEncoderLayer(D, FFN 2 D, pre-norm, ReLU) -> LayerNorm (paper section 3.2).

    Parameter names are the released checkpoint's. `adapter_attention='position'` reproduces the released code, whose
    layer is not batch_first and so attends over an axis of length 1: every frame sees only itself.
    """

    def __init__(self, config: SoundwaveConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.over_time = config.adapter_attention == "time"
        self.mm_projector1 = nn.Linear(STACK * config.audio_config.d_model, hidden)
        layer = nn.TransformerEncoderLayer(
            d_model=hidden,
            nhead=config.text_config.num_attention_heads,
            dim_feedforward=2 * hidden,
            dropout=config.adapter_dropout,
            norm_first=True,
            batch_first=True,
        )
        self.asr_transformer_encoder = nn.TransformerEncoder(layer, num_layers=1, enable_nested_tensor=False)
        self.out_norm = nn.LayerNorm(hidden)

    def forward(
        self,
        frames_BTE: Tensor,  # (B, T50, d_enc) encoder frames, 50 a second
        lengths: Tensor,  # (B,) encoder frames that count
    ) -> tuple[Tensor, Tensor]:  # (B, T25, D), (B,) adapter frames that count
        """Frames past `lengths` are masked out as keys; their own rows are unspecified."""
        # unfold, not a slice to an even length: torch.compile would guard on whether the length was odd
        stacked = frames_BTE.unfold(1, STACK, STACK).transpose(2, 3).flatten(2)
        lengths = lengths // STACK
        x_BTD = self.mm_projector1(stacked)
        if self.over_time:
            padding = torch.arange(x_BTD.shape[1], device=x_BTD.device) >= lengths[:, None].clamp_min(1)
            # float mask: the boolean one sends nn.TransformerEncoderLayer down a nested-tensor path at inference
            mask = torch.zeros_like(padding, dtype=x_BTD.dtype).masked_fill(padding, float("-inf"))
            x_BTD = self.asr_transformer_encoder(x_BTD, src_key_padding_mask=mask)
        else:
            x_BTD = self.asr_transformer_encoder(x_BTD.reshape(-1, 1, x_BTD.shape[-1])).view_as(x_BTD)
        return self.out_norm(x_BTD), lengths
