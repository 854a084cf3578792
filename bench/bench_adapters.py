"""The adapters end to end, encoder features to spliced embeddings with the CTC loss, forward and backward."""

from __future__ import annotations

import torch

from bench import parts, released, whole_batch
from bench.harness import Case, device, record, rows
from soundwave_fast import cost_model

TEXT, ANSWER = 24, 16
BASE = (
    {"B": 8, "T50": 1500, "S": 100} if device().type == "cuda" else {"B": 8, "T50": 200, "S": 12}
)  # 30 s, and 4 s, of speech


def _setup(case: Case, where: torch.device, seed: int):
    size = parts.size(where)
    model = parts.model(size, where)
    model.language_model.requires_grad_(False)
    batch = parts.speech(size, **case.shape, device=where, seed=seed)
    prompt = parts.prompt(size, case.shape["B"], TEXT, ANSWER, where, model.config.audio_token_id, seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, batch, prompt, trained


def _finish(loss, embeds, trained):
    """Backward of the CTC loss and of a fixed function of the embeddings; the gradients that all providers share."""
    (loss.float() + embeds.float().square().mean()).backward()
    results = (loss, trained[0].grad)
    for parameter in trained:
        parameter.grad = None
    return results


def eager(case: Case, where: torch.device, seed: int):
    model, batch, prompt, trained = _setup(case, where, seed)

    def step():
        hidden, lengths = released.align(model, batch.frames, batch.lengths)
        loss, logits = released.ctc(model, hidden, lengths, batch.targets, batch.target_lengths)
        audio = released.shrink(model, hidden, logits.argmax(-1), lengths)
        return _finish(loss, released.splice(model, prompt["input_ids"], audio), trained)

    return step


def padded(compiled: bool):
    """The whole batch at once in eager torch, or compiled."""

    def make(case: Case, where: torch.device, seed: int):
        model, batch, prompt, trained = _setup(case, where, seed)
        audio_side = whole_batch.audio_side
        if compiled:
            audio_side = torch.compile(audio_side, dynamic=True)

        def step():
            loss, embeds, _, _ = audio_side(model, batch, prompt)
            return _finish(loss, embeds, trained)

        return step

    return make


def ours(case: Case, where: torch.device, seed: int):
    model, batch, prompt, trained = _setup(case, where, seed)

    def step():
        heard = model.hear(batch.frames, batch.lengths, batch.targets, batch.target_lengths)
        spliced = model._splice(prompt["input_ids"], prompt["attention_mask"], None, model.shrink(heard), "right")
        return _finish(heard.ctc[0] / heard.ctc[1], spliced.inputs_embeds, trained)

    return step


def _cost() -> cost_model.Cost:
    size, dtype = parts.size(device()), "bfloat16" if device().type == "cuda" else "float32"
    B, T = BASE["B"], BASE["T50"] // 2
    rows_ = B * T * 3 // 4  # utterances fill three quarters of the batch on average
    align = cost_model.alignment_adapter(B, T, 2 * size.d_enc, size.hidden, 2 * size.hidden, True, dtype)
    return align + cost_model.linear_ctc_loss(rows_, size.hidden, size.vocab + 1, dtype, trainable=True)


CASES = [
    Case(
        "adapters",
        "free head",
        BASE,
        {
            "eager as released": eager,
            "eager, padded": padded(compiled=False),
            "eager, padded, compiled": padded(compiled=True),
            "ours": ours,
        },
        dtype="bfloat16" if device().type == "cuda" else "float32",
        cost=_cost(),
        sources=("soundwave_fast/model", "soundwave_fast/ops", "csrc_triton"),
        tests="tests/model/test_soundwave.py",
        rounds=5 if device().type == "cuda" else 3,
    )
]


@rows(CASES)
def test_adapters(benchmark, request, case, provider):
    record(benchmark, request, case, provider)
