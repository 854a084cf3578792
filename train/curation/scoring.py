"""Compares a hypothesis with its reference: WER after Whisper's normalisers, repetition, script, compression."""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

# Whisper's own evaluation scores these by character: they are written without spaces (arXiv 2212.04356, appendix C).
LETTERWISE = {"zh", "ja", "th", "lo", "my", "yue"}
_DIGITS = re.compile(r"(\d)")
_SPELLED = re.compile(r"\b[^\W\d_](?: [^\W\d_])+\b")
_ONE_SCRIPT = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "IDEOGRAPHIC": "CJK"}


@lru_cache
def normaliser(language: str) -> Callable[[str], str]:
    """English: Whisper's English normaliser; else its basic one, which parts the letters of LETTERWISE languages."""
    if language in ("", "en"):
        from soundwave_fast.text import normalise

        return normalise
    from whisper_normalizer.basic import BasicTextNormalizer

    return BasicTextNormalizer(split_letters=language in LETTERWISE)


def score(reference: str, hypothesis: str, language: str) -> dict:
    """wer (edits / reference words; None without any), words (of the reference), and the repetition of both texts.

    `language` is a code ('en', 'de'; '' counts as English). `repeats` and `compression` are (reference, hypothesis).
    """
    import jiwer

    wanted, heard = words_of(reference, language), words_of(hypothesis, language)
    words = len(wanted.split())
    return {
        "wer": round(jiwer.wer(wanted, heard), 4) if words else None,
        "words": words,
        "repeats": [longest_repeat(text.lower().split()) for text in (reference, hypothesis)],
        "compression": [compression(text) for text in (reference, hypothesis)],
    }


def words_of(text: str, language: str) -> str:
    """The words a text is scored by, with one space between.

    After the normaliser, digits stand alone and letters of a spelled word together, in whatever way they were written:
    'two four' gives 24 and '2-4' gives 2 4, and a perfect transcript of a spelled number would score 100 % and more.
    """
    english = language in ("", "en")
    words = []
    for word in _DIGITS.sub(r" \1 ", normaliser(language)(text)).split():
        word = word.strip(".")  # left over from "1." and "..."
        if any(map(str.isalnum, word)):
            words.append("1" if english and word == "one" else word)  # a lone 1 is the normaliser's exception
    plain = " ".join(words)
    return plain if language in LETTERWISE else _SPELLED.sub(lambda letters: letters[0].replace(" ", ""), plain)


def longest_repeat(words: Sequence[str], longest: int = 8) -> int:
    """Words in the longest stretch that says one n-gram (n <= `longest`) at least three times over; 0 without any."""
    best = 0
    for n in range(1, min(longest, len(words) // 3) + 1):
        same = 0  # words in a row that equal the word n before them
        for i in range(n, len(words)):
            same = same + 1 if words[i] == words[i - n] else 0
            if same >= 2 * n:
                best = max(best, same + n)
    return best


def compression(text: str) -> float:
    """Bytes of the text over bytes that zlib makes of it: Whisper's measure of looping (2.4 is its limit)."""
    data = text.encode()
    return round(len(data) / len(zlib.compress(data)), 2) if data else 0.0


def script(text: str) -> str:
    """The script most letters of a text are written in (LATIN, CYRILLIC, CJK ...); '' where it has no letters."""
    names = (unicodedata.name(char, "").split(" ")[0].split("-")[0] for char in text if char.isalpha())
    counts = Counter(_ONE_SCRIPT.get(name, name) for name in names if name)
    return counts.most_common(1)[0][0] if counts else ""


def language_code(name: str) -> str:
    """'English', 'en-US', 'en' -> 'en'; a name that Whisper does not know is returned in lower case."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    name = name.strip().lower()
    return TO_LANGUAGE_CODE.get(name) or TO_LANGUAGE_CODE.get(name.split("-")[0]) or name.split("-")[0]
