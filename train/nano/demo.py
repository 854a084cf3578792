"""The whole road on a CPU: parts, speech, stages 1 to 3, then held-out transcripts and answers with their pictures."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from soundwave_fast.errors import ArgumentParser, UserError, run_command
from train import stage
from train.config import NANO, load

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = ("first_word", "last_word", "capitals", "slot", "then_slot")
STEPS = {1: 300, 2: 110, 3: 120}  # enough for the synthesised commands; the preset's own for other speech
NEED_BYTES = 3 << 30  # parts 1 GB, checkpoints of three stages, speech


def _say(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def _run(command: list[str], what: str) -> None:
    """Run a step with this interpreter's environment; its own messages say what went wrong.

    Raises:
        UserError: it failed.
        KeyboardInterrupt: it was interrupted; what it saved is kept.
    """
    environment = {
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads slow each other on two cores
        "GOMP_SPINCOUNT": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(os.cpu_count() or 1),
        **os.environ,
    }
    process = subprocess.Popen(command, env=environment)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    if code in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if code:
        raise UserError(f"{what} failed (exit code {code}); see its message above")


def _stage(number: int, out: Path, extra: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command += [str(ROOT / "train" / f"stage{number}.py"), "--config", NANO, "--out", str(out / f"stage{number}")]
    if number > 1:
        command += ["--init", str(out / f"stage{number - 1}")]
    _run(command + extra, f"stage {number}")


def _pictures(out: Path, test: Path, model, processor) -> None:
    from soundwave_fast import generate, plots
    from train import metrics
    from train.data.manifest import read

    runs = {f"stage {n}": metrics.read(out / f"stage{n}" / metrics.FILE) for n in (1, 2, 3)}
    plots.loss_curves(runs, out / "loss.png")
    row = max(read(test)[:20], key=lambda r: len(r.text))
    generate.draw_peaks(model, processor, row.audio, out / "peaks.png")


def _score(out: Path, test: Path, limit: int) -> Path:
    """Score the held-out set and draw the pictures, unless that was done since stage 3 ended; writes report.json."""
    from transformers.utils import logging

    from soundwave_fast.model import SoundwaveForConditionalGeneration, SoundwaveProcessor
    from train.data.manifest import read
    from train.evaluate import evaluate

    stage3, report = out / "stage3", out / "report.json"
    if report.is_file() and report.stat().st_mtime > (stage3 / "done.json").stat().st_mtime:
        return report
    logging.disable_progress_bar()
    model = SoundwaveForConditionalGeneration.from_pretrained(stage3)
    processor = SoundwaveProcessor.from_pretrained(stage3)
    scores = evaluate(model, processor, read(test)[:limit], QUESTIONS)
    _pictures(out, test, model, processor)
    temporary = report.with_suffix(".tmp")
    figures = {"lines": scores.lines(), **scores.summary(), "examples": scores.examples}
    temporary.write_text(json.dumps(figures, indent=1))
    os.replace(temporary, report)
    return report


def _print(out: Path, report: Path) -> None:
    """References beside outputs, then the figures."""
    figures = json.loads(report.read_text())
    for task in ("asr", *QUESTIONS):
        for example in [e for e in figures["examples"] if e["task"] == task][: 8 if task == "asr" else 3]:
            print(f"  [{task}] {example['prompt']}")
            print(f"      reference: {example['reference']!r}")
            print(f"      LLM:       {example['llm']!r}")
            if task == "asr":
                print(f"      CTC:       {example['ctc']!r}")
    print("\nheld-out speech\n  " + "\n  ".join(figures["lines"]))
    for number in (1, 2, 3):
        done = json.loads((out / f"stage{number}" / "done.json").read_text())
        print(f"  stage {number}: {done['steps']} steps, median {done['step_s_median']:.2f} s a step")
    print(f"  pictures: {out / 'loss.png'}, {out / 'peaks.png'}\n  figures and all outputs: {report}")


def _go(args: argparse.Namespace) -> None:
    from train.nano import parts, speech

    out = Path(args.out)
    started = time.perf_counter()
    for number in (1, 2, 3):  # a mistake in a setting or manifest shows now, not after stage 1
        manifests = ["--train", *args.train, "--valid", args.test] if args.train else []
        if manifests:
            stage.check(number, ["--config", NANO, *manifests, *args.settings], previous_exists=False)
        else:
            load(NANO, number, settings=args.settings)
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    if free < NEED_BYTES and not (out / "report.json").exists():
        raise UserError(f"--out {out}: {free / 2**30:.1f} GiB free, {NEED_BYTES / 2**30:.0f} GiB needed")
    _say("1/6 nano parts (Whisper tiny.en, SmolLM2-135M-Instruct, a voice)")
    parts.prepare_all()
    if args.train:
        train, test = args.train, Path(args.test)
    else:
        _say(f"2/6 speech: {args.utterances} sentences to train on, {args.held_out} held out")
        folder = out / "speech"
        made = speech.make_speech(folder, args.utterances, args.held_out)
        print(speech.describe(made))
        train, test = [str(made[0])], made[1]
    lessons = ("CTC teaches the alignment adapter", "shrinking adapter + LoRA", "instructions")
    for number, what in enumerate(lessons, 1):
        _say(f"{number + 2}/6 stage {number}: {what}")
        # evaluated once, at the end, but for stage 1's CTC WER
        extra = ["--train", *train, "--valid", str(test)]
        extra += [f"run.valid_utterances={args.held_out if number == 1 else 0}"]
        extra += [] if args.train else [f"optim.steps={STEPS[number]}"]
        _stage(number, out, [*extra, *args.settings])
    _say("6/6 held-out speech")
    _print(out, _score(out, test, args.held_out))
    soundwave = Path(sys.executable).parent / "soundwave"
    minutes = (time.perf_counter() - started) / 60
    print(f"\n{minutes:.1f} minutes. Now: {soundwave} transcribe --model {out}/stage3 FILE")


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m train.nano.demo", description=__doc__)
    parser.add_argument("--out", default="runs/nano", help="where everything goes [%(default)s]")
    parser.add_argument("--utterances", type=int, default=400, help="sentences to synthesise [%(default)s]")
    parser.add_argument("--held-out", type=int, default=40, help="more of them, kept back [%(default)s]")
    parser.add_argument("--train", nargs="+", metavar="MANIFEST", help="your own speech instead of synthesised")
    parser.add_argument("--test", metavar="MANIFEST", help="held-out part of it")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings for every stage")
    args = stage.sort_settings(parser.parse_intermixed_args(argv))
    for name in ("utterances", "held_out"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, got {getattr(args, name)}")
    if bool(args.train) != bool(args.test):
        raise UserError("--train and --test go together")
    nano, asked = load(NANO, 1).model, load(NANO, 1, settings=args.settings).model
    if asked.llm != nano.llm and asked.chat_template == nano.chat_template:  # that is of nano's own LLM
        args.settings = ["model.chat_template=null", *args.settings]
    return args


def main(argv: list[str] | None = None) -> int:
    """Command line; the exit code is `run_command`'s."""
    return run_command(
        "demo", lambda argv: _go(_arguments(argv)), argv, interrupted="interrupted; the same command goes on from here"
    )


if __name__ == "__main__":
    sys.exit(main())
