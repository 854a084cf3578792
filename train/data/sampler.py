"""Which utterance with which task next: temperature mixing and duration buckets, a pure function of the seed.

A batch never holds more than `batch_seconds` of padded audio, `batch_tokens` padded LLM positions and `batch_size`
utterances. lhotse's sampler stops once one more utterance as long as the longest so far would not fit, so the last one
may overshoot; here every utterance counts as its bucket's longest, which makes that rule exact. With a bound on tokens,
an utterance's length is the share of a batch it takes up by either bound, whichever is larger.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice

from lhotse import CutSet, MonoCut
from lhotse.dataset import DynamicBucketingSampler
from lhotse.dataset.sampling.dynamic_bucketing import estimate_duration_buckets

from soundwave_fast.errors import UserError
from train.config import Data
from train.data import tasks
from train.data.augment import speed_of
from train.data.utterance import Utterance

Measure = Callable[[Utterance, str, int], int]  # (row, task, draw) -> LLM positions at most
TOP_STEP = 1.25  # between the buckets past the longest audio, for utterances whose tokens weigh more


class TemperatureMux:
    """Endless mix of sources, p_i ~ n_i ** (1 / T), T = T0 + growth * epoch (paper section 3.4).

    The stream is a pure function of (seed, sources, first), so a resumed run replays it exactly. Each source is
    shuffled anew whenever it starts over. T is constant within an epoch (one epoch: as many draws as all sources have
    rows).

    Args:
        first: number of the first draw: the temperature goes on from there.
        measure: LLM positions of a draw, where `data.batch_tokens` bounds them.
    """

    def __init__(
        self,
        sources: dict[str, list[int]],
        weights: dict[str, float],
        data: Data,
        rows: list[Utterance],
        seed: int,
        first: int = 0,
        measure: Measure | None = None,
    ) -> None:
        self.sources, self.data, self.rows, self.seed = sources, data, rows, seed
        self.first, self.measure = first, measure
        self.sizes = {name: len(index) * weights[name] for name, index in sources.items()}
        self.edges: list[float] = []  # an utterance counts as the next of these seconds; none yet: as it is

    def shares(self, epoch: int) -> list[float]:
        start, growth = self.data.temperature
        raised = [size ** (1 / (start + growth * epoch)) for size in self.sizes.values()]
        return [value / sum(raised) for value in raised]

    def _cycle(self, name: str) -> Iterator[int]:
        rng = random.Random(f"{self.seed}/{name}")
        while True:
            order = list(self.sources[name])
            rng.shuffle(order)
            yield from order

    def _seconds(self, row: Utterance, task: str, draw: int) -> float:
        """Length of a draw as the batches count it."""
        seconds = row.duration / speed_of(self.data.speed, row.duration, self.seed, draw)
        if self.measure is not None:
            seconds = max(seconds, self.measure(row, task, draw) * self.data.batch_seconds / self.data.batch_tokens)
        return seconds

    def __iter__(self) -> Iterator[MonoCut]:
        rng = random.Random(self.seed)
        names = list(self.sources)
        streams = {name: self._cycle(name) for name in names}
        epoch_draws = max(1, sum(map(len, self.sources.values())))
        draw, left_out = self.first, 0
        while True:
            shares = self.shares(draw // epoch_draws)
            for _ in range(epoch_draws - draw % epoch_draws):
                name = rng.choices(names, shares)[0]
                index = next(streams[name])
                row = self.rows[index]
                seconds = self._seconds(row, name, draw)
                fits = seconds <= self.data.batch_seconds
                if left_out > 2 * epoch_draws:
                    raise UserError("data.batch_tokens, data.batch_seconds: no utterance fits a batch")
                if not fits:
                    left_out += 1
                else:
                    at = bisect_left(self.edges, seconds)
                    cut = MonoCut(
                        id=f"{row.id}#{draw}",
                        start=0.0,
                        duration=self.edges[at] if at < len(self.edges) else seconds,
                        channel=0,
                    )
                    cut.custom = {"row": index, "task": name, "draw": draw, "left_out": left_out}
                    left_out = 0
                    yield cut
                draw += 1


def usable(rows: list[Utterance], data: Data) -> tuple[list[int], Counter]:
    """Rows that a batch can hold, by their own durations, and how many are left out, by cause."""
    kept, out = [], Counter()
    longest = min(data.max_seconds, data.batch_seconds)
    for i, row in enumerate(rows):
        if row.duration > longest:
            out["audio: too long"] += 1
        elif row.duration < data.min_seconds:
            out["audio: too short"] += 1
        else:
            kept.append(i)
    return kept, out


def sources_of(rows: list[Utterance], data: Data) -> tuple[dict[str, list[int]], Counter]:
    """Row numbers by task, and rows left out by cause.

    Raises:
        UserError: an unknown task, no row that has what any of the tasks needs, or more than `data.max_bad_share` of
            the rows out of bounds.
    """
    for task in data.tasks:
        tasks.check(task, "data.tasks")
    kept, out = usable(rows, data)
    if out.total() > 20 and out.total() > data.max_bad_share * len(rows):
        raise UserError(f"{out.total()} of {len(rows)} rows cannot be used: {dict(out)} (data.max_bad_share)")
    sources = {task: [i for i in kept if tasks.applies(task, rows[i])] for task in data.tasks}
    sources = {task: index for task, index in sources.items() if index}  # a preset may name more than a manifest has
    if not sources:
        names = ", ".join(map(repr, data.tasks))
        why = f" ({dict(out)})" if out else ""
        raise UserError(f"data.tasks: no row of the training manifests has what {names} needs{why}")
    used = {i for index in sources.values() for i in index}
    for i in kept:
        if i not in used:
            out["text: empty" if not rows[i].text.strip() else "task: none applies"] += 1
    return sources, out


def build(
    rows: list[Utterance],
    data: Data,
    seed: int,
    rank: int,
    world: int,
    first: int = 0,
    measure: Measure | None = None,
) -> DynamicBucketingSampler:
    """Endless sampler of batches (CutSets) of at most `batch_seconds`, `batch_tokens` and `batch_size`.

    As many batches on every rank, from the same buckets. Its state is a few numbers; restoring it replays the draws
    without reading audio.

    Args:
        first: draws made before, where a run goes on in another order (another number of ranks).
        measure: LLM positions of a draw; needed for `data.batch_tokens`.

    Raises:
        UserError: as `sources_of`.
    """
    sources, _ = sources_of(rows, data)
    mux = TemperatureMux(sources, data.tasks, data, rows, seed, first, measure if data.batch_tokens else None)
    total = sum(map(len, sources.values()))
    number = max(2, min(data.buckets, total // max(1, 2 * data.batch_size)))
    bins = estimate_duration_buckets(islice(iter(mux), max(100, min(2000, total))), num_buckets=number)
    longest = max(rows[i].duration for index in sources.values() for i in index) / min((1.0, *data.speed))
    tops = [min(data.batch_seconds, max([longest, *bins]))]
    while mux.measure is not None and tops[-1] < data.batch_seconds:
        tops.append(min(data.batch_seconds, tops[-1] * TOP_STEP))
    bins = bins + [top for top in tops[:-1] if not bins or top > bins[-1]]
    mux.edges = [float(edge) for edge in (*bins, tops[-1])]
    return DynamicBucketingSampler(
        CutSet(mux),
        max_duration=data.batch_seconds * (1 + 1e-9),  # n edges of batch_seconds / n may round to more
        max_cuts=data.batch_size,
        duration_bins=[float(edge) for edge in bins],
        buffer_size=max(4 * data.batch_size * data.buckets, 100),
        shuffle=True,
        seed=seed,
        rank=rank,
        world_size=world,
    )
