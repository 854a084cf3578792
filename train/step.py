"""One optimizer step: batches -> losses over global counts -> gradients -> AdamW, the same on one rank and on many."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext

import torch
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from soundwave_fast.model.processing import SoundwaveProcessor
from soundwave_fast.model.whisper import MEL_PER_FRAME
from train import build, parallel
from train.config import Config, Optim
from train.data.batches import Batch, untally
from train.data.loader import make_loader
from train.data.manifest import read
from train.parallel import World
from train.watchdog import Watchdog


def rate_factor(optim: Optim, step: int) -> float:
    """Warm-up, plateau, cosine: the factor on every group's peak learning rate in the step after `step`."""
    if step < optim.warmup:
        return (step + 1) / optim.warmup
    start = max(optim.warmup, optim.decay_from * optim.steps)
    done = min(1.0, max(0.0, (step - start) / max(1.0, optim.steps - start)))
    return optim.final_lr + (1 - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


def counted(batch: Batch) -> Tensor:
    """What is summed over ranks: predicted tokens, utterances with a CTC target, text tokens, utterances, seconds;
    then utterances by task and what could not be used by cause (`Batch.tally`)."""
    size = torch.stack([batch.attention_mask.sum().double(), torch.tensor(float(len(batch.ids))).double()])
    return torch.cat([batch.counts, size, torch.tensor([float(batch.seconds)]).double(), batch.tally])


class TrainStep:
    """Model, data and the arithmetic of a step; `Trainer` adds the optimizer's state and the run around it.

    Attributes:
        step: optimizer steps done.
        bad_steps: steps in a row whose loss or gradient was not finite.
        drawn, unused: of the last step and all ranks: utterances by task, and what could not be used by cause.
    """

    optimizer: torch.optim.Optimizer
    trained: list[torch.nn.Parameter]

    def __init__(self, config: Config, stage: int, world: World) -> None:
        self.config, self.stage, self.world = config, stage, world
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        torch.manual_seed(config.run.seed)  # the same start values on every rank
        self.rows = [row for path in config.data.train for row in read(path)]
        self.model, self.processor = build.build(config, stage, world.device)
        dtype = build.frozen_dtype(config.model, world.device)
        self.autocast = (lambda: torch.autocast(world.device.type, dtype)) if dtype != torch.float32 else nullcontext
        self.packed = stage > 1 and build.packed(config, self.model)
        self.cache: dict[str, Tensor] = {}
        self.loader = self.make_loader(world.rank, world.size)
        self.watchdog = Watchdog(world, config.run.hang_seconds, f"stage {stage}")
        self.step = 0
        self.bad_steps = 0
        self.warm = False
        self.candidates = self._corpus_tokens() if stage == 1 and config.optim.ctc_candidates else None

    def make_loader(self, rank: int, world: int, seed: int | None = None, first: int = 0) -> StatefulDataLoader:
        """Endless batches of one rank; the same for the same (seed, rank, world, draws made before)."""
        config = self.config
        seed = config.run.seed if seed is None else seed
        ranks, with_prompts = (rank, world), self.stage > 1
        return make_loader(self.rows, self.processor, config.data, seed, ranks, with_prompts, self.cache, first)

    # -- what goes in ------------------------------------------------------------------------------------------

    def _corpus_tokens(self) -> Tensor:
        tokens = {t for row in self.rows if row.text.strip() for t in self.processor.ctc_ids(row.text)}
        return torch.tensor(sorted(tokens))

    def _candidates(self) -> Tensor | None:
        """The corpus' tokens and `ctc_candidates` random others, the same on all ranks and after a resume."""
        if self.candidates is None:
            return None
        generator = torch.Generator().manual_seed(self.config.run.seed * 1_000_003 + self.step)
        vocabulary = self.model.config.text_config.vocab_size
        others = torch.randint(vocabulary, (self.config.optim.ctc_candidates,), generator=generator)
        return torch.unique(torch.cat([self.candidates, others])).to(self.world.device, non_blocking=True)

    def encoded(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The frozen encoder's frames (N, T50, d_enc) and their lengths.

        Where they are cached, each utterance is encoded once and alone, so that its frames do not depend, in the last
        bit, on the batch it first came in: a resumed run sees the same.
        """
        device = self.world.device
        if not self.config.data.cache_frames:
            with self.autocast():
                return self.model.encode(**self._audio_inputs(batch))
        rows = []
        for name, mel, length in zip(batch.ids, batch.mels, batch.mel_lengths, strict=True):
            row = self.cache.get(name)
            if row is None:
                with self.autocast():
                    alone = [x[None].to(device, non_blocking=True) for x in (mel, length)]
                    frames, _ = self.model.encode(*alone)
                row = frames[0, : int(length) // MEL_PER_FRAME].to(torch.float16).cpu()
                if name:
                    self.cache[name] = row
            rows.append(row)
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).float().to(device, non_blocking=True)
        return padded, (batch.mel_lengths // MEL_PER_FRAME).to(device, non_blocking=True)

    def _audio_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The encoder's input, or its cached output, for the model's forward."""
        if self.config.data.cache_frames:
            frames, lengths = self.encoded(batch)
            return {"encoder_frames": frames, "frame_lengths": lengths}
        device = self.world.device
        mels = SoundwaveProcessor.pad_mels(batch.mels).to(device, non_blocking=True)
        return {"input_features": mels, "feature_lengths": batch.mel_lengths.to(device, non_blocking=True)}

    # -- the step ----------------------------------------------------------------------------------------------

    def _forward_backward(self, batch: Batch, counts: Tensor) -> Tensor:
        """Backward of this batch's share of the global mean loss; returns (ce sum, ctc sum, audio tokens, frames)."""
        audio = self._audio_inputs(batch)
        batch = batch.to(self.world.device)
        weight = self.config.model.ctc_weight if self.stage > 1 else 1.0
        with self.autocast():
            out = self.model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                labels=batch.labels if self.stage > 1 else None,
                ctc_targets=batch.ctc_targets,
                ctc_target_lengths=batch.ctc_target_lengths,
                ctc_candidates=self._candidates(),
                packed=self.packed,
                **audio,
            )
        loss = weight * out.ctc_sum / counts[1].clamp_min(1)
        none = torch.zeros_like(out.ctc_sum)
        sums = [none, out.ctc_sum, none, out.frame_lengths.sum()]
        if self.stage > 1:
            loss = loss + out.ce_sum / counts[0].clamp_min(1)
            sums[0], sums[2] = out.ce_sum, out.audio_lengths.sum()
        # FSDP averages gradients over ranks; the counts are already global, so the sum is wanted
        (loss.float() * self.world.size).backward()
        return torch.stack([value.detach().double() for value in sums])

    def _train_step(self, batches: list[Batch]) -> dict:
        """One optimizer step; its figures, summed over ranks. Skipped where loss or gradient is not finite."""
        started, name = time.perf_counter(), f"step {self.step + 1}"
        self.watchdog.at(f"{name}: counts")
        counts = parallel.sum_on_host(sum(map(counted, batches)), self.world)
        self.drawn, self.unused = untally(counts[5:])
        factor = rate_factor(self.config.optim, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.watchdog.at(f"{name}: forward and backward", factor=1.0 if self.warm else 3.0)  # the first one compiles
        sums = 0
        for number, batch in enumerate(batches, 1):
            parallel.reduce_gradients(self.model, number == len(batches))
            sums = sums + self._forward_backward(batch, counts)
        self.watchdog.at(f"{name}: loss and gradient norm")
        sums = parallel.sum_over_ranks(sums)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.config.optim.clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        ce, ctc, audio_tokens, frames, norm = torch.stack([*sums, norm.double()]).tolist()  # the step's one read
        ce, ctc = ce / max(float(counts[0]), 1.0), ctc / max(float(counts[1]), 1.0)
        good = all(map(math.isfinite, (ce, ctc, norm)))  # the same on all ranks
        if good:
            self.optimizer.step()
        self.bad_steps = 0 if good else self.bad_steps + 1
        self.optimizer.zero_grad(set_to_none=True)
        self.warm = True
        return {
            "ce": ce,
            "ctc": ctc,
            "grad_norm": norm,
            "lr_factor": factor,
            "skipped_step": not good,
            "predicted": int(counts[0]),
            "text_tokens": int(counts[2]),
            "utterances": int(counts[3]),
            "audio_s": float(counts[4]),
            "frames": int(frames),
            "audio_tokens": int(audio_tokens),
            "step_s": time.perf_counter() - started,
        }
