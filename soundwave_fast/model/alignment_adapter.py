"""Alignment adapter: two encoder frames stacked, a projection and one pre-norm transformer layer; CTC teaches it.

Shape legend: B utterances, T adapter frames, N rows (B T of them, or the frames that count), D width, E = encoder
width, H heads, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soundwave_fast.model.config import SoundwaveConfig
from soundwave_fast.ops import Packed, varlen_cross_attention
from soundwave_fast.ops.gemm import linear

STACK = 2  # encoder frames per adapter frame: 50 -> 25 frames a second


class AlignmentAdapter(nn.Module):
    """Linear(2 d_enc, D) -> TransformerEncoderLayer(D, FFN 2 D, pre-norm, ReLU) -> LayerNorm (paper section 3.2).

    Parameter names are the released checkpoint's. `adapter_attention='position'` reproduces the released code, whose
    layer is not batch_first and so attends over an axis of length 1: every frame sees only itself.
    `nn.TransformerEncoder` holds the parameters only; the layer itself is computed on rows, without padding on a CPU.
    """

    def __init__(self, config: SoundwaveConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.over_time = config.adapter_attention == "time"
        self.heads = config.text_config.num_attention_heads
        self.mm_projector1 = nn.Linear(STACK * config.audio_config.d_model, hidden)
        layer = nn.TransformerEncoderLayer(
            d_model=hidden,
            nhead=self.heads,
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
        B, T, lengths = *stacked.shape[:2], lengths // STACK
        # Padding is left out where the lengths are on the host; elsewhere every row is work and nothing is waited for.
        packed = None
        if stacked.device.type == "cpu" and not torch.compiler.is_compiling():
            packed = Packed.from_padded(stacked, lengths)
        x_ND = stacked.flatten(0, 1) if packed is None else packed.data
        x_ND = linear(x_ND, self.mm_projector1.weight, self.mm_projector1.bias)
        layer = self.asr_transformer_encoder.layers[0]
        x_ND = x_ND + layer.dropout1(self._attend(layer.self_attn, layer.norm1(x_ND), packed, lengths, T))
        wide = torch.relu(linear(layer.norm2(x_ND), layer.linear1.weight, layer.linear1.bias))
        x_ND = x_ND + layer.dropout2(linear(layer.dropout(wide), layer.linear2.weight, layer.linear2.bias))
        x_ND = self.out_norm(x_ND)
        if packed is None:
            return x_ND.unflatten(0, (B, T)), lengths
        padded = x_ND.new_zeros(B * T, x_ND.shape[1]).index_copy(0, packed.index, x_ND)
        return padded.unflatten(0, (B, T)), lengths

    def _attend(self, attention: nn.Module, x_ND: Tensor, packed: Packed | None, lengths: Tensor, T: int) -> Tensor:
        """The layer's self-attention of rows: all (B T) of them, or the packed ones; (N, D)."""
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        dropout_p = attention.dropout if self.training else 0.0
        if not self.over_time:
            # One key to a query: its weight is 1 whatever the query, so two of the three projections say nothing.
            out_ND = linear(x_ND, weight.chunk(3)[2], bias.chunk(3)[2])
            if dropout_p:
                kept = F.dropout(out_ND.new_ones(out_ND.shape[0], self.heads, 1), dropout_p)
                out_ND = (out_ND.unflatten(1, (self.heads, -1)) * kept).flatten(1)
            return linear(out_ND, attention.out_proj.weight, attention.out_proj.bias)
        qkv = linear(x_ND, weight, bias)
        if packed is not None:
            q_NHd, k_NHd, v_NHd = qkv.unflatten(1, (3, self.heads, -1)).unbind(1)
            seqlens = (packed.cu_seqlens, packed.cu_seqlens, packed.max_len, packed.max_len)
            out_NHd = varlen_cross_attention(q_NHd, k_NHd, v_NHd, *seqlens, dropout_p=dropout_p, backend="torch")
            return linear(out_NHd.flatten(1), attention.out_proj.weight, attention.out_proj.bias)
        q_BHTd, k_BHTd, v_BHTd = qkv.unflatten(1, (3, self.heads, -1)).unflatten(0, (-1, T)).transpose(1, 3).unbind(2)
        real = torch.arange(T, device=x_ND.device) < lengths[:, None].clamp_min(1)
        out_BHTd = F.scaled_dot_product_attention(
            q_BHTd, k_BHTd, v_BHTd, attn_mask=real[:, None, None], dropout_p=dropout_p
        )
        out_ND = out_BHTd.transpose(1, 2).flatten(2).flatten(0, 1)
        return linear(out_ND, attention.out_proj.weight, attention.out_proj.bias)
