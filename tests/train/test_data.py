"""Manifests, tasks and the split: what is read, what is asked, and errors that carry the line's number."""

from __future__ import annotations

import json
import random

import pytest

from tests.model.tiny import write_manifest
from train.config import UserError
from train.data import split, tasks
from train.data.manifest import Utterance, read

GOOD = {"id": "a", "audio": "a.wav", "duration": 1.5}


def test_audio_is_relative_to_the_manifest(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps({**GOOD, 'id': 7, 'audio': '/abs/b.flac', 'text': 'hi'})}\n")
    one, two = read(path)
    assert one == Utterance("a", tmp_path / "a.wav", 1.5)
    assert (two.id, str(two.audio), two.text) == ("7", "/abs/b.flac", "hi")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "a"', "not valid JSON"),
        ("[1]", "expected an object"),
        (json.dumps({"audio": "a.wav", "duration": 1}), "no 'id'"),
        (json.dumps({"id": "a", "duration": 1}), "no 'audio'"),
        (json.dumps({"id": "a", "audio": "a.wav"}), "no 'duration'"),
        (json.dumps({**GOOD, "duration": 0}), "duration 0 is not a positive number"),
        (json.dumps({**GOOD, "duration": "1"}), "duration '1' is not a positive number"),
        (json.dumps({**GOOD, "duration": True}), "duration True is not a positive number"),
        ('{"id": "a", "audio": "a.wav", "duration": NaN}', "duration nan is not a positive number"),
        ('{"id": "a", "audio": "a.wav", "duration": Infinity}', "duration inf is not a positive number"),
        (json.dumps({**GOOD, "text": 3}), "text is not text"),
        (json.dumps({**GOOD, "audio": None}), "audio is not text"),
        (json.dumps({**GOOD, "slots": ["x"]}), "slots is not an object"),
        (json.dumps({**GOOD, "prompt": "why"}), "a prompt without an answer"),
    ],
)
def test_a_bad_line_is_named_by_number(tmp_path, line, message):
    path = tmp_path / "m.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{line}\n")
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_manifest(tmp_path, content):
    path = tmp_path / "m.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match="the manifest is empty"):
        read(path)


def test_a_manifest_that_is_no_text(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match=str(path)):
        read(path)


def test_a_line_ends_at_a_newline_only(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({**GOOD, "text": "one\u2028two\x85three"}, ensure_ascii=False), encoding="utf-8")
    assert read(path)[0].text == "one\u2028two\x85three"


def test_a_missing_manifest(tmp_path):
    with pytest.raises(UserError, match="no such manifest"):
        read(tmp_path / "nowhere.jsonl")


# -- tasks -----------------------------------------------------------------------------------------------------

ROW = Utterance("a", "a.wav", 1.0, text="turn on the red lamp", slots={"colorName": "red"})


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("asr", "turn on the red lamp"),
        ("first_word", "turn"),
        ("last_word", "lamp"),
        ("capitals", "TURN ON THE RED LAMP"),
        ("slot", "red"),
        ("then_slot", "turn on the red lamp\nAnswer: red"),
        ("then_first_word", "turn on the red lamp\nAnswer: turn"),
    ],
)
def test_answers(task, answer):
    question, got = tasks.ask(task, ROW, random.Random(0))
    assert got == answer
    assert question.startswith(tasks.THEN) == task.startswith("then_")
    if "slot" in task:
        assert "color name" in question


def test_questions_vary_and_are_a_function_of_the_seed():
    asked = [tasks.ask("asr", ROW, random.Random(seed))[0] for seed in range(30)]
    assert set(asked) == set(tasks.PHRASINGS["asr"])
    assert asked == [tasks.ask("asr", ROW, random.Random(seed))[0] for seed in range(30)]


def test_rows_that_bring_their_own_question():
    row = Utterance("a", "a.wav", 1.0, prompt="Who speaks?", answer="Joe")
    assert tasks.ask("given", row, random.Random(0)) == ("Who speaks?", "Joe")
    assert tasks.applies("given", row) and not tasks.applies("given", ROW)
    assert not tasks.applies("asr", row) and not tasks.applies("slot", row)


def test_an_unknown_task():
    with pytest.raises(ValueError, match="'sing' is not one of asr"):
        tasks.ask("sing", ROW, random.Random(0))


def test_every_name_can_be_asked():
    row = Utterance("a", "a.wav", 1.0, "turn on", {"x": "on"}, prompt="p", answer="q")
    for name in tasks.NAMES:
        assert tasks.applies(name, row)
        question, answer = tasks.ask(name, row, random.Random(0))
        assert question and answer and "{" not in question


def test_final_answer():
    assert tasks.final_answer("turn on\nAnswer: red ") == "red"
    assert tasks.final_answer(" red") == "red"


# -- split -----------------------------------------------------------------------------------------------------


def manifest(tmp_path, speakers=5, each=4):
    rows = [{**GOOD, "id": f"{s}-{i}", "speaker": f"s{s}", "extra": 1} for s in range(speakers) for i in range(each)]
    return write_manifest(tmp_path / "all.jsonl", rows)


def test_split_keeps_speakers_whole(tmp_path, capsys):
    path, out = manifest(tmp_path), tmp_path / "out"
    assert split.main([str(path), "--held-out", "0.4", "--out", str(out)]) == 0
    train, test = read(out / "train.jsonl"), read(out / "test.jsonl")
    assert (len(train), len(test)) == (12, 8)
    assert not {row.speaker for row in train} & {row.speaker for row in test}
    assert train[0].audio == (tmp_path / "a.wav").resolve(), "audio is found from the new folder"
    assert json.loads((out / "train.jsonl").read_text().splitlines()[0])["extra"] == 1
    again = tmp_path / "again"
    split.main([str(path), "--held-out", "0.4", "--out", str(again)])
    assert (again / "test.jsonl").read_text() == (out / "test.jsonl").read_text()


def test_split_by_utterance(tmp_path):
    path = manifest(tmp_path, speakers=1, each=10)
    assert split.main([str(path), "--by", "utterance", "--held-out", "0.3", "--out", str(tmp_path)]) == 0
    assert len(read(tmp_path / "test.jsonl")) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jsonl"], "no such manifest"),
        (["one.jsonl"], "one speaker only"),
        (["all.jsonl", "--held-out", "1.5"], "must lie between 0 and 1"),
    ],
)
def test_split_errors_are_one_line(tmp_path, capsys, arguments, message, monkeypatch):
    manifest(tmp_path)
    write_manifest(tmp_path / "one.jsonl", [GOOD])
    monkeypatch.chdir(tmp_path)
    assert split.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "out").exists()
