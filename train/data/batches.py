"""Batches: audio to log-mel, prompts and answers to padded ids, CTC targets; bad audio is skipped and counted."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soundwave_fast.audio import MAX_SECONDS, SAMPLE_RATE
from soundwave_fast.model.losses import IGNORE
from soundwave_fast.model.processing import SoundwaveProcessor
from soundwave_fast.model.whisper import MEL_PER_FRAME
from train.config import Data
from train.data import tasks
from train.data.augment import change_speed, mask_spectrogram, speed_of
from train.data.reading import CAUSES, BadAudio, load
from train.data.utterance import Utterance

NO_CTC, NO_FIT, PLACEHOLDER = (
    "transcript longer than its frames (no CTC)",  # it still trains the LLM
    "batch: an utterance does not fit",
    "audio: its row's text holds the placeholder",
)


class _HoldsPlaceholder(ValueError):
    """A prompt or an answer that would be taken for audio."""


SKIPPED = (*(f"audio: {cause}" for cause in (*CAUSES, "not readable")), PLACEHOLDER, NO_CTC, NO_FIT)


@dataclass
class Batch:
    """One rank's batch; N utterances, one prompt each."""

    ids: list[str]  # `Utterance.key` of each; '' for silence
    seconds: float
    mels: list[Tensor | None]  # (mels, M) each; None where the encoder's frames are cached
    mel_lengths: Tensor  # (N,)
    input_ids: Tensor  # (N, L) right-padded: prompt, answer
    attention_mask: Tensor
    labels: Tensor  # -100 but on the answer
    ctc_targets: Tensor  # (N, S)
    ctc_target_lengths: Tensor  # (N,) 0: no transcript, or one that cannot fit
    skipped: Counter = field(default_factory=Counter)
    task_counts: Counter = field(default_factory=Counter)

    @property
    def counts(self) -> Tensor:
        """Predicted tokens and utterances with a CTC target, what the losses are divided by: (2,)."""
        predicted, transcribed = (self.labels[:, 1:] != IGNORE).sum(), (self.ctc_target_lengths > 0).sum()
        return torch.stack([predicted, transcribed]).double()

    @property
    def tally(self) -> Tensor:
        """Utterances by task, and what could not be used by cause, as numbers that ranks can add up; see `untally`."""
        counts = [self.task_counts[name] for name in tasks.NAMES] + [self.skipped[cause] for cause in SKIPPED]
        return torch.tensor(counts, dtype=torch.float64)

    def to(self, device: torch.device) -> Batch:
        """With all that the model reads but the audio, which goes there by itself, or as cached frames."""
        names = ("input_ids", "attention_mask", "labels", "ctc_targets", "ctc_target_lengths")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, **moved)


def untally(tally: Tensor) -> tuple[Counter, Counter]:
    """(utterances by task, skipped by cause) of a sum of `Batch.tally`; what is 0 is left out."""
    values = [round(value) for value in tally.tolist()]
    drawn, skipped = values[: len(tasks.NAMES)], values[len(tasks.NAMES) :]
    return +Counter(dict(zip(tasks.NAMES, drawn))), +Counter(dict(zip(SKIPPED, skipped)))


class BatchMaker(torch.utils.data.Dataset):
    """Map-style dataset whose 'index' is a CutSet from the sampler; a pure function of it, in any worker.

    Args:
        with_prompts: False leaves the LLM's side empty (stage 1).
        cached: keys of utterances whose audio need not be read.
        data: bounds, phrasings and augmentation.
    """

    def __init__(
        self,
        rows: list[Utterance],
        processor: SoundwaveProcessor,
        seed: int,
        with_prompts: bool,
        cached: Any = (),
        data: Data | None = None,
    ) -> None:
        self.rows, self.processor, self.seed = rows, processor, seed
        self.with_prompts, self.cached, self.data = with_prompts, cached, data or Data()

    def __getitem__(self, cuts: Any) -> Batch:
        batch = self.collate([(self.rows[c.custom["row"]], c.custom["task"], c.custom["draw"]) for c in cuts])
        left_out = sum(c.custom.get("left_out", 0) for c in cuts)
        if left_out:
            batch.skipped[NO_FIT] += left_out
        return batch

    def measure(self, row: Utterance, task: str, draw: int) -> int:
        """Positions of prompt and answer, the placeholder among them; 0 without prompts. For the sampler."""
        if not self.with_prompts:
            return 0
        return sum(map(len, self._texts(row, task, draw)))

    def collate(self, items: list[tuple[Utterance, str, int]]) -> Batch:
        skipped, counts, made = Counter(), Counter(), []
        for row, task, draw in items:
            try:
                made.append(self._one(row, task, draw, skipped))
                counts[task] += 1
            except BadAudio as error:
                skipped[f"audio: {error.cause}"] += 1
            except _HoldsPlaceholder:
                skipped[PLACEHOLDER] += 1
            except (OSError, ValueError):
                skipped["audio: not readable"] += 1
        if not made:
            # a rank without audio would leave the others waiting in a collective: run the modules on silence, count 0
            made.append(self._silence())
        ids, mels, lengths, prompts, answers, targets, seconds = zip(*made, strict=True)
        length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        input_ids = torch.full((len(made), max(1, length)), self.processor.tokenizer.pad_token_id)
        attention = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, IGNORE)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = len(prompt) + len(answer)
            input_ids[i, :end] = torch.tensor(prompt + answer)
            attention[i, :end] = 1
            labels[i, len(prompt) : end] = torch.tensor(answer)
        ctc = torch.zeros(len(made), max(1, max(map(len, targets))), dtype=torch.long)
        for i, target in enumerate(targets):
            ctc[i, : len(target)] = torch.tensor(target)
        return Batch(
            ids=list(ids),
            seconds=sum(seconds),
            mels=list(mels),
            mel_lengths=torch.tensor(lengths),
            input_ids=input_ids,
            attention_mask=attention,
            labels=labels,
            ctc_targets=ctc,
            ctc_target_lengths=torch.tensor([len(t) for t in targets]),
            skipped=skipped,
            task_counts=counts,
        )

    def _one(self, row: Utterance, task: str, draw: int, skipped: Counter) -> tuple:
        data, mel = self.data, None
        if row.duration > MAX_SECONDS:
            raise BadAudio("too long", f"{row.audio}: {row.duration:.1f} s")
        if row.key in self.cached:
            length = self.cached[row.key].shape[0] * MEL_PER_FRAME
        else:
            wave = load(row, data.min_seconds, data.max_seconds)
            wave = change_speed(wave, speed_of(data.speed, row.duration, self.seed, draw))
            wave = wave[: int(MAX_SECONDS * SAMPLE_RATE)]  # by rounding alone: a longer one is not slowed
            length = self.processor.mel_length(wave)
            mel = mask_spectrogram(self.processor.log_mel(wave), length, data.spec_augment, self.seed, draw)
        target = self.processor.ctc_ids(row.text) if row.text.strip() else []
        frames = length // 4
        if len(target) + sum(a == b for a, b in zip(target, target[1:], strict=False)) > frames:
            skipped[NO_CTC] += 1
            target = []
        prompt, answer = self._texts(row, task, draw) if self.with_prompts else ([], [])
        if self.with_prompts and (prompt + answer).count(self.processor.audio_token_id) != 1:
            raise _HoldsPlaceholder
        return row.key, mel, length, prompt, answer, target, row.duration

    def _texts(self, row: Utterance, task: str, draw: int) -> tuple[list[int], list[int]]:
        """Token ids of the draw's prompt and answer."""
        rng = random.Random(f"{self.seed}/{draw}")
        instruction, reply = tasks.ask(task, row, rng, self.data.more_phrasings)
        prompt = self.processor.tokenizer(self.processor.prompt(instruction), add_special_tokens=False).input_ids
        return prompt, self.processor.answer_ids(reply)

    def _silence(self) -> tuple:
        wave = np.zeros(SAMPLE_RATE, dtype=np.float32)
        prompt = [self.processor.audio_token_id] if self.with_prompts else []
        return "", self.processor.log_mel(wave), self.processor.mel_length(wave), prompt, [], [], 0.0
