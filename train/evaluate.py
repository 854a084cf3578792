"""Held-out scores of a stage directory: CTC WER, the LLM's WER, answers to questions, compression, with examples."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch
from tqdm import tqdm
from transformers.utils import logging

from soundwave_fast.audio import MAX_SECONDS, SAMPLE_RATE, load_audio
from soundwave_fast.model import SoundwaveForConditionalGeneration, SoundwaveProcessor
from soundwave_fast.model.checkpoint import LORA, is_stage_directory
from soundwave_fast.text import collapse, normalise, word_error_rate
from train.config import UserError
from train.data import tasks
from train.data.manifest import Utterance, read


@dataclass
class Scores:
    """What `evaluate` measures; rates are shares, not per cent."""

    utterances: int = 0
    skipped: int = 0  # more of them, whose audio could not be used
    ctc_wer: float | None = None
    llm_wer: float | None = None
    frames: int = 0  # adapter frames (25 a second)
    audio_tokens: int = 0  # what the LLM reads for them
    answers: dict[str, tuple[int, int]] = field(default_factory=dict)  # task -> right, asked
    audio_seconds: float = 0.0
    seconds: float = 0.0
    examples: list[dict] = field(default_factory=list)

    def summary(self) -> dict:
        """JSON-ready figures without the examples."""
        out = {k: v for k, v in vars(self).items() if k != "examples" and v not in (None, {})}
        if self.audio_tokens:
            out["compression"] = round(self.frames / self.audio_tokens, 2)
        return out

    def lines(self) -> list[str]:
        """The same for people."""
        out = [f"{self.utterances} utterances, {self.audio_seconds:.0f} s of audio, scored in {self.seconds:.0f} s"]
        if self.skipped:
            out.append(f"skipped          {self.skipped} more: audio that cannot be read or is too long")
        if self.ctc_wer is not None:
            out.append(f"CTC greedy WER   {100 * self.ctc_wer:5.1f} %")
        if self.llm_wer is not None:
            out.append(f"LLM WER          {100 * self.llm_wer:5.1f} %")
        if self.audio_tokens:
            ratio = self.frames / self.audio_tokens
            out.append(f"compression      {self.frames} frames -> {self.audio_tokens} audio tokens ({ratio:.1f}x)")
        for name, (right, asked) in self.answers.items():
            out.append(f"{name:16s} {right}/{asked} right")
        return out


def _wave(row: Utterance) -> np.ndarray | None:
    """The waveform, or None where it cannot be used."""
    try:
        wave = load_audio(row.audio)
    except (OSError, ValueError):
        return None
    return wave if len(wave) <= MAX_SECONDS * SAMPLE_RATE else None


def _batches(items: list, size: int):
    for start in range(0, len(items), size):
        yield items[start : start + size]


@torch.no_grad()
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
    scores, started, skipped = Scores(), time.perf_counter(), set()
    device = next(model.parameters()).device
    rng = random.Random(0)
    jobs = [("asr", row, *tasks.ask("asr", row, random.Random(0))) for row in rows if row.text.strip()]
    if model.language_model is not None:
        for task in questions:
            jobs += [(task, row, *tasks.ask(task, row, rng)) for row in rows if tasks.applies(task, row)]
    # the same lengths together: little padding; the transcripts first
    jobs.sort(key=lambda job: (job[0] != "asr", job[1].duration))
    refs, ctc, llm, tally = [], [], [], defaultdict(lambda: [0, 0])
    bar = tqdm(total=len(jobs), desc="evaluating", unit="utt", disable=not (progress and sys.stderr.isatty()))
    for batch in _batches(jobs, batch_size):
        bar.update(len(batch))
        waves = [_wave(row) for _, row, _, _ in batch]
        skipped |= {row.id for (_, row, _, _), wave in zip(batch, waves, strict=True) if wave is None}
        batch = [job for job, wave in zip(batch, waves, strict=True) if wave is not None]
        if not batch:
            continue
        inputs = processor(
            text=[processor.prompt(prompt) for _, _, prompt, _ in batch],
            audio=[wave for wave in waves if wave is not None],
        ).to(device)
        frames, lengths = model.encode(inputs["input_features"], inputs["feature_lengths"])
        heard = model.hear(frames, lengths)
        ctc_texts = [
            processor.tokenizer.decode(collapse(tokens[:n], model.config.ctc_blank_id)).strip()
            for tokens, n in zip(heard.tokens_BT.tolist(), heard.lengths.tolist(), strict=True)
        ]
        outputs = [""] * len(batch)
        if model.language_model is not None:
            transcripts = sum(task == "asr" for task, *_ in batch)  # they come first
            scores.frames += int(heard.lengths[:transcripts].sum())
            scores.audio_tokens += int(model.shrink(heard).lengths[:transcripts].sum())
            generated = model.generate(
                inputs["input_ids"],
                inputs["attention_mask"],
                encoder_frames=frames,
                frame_lengths=lengths,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=processor.tokenizer.eos_token_id,
                pad_token_id=processor.tokenizer.pad_token_id,
            )
            outputs = processor.tokenizer.batch_decode(generated, skip_special_tokens=True)
        for (task, row, prompt, answer), by_ctc, by_llm in zip(batch, ctc_texts, outputs, strict=True):
            by_llm = by_llm.strip()
            example = {"id": row.id, "task": task, "prompt": prompt, "reference": answer, "llm": by_llm, "ctc": by_ctc}
            scores.examples.append(example)
            if task == "asr":
                refs.append(row.text), ctc.append(by_ctc), llm.append(by_llm)
                scores.audio_seconds += row.duration
            else:
                said, wanted = tasks.final_answer(by_llm), tasks.final_answer(answer)
                same = said == wanted if task == "capitals" else normalise(said) == normalise(wanted)
                tally[task][0] += same
                tally[task][1] += 1
    bar.close()
    if refs:
        scores.ctc_wer = word_error_rate(refs, ctc)
        scores.llm_wer = word_error_rate(refs, llm) if model.language_model is not None else None
    scores.answers = {task: (right, asked) for task, (right, asked) in tally.items()}
    scores.skipped, scores.utterances = len(skipped), len(rows) - len(skipped)
    scores.seconds = time.perf_counter() - started
    model.train(was_training)
    return scores


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="train/evaluate.py", description=__doc__)
    parser.add_argument("checkpoint", help="output directory of a stage")
    parser.add_argument("manifest", nargs="+", help="JSONL manifests")
    parser.add_argument("--questions", default="", help="tasks to ask besides the transcript, by comma")
    parser.add_argument("--limit", type=int, default=0, help="only the first N utterances")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--json", help="write figures and all outputs here")
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    try:
        rows = [row for path in args.manifest for row in read(path)]
        rows = rows[: args.limit] if args.limit else rows
        questions = tuple(q for q in args.questions.split(",") if q)
        for name in questions:
            if name not in tasks.NAMES:
                raise UserError(f"--questions: {name!r} is not one of {', '.join(tasks.NAMES)}")
        try:
            # after stage 1 the LLM has not met the adapters yet: CTC is all there is to score
            stage1 = is_stage_directory(args.checkpoint) and not (Path(args.checkpoint) / LORA).is_dir()
            model = SoundwaveForConditionalGeneration.from_pretrained(
                args.checkpoint, with_language_model=False if stage1 else None
            )
            processor = SoundwaveProcessor.from_pretrained(args.checkpoint)
            scores = evaluate(model, processor, rows, questions, args.batch_size)
            if not scores.utterances:
                raise UserError(f"{', '.join(args.manifest)}: no audio that can be used")
        except (OSError, ValueError) as error:
            raise UserError(" ".join(str(error).split())[:300]) from None
    except UserError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    for example in scores.examples:
        if example["task"] == "asr" and normalise(example["llm"] or example["ctc"]) != normalise(example["reference"]):
            print(f"  ref: {example['reference']}\n  ctc: {example['ctc']}\n  llm: {example['llm']}\n")
    print("\n".join(scores.lines()))
    if args.json:
        temporary = Path(args.json + ".tmp")
        temporary.write_text(json.dumps({**scores.summary(), "examples": scores.examples}, indent=1))
        os.replace(temporary, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
