"""Shorten any encoder's output to its CTC peaks, packed, and attend from them to all frames.

`python examples/pack_by_peaks.py` takes random features and tokens with long runs, keeps a frame per run, lets the kept
frames look back at their utterance, and pads the result for a model that wants a rectangle.
"""

from __future__ import annotations

import torch

from soundwave_fast.ops import Packed, peak_gather, varlen_cross_attention

B, T, H, D = 3, 40, 4, 32
BLANK = 0


def shorten(features: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor) -> Packed:
    """(B, T, H * D) features -> one row a run of equal tokens, blanks dropped, each with its look-back added."""
    kept = peak_gather(features, tokens, lengths, blank=BLANK, drop_blank=True)
    frames = Packed.from_padded(features, lengths)
    out = varlen_cross_attention(
        kept.data.view(-1, H, D),
        frames.data.view(-1, H, D),
        frames.data.view(-1, H, D),
        kept.cu_seqlens,
        frames.cu_seqlens,
        kept.max_len,
        frames.max_len,
    )
    return kept.with_data(kept.data + out.reshape(-1, H * D))


if __name__ == "__main__":
    torch.manual_seed(0)
    features = torch.randn(B, T, H * D, requires_grad=True)
    tokens = torch.randint(0, 4, (B, T // 5)).repeat_interleave(5, 1)  # runs of five frames
    lengths = torch.tensor([40, 25, 10])
    short = shorten(features, tokens, lengths)
    short.data.square().mean().backward()
    padded = short.to_padded()
    print(
        f"{int(lengths.sum())} frames -> {len(short.data)} rows {short.lengths.tolist()}, padded {tuple(padded.shape)}"
    )
