"""Why an utterance is dropped: limits, and the first named reason that holds for a scored row."""

from __future__ import annotations

from dataclasses import dataclass, fields

from soundwave_fast.errors import UserError
from train.curation.scoring import script

REASONS = (
    "unreadable",  # no such file, or not audio
    "too_short",
    "too_long",  # over --max-seconds; past one Whisper window it was not transcribed
    "silent",
    "clipped",
    "empty_reference",
    "wrong_language",  # heard by Whisper, or seen by the scripts of reference and hypothesis
    "repetition_loop",  # in the hypothesis (a hallucination) or in the reference (somebody else's)
    "characters_per_second",  # of the reference: too few or too many for the time
    "wer",
    "duplicate",  # audio that another kept utterance has
)


@dataclass(frozen=True)
class Limits:
    """Everything that is judged after transcription, so that changing it costs seconds."""

    max_wer: float = 0.1  # the paper's
    min_seconds: float = 0.3
    max_seconds: float = 30.0  # one Whisper window
    min_level_db: float = -55.0  # RMS of the loudest 50 ms, dB of full scale
    max_clipped: float = 0.005  # share of samples on flat tops
    min_cps: float = 0.5  # reference characters a second; a spelled letter in a one-second recording has 1
    max_cps: float = 30.0
    max_repeats: int = 8  # words in the longest stretch of one repeated n-gram
    max_compression: float = 2.4  # Whisper's own limit
    min_language_probability: float = 0.5  # below it the language heard is not believed

    def check(self) -> Limits:
        """Whether every limit makes sense.

        Returns:
            These limits.

        Raises:
            UserError: one does not; the line begins with its option.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if not value == value or (field.name != "min_level_db" and value < 0):
                raise UserError(f"--{field.name.replace('_', '-')}: must not be below 0, got {value}")
        if self.max_seconds > 30:
            raise UserError(f"--max-seconds: only one Whisper window (30 s) is transcribed, got {self.max_seconds:g}")
        return self


def reason(row: dict, limits: Limits) -> str:
    """The first of REASONS that holds for a scored row, '' for a good one ('duplicate' needs the other rows)."""
    seconds, text = row["duration"], row.get("text", "")
    if row["error"]:
        return "unreadable"
    if seconds < limits.min_seconds:
        return "too_short"
    if seconds > limits.max_seconds:
        return "too_long"
    if row["level_db"] < limits.min_level_db:
        return "silent"
    if row["clipped"] > limits.max_clipped:
        return "clipped"
    if not row["words"]:
        return "empty_reference"
    if _wrong_language(row, limits):
        return "wrong_language"
    if _loops(row, limits):
        return "repetition_loop"
    if not limits.min_cps <= len(text) / seconds <= limits.max_cps:
        return "characters_per_second"
    return "wer" if row["wer"] > limits.max_wer else ""


def _wrong_language(row: dict, limits: Limits) -> bool:
    heard, wanted = row.get("heard_language"), row.get("language")
    if heard and wanted and heard != wanted:
        return row["heard_probability"] >= limits.min_language_probability
    written, said = script(row["text"]), script(row["hypothesis"])
    return bool(written and said and written != said)


def _loops(row: dict, limits: Limits) -> bool:
    """One text loops and the other does not: where both do, somebody really said it over and over."""
    pairs = ((row["repeats"], limits.max_repeats), (row["compression"], limits.max_compression))
    return any(max(pair) >= limit and 2 * min(pair) <= max(pair) for pair, limit in pairs)
