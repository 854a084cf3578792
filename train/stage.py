"""Command line shared by the three stage scripts: options, the run's directory, errors as one line, exit codes."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from soundwave_fast.errors import ArgumentParser, UserError, disk_errors, run_command, say
from train.config import NANO, NEUTRAL, Config, load, preset_for

if TYPE_CHECKING:
    import torch

    from train.identity import Existing


def _arguments(stage: int, argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog=f"train/stage{stage}.py",
        description={
            1: "Stage 1: the alignment adapter learns the LLM's vocabulary by CTC.",
            2: "Stage 2: shrinking adapter and LoRA join; cross-entropy + CTC over many tasks.",
            3: "Stage 3: instruction tuning.",
        }[stage],
        epilog="Any other setting: key=value, e.g. optim.steps=100 data.batch_size=8 (see train/config.py).",
    )
    parser.add_argument(
        "--config",
        help=f"a preset of train/configs or a YAML file [{NANO}; {NEUTRAL} where --whisper or --llm is not {NANO}'s]",
    )
    parser.add_argument("--whisper", help="Whisper folder or hub name (model.whisper)")
    parser.add_argument("--llm", help="LLM folder or hub name (model.llm)")
    parser.add_argument("--train", nargs="+", metavar="MANIFEST", help="training manifests (data.train)")
    parser.add_argument("--valid", nargs="+", metavar="MANIFEST", help="validation manifests (data.valid)")
    parser.add_argument("--init", help="output directory of the previous stage (run.init)")
    parser.add_argument("--out", help="output directory (run.out)")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto: from the newest checkpoint of this run; never: afresh; PATH: from that checkpoint, and when the "
        "same command is repeated, as auto [%(default)s]",
    )
    parser.add_argument("--overwrite", action="store_true", help="throw away a run with different settings in --out")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    return sort_settings(parser.parse_intermixed_args(argv))


def sort_settings(args: argparse.Namespace) -> argparse.Namespace:
    """'--train a.jsonl optim.steps=5' names one manifest and one setting, whatever argparse thinks; in place."""
    for name in ("train", "valid", "test"):
        given = getattr(args, name, None)
        if isinstance(given, list):
            settings = [text for text in given if "=" in text and not Path(text).exists()]
            args.settings += settings
            setattr(args, name, [text for text in given if text not in settings] or None)
    return args


def _config(args: argparse.Namespace, stage: int) -> tuple[Config, str]:
    """The settings, and one line that says which preset was taken where nobody named one but the parts ask for it."""
    overrides = {
        "model.whisper": args.whisper,
        "model.llm": args.llm,
        "data.train": args.train,
        "data.valid": args.valid,
        "run.init": args.init,
        "run.out": args.out,
    }
    given = {key: value for key, value in overrides.items() if value is not None}
    preset, why = preset_for(given, args.settings) if args.config is None else (args.config, "")
    config = load(preset, stage, given, args.settings)
    if not config.run.out:
        raise UserError("--out: no output directory")
    if not config.data.train:
        raise UserError("--train: no manifest")
    if stage == 1 and config.run.init:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, init=""))
    return config, why


def _check_demo(config: Config, stage: int) -> None:
    """Whether what the nano preset starts from is there. It is where `make demo` has run.

    Raises:
        UserError: it is not; the line says what is missing and what to do first.
    """
    from soundwave_fast.model.checkpoint import is_stage_directory

    nano, missing, what = load(NANO, stage), [], "start from"
    if config.data.train == nano.data.train and not all(Path(path).is_file() for path in config.data.train):
        missing, what = [f"speech in {Path(config.data.train[0]).parent}"], "train on"
    if stage > 1 and config.run.init == nano.run.init and not is_stage_directory(config.run.init):
        missing.append(f"finished stage {stage - 1} in {config.run.init}")
    if missing:
        options = "--train, --valid and --out" if stage == 1 else "--train, --valid, --init and --out"
        raise UserError(
            f"nothing to {what} yet: no {' and no '.join(missing)}; run `make demo` first, which makes "
            f"{'both' if missing[1:] else 'it'}, or name your own with {options} (and --whisper, --llm, --config)"
        )
    if not config.run.valid_utterances or config.data.valid != nano.data.valid:
        return
    if not all(Path(path).is_file() for path in config.data.valid):
        raise UserError(
            f"--valid: the {NANO} preset's own ({config.data.valid[0]}) is not there; "
            "name your held-out speech, or none with data.valid=[]"
        )


def _finished(config: Config, device: torch.device, overwrite: bool, resume: str) -> bool:
    """Whether `run.out` already holds this very run, finished, and there is nothing to do. Writes nothing.

    Raises:
        UserError: it holds a run that cannot go on with these settings, and `overwrite` is not set.
    """
    from train import identity

    existing = identity.existing_run(config, device)
    goes_on = resume == "auto" or existing.came_from(resume)
    if existing.finished and goes_on and not (existing.refused and overwrite):
        return True
    if existing.refused and not overwrite:
        raise UserError(existing.refused)
    return False


def _claim(config: Config, resume: str, existing: Existing) -> None:
    """Make `run.out` this run's. A run there that cannot go on is thrown away; with `resume` 'never', any run is.

    Args:
        existing: what `run.out` holds, as all ranks have read it.

    Raises:
        UserError: it cannot be written, or holds the checkpoint to start from.
    """
    from train import identity

    out = Path(config.run.out)
    with disk_errors(out):
        goes_on = existing.goes_on and resume != "never"
        if existing.there and not goes_on:
            if resume not in ("auto", "never") and Path(resume).resolve().is_relative_to(out.resolve()):
                raise UserError(f"--resume {resume}: lies in {out}, which --overwrite would throw away; change --out")
            shutil.rmtree(out)
        (out / identity.DONE).unlink(missing_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        identity.write(config, existing, keep_origin=goes_on)


def check(stage: int, argv: list[str], previous_exists: bool = True) -> Config:
    """Parse and check a stage's command line without running it: settings, manifests, previous stage.

    Args:
        previous_exists: False where the previous stage is still to be run.

    Raises:
        UserError: whatever is wrong with it.
    """
    from train.build import previous_stage
    from train.data.manifest import read

    config, _ = _config(_arguments(stage, argv), stage)
    for path in (*config.data.train, *config.data.valid):
        read(path)
    if previous_exists:
        previous_stage(config.run.init, stage)
    return config


def main(stage: int, argv: list[str] | None = None) -> int:
    """Run one stage; returns the exit code.

    0: done, or stopped by SIGTERM and saved; 2: a mistake of the user's, or a disk that refuses; 130: Ctrl-C, saved.
    The watchdog ends a process that waits for a hung rank with 75.
    """
    with contextlib.ExitStack() as ending:
        return run_command(
            f"stage {stage}",
            lambda argv: _run(stage, argv, ending),
            argv,
            interrupted="interrupted; the same command goes on",
            value_errors=False,
        )


def _run(stage: int, argv: list[str], ending: contextlib.ExitStack) -> int:
    args = _arguments(stage, argv)
    config, why = _config(args, stage)
    from train import identity, parallel

    ending.callback(parallel.stop)  # after an error's line: ranks that wait for this one would fail, and end it first
    world = parallel.start()
    if _finished(config, world.device, args.overwrite, args.resume):
        if world.main:
            done = identity.steps_done(Path(config.run.out))
            more = f", with {done} steps" if done != config.optim.steps else ""
            print(f"{config.run.out}: already finished{more}", file=sys.stderr)
        return 0
    _check_demo(config, stage)
    return _train(config, stage, world, args.resume, why)


def _train(config: Config, stage: int, world, resume: str, why: str) -> int:
    from train import environment, parallel
    from train.checkpoint import named_step
    from train.data.manifest import read
    from train.signals import Interrupted
    from train.trainer import Trainer

    for noise in (".*set_vital.*", ".*torch.distributed is disabled.*"):  # said by torchdata and DCP in every run
        warnings.filterwarnings("ignore", message=noise)
    for path in config.data.valid if config.run.valid_utterances else ():
        read(path)  # its mistakes are said now, not after the training
    trainer = Trainer(config, stage, world, resume)  # before anything is written: most mistakes show here
    if world.main:
        if why:
            say(f"stage {stage}", why)
        _claim(config, resume, trainer.existing)
        changed = {change.key: [change.was, change.now] for change in trainer.existing.changes if resume != "never"}
        with disk_errors(Path(config.run.out)):
            environment.write(Path(config.run.out), world, named_step(trainer.start), changed)
    parallel.barrier()
    trainer.resume()
    try:
        with disk_errors(Path(config.run.out)):
            trainer.run()
    except Interrupted as interruption:
        same = resume == "auto" or trainer.repeated or not (resume == "never" or trainer.own_start)
        command = f"the same command{'' if same else ' with --resume auto'}"
        trainer.metrics.say(f"interrupted at step {trainer.step}, saved; {command} goes on from here")
        return interruption.code
    sharded = trainer.validator(trainer.step) if world.size > 1 and trainer.validator is not None else None
    if world.main:
        _report(trainer, config, sharded)
    parallel.barrier()
    return 0


def _report(trainer, config: Config, sharded: dict | None) -> None:
    """Validation, loss curves and the marker that this stage is done.

    Args:
        sharded: the held-out figures, where all ranks had to work on them together.
    """
    from soundwave_fast import plots
    from train import identity, metrics
    from train.data.manifest import read
    from train.evaluate import evaluate
    from train.validation_figures import figures_of
    from train.validation_figures import summary as summary_of

    out = Path(config.run.out)
    summary: dict = {"steps": trainer.step}
    if sharded is not None:
        print(f"held out: {summary_of(sharded)}", file=sys.stderr)
        summary["valid"] = figures_of(sharded)
    elif config.data.valid and config.run.valid_utterances:
        rows = [row for path in config.data.valid for row in read(path)][: config.run.valid_utterances]
        scores = evaluate(trainer.model, trainer.processor, rows)
        print("\n".join(scores.lines()), file=sys.stderr)
        summary["valid"] = scores.summary()
    rows = metrics.read(out / metrics.FILE)
    summary["step_s_median"] = sorted(row["step_s"] for row in rows)[len(rows) // 2] if rows else None
    plots.loss_curves({out.name: rows}, out / "loss.png")
    temporary = out / (identity.DONE + ".tmp")
    temporary.write_text(json.dumps(summary, indent=1))
    os.replace(temporary, out / identity.DONE)
