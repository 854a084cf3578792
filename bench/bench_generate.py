"""Transcription from encoder frames: batches of 1 and 8, greedy, a fixed number of new tokens."""

from __future__ import annotations

import torch

from bench import parts, released
from bench.harness import Case, device, record, rows

TEXT = 24
GPU = device().type == "cuda"
T50, NEW = (1500, 64) if GPU else (200, 8)


def _setup(case: Case, where: torch.device, seed: int):
    size = parts.size(where)
    model = parts.model(size, where).eval()
    batch = parts.speech(size, case.shape["B"], case.shape["T50"], 4, where, seed)
    prompt = parts.prompt(size, case.shape["B"], TEXT, 0, where, model.config.audio_token_id, seed)
    settings = {"max_new_tokens": case.shape["new"], "min_new_tokens": case.shape["new"], "do_sample": False}
    return model, batch, prompt, settings


def eager(case: Case, where: torch.device, seed: int):
    """One utterance after the other, as the released script does."""
    model, batch, prompt, settings = _setup(case, where, seed)

    @torch.no_grad()
    def step():
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


def ours(case: Case, where: torch.device, seed: int):
    """The whole batch at once, left-padded."""
    model, batch, prompt, settings = _setup(case, where, seed)

    def step():
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
        {"B": B, "T50": T50, "new": new},
        {"eager as released": eager, "ours": ours},
        dtype="bfloat16" if GPU else "float32",
        sources=("soundwave_fast/model", "soundwave_fast/ops", "csrc_triton"),
        tests="tests/model/test_soundwave.py",
        compare=False,  # a random LLM's argmax flips on the last bit
        rounds=4,
    )
    for name, B, new in (("first token", 1, 1), ("one utterance", 1, NEW), ("eight utterances", 8, NEW))
]


@rows(CASES)
def test_generate(benchmark, request, case, provider):
    record(benchmark, request, case, provider)
    seconds = case.shape["B"] * case.shape["T50"] / 50 * 0.75  # utterances fill three quarters of T50 on average
    middle = sorted(benchmark.stats.stats.data)[len(benchmark.stats.stats.data) // 2]
    benchmark.extra_info["tokens_per_second"] = case.shape["B"] * case.shape["new"] / middle
    benchmark.extra_info["real_time_factor"] = middle / seconds
