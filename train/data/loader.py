"""From a config to the endless batches of one rank: rows, sampler, batch maker and worker processes put together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from soundwave_fast.model.processing import SoundwaveProcessor
from train.config import Data
from train.data import sampler
from train.data.batches import BatchMaker
from train.data.utterance import Utterance


class SkipFirst(torch.utils.data.Sampler):
    """A sampler's batches without the first `skip`: those are drawn, but none of their audio is read."""

    def __init__(self, sampler: Iterable, skip: int = 0) -> None:
        self.sampler, self.skip = sampler, skip

    def __iter__(self) -> Iterator:
        return islice(iter(self.sampler), self.skip, None)


def batches_of(state: dict[str, Any]) -> int:
    """Batches drawn, from a StatefulDataLoader's own state: what older checkpoints hold in place of the number."""
    if "_snapshot" in state:  # of worker processes
        return state["_snapshot"]["_snapshot_step"] + state["_steps_since_snapshot"]
    return state["_num_yielded"]


def make_loader(
    rows: list[Utterance],
    processor: SoundwaveProcessor,
    data: Data,
    seed: int,
    ranks: tuple[int, int] = (0, 1),
    with_prompts: bool = True,
    cached: Any = (),
    first: int = 0,
) -> StatefulDataLoader:
    """Endless batches, the same for the same arguments whatever the number of workers.

    Its state is a few numbers; restoring it replays the sampler, and reads no audio of the batches before. So does
    `loader.sampler.skip`: the number of batches to begin after, with any number of workers. The attribute `left_out`
    counts the rows that are never drawn, by cause.

    Args:
        ranks: (rank, number of ranks).
        with_prompts: False leaves the LLM's side empty (stage 1).
        cached: keys of utterances whose encoder frames are kept; then everything runs in this process.
        first: draws made before, where a run goes on with another seed or number of ranks: the temperature stays.

    Raises:
        UserError: an unknown task, or rows that no task can use.
    """
    maker = BatchMaker(rows, processor, seed, with_prompts, cached, data)
    measure = maker.measure if with_prompts and data.batch_tokens else None
    picks = SkipFirst(sampler.build(rows, data, seed, *ranks, first=first, measure=measure))
    workers = 0 if data.cache_frames else data.workers  # a worker process would not see the cache
    own = torch.Generator()  # starting the loader draws from it: the global one is where resumed dropout goes on
    loader = StatefulDataLoader(
        maker,
        sampler=picks,
        batch_size=None,
        num_workers=workers,
        generator=own,
        prefetch_factor=data.prefetch if workers else None,
    )
    loader.left_out = sampler.sources_of(rows, data)[1]
    return loader
