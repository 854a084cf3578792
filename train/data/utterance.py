"""Utterance: what a manifest's row says about a stretch of audio."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

LABELS = ("emotion", "gender", "age", "speaker_count", "sound")


@dataclass(frozen=True, slots=True)  # there may be millions
class Utterance:
    id: str
    audio: Path
    duration: float  # seconds
    text: str = ""  # transcript; empty: no CTC supervision
    slots: dict[str, str] = field(default_factory=dict)
    task: str = ""  # the only task it is for
    prompt: str = ""  # with an answer: a row that brings its own question
    answer: str = ""
    speaker: str = ""
    language: str = ""
    translation: str = ""
    target_language: str = ""
    labels: dict[str, str] = field(default_factory=dict)  # those of LABELS that it has
    start: float = 0.0  # seconds into the file
    channel: int | None = None
    is_segment: bool = False  # `duration` seconds of a longer file

    @property
    def key(self) -> str:
        """What tells one audio from another: ids of two manifests may be equal."""
        where = f"#{self.start:g}+{self.duration:g}" if self.is_segment else ""
        return f"{self.audio}{where}{'' if self.channel is None else f'@{self.channel}'}"
