"""Instruction data: 'transcribe, then answer' rows from ASR rows, and spoken questions from text questions."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from soundwave_fast.errors import UserError
from train.data.prompts import THEN
from train.data.utterance import Utterance

STOPWORDS = frozenset("a an and are as at be by do for from i in is it me my of on or the to with you".split())


@dataclass(frozen=True)
class Template:
    """A question about a transcript; `answer` gives (values for the question, answer), or None where it is none."""

    name: str
    questions: tuple[str, ...]
    answer: Callable[[list[str], random.Random], tuple[dict, str] | None]


def _first(words: list[str], rng: random.Random) -> tuple[dict, str] | None:
    return {}, words[0]


def _last(words: list[str], rng: random.Random) -> tuple[dict, str] | None:
    return {}, words[-1]


def _count(words: list[str], rng: random.Random) -> tuple[dict, str] | None:
    return {}, str(len(words))


def _longest(words: list[str], rng: random.Random) -> tuple[dict, str] | None:
    size = max(map(len, words))
    best = sorted({word for word in words if len(word) == size})
    return ({}, best[0]) if len(best) == 1 and len(words) > 2 else None


def _mentioned(words: list[str], rng: random.Random) -> tuple[dict, str] | None:
    content = sorted(set(words) - STOPWORDS)
    return ({"word": rng.choice(content)}, "yes") if content else None


def _after(words: list[str], rng: random.Random) -> tuple[dict, str] | None:
    once = [i for i, word in enumerate(words[:-1]) if words.count(word) == 1]
    if not once:
        return None
    i = rng.choice(once)
    return {"word": words[i]}, words[i + 1]


TEMPLATES = {
    one.name: one
    for one in (
        Template("first_word", ("What is the first word?", "Which word comes first?"), _first),
        Template("last_word", ("What is the last word?", "Which word comes last?"), _last),
        Template("word_count", ("How many words are spoken?", "Count the words."), _count),
        Template("longest_word", ("What is the longest word?", "Which word has the most letters?"), _longest),
        Template("mentioned", ('Does the speaker say "{word}"?', 'Is the word "{word}" spoken?'), _mentioned),
        Template("word_after", ('Which word comes after "{word}"?', 'What follows "{word}"?'), _after),
    )
}


def transcribe_then_answer(
    rows: list[Utterance], names: tuple[str, ...] = tuple(TEMPLATES), each: int = 1, seed: int = 0
) -> Iterator[dict]:
    """Up to `each` rows an utterance with prompt and answer (task 'given') in the 'transcribe, then answer' form.

    Every answer follows from the transcript by rule. 'mentioned' asks for a word of another utterance half of the
    time, so that 'no' is right as often as 'yes'. What is drawn depends on (seed, id) alone.

    Raises:
        UserError: an unknown template.
    """
    for name in names:
        if name not in TEMPLATES:
            raise UserError(f"--templates: {name!r} is not one of {', '.join(TEMPLATES)}")
    spoken = [_words(row.text) for row in rows]
    for row, words in zip(rows, spoken, strict=True):
        if not words:
            continue
        rng, made = random.Random(f"{seed}/{row.id}"), 0
        for name in rng.sample(names, len(names)):
            pair = _ask(TEMPLATES[name], words, spoken, rng)
            if pair and made < each:
                made += 1
                question, answer = pair
                yield {
                    "id": f"{row.id}-{name}",
                    "audio": str(row.audio.resolve()),
                    "duration": row.duration,
                    **({"start": row.start} if row.is_segment else {}),
                    **({"channel": row.channel} if row.channel is not None else {}),
                    "text": row.text,
                    "speaker": row.speaker,
                    "task": "given",
                    "prompt": THEN + question,
                    "answer": f"{row.text}\nAnswer: {answer}",
                }


def _words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower())


def _ask(one: Template, words: list[str], spoken: list[list[str]], rng: random.Random) -> tuple[str, str] | None:
    found = one.answer(words, rng)
    if found is None:
        return None
    values, answer = found
    if one.name == "mentioned" and rng.random() < 0.5:
        others = sorted(set(rng.choice(spoken)) - set(words) - STOPWORDS)
        if not others:
            return None
        values, answer = {"word": rng.choice(others)}, "no"
    return rng.choice(one.questions).format(**values), answer


FACTS = (
    ("What is the capital of France?", "Paris"),
    ("What is the capital of Japan?", "Tokyo"),
    ("How many legs does a spider have?", "eight"),
    ("How many days are in a week?", "seven"),
    ("What color is the sky on a clear day?", "blue"),
    ("Which planet do we live on?", "Earth"),
    ("What do bees make?", "honey"),
    ("How many minutes are in an hour?", "sixty"),
    ("What is frozen water called?", "ice"),
    ("Which animal says meow?", "the cat"),
    ("What is two plus three?", "five"),
    ("Which season comes after winter?", "spring"),
)


def read_questions(path: Path) -> list[tuple[str, str]]:
    """(question, answer) of a JSONL file of {"question", "answer"}.

    Raises:
        UserError: no such file, or a line that is not that - with its number.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--questions {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pair = (row["question"].strip(), row["answer"].strip())
        except (ValueError, KeyError, TypeError, AttributeError):
            pair = ("", "")
        if not all(pair):
            raise UserError(f'--questions {path}:{number}: expected {{"question": ..., "answer": ...}}')
        pairs.append(pair)
    if not pairs:
        raise UserError(f"--questions {path}: no questions")
    return pairs


def spoken_questions(pairs: list[tuple[str, str]], out: Path, seed: int = 0, cache: Path | None = None) -> list[dict]:
    """Speak the questions (piper) into `out`/audio; rows for the trainer's tasks spoken_qa and then_spoken_qa.

    Raises:
        UserError: no voice or no piper, or synthesis fails.
    """
    from train.nano.speech import speak

    names = {f"qa-{hashlib.sha256(question.encode()).hexdigest()[:10]}": question for question, _ in pairs}
    seconds = speak(names, out / "audio", seed=seed, cache=cache)
    return [
        {
            "id": name,
            "audio": f"audio/{name}.flac",
            "duration": round(seconds[name], 4),
            "text": question,
            "task": "spoken_qa",
            "answer": answer,
        }
        for name, (question, answer) in zip(names, dict(pairs).items(), strict=True)
    ]
