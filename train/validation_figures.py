"""Names of the validation figures in a metrics row, and how they read."""

from __future__ import annotations

from typing import Any

PREFIX = "valid_"
WER = {"ctc_wer": "CTC WER", "llm_wer": "LLM WER"}
COUNTS = ("utterances", "skipped", "s")  # the rest are tasks: the share of right answers


def figures_of(row: dict[str, Any]) -> dict[str, Any]:
    """The validation's part of a row, without the prefix."""
    return {key.removeprefix(PREFIX): value for key, value in row.items() if key.startswith(PREFIX)}


def tasks_of(row: dict[str, Any]) -> dict[str, float]:
    """Task -> share of right answers."""
    return {key: value for key, value in figures_of(row).items() if key not in WER and key not in COUNTS}


def summary(row: dict[str, Any]) -> str:
    """For people: 'CTC WER 12.3 %, LLM WER 8.0 %, slot 75 % right'; '' where nothing was validated."""
    figures = figures_of(row)
    parts = [f"{label} {100 * figures[key]:.1f} %" for key, label in WER.items() if key in figures]
    return ", ".join([*parts, *(f"{task} {share:.0%} right" for task, share in sorted(tasks_of(row).items()))])
