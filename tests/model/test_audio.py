"""Audio in: any rate and channels to mono 16 kHz, bad files named, long ones cut where it is quiet."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

from soundwave_fast.audio import SAMPLE_RATE, as_mono_16k, is_silent, load_audio, windows


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


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf")])
def test_impossible_rates(rate):
    with pytest.raises(ValueError, match="audio: sampling rate"):
        as_mono_16k(tone(1, 16_000), rate)


@pytest.mark.parametrize("kind", ["i1", "<i2", ">i2", "i4", "u1", "<u2", ">u2", "u4"])
def test_integers_are_scaled(kind):
    """Silence in the middle of the range, its ends -1 and just under 1; unsigned is offset binary."""
    info = np.iinfo(kind)
    middle = (int(info.min) + int(info.max) + 1) // 2
    wave = as_mono_16k(np.array([info.min, middle, middle + (1 << info.bits - 2), info.max], kind), SAMPLE_RATE)
    assert wave.dtype == np.float32
    assert wave.tolist() == [-1.0, 0.0, 0.5, np.float32(1 - 2.0 ** (1 - info.bits))]
    ramp = np.linspace(int(info.min), int(info.max), 999).astype(np.int64)
    assert np.allclose(as_mono_16k(ramp.astype(kind), SAMPLE_RATE), (ramp - middle) / 2.0 ** (info.bits - 1), atol=1e-7)
    assert is_silent(as_mono_16k(np.full(100, middle, kind), SAMPLE_RATE))


def test_eight_bit_samples_are_what_libsndfile_reads(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(0.5, SAMPLE_RATE), SAMPLE_RATE, subtype="PCM_U8")
    raw = np.frombuffer((tmp_path / "a.wav").read_bytes().split(b"data", 1)[1][4:], np.uint8)[: SAMPLE_RATE // 2]
    assert np.array_equal(as_mono_16k(raw, SAMPLE_RATE), load_audio(tmp_path / "a.wav"))


@pytest.mark.parametrize("kind", ["int64", "uint64", "bool", "complex64", "object", "str"])
def test_what_is_no_sample(kind):
    with pytest.raises(TypeError, match="audio: samples are floats or integers of 8, 16 or 32 bits, got"):
        as_mono_16k(np.ones(100).astype(kind), SAMPLE_RATE)


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
