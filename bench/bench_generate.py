"""Transcription from encoder frames: batches of 1 and 8, greedy, a fixed number of new tokens; rate and latency."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, field
from statistics import mean, median

import torch
from transformers import StoppingCriteriaList

from bench import parts, released, whole_batch
from bench.harness import INPUT_SETS, Case, Unavailable, device, record, rows

TEXT = 24
GPU = device().type == "cuda"
T50, NEW = (1500, 64) if GPU else (200, 8)
RELEASED, PADDED, COMPILED, OURS = "eager as released", "eager, padded", "eager, padded, compiled", "ours"


@dataclass
class Clock:
    """A stopping criterion that never stops: notes when the first token of a step is there."""

    begun: float = 0.0
    first: list[float] = field(default_factory=list)  # s, one a step
    audio_seconds: dict[int, float] = field(default_factory=dict)  # of the batch of each seed
    waiting: bool = False

    def start(self) -> None:
        self.begun, self.waiting = time.perf_counter(), True

    def __call__(self, input_ids: torch.Tensor, scores, **_) -> torch.Tensor:
        if self.waiting:
            if input_ids.is_cuda:
                torch.cuda.synchronize()
            self.first.append(time.perf_counter() - self.begun)
            self.waiting = False
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


_clocks: dict[tuple[str, str], Clock] = {}


@functools.cache
def _model(where: torch.device):
    """One model for all rows: building it takes longer than using it."""
    return parts.model(parts.size(where), where).eval()


def _setup(case: Case, where: torch.device, seed: int, provider: str):
    size, model = parts.size(where), _model(where)
    batch = parts.speech(size, case.shape["B"], case.shape["T50"], 4, where, seed, still=16)
    prompt = parts.prompt(size, case.shape["B"], TEXT, 0, where, model.config.audio_token_id, seed)
    clock = _clocks.setdefault((case.id, provider), Clock())
    clock.audio_seconds[seed] = float(batch.lengths.sum()) / 50
    settings = {"max_new_tokens": case.shape["new"], "min_new_tokens": case.shape["new"], "do_sample": False}
    return model, batch, prompt, {**settings, "stopping_criteria": StoppingCriteriaList([clock])}, clock


def eager(case: Case, where: torch.device, seed: int):
    """One utterance after the other, as the released script does."""
    model, batch, prompt, settings, clock = _setup(case, where, seed, RELEASED)

    @torch.no_grad()
    def step():
        clock.start()
        out = []
        for b, length in enumerate(batch.lengths):
            one = slice(b, b + 1)
            hidden, lengths = released.align(model, batch.frames[one, :length], batch.lengths[one])
            tokens = model.ctc_head.audio_feature_head(hidden).argmax(-1)
            embeds = released.splice(model, prompt["input_ids"][one], released.shrink(model, hidden, tokens, lengths))
            mask = torch.ones(embeds.shape[:2], dtype=torch.int64, device=where)
            out.append(model.language_model.generate(inputs_embeds=embeds, attention_mask=mask, **settings))
        return (torch.cat(out),)

    return step


def padded(compiled: bool):
    """The whole batch at once in eager torch; compiled, transformers' static cache and compiled decoding step too."""

    def make(case: Case, where: torch.device, seed: int):
        if compiled and not GPU:
            raise Unavailable("transformers compiles the decoding step on a GPU alone")
        model, batch, prompt, settings, clock = _setup(case, where, seed, COMPILED if compiled else PADDED)
        if compiled:
            settings = {**settings, "cache_implementation": "static"}

        def embed():
            hidden, lengths = whole_batch.align(model.alignment_adapter, batch.frames, batch.lengths)
            tokens = model.ctc_head.audio_feature_head(hidden).argmax(-1)
            rows, counts = whole_batch.shrink(model.shrinking_adapter, hidden, tokens, lengths)
            text, placeholder = whole_batch.embed(model, prompt["input_ids"])
            return whole_batch.splice(text, placeholder, rows, counts, left=True)

        embed = torch.compile(embed) if compiled else embed

        @torch.no_grad()
        def step():
            clock.start()
            embeds, mask, _ = embed()
            return (model.language_model.generate(inputs_embeds=embeds, attention_mask=mask.long(), **settings),)

        return step

    return make


def ours(case: Case, where: torch.device, seed: int):
    """The whole batch at once, left-padded."""
    model, batch, prompt, settings, clock = _setup(case, where, seed, OURS)

    def step():
        clock.start()
        return (
            model.generate(
                prompt["input_ids"],
                prompt["attention_mask"],
                encoder_frames=batch.frames,
                frame_lengths=batch.lengths,
                **settings,
            ),
        )

    return step


CASES = [
    Case(
        "generate",
        name,
        {"B": B, "T50": T50, "new": NEW},
        {RELEASED: eager, PADDED: padded(compiled=False), COMPILED: padded(compiled=True), OURS: ours},
        dtype="bfloat16" if GPU else "float32",
        sources=("soundwave_fast/model", "soundwave_fast/ops", "csrc_triton"),
        tests="tests/model/test_soundwave.py",
        compare=False,  # a random LLM's argmax flips on the last bit
        rounds=3,
    )
    for name, B in (("one utterance", 1), ("eight utterances", 8))
]


@rows(CASES)
def test_generate(benchmark, request, case, provider):
    """Rows carry new tokens a second, median time to the first token (of the first utterance, where they come one
    after the other) and the real-time factor: computing time / audio time."""
    record(benchmark, request, case, provider)
    samples, clock = benchmark.stats.stats.data, _clocks[case.id, provider]
    untimed = INPUT_SETS if GPU else 1  # each set's first call; those that measure memory come last
    middle = median(samples)
    benchmark.extra_info["tokens_per_second"] = case.shape["B"] * case.shape["new"] / middle
    benchmark.extra_info["first_token_seconds"] = median(clock.first[untimed : untimed + len(samples)])
    benchmark.extra_info["real_time_factor"] = middle / mean(clock.audio_seconds.values())
