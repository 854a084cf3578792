"""Speed perturbation and SpecAugment: functions of the seed and the draw, so that a resumed run repeats them."""

from __future__ import annotations

import random

import numpy as np
from torch import Tensor

from soundwave_fast.audio import MAX_SECONDS, SAMPLE_RATE


def speed_of(factors: tuple[float, ...], duration: float, seed: int, draw: int) -> float:
    """The draw's speed factor; 1 where none are given, or the slowed utterance would not fit a window."""
    if not factors:
        return 1.0
    factor = random.Random(f"{seed}/{draw}/speed").choice(factors)
    return factor if duration / factor <= MAX_SECONDS else 1.0


def change_speed(wave: np.ndarray, factor: float) -> np.ndarray:
    """Play a 16 kHz waveform (samples,) `factor` times as fast, pitch and all (Ko et al. 2015): samples / factor."""
    if factor == 1.0:
        return wave
    import soxr

    return soxr.resample(wave, SAMPLE_RATE * factor, SAMPLE_RATE)


def mask_spectrogram(mel: Tensor, length: int, policy: tuple[int, ...], seed: int, draw: int) -> Tensor:
    """SpecAugment (Park et al. 2019) without its time warp: stripes of a log-mel (mels, M) set to 0, in a copy.

    Zero lies within Whisper's normalised log-mel, and is what transformers' own Whisper masks with.

    Args:
        length: frames of speech; time masks fall there.
        policy: (frequency masks, most bins of each, time masks, most frames of each); () for none. A time mask takes
            at most a fifth of the speech.
    """
    if not policy:
        return mel
    rng = random.Random(f"{seed}/{draw}/spec")
    bands, most_bins, stretches, most_frames = policy
    mel = mel.clone()
    for _ in range(bands):
        width = rng.randint(0, min(most_bins, mel.shape[0]))
        start = rng.randint(0, mel.shape[0] - width)
        mel[start : start + width] = 0.0
    for _ in range(stretches):
        width = rng.randint(0, min(most_frames, length // 5))
        start = rng.randint(0, length - width)
        mel[:, start : start + width] = 0.0
    return mel
