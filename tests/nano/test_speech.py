"""The demo's speech set: properties of the grammar, of the plan, and three utterances really spoken."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import stat
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from soundwave_fast.errors import UserError
from train.nano import grammar, speech

SENTENCES = list(grammar.all_sentences())


def test_grammar_is_large_and_distinct():
    texts = [sentence.text for sentence in SENTENCES]
    assert len(texts) == len(set(texts)) >= 5000


def test_texts_are_lower_case_words():
    assert all(re.fullmatch(r"[a-z]+( [a-z]+)*", sentence.text) for sentence in SENTENCES)


def test_slots_stand_in_the_text_word_for_word():
    for sentence in SENTENCES:
        assert sentence.slots
        assert all(f" {value} " in f" {sentence.text} " for value in sentence.slots.values()), sentence
        assert len(set(sentence.slots.values())) == len(sentence.slots), "a value answers one question"


def test_the_named_slots_all_occur():
    seen = Counter(slot for sentence in SENTENCES for slot in sentence.slots)
    assert set(seen) >= {"action", "device", "room", "color", "number", "unit", "item", "day", "city", "person"}


def test_sample_is_distinct_and_a_longer_one_begins_with_the_shorter():
    short, long = grammar.sample(50, random.Random(3)), grammar.sample(500, random.Random(3))
    assert long[:50] == short and len({sentence.text for sentence in long}) == 500
    assert grammar.sample(0, random.Random(0)) == []


def test_plan_keeps_test_sentences_out_of_train_and_repeats():
    plan = speech.plan(400, 40, seed=1, espeak=True)
    test = {u.sentence.text for u in plan if u.id.startswith("test")}
    train = {u.sentence.text for u in plan if u.id.startswith("train")}
    assert (len(test), len(train), test & train) == (40, 400, set())
    assert plan == speech.plan(400, 40, seed=1, espeak=True) != speech.plan(400, 40, seed=2, espeak=True)
    assert speech.plan(100, 40, seed=1, espeak=True) == plan[:140], "a smaller set is the beginning of a larger one"
    assert {u.engine for u in plan} == {"piper", "espeak-ng"}
    assert {u.engine for u in speech.plan(40, 4, seed=1, espeak=False)} == {"piper"}
    assert len({u.speaker for u in plan}) >= 10


@pytest.mark.parametrize(("arguments", "message"), [
    ({"train": 0}, "train: must be"), ({"test": 0}, "test: must be"), ({"train": 10**6}, "train: .*too many"),
    ({"workers": 0}, "workers: must be"),
])
def test_bad_arguments_are_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        speech.make_speech(tmp_path, **arguments)


@pytest.mark.parametrize("arguments", [["--train", "0"], ["--workers", "-1"], ["--test", "x"], ["--out"]])
def test_command_line_refuses_with_two(tmp_path, capsys, arguments):
    try:
        code = speech.main(["--out", str(tmp_path / "set"), *arguments])
    except SystemExit as stop:  # argparse's way
        code = stop.code
    assert code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def fake_espeak(tmp_path, monkeypatch):
    """An `espeak-ng` that says everything as the same half second of noise, and a cast where it speaks it all."""
    tool, wave = tmp_path / "bin/espeak-ng", tmp_path / "noise.wav"
    noise = np.random.default_rng(0).standard_normal(11025)
    soundfile.write(wave, 0.1 * noise, 22050)
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\nexec cat {wave}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=":")
    monkeypatch.setattr(speech, "prepare_voice", lambda cache: tmp_path)
    return tool


def block_of(out: Path, n: int = 3) -> list[speech.Utterance]:
    (out / "audio").mkdir(parents=True)
    everything = speech.plan(200, 1, seed=1, espeak=True)
    return [utterance for utterance in everything if utterance.engine == "espeak-ng"][:n]


def test_block_is_written_kept_and_mended(tmp_path, fake_espeak):
    block = block_of(tmp_path / "set")
    audio = tmp_path / "set/audio"
    seconds = speech._make_block(block, audio, tmp_path, 0)
    first = audio / f"{block[0].id}.flac"
    samples, rate = soundfile.read(first)
    assert rate == 16000 and samples.ndim == 1 and seconds[block[0].id] == pytest.approx(0.7, abs=0.01)
    assert np.abs(samples).max() == pytest.approx(block[0].level, abs=2e-3)
    written = first.stat().st_mtime_ns
    assert speech._make_block(block, audio, tmp_path, 0) == seconds
    assert first.stat().st_mtime_ns == written, "valid audio is kept"
    first.write_bytes(first.read_bytes()[:100])
    assert speech._make_block(block, audio, tmp_path, 0) == seconds
    assert sorted(path.name for path in audio.iterdir()) == sorted(f"{u.id}.flac" for u in block)


def test_silence_is_an_error(tmp_path, fake_espeak):
    fake_espeak.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(Exception, match="espeak-ng"):
        speech._make_block(block_of(tmp_path / "set"), tmp_path / "set/audio", tmp_path, 0)


def test_foreign_manifest_is_not_overwritten(tmp_path):
    (tmp_path / "train.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match="did not write"):
        speech._claim(tmp_path, {"train": 1})
    assert (tmp_path / "train.jsonl").read_text() == "mine\n"


def test_other_settings_clear_our_files_only(tmp_path, capsys):
    speech._claim(tmp_path, {"train": 1})
    for name in ("train.jsonl", "audio/train-00000.flac", "audio/mine.flac"):
        (tmp_path / name).write_text("x")
    speech._claim(tmp_path, {"train": 1})
    assert (tmp_path / "train.jsonl").exists()
    speech._claim(tmp_path, {"train": 2})
    assert "making it anew" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "audio").iterdir()] == ["mine.flac"]
    assert not (tmp_path / "train.jsonl").exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("piper") is None, reason="piper-tts is not installed")
def test_three_real_utterances(tmp_path):
    """The whole way, twice: the second call finds everything there and writes the same manifests."""
    try:
        manifests = speech.make_speech(tmp_path / "set", train=2, test=1, seed=1, workers=1)
    except UserError as error:
        pytest.skip(f"no voice: {error}")
    before = [path.read_text() for path in manifests]
    rows = [json.loads(line) for text in before for line in text.splitlines()]
    assert [row["id"] for row in rows] == ["train-00000", "train-00001", "test-00000"]
    for row in rows:
        samples, rate = soundfile.read(tmp_path / "set" / row["audio"])
        assert rate == 16000 and len(samples) / rate == pytest.approx(row["duration"], abs=1e-3)
        assert 0.8 < row["duration"] < 6 and np.sqrt(np.mean(samples**2)) > 0.01
        assert set(row) == {"id", "audio", "duration", "text", "speaker", "slots"}
    assert [path.read_text() for path in speech.make_speech(tmp_path / "set", train=2, test=1, workers=1)] == before
