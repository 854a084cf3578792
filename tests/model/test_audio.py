"""Audio in: any rate and channels to mono 16 kHz, bad files named, long ones cut where it is quiet."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

from soundwave_fast.audio import SAMPLE_RATE, as_mono_16k, load_audio, windows


def tone(seconds: float, rate: int) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_rates_channels_and_kinds(tmp_path, rate, channels, kind):
    path = tmp_path / f"a.{kind}"
    soundfile.write(path, np.stack([tone(1.0, rate)] * channels, 1), rate)
    wave = load_audio(path)
    assert wave.dtype == np.float32 and wave.shape == (SAMPLE_RATE,)
    middle = slice(2000, 14_000)  # a resampler's ends ring
    assert np.abs(wave - tone(1.0, SAMPLE_RATE))[middle].max() < 1e-3


def test_bad_files_are_named(tmp_path):
    text, empty = tmp_path / "text.wav", tmp_path / "empty.wav"
    text.write_text("no audio")
    soundfile.write(empty, np.zeros(0, np.float32), 16_000)
    for path, message in ((text, "cannot be read as audio"), (empty, "holds no samples")):
        with pytest.raises(ValueError, match=message) as error:
            load_audio(path)
        assert str(path) in str(error.value)
    with pytest.raises(FileNotFoundError, match="no such audio file"):
        load_audio(tmp_path / "gone.wav")
    with pytest.raises(ValueError, match="sampling rate 0 Hz"):
        as_mono_16k(tone(1, 16_000), 0)


def test_windows_lose_nothing_and_cut_where_it_is_quiet():
    wave = np.random.default_rng(0).standard_normal(75 * SAMPLE_RATE).astype(np.float32)
    pauses = [28.5, 57.0]
    for pause in pauses:
        wave[int(pause * SAMPLE_RATE) : int((pause + 0.3) * SAMPLE_RATE)] = 0
    pieces = windows(wave)
    assert np.array_equal(np.concatenate(pieces), wave)
    assert all(len(piece) <= 30 * SAMPLE_RATE for piece in pieces)
    cuts = np.cumsum([len(piece) for piece in pieces])[:-1] / SAMPLE_RATE
    assert len(cuts) == 2 and all(0 <= cut - pause <= 0.3 for cut, pause in zip(cuts, pauses))


@pytest.mark.parametrize("seconds", [0.1, 30.0])
def test_what_fits_stays_whole(seconds):
    wave = tone(seconds, SAMPLE_RATE)
    assert [len(piece) for piece in windows(wave)] == [len(wave)]
