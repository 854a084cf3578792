"""Ablations from short runs of all three stages: look-back, blanks, CTC head, temperature - one table.

`python train/ablate.py --train MANIFEST --test MANIFEST --out DIR [--only NAME ...] [--steps N N N] [key=value ...]`;
finished runs are kept, so the command can be stopped and given again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from soundwave_fast.errors import ArgumentParser, UserError, run_command
from train.config import NANO, NEUTRAL
from train.stage import sort_settings

ROOT = Path(__file__).resolve().parents[1]
# name -> (what changes, settings of every stage, first stage that differs from the baseline)
VARIANTS: dict[str, tuple[str, list[str], int]] = {
    "baseline": ("look-back over all frames, blanks dropped, free head, T = 1 + 5 epoch", [], 1),
    "no-look-back": ("no cross-attention, and so no projection to fit before stage 2", ["model.look_back=false"], 1),
    "kept-keys": ("look-back over the kept frames only, as released", ["model.look_back_keys=kept"], 2),
    "keep-blanks": ("a blank run stays, as one frame", ["model.drop_blank=false"], 2),
    "tied-head": ("frames scored against the LLM's own frozen embeddings", ["model.ctc_head=tied"], 1),
    "no-temperature": ("tasks in proportion to their rows throughout", ["data.temperature=[1.0, 0.0]"], 2),
}
SPEECH = ("runs/nano/speech/train.jsonl", "runs/nano/speech/test.jsonl")  # what `make demo` leaves
QUESTIONS = ("first_word", "last_word", "capitals", "slot")


def _run(command: list[str]) -> None:
    code = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]]).returncode
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise UserError(f"{' '.join(command[:6])} ... failed (exit code {code})")


def _stages(name: str, out: Path, args: argparse.Namespace) -> Path:
    """Run (or find) the stages of one variant; those before the first that differs are the baseline's."""
    _, settings, first = VARIANTS[name]
    previous = None
    for stage in (1, 2, 3):
        own = out / (name if stage >= first else "baseline") / f"stage{stage}"
        command = [f"train/stage{stage}.py", "--train", *args.train, "--out", str(own)]
        command += ["--config", args.config] if args.config else []  # else the stages choose, by the parts
        command += ["--valid", *args.test, "run.valid_utterances=0"]
        command += ["--init", str(previous)] if previous else []
        command += [f"optim.steps={args.steps[stage - 1]}"] if args.steps else []
        _run([*command, *(settings if stage >= first else []), *args.settings])
        previous = own
    return previous


def _score(folder: Path, args: argparse.Namespace) -> dict:
    target = folder / "held_out.json"
    if not target.is_file():
        questions = ",".join(args.questions)
        command = ["train/evaluate.py", str(folder), *args.test, "--questions", questions, "--json", str(target)]
        _run(command + (["--limit", str(args.limit)] if args.limit else []))
    return json.loads(target.read_text())


def table(scores: dict[str, dict]) -> str:
    """Markdown, one row a variant."""
    tasks = sorted({task for row in scores.values() for task in row.get("answers", {})})
    head = ["variant", "CTC WER", "LLM WER", "frames per audio token", *tasks]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in scores.items():
        answers = row.get("answers", {})
        cells = [name, f"{100 * row['ctc_wer']:.1f} %", f"{100 * row['llm_wer']:.1f} %", f"{row['compression']:.1f}"]
        cells += ["{}/{}".format(*answers[task]) if task in answers else "" for task in tasks]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"- {name}: {VARIANTS[name][0]}" for name in scores)])


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="train/ablate.py", description=__doc__)
    parser.add_argument(
        "--config", help=f"a preset or a YAML file [{NANO}; {NEUTRAL} where model.whisper or model.llm is not {NANO}'s]"
    )
    parser.add_argument("--train", nargs="+", metavar="MANIFEST", help=f"[{SPEECH[0]}]")
    parser.add_argument("--test", nargs="+", metavar="MANIFEST", help=f"[{SPEECH[1]}]")
    parser.add_argument("--out", default="runs/ablation")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--steps", nargs=3, type=int, metavar="N", help="of stages 1, 2 and 3 (default: the config's)")
    parser.add_argument("--questions", nargs="*", default=list(QUESTIONS))
    parser.add_argument("--limit", type=int, default=0, help="score only the first N utterances")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="for every stage of every variant")
    args = sort_settings(parser.parse_intermixed_args(argv))
    args.train, args.test = args.train or list(SPEECH[:1]), args.test or list(SPEECH[1:])
    for path in (*args.train, *args.test):
        if path in SPEECH and not Path(path).is_file():
            where = Path(path).parent
            raise UserError(f"no speech in {where} yet: run `make demo` first, or name yours with --train and --test")
    return args


def _ablate(argv: list[str]) -> None:
    args = _arguments(argv)
    out = Path(args.out)
    scores: dict[str, dict] = {}
    for name in args.only:
        print(f"=== {name}: {VARIANTS[name][0]}", flush=True)
        scores[name] = _score(_stages(name, out, args), args)
        temporary = out / "table.md.tmp"
        temporary.write_text(table(scores) + "\n")
        os.replace(temporary, out / "table.md")
    print("\n" + table(scores))


def main(argv: list[str] | None = None) -> int:
    """Command line; the exit code is `run_command`'s."""
    return run_command("ablate", _ablate, argv, interrupted="interrupted; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
