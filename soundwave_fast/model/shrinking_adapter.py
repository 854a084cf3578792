"""Shrinking adapter: keep the CTC peaks, let each look back at the frames by cross-attention; comes out packed.

Shape legend: B utterances, T frames, D width, Q kept frames in all, K keys in all, H heads, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from soundwave_fast.model.config import SoundwaveConfig
from soundwave_fast.ops import Packed, peak_gather, varlen_cross_attention
from soundwave_fast.ops.gemm import linear


class ShrinkingAdapter(nn.Module):
    """peaks -> look-back attention (query: kept frames) -> residual -> LayerNorm (paper section 3.3).

    Parameter names are the released checkpoint's (`lbm.encoder_attn`, `lbm.atten_layer_norm`); `nn.MultiheadAttention`
    holds the parameters only, the attention itself runs packed. `look_back_keys='frames'` lets a kept frame attend to
    every valid frame of its utterance (the paper); 'kept' to the kept frames alone (what the released weights saw).
    """

    def __init__(self, config: SoundwaveConfig) -> None:
        super().__init__()
        self.heads = config.text_config.num_attention_heads
        self.dropout = config.adapter_dropout
        self.backend = config.attention_backend
        self.keys = config.look_back_keys
        self.drop_blank = config.drop_blank
        self.select = config.peak_select
        self.blank = config.ctc_blank_id
        self.look_back = config.look_back
        if config.look_back:
            self.encoder_attn = nn.MultiheadAttention(config.hidden_size, self.heads, batch_first=True)
        self.atten_layer_norm = nn.LayerNorm(config.hidden_size)

    @torch.no_grad()
    def match_embedding(self, embedding_VD: Tensor) -> None:
        """Give the output the mean and spread of the LLM's token embeddings; look-back adds nothing yet.

        Only for training from scratch: LayerNorm's gain becomes the embeddings' standard deviation per dimension, its
        bias their mean, and the attention's output projection starts at 0.
        """
        rows = embedding_VD.float()
        self.atten_layer_norm.weight.copy_(rows.std(0))
        self.atten_layer_norm.bias.copy_(rows.mean(0))
        if self.look_back:
            self.encoder_attn.out_proj.weight.zero_()
            self.encoder_attn.out_proj.bias.zero_()

    @torch.no_grad()
    def fit_embedding(
        self,
        hidden_ND: Tensor,  # alignment-adapter frames at the peaks of some training speech
        tokens_N: Tensor,  # the CTC head's token of each, no blanks
        embedding_VD: Tensor,
        ridge: float = 1e-2,
        self_score: float = 72.0,
    ) -> float:
        """Start stage 2 with audio tokens the LLM can already read; returns the share of variance explained.

        A frame that the CTC head calls token k has a large product with the embedding of k, but does not lie near it:
        the LLM meets a foreign code, and LoRA alone takes hundreds of steps to learn it. So the look-back attention
        begins as 'look at yourself' (query and key projections are one multiple of the identity, self-score
        `self_score`; values pass unchanged) and its output projection is the ridge regression from frames to
        embeddings, every token type weighted alike. All of it goes on training.

        Raises:
            ValueError: no frames, or an adapter without look-back.
        """
        if not self.look_back:
            raise ValueError("look_back: without it the shrinking adapter has no projection to fit")
        if not len(tokens_N):
            raise ValueError("hidden_ND: no frames to fit")
        width = hidden_ND.shape[1]
        x, embedding = hidden_ND.double(), embedding_VD.double()
        mean, spread = embedding.mean(0), embedding.std(0).clamp_min(1e-8)
        wanted = (embedding[tokens_N] - mean) / spread
        weight = 1.0 / torch.bincount(tokens_N, minlength=len(embedding))[tokens_N].double()
        weighted = x * (weight / weight.mean())[:, None]
        gram = weighted.T @ x
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        linear = torch.linalg.solve(gram, weighted.T @ wanted)  # wanted ~ x @ linear
        fitted = x @ linear
        # as large as the frames themselves: the residual is subtracted, LayerNorm sets the final size
        scale = x.norm(dim=1).mean() / fitted.norm(dim=1).mean()
        eye = torch.eye(width, dtype=x.dtype, device=x.device)
        head_width = width // self.heads
        c = (self_score * head_width**0.5 / (x.square().sum(1).mean() / self.heads)).sqrt()
        attention = self.encoder_attn
        attention.in_proj_weight.copy_(torch.cat([c * eye, c * eye, eye]))
        attention.in_proj_bias.zero_()
        attention.out_proj.weight.copy_((scale * linear - eye).T)
        attention.out_proj.bias.zero_()
        self.atten_layer_norm.weight.copy_(spread * wanted.norm(dim=1).mean() / width**0.5)
        self.atten_layer_norm.bias.copy_(mean)
        return float(1 - (fitted - wanted).square().sum() / wanted.square().sum())

    def peaks(
        self,
        hidden_BTD: Tensor,
        tokens_BT: Tensor,  # (B, T) the CTC head's argmax
        lengths: Tensor,  # (B,) frames that count
        log_probs_BT: Tensor | None = None,  # probability of each frame's token, for peak_select='peak'
    ) -> Packed:  # .data (kept frames in all, D), .index flat b * T + t
        """The frames that are kept, as they are."""
        return peak_gather(
            hidden_BTD,
            tokens_BT,
            lengths,
            blank=self.blank,
            drop_blank=self.drop_blank,
            select=self.select,
            scores=log_probs_BT,
        )

    def forward(
        self, hidden_BTD: Tensor, tokens_BT: Tensor, lengths: Tensor, log_probs_BT: Tensor | None = None
    ) -> Packed:
        """`peaks`, after look-back, residual and LayerNorm: what the LLM reads."""
        peaks = self.peaks(hidden_BTD, tokens_BT, lengths, log_probs_BT)
        x_ND = peaks.data
        if self.look_back:
            x_ND = x_ND + self._attend(peaks, hidden_BTD, lengths)
        return peaks.with_data(self.atten_layer_norm(x_ND))

    def _attend(self, peaks: Packed, hidden_BTD: Tensor, lengths: Tensor) -> Tensor:
        """Look-back attention of the kept frames: (Q, D)."""
        attention = self.encoder_attn
        if self.keys == "kept":
            source, one = peaks, linear(peaks.data, attention.in_proj_weight, attention.in_proj_bias)
            q_QHd, k_KHd, v_KHd = self._heads(one, 3).unbind(1)
            return self._look(q_QHd, k_KHd, v_KHd, peaks, source)
        B, T, D = hidden_BTD.shape
        # Padding is left out where lengths are on the host. A GPU projects it too and waits for nothing, and so does
        # a compiled graph, whose sizes cannot follow values.
        eager_cpu = hidden_BTD.device.type == "cpu" and not torch.compiler.is_compiling()
        bounds = {} if eager_cpu else {"total": B * T, "max_len": T}
        source = Packed.from_padded(hidden_BTD, lengths, **bounds)
        w_q, w_kv = attention.in_proj_weight.split([D, 2 * D])
        b_q, b_kv = attention.in_proj_bias.split([D, 2 * D])
        q_QHd = self._heads(linear(peaks.data, w_q, b_q), 1).squeeze(1)
        k_KHd, v_KHd = self._heads(linear(source.data, w_kv, b_kv), 2).unbind(1)
        return self._look(q_QHd, k_KHd, v_KHd, peaks, source)

    def _heads(self, x: Tensor, parts: int) -> Tensor:
        return x.unflatten(-1, (parts, self.heads, -1))

    def _look(self, q_QHd: Tensor, k_KHd: Tensor, v_KHd: Tensor, peaks: Packed, source: Packed) -> Tensor:
        out_QHd = varlen_cross_attention(
            q_QHd,
            k_KHd,
            v_KHd,
            peaks.cu_seqlens,
            source.cu_seqlens,
            peaks.max_len,
            source.max_len,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        out_proj = self.encoder_attn.out_proj
        return linear(out_QHd.flatten(-2), out_proj.weight, out_proj.bias)
