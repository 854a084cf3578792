"""The training loop all three stages share: batches -> losses over global counts -> step, with logs and checkpoints."""

from __future__ import annotations

import math
import signal
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from soundwave_fast.model import checkpoint as stage_directory
from soundwave_fast.model.processing import SoundwaveProcessor
from soundwave_fast.model.whisper import MEL_PER_FRAME
from train import build, checkpoint, freeze, parallel, warm_start
from train.config import Config, UserError, disk_errors, dump
from train.data import sampler
from train.data.batches import Batch, BatchMaker
from train.data.manifest import read
from train.metrics import Metrics
from train.parallel import World


class Interrupted(Exception):
    """SIGINT or SIGTERM came; the state is saved."""


class Trainer:
    """One stage of one run: `resume()` finds what `run.out` holds, `run()` trains and leaves a stage directory."""

    def __init__(self, config: Config, stage: int, world: World) -> None:
        self.config, self.stage, self.world = config, stage, world
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        torch.manual_seed(config.run.seed)  # the same start values on every rank
        self.out = Path(config.run.out)
        self.rows = [row for path in config.data.train for row in read(path)]
        self.model, self.processor = build.build(config, stage, world.device)
        dtype = build.frozen_dtype(config.model, world.device)
        self.autocast = (lambda: torch.autocast(world.device.type, dtype)) if dtype != torch.float32 else nullcontext
        self.cache: dict[str, Tensor] = {}
        self.loader = self.make_loader(world.rank, world.size)
        self.fitted: float | None = None
        if stage > 1 and not (Path(config.run.init) / stage_directory.LORA).is_dir() and not self._checkpoint():
            self.fitted = warm_start.fit_shrinking_adapter(self)
        groups = freeze.parameter_groups(self.model, config.optim.trainable, config.optim.weight_decay)
        parallel.shard(self.model, world, config.run.replicate, shard_encoder=not config.data.cache_frames)
        if world.size > 1:  # sharding replaced the parameters
            groups = freeze.parameter_groups(self.model, config.optim.trainable, config.optim.weight_decay)
        # fused: one pass over a (V, D) head instead of five, and no temporaries of its size
        self.optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, fused=True)
        self.trained = [p for group in groups for p in group["params"]]
        self.metrics = Metrics(self.out, world.main, config.optim.steps)
        self.step = 0
        self.bad_steps = 0
        self.skipped: Counter = Counter()
        self.seen = 0
        self.stop_signal = 0
        self.candidates = self._corpus_tokens() if stage == 1 and config.optim.ctc_candidates else None

    def make_loader(self, rank: int, world: int, seed: int | None = None) -> StatefulDataLoader:
        """Endless batches of one rank; the same for the same (seed, rank, world)."""
        config = self.config
        seed = config.run.seed if seed is None else seed
        maker = BatchMaker(self.rows, self.processor, config.run.seed, with_prompts=self.stage > 1, cached=self.cache)
        workers = 0 if config.data.cache_frames else config.data.workers  # a worker process would not see the cache
        picks = sampler.build(self.rows, config.data, seed, rank, world)
        own = torch.Generator()  # starting the loader draws from it: the global one is where resumed dropout goes on
        return StatefulDataLoader(maker, sampler=picks, batch_size=None, num_workers=workers, generator=own)

    # -- pieces of a step --------------------------------------------------------------------------------------

    def _corpus_tokens(self) -> Tensor:
        tokens = {t for row in self.rows if row.text.strip() for t in self.processor.ctc_ids(row.text)}
        return torch.tensor(sorted(tokens), device=self.world.device)

    def _candidates(self) -> Tensor | None:
        """The corpus' tokens and `ctc_candidates` random others, the same on all ranks and after a resume."""
        if self.candidates is None:
            return None
        generator = torch.Generator().manual_seed(self.config.run.seed * 1_000_003 + self.step)
        vocabulary = self.model.config.text_config.vocab_size
        others = torch.randint(vocabulary, (self.config.optim.ctc_candidates,), generator=generator)
        return torch.unique(torch.cat([self.candidates, others.to(self.candidates.device)]))

    def _learning_rate(self) -> float:
        """Warm-up, plateau, cosine: a factor on every group's peak."""
        optim = self.config.optim
        if self.step < optim.warmup:
            return (self.step + 1) / optim.warmup
        start = max(optim.warmup, optim.decay_from * optim.steps)
        done = min(1.0, max(0.0, (self.step - start) / max(1.0, optim.steps - start)))
        return optim.final_lr + (1 - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * done))

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
                    frames, _ = self.model.encode(mel[None].to(device), length[None].to(device))
                row = frames[0, : length // MEL_PER_FRAME].to(torch.float16).cpu()
                if name:
                    self.cache[name] = row
            rows.append(row)
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).float().to(device)
        return padded, (batch.mel_lengths // MEL_PER_FRAME).to(device)

    def _audio_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The encoder's input, or its cached output, for the model's forward."""
        if self.config.data.cache_frames:
            frames, lengths = self.encoded(batch)
            return {"encoder_frames": frames, "frame_lengths": lengths}
        device = self.world.device
        mels = SoundwaveProcessor.pad_mels(batch.mels).to(device)
        return {"input_features": mels, "feature_lengths": batch.mel_lengths.to(device)}

    def _forward_backward(self, batch: Batch, counts: Tensor) -> Tensor:
        """Backward of this batch's share of the global mean loss; returns (ce sum, ctc sum, audio tokens, frames)."""
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
                **self._audio_inputs(batch),
            )
        loss = weight * out.ctc_sum / counts[1].clamp_min(1)
        sums = [torch.zeros(()), out.ctc_sum, torch.zeros(()), out.frame_lengths.sum()]
        if self.stage > 1:
            loss = loss + out.ce_sum / counts[0].clamp_min(1)
            sums[0], sums[2] = out.ce_sum, out.audio_lengths.sum()
        # FSDP averages gradients over ranks; the counts are already global, so the sum is wanted
        (loss.float() * self.world.size).backward()
        return torch.stack([value.detach().double().to(self.world.device) for value in sums])

    def _train_step(self, batches: list[Batch]) -> dict:
        started = time.perf_counter()
        counts = parallel.sum_over_ranks(sum(batch.counts for batch in batches).to(self.world.device))
        factor = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        sums = sum(self._forward_backward(batch, counts) for batch in batches)
        sums = parallel.sum_over_ranks(sums)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.config.optim.clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        ce, ctc = float(sums[0] / counts[0].clamp_min(1)), float(sums[1] / counts[1].clamp_min(1))
        good = math.isfinite(ce) and math.isfinite(ctc) and bool(torch.isfinite(norm))  # the same on all ranks
        if good:
            self.optimizer.step()
        self.bad_steps = 0 if good else self.bad_steps + 1
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "ce": ce,
            "ctc": ctc,
            "grad_norm": float(norm),
            "lr_factor": factor,
            "skipped_step": not good,
            "audio_s": sum(batch.seconds for batch in batches) * self.world.size,
            "frames": int(sums[3]),
            "audio_tokens": int(sums[2]),
            "step_s": time.perf_counter() - started,
        }

    # -- the run -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to `optim.steps` and write the stage directory.

        Raises:
            Interrupted: SIGINT or SIGTERM; everything is saved.
            UserError: too much bad audio, or too many steps that are not finite.
        """
        if self.fitted is not None:
            share = f"{self.fitted:.1%} of their variance explained"
            self.metrics.say(f"shrinking adapter fitted to the LLM's embeddings: {share}")
        self.model.train()
        self.model.audio_tower.eval()
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        batches = iter(self.loader)
        saved_at = time.monotonic()
        while self.step < self.config.optim.steps:
            group = [next(batches) for _ in range(self.config.optim.accumulate)]
            row = self._train_step(group)
            self._count(group)
            self.step += 1
            if self.bad_steps > self.config.optim.max_bad_steps:
                raise UserError(f"step {self.step}: loss or gradient not finite {self.bad_steps} times in a row")
            tasks = sum((batch.task_counts for batch in group), Counter())
            self.metrics.add(self.step, row, dict(tasks), every=self.config.run.log_every)
            flags = torch.tensor([float(self.stop_signal > 0), float(self._due(saved_at))], device=self.world.device)
            stop, due = parallel.sum_over_ranks(flags).tolist()  # all ranks agree on what happens next
            if stop or (due and self.step < self.config.optim.steps):
                self._save()
                saved_at = time.monotonic()
            if stop:
                raise Interrupted
        for number, handler in before.items():
            signal.signal(number, handler)
        self._finish()

    def _due(self, saved_at: float) -> bool:
        return self.world.main and time.monotonic() - saved_at > self.config.run.save_every

    def _on_signal(self, number: int, frame: object) -> None:
        self.stop_signal = number

    def _count(self, group: list[Batch]) -> None:
        for batch in group:
            self.skipped += batch.skipped
            self.seen += len(batch.ids)
        bad = sum(count for cause, count in self.skipped.items() if cause.startswith("audio"))
        if bad > 20 and bad > self.config.data.max_bad_share * (self.seen + bad):
            raise UserError(f"{bad} of {self.seen + bad} utterances could not be used: {dict(self.skipped)}")

    def _save(self) -> None:
        own = {
            "step": self.step,
            "loader": self.loader.state_dict(),
            "skipped": self.skipped,
            "seen": self.seen,
            "bad_steps": self.bad_steps,
        }
        checkpoint.save(self.out / "checkpoints", self.step, self.model, self.optimizer, own, self.world)

    def _checkpoint(self) -> Path | None:
        settings = self.out / "config.yaml"
        same = settings.is_file() and settings.read_text() == dump(self.config)  # another run's is to be overwritten
        return checkpoint.latest(self.out / "checkpoints") if same else None

    def resume(self) -> None:
        """Go on from the newest checkpoint of `run.out`, if there is one."""
        newest = self._checkpoint()
        if newest is None:
            return
        extra = checkpoint.load(newest, self.model, self.optimizer, self.world)
        self.step, self.bad_steps = extra["step"], extra["bad_steps"]
        self.skipped, self.seen = extra["skipped"], extra["seen"]
        if extra["same_world"]:
            self.loader.load_state_dict(extra["loader"])
        else:  # the order of the data is per world size: draw anew, from another seed
            self.loader = self.make_loader(self.world.rank, self.world.size, self.config.run.seed + 1000 + self.step)
        self.metrics.resume(self.step)
        self.metrics.say(f"resuming {self.out} at step {self.step}")

    def _finish(self) -> None:
        """Write the stage directory; a collective."""
        state = parallel.trained_state(self.model, also=stage_directory.TRAINED)
        with disk_errors(self.out):
            if self.world.main:
                adapters = {
                    name: state.get(name, parameter).detach()
                    for name, parameter in self.model.state_dict().items()
                    if name.startswith(stage_directory.TRAINED)
                }
                prefix = "language_model."
                lora = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)} or None
                stage_directory.save_stage_directory(self.model, self.out, self.processor, adapters, lora)
        if self.skipped and self.world.main:
            self.metrics.say(f"skipped: {dict(self.skipped)}")
        self.metrics.close()
