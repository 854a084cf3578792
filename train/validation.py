"""Validation during training: WER and task accuracy of a fixed subset, on all ranks, leaving no trace in the run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from soundwave_fast.model import SoundwaveProcessor
from train import fingerprints
from train.build import frozen_dtype
from train.config import Config
from train.data.manifest import Utterance, read
from train.parallel import World
from train.scoring import Job, Outcome, answer, make_batches, make_jobs, score
from train.validation_figures import PREFIX

SPARE_TOKENS = 16  # an answer may be so much longer than the longest one expected before it is cut


def subset(rows: list[Utterance], count: int) -> list[Utterance]:
    """The same `count` rows of a manifest every time, from all over it, in its order."""
    if len(rows) <= count:
        return rows
    return [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), count))]


@contextlib.contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module's mode and every random state are what they were."""
    modes = {module: module.training for module in model.modules()}
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # the CPU's in any case
            model.eval()
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        random.setstate(python)
        np.random.set_state(numbers)


class Validator:
    """Scores `run.valid_utterances` rows of `data.valid`: `Validator(...)(step)` gives figures for the step's row.

    Batches are dealt to the ranks in turn; each rank runs equally many (an empty one where they do not come out even),
    in lockstep, so a sharded model's collectives match. The figures are the same on all ranks.

    Args:
        model: as it trains, sharded or not.
        world: all its ranks construct and call this together.

    Attributes:
        measure: a fingerprint of the rows that are scored. The figures of two runs can only be compared if it is the
            same; moving the manifests does not change it.

    Raises:
        UserError: a validation manifest that cannot be read.
    """

    def __init__(self, config: Config, stage: int, model: nn.Module, processor: SoundwaveProcessor, world: World):
        self.model, self.processor, self.world = model, processor, world
        wanted = config.run.valid_utterances
        rows = [row for path in config.data.valid for row in read(path)] if wanted else []
        self.rows = subset(rows, wanted)
        scored = [fingerprints.manifests(config.data.valid), len(self.rows)]
        self.measure = hashlib.sha256(json.dumps(scored).encode()).hexdigest()
        self.with_llm = stage > 1
        questions = tuple(task for task in config.data.tasks if task != "asr")
        jobs = make_jobs(self.rows, questions, self.with_llm)
        batches: list[list[Job]] = make_batches(jobs, config.data.batch_size, config.data.batch_seconds)
        batches += [[] for _ in range(-len(batches) % world.size)]
        self.batches = batches[world.rank :: world.size]
        lengths = [len(processor.answer_ids(job.answer)) for job in jobs] if self.with_llm else []
        self.max_new_tokens = max(lengths, default=0) + SPARE_TOKENS
        dtype = frozen_dtype(config.model, world.device)
        cast = dtype != torch.float32
        self.autocast = lambda: torch.autocast(world.device.type, dtype) if cast else contextlib.nullcontext()
        self.cache: dict[int, tuple] | None = {} if config.data.cache_frames else None

    def _answers(self) -> list[Outcome]:
        lockstep = self.world.size > 1
        with untouched(self.model, self.world.device), self.autocast():
            done = [
                answer(self.model, self.processor, batch, self.max_new_tokens, lockstep, self.cache)
                for batch in self.batches
            ]
        return [outcome for outcomes in done for outcome in outcomes]

    def _sharded_answers(self) -> list[Outcome]:
        """The same, called as FSDP calls a forward: the root's own parameters are gathered for all of it."""
        from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

        if not isinstance(self.model, FSDPModule):
            return self._answers()
        self.model.validate = self._answers
        try:
            register_fsdp_forward_method(self.model, "validate")
            return self.model.validate()
        finally:
            del self.model.validate
            self.model.reshard()  # the root's unit stays gathered after a forward without a backward

    def __call__(self, step: int) -> dict[str, Any]:
        """Figures after `step` steps, keys as in a metrics row; empty where there is nothing to score. A collective.

        valid_ctc_wer, valid_llm_wer (shares), valid_TASK (share of right answers), valid_utterances, valid_skipped,
        valid_s.
        """
        if not self.batches or not self.rows:
            return {}
        started = time.perf_counter()
        outcomes = self._answers() if self.world.size == 1 else self._sharded_answers()
        if self.world.size > 1:
            parts: list[list[Outcome]] = [[] for _ in range(self.world.size)]
            dist.all_gather_object(parts, outcomes)
            outcomes = [outcome for part in parts for outcome in part]
        scores = score(outcomes, self.with_llm)
        figures: dict[str, Any] = {"ctc_wer": scores.ctc_wer, "llm_wer": scores.llm_wer}
        figures |= {task: right / asked for task, (right, asked) in scores.answers.items()}
        figures |= {"utterances": len(self.rows) - scores.skipped, "skipped": scores.skipped}
        figures["s"] = round(time.perf_counter() - started, 2)
        return {PREFIX + key: value for key, value in figures.items() if value is not None}
