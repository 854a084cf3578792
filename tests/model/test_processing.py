"""SoundwaveProcessor: mels and their lengths, prompts with placeholders, bad input named, save and load."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from soundwave_fast.model.processing import AUDIO_TOKEN, SoundwaveProcessor
from soundwave_fast.model.whisper import EDGE_MELS
from tests.model import tiny


@pytest.fixture(scope="module")
def processor(tiny_parts) -> SoundwaveProcessor:
    return SoundwaveProcessor.from_parts(tiny_parts.whisper, tiny_parts.llm)


LENGTHS = [(1, 100), (16_000, 100), (16_001, 104), (479_999, 3000), (480_000, 3000)]


@pytest.mark.parametrize(("samples", "frames"), LENGTHS)
def test_mel_length(processor, samples, frames):
    wave = tiny.make_wave(0, 30)[:samples]
    assert processor.mel_length(wave) == frames
    assert processor.log_mel(wave).shape == (80, min(frames + EDGE_MELS, 3000))


def test_30s_pads_every_utterance(tiny_parts):
    padded = SoundwaveProcessor.from_parts(tiny_parts.whisper, tiny_parts.llm, encoder_pad="30s")
    wave = tiny.make_wave(0, 1.5)
    assert padded.log_mel(wave).shape == (80, 3000)
    assert padded.mel_length(wave) == 152


def test_inputs_for_generation(processor):
    waves = [tiny.make_wave(0, 1.0), tiny.make_wave(1, 2.0)]
    inputs = processor(text=[processor.prompt("What?"), processor.prompt("What is the time?")], audio=waves)
    assert set(inputs) == {"input_ids", "attention_mask", "input_features", "feature_lengths"}
    assert inputs["input_features"].shape == (2, 80, 200 + EDGE_MELS)
    assert inputs["feature_lengths"].tolist() == [100, 200]
    assert (inputs["input_features"][0, :, 100 + EDGE_MELS :] == 0).all()
    assert inputs["attention_mask"][0, 0] == 0 and (inputs["attention_mask"][:, -1] == 1).all(), "left padding"
    assert ((inputs["input_ids"] == processor.audio_token_id).sum(1) == 1).all()


def test_an_utterance_has_the_same_mel_in_a_batch_as_alone(processor):
    waves = [tiny.make_wave(0, 1.0), tiny.make_wave(1, 2.0)]
    together = processor(audio=waves)["input_features"]
    assert torch.equal(together[0, :, : 100 + EDGE_MELS], processor(audio=waves[0])["input_features"][0])


@pytest.mark.parametrize(
    ("prompts", "audios", "message"),
    [
        ([1], 2, "audio: 2 given, the prompts have 1 placeholders"),
        ([1, 1], 1, "audio: 1 given, the prompts have 2 placeholders"),
        ([0], 1, "audio: 1 given, the prompts have 0 placeholders"),
        ([2], 0, "audio: 0 given, the prompts have 2 placeholders"),
    ],
)
def test_counts_that_differ(processor, prompts, audios, message):
    with pytest.raises(ValueError, match=message):
        processor(text=[processor.prompt("x", n) for n in prompts], audio=[np.zeros(16_000, np.float32)] * audios)


@pytest.mark.parametrize(
    ("wave", "message"),
    [
        (np.zeros(480_001, np.float32), "30.0 s, one window holds 30 s"),
        (np.zeros(0, np.float32), "holds no samples"),
        (np.full(16_000, np.nan, np.float32), "not finite"),
        (np.array([0.0, np.inf], np.float32), "not finite"),
        (np.zeros((2, 16_000), np.float32), "expected a mono waveform"),
    ],
    ids=["long", "empty", "nan", "inf", "stereo"],
)
def test_bad_audio(processor, wave, message):
    with pytest.raises(ValueError, match=message):
        processor(text=processor.prompt("x"), audio=wave)


def test_arguments_it_does_not_take(processor):
    prompt, wave = processor.prompt("x"), tiny.make_wave(0, 1.0)
    with pytest.raises(TypeError, match="no_such_argument"):
        processor(text=prompt, audio=wave, no_such_argument=1)
    for wrong in ("np", None):
        with pytest.raises(ValueError, match=f"return_tensors: {wrong!r}; only 'pt' is made"):
            processor(text=prompt, audio=wave, return_tensors=wrong)
    assert set(processor(text=prompt, audio=wave, return_tensors="pt")) == set(processor(text=prompt, audio=wave))


def test_log_mel_checks_by_itself(processor):
    with pytest.raises(ValueError, match="not finite"):
        processor.log_mel(np.full(16_000, np.nan, np.float32))


def test_answers_and_transcripts(processor):
    tokenizer = processor.tokenizer
    answer = processor.answer_ids("stop")
    assert answer[-1] == tokenizer.eos_token_id and tokenizer.decode(answer[:-1]) == "stop"
    assert tokenizer.decode(processor.ctc_ids(" open the door ")) == " open the door"
    assert processor.prompt("Why?", audios=2).count(AUDIO_TOKEN) == 2


@pytest.mark.parametrize("template", [None, "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"])
def test_save_and_load(tiny_parts, tmp_path, template, caplog):
    from transformers import AutoProcessor

    from soundwave_fast.model import SoundwaveConfig

    processor = SoundwaveProcessor.from_parts(tiny_parts.whisper, tiny_parts.llm, template, encoder_pad="30s")
    processor.save_pretrained(tmp_path)
    SoundwaveConfig().save_pretrained(tmp_path)
    for loaded in (SoundwaveProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert isinstance(loaded, SoundwaveProcessor)
        assert loaded.encoder_pad == "30s" and loaded.audio_token_id == processor.audio_token_id
        assert loaded.prompt("Why?") == processor.prompt("Why?")
        wave = tiny.make_wave(3, 1.2)
        one, other = (p(text=p.prompt("Why?"), audio=wave) for p in (processor, loaded))
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert "deprecated" not in caplog.text


def test_trim_end_drops_silence_behind_speech_only():
    from soundwave_fast.audio import trim_end

    rng = np.random.default_rng(0)
    speech = np.concatenate([tiny.make_wave(0, 1.0), np.zeros(16_000), tiny.make_wave(1, 1.0)]).astype(np.float32)
    noise = 1e-4 * rng.standard_normal(5 * 16_000).astype(np.float32)
    trimmed = trim_end(np.concatenate([speech, noise]))
    assert np.array_equal(trimmed[: len(speech)], speech), "a pause within stays, as does all of the speech"
    assert len(speech) <= len(trimmed) <= len(speech) + 0.35 * 16_000
    assert len(trim_end(speech)) == len(speech)
    assert len(trim_end(np.zeros(16_000, np.float32))) == 16_000, "nothing but silence: nothing to go by"
