"""Reads one manifest row's audio and measures what decides whether it can be used at all."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from soundwave_fast.audio import SAMPLE_RATE, as_mono_16k

_BLOCK = 0.05  # seconds, of the level


@dataclass(frozen=True)
class Sound:
    """A decoded utterance; `error` tells why there is none."""

    wave: np.ndarray | None = None  # mono float32 at 16 kHz, (samples,)
    duration: float = 0.0  # seconds, of the samples
    level_db: float | None = None  # RMS of the loudest 50 ms, dB of full scale
    clipped: float = 0.0  # share of the samples that lie on a flat top
    hash: str = ""  # of the decoded samples
    error: str = ""


def read_samples(row: dict) -> tuple[np.ndarray, int]:
    """Mono float32 samples of the row's file, or of its `start` ... `start + duration`, and their rate in Hz.

    Raises:
        OSError, RuntimeError, ValueError: no such file, not audio, no such channel, nothing there.
    """
    import soundfile

    with soundfile.SoundFile(row["audio"]) as file:
        frames = -1
        if row.get("is_segment", "start" in row):  # as train/data/manifest.py has it
            file.seek(min(round(row.get("start", 0) * file.samplerate), file.frames))
            frames = max(1, round(row["duration"] * file.samplerate))
        samples = file.read(frames, dtype="float32", always_2d=True)
        rate = file.samplerate
    channel = row.get("channel")
    if channel is not None and samples.shape[1] > 1:
        if channel >= samples.shape[1]:
            raise ValueError(f"no channel {channel}")
        return np.ascontiguousarray(samples[:, channel]), rate
    return samples.mean(1), rate


def listen(row: dict) -> Sound:
    """Decode and measure; never raises for what is wrong with the file."""
    try:
        samples, rate = read_samples(row)
        wave = as_mono_16k(samples, rate)
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        return Sound(error=(str(error).splitlines() or [type(error).__name__])[0])
    return Sound(
        wave=wave,
        duration=round(len(samples) / rate, 4),
        level_db=round(level_db(wave), 1),
        clipped=round(flat_share(samples), 5),
        hash=sample_hash(samples, rate),
    )


def level_db(wave: np.ndarray) -> float:
    """RMS of the loudest 50 ms of a 16 kHz waveform (samples,), in dB of full scale; -120 for digital silence."""
    block = int(_BLOCK * SAMPLE_RATE)
    whole = np.pad(wave, (0, -len(wave) % block)) if len(wave) % block else wave
    rms = np.sqrt(np.square(whole, dtype=np.float64).reshape(-1, block).mean(1)).max()
    return float(20 * np.log10(max(rms, 1e-6)))


def flat_share(samples: np.ndarray) -> float:
    """Share of (samples,) in runs of at least three that stay within 0.1 % of the largest amplitude.

    Clipping leaves flat tops; they stay flat when the clipped recording is made quieter afterwards, which a count of
    full-scale samples would miss.
    """
    loud = np.abs(samples)
    peak = loud.max(initial=0.0)
    if peak < 1e-3:
        return 0.0
    top = loud >= 0.999 * peak
    edges = np.flatnonzero(np.diff(np.concatenate([[False], top, [False]]).astype(np.int8)))
    lengths = edges[1::2] - edges[::2]
    return float(lengths[lengths >= 3].sum() / len(samples))


def sample_hash(samples: np.ndarray, rate: int) -> str:
    """Of what the file decodes to, at 16 bits: the same in wav and flac, whatever the file's name and tags."""
    quantised = np.clip(np.round(samples * 32768), -32768, 32767).astype("<i2")
    return hashlib.blake2b(quantised.tobytes(), digest_size=12, salt=rate.to_bytes(4, "little")).hexdigest()
