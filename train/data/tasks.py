"""Tasks: what is asked about an utterance, in several phrasings, and the answer that its manifest row implies.

task            row needs                                  answer
asr             text                                       the transcript
first_word, last_word, capitals   text                     from the transcript
slot            slots                                      the value of one of them, drawn
translate       translation, target_language               the translation
emotion, gender, age, speaker_count, sound   that label    the label
spoken_qa       answer, no prompt                          the answer: the question is in the audio
instruction     answer, task = instruction                 the answer; the row's own prompt where it has one
given           prompt, answer                             the answer
then_X          text, and what X needs                     the transcript, then X's answer
"""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Callable

from soundwave_fast.errors import UserError
from train.data.prompts import CORE as PHRASINGS
from train.data.prompts import MORE, MORE_THEN, THEN
from train.data.utterance import LABELS, Utterance

LANGUAGES = {
    "ar": "Arabic", "bn": "Bengali", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English",
    "es": "Spanish", "fa": "Persian", "fi": "Finnish", "fr": "French", "he": "Hebrew", "hi": "Hindi",
    "hu": "Hungarian", "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean", "nl": "Dutch",
    "no": "Norwegian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sv": "Swedish",
    "ta": "Tamil", "th": "Thai", "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip


def _words(row: Utterance) -> list[str]:
    return row.text.split()


_ANSWERS: dict[str, Callable[[Utterance], str]] = {
    "asr": lambda row: row.text,
    "first_word": lambda row: _words(row)[0],
    "last_word": lambda row: _words(row)[-1],
    "capitals": lambda row: row.text.upper(),
    "translate": lambda row: row.translation,
    "spoken_qa": lambda row: row.answer,
    "instruction": lambda row: row.answer,
    **{label: (lambda row, label=label: row.labels[label]) for label in LABELS},
}
NO_THEN = ("asr", "capitals", "sound")  # the answer is the transcript, or there is none
# 'given': rows that bring their own prompt and answer. 'then_X': transcribe first, then answer X.
NAMES = (*PHRASINGS, "given", *(f"then_{name}" for name in PHRASINGS if name not in NO_THEN))


def check(task: str, where: str) -> None:
    """Whether there is such a task.

    Args:
        task: its name.
        where: what the line begins with: the setting, option or manifest line that names the task.

    Raises:
        UserError: there is none; the line gives all names, and the nearest one.
    """
    if task in NAMES:
        return
    near = difflib.get_close_matches(task, NAMES, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"{where}: {task!r} is not one of {', '.join(NAMES)}{hint}")


def spoken(name: str) -> str:
    """A slot's key as a person would say it: 'coffeeDrink' -> 'coffee drink'."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", name).lower()


def applies(task: str, row: Utterance) -> bool:
    """Whether `row` has what `task` needs, and is not meant for another one."""
    base = task.removeprefix("then_")
    if row.task and row.task not in (task, base) and not (task == "given" and row.prompt):
        return False
    if base != task and not row.text.strip():
        return False
    if base in LABELS:
        return base in row.labels
    return {
        "given": bool(row.prompt),
        "slot": bool(row.slots),
        "translate": bool(row.translation),
        "spoken_qa": bool(row.answer) and not row.prompt,
        "instruction": bool(row.answer) and row.task.endswith("instruction"),
    }.get(base, bool(row.text.strip()))


def ask(task: str, row: Utterance, rng: random.Random, more: bool = False) -> tuple[str, str]:
    """(instruction, answer) for one utterance; the phrasing (and the slot) are drawn from `rng`.

    Args:
        more: draw from the additional phrasings, too.

    Raises:
        ValueError: an unknown task.
    """
    if task not in NAMES:
        raise ValueError(f"task: {task!r} is not one of {', '.join(NAMES)}")
    if task == "given":
        return row.prompt, row.answer
    base = task.removeprefix("then_")
    question = rng.choice(PHRASINGS[base] + (MORE.get(base, ()) if more else ()))
    if base == "slot":
        name = rng.choice(sorted(row.slots))
        question, answer = question.format(name=spoken(name)), row.slots[name]
    else:
        answer = _ANSWERS[base](row)
    if base == "translate":
        question = question.format(language=LANGUAGES.get(row.target_language.lower(), row.target_language))
    if base == "instruction" and row.prompt:
        question = row.prompt
    if base != task:
        then = rng.choice((THEN, *MORE_THEN)) if more else THEN
        return then + question, f"{row.text}\nAnswer: {answer}"
    return question, answer


def final_answer(text: str) -> str:
    """The answer proper of a 'transcribe, then answer' output; any other text as it is."""
    return text.rsplit("Answer:", 1)[-1].strip()
