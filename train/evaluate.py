"""Held-out scores of a stage directory: CTC WER, the LLM's WER, answers to questions, compression, with examples."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from safetensors import SafetensorError
from tqdm import tqdm
from transformers.utils import logging

from soundwave_fast.errors import ArgumentParser, UserError, one_line, run_command
from soundwave_fast.model import SoundwaveForConditionalGeneration, SoundwaveProcessor
from soundwave_fast.model.checkpoint import LORA, is_stage_directory
from soundwave_fast.text import normalise
from train.data import tasks
from train.data.manifest import Utterance, read
from train.scoring import Outcome, Scores, answer, make_batches, make_jobs, score

PADS = ("longest", "30s")


def evaluate(
    model: SoundwaveForConditionalGeneration,
    processor: SoundwaveProcessor,
    rows: list[Utterance],
    questions: tuple[str, ...] = (),
    batch_size: int = 16,
    max_new_tokens: int = 48,
    progress: bool = True,
) -> Scores:
    """Score `rows`: CTC always, the LLM's transcript where there is an LLM, and each task of `questions` once a row.

    An answer is right when it equals the expected one after normalisation. Audio that cannot be used is skipped.
    """
    was_training = model.training
    model.eval()
    started = time.perf_counter()
    with_llm = model.language_model is not None
    jobs = make_jobs(rows, questions, with_llm)
    bar = tqdm(total=len(jobs), desc="evaluating", unit="utt", disable=not (progress and sys.stderr.isatty()))
    outcomes: list[Outcome] = []
    for batch in make_batches(jobs, batch_size):
        outcomes += answer(model, processor, batch, max_new_tokens)
        bar.update(len(batch))
    bar.close()
    scores = score(outcomes, with_llm)
    scores.utterances = len(rows) - scores.skipped
    scores.seconds = time.perf_counter() - started
    model.train(was_training)
    return scores


def _load(checkpoint: str) -> tuple[SoundwaveForConditionalGeneration, SoundwaveProcessor]:
    # after stage 1 the LLM has not met the adapters yet: CTC is all there is to score
    stage1 = is_stage_directory(checkpoint) and not (Path(checkpoint) / LORA).is_dir()
    try:
        model = SoundwaveForConditionalGeneration.from_pretrained(
            checkpoint, with_language_model=False if stage1 else None
        )
        return model, SoundwaveProcessor.from_pretrained(checkpoint)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise UserError(one_line(error if checkpoint in str(error) else f"{checkpoint}: {error}", 300)) from error


def _run(argv: list[str]) -> None:
    parser = ArgumentParser(prog="train/evaluate.py", description=__doc__)
    parser.add_argument("checkpoint", help="output directory of a stage")
    parser.add_argument("manifest", nargs="+", help="JSONL manifests")
    parser.add_argument("--questions", default="", help="tasks to ask besides the transcript, by comma")
    parser.add_argument("--limit", type=int, default=0, help="only the first N utterances")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--encoder-pad", choices=PADS, help="pad audio otherwise than the checkpoint was trained with")
    parser.add_argument("--json", help="write figures and all outputs here")
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    for name, least in (("limit", 0), ("batch_size", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')}: must be at least {least}, got {getattr(args, name)}")
    rows = [row for path in args.manifest for row in read(path)]
    rows = rows[: args.limit] if args.limit else rows
    questions = tuple(q for q in args.questions.split(",") if q)
    for name in questions:
        tasks.check(name, "--questions")
    model, processor = _load(args.checkpoint)
    if args.encoder_pad:  # the two halves of one setting: what is padded, and what the encoder attends to
        model.config.encoder_pad = processor.encoder_pad = args.encoder_pad
    scores = evaluate(model, processor, rows, questions, args.batch_size)
    if not scores.utterances:
        raise UserError(f"{', '.join(args.manifest)}: no audio that can be used")
    for example in scores.examples:
        if example["task"] == "asr" and normalise(example["llm"] or example["ctc"]) != normalise(example["reference"]):
            print(f"  ref: {example['reference']}\n  ctc: {example['ctc']}\n  llm: {example['llm']}\n")
    print("\n".join(scores.lines()))
    if args.json:
        temporary = Path(args.json + ".tmp")
        temporary.write_text(json.dumps({**scores.summary(), "examples": scores.examples}, indent=1))
        os.replace(temporary, args.json)


def main(argv: list[str] | None = None) -> int:
    """Command line; the exit code is `run_command`'s."""
    return run_command("evaluate", _run, argv)


if __name__ == "__main__":
    sys.exit(main())
