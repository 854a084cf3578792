"""lhotse's manifests as rows of ours: cuts, and supervisions with their recordings; read as JSON, without lhotse.

What a row cannot hold is refused with the line's number rather than dropped: mixed and padded cuts, several channels
at once, audio that is not a file, and recordings changed on the fly (data.speed does that here).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from soundwave_fast.errors import UserError
from train.data.jsonl import lines
from train.data.utterance import LABELS

_EXTRAS = (*LABELS, "translation", "target_language", "slots", "prompt", "answer", "task")


def kind_of(row: dict[str, Any]) -> str | None:
    """'cut', 'supervision', 'recording', another type of cut by its name, or None: a row of ours."""
    kind = str(row.get("type", ""))
    if kind.endswith("Cut"):
        return "cut" if kind == "MonoCut" else kind
    if "recording_id" in row and "audio" not in row:
        return "supervision"
    if "sources" in row and "sampling_rate" in row:
        return "recording"
    return None


def _audio(recording: Any, where: str, folder: Path) -> str:
    """The one file of a recording; lhotse's relative paths are relative to where it was made."""
    if not isinstance(recording, dict):
        raise UserError(f"{where}: a cut without a recording")
    if recording.get("transforms"):
        raise UserError(f"{where}: its recording is changed on the fly (transforms); save the audio, or use data.speed")
    sources = recording.get("sources") or []
    if len(sources) != 1 or sources[0].get("type") != "file":
        raise UserError(f"{where}: its recording is not one audio file")
    path = Path(sources[0]["source"])
    if not path.is_absolute() and not (folder / path).is_file() and path.is_file():
        path = path.absolute()
    return str(path)


def _extras(*owners: dict[str, Any]) -> dict[str, Any]:
    """Keys of ours, from lhotse's `custom` fields; the first owner that has one decides."""
    found: dict[str, Any] = {}
    for owner in owners:
        custom = {**(owner.get("custom") or {}), **({"gender": owner["gender"]} if owner.get("gender") else {})}
        found = {**{key: custom[key] for key in _EXTRAS if custom.get(key) is not None}, **found}
    return found


def from_cut(row: dict[str, Any], where: str, folder: Path) -> dict[str, Any]:
    """A MonoCut as a row; the transcripts of several supervisions are joined in the order they are spoken.

    Raises:
        UserError: a key that is missing, or audio that is not one plain file.
    """
    for key in ("id", "start", "duration"):
        if key not in row:
            raise UserError(f"{where}: a cut without {key!r}")
    recording = row.get("recording")
    audio = _audio(recording, where, folder)
    whole = row["start"] == 0 and abs(row["duration"] - recording.get("duration", row["duration"])) < 1e-3
    said = sorted(row.get("supervisions") or [], key=lambda s: s.get("start", 0.0))
    first = said[0] if said else {}
    several = len(recording["sources"][0].get("channels") or [0]) > 1
    return {
        **_extras(row, *said),
        "id": row["id"],
        "audio": audio,
        "duration": row["duration"],
        "text": " ".join(s["text"].strip() for s in said if s.get("text")),
        "speaker": first.get("speaker") or "",
        "language": first.get("language") or "",
        "start": row["start"],
        "channel": row.get("channel", 0) if several else None,
        "is_segment": not whole,
    }


class Recordings:
    """The recordings beside a supervisions manifest: its name with 'supervisions' replaced, as lhotse writes them.

    Raises:
        UserError: no such file.
    """

    def __init__(self, supervisions: Path) -> None:
        self.folder, name = supervisions.parent, supervisions.name.replace("supervisions", "recordings")
        if name == supervisions.name:
            raise UserError(f"{supervisions}: lhotse supervisions whose recordings are not known (no 'supervisions' "
                            "in the file's name)")  # fmt: skip
        self.path = self.folder / name
        self.rows = {row.get("id"): (row, where) for where, row in lines(self.path)}

    def join(self, supervision: dict[str, Any], where: str) -> dict[str, Any]:
        """A supervision and its recording as a row.

        Raises:
            UserError: no such recording, or one that `from_cut` would refuse.
        """
        if supervision["recording_id"] not in self.rows:
            raise UserError(f"{where}: no recording {supervision['recording_id']!r} in {self.path}")
        recording, there = self.rows[supervision["recording_id"]]
        channel = supervision.get("channel", 0)
        cut = {
            "id": supervision.get("id"),
            "start": supervision.get("start"),
            "duration": supervision.get("duration"),
            "channel": channel[0] if isinstance(channel, list) and channel else channel,
            "supervisions": [supervision],
            "recording": recording,
        }
        missing = [key for key in ("id", "start", "duration") if cut[key] is None]
        if missing:
            raise UserError(f"{where}: a supervision without {missing[0]!r}")
        _audio(recording, there, self.folder)
        return from_cut(cut, where, self.folder)
