"""Jobs and scores: what is asked about held-out rows, what the model answers, and the figures over the answers."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch

from soundwave_fast.audio import SAMPLE_RATE
from soundwave_fast.model import SoundwaveForConditionalGeneration, SoundwaveProcessor
from soundwave_fast.text import collapse, normalise, word_error_rate
from train.data import tasks
from train.data.reading import load
from train.data.utterance import Utterance


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


@dataclass(frozen=True)
class Job:
    """One question about one utterance."""

    task: str
    row: Utterance
    prompt: str
    answer: str


@dataclass
class Outcome:
    """What the model made of a job; without `example` the audio could not be used."""

    row_id: str
    task: str
    example: dict | None = None  # {id, task, prompt, reference, llm, ctc}
    text: str = ""  # transcript
    seconds: float = 0.0
    frames: int = 0
    audio_tokens: int = 0


def make_jobs(rows: list[Utterance], questions: tuple[str, ...] = (), with_llm: bool = True) -> list[Job]:
    """The transcript of every row that has one, then each task of `questions` where it applies; by duration."""
    jobs = [Job("asr", row, *tasks.ask("asr", row, random.Random(0))) for row in rows if row.text.strip()]
    rng = random.Random(0)
    for task in questions if with_llm else ():
        jobs += [Job(task, row, *tasks.ask(task, row, rng)) for row in rows if tasks.applies(task, row)]
    # the same lengths together: little padding; the transcripts first
    return sorted(jobs, key=lambda job: (job.task != "asr", job.row.duration))


def make_batches(jobs: list[Job], size: int, seconds: float = float("inf")) -> list[list[Job]]:
    """Neighbours together: at most `size`, and no more than `seconds` of padded audio (but for a single one)."""
    batches: list[list[Job]] = []
    longest = 0.0
    for job in jobs:
        longest = max(longest, job.row.duration)
        if not batches or len(batches[-1]) == size or (len(batches[-1]) + 1) * longest > seconds:
            batches.append([])
            longest = job.row.duration
        batches[-1].append(job)
    return batches


def _wave(row: Utterance) -> np.ndarray | None:
    """The waveform, or None where it cannot be used."""
    try:
        return load(row)
    except (OSError, ValueError):
        return None


@torch.no_grad()
def answer(
    model: SoundwaveForConditionalGeneration,
    processor: SoundwaveProcessor,
    batch: list[Job],
    max_new_tokens: int = 48,
    lockstep: bool = False,
    cache: dict[int, tuple] | None = None,
) -> list[Outcome]:
    """Hear and answer one batch, greedily; the model is in eval mode.

    Args:
        lockstep: the model is sharded: all ranks call this together, and each runs every module and as many decoding
            steps as the slowest, also with an empty batch.
        cache: keeps what the frozen encoder made of this very list object; read the next time.
    """
    waves = [_wave(job.row) for job in batch]
    outcomes = [Outcome(job.row.id, job.task) for job in batch]
    usable = [(job, out) for job, out, wave in zip(batch, outcomes, waves, strict=True) if wave is not None]
    waves = [wave for wave in waves if wave is not None]
    prompts = [processor.prompt(job.prompt) for job, _ in usable]
    if not usable:
        if not lockstep:
            return outcomes
        waves, prompts = [np.zeros(SAMPLE_RATE, np.float32)], [processor.prompt("Nothing.")]
    device = next(model.parameters()).device
    with torch.autocast("cpu", enabled=False):  # log-mel is float32 in training, too
        inputs = processor(text=prompts, audio=waves).to(device)
    encoded = None if cache is None else cache.get(id(batch))
    if encoded is None:
        encoded = model.encode(inputs["input_features"], inputs["feature_lengths"])
        if cache is not None:
            cache[id(batch)] = encoded
    frames, lengths = encoded
    heard = model.hear(frames, lengths)
    by_ctc = [
        processor.tokenizer.decode(collapse(tokens[:n], model.config.ctc_blank_id)).strip()
        for tokens, n in zip(heard.tokens_BT.tolist(), heard.lengths.tolist(), strict=True)
    ]
    by_llm, audio_tokens = [""] * len(waves), [0] * len(waves)
    if model.language_model is not None:
        audio_tokens = model.shrink(heard).lengths.tolist()
        generated = model.generate(
            inputs["input_ids"],
            inputs["attention_mask"],
            encoder_frames=frames,
            frame_lengths=lengths,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=processor.tokenizer.eos_token_id,
            pad_token_id=processor.tokenizer.pad_token_id,
            **({"synced_gpus": True} if lockstep else {}),
        )
        by_llm = [text.strip() for text in processor.tokenizer.batch_decode(generated, skip_special_tokens=True)]
    frame_counts = heard.lengths.tolist()
    for i, (job, out) in enumerate(usable):
        known = {"id": job.row.id, "task": job.task, "prompt": job.prompt, "reference": job.answer}
        out.example = {**known, "llm": by_llm[i], "ctc": by_ctc[i]}
        out.text, out.seconds = job.row.text, job.row.duration
        out.frames, out.audio_tokens = frame_counts[i], audio_tokens[i]
    return outcomes


def _is_right(example: dict) -> bool:
    """The expected answer, after normalisation; capitals are compared as they are."""
    said, wanted = tasks.final_answer(example["llm"]), tasks.final_answer(example["reference"])
    return said == wanted if example["task"] == "capitals" else normalise(said) == normalise(wanted)


def score(outcomes: list[Outcome], with_llm: bool) -> Scores:
    """Figures over outcomes; error rates are None where no reference has words."""
    scores, tally = Scores(), defaultdict(lambda: [0, 0])
    done = [out for out in outcomes if out.example is not None]
    transcripts = [out for out in done if out.task == "asr"]
    scores.examples = [out.example for out in done]
    scores.skipped = len({out.row_id for out in outcomes if out.example is None})
    scores.audio_seconds = sum(out.seconds for out in transcripts)
    if with_llm:
        scores.frames = sum(out.frames for out in transcripts)
        scores.audio_tokens = sum(out.audio_tokens for out in transcripts)
    refs = [out.text for out in transcripts]
    if any(normalise(ref) for ref in refs):
        scores.ctc_wer = word_error_rate(refs, [out.example["ctc"] for out in transcripts])
        scores.llm_wer = word_error_rate(refs, [out.example["llm"] for out in transcripts]) if with_llm else None
    for out in done:
        if out.task != "asr":
            tally[out.task][0] += _is_right(out.example)
            tally[out.task][1] += 1
    scores.answers = {task: (right, asked) for task, (right, asked) in tally.items()}
    return scores
