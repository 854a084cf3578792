"""Batches: audio to log-mel, prompts and answers to padded ids, CTC targets; bad audio is skipped and counted."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soundwave_fast.audio import MAX_SECONDS, SAMPLE_RATE, load_audio
from soundwave_fast.model.losses import IGNORE
from soundwave_fast.model.processing import SoundwaveProcessor
from soundwave_fast.model.whisper import MEL_PER_FRAME
from train.data import tasks
from train.data.manifest import Utterance


@dataclass
class Batch:
    """One rank's batch; N utterances, one prompt each."""

    ids: list[str]  # what tells one audio from another, its path: ids of two manifests may be equal; '' for silence
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

    def to(self, device: torch.device) -> Batch:
        names = ("input_ids", "attention_mask", "labels", "ctc_targets", "ctc_target_lengths", "mel_lengths")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, **moved)


class BatchMaker(torch.utils.data.Dataset):
    """Map-style dataset whose 'index' is a CutSet from the sampler.

    Args:
        with_prompts: False leaves the LLM's side empty (stage 1).
        cached: paths whose audio need not be read.
    """

    def __init__(
        self, rows: list[Utterance], processor: SoundwaveProcessor, seed: int, with_prompts: bool, cached: Any = ()
    ) -> None:
        self.rows, self.processor, self.seed = rows, processor, seed
        self.with_prompts, self.cached = with_prompts, cached

    def __getitem__(self, cuts: Any) -> Batch:
        return self.collate([(self.rows[c.custom["row"]], c.custom["task"], c.custom["draw"]) for c in cuts])

    def collate(self, items: list[tuple[Utterance, str, int]]) -> Batch:
        skipped, counts, made = Counter(), Counter(), []
        for row, task, draw in items:
            try:
                made.append(self._one(row, task, draw, skipped))
                counts[task] += 1
            except (OSError, ValueError) as error:
                skipped[f"audio: {type(error).__name__}"] += 1
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
        if row.duration > MAX_SECONDS:
            raise ValueError("too long")
        mel = None
        if str(row.audio) in self.cached:
            length = self.cached[str(row.audio)].shape[0] * MEL_PER_FRAME
        else:
            wave = load_audio(row.audio)
            mel, length = self.processor.log_mel(wave), self.processor.mel_length(wave)
        target = self.processor.ctc_ids(row.text) if row.text.strip() else []
        frames = length // 4
        if len(target) + sum(a == b for a, b in zip(target, target[1:], strict=False)) > frames:
            skipped["transcript longer than its frames (no CTC)"] += 1
            target = []
        prompt, answer = [], []
        if self.with_prompts:
            instruction, reply = tasks.ask(task, row, random.Random(f"{self.seed}/{draw}"))
            prompt = self.processor.tokenizer(self.processor.prompt(instruction), add_special_tokens=False).input_ids
            answer = self.processor.answer_ids(reply)
            if (prompt + answer).count(self.processor.audio_token_id) != 1:
                raise ValueError("prompt or answer: holds the placeholder itself")
        return str(row.audio), mel, length, prompt, answer, target, row.duration

    def _silence(self) -> tuple:
        wave = np.zeros(SAMPLE_RATE, dtype=np.float32)
        prompt = [self.processor.audio_token_id] if self.with_prompts else []
        return "", self.processor.log_mel(wave), self.processor.mel_length(wave), prompt, [], [], 0.0
