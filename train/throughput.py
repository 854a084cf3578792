"""How fast a run goes: tokens and hours of audio, model FLOPs against the chip's, peak memory, time left."""

from __future__ import annotations

import resource
import sys
from collections import deque
from typing import Any

import torch

from soundwave_fast import cost_model
from soundwave_fast.model.alignment_adapter import STACK
from train import cost
from train.build import frozen_dtype
from train.data.batches import Batch

RECENT = 50  # steps over which the time left is estimated


class Throughput:
    """Figures of a step, for `metrics.jsonl` and the progress line.

    Args:
        trainer: a `Trainer`; its config, stage, model and world are read.
    """

    def __init__(self, trainer: Any) -> None:
        self.config, self.stage, self.world = trainer.config, trainer.stage, trainer.world
        self.sizes = trainer.model.config
        self.dtype = str(frozen_dtype(self.config.model, self.world.device)).removeprefix("torch.")
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.first = True
        try:
            name = torch.cuda.get_device_name(self.world.device) if self.world.device.type == "cuda" else "CPU"
            self.peak: float | None = cost_model.chip(name).flops[self.dtype] * self.world.size
        except (ValueError, KeyError):
            self.peak = None

    def measure(self, group: list[Batch], row: dict, waited: float, step: int) -> dict:
        """Added to the step's row: data_s, tokens, tokens_s, audio_h_per_h, tflops, mfu, peak_gib, eta_s.

        Tokens are what the LLM reads, in stage 1 the adapter's frames. `mfu` is there where the chip is known, `eta_s`
        from the second step on, since the first pays for warming up.

        Args:
            group: this rank's batches of the step.
            waited: seconds it waited for them.
        """
        seconds = row["step_s"] + waited
        tokens = row["frames"] if self.stage == 1 else row["text_tokens"] - row["utterances"] + row["audio_tokens"]
        out = {
            "data_s": waited,
            "tokens": tokens,
            "tokens_s": tokens / seconds,
            "audio_h_per_h": row["audio_s"] / seconds,
            "tflops": self._flops(row) / seconds / 1e12,
            "peak_gib": peak_gib(self.world.device),
        }
        if self.peak is not None:
            out["mfu"] = out["tflops"] * 1e12 / self.peak
        if not self.first:
            self.recent.append(seconds)
            out["eta_s"] = sum(self.recent) / len(self.recent) * (self.config.optim.steps - step)
        self.first = False
        return out

    def _flops(self, row: dict) -> float:
        """Of all ranks, padding and recomputation not counted."""
        candidates = self.config.optim.ctc_candidates if self.stage == 1 else 0
        work = cost.Work(
            utterances=row["utterances"],
            encoder_frames=row["frames"] * STACK,
            audio_tokens=row["audio_tokens"],
            text_tokens=max(0, row["text_tokens"] - row["utterances"]),
            predicted=row["predicted"],
            ctc_classes=candidates,
        )
        parts = cost.parts(self.sizes, self.stage, work, self.dtype, self.config.model.lora_rank)
        if self.config.data.cache_frames:
            del parts["encoder"]
        return sum(part.flops for part in parts.values())


def peak_gib(device: torch.device) -> float:
    """Most memory so far: the allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
