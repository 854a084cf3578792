"""peak_times: when each kept CTC frame is, which token it stands for, and how sure the head was.

Shape legend: B utterances, T frames, N kept frames.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PeakTimes(NamedTuple):
    """One entry a kept frame, in order; -1, -1 and 0 where the index holds none."""

    seconds: Tensor  # (N,) float32, where the frame begins
    tokens: Tensor  # (N,) tokens' dtype
    probabilities: Tensor  # (N,) log_probs' dtype


def peak_times(
    index: Tensor,  # (N,) flat positions b * T + t: `Packed.index`, or what ctc_peaks returns; -1 for none
    tokens: Tensor,  # (B, T) what the CTC head said in each frame
    log_probs: Tensor,  # (B, T) its log-probability
    frame_seconds: float = 0.04,
) -> PeakTimes:
    """Time, token and probability of the kept frames, cut into utterances by the same cu_seqlens as the index.

    Frames begin at multiples of frame_seconds (40 ms for Soundwave's adapter frames). No host sync, no gradient.

    Raises ValueError when shapes disagree.
    """
    if index.dim() != 1:
        raise ValueError(f"index must be (N,), got {tuple(index.shape)}")
    if tokens.dim() != 2 or log_probs.shape != tokens.shape:
        raise ValueError(
            f"tokens and log_probs must both be (B, T), got {tuple(tokens.shape)} and {tuple(log_probs.shape)}"
        )
    if tokens.numel() == 0:  # nothing can be kept
        empty = index.new_full(index.shape, -1)
        return PeakTimes(empty.float(), empty.to(tokens.dtype), log_probs.new_zeros(index.shape))
    none = index < 0
    at = index.masked_fill(none, 0)
    seconds = (at % tokens.shape[1]).float() * frame_seconds
    probabilities = log_probs.detach().reshape(-1)[at].exp()
    return PeakTimes(
        seconds.masked_fill(none, -1), tokens.reshape(-1)[at].masked_fill(none, -1), probabilities.masked_fill(none, 0)
    )
