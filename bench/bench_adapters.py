"""The adapters end to end, encoder features to spliced embeddings: their share of a training step, and hearing alone.

Training has the CTC loss and its backward; hearing, as before generation, neither.
"""

from __future__ import annotations

import torch

from bench import parts, released, whole_batch
from bench.harness import Case, device, record, rows
from soundwave_fast import cost_model

TEXT, ANSWER = 24, 16
BASE = (
    {"B": 8, "T50": 1500, "S": 100} if device().type == "cuda" else {"B": 8, "T50": 200, "S": 12}
)  # 30 s, and 4 s, of speech


def _setup(case: Case, where: torch.device, seed: int, train: bool):
    size = parts.size(where)
    model = parts.model(size, where).train(train)
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


def eager(train: bool):
    """One utterance after the other where the authors' code does so."""

    def make(case: Case, where: torch.device, seed: int):
        model, batch, prompt, trained = _setup(case, where, seed, train)

        def step():
            hidden, lengths = released.align(model, batch.frames, batch.lengths)
            loss, logits = released.ctc(model, hidden, lengths, batch.targets, batch.target_lengths)
            audio = released.shrink(model, hidden, logits.argmax(-1), lengths)
            return _finish(loss, released.splice(model, prompt["input_ids"], audio), trained)

        @torch.no_grad()
        def hear():
            hidden, lengths = released.align(model, batch.frames, batch.lengths)
            audio = released.shrink(model, hidden, released.head(model, hidden).argmax(-1), lengths)
            return (released.splice(model, prompt["input_ids"], audio),)

        return step if train else hear

    return make


def padded(train: bool, compiled: bool):
    """The whole batch at once in eager torch, or compiled."""

    def make(case: Case, where: torch.device, seed: int):
        model, batch, prompt, trained = _setup(case, where, seed, train)
        audio_side = whole_batch.audio_side if train else whole_batch.hear
        if compiled:
            audio_side = torch.compile(audio_side)

        def step():
            loss, embeds, _, _ = audio_side(model, batch, prompt)
            return _finish(loss, embeds, trained)

        @torch.no_grad()
        def hear():
            return audio_side(model, batch, prompt)[:1]

        return step if train else hear

    return make


def ours(train: bool):
    def make(case: Case, where: torch.device, seed: int):
        model, batch, prompt, trained = _setup(case, where, seed, train)

        text = prompt["input_ids"], prompt["attention_mask"], None

        def hear(*targets):
            counts = model._count(*text)
            heard = model.hear(batch.frames, batch.lengths, *targets)
            return heard, model._splice(*text, model.shrink(heard), "right", counts).inputs_embeds

        def step():
            heard, embeds = hear(batch.targets, batch.target_lengths)
            return _finish(heard.ctc[0] / heard.ctc[1], embeds, trained)

        @torch.no_grad()
        def hear_alone():
            return hear()[1:]

        return step if train else hear_alone

    return make


def _cost(train: bool) -> cost_model.Cost:
    size, dtype = parts.size(device()), "bfloat16" if device().type == "cuda" else "float32"
    B, T = BASE["B"], BASE["T50"] // 2
    rows_ = B * T * 3 // 4  # utterances fill three quarters of the batch on average
    widths = 2 * size.d_enc, size.hidden, 2 * size.hidden
    align = cost_model.alignment_adapter(B, T, *widths, True, dtype, backward=train)
    head = cost_model.linear_ctc_loss(rows_, size.hidden, size.vocab + 1, dtype, trainable=train, backward=train)
    return align + head


def case(train: bool) -> Case:
    return Case(
        "adapters",
        "training, free head" if train else "hearing, free head",
        BASE,
        {
            "eager as released": eager(train),
            "eager, padded": padded(train, compiled=False),
            "eager, padded, compiled": padded(train, compiled=True),
            "ours": ours(train),
        },
        dtype="bfloat16" if device().type == "cuda" else "float32",
        cost=_cost(train),
        sources=("soundwave_fast/model", "soundwave_fast/ops", "csrc_triton"),
        tests="tests/model/test_soundwave.py",
        rounds=5 if device().type == "cuda" or not train else 3,
    )


CASES = [case(train=False), case(train=True)]


@rows(CASES)
def test_adapters(benchmark, request, case, provider):
    record(benchmark, request, case, provider)
