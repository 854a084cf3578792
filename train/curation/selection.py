"""Applies limits to scored shards: kept and dropped manifests, duplicates across all shards, and the tallies.

Streaming: what grows with the corpus in memory is one short hash per kept utterance.
"""

from __future__ import annotations

import heapq
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from soundwave_fast.errors import UserError
from train.curation.reasons import Limits, reason
from train.curation.shards import Job, line_of, read_jsonl, writing

BINS = 100  # of WER, from 0 to 1; what lies above is counted in the last
WORST = 20


@dataclass
class Tally:
    """What the report shows; hours are of audio."""

    rows: int = 0
    hours: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    counts: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(int)))
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(BINS))  # utterances by WER, if judged by it
    histogram_hours: np.ndarray = field(default_factory=lambda: np.zeros(BINS))
    edits: float = 0.0
    words: int = 0
    worst: list[tuple] = field(default_factory=list)
    worst_kept: list[tuple] = field(default_factory=list)

    def add(self, row: dict, why: str) -> None:
        """Count a row; `why` is its reason, '' for a kept one."""
        self.rows += 1
        self.hours[row["source"]][why or "kept"] += row["duration"] / 3600
        self.counts[row["source"]][why or "kept"] += 1
        if why in ("", "wer", "duplicate"):  # the others never came to being judged by WER
            index = min(BINS - 1, int(row["wer"] * BINS))
            self.histogram[index] += 1
            self.histogram_hours[index] += row["duration"] / 3600
            self.edits += row["wer"] * row["words"]
            self.words += row["words"]
        if row["wer"] is not None and row["hypothesis"]:
            self._worst(self.worst, row, why)
            if not why:
                self._worst(self.worst_kept, row, why)

    def _worst(self, heap: list[tuple], row: dict, why: str) -> None:
        item = (row["wer"], row["words"], -self.rows, {**row, "reason": why})
        heapq.heappushpop(heap, item) if len(heap) >= WORST else heapq.heappush(heap, item)

    def total(self, table: dict[str, dict[str, float]], key: str) -> float:
        return sum(one.get(key, 0) for one in table.values())

    def summary(self) -> dict:
        """JSON-ready figures."""
        reasons = sorted({key for one in self.counts.values() for key in one})
        return {
            "utterances": self.rows,
            "kept": int(self.total(self.counts, "kept")),
            "hours": {key: round(self.total(self.hours, key), 4) for key in reasons},
            "counts": {key: int(self.total(self.counts, key)) for key in reasons},
            "wer": round(self.edits / self.words, 4) if self.words else None,
            "sources": {
                name: {
                    key: {"hours": round(value, 4), "utterances": self.counts[name][key]} for key, value in one.items()
                }
                for name, one in self.hours.items()
            },
        }


def scored_rows(job: Job, partial: bool = False) -> Iterator[dict]:
    """Rows of the finished shards, in order.

    Raises:
        UserError: shards that are not finished (unless `partial`), none that is, or shards made with unlike settings.
    """
    shards = job.inputs()
    notes = {path: job.finished(path) for path in shards}
    done = [path for path in shards if notes[path]]
    if len(done) < len(shards) and not partial:
        raise UserError(
            f"{job.out}: {len(shards) - len(done)} of {len(shards)} shards are not transcribed; "
            "run `curate transcribe`, or take what is there with --partial"
        )
    if not done:
        raise UserError(f"{job.out}: no shard is transcribed yet")
    if len({line_of(notes[path]["settings"]) for path in done}) > 1:
        raise UserError(f"{job.out}: its shards were transcribed with unlike settings; run `curate transcribe` again")
    return (row for path in done for row in read_jsonl(job.scored(path)))


def select(rows: Iterable[dict], limits: Limits, to: Path) -> Tally:
    """Judge scored rows; write `to`/kept.jsonl and `to`/dropped.jsonl, rows with their reason; return the tallies."""
    tally, seen, names = Tally(), set(), ("kept.jsonl", "dropped.jsonl")
    with writing(to):
        to.mkdir(parents=True, exist_ok=True)
        temporary = [to / f".{name}.tmp" for name in names]
        with open(temporary[0], "w", encoding="utf-8") as kept, open(temporary[1], "w", encoding="utf-8") as dropped:
            for row in rows:
                why = reason(row, limits)
                if not why and row["hash"] in seen:
                    why = "duplicate"
                if not why:
                    seen.add(row["hash"])
                tally.add(row, why)
                (dropped if why else kept).write(line_of({**row, "reason": why}))
        for path, name in zip(temporary, names, strict=True):
            os.replace(path, to / name)
    return tally
