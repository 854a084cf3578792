"""Manifests, tasks and the split: what is read, what is asked, and errors that carry the line's number."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random

import pytest

from soundwave_fast.errors import UserError
from tests.model.tiny import write_manifest
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
        (json.dumps({"id": "a", "audio_path": "a.wav", "duration": 1}), "no 'audio' (there is 'audio_path')"),
        (json.dumps({**GOOD, "translation": "hallo"}), "translation without target_language"),
        (json.dumps({**GOOD, "target_language": "de"}), "target_language without translation"),
        (json.dumps({**GOOD, "emotion": ["sad"]}), "emotion ['sad'] is neither text nor a number"),
        (json.dumps({**GOOD, "start": -1}), "start -1 is not a positive number"),
        (json.dumps({**GOOD, "channel": "left"}), "channel 'left' is not a channel's number"),
        (json.dumps({**GOOD, "task": "emotoin"}), "task: 'emotoin' is not one of"),
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


def test_labels_and_a_stretch_of_a_file(tmp_path):
    path = tmp_path / "m.jsonl"
    more = {"gender": "male", "age": 34, "speaker_count": 2, "emotion": "", "start": 3.5, "channel": 1, "extra": [1]}
    path.write_text(json.dumps({**GOOD, **more}))
    (row,) = read(path)
    assert row.labels == {"gender": "male", "age": "34", "speaker_count": "2"}
    assert (row.start, row.channel, row.is_segment) == (3.5, 1, True)
    assert row.key != dataclasses.replace(row, start=4.5).key != dataclasses.replace(row, channel=0).key


def test_gzip(tmp_path):
    text = "".join(json.dumps({**GOOD, "id": str(i), "text": "grüße"}) + "\n" for i in range(50))
    plain, packed = tmp_path / "m.jsonl", tmp_path / "m.jsonl.gz"
    plain.write_text(text, encoding="utf-8")
    packed.write_bytes(gzip.compress(text.encode()))
    assert read(packed) == read(plain)
    packed.write_bytes(gzip.compress(text.encode())[:-20])
    with pytest.raises(UserError, match="not a whole gzip file"):
        read(packed)
    packed.write_text(text)
    with pytest.raises(UserError, match="not a whole gzip file"):
        read(packed)


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


FULL = Utterance(
    "a", "a.wav", 1.0, "turn on", {"x": "on"}, prompt="p", answer="q", translation="mach an", target_language="de",
    labels={"emotion": "happy", "gender": "female", "age": "34", "speaker_count": "1", "sound": "bell"},
)  # fmt: skip


def row_for(task: str) -> Utterance:
    """A row that has everything, but for what tells the kinds of questions apart."""
    return dataclasses.replace(
        FULL,
        prompt="" if task.endswith("spoken_qa") else "p",
        task="instruction" if task.endswith("instruction") else "",
    )


@pytest.mark.parametrize("more", [False, True])
def test_every_name_can_be_asked(more):
    for name in tasks.NAMES:
        assert tasks.applies(name, row_for(name)), name
        question, answer = tasks.ask(name, row_for(name), random.Random(0), more)
        assert question and answer and "{" not in question
        assert name.startswith("then_") == answer.startswith("turn on\nAnswer: ")


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("translate", "mach an"),
        ("emotion", "happy"),
        ("gender", "female"),
        ("age", "34"),
        ("speaker_count", "1"),
        ("sound", "bell"),
        ("spoken_qa", "q"),
        ("instruction", "q"),
        ("then_spoken_qa", "turn on\nAnswer: q"),
        ("then_translate", "turn on\nAnswer: mach an"),
    ],
)
def test_answers_of_labelled_rows(task, answer):
    question, got = tasks.ask(task, row_for(task), random.Random(1))
    assert got == answer
    assert ("German" in question) == ("translate" in task)


@pytest.mark.parametrize("task", ["emotion", "translate", "spoken_qa", "instruction", "given", "slot", "then_emotion"])
def test_a_row_without_what_a_task_needs(task):
    assert not tasks.applies(task, Utterance("a", "a.wav", 1.0, "turn on"))
    silent = dataclasses.replace(row_for(task), text="")
    assert tasks.applies(task, silent) == (not task.startswith("then_")), "'then_' needs a transcript"


def test_a_rows_task_keeps_it_from_the_others():
    row = dataclasses.replace(FULL, task="emotion")
    assert {task for task in tasks.NAMES if tasks.applies(task, row)} == {"emotion", "then_emotion", "given"}


def test_more_phrasings_are_an_option():
    """The measured recipes drew from the core alone: the same draws ask the same as before."""
    draws = [random.Random(seed) for seed in range(200)]
    asked = {tasks.ask("then_slot", ROW, rng)[0] for rng in draws}
    assert asked == {tasks.THEN + q.format(name="color name") for q in tasks.PHRASINGS["slot"]}
    more = {tasks.ask("then_slot", ROW, random.Random(seed), more=True)[0] for seed in range(400)}
    assert asked < more and len(more) == 4 * (2 + 3)


def test_every_task_has_several_phrasings():
    for name, phrasings in tasks.PHRASINGS.items():
        assert len(set(phrasings)) == len(phrasings) >= 2, name
        assert not set(phrasings) & set(tasks.MORE.get(name, ())), name


def test_the_nearest_task_is_named():
    with pytest.raises(UserError, match="^data.tasks: 'transalte' is not one of asr, .*; did you mean 'translate'[?]$"):
        tasks.check("transalte", "data.tasks")


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
