"""Command line shared by the three stage scripts: options, the run's directory, errors as one line, exit codes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import warnings
from pathlib import Path

from train.config import Config, UserError, disk_errors, dump, load

DONE = "done.json"


def _arguments(stage: int, argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"train/stage{stage}.py",
        description={
            1: "Stage 1: the alignment adapter learns the LLM's vocabulary by CTC.",
            2: "Stage 2: shrinking adapter and LoRA join; cross-entropy + CTC over many tasks.",
            3: "Stage 3: instruction tuning.",
        }[stage],
        epilog="Any other setting: key=value, e.g. optim.steps=100 data.batch_size=8 (see train/config.py).",
    )
    parser.add_argument("--config", default="nano", help="a preset of train/configs or a YAML file [%(default)s]")
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
        help="auto: from the newest checkpoint of this run; never: afresh; PATH: from that checkpoint [%(default)s]",
    )
    parser.add_argument("--overwrite", action="store_true", help="throw away a run with other settings in --out")
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


def _config(args: argparse.Namespace, stage: int) -> Config:
    overrides = {
        "model.whisper": args.whisper,
        "model.llm": args.llm,
        "data.train": args.train,
        "data.valid": args.valid,
        "run.init": args.init,
        "run.out": args.out,
    }
    given = {key: value for key, value in overrides.items() if value is not None}
    config = load(args.config, stage, given, args.settings)
    if not config.run.out:
        raise UserError("--out: no output directory")
    if not config.data.train:
        raise UserError("--train: no manifest")
    if stage == 1 and config.run.init:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, init=""))
    return config


def _finished(config: Config, overwrite: bool) -> bool:
    """Whether `run.out` already holds this very run, finished. Writes nothing.

    Raises:
        UserError: it holds a run with other settings and `overwrite` is not set.
    """
    settings, text = Path(config.run.out) / "config.yaml", dump(config)
    if settings.is_file() and settings.read_text() != text and not overwrite:
        was = set(settings.read_text().splitlines())
        changed = [line.strip() for line in text.splitlines() if line not in was]
        what = "; ".join(changed[:4]) or "fewer settings"
        raise UserError(
            f"{config.run.out} holds a run with other settings (now {what}); --overwrite it or change --out"
        )
    return settings.is_file() and settings.read_text() == text and (Path(config.run.out) / DONE).is_file()


def _claim(config: Config, resume: str) -> None:
    """Make `run.out` this run's, throwing away one with other settings, or any where `resume` is 'never'.

    Raises:
        UserError: it cannot be written, or holds the checkpoint to start from.
    """
    out, text = Path(config.run.out), dump(config)
    settings = out / "config.yaml"
    with disk_errors(out):
        if settings.is_file() and (settings.read_text() != text or resume == "never"):
            if resume not in ("auto", "never") and Path(resume).resolve().is_relative_to(out.resolve()):
                raise UserError(f"--resume {resume}: lies in {out}, which --overwrite would throw away; change --out")
            shutil.rmtree(out)
        (out / DONE).unlink(missing_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        temporary = out / "config.yaml.tmp"
        temporary.write_text(text)
        os.replace(temporary, settings)


def check(stage: int, argv: list[str], previous_exists: bool = True) -> Config:
    """Parse and check a stage's command line without running it: settings, manifests, previous stage.

    Args:
        previous_exists: False where the previous stage is still to be run.

    Raises:
        UserError: whatever is wrong with it.
    """
    from train.build import previous_stage
    from train.data.manifest import read

    config = _config(_arguments(stage, argv), stage)
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
    args = _arguments(stage, argv)
    world = None
    try:
        config = _config(args, stage)
        from train import parallel

        world = parallel.start()
        if _finished(config, args.overwrite) and args.resume == "auto":
            if world.main:
                print(f"{config.run.out}: already finished", file=sys.stderr)
            return 0
        return _train(config, stage, world, args.resume)
    except KeyboardInterrupt:
        print(f"stage {stage}: interrupted; the same command goes on", file=sys.stderr)
        return 130
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:  # also before there is a world
            print(f"stage {stage}: {error}", file=sys.stderr)
        return 2
    finally:
        if world is not None:
            parallel.stop()


def _train(config: Config, stage: int, world, resume: str) -> int:
    from train import environment, parallel
    from train.data.manifest import read
    from train.signals import Interrupted
    from train.trainer import Trainer

    for noise in (".*set_vital.*", ".*torch.distributed is disabled.*"):  # said by torchdata and DCP in every run
        warnings.filterwarnings("ignore", message=noise)
    for path in config.data.valid if config.run.valid_utterances else ():
        read(path)  # its mistakes are said now, not after the training
    trainer = Trainer(config, stage, world, resume)  # before anything is written: most mistakes show here
    if world.main:
        _claim(config, resume)
        with disk_errors(Path(config.run.out)):
            environment.write(Path(config.run.out), world)
    parallel.barrier()
    trainer.resume()
    try:
        with disk_errors(Path(config.run.out)):
            trainer.run()
    except Interrupted as interruption:
        trainer.metrics.say(f"interrupted at step {trainer.step}, saved; the same command goes on from here")
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
    from train import metrics
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
    temporary = out / (DONE + ".tmp")
    temporary.write_text(json.dumps(summary, indent=1))
    os.replace(temporary, out / DONE)
