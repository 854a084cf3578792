"""Audio in: any file libsndfile reads, any rate, any channels -> mono float32 at 16 kHz, whole or window by window."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SAMPLE_RATE = 16_000
MAX_SECONDS = 30.0  # one Whisper window
MIN_SECONDS = 1.0  # shorter audio is padded with silence: the CTC needs a few frames to speak into
MIN_WINDOW = 5.0  # s, the shortest window a recording may be cut into
SILENCE = 2.0**-13  # 4 steps of 16-bit audio: what is never louder is silence, and is not asked what it says
LOUDEST = 2.0**31  # float32 power would overflow beyond; audio is meant to be within +-1, more is taken as it is

_BLOCK_SECONDS = 10.0  # read at a time
_STEP = SAMPLE_RATE // 20  # 50 ms, the grain in which loudness is looked at
_GRID = 640  # samples of one adapter frame (40 ms): windows begin on it, so that times do too
_MIN_PAUSE = 4  # steps of quiet that count as a pause: the closure of a stop consonant is shorter
_LONG_PAUSE = 20  # steps; a longer pause is no better a place to cut


def load_audio(path: str | Path) -> np.ndarray:
    """Mono float32 waveform at 16 kHz, (samples,).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not audio, empty, or with samples that are not finite.
    """
    return np.concatenate(list(read_blocks(path)))


def read_blocks(audio: str | Path | np.ndarray, seconds: float = _BLOCK_SECONDS) -> Iterator[np.ndarray]:
    """Mono float32 blocks at 16 kHz, (samples,), of a file read bit by bit, or of a 16 kHz waveform (samples,).

    Joined they are `load_audio(path)`; none is empty. Memory: one block, however long the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not audio, empty, or (at the block that holds them) samples that are not finite.
    """
    if isinstance(audio, np.ndarray):
        wave = as_mono_16k(audio, SAMPLE_RATE)
        size = int(seconds * SAMPLE_RATE)
        yield from (wave[start : start + size] for start in range(0, len(wave), size))
        return
    import soundfile
    import soxr

    path, count = Path(audio), 0
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such audio file")
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            stream = None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")
            blocks = file.blocks(max(1, int(seconds * rate)), dtype="float32", always_2d=True)
            for block in blocks:
                wave = _checked(block.mean(1), str(path))
                wave = wave if stream is None else stream.resample_chunk(wave)
                count += len(wave)
                if len(wave):
                    yield wave
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:  # TypeError: headerless formats
        raise ValueError(f"{path}: cannot be read as audio ({error})") from None
    if stream is not None:
        rest = stream.resample_chunk(np.zeros(0, np.float32), last=True)
        count += len(rest)
        if len(rest):
            yield rest
    if not count:
        raise ValueError(f"{path}: holds no samples")


def _checked(wave: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(wave).all():
        raise ValueError(f"{name}: holds samples that are not finite")
    if len(wave) and np.abs(wave).max() > LOUDEST:
        raise ValueError(f"{name}: holds samples beyond 2^31; audio is expected within +-1")
    return wave


def as_mono_16k(wave: np.ndarray, rate: int, name: str = "audio") -> np.ndarray:
    """Resample a mono waveform (samples,) at `rate` Hz to 16 kHz and check it.

    Integers of 8, 16 or 32 bits are scaled to +-1; unsigned ones are offset binary, as in WAV and as sox and ffmpeg
    read them: uint8 silence is 128.

    Raises:
        TypeError: samples of another kind: bool, complex, 64-bit integers (their full scale is anybody's guess).
        ValueError: empty, more than one axis, not finite, beyond 2^31, or an impossible rate.
    """
    wave = _as_float32(np.asarray(wave), name)
    if wave.ndim != 1:
        raise ValueError(f"{name}: expected a mono waveform (samples,), got shape {wave.shape}")
    if not len(wave):
        raise ValueError(f"{name}: holds no samples")
    if not 0 < rate < np.inf:
        raise ValueError(f"{name}: sampling rate {rate} Hz")
    wave = _checked(wave, name)
    if rate != SAMPLE_RATE:
        import soxr

        wave = soxr.resample(wave, rate, SAMPLE_RATE)
        if not len(wave):
            raise ValueError(f"{name}: holds no samples at 16 kHz")
    return wave


def _as_float32(wave: np.ndarray, name: str) -> np.ndarray:
    kind, size = wave.dtype.kind, wave.dtype.itemsize
    if kind == "f":
        return wave.astype(np.float32, copy=False)
    if kind not in "iu" or size == 8:
        raise TypeError(f"{name}: samples are floats or integers of 8, 16 or 32 bits, got {wave.dtype}")
    half = 1 << (8 * size - 1)
    if kind == "u":  # the top bit flipped, offset binary is two's complement: exact, without a wider integer
        wave = (wave ^ wave.dtype.type(half)).view(f"i{size}")
    return wave.astype(np.float32) * np.float32(1 / half)


def is_silent(wave: np.ndarray) -> bool:
    """Whether a waveform is never louder than `SILENCE`."""
    return not len(wave) or float(np.abs(wave).max()) <= SILENCE


def _loudness(wave: np.ndarray) -> np.ndarray:
    """RMS of each whole 50 ms."""
    count = len(wave) // _STEP
    return np.sqrt(np.square(wave[: count * _STEP], dtype=np.float64).reshape(count, _STEP).mean(1))


def _quiet_below(rms: np.ndarray) -> float:
    """Twice the recording's own floor (20th percentile), and within a hundredth and a tenth of its loudest step."""
    return min(max(2 * np.percentile(rms, 20), 0.01 * rms.max()), 0.1 * rms.max())


def trim_end(wave: np.ndarray, margin_seconds: float = 0.25) -> np.ndarray:
    """Drop the silence at the end of a 16 kHz waveform (samples,), but for a margin.

    Silence: 50 ms blocks whose RMS stays under twice the recording's own floor (20th percentile), and under a tenth and
    over a hundredth of its loudest block. With seconds of it behind the words CTC settles on emitting the last of them
    there, anywhere (bench/LOG.md); and it costs encoder time.
    """
    if len(wave) < 2 * _STEP:
        return wave
    rms = _loudness(wave)
    loud = np.flatnonzero(rms > _quiet_below(rms))
    if not len(loud):
        return wave
    return wave[: min(len(wave), (loud[-1] + 1) * _STEP + int(margin_seconds * SAMPLE_RATE))]


@dataclass(frozen=True)
class Window:
    """A stretch of a recording that the encoder takes at once."""

    wave: np.ndarray  # (samples,) mono float32 at 16 kHz
    start: float  # s, where in the recording it begins
    overlap: float = 0.0  # s at its beginning that the window before holds too; 0 where a pause parts them


def find_cut(wave: np.ndarray) -> tuple[int, bool]:
    """Where best to end a window that could hold all of `wave` (samples,): (sample, whether there is a pause).

    The middle of the longest pause (0.2 s or more of quiet, see `trim_end`) in the last third; of equally long ones
    the last, and a second is as good as a minute. Without one, the quietest 50 ms of the last 3 s, at most a third.
    """
    rms = _loudness(wave)
    first = len(rms) * 2 // 3
    quiet = np.concatenate([[False], rms[first:] <= _quiet_below(rms), [False]])
    begins, ends = np.flatnonzero(np.diff(quiet.astype(np.int8))).reshape(-1, 2).T
    lengths = np.minimum(ends - begins, _LONG_PAUSE)
    if len(lengths) and lengths.max() >= _MIN_PAUSE:
        best = np.flatnonzero(lengths == lengths.max())[-1]
        cut, pause = int(first + begins[best]) * _STEP + int(ends[best] - begins[best]) * _STEP // 2, True
    else:
        first = max(first, len(rms) - 60)
        cut, pause = (first + int(rms[first:].argmin())) * _STEP + _STEP // 2, False
    return max(_GRID, cut // _GRID * _GRID), pause


def check_window(seconds: float) -> None:
    """Raises ValueError for a window length (s) that no recording can be cut into."""
    if not MIN_WINDOW <= seconds <= MAX_SECONDS:
        raise ValueError(f"window_seconds: a window lasts {MIN_WINDOW:.0f} to {MAX_SECONDS:.0f} s, got {seconds:g}")


def read_windows(
    audio: str | Path | np.ndarray, seconds: float = MAX_SECONDS, overlap_seconds: float = 4.0
) -> Iterator[Window]:
    """Windows of at most `seconds` of a file or 16 kHz waveform of any length, cut in pauses (`find_cut`).

    Where the speaker makes none, a window ends at its limit and the next begins `overlap_seconds` (at most a quarter
    of a window) before it: what both hold is for the caller to sort out. Starts are multiples of 40 ms. Memory: one
    window and one block.

    Raises:
        FileNotFoundError, ValueError: as `read_blocks`; `seconds` outside 5 ... 30.
    """
    check_window(seconds)
    limit = int(seconds * SAMPLE_RATE) // _GRID * _GRID
    lap = int(min(overlap_seconds, seconds / 4) * SAMPLE_RATE) // _GRID * _GRID
    rest, start, shared = np.zeros(0, np.float32), 0, 0
    for block in read_blocks(audio):
        rest = np.concatenate([rest, block])
        while len(rest) > limit:
            cut, pause = find_cut(rest[:limit])
            end, step = (cut, cut) if pause else (limit, limit - lap)
            yield Window(rest[:end].copy(), start / SAMPLE_RATE, shared / SAMPLE_RATE)
            rest, start, shared = rest[step:], start + step, end - step
    yield Window(rest, start / SAMPLE_RATE, shared / SAMPLE_RATE)


def windows(wave: np.ndarray, seconds: float = MAX_SECONDS) -> list[np.ndarray]:
    """Cut a long 16 kHz waveform into pieces of at most `seconds`, at pauses or else where it is quietest."""
    limit, pieces = int(seconds * SAMPLE_RATE), []
    while len(wave) > limit:
        cut, _ = find_cut(wave[:limit])
        pieces.append(wave[:cut])
        wave = wave[cut:]
    return [*pieces, wave]
