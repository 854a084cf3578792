"""Manifests, plain or gzipped: one utterance a line (or lhotse's cuts, or its supervisions), checked on the way in.

A line's keys, `audio` being relative to the manifest's folder; any others are left alone:

    id, audio, duration     required; duration in seconds
    start, channel          a stretch of `audio` from `start` s on, one of its channels (else their mean)
    text                    transcript; empty: no CTC supervision
    language                of the speech: a code or a name
    translation, target_language   both or neither
    emotion, gender, age, speaker_count, sound   labels, text or a number
    slots                   {name: value}: what the speaker names
    prompt, answer          the row's own question and its answer; an answer alone: the question is in the audio
    task                    the one task this row is for; else every task it has the keys for
    speaker                 for splits that keep speakers whole
"""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from soundwave_fast.errors import UserError
from train.data import lhotse_manifest, tasks
from train.data.jsonl import lines
from train.data.utterance import LABELS, Utterance

_TEXTS = ("audio", "text", "language", "translation", "target_language", "prompt", "answer", "task")
_KEYS = ("id", "duration", "start", "channel", "slots", "speaker", *_TEXTS, *LABELS)


def read(path: str | Path) -> list[Utterance]:
    """Utterances of a manifest.

    Raises:
        UserError: no such file, not text, empty, not JSON, a missing or ill-typed key - each with the line's number.
    """
    path, rows, others = Path(path), [], None
    for where, row in lines(path):
        kind = lhotse_manifest.kind_of(row)
        if kind == "cut":
            row = lhotse_manifest.from_cut(row, where, path.parent)
        elif kind == "supervision":
            others = others or lhotse_manifest.Recordings(path)
            row = others.join(row, where)
        elif kind is not None:
            raise UserError(f"{where}: a lhotse {kind}; name its cuts or its supervisions instead")
        rows.append(check(row, where, path.parent))
    if not rows:
        raise UserError(f"{path}: the manifest is empty")
    return rows


def _seconds(row: dict[str, Any], key: str, where: str, least_allowed: bool = False) -> float:
    value = row.get(key, 0.0)
    good = not isinstance(value, bool) and isinstance(value, (int, float)) and 0 <= value < float("inf")
    if not good or (value == 0 and not least_allowed):
        raise UserError(f"{where}: {key} {value!r} is not a positive number of seconds")
    return float(value)


def _labels(row: dict[str, Any], where: str) -> dict[str, str]:
    found = {}
    for key in LABELS:
        value = row.get(key)
        if value is None or value == "":
            continue
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise UserError(f"{where}: {key} {value!r} is neither text nor a number")
        found[key] = f"{value:g}" if isinstance(value, float) else str(value)
    return found


def check(row: dict[str, Any], where: str, folder: Path) -> Utterance:
    """A line's object as an utterance.

    Raises:
        UserError: a missing key, one of the wrong type, or one that needs another; `where` is named.
    """
    for key in ("id", "audio", "duration"):
        if key not in row:
            near = difflib.get_close_matches(key, [k for k in row if k not in _KEYS], 1)
            raise UserError(f"{where}: no {key!r}" + (f" (there is {near[0]!r})" if near else ""))
    duration = _seconds(row, "duration", where)
    for key in _TEXTS:
        if not isinstance(row.get(key, ""), str):
            raise UserError(f"{where}: {key} is not text")
    slots = row.get("slots") or {}
    if not isinstance(slots, dict):
        raise UserError(f"{where}: slots is not an object")
    channel = row.get("channel")
    if channel is not None and (isinstance(channel, bool) or not isinstance(channel, int) or channel < 0):
        raise UserError(f"{where}: channel {channel!r} is not a channel's number")
    if row.get("prompt") and not row.get("answer"):
        raise UserError(f"{where}: a prompt without an answer")
    for one, other in (("translation", "target_language"), ("target_language", "translation")):
        if row.get(one) and not row.get(other):
            raise UserError(f"{where}: {one} without {other}")
    if row.get("task"):
        tasks.check(row["task"], f"{where}: task")
    return Utterance(
        id=str(row["id"]),
        audio=folder / row["audio"],
        duration=duration,
        text=row.get("text", ""),
        slots={str(k): str(v) for k, v in slots.items()},
        task=row.get("task", ""),
        prompt=row.get("prompt", ""),
        answer=row.get("answer", ""),
        speaker=str(row.get("speaker", "")),
        language=row.get("language", ""),
        translation=row.get("translation", ""),
        target_language=row.get("target_language", ""),
        labels=_labels(row, where),
        start=_seconds(row, "start", where, least_allowed=True),
        channel=channel,
        is_segment=bool(row.get("is_segment", "start" in row)),
    )


def as_row(utterance: Utterance) -> dict[str, Any]:
    """What `check` would read back as this utterance."""
    row = {field.name: getattr(utterance, field.name) for field in dataclasses.fields(utterance)}
    row = {key: value for key, value in row.items() if value not in ("", None, {}) and key != "labels"}
    row |= {"audio": str(utterance.audio), **utterance.labels}
    if not utterance.is_segment:
        del row["start"], row["is_segment"]
    return row
