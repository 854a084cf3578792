"""Instruction rows follow from transcripts by rule; spoken questions are really spoken, and the trainer reads both."""

from __future__ import annotations

import importlib.util
import json
import random

import pytest
import soundfile

from soundwave_fast.errors import UserError
from train import curate
from train.curation.instructions import FACTS, TEMPLATES, read_questions, transcribe_then_answer
from train.data import tasks
from train.data.manifest import read
from train.nano.grammar import sample

SENTENCES = [one.text for one in sample(200, random.Random(0))]


@pytest.fixture
def manifest(tmp_path):
    rows = [{"id": f"u{i}", "audio": f"{i}.flac", "duration": 2.0, "text": text} for i, text in enumerate(SENTENCES)]
    rows.append({"id": "none", "audio": "x.flac", "duration": 1.0, "text": ""})
    rows.append({"id": "part", "audio": "y.flac", "duration": 1.0, "start": 4.5, "text": "go on"})
    path = tmp_path / "kept.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def quoted(text: str) -> str:
    return text.split('"')[1]


RIGHT = {
    "first_word": lambda words, question: words[0],
    "last_word": lambda words, question: words[-1],
    "word_count": lambda words, question: str(len(words)),
    "longest_word": lambda words, question: max(words, key=len),
    "mentioned": lambda words, question: "yes" if quoted(question) in words else "no",
    "word_after": lambda words, question: words[words.index(quoted(question)) + 1],
}


def test_answers_are_right_and_the_trainer_asks_them(manifest, tmp_path):
    out = tmp_path / "instruct.jsonl"
    assert curate.main(["instruct", str(manifest), "--out", str(out), "--each", "9"]) == 0
    rows = read(out)
    seen = set()
    for row in rows:
        name = row.id.rsplit("-", 1)[1]
        transcript, answer = row.answer.split("\nAnswer: ")
        assert transcript == row.text and answer == RIGHT[name](row.text.split(), row.prompt), row
        assert tasks.applies("given", row) and tasks.ask("given", row, random.Random(0)) == (row.prompt, row.answer)
        seen.add((name, answer if name == "mentioned" else ""))
    assert {name for name, _ in seen} == set(TEMPLATES) and {("mentioned", "yes"), ("mentioned", "no")} <= seen
    yes = [tasks.final_answer(row.answer) for row in rows if row.id.endswith("mentioned")].count("yes")
    assert 60 < yes < 140
    assert {row.start for row in rows if row.id.startswith("part")} == {4.5}
    assert not any(row.id.startswith("none") for row in rows)


def test_draws_depend_on_seed_and_row_alone(manifest):
    rows = read(manifest)
    names = ("first_word", "word_after", "word_count")
    whole = list(transcribe_then_answer(rows, names, seed=1))
    assert whole[:50] == list(transcribe_then_answer(rows[:50], names, seed=1))
    assert whole != list(transcribe_then_answer(rows, names, seed=2)) and len(whole) == 201
    assert {row["id"].rsplit("-", 1)[1] for row in whole} == set(names)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"question": "a"}', '{"question": "a", "answer": " "}'])
def test_bad_questions_name_the_line(tmp_path, text):
    path = tmp_path / "q.jsonl"
    path.write_text(f'{{"question": "a?", "answer": "b"}}\n{text}\n' if text else "")
    with pytest.raises(UserError, match="q.jsonl:2" if text else "no questions"):
        read_questions(path)


def test_built_in_facts_are_distinct():
    assert len(dict(FACTS)) == len(FACTS) >= 10


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("piper") is None, reason="piper-tts is not installed")
def test_questions_are_spoken(tmp_path, capsys):
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in FACTS[:2]))
    command = ["spoken-qa", "--out", str(tmp_path / "qa"), "--questions", str(tmp_path / "q.jsonl")]
    if curate.main(command) == 2:
        pytest.skip(capsys.readouterr().err)
    rows = read(tmp_path / "qa/spoken_qa.jsonl")
    for row, (question, answer) in zip(rows, FACTS, strict=False):
        assert 0.8 < soundfile.info(row.audio).duration == pytest.approx(row.duration, abs=1e-3)
        assert tasks.applies("spoken_qa", row) and tasks.applies("then_spoken_qa", row)
        assert tasks.ask("spoken_qa", row, random.Random(0))[1] == answer
        assert tasks.ask("then_spoken_qa", row, random.Random(0))[1] == f"{question}\nAnswer: {answer}"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "qa/audio").iterdir()}
    assert curate.main(command) == 0 and len(rows) == len(before) == 2
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "qa/audio").iterdir()} == before
