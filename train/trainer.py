"""The run around the steps of all three stages: resume, checkpoints, validation, signals, and what is left behind."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from soundwave_fast.errors import UserError, disk_errors
from soundwave_fast.model import checkpoint as stage_directory
from train import build, checkpoint, freeze, identity, layers, parallel, warm_start
from train.checkpoint import Checkpoints
from train.config import Config
from train.data.loader import batches_of
from train.kinds import Kind
from train.metrics import Metrics
from train.parallel import World
from train.signals import EXIT, Interrupted, Signals
from train.step import TrainStep, rate_factor
from train.throughput import Throughput
from train.validation import Validator

BEST = ("valid_llm_wer", "valid_ctc_wer")  # the first of these that is measured decides which checkpoint is best


class Trainer(TrainStep):
    """One stage of one run: `resume()` finds what `run.out` holds, `run()` trains and leaves a stage directory.

    Args:
        resume: 'auto' goes on from the newest checkpoint of the same run in `run.out`, 'never' starts afresh, and a
            path (a `step-N` folder, or a run's directory) starts from that checkpoint. A path outside `run.out` given
            again, once there are checkpoints of the run it began, is 'auto'.

    Attributes:
        existing: what `run.out` held before, read by all ranks before rank 0 writes anything.
        start: the checkpoint to go on from, or None.
    """

    def __init__(self, config: Config, stage: int, world: World, resume: str = "auto") -> None:
        self.out, self.resume_from = Path(config.run.out), resume
        self.existing = identity.existing_run(config, world.device)
        self.repeated = False  # the `--resume PATH` that began this run came again, and means 'auto'
        self.start = self._checkpoint(config)  # a mistake in the path is reported before the parts are loaded
        super().__init__(config, stage, world)
        if self.model.language_model is not None:
            attention = str(self.model.causal_lm.config._attn_implementation)
            resolved = {"model.attention": attention, "run.packed": self.packed}
            self.existing = self.existing.with_resolved(config, resolved)
        self.fitted: float | None = None
        if stage > 1 and not (Path(config.run.init) / stage_directory.LORA).is_dir() and not self.start:
            self.fitted = warm_start.fit_shrinking_adapter(self)
        groups = freeze.parameter_groups(self.model, config.optim.trainable, config.optim.weight_decay)
        layers.wrap(self.model, config.run, world.device)
        policy = parallel.mixed_precision(config.run.mixed_precision, build.frozen_dtype(config.model, world.device))
        parallel.shard(self.model, world, config.run.replicate, not config.data.cache_frames, policy)
        if world.size > 1:  # sharding replaced the parameters
            groups = freeze.parameter_groups(self.model, config.optim.trainable, config.optim.weight_decay)
        # fused: one pass over a (V, D) head instead of five, and no temporaries of its size
        self.optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, fused=True)
        self.trained = [p for group in groups for p in group["params"]]
        self.checkpoints = Checkpoints(self.out / "checkpoints", world, config.run.keep)
        self.metrics = Metrics(self.out, world.main, config.optim.steps, config.run.loggers)
        self.throughput = Throughput(self)
        self.skipped: Counter = Counter()
        self.seen = 0
        self.signals = Signals()
        wanted = config.data.valid and config.run.valid_utterances and (config.run.valid_every or world.size > 1)
        self.validator = Validator(config, stage, self.model, self.processor, world) if wanted else None
        self.best: dict | None = None  # {metric, value, measure} of the best step so far, by validation
        self.place = {"offset": 0, "first": 0, "batches": 0}  # in the data: seed - run.seed, see make_loader, drawn
        self.saved = 0  # the step whose state is among `checkpoints`, or being written there

    def _checkpoint(self, config: Config) -> Path | None:
        """Where this run starts from, or None: from the beginning."""
        if self.resume_from == "never":
            return None
        own = checkpoint.latest(self.out / "checkpoints") if self.existing.goes_on else None  # else it is overwritten
        self.repeated = own is not None and self.existing.came_from(self.resume_from)
        if self.resume_from == "auto" or self.repeated:
            return own
        start = checkpoint.find(self.resume_from)
        if (step := checkpoint.named_step(start) or 0) > config.optim.steps:
            raise UserError(f"--resume {self.resume_from}: at step {step}, past optim.steps={config.optim.steps}")
        return start

    @property
    def own_start(self) -> bool:
        """Whether it goes on from a checkpoint of `run.out` itself."""
        return self.start is not None and self.start.resolve().parent == self.checkpoints.folder.resolve()

    # -- the run -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to `optim.steps` and write the stage directory.

        Raises:
            Interrupted: SIGINT or SIGTERM; everything is saved.
            UserError: too much bad audio, too many steps that are not finite, or a checkpoint that cannot be written.
        """
        if self.fitted is not None:
            share = f"{self.fitted:.1%} of their variance explained"
            self.metrics.say(f"shrinking adapter fitted to the LLM's embeddings: {share}")
        if self.loader.left_out:
            self.metrics.say(f"rows never drawn: {dict(self.loader.left_out)}")
        self.model.train()
        self.model.audio_tower.eval()
        self.watchdog.start()
        try:
            with self.signals:
                self._loop()
                if self.saved != self.step:  # a longer run goes on from here
                    self._save()
                self.watchdog.at("the last checkpoint")
                self.checkpoints.wait()
        finally:
            self.watchdog.stop()
        self._finish()

    def _loop(self) -> None:
        batches = iter(self.loader)
        saved_at = time.monotonic()
        while self.step < self.config.optim.steps:
            self.watchdog.at(f"step {self.step + 1}: reading data")
            started = time.perf_counter()
            group = [next(batches) for _ in range(self.config.optim.accumulate)]
            self.place["batches"] += len(group)
            waited = time.perf_counter() - started
            row = self._train_step(group)
            self._count(row)
            self.step += 1
            if self.bad_steps > self.config.optim.max_bad_steps:
                raise UserError(f"step {self.step}: loss or gradient not finite {self.bad_steps} times in a row")
            row |= self.throughput.measure(group, row, waited, self.step)
            figures, best = self._validate()
            self.metrics.add(self.step, row | figures, dict(self.drawn), self.config.run.log_every, self.skipped)
            stop, due = self._decide(saved_at)
            if stop is not None or best is not None or (due and self.step < self.config.optim.steps):
                self._save(best)
                saved_at = time.monotonic()
            if stop is not None:
                self.checkpoints.wait()
                raise Interrupted(stop)

    def _decide(self, saved_at: float) -> tuple[int | None, bool]:
        """What all ranks do next: (exit code or None, whether to save).

        Raises:
            UserError: the checkpoint being written has failed on some rank.
        """
        self.watchdog.at(f"step {self.step}: agreeing on what is next")
        due = self.world.main and time.monotonic() - saved_at >= self.config.run.save_every
        came = [float(self.signals.number == number) for number in EXIT]
        flags = torch.tensor([*came, float(due), float(self.checkpoints.failed)])
        *came, due, failed = parallel.sum_on_host(flags, self.world).tolist()
        if failed:
            self.checkpoints.wait()
            raise UserError(f"{self.checkpoints.folder}: another rank could not write; the last checkpoint is intact")
        codes = [code for count, code in zip(came, EXIT.values(), strict=True) if count]
        return (codes[0] if codes else None), bool(due)

    def _validate(self) -> tuple[dict, dict | None]:
        """Held-out figures where it is time for them; and `self.best`, where this is the best step so far."""
        every = self.config.run.valid_every
        if self.validator is None or not every or self.step % every:
            return {}, None
        self.watchdog.at(f"step {self.step}: validation", factor=10)
        figures = self.validator(self.step)  # the same on all ranks
        metric = next((name for name in BEST if name in figures), None)
        if metric is None:
            return figures, None
        if self.best is not None and self.best["metric"] == metric and figures[metric] >= self.best["value"]:
            return figures, None
        self.best = {"metric": metric, "value": figures[metric], "measure": self.validator.measure}
        return figures, self.best

    def _count(self, row: dict) -> None:
        """Of all ranks, so that all stop together."""
        self.skipped += self.unused
        self.seen += row["utterances"]
        bad = sum(count for cause, count in self.skipped.items() if cause.startswith("audio"))
        if bad > 20 and bad > self.config.data.max_bad_share * (self.seen + bad):
            raise UserError(f"{bad} of {self.seen + bad} utterances could not be used: {dict(self.skipped)}")

    # -- leaving off and going on ------------------------------------------------------------------------------

    def _save(self, best: dict | None = None) -> None:
        self.watchdog.at(f"step {self.step}: saving")
        own = {
            "step": self.step,
            "loader": dict(self.place),
            "skipped": self.skipped,
            "seen": self.seen,
            "bad_steps": self.bad_steps,
        }
        self.checkpoints.save(self.step, self.model, self.optimizer, own, best)
        self.saved = self.step

    def resume(self) -> None:
        """Go on from the checkpoint this run starts from, if there is one; a collective.

        If the number of ranks has changed, the weights, moments and the schedule go on; the data is drawn afresh with
        a new seed, since its order depends on the number of ranks, and so are dropout's random numbers.
        """
        if self.start is None:
            if self.world.main:
                self.checkpoints.drop_after(-1)
                identity.note_origin(self.out, None)
                self.metrics.resume(0)
            self._say_changes()
            return
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        extra = checkpoint.load(self.start, self.model, self.optimizer, self.world)
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group |= own  # a checkpoint of another run brings the rates and weight decay of that run
        self.step, self.bad_steps = extra["step"], extra["bad_steps"]
        self.skipped, self.seen = extra["skipped"], extra["seen"]
        self._take_place(extra)
        parallel.barrier()  # nobody still reads what is thrown away now
        if self.world.main:
            if self.own_start:
                self.checkpoints.drop_after(self.step)
            else:  # what `run.out` still has is another run's
                self.checkpoints.drop_after(-1)
                identity.note_origin(self.out, identity.origin_of(self.resume_from, self.start, self.step))
        parallel.barrier()
        if self.own_start:
            self.saved = self.step
        best, validator = self.checkpoints.best, self.validator
        if best and validator and best.get("measure", validator.measure) == validator.measure:
            self.best = best  # otherwise it stays on disk until there is a new one
        self.metrics.resume(self.step)
        own = self.resume_from == "auto" or self.repeated
        whence = f"{self.out} at step {self.step}" if own else f"from {self.start}"
        world = (
            "" if extra["same_world"] else f"; {extra['world']} ranks before, {self.world.size} now: data drawn afresh"
        )
        self.metrics.say(f"resuming {whence}{world}")
        if self.repeated and self.world.main and (other := identity.origin_changed(self.existing, self.resume_from)):
            more = f"which began at step {self.existing.origin['step']} of it; to start from {other}, change --out"
            self.metrics.say(f"--resume {self.resume_from} has changed and is not read again by this run, {more}")
        self._say_changes()

    def _take_place(self, extra: dict) -> None:
        """Go on in the data where the checkpoint left off."""
        if not extra["same_world"]:
            self.place = {"offset": 1000 + self.step, "first": self.seen, "batches": 0}
        elif "batches" in extra["loader"]:
            self.place = dict(extra["loader"])
        else:
            self.place["batches"] = batches_of(extra["loader"])
        if self.place["offset"]:
            seed = self.config.run.seed + self.place["offset"]
            self.loader = self.make_loader(self.world.rank, self.world.size, seed, self.place["first"])
        self.loader.sampler.skip = self.place["batches"]

    def _say_changes(self) -> None:
        """A line on settings that differ from before, and one on a different number of steps."""
        if self.resume_from == "never":
            return
        if different := self.existing.changed(Kind.FREE, Kind.ROUNDING):
            rounded = self.existing.changed(Kind.ROUNDING)
            more = "; from here on the losses may differ by rounding" if rounded else ""
            self.metrics.say(f"goes on with different settings: {'; '.join(map(str, different))}{more}")
        for length in self.existing.changed(Kind.LENGTH):
            optim = self.config.optim
            was, now = (rate_factor(replace(optim, steps=steps), self.step) for steps in (length.was, length.now))
            rates = f"{now:.3g} of its peak, where it would have been {was:.3g}"
            self.metrics.say(f"goes on with {length}: after step {self.step} the learning rate is {rates}")

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
