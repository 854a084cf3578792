"""Words with their times: CTC runs grouped into words, and another transcript's words timed by them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

_ALIGNED_CHARACTERS = re.compile(r"[^\w']+")


@dataclass(frozen=True, slots=True)
class Peak:
    """One kept frame: when (s), which token (its text and its id), how sure."""

    time: float
    token: str
    id: int
    probability: float


@dataclass(frozen=True, slots=True)
class Word:
    """One word: from when to when (s), and how sure the CTC head was of its least sure token.

    The probability is None for a word of the LLM's transcript that CTC did not say; its times lie between its
    neighbours'.
    """

    start: float
    end: float
    text: str
    probability: float | None


@dataclass(frozen=True, slots=True)
class Run:
    """Equal CTC tokens in a row, no blank: adapter frames `frame` to `end` (exclusive) of the recording."""

    frame: int
    end: int
    id: int
    probability: float


def group_words(runs: Sequence[Run], decode: Callable[[list[int]], str], seconds_per_frame: float = 0.04) -> list[Word]:
    """Words of the decoded tokens; each takes its times from the tokens that share a character with it."""
    ids = [run.id for run in runs]
    reach = [0]  # characters written once so many tokens are in; a token may hold part of one, hence the maximum
    for count in range(1, len(ids) + 1):
        reach.append(max(reach[-1], len(decode(ids[:count]))))
    found = []
    for match in re.finditer(r"\S+", decode(ids) if ids else ""):
        own = [run for run, a, b in zip(runs, reach, reach[1:]) if min(a, b - 1) < match.end() and b > match.start()]
        if own:
            start, end = own[0].frame * seconds_per_frame, own[-1].end * seconds_per_frame
            found.append(Word(round(start, 3), round(end, 3), match.group(), min(run.probability for run in own)))
    return found


def plain(word: str) -> str:
    """A word as two transcripts are compared: lower case, without punctuation."""
    return _ALIGNED_CHARACTERS.sub("", word.lower())


def time_words(text: str, spoken: Sequence[Word], start: float, end: float) -> list[Word]:
    """The words of `text` with the times of the CTC words `spoken` in the same stretch [start, end] (s) of audio.

    Words that both have (longest matching blocks) take CTC's times and probability. Words in between that CTC heard
    differently share the time of what it heard there, or else the gap, in proportion to their length.
    """
    texts = text.split()
    matcher = SequenceMatcher(None, [plain(word) for word in texts], [plain(w.text) for w in spoken], autojunk=False)
    timed: list[Word] = []
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            timed += [Word(w.start, w.end, own, w.probability) for own, w in zip(texts[a:b], spoken[c:d])]
        elif a < b:
            first = spoken[c].start if c < d else spoken[c - 1].end if c else start
            last = spoken[d - 1].end if c < d else spoken[c].start if c < len(spoken) else max(end, first)
            timed += _share(texts[a:b], first, last)
    return timed


def _share(texts: Sequence[str], start: float, end: float) -> list[Word]:
    """Words without times of their own, spread over [start, end] by their number of characters."""
    total, done, shared = sum(map(len, texts)), 0, []
    for text in texts:
        begin = start + (end - start) * done / total
        done += len(text)
        shared.append(Word(round(begin, 3), round(start + (end - start) * done / total, 3), text, None))
    return shared
