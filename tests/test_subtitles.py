"""Transcripts as JSON, SRT and WebVTT: cues that can be read, timecodes that are right, files whole or not at all."""

from __future__ import annotations

import json
import re

import pytest

from soundwave_fast import subtitles
from soundwave_fast.generate import Peak, Transcript
from soundwave_fast.words import Word


def speech(text: str, start: float = 0.0, pace: float = 0.3) -> list[Word]:
    return [Word(start + i * pace, start + i * pace + 0.2, word, 0.9) for i, word in enumerate(text.split())]


LONG = speech("the quick brown fox jumps over the lazy dog and does it again " * 12)


def test_cues_can_be_read():
    found = subtitles.cues(LONG)
    assert " ".join(cue.text for cue in found).split() == [word.text for word in LONG]
    for cue in found:
        lines = cue.text.split("\n")
        assert len(lines) <= 2 and max(map(len, lines)) <= 42 and 0 < cue.end - cue.start <= 7.0 + 0.5
    assert all(one.end <= two.start for one, two in zip(found, found[1:]))
    assert found[0].start == LONG[0].start and found[-1].end == pytest.approx(LONG[-1].end + 0.5)


def test_cues_part_at_pauses_and_sentences():
    words = speech("turn on the lamp") + speech("now", 4.0) + speech("I see it. Thank you", 5.2)
    assert [cue.text for cue in subtitles.cues(words)] == ["turn on the lamp", "now", "I see it.", "Thank you"]


def test_a_short_cue_stays_a_second_unless_the_next_one_comes():
    one = Word(1.0, 1.04, "stop", 0.9)
    assert subtitles.cues([one]) == [subtitles.Cue(1.0, 2.0, "stop")]
    assert [cue.end for cue in subtitles.cues([one, Word(1.85, 1.9, "go", 0.9)])] == [1.85, 2.85]


def test_lines_are_even_and_a_long_word_has_its_own():
    [cue] = subtitles.cues(speech("we would like to have a look at the pictures of them", pace=0.2))
    assert cue.text == "we would like to have a look\nat the pictures of them"
    assert "x" * 60 in [line for cue in subtitles.cues(speech(f"a {'x' * 60} b")) for line in cue.text.split("\n")]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "00:00:00.000"), (59.9996, "00:01:00.000"), (3661.5, "01:01:01.500"), (360000.04, "100:00:00.040")],
)
def test_timecodes(seconds, expected):
    assert subtitles.timecode(seconds) == expected
    assert subtitles.timecode(seconds, ",") == expected.replace(".", ",")


def test_srt():
    blocks = subtitles.srt(LONG).split("\n\n")
    for number, block in enumerate(blocks, 1):
        head, times, *lines = block.rstrip("\n").split("\n")
        assert head == str(number) and lines
        assert re.fullmatch(r"\d\d:\d\d:\d\d,\d{3} --> \d\d:\d\d:\d\d,\d{3}", times)
    assert subtitles.srt(LONG).endswith("\n") and subtitles.srt([]) == ""


def test_vtt_escapes():
    text = subtitles.vtt([Word(0, 1, "a<b>&", 0.5), Word(1, 2, "-->", 0.5)])
    assert text == "WEBVTT\n\n00:00:00.000 --> 00:00:02.500\na&lt;b&gt;&amp; --&gt;\n"
    assert subtitles.vtt([]) == "WEBVTT\n"


def test_json_is_one_strict_line():
    transcript = Transcript("é fox", 1.23456, [Word(0.04, 0.2, "é", None)], [Peak(0.04, " é", 17, 0.123456)])
    line = subtitles.as_json(transcript, "a.wav")
    assert "\n" not in line and "é" in line
    assert json.loads(line) == {
        "file": "a.wav",
        "text": "é fox",
        "duration": 1.235,
        "words": [{"start": 0.04, "end": 0.2, "text": "é", "probability": None}],
        "peaks": [{"time": 0.04, "token": " é", "id": 17, "probability": 0.1235}],
    }


def test_render():
    transcript = Transcript("stop", 1.0, speech("stop"), [])
    assert subtitles.render(transcript, "text") == "stop\n"
    for kind in subtitles.FORMATS:
        assert subtitles.render(transcript, kind).endswith("\n")
    with pytest.raises(ValueError, match="docx"):
        subtitles.render(transcript, "docx")


def test_a_file_is_whole_or_not_there(tmp_path):
    subtitles.write("abc", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "abc"
    with pytest.raises(UnicodeEncodeError):
        subtitles.write("\ud800", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "abc" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
