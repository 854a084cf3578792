"""The curation folder: input shards, scored shards, what proves one finished, and who works on which.

    OUT/input/job.json            sources and number of rows; written last, so it stands for a complete `prepare`
    OUT/input/shard-00000.jsonl   rows: id, audio (absolute), duration, text, source; maybe start, channel, language ...
    OUT/scored/shard-00000.jsonl  the same rows with the measurements of engine.py
    OUT/scored/shard-00000.done   JSON: settings, digest of (input shard, settings), digest of the scored shard

Everything is written under another name and renamed. A shard counts as finished while both digests hold.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from soundwave_fast.errors import UserError, disk_errors

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def writing(path: Path) -> AbstractContextManager[None]:
    """A full disk or a folder that cannot be written becomes one clear line (UserError)."""
    return disk_errors(path, "finished shards are intact")


def read_jsonl(path: Path) -> Iterator[dict]:
    """Rows of a file that this package wrote."""
    with open(path, encoding="utf-8", newline="\n") as file:
        for line in file:
            yield json.loads(line)


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)


def line_of(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_jsonl(path: Path, rows: Iterable[dict]) -> int:
    """Write rows, streaming, as a whole file or nothing; returns how many."""
    temporary, count = path.with_name(f".{path.name}.tmp"), 0
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(line_of(row))
                count += 1
        os.replace(temporary, path)
    return count


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


@dataclass(frozen=True)
class Job:
    """A curation folder."""

    out: Path

    def note(self) -> dict | None:
        """What `prepare` wrote down, None before it has finished."""
        path = self.out / "input" / "job.json"
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{path}: damaged; run `curate prepare` again, with --again") from None

    def inputs(self) -> list[Path]:
        """The input shards.

        Raises:
            UserError: `prepare` has not finished here.
        """
        if self.note() is None:
            raise UserError(f"{self.out}: no prepared manifest shards; run `curate prepare SOURCE --out {self.out}`")
        return sorted((self.out / "input").glob("shard-*.jsonl"))

    def prepare(self, rows: Iterable[dict], size: int, note: dict) -> dict:
        """Cut rows into shards of `size`, replacing what was there; ids are made unique. Returns the note.

        Raises:
            UserError: no rows at all.
        """
        fresh, old = self.out / "input.tmp", self.out / "input.old"
        shutil.rmtree(fresh, ignore_errors=True)
        seen: set[str] = set()
        block: list[dict] = []
        count = shards = 0
        with writing(self.out):
            fresh.mkdir(parents=True)
            for row in rows:
                row["id"] = _unique(str(row["id"]), seen)
                block.append(row)
                count += 1
                if len(block) == size:
                    write_jsonl(fresh / f"shard-{shards:05d}.jsonl", block)
                    block, shards = [], shards + 1
            if block:
                write_jsonl(fresh / f"shard-{shards:05d}.jsonl", block)
                shards += 1
            if not count:
                shutil.rmtree(fresh)
                raise UserError(f"{', '.join(note['sources'])}: no utterances")
            note = {**note, "rows": count, "shards": shards}
            write_text(fresh / "job.json", json.dumps(note, indent=1) + "\n")
            shutil.rmtree(old, ignore_errors=True)
            if (self.out / "input").exists():
                os.rename(self.out / "input", old)
            os.rename(fresh, self.out / "input")
            shutil.rmtree(old, ignore_errors=True)
        return note

    def scored(self, shard: Path) -> Path:
        return self.out / "scored" / shard.name

    def finished(self, shard: Path, settings: dict | None = None) -> dict | None:
        """The `.done` note of a shard whose digests hold (for `settings`, where given), else None."""
        output = self.scored(shard)
        try:
            done = json.loads(output.with_suffix(".done").read_text(encoding="utf-8"))
            if settings is not None and done["settings"] != settings:
                return None
            whole = done["digest"] == _digest(shard.read_bytes(), line_of(done["settings"]).encode())
            return done if whole and done["output"] == _digest(output.read_bytes()) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def finish(self, shard: Path, rows: list[dict], settings: dict) -> None:
        """Write a scored shard, then the note that proves it whole."""
        output = self.scored(shard)
        write_jsonl(output, rows)
        digests = {
            "digest": _digest(shard.read_bytes(), line_of(settings).encode()),
            "output": _digest(output.read_bytes()),
        }
        write_text(output.with_suffix(".done"), json.dumps({"rows": len(rows), **digests, "settings": settings}) + "\n")

    @contextmanager
    def claim(self, shard: Path) -> Iterator[bool | None]:
        """Whether this process may work on a shard; None where the file system knows no locks.

        `flock`: the kernel drops the lock with the process that holds it, however that dies, so no lock goes stale
        and no clock or heartbeat is asked. The lock spares double work and nothing else: two processes on one shard
        would write the same file.
        """
        import fcntl

        path = self.out / "claims" / f"{shard.stem}.lock"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "w")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                answer: bool | None = True
            except OSError as error:
                answer = None if error.errno in _NO_LOCKS else False
            yield answer


def _unique(name: str, seen: set[str]) -> str:
    """`name`, or name~2, name~3 ... where it is taken."""
    fresh, number = name, 1
    while fresh in seen:
        number += 1
        fresh = f"{name}~{number}"
    seen.add(fresh)
    return fresh
