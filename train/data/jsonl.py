"""JSON lines, plain or gzipped, each with the file and number it stands at."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from soundwave_fast.errors import UserError


def lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """('file:line', its JSON object) for each line that is not empty.

    Raises:
        UserError: no such file, not text, cut short, not JSON, not an object.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such manifest")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        # newline="\n": universal newlines would also cut at a carriage return within a transcript
        with opener(path, "rt", encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", _object(line, f"{path}:{number}")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: not a whole gzip file ({str(error).rstrip('.')})") from None


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object")
    return row
