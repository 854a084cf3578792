"""Audio in: any file libsndfile reads, any rate, any channels -> mono float32 at 16 kHz."""

from __future__ import annotations

from pathlib import Path

import numpy as np

SAMPLE_RATE = 16_000
MAX_SECONDS = 30.0  # one Whisper window
MIN_SECONDS = 1.0  # shorter audio is padded with silence: the CTC needs a few frames to speak into


def load_audio(path: str | Path) -> np.ndarray:
    """Mono float32 waveform at 16 kHz, (samples,).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not audio, empty, or with samples that are not finite.
    """
    import soundfile

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such audio file")
    try:
        wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise ValueError(f"{path}: cannot be read as audio ({error})") from None
    return as_mono_16k(wave.mean(1), rate, str(path))


def as_mono_16k(wave: np.ndarray, rate: int, name: str = "audio") -> np.ndarray:
    """Resample a mono waveform (samples,) at `rate` Hz to 16 kHz and check it.

    Raises:
        ValueError: empty, more than one axis, not finite, or an impossible rate.
    """
    wave = np.asarray(wave, dtype=np.float32)
    if wave.ndim != 1:
        raise ValueError(f"{name}: expected a mono waveform (samples,), got shape {wave.shape}")
    if not len(wave):
        raise ValueError(f"{name}: holds no samples")
    if rate <= 0:
        raise ValueError(f"{name}: sampling rate {rate} Hz")
    if not np.isfinite(wave).all():
        raise ValueError(f"{name}: holds samples that are not finite")
    if rate != SAMPLE_RATE:
        import soxr

        wave = soxr.resample(wave, rate, SAMPLE_RATE)
    return wave


def trim_end(wave: np.ndarray, margin_seconds: float = 0.25) -> np.ndarray:
    """Drop the silence at the end of a 16 kHz waveform (samples,), but for a margin.

    Silence: 50 ms blocks whose RMS stays under twice the recording's own floor (20th percentile), and under a tenth and
    over a hundredth of its loudest block. With seconds of it behind the words CTC settles on emitting the last of them
    there, anywhere (bench/LOG.md); and it costs encoder time.
    """
    block = SAMPLE_RATE // 20
    count = len(wave) // block
    if count < 2:
        return wave
    rms = np.sqrt(np.square(wave[: count * block], dtype=np.float64).reshape(count, block).mean(1))
    threshold = min(max(2 * np.percentile(rms, 20), 0.01 * rms.max()), 0.1 * rms.max())
    loud = np.flatnonzero(rms > threshold)
    if not len(loud):
        return wave
    return wave[: min(len(wave), (loud[-1] + 1) * block + int(margin_seconds * SAMPLE_RATE))]


def windows(wave: np.ndarray, seconds: float = MAX_SECONDS) -> list[np.ndarray]:
    """Cut a long waveform into windows of at most `seconds`, each cut at the quietest 50 ms of its last 3 s."""
    limit, tail, step = int(seconds * SAMPLE_RATE), 3 * SAMPLE_RATE, SAMPLE_RATE // 20
    pieces = []
    while len(wave) > limit:
        energy = np.square(wave[limit - tail : limit]).reshape(-1, step).sum(1)
        cut = limit - tail + int(energy.argmin()) * step + step // 2
        pieces.append(wave[:cut])
        wave = wave[cut:]
    return [*pieces, wave]
