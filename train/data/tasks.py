"""Tasks: what is asked about an utterance, in several phrasings, and the answer that its manifest row implies."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from train.data.manifest import Utterance

PHRASINGS: dict[str, tuple[str, ...]] = {
    "asr": (
        "Transcribe the audio.",
        "Write down what is said.",
        "What does the speaker say?",
        "Repeat the speech as text.",
    ),
    "first_word": ("What is the first word?", "Which word comes first?"),
    "last_word": ("What is the last word?", "Which word comes last?"),
    "capitals": ("Transcribe the audio in capital letters.", "Write what is said in upper case."),
    "slot": ("Which {name} is mentioned?", "What {name} does the speaker name?"),
}
THEN = "Transcribe the audio, then answer: "  # the paper's stage-3 format


def _words(row: Utterance) -> list[str]:
    return row.text.split()


_ANSWERS: dict[str, Callable[[Utterance], str]] = {
    "asr": lambda row: row.text,
    "first_word": lambda row: _words(row)[0],
    "last_word": lambda row: _words(row)[-1],
    "capitals": lambda row: row.text.upper(),
}
# 'given': rows that bring their own prompt and answer. 'then_X': transcribe first, then answer X.
NAMES = (*PHRASINGS, "given", *(f"then_{name}" for name in PHRASINGS if name not in ("asr", "capitals")))


def spoken(name: str) -> str:
    """A slot's key as a person would say it: 'coffeeDrink' -> 'coffee drink'."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", name).lower()


def applies(task: str, row: Utterance) -> bool:
    """Whether `row` has what `task` needs."""
    if task == "given":
        return bool(row.prompt)
    return bool(row.slots) if task.endswith("slot") else bool(row.text.strip())


def ask(task: str, row: Utterance, rng: random.Random) -> tuple[str, str]:
    """(instruction, answer) for one utterance; the phrasing (and the slot) are drawn from `rng`.

    Raises:
        ValueError: an unknown task.
    """
    if task not in NAMES:
        raise ValueError(f"task: {task!r} is not one of {', '.join(NAMES)}")
    if task == "given":
        return row.prompt, row.answer
    base = task.removeprefix("then_")
    question = rng.choice(PHRASINGS[base])
    if base == "slot":
        name = rng.choice(sorted(row.slots))
        question, answer = question.format(name=spoken(name)), row.slots[name]
    else:
        answer = _ANSWERS[base](row)
    if base != task:
        return THEN + question, f"{row.text}\nAnswer: {answer}"
    return question, answer


def final_answer(text: str) -> str:
    """The answer proper of a 'transcribe, then answer' output; any other text as it is."""
    return text.rsplit("Answer:", 1)[-1].strip()
