"""A transcript as text, JSON, SRT or WebVTT: words grouped into cues that can be read while they are spoken."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from soundwave_fast.generate import Transcript
from soundwave_fast.words import Word

FORMATS = ("text", "json", "srt", "vtt")
LINE_CHARACTERS, LINES = 42, 2  # what broadcasters hold readable
CUE_SECONDS = 7.0  # longest cue
PAUSE_SECONDS = 0.8  # silence between two words that ends a cue
LINGER_SECONDS = 0.5  # CTC says a word's last token before the speaker is through with it
SHORTEST_SECONDS = 1.0  # a cue stays so long at least, where the next one lets it


@dataclass(frozen=True)
class Cue:
    """One subtitle: from when to when (s), and its lines."""

    start: float
    end: float
    text: str


def cues(words: Sequence[Word]) -> list[Cue]:
    """Group timed words into cues of at most 2 lines of 42 characters and 7 s, parted at pauses and sentence ends.

    Cues do not overlap; a single longer word has a line of its own.
    """
    groups: list[list[Word]] = []
    for word in words:
        if not groups or _begins_cue(groups[-1], word):
            groups.append([])
        groups[-1].append(word)
    found = []
    for group, after in zip(groups, [*groups[1:], None]):
        start, end = group[0].start, max(word.end for word in group)
        end = max(end + LINGER_SECONDS, start + SHORTEST_SECONDS)
        if after is not None:
            end = min(end, after[0].start)
        found.append(Cue(start, max(start, end), "\n".join(_lines([word.text for word in group]))))
    return found


def _begins_cue(group: list[Word], word: Word) -> bool:
    pause = word.start - group[-1].end
    sentence_ends = group[-1].text.endswith((".", "?", "!")) and len(group) > 2
    too_long = word.end - group[0].start > CUE_SECONDS
    return pause >= PAUSE_SECONDS or sentence_ends or too_long or len(_lines([w.text for w in [*group, word]])) > LINES


def _lines(texts: Sequence[str]) -> list[str]:
    """Words filled into lines, the fewest and then the most even ones."""
    lines = _fill(texts, LINE_CHARACTERS)
    for width in range(max(map(len, texts)), LINE_CHARACTERS):
        even = _fill(texts, width)
        if len(even) <= len(lines):
            return even
    return lines


def _fill(texts: Sequence[str], width: int) -> list[str]:
    lines = [texts[0]]
    for text in texts[1:]:
        if len(lines[-1]) + 1 + len(text) <= width:
            lines[-1] += " " + text
        else:
            lines.append(text)
    return lines


def timecode(seconds: float, point: str = ".") -> str:
    """HH:MM:SS.mmm (WebVTT), or with a comma (SRT); hours may have more digits."""
    whole, milliseconds = divmod(round(max(0.0, seconds) * 1000), 1000)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours:02d}:{minute:02d}:{second:02d}{point}{milliseconds:03d}"


def srt(words: Sequence[Word]) -> str:
    """SubRip text of timed words."""
    blocks = [
        f"{number}\n{timecode(cue.start, ',')} --> {timecode(cue.end, ',')}\n{cue.text}\n"
        for number, cue in enumerate(cues(words), 1)
    ]
    return "\n".join(blocks)


def vtt(words: Sequence[Word]) -> str:
    """WebVTT text of timed words."""
    blocks = [
        f"{timecode(cue.start)} --> {timecode(cue.end)}\n{html.escape(cue.text, quote=False)}\n" for cue in cues(words)
    ]
    return "\n".join(["WEBVTT\n", *blocks])


def as_json(transcript: Transcript, name: str | None = None) -> str:
    """One line of JSON: file (if a name is given), text, duration, words and peaks; times in s, no trailing newline."""
    row = {} if name is None else {"file": name}
    row.update(text=transcript.text, duration=round(transcript.duration, 3))
    row["words"] = [_rounded(asdict(word)) for word in transcript.words]
    row["peaks"] = [_rounded(asdict(peak)) for peak in transcript.peaks]
    return json.dumps(row, ensure_ascii=False, allow_nan=False)


def _rounded(row: dict) -> dict:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def render(transcript: Transcript, kind: str, name: str | None = None) -> str:
    """The transcript in one of `FORMATS`, ending in a newline.

    Raises:
        ValueError: an unknown format.
    """
    if kind == "text":
        return transcript.text + "\n"
    if kind == "json":
        return as_json(transcript, name) + "\n"
    if kind == "srt":
        return srt(transcript.words)
    if kind == "vtt":
        return vtt(transcript.words)
    raise ValueError(f"format: {kind!r} is not one of {', '.join(FORMATS)}")


def write(text: str, path: str | Path) -> None:
    """Write a text file whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
