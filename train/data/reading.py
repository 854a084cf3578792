"""One utterance's waveform: a file or a stretch of one, or the named cause why it cannot be used."""

from __future__ import annotations

import numpy as np

from soundwave_fast.audio import MAX_SECONDS, SAMPLE_RATE, as_mono_16k
from train.data.utterance import Utterance

CAUSES = ("missing", "corrupt", "empty", "not finite", "too long", "too short")
SLACK = 0.02  # s: durations in manifests are rounded
LIE_SECONDS, LIE_SHARE = 1.0, 0.1  # audio longer than its row says by more than both breaks the bound on a batch


class BadAudio(ValueError):
    """Audio that cannot be used; `cause` is one of `CAUSES`."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        assert cause in CAUSES
        self.cause = cause


def load(row: Utterance, min_seconds: float = 0.0, max_seconds: float = MAX_SECONDS) -> np.ndarray:
    """Mono float32 waveform at 16 kHz, (samples,).

    Raises:
        BadAudio: no such file, not audio, no samples, samples that are not finite, or a length that is out of bounds or
            well above the row's own duration (which batches are made by).
    """
    import soundfile

    if not row.audio.is_file():
        raise BadAudio("missing", f"{row.audio}: no such audio file")
    try:
        with soundfile.SoundFile(row.audio) as file:
            rate = file.samplerate
            if row.start:
                file.seek(min(round(row.start * rate), file.frames))
            # a second more than allowed is enough to know that it is too long
            wanted = row.duration if row.is_segment else max_seconds + 1
            wave = file.read(max(1, round(wanted * rate)), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:  # TypeError: headerless formats
        raise BadAudio("corrupt", f"{row.audio}: cannot be read as audio ({error})") from None
    if row.channel is not None and row.channel >= wave.shape[1]:
        raise BadAudio("corrupt", f"{row.audio}: has {wave.shape[1]} channels, its row names number {row.channel}")
    wave = wave.mean(1) if row.channel is None else wave[:, row.channel]
    if not len(wave):
        raise BadAudio("empty", f"{row.audio}: holds no samples")
    if not np.isfinite(wave).all():
        raise BadAudio("not finite", f"{row.audio}: holds samples that are not finite")
    seconds = len(wave) / rate
    allowed = max(row.duration + LIE_SECONDS, row.duration * (1 + LIE_SHARE))
    if seconds > min(max_seconds + SLACK, allowed):
        raise BadAudio("too long", f"{row.audio}: {seconds:.1f} s; its row says {row.duration:.1f} s")
    if seconds < min_seconds:
        raise BadAudio("too short", f"{row.audio}: {seconds:.2f} s")
    return as_mono_16k(wave, rate, str(row.audio))[: int(max_seconds * SAMPLE_RATE)]
