"""JSONL manifests: one utterance a line, checked on the way in."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from train.config import UserError


@dataclass(frozen=True)
class Utterance:
    id: str
    audio: Path
    duration: float  # seconds
    text: str = ""  # transcript; empty: no CTC supervision
    slots: dict[str, str] = field(default_factory=dict)
    task: str = ""  # with prompt and answer: a row that brings its own question
    prompt: str = ""
    answer: str = ""
    speaker: str = ""


def read(path: str | Path) -> list[Utterance]:
    """Utterances of a manifest; `audio` is relative to the manifest's folder.

    Raises:
        UserError: no such file, not text, empty, not JSON, a missing or ill-typed key - each with the line's number.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such manifest")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also cut at U+2028 within a transcript
        if line.strip():
            rows.append(_row(line, f"{path}:{number}", path.parent))
    if not rows:
        raise UserError(f"{path}: the manifest is empty")
    return rows


def _row(line: str, where: str, folder: Path) -> Utterance:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object")
    for key in ("id", "audio", "duration"):
        if key not in row:
            raise UserError(f"{where}: no {key!r}")
    duration = row["duration"]
    if isinstance(duration, bool) or not isinstance(duration, (int, float)) or not 0 < duration < float("inf"):
        raise UserError(f"{where}: duration {duration!r} is not a positive number of seconds")
    for key in ("audio", "text", "task", "prompt", "answer"):
        if not isinstance(row.get(key, ""), str):
            raise UserError(f"{where}: {key} is not text")
    slots = row.get("slots") or {}
    if not isinstance(slots, dict):
        raise UserError(f"{where}: slots is not an object")
    if row.get("prompt") and not row.get("answer"):
        raise UserError(f"{where}: a prompt without an answer")
    return Utterance(
        id=str(row["id"]),
        audio=folder / row["audio"],
        duration=float(duration),
        text=row.get("text", ""),
        slots={str(k): str(v) for k, v in slots.items()},
        task=row.get("task", ""),
        prompt=row.get("prompt", ""),
        answer=row.get("answer", ""),
        speaker=str(row.get("speaker", "")),
    )
