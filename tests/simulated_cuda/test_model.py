"""The whole model on the simulated device: the CPU's losses, gradients, tokens and words; which waits it costs."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch

from soundwave_fast import generate
from soundwave_fast.model.output import CACHE
from tests.model import tiny
from tests.model.test_generation import PROMPTS, SETTINGS, inputs_of
from tests.simulated_cuda.device import read

PEAKS, COUNTS = "soundwave_fast/ops/peak_gather.py", "soundwave_fast/ops/prompt_counts.py"


@pytest.fixture(scope="module")
def pairs(tiny_parts):
    """By preset: (model with LoRA, processor). The released one hears 30 s whatever is said: seconds, interpreted."""
    found = {}
    for preset in ("paper", "released"):
        head = {"ctc_head": "free"} if preset == "released" else {}
        model, processor = tiny.make_model(tiny_parts, semantics=preset, adapter_dropout=0.0, **head)
        found[preset] = tiny.add_lora(model), processor
    return found


@pytest.fixture(scope="module")
def pair(pairs):
    return pairs["paper"]


def on_device(inputs) -> dict:
    return {name: x.to("cuda") for name, x in inputs.items()}


def ours(waits) -> Counter:
    """Waits of this library by file."""
    return Counter(w.where.split(":")[0] for w in waits if w.ours)


@pytest.mark.parametrize(
    ("preset", "seconds", "packed"),
    [
        ("paper", (0.6, 1.7, 2.4), False),
        ("paper", (0.6, 1.7, 2.4), True),
        pytest.param("released", (0.6,), False, marks=pytest.mark.slow),
    ],
)
def test_a_training_step_waits_for_the_peaks_alone(waits, pairs, preset, seconds, packed):
    pair = pairs[preset]
    model, processor = copy.deepcopy(pair[0]), pair[1]
    inputs = tiny.training_inputs(processor, seconds)
    truth = model(**inputs, packed=packed)
    truth.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    there = copy.deepcopy(pair[0]).to("cuda")
    inputs = on_device(inputs)
    waits.clear()
    out = there(**inputs, packed=packed)
    out.loss.backward()
    assert ours(waits) == {PEAKS: 1, COUNTS: 2}, waits
    torch.testing.assert_close(read(out.loss), truth.loss, rtol=1e-5, atol=0)
    assert torch.equal(read(out.audio_lengths), truth.audio_lengths)
    found = {name: read(p.grad) for name, p in there.named_parameters() if p.grad is not None}
    assert found.keys() == grads.keys() and len(found) > 20
    for name, grad in grads.items():
        assert (found[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-7, name


OPTIONS = [{}, {"num_beams": 2}, {"cache_implementation": "dynamic"}, {"lora_without_audio": False}]


@pytest.mark.parametrize(
    ("preset", "options"), [("released", {}), *(("paper", options) for options in OPTIONS)], ids=str
)
def test_generation_gives_the_same_tokens(waits, pairs, preset, options):
    model, processor = pairs[preset]
    inputs = inputs_of(processor, (1, 2, 0))
    truth = model.generate(**inputs, **SETTINGS, **options)
    there = copy.deepcopy(model).to("cuda")
    inputs = on_device(inputs)
    waits.clear()
    out = there.generate(**inputs, **SETTINGS, **options)
    assert torch.equal(read(out), truth)
    assert ours(waits) == {PEAKS: 1, COUNTS: 1 if "lora_without_audio" not in options else 2}, waits


def test_a_static_cache_is_chosen_and_filled(waits, pair, monkeypatch):
    model, processor = copy.deepcopy(pair[0]).to("cuda"), pair[1]
    seen = []
    llm = model.causal_lm.model
    plain = llm.forward
    monkeypatch.setattr(
        llm, "forward", lambda *a, **k: seen.append(type(k[CACHE]).__name__) or plain(*a, **k)
    )
    model.generate(**on_device(inputs_of(processor)), **SETTINGS)
    assert seen and set(seen) == {"StaticCache"}


def test_text_alone(waits, pair):
    model, processor = pair
    inputs = processor(text=[processor.prompt(prompt, 0) for prompt in PROMPTS])
    truth = model.generate(**inputs, **SETTINGS)
    assert torch.equal(read(copy.deepcopy(model).to("cuda").generate(**on_device(inputs), **SETTINGS)), truth)


def test_recordings_to_words_and_answers(waits, pair):
    model, processor = pair
    recordings = [tiny.make_wave(i, seconds) for i, seconds in enumerate((1.3, 0.4, 7.2, 0.01))]
    there = copy.deepcopy(model).to("cuda")
    settings = {"max_new_tokens": 6, "batch_size": 3}
    truth, out = (
        list(generate.transcripts(m, processor, recordings, window_seconds=5.0, **settings)) for m in (model, there)
    )
    assert [(t.text, t.words) for t in out] == [(t.text, t.words) for t in truth]
    assert generate.answer(there, processor, recordings, "Which?", **settings) == generate.answer(
        model, processor, recordings, "Which?", **settings
    )
