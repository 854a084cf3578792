"""WER, repetition, scripts; measurements of audio; and the reason each of them leads to."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

from soundwave_fast.errors import UserError
from train.curation.engine import scored_row
from train.curation.reasons import REASONS, Limits, reason
from train.curation.scoring import compression, language_code, longest_repeat, score, script
from train.curation.sound import Sound, flat_share, level_db, listen
from train.curation.transcribers import Transcript

RATE = 16_000
RNG = np.random.default_rng(0)


def babble(seconds: float = 1.0, rate: int = RATE) -> np.ndarray:
    """Noise with the envelope of syllables."""
    time = np.arange(int(seconds * rate)) / rate
    return (0.1 * RNG.standard_normal(len(time)) * (1 + np.sin(2 * np.pi * 4 * time))).clip(-1, 1).astype(np.float32)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "language", "wer", "words"),
    [
        ("Turn on the lamp", "turn on the lamp.", "en", 0.0, 4),
        ("turn on the lamp", "turn off the lamb", "en", 0.5, 4),
        ("the twenty one colours", "the 21 colors", "en", 0.0, 4),
        ("two four three eight", "2-4-3-8", "en", 0.0, 4),  # the normaliser alone: 2438 against 2 4 3 8
        ("two four three eight", "2439", "en", 0.25, 4),
        ("one five two two one", "1, 5, 2 2 1.", "en", 0.0, 5),
        ("one oh oh two", "$1002", "en", 0.0, 4),
        ("r u b e n four oh", "Ruben 40.", "en", 0.0, 3),
        ("r u b e n", "R-U-B-E-N", "en", 0.0, 1),
        ("turn on", "", "en", 1.0, 2),
        ("go", "go go go", "en", 2.0, 1),
        (" - ", "something", "en", None, 0),
        ("", "", "en", None, 0),
        ("Schöne Grüße", "schöne grüße!", "de", 0.0, 2),
        ("今日は良い", "今日は悪い", "ja", 0.2, 5),  # by character, as Whisper's own evaluation
    ],
)
def test_wer(reference, hypothesis, language, wer, words):
    found = score(reference, hypothesis, language)
    assert (found["wer"], found["words"]) == (wer, words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 0),
        ("no no", 0),
        ("no no no", 3),
        ("i said no no no no to him", 4),
        ("a b a b a b", 6),
        ("a b a b a c", 0),
        ("thank you very much " * 5, 20),
        ("one two three four five six seven eight nine ten", 0),
    ],
)
def test_longest_repeat(text, words):
    assert longest_repeat(text.split()) == words


def test_compression_is_whispers_measure():
    assert compression("") == 0 and compression("a usual sentence of no great length") < 1.2
    assert compression("thank you for watching " * 20) > 2.4


@pytest.mark.parametrize(
    ("text", "found"),
    [("hello", "LATIN"), ("привет, bob", "CYRILLIC"), ("今日はカメラ", "CJK"), ("12 - 3", ""), ("", "")],
)
def test_script(text, found):
    assert script(text) == found


@pytest.mark.parametrize(("name", "code"), [("English", "en"), ("en-US", "en"), ("de", "de"), ("klingon", "klingon")])
def test_language_code(name, code):
    assert language_code(name) == code


def test_flat_tops_are_clipping_at_any_level():
    wave = babble()
    loud = np.clip(12 * wave, -1, 1)
    assert flat_share(wave) == 0 and flat_share(loud) > 0.005
    assert flat_share(0.2 * loud) == pytest.approx(flat_share(loud))
    assert flat_share(np.zeros(100, dtype=np.float32)) == 0 and flat_share(wave[:1]) == 0


def test_level():
    assert level_db(np.zeros(RATE, dtype=np.float32)) == pytest.approx(-120)
    assert level_db(np.full(RATE, 0.1, dtype=np.float32)) == pytest.approx(-20, abs=0.01)
    assert level_db(np.full(10, 0.1, dtype=np.float32)) < -20, "a click shorter than a block"


def test_hash_is_of_the_samples(tmp_path):
    wave = (babble() * 32768).astype(np.int16)
    for name in ("a.wav", "b.flac"):
        soundfile.write(tmp_path / name, wave, RATE, "PCM_16")
    soundfile.write(tmp_path / "c.wav", wave[1:], RATE, "PCM_16")
    soundfile.write(tmp_path / "d.wav", wave, RATE // 2, "PCM_16")
    hashes = [listen({"audio": str(tmp_path / f)}).hash for f in ("a.wav", "b.flac", "c.wav", "d.wav")]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def test_listen_reads_segments_and_channels(tmp_path):
    left, right = babble(2.0, 8000), babble(2.0, 8000)
    path = tmp_path / "stereo.wav"
    soundfile.write(path, np.stack([left, right], 1), 8000, "FLOAT")
    whole = listen({"audio": str(path), "duration": 9.0})
    assert whole.duration == 2.0 and len(whole.wave) == 2 * RATE and not whole.error
    part = listen({"audio": str(path), "duration": 0.5, "start": 1.0, "channel": 1})
    soundfile.write(tmp_path / "part.wav", right[8000:12000], 8000, "FLOAT")
    assert part.duration == 0.5 and part.hash == listen({"audio": str(tmp_path / "part.wav")}).hash
    for row in ({"start": 5.0, "duration": 1.0}, {"channel": 2}, {"start": "x", "duration": 1.0}):
        assert listen({"audio": str(path), **row}).error


@pytest.mark.parametrize("content", [None, b"", b"no audio", b"RIFF\x00\x00\x00\x00WAVEfmt "])
def test_bad_files_have_an_error_and_no_wave(tmp_path, content):
    path = tmp_path / "bad.wav"
    if content is not None:
        path.write_bytes(content)
    sound = listen({"audio": str(path)})
    assert sound.wave is None and sound.error and "\n" not in sound.error


GOOD = Sound(np.zeros(1), 3.0, -20.0, 0.0, "aa")
SAID = Transcript("turn on the red lamp", -0.2, "en", 0.99)


def judged(sound: Sound = GOOD, said: Transcript | None = SAID, text: str = "turn on the red lamp", **limits) -> str:
    row = scored_row({"id": "a", "audio": "a", "duration": sound.duration, "text": text}, sound, said, "en")
    return reason(row, Limits(**limits))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (judged(), ""),
        (judged(Sound(error="gone"), None), "unreadable"),
        (judged(Sound(GOOD.wave, 0.1, -20.0, 0.0, "aa")), "too_short"),
        (judged(Sound(GOOD.wave, 31.0, -20.0, 0.0, "aa"), None), "too_long"),
        (judged(Sound(GOOD.wave, 3.0, -80.0, 0.0, "aa")), "silent"),
        (judged(Sound(GOOD.wave, 3.0, -20.0, 0.1, "aa")), "clipped"),
        (judged(text=" ... "), "empty_reference"),
        (judged(said=Transcript("schalte die lampe ein", -0.2, "de", 0.9)), "wrong_language"),
        (judged(said=Transcript("turn on the red lamp", -0.2, "de", 0.3)), ""),  # Whisper is not sure
        (judged(text="сегодня хорошая погода"), "wrong_language"),
        (judged(said=Transcript("turn on the red lamp " * 9, -0.2, "en", 0.9)), "repetition_loop"),
        (judged(said=Transcript("a" * 200, -0.2, "en", 0.9)), "repetition_loop"),
        (judged(text="no " * 12, said=Transcript("no " * 12, -0.2, "en", 0.9)), ""),  # really said so
        (judged(text="turn on the red lamp " * 6, said=Transcript("turn on", -0.2, "en", 1.0)), "repetition_loop"),
        (judged(text=" ".join(f"word{i}" for i in range(20))), "characters_per_second"),
        (judged(text="a"), "characters_per_second"),
        (judged(text="turn on the blue lamp"), "wer"),
        (judged(text="turn on the blue lamp", max_wer=0.2), ""),
    ],
)
def test_reason(found, expected):
    assert found == expected and found in ("", *REASONS)


def test_row_of_a_shard_judges_neither_wer_nor_duplicates():
    row = scored_row({"id": "a", "audio": "a", "duration": 3.0, "text": "other words here"}, GOOD, SAID, "en")
    assert row["reason"] == "" and row["wer"] > 1 and row["hypothesis"] == SAID.text and row["logprob"] == -0.2


@pytest.mark.parametrize(("name", "value"), [("max_wer", -1), ("max_cps", float("nan")), ("max_seconds", 60)])
def test_limits_are_checked(name, value):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')}"):
        Limits(**{name: value}).check()
