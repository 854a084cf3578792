"""Transcribes and scores manifest shards: each rank claims unfinished ones, any rank may die at any time.

Ranks never talk to each other, so none can hang on another; what is finished is on disk (shards.py). A rank goes
through the shards rank, rank + world, ... first and then helps with the rest, each under a lock of the kernel's.
Batches are made within a shard, by length, so a shard's rows do not depend on who transcribes it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from soundwave_fast.audio import MAX_SECONDS
from train.curation.reasons import Limits, reason
from train.curation.scoring import score
from train.curation.shards import Job, read_jsonl
from train.curation.sound import Sound, listen
from train.curation.transcribers import Transcriber, Transcript, wanted_language

# WER and duplicates are judged by `curate select`; what stands in the scored shards is what no threshold decides.
AT_ONCE = Limits(max_wer=float("inf"))


@dataclass
class Engine:
    """What one rank needs to work through a job."""

    job: Job
    transcriber: Transcriber
    settings: dict  # what the transcripts depend on; part of a shard's digest
    rank: int = 0
    world: int = 1
    batch_size: int = 16
    workers: int = 2  # threads that decode audio
    audio_seconds: float = 0.0  # transcribed by this rank
    seconds: float = 0.0
    shards: int = 0
    _progress: Progress | None = field(default=None, repr=False)

    def run(self) -> int:
        """Work until nothing is left to claim; returns how many shards others still hold."""
        started, paths = time.perf_counter(), self.job.inputs()
        self._progress = Progress(self.job, paths, quiet=self.rank > 0)
        done = {path for path in paths if self.job.finished(path, self.settings)}
        own = paths[self.rank :: self.world]
        order = own + [path for i in range(1, self.world) for path in paths[(self.rank + i) % self.world :: self.world]]
        with ThreadPoolExecutor(self.workers) as pool, self._progress:
            self._progress.begin(done)
            while True:
                before = len(done)
                for path in order:
                    if path not in done and self._work(path, path in own, pool):
                        done.add(path)
                if len(done) in (before, len(paths)):
                    break
        self.seconds = time.perf_counter() - started
        return len(paths) - len(done)

    def _work(self, path: Path, own: bool, pool: ThreadPoolExecutor) -> bool:
        """Whether the shard is finished now."""
        with self.job.claim(path) as mine:
            if mine is False or (mine is None and not own):
                return False
            if not self.job.finished(path, self.settings):
                rows = list(self._rows(path, pool))
                self.job.finish(path, rows, self.settings)
                self.shards += 1
            self._progress.finished(path)
        return True

    def _rows(self, path: Path, pool: ThreadPoolExecutor) -> Iterator[dict]:
        """The shard's rows in their order, with measurements."""
        rows = list(read_jsonl(path))
        order = sorted(range(len(rows)), key=lambda i: (rows[i]["duration"], i))
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        scored: dict[int, dict] = {}
        ahead = [pool.submit(listen, rows[i]) for i in batches[0]] if batches else []
        for k, batch in enumerate(batches):
            sounds = [future.result() for future in ahead]
            ahead = [pool.submit(listen, rows[i]) for i in batches[k + 1]] if k + 1 < len(batches) else []
            for i, row in zip(batch, self._batch([rows[i] for i in batch], sounds), strict=True):
                scored[i] = row
            self._progress.advance(len(batch))
        return (scored[i] for i in range(len(rows)))

    def _batch(self, rows: list[dict], sounds: list[Sound]) -> list[dict]:
        languages = [wanted_language(row, self.settings["language"]) for row in rows]
        usable = [i for i, sound in enumerate(sounds) if sound.wave is not None and sound.duration <= MAX_SECONDS]
        texts: dict[int, Transcript] = {}
        if usable:
            heard = self._transcribe([sounds[i].wave for i in usable], [languages[i] for i in usable])
            texts = dict(zip(usable, heard, strict=True))
            self.audio_seconds += sum(sounds[i].duration for i in usable)
        english = self.settings["task"] == "translate"
        return [
            scored_row(row, sound, texts.get(i), languages[i], english)
            for i, (row, sound) in enumerate(zip(rows, sounds, strict=True))
        ]

    def _transcribe(self, waves: list[np.ndarray], languages: list[str]) -> list[Transcript]:
        """In halves where the device has no room for all of them."""
        try:
            return self.transcriber(waves, languages)
        except torch.OutOfMemoryError:
            if len(waves) == 1:
                raise
        torch.cuda.empty_cache()  # outside the handler: its traceback would keep the tensors
        half = len(waves) // 2
        return self._transcribe(waves[:half], languages[:half]) + self._transcribe(waves[half:], languages[half:])


def scored_row(row: dict, sound: Sound, transcript: Transcript | None, language: str, english: bool = False) -> dict:
    """A manifest row with everything `curate select` judges by; `transcript` is None where there was nothing to hear.

    `language` is the code the row is said to be in ('' unknown); `english`: the transcript is a translation.
    """
    text, heard = row.get("text", ""), transcript.language if transcript else ""
    found = {
        **row,
        "language": language,
        "duration": sound.duration or row["duration"],
        "hypothesis": transcript.text if transcript else "",
        **score(text, transcript.text if transcript else "", "en" if english else language or heard),
        "logprob": transcript.logprob if transcript else None,
        "heard_language": heard,
        "heard_probability": transcript.probability if transcript else 0.0,
        "level_db": sound.level_db,
        "clipped": sound.clipped,
        "hash": sound.hash,
        "error": sound.error,
    }
    return {**found, "reason": reason(found, AT_ONCE)}


class Progress:
    """Rank 0's bar on a terminal, a line a shard elsewhere; counts what the other ranks finish too."""

    def __init__(self, job: Job, paths: list[Path], quiet: bool):
        self.job, self.quiet = job, quiet
        self.bar, self.done = None, set()
        self.notes = {path: job.scored(path).with_suffix(".done") for path in paths}
        self.rows = job.note()["rows"]
        self.started = time.time()

    def __enter__(self) -> Progress:
        if not self.quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.rows, desc="transcribing", unit="utt")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def begin(self, done: set[Path]) -> None:
        self.done |= done
        if done and not self.quiet:
            print(f"curate: {len(done)} of {len(self.notes)} shards are finished already", file=sys.stderr)
        self._count()

    def advance(self, utterances: int) -> None:
        if self.bar is not None:
            self.bar.update(utterances)

    def finished(self, path: Path) -> None:
        self.done.add(path)
        count = self._count()
        if self.bar is None and not self.quiet:
            print(f"curate: {path.stem} done, {count} of {len(self.notes)} shards", file=sys.stderr, flush=True)

    def _count(self) -> int:
        """Shards finished by anybody; the bar is set to them."""
        if self.quiet:
            return 0
        for path, note in self.notes.items():
            if path not in self.done and note.is_file() and note.stat().st_mtime >= self.started:
                self.done.add(path)
        if self.bar is not None:
            self.bar.n = round(self.rows * len(self.done) / max(1, len(self.notes)))
            self.bar.refresh()
        return len(self.done)
