"""Training steps of the three stages: forward, backward, clipping and AdamW from encoder frames on.

Stage 1 trains alignment adapter and head, stage 2 both adapters and LoRA, stage 3 (as the paper's) LoRA alone.
"""

from __future__ import annotations

import torch

from bench import parts, released, whole_batch
from bench.harness import Case, device, record, rows

TEXT, ANSWER = 24, 12
GPU = device().type == "cuda"
SHAPES = {
    1: {"B": 8, "T50": 1500, "S": 100} if GPU else {"B": 4, "T50": 200, "S": 12},
    2: {"B": 8, "T50": 1500, "S": 100} if GPU else {"B": 2, "T50": 200, "S": 12},
}
SHAPES[3] = SHAPES[2]


def _setup(case: Case, where: torch.device, seed: int, stage: int):
    size = parts.size(where)
    model = parts.model(size, where, with_language_model=stage > 1, lora=stage > 1)
    batch = parts.speech(size, **case.shape, device=where, seed=seed, still=16)
    prompt = parts.prompt(size, case.shape["B"], TEXT, ANSWER, where, model.config.audio_token_id, seed)
    for name, parameter in model.named_parameters():
        adapter = name.startswith(("alignment_adapter", "shrinking_adapter", "ctc_head"))
        parameter.requires_grad_("lora_" in name or (stage < 3 and adapter))
    return model, batch, prompt, [p for p in model.parameters() if p.requires_grad]


def _optimize(loss, optimizer, trained):
    loss.float().backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return (loss,)


def eager(stage: int):
    """The audio side utterance by utterance, full CTC logits, the LLM's own loss over the padded batch, plain AdamW."""

    def make(case: Case, where: torch.device, seed: int):
        model, batch, prompt, trained = _setup(case, where, seed, stage)
        optimizer = torch.optim.AdamW(trained, lr=1e-5, foreach=False)

        def step():
            hidden, lengths = released.align(model, batch.frames, batch.lengths)
            loss, logits = released.ctc(model, hidden, lengths, batch.targets, batch.target_lengths)
            if stage > 1:
                audio = released.shrink(model, hidden, logits.argmax(-1), lengths)
                embeds, labels, mask = released.splice_labels(model, prompt["input_ids"], prompt["labels"], audio)
                llm = model.language_model(inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False)
                loss = llm.loss + model.config.ctc_weight * loss
            return _optimize(loss, optimizer, trained)

        return step

    return make


def padded(stage: int, compiled: bool = False):
    """The audio side over the whole padded batch, compiled or not, and fused AdamW. The LLM is the same for all."""

    def make(case: Case, where: torch.device, seed: int):
        model, batch, prompt, trained = _setup(case, where, seed, stage)
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        audio_side = _alignment if stage == 1 else whole_batch.audio_side
        if compiled:
            audio_side = torch.compile(audio_side)

        def step():
            loss, *spliced = audio_side(model, batch, prompt)
            if spliced:
                embeds, mask, labels = spliced
                llm = model.language_model(inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False)
                loss = llm.loss + model.config.ctc_weight * loss
            return _optimize(loss, optimizer, trained)

        return step

    return make


def _alignment(model, batch: parts.Speech, _):
    hidden, lengths = whole_batch.align(model.alignment_adapter, batch.frames, batch.lengths)
    return whole_batch.ctc(model, hidden, lengths, batch.targets, batch.target_lengths)[:1]


def ours(stage: int):
    """The trainer's own: the model's forward, losses as (sum, count), fused AdamW."""

    def make(case: Case, where: torch.device, seed: int):
        model, batch, prompt, trained = _setup(case, where, seed, stage)
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        inputs = {"encoder_frames": batch.frames, "frame_lengths": batch.lengths}
        inputs.update(ctc_targets=batch.targets, ctc_target_lengths=batch.target_lengths)
        if stage > 1:
            inputs.update(prompt)

        def step():
            return _optimize(model(**inputs).loss, optimizer, trained)

        return step

    return make


CASES = [
    Case(
        "train_step",
        name,
        SHAPES[stage],
        {
            "eager as released": eager(stage),
            "eager, padded": padded(stage),
            "eager, padded, compiled": padded(stage, compiled=True),
            "ours": ours(stage),
        },
        dtype="bfloat16" if GPU else "float32",
        sources=("soundwave_fast/model", "soundwave_fast/ops", "csrc_triton"),
        tests="tests/model/test_soundwave.py",
        budget=0.05,  # AdamW walks on: both sides take the same number of steps, rounding drifts apart
        rounds=3,
    )
    for stage, name in ((1, "stage 1"), (2, "stage 2"), (3, "stage 3"))
]


@rows(CASES)
def test_train_step(benchmark, request, case, provider):
    record(benchmark, request, case, provider)
