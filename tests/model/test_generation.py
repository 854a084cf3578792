"""generate(): every usual option, prompts with and without audio in one batch, LoRA switched off without audio."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteriaList, TextIteratorStreamer
from transformers.generation import MaxTimeCriteria

from soundwave_fast.model import checkpoint, generation
from soundwave_fast.ops import Packed
from tests.model import tiny

PROMPTS = ("Stop.", "What is the time now?", "Open the red door.")
SECONDS = (0.6, 2.4, 1.3)
SETTINGS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}


@pytest.fixture(scope="module")
def pair(tiny_parts):
    """(model with LoRA, processor)."""
    model, processor = tiny.make_model(tiny_parts)
    return tiny.add_lora(model), processor


@pytest.fixture(scope="module")
def without_lora(tiny_parts):
    return tiny.make_model(tiny_parts)[0]


def inputs_of(processor, audios=(1, 1, 1)):
    """A batch of three prompts, each with so many audios."""
    prompts = [processor.prompt(p, n) for p, n in zip(PROMPTS, audios)]
    waves = [tiny.make_wave(i, SECONDS[i]) for i, n in enumerate(audios) for _ in range(n)]
    return processor(text=prompts, audio=waves or None)


def one_of(processor, i, audios=1):
    waves = [tiny.make_wave(i, SECONDS[i])] * audios
    return processor(text=processor.prompt(PROMPTS[i], audios), audio=waves or None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_half_precision(tiny_parts, dtype):
    """Batched is alone, within twice what rounding to `dtype` does to either: frames first, then the first logits.

    In between stand CTC's argmaxes, which may flip by rounding alone: the LLM is given the same audio tokens.
    """
    model, processor = tiny.make_model(tiny_parts)
    checkpoint.cast(tiny.add_lora(model), dtype)
    exact = copy.deepcopy(model).float()  # the same rounded weights, float32 arithmetic
    batch, singles = inputs_of(processor), [one_of(processor, i) for i in range(3)]
    generated = model.generate(**batch, **SETTINGS)
    assert generated.shape == (3, 6) and len({tuple(row.tolist()) for row in generated}) == 3

    def frames(model, inputs):
        heard = model.hear(*model.encode(inputs["input_features"], inputs["feature_lengths"]))
        assert heard.hidden_BTD.dtype == next(model.parameters()).dtype
        return [row[:n].float() for row, n in zip(heard.hidden_BTD, heard.lengths.tolist())]

    within_rounding(frames(model, batch), *[[frames(m, one)[0] for one in singles] for m in (model, exact)])
    audio = exact.get_audio_features(batch["input_features"], batch["feature_lengths"]).unbind()
    audio = [segment.to(dtype) for segment in audio]

    def logits(model, inputs, audio):
        text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        packed = Packed.from_list([segment.to(next(model.parameters()).dtype) for segment in audio])
        more = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
        return model.generate(**text, audio=packed, **{**SETTINGS, **more}).logits[0].float()

    alone = [[logits(m, one, audio[i : i + 1])[0] for i, one in enumerate(singles)] for m in (model, exact)]
    within_rounding(list(logits(model, batch, audio)), *alone)


def within_rounding(together, alone, exact):
    """Lists of three tensors: what a batch, one by one, and float32 give."""
    own = max(float((a - e).abs().max()) for a, e in zip(alone, exact))
    assert 0 < own
    assert max(float((t - a).abs().max()) for t, a in zip(together, alone)) <= 2 * own
    n = min(map(len, exact))
    apart = min(float((exact[i][:n] - exact[j][:n]).abs().max()) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert apart > 10 * own, "a bound that tells one prompt from another"


def test_beams_and_sampled_sequences(pair):
    model, processor = pair
    inputs = inputs_of(processor)
    greedy = model.generate(**inputs, **SETTINGS)
    beams = model.generate(**inputs, **SETTINGS, num_beams=3, num_return_sequences=2)
    assert beams.shape == (6, 6) and not torch.equal(beams[0], beams[1])
    alone = torch.cat([model.generate(**one_of(processor, i), **SETTINGS, num_beams=3) for i in range(3)])
    assert torch.equal(beams[::2], alone)
    sampled = {**SETTINGS, "do_sample": True, "num_return_sequences": 4, "temperature": 2.0}
    first = model.generate(**inputs, **sampled)
    assert first.shape == (12, 6) and not torch.equal(first[0], first[1])
    cold = model.generate(**inputs, **{**sampled, "top_k": 1})
    assert torch.equal(cold, greedy.repeat_interleave(4, 0))


@pytest.mark.parametrize("audios", [(1, 1, 1), (0, 0, 0)], ids=["audio", "text"])
def test_what_it_returns_and_when_it_stops(pair, audios):
    model, processor = pair
    inputs = inputs_of(processor, audios)
    greedy = model.generate(**inputs, **SETTINGS)
    full = model.generate(**inputs, **SETTINGS, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(full.sequences, greedy) and len(full.scores) == 6
    assert torch.equal(torch.stack(full.scores, 1).argmax(-1), greedy)
    config = GenerationConfig(**{**SETTINGS, "max_new_tokens": 4})
    assert torch.equal(model.generate(**inputs, generation_config=config), greedy[:, :4])
    stop_at = int(greedy[0, 2])
    ended = model.generate(**inputs, **{**SETTINGS, "eos_token_id": stop_at})
    assert ended[0].tolist()[:3] == greedy[0, :3].tolist() and (ended[0, 3:] == 1).all()

    def after_two(ids, scores, **_):
        return torch.full((len(ids),), len(calls) >= 1 or calls.append(1) is not None)

    calls: list[int] = []
    criteria = StoppingCriteriaList([MaxTimeCriteria(60.0), after_two])
    assert model.generate(**inputs, **SETTINGS, stopping_criteria=criteria).shape[1] == 2


@pytest.mark.parametrize("audios", [1, 0], ids=["audio", "text"])
def test_a_stream_of_text(pair, audios):
    model, processor = pair
    inputs = one_of(processor, 1, audios)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=model.generate, kwargs={**inputs, **SETTINGS, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert len(pieces) > 1
    assert "".join(pieces) == processor.tokenizer.decode(model.generate(**inputs, **SETTINGS)[0])


def test_static_cache(pair):
    model, processor = pair
    inputs = inputs_of(processor)
    greedy = model.generate(**inputs, **SETTINGS)
    assert torch.equal(model.generate(**inputs, **SETTINGS, cache_implementation="static"), greedy)


def test_the_default_cache(pair):
    """Static on CUDA unless the caller or the generation config says something about it; nothing elsewhere."""
    llm = pair[0].language_model
    assert generation._with_cache({}, llm, on_cuda=False) == {}
    assert generation._with_cache({"num_beams": 2}, llm, True) == {"num_beams": 2, "cache_implementation": "static"}
    for chosen in (
        {"cache_implementation": "dynamic"},
        {"use_cache": False},
        {"generation_config": GenerationConfig(cache_implementation="offloaded")},
        {"generation_config": GenerationConfig(use_cache=False)},
    ):
        assert generation._with_cache(chosen, llm, True) == chosen


# -- prompts without audio, LoRA -----------------------------------------------------------------------------------


def test_a_mixed_batch_is_each_prompt_alone(pair):
    """None, one and two audios in one batch."""
    model, processor = pair
    mixed = model.generate(**inputs_of(processor, (0, 1, 2)), **SETTINGS)
    alone = torch.cat([model.generate(**one_of(processor, i, i), **SETTINGS) for i in range(3)])
    assert torch.equal(mixed, alone)
    assert len({tuple(row.tolist()) for row in mixed}) == 3


def test_lora_is_on_without_audio_unless_switched_off(pair, without_lora, tiny_parts):
    model, processor = pair
    inputs = inputs_of(processor, (0, 0, 0))
    plain = without_lora.language_model.generate(**inputs, **SETTINGS)[:, inputs["input_ids"].shape[1] :]
    tuned = model.generate(**inputs, **SETTINGS)
    assert not torch.equal(tuned, plain)
    assert torch.equal(model.generate(**inputs, **SETTINGS, lora_without_audio=False), plain)
    assert torch.equal(model.generate(**inputs, **SETTINGS), tuned), "it is on again"
    try:
        model.config.lora_without_audio = False
        assert torch.equal(model.generate(**inputs, **SETTINGS), plain)
    finally:
        model.config.lora_without_audio = True
    assert torch.equal(without_lora.generate(**inputs, **SETTINGS, lora_without_audio=False), plain)


@pytest.mark.parametrize(
    "more",
    [{}, {"num_beams": 2}, {"do_sample": True, "top_k": 1, "num_return_sequences": 2}],
    ids=["greedy", "beams", "sampled"],
)
def test_lora_off_in_the_rows_without_audio_alone(pair, without_lora, more):
    model, processor = pair
    settings = {**SETTINGS, **more, "lora_without_audio": False}
    mixed = model.generate(**inputs_of(processor, (1, 0, 1)), **settings)
    copies = more.get("num_return_sequences", 1)
    for i, audios in enumerate((1, 0, 1)):
        alone = (model if audios else without_lora).generate(**one_of(processor, i, audios), **settings)
        assert torch.equal(mixed[i * copies : (i + 1) * copies], alone)


def test_audio_tokens_instead_of_features(pair):
    model, processor = pair
    inputs = inputs_of(processor)
    with torch.no_grad():
        audio = model.get_audio_features(inputs["input_features"], inputs["feature_lengths"])
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    assert torch.equal(model.generate(**text, audio=audio, **SETTINGS), model.generate(**inputs, **SETTINGS))


def test_errors_name_what_is_wrong(pair, tiny_parts):
    model, processor = pair
    ids = inputs_of(processor)["input_ids"]
    with pytest.raises(ValueError, match="input_ids: 3 placeholders, but no audio is given"):
        model.generate(ids, **SETTINGS)
    light, _ = tiny.make_model(tiny_parts, with_language_model=False)
    with pytest.raises(ValueError, match="language_model: the model was loaded without it"):
        light.generate(ids, **SETTINGS)
