"""forward()'s arguments and output as in other audio models: masks, embeddings, caches, tuples, and what cannot be."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers import DynamicCache

from soundwave_fast.model import SoundwaveOutput
from soundwave_fast.model.whisper import EDGE_MELS
from tests.model import tiny

IDS = torch.arange(5, 25).view(2, 10)
AUDIO = ("input_features", "feature_lengths")


@pytest.fixture(scope="module")
def pair(tiny_parts):
    """(model with LoRA, processor)."""
    torch.manual_seed(0)
    model, processor = tiny.make_model(tiny_parts, adapter_dropout=0.0)
    return tiny.add_lora(model), processor


def inputs_of(processor, seconds=(0.6, 1.7, 1.2)):
    waves = [tiny.make_wave(i, s) for i, s in enumerate(seconds)]
    return dict(processor(text=[processor.prompt("Stop.")] * len(waves), audio=waves))


def masked(inputs, dtype=torch.int64):
    """The same inputs with input_features_mask for feature_lengths."""
    lengths, frames = inputs["feature_lengths"], inputs["input_features"].shape[-1]
    rest = {key: value for key, value in inputs.items() if key != "feature_lengths"}
    return {**rest, "input_features_mask": (torch.arange(frames) < lengths[:, None]).to(dtype)}


# -- input_features_mask -----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float32], ids=str)
def test_a_mask_is_the_lengths(pair, dtype):
    model, processor = pair
    inputs = inputs_of(processor)
    other = masked(inputs, dtype)
    assert torch.equal(model(**inputs).logits, model(**other).logits)
    heard = [model.get_audio_features(inputs[AUDIO[0]], inputs[AUDIO[1]])]
    heard.append(model.get_audio_features(other[AUDIO[0]], input_features_mask=other["input_features_mask"]))
    assert torch.equal(heard[0].data, heard[1].data) and torch.equal(heard[0].lengths, heard[1].lengths)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    assert torch.equal(model.generate(**inputs, **settings), model.generate(**other, **settings))


FRAMES = 172 + EDGE_MELS  # of the longest of the three


def wrong_masks():
    whole = torch.ones(3, FRAMES, dtype=torch.int64)
    holed = whole.clone()
    holed[1, 5] = 0
    return {
        "one of them is needed with audio, neither is given": {},
        "one of them is needed with audio, both are given": {
            "input_features_mask": whole,
            "feature_lengths": torch.full((3,), 100),
        },
        r"feature_lengths must be \(3,\), got \(2,\)": {"feature_lengths": torch.full((2,), 100)},
        r"input_features_mask must be \(3, 180\), got \(2, 180\)": {"input_features_mask": whole[:2]},
        r"input_features_mask must be \(3, 180\), got \(3, 60\)": {"input_features_mask": whole[:, :60]},
        "must be 1 on the first frames": {"input_features_mask": holed},
    }


@pytest.mark.parametrize("message", wrong_masks())
def test_lengths_that_do_not_fit(pair, message):
    model, processor = pair
    inputs = {key: value for key, value in inputs_of(processor).items() if key != "feature_lengths"}
    given = wrong_masks()[message]
    assert inputs["input_features"].shape[-1] == FRAMES
    calls = [lambda: model(**inputs, **given), lambda: model.generate(**inputs, **given)]
    calls.append(lambda: model.get_audio_features(inputs["input_features"], **given))
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


# -- without audio -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_text_alone_is_the_llms_forward(pair):
    model, _ = pair
    llm = model.language_model
    embeds = model.get_input_embeddings()(IDS)
    for inputs in (
        {"input_ids": IDS},
        {"inputs_embeds": embeds},
        {"input_ids": IDS, "position_ids": torch.arange(3, 13).expand(2, -1)},
        {"input_ids": IDS, "attention_mask": torch.ones_like(IDS).index_fill(1, torch.tensor([0, 1]), 0)},
        {"input_ids": IDS, "use_cache": False},
        {"input_ids": IDS, "output_hidden_states": True},
    ):
        got, want = model(**inputs), llm(**inputs)
        assert torch.equal(got.logits, want.logits)
        assert (got.past_key_values is None) == (want.past_key_values is None)
        assert (got.hidden_states is None) == (want.hidden_states is None)
    assert torch.equal(got.hidden_states[1], want.hidden_states[1]) and len(got.hidden_states) == 3
    moved = torch.arange(10).flip(0).expand(2, -1)  # rotary positions are relative: a shift alone would not show
    assert not torch.allclose(model(input_ids=IDS, position_ids=moved).logits, model(input_ids=IDS).logits)


@torch.no_grad()
def test_text_goes_on_from_a_cache(pair):
    model, _ = pair
    whole = model(input_ids=IDS, use_cache=False)
    assert whole.past_key_values is None
    first = model(input_ids=IDS[:, :6], use_cache=True)
    assert first.past_key_values.get_seq_length() == 6
    rest = model(input_ids=IDS[:, 6:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits, whole.logits[:, 6:], rtol=1e-4, atol=1e-4)
    assert rest.past_key_values.get_seq_length() == 10
    own = DynamicCache(config=model.config.text_config)
    model(input_ids=IDS, past_key_values=own, use_cache=True)
    assert own.get_seq_length() == 10
    assert model(input_ids=IDS, labels=IDS).past_key_values is None, "no cache in training"


def test_neither_text_nor_audio(pair, tiny_parts):
    model, _ = pair
    embeds = model.get_input_embeddings()(IDS)
    for given in ({}, {"input_ids": IDS, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="input_ids, inputs_embeds: exactly one of them must be given"):
            model(**given)
    light, _ = tiny.make_model(tiny_parts, with_language_model=False)
    with pytest.raises(ValueError, match="language_model: the model was loaded without it"):
        light(input_ids=IDS)


# -- with audio ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["inputs_embeds", "position_ids", "past_key_values"])
def test_what_makes_no_sense_with_audio(pair, name):
    model, processor = pair
    with pytest.raises(ValueError, match=f"^{name}: cannot be given with audio"):
        model(**inputs_of(processor), **{name: torch.zeros(3, 4)})


@torch.no_grad()
def test_a_cache_after_audio_is_for_one_prompt(pair):
    """Decoding by hand from forward's cache gives generate's tokens."""
    model, processor = pair
    with pytest.raises(ValueError, match="use_cache: with audio, for one prompt alone"):
        model(**inputs_of(processor), use_cache=True)
    inputs = inputs_of(processor, (1.7,))
    assert model(**inputs).past_key_values is None
    with pytest.raises(ValueError, match="use_cache"):
        model(**inputs, use_cache=True, packed=True)
    out, tokens = model(**inputs, use_cache=True), []
    for _ in range(5):
        tokens.append(out.logits[:, -1:].argmax(-1))
        out = model(input_ids=tokens[-1], past_key_values=out.past_key_values, use_cache=True)
    want = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=1)
    assert torch.equal(torch.cat(tokens, 1), want)
    with pytest.raises(ValueError, match="input_ids: needed with audio"):
        model(**{key: inputs[key] for key in AUDIO})


def test_the_placeholder_mask(pair):
    model, processor = pair
    ids = inputs_of(processor)["input_ids"]
    mask = model.get_placeholder_mask(ids)
    assert mask.dtype == torch.bool and mask.shape == ids.shape
    assert mask.sum(1).tolist() == [1, 1, 1] and (ids[mask] == processor.audio_token_id).all()


@torch.no_grad()
def test_the_output_is_a_model_output(pair):
    model, processor = pair
    inputs = inputs_of(processor)
    out = model(**inputs, output_hidden_states=True)
    audio = model.get_audio_features(inputs[AUDIO[0]], inputs[AUDIO[1]])
    assert torch.equal(out.audio_hidden_states, audio.data) and torch.equal(out["audio_lengths"], audio.lengths)
    assert list(out.keys()) == ["logits", "hidden_states", "audio_hidden_states", "audio_lengths", "frame_lengths"]
    assert all(out[key] is getattr(out, key) for key in out.keys())
    assert out[0] is out.logits and len(out.to_tuple()) == 5
    flat = model(**inputs, output_hidden_states=True, return_dict=False)
    assert isinstance(flat, tuple) and torch.equal(flat[0], out.logits)
    training = tiny.training_inputs(processor)
    scored = model(**training)
    assert list(scored.keys())[:2] == ["loss", "audio_hidden_states"] and scored["loss"] is scored[0] is scored.loss
    assert torch.equal(model(**training, return_dict=False)[0], scored.loss)
    leaves, spec = torch.utils._pytree.tree_flatten(scored)
    assert isinstance(torch.utils._pytree.tree_unflatten(leaves, spec), SoundwaveOutput)


def test_a_training_step_keeps_no_audio_tokens(pair, monkeypatch):
    """Nothing but the splice needs them: they are gone once it has run, though the output is there."""
    model, processor = pair
    shrink, seen = model.shrink, []

    def watched(heard):
        audio = shrink(heard)
        seen.append(weakref.ref(audio.data))
        return audio

    monkeypatch.setattr(model, "shrink", watched)
    out = model(**tiny.training_inputs(processor))
    gc.collect()
    assert out.loss.requires_grad and out.audio_hidden_states is None and seen[0]() is None
    out = model(**inputs_of(processor))
    assert out.audio_hidden_states is seen[1]() and out.audio_hidden_states.requires_grad
