"""Command line shared by the three stage scripts: options, the run's directory, errors as one line, exit codes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

from train.config import Config, UserError, dump, load

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
    parser.add_argument("--overwrite", action="store_true", help="throw away a run with other settings in --out")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(argv)


def _config(args: argparse.Namespace, stage: int) -> Config:
    overrides = {
        "model.whisper": args.whisper,
        "model.llm": args.llm,
        "data.train": args.train,
        "data.valid": args.valid,
        "run.init": args.init,
        "run.out": args.out,
    }
    config = load(args.config, stage, {k: v for k, v in overrides.items() if v is not None})
    config = load_more(config, args.settings)
    if not config.run.out:
        raise UserError("--out: no output directory")
    if not config.data.train:
        raise UserError("--train: no manifest")
    if stage == 1 and config.run.init:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, init=""))
    return config


def load_more(config: Config, settings: list[str]) -> Config:
    """`key=value` settings on top of a config."""
    from train.config import _merge, _split

    for setting in settings:
        key, value = _split(setting)
        for part in reversed(key.split(".")):
            value = {part: value}
        config = _merge(config, value, "command line")
    return config


def _prepare_directory(config: Config, overwrite: bool) -> bool:
    """Make `run.out`; True when it already holds this very run, finished.

    Raises:
        UserError: it holds a run with other settings, or cannot be written.
    """
    import shutil

    from train.checkpoint import disk_errors

    out = Path(config.run.out)
    settings = out / "config.yaml"
    text = dump(config)
    with disk_errors(out):
        if settings.is_file() and settings.read_text() != text:
            if not overwrite:
                was = set(settings.read_text().splitlines())
                changed = [line.strip() for line in text.splitlines() if line not in was]
                what = "; ".join(changed[:4]) or "fewer settings"
                raise UserError(f"{out} holds a run with other settings (now {what}); --overwrite it or change --out")
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
        temporary = out / "config.yaml.tmp"
        temporary.write_text(text)
        os.replace(temporary, settings)
    return (out / DONE).is_file()


def main(stage: int, argv: list[str] | None = None) -> int:
    """Run one stage; returns the exit code: 0 done, 2 a mistake of the user's, 130 interrupted (saved)."""
    args = _arguments(stage, argv)
    world = None
    try:
        config = _config(args, stage)
        from train import parallel

        world = parallel.start()
        if world.main:
            done = _prepare_directory(config, args.overwrite)
            if done:
                print(f"{config.run.out}: already finished", file=sys.stderr)
        parallel.barrier()
        if (Path(config.run.out) / DONE).is_file():
            return 0
        return _train(config, stage, world)
    except UserError as error:
        if world is None or world.main:
            print(f"stage {stage}: {error}", file=sys.stderr)
        return 2
    finally:
        if world is not None:
            parallel.stop()


def _train(config: Config, stage: int, world) -> int:
    from train import parallel
    from train.trainer import Interrupted, Trainer

    trainer = Trainer(config, stage, world)
    try:
        trainer.run()
    except Interrupted:
        trainer.metrics.say(f"interrupted at step {trainer.step}, saved; the same command goes on from here")
        return 130
    if world.main:
        _report(trainer, config)
    parallel.barrier()
    return 0


def _report(trainer, config: Config) -> None:
    """Validation, loss curves and the marker that this stage is done."""
    from soundwave_fast import plots
    from soundwave_fast.model import SoundwaveForConditionalGeneration
    from train import metrics
    from train.data.manifest import read
    from train.evaluate import evaluate

    out = Path(config.run.out)
    summary: dict = {"steps": trainer.step}
    if config.data.valid and config.run.valid_utterances:
        rows = [row for path in config.data.valid for row in read(path)][: config.run.valid_utterances]
        model = trainer.model
        if trainer.world.size > 1:  # sharded: read back what was saved
            del trainer
            model = SoundwaveForConditionalGeneration.from_pretrained(out, with_language_model=False)
        from soundwave_fast.model import SoundwaveProcessor

        scores = evaluate(model, SoundwaveProcessor.from_pretrained(out), rows)
        print("\n".join(scores.lines()), file=sys.stderr)
        summary["valid"] = scores.summary()
    rows = metrics.read(out / metrics.FILE)
    summary["step_s_median"] = sorted(row["step_s"] for row in rows)[len(rows) // 2] if rows else None
    plots.loss_curves({out.name: rows}, out / "loss.png")
    temporary = out / (DONE + ".tmp")
    temporary.write_text(json.dumps(summary, indent=1))
    os.replace(temporary, out / DONE)
