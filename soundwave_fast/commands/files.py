"""Which files a command line means, what their results are called, and how far the work on them has come."""

from __future__ import annotations

import glob
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MANY = 20  # files from which on progress is told even where stderr is no terminal
LONG_SECONDS = 60.0  # a single recording so long is worth a bar
_EVEN_MORE_SUFFIXES = {"aif", "mp2", "oga", "opus", "snd", "wave"}  # beside libsndfile's names of its formats
_NOT_ALONE = {"raw"}  # headerless


def audio_suffixes() -> set[str]:
    """Suffixes (lower case, no dot) that are taken for audio in a directory."""
    import soundfile

    return ({name.lower() for name in soundfile.available_formats()} | _EVEN_MORE_SUFFIXES) - _NOT_ALONE


def expand(names: Sequence[str]) -> list[str]:
    """Files that the names stand for: a file itself, a directory's audio files (and its directories'), a pattern's.

    Raises:
        ValueError: a name that stands for nothing.
    """
    found: list[str] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            suffixes = audio_suffixes()
            inside = sorted(str(p) for p in path.rglob("*") if p.is_file() and p.suffix[1:].lower() in suffixes)
            if not inside:
                raise ValueError(f"{name}: holds no audio files")
            found += inside
        elif path.exists() or not glob.has_magic(name):
            if not path.is_file():
                raise ValueError(f"{name}: no such file")
            found.append(name)
        else:
            matches = sorted(match for match in glob.glob(name, recursive=True) if Path(match).is_file())
            if not matches:
                raise ValueError(f"{name}: no file matches")
            found += matches
    return found


def output_paths(names: Sequence[str], folder: Path, suffix: str) -> list[Path]:
    """Where each file's result goes: folder/NAME.srt, or folder/NAME.wav.srt where two files share a name.

    Raises:
        ValueError: two files of the same name, from different directories.
    """
    stems = Counter(Path(name).stem for name in names)
    paths = [folder / ((p.stem if stems[p.stem] == 1 else p.name) + suffix) for p in map(Path, names)]
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise ValueError(f"{folder}: {twice[0].name} would be the result of several files")
    return paths


def seconds_of(names: Sequence[str]) -> float:
    """Sum of the recordings' durations by their headers; unreadable ones count 0."""
    import soundfile

    total = 0.0
    for name in names:
        try:
            total += soundfile.info(name).duration
        except (soundfile.LibsndfileError, RuntimeError, TypeError):
            continue
    return total


def progress_bar(names: Sequence[str], by_seconds: bool = True) -> Any:
    """tqdm on stderr, counting seconds of audio or files; silent where the work is short or nobody watches."""
    from tqdm import tqdm

    watched = sys.stderr.isatty()
    total: float = len(names)
    shown = (watched and len(names) > 1) or len(names) >= MANY
    if by_seconds and (shown or watched):
        total = round(seconds_of(names))
        shown = shown or total >= LONG_SECONDS
    return tqdm(
        total=total,
        unit="s" if by_seconds else "file",
        desc="audio" if by_seconds else "files",
        disable=not shown,
        mininterval=0.2 if watched else 30.0,
        bar_format="{desc} {percentage:3.0f}% {bar:20} {n:.0f}/{total_fmt} {unit} [{elapsed}<{remaining}]",
    )
