"""Comparing words: normalisation, word error rate, and CTC's collapse of frames to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


@lru_cache(maxsize=1)
def _english():
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()


def normalise(text: str) -> str:
    """Whisper's English normaliser: case, punctuation, spelling variants, spoken numbers."""
    return _english()(text)


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Corpus WER (edits / reference words) after normalisation of both.

    Raises:
        ValueError: lists of different lengths, or no reference words at all.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"hypotheses: {len(hypotheses)} for {len(references)} references")
    import jiwer

    pairs = [(normalise(r), normalise(h)) for r, h in zip(references, hypotheses, strict=True)]
    pairs = [pair for pair in pairs if pair[0]]
    if not pairs:
        raise ValueError("references: no words")
    return jiwer.wer([r for r, _ in pairs], [h for _, h in pairs])


def collapse(tokens: Sequence[int], blank: int) -> list[int]:
    """CTC's rule: runs of equal tokens become one, then blanks go."""
    kept, last = [], None
    for token in tokens:
        if token != last and token != blank:
            kept.append(int(token))
        last = token
    return kept
