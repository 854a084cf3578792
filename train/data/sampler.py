"""Which utterance with which task next: temperature mixing and duration buckets, a pure function of the seed."""

from __future__ import annotations

import random
from collections.abc import Iterator

from lhotse import CutSet, MonoCut
from lhotse.dataset import DynamicBucketingSampler

from train.config import Data, UserError
from train.data import tasks
from train.data.manifest import Utterance


class TemperatureMux:
    """Endless mix of sources, p_i ~ n_i ** (1 / T), T = T0 + growth * epoch (paper section 3.4).

    The stream is a pure function of (seed, sources), so a resumed run replays it exactly. Each source is shuffled anew
    whenever it starts over. T is constant within an epoch (one epoch: as many draws as all sources have rows).
    """

    def __init__(self, sources: dict[str, list[int]], weights: dict[str, float], data: Data, rows, seed: int) -> None:
        self.sources, self.data, self.rows, self.seed = sources, data, rows, seed
        self.sizes = {name: len(index) * weights[name] for name, index in sources.items()}

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

    def __iter__(self) -> Iterator[MonoCut]:
        rng = random.Random(self.seed)
        names = list(self.sources)
        streams = {name: self._cycle(name) for name in names}
        epoch_draws = max(1, sum(map(len, self.sources.values())))
        draw = 0
        while True:
            shares = self.shares(draw // epoch_draws)
            for _ in range(epoch_draws):
                name = rng.choices(names, shares)[0]
                index = next(streams[name])
                row = self.rows[index]
                cut = MonoCut(id=f"{row.id}#{draw}", start=0.0, duration=row.duration, channel=0)
                cut.custom = {"row": index, "task": name, "draw": draw}
                yield cut
                draw += 1


def build(rows: list[Utterance], data: Data, seed: int, rank: int, world: int) -> DynamicBucketingSampler:
    """Endless sampler of batches (CutSets) of at most `batch_seconds` and `batch_size`, the same length on all ranks.

    Raises:
        UserError: an unknown task, or no row that has what any of the tasks needs.
    """
    sources = {}
    for task in data.tasks:
        if task not in tasks.NAMES:
            raise UserError(f"data.tasks: {task!r} is not one of {', '.join(tasks.NAMES)}")
        sources[task] = [i for i, row in enumerate(rows) if tasks.applies(task, row)]
    sources = {task: index for task, index in sources.items() if index}  # a preset may name more than a manifest has
    if not sources:
        names = ", ".join(map(repr, data.tasks))
        raise UserError(f"data.tasks: no row of the training manifests has what {names} needs")
    mux = TemperatureMux(sources, data.tasks, data, rows, seed)
    total = sum(map(len, sources.values()))
    return DynamicBucketingSampler(
        CutSet(mux),
        max_duration=data.batch_seconds,
        max_cuts=data.batch_size,
        num_buckets=max(2, min(data.buckets, total // max(1, 2 * data.batch_size))),
        buffer_size=max(4 * data.batch_size * data.buckets, 100),
        num_cuts_for_bins_estimate=max(100, min(2000, total)),
        shuffle=True,
        seed=seed,
        rank=rank,
        world_size=world,
    )
